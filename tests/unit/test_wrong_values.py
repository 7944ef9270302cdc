"""Values that are none, and places that are not what they seem: said, not taken for something else."""

import pytest
import torch
from tiny import load, make_tiny, save_tiny, tokens

import kvfold
from kvfold.calibration.calibration import Calibration
from kvfold.compression.recipe import make_recipe
from kvfold.errors import HealError, OutputError, RecipeError
from kvfold.healing.recipe import make_healing
from kvfold.runtimes.transformers.cache import FoldedCache

BASE = {"model": "m", "out": "o"}


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"kv_budget": float("nan")}, "kv_budget"),
        ({"kv_budget": float("inf")}, "kv_budget"),
        ({"kv_budget": -0.5}, "kv_budget"),
        ({"target_kl": float("nan")}, "target_kl"),
        ({"min_width": float("nan")}, "min_width"),
        ({"context_len": 0}, "context_len"),
        ({"context_len": 10**30}, "context_len"),
        ({"seed": 1.5}, "seed"),
        ({"preset": ["int8"]}, "preset"),
        ({"prefer": ["size"]}, "prefer"),
        ({"width": {"method": 5}}, "width.method"),
        ({"length": {"method": "recency", "kept": float("nan")}}, "length.kept"),
        ({"calibration": {"seq_len": 1}}, "seq_len is 1"),
        ({"calibration": {"num_samples": -1}}, "num_samples"),
        ({"calibration": {"own": float("nan")}}, "own"),
    ],
)
def test_recipes(fields, named):
    with pytest.raises(RecipeError, match=named):
        make_recipe(BASE | fields)


def test_a_calibration_as_in_the_recipe():
    assert Calibration(seq_len=2, num_samples=1).seq_len == 2


@pytest.mark.parametrize("temperature", [0, -1, float("nan"), float("inf")])
def test_temperatures(temperature):
    with pytest.raises(RecipeError, match="temperature"):
        kvfold.generate("folder", "The", sample=True, temperature=temperature)


@pytest.mark.parametrize(
    "fields", [{"learning_rate": 0.0}, {"learning_rate": -1.0}, {"weight_decay": -1.0}, {"warmup": 1.0}]
)
def test_healing(fields):
    with pytest.raises((HealError, RecipeError), match="learning_rate"):
        make_healing({"folded": "f", "data": "d", "out": "o", "teacher": "t"} | fields)


@pytest.fixture
def model(tmp_path):
    return save_tiny(make_tiny("llama_mha"), tmp_path / "model")


@pytest.mark.parametrize("leads_to", ["folded", "nowhere", "itself", "model"])
def test_symbolic_links_are_not_written_to(model, tmp_path, leads_to):
    """Whether they lead to a folder of ours or nowhere: what is behind them stays as it is."""
    recipe = {"model": str(model), "preset": "int8"}
    folded = kvfold.compress(recipe | {"out": str(tmp_path / "folded")}, device="cpu").out
    link = tmp_path / "itself"
    link.symlink_to({"folded": folded, "model": model}.get(leads_to, tmp_path / leads_to))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(OutputError, match="symbolic link"):
        kvfold.compress(recipe | {"out": str(link)}, overwrite=True, device="cpu")
    assert sorted(tmp_path.iterdir()) == before and link.is_symlink()


def test_the_root_is_no_folder_to_write(model):
    with pytest.raises(OutputError, match="no name of a folder"):
        kvfold.compress({"model": str(model), "out": "/", "preset": "int8"}, overwrite=True, device="cpu")


@pytest.mark.parametrize("method", ["identity", "svd_a"])
def test_no_more_is_taken_back_than_there_is(fold, method):
    folded = fold("llama_mha", method, kv_budget=1.0 if method == "identity" else 0.5)
    network, cache = load(folded.out), FoldedCache(folded.plan)
    with torch.no_grad():
        network(tokens(1, 20), past_key_values=cache)
    with pytest.raises(ValueError, match="21 tokens cannot be removed from a cache that holds 20"):
        cache.crop(-21)
    cache.crop(0)
    assert cache.get_seq_length() == 20
    cache.crop(-20)
    assert cache.get_seq_length() == 0


def test_prefix_tuning_is_refused_with_the_way_out(fold):
    """peft makes keys and values of the original's shape; prompt tuning makes embeddings."""
    import peft

    folder, ids = fold("llama_mha", "svd_a", kv_budget=0.5).out, tokens(1, 9)
    prefix = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    with pytest.raises(ValueError, match="train by LoRA or prompt tuning"):
        peft.get_peft_model(load(folder), prefix)(ids)
    prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    assert peft.get_peft_model(load(folder), prompt)(ids).logits.isfinite().all()

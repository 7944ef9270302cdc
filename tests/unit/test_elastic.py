"""Models that work at several widths, and what cuts them to one."""

import pytest
import torch
from test_healing import healing, lost, with_text
from tiny import MODELS, load, logits, make_tiny, save_tiny, tokens

import kvfold
from kvfold.errors import BudgetError, CheckpointError, PlanError
from kvfold.healing.elastic import Elastic
from kvfold.plan.nested import kept_width
from kvfold.runtimes.transformers.projections import GroupedLinear
from kvfold.testing import assert_close

WIDTHS = {
    "svd_a": {"method": "svd_a", "v_latent": "layer"},
    "groups": {"method": "svd_a", "latent": "group", "group_size": 2},
    "on_read": {"method": "fisher", "rope": "on_read"},
}


WIDE_HEADS = ("mistral_window", "qwen3_norm_window", "neox_partial", "gemma2_softcap", "gemma3_norm", "phi3_partial")
PAIRS = [(width, model) for width in WIDTHS for model in (WIDE_HEADS if width == "groups" else MODELS)]


def compressed(root, model, width, **more):
    save_tiny(make_tiny(model), root / "source")
    recipe = {"model": str(root / "source"), "out": str(root / "folded"), "width": width, "kv_budget": 0.75}
    recipe |= {"calibration": {"data": "self", "num_samples": 8, "seq_len": 48}}
    return kvfold.compress(recipe | more, device="cpu").plan


@pytest.mark.parametrize(("width", "model"), PAIRS)
@pytest.mark.filterwarnings("ignore:kv_budget .* was asked for:UserWarning")
def test_a_truncated_model_is_what_was_trained(tmp_path, model, width):
    """Every family: hiding trailing numbers while training gives the logits of the folder that lacks them."""
    plan = compressed(tmp_path, model, WIDTHS[width])
    narrow = kvfold.truncate(tmp_path / "folded", tmp_path / "narrow", kv_budget=0.7 * plan.kv_budget)
    assert narrow.kv_budget <= 0.7 * plan.kv_budget
    wide = load(tmp_path / "folded")
    before, after = ([side.width for spec in made.owned for side in spec.sides] for made in (plan, narrow))
    sizes = list(zip(before, after, strict=True))
    share = next(s / 1000 for s in range(1, 1000) if all(kept_width(old, s / 1000) == new for old, new in sizes))
    elastic = Elastic(wide, least=share, seed=0)
    whole = logits(wide, tokens())
    elastic.share = share
    assert torch.equal(logits(wide, tokens()), whole)  # not while it evaluates
    for part in wide.modules():
        part.train(isinstance(part, torch.nn.Linear | GroupedLinear))  # no dropout
    trained = logits(wide, tokens())
    assert_close(trained, logits(load(tmp_path / "narrow"), tokens()), tolerance=1e-5)
    assert any(old > new for old, new in sizes) and not torch.equal(trained, whole)


def test_layers_that_share_are_cut_with_their_owner(tmp_path):
    width, depth = {"method": "logit", "v_latent": "layer"}, {"method": "contiguous", "owners": 2}
    plan = compressed(tmp_path, "llama_mha", width, kv_budget=0.5, depth=depth)
    narrow = kvfold.truncate(tmp_path / "folded", tmp_path / "narrow", kv_budget=0.25)
    assert narrow.kv_sharing_target_layer == plan.kv_sharing_target_layer and narrow.kv_budget <= 0.25
    assert logits(load(tmp_path / "narrow"), tokens()).isfinite().all()


def test_widths_are_drawn_alike_and_reach_both_ends(tmp_path):
    compressed(tmp_path, "llama_mha", WIDTHS["svd_a"])
    elastic = Elastic(load(tmp_path / "folded"), least=0.25, seed=1)
    drawn = []
    for step in [*range(60), *range(60)]:
        elastic.draw(step)
        drawn.append(elastic.share)
    assert drawn[:60] == drawn[60:] and min(drawn) == 0.25 and max(drawn) == 1.0 and len(set(drawn)) > 20


def test_elastic_healing_is_better_when_it_is_cut(tmp_path):
    save_tiny(make_tiny("llama_mha", vocab_size=4096), tmp_path / "source")
    with_text(tmp_path)
    recipe = {
        "model": str(tmp_path / "source"),
        "out": str(tmp_path / "folded"),
        "width": WIDTHS["svd_a"],
        "kv_budget": 0.5,
    }
    kvfold.compress(recipe | {"calibration": {"data": "self", "num_samples": 8, "seq_len": 48}}, device="cpu")
    kl = {}
    for name, elastic in (("rigid", 0.0), ("elastic", 0.25)):
        kvfold.heal(healing(tmp_path, name, elastic=elastic, max_tokens=6400), device="cpu")
        kvfold.truncate(tmp_path / name, tmp_path / f"{name}-cut", kv_budget=0.125)
        kl[name] = lost(tmp_path, f"{name}-cut").kl
    assert kl["elastic"] < 0.9 * kl["rigid"]


def test_what_cannot_be_cut_is_refused(tmp_path):
    compressed(tmp_path, "llama_mha", WIDTHS["svd_a"])
    with pytest.raises(BudgetError, match="is not below the 0.75"):
        kvfold.truncate(tmp_path / "folded", tmp_path / "out", kv_budget=0.9)
    with pytest.raises(BudgetError, match="8 numbers per stored head take"):
        kvfold.truncate(tmp_path / "folded", tmp_path / "out", kv_budget=0.01)
    with pytest.raises(CheckpointError, match="is not a folded model"):
        kvfold.truncate(tmp_path / "source", tmp_path / "out", kv_budget=0.1)
    for name, recipe in (
        ("quantizes", {"width": {"method": "identity"}, "bits": {"method": "integer"}, "kv_budget": None}),
        ("rotated as they are", {"width": {"method": "mean_pool"}, "kv_budget": 0.5}),
    ):
        fields = {"model": str(tmp_path / "source"), "out": str(tmp_path / name)} | recipe
        kvfold.compress(fields, device="cpu")
        with pytest.raises(PlanError, match=name):
            kvfold.truncate(tmp_path / name, tmp_path / "out", kv_budget=0.1)
    assert not (tmp_path / "out").exists()

"""The whole journey on the real model that ships with the package, through the command line and in Python."""

import dataclasses
import json
import re

import pytest
import torch
import yaml
from tiny import make_tiny
from typer.testing import CliRunner

import kvfold
from kvfold.calibration.calibration import Calibration
from kvfold.calibration.text import sample_from_model
from kvfold.checkpoint.source import open_source
from kvfold.cli.main import app
from kvfold.compression.recipe import make_recipe, material_of
from kvfold.errors import RecipeError
from kvfold.evaluation.demo import MODEL
from kvfold.evaluation.texts import Predictions, evaluate_models
from kvfold.linalg.eigen import Moment
from kvfold.runtimes.transformers.cache import FoldedCache
from kvfold.runtimes.transformers.load import load, load_weights
from kvfold.testing import assert_close

JSON_FIELDS = [
    "loss", "perplexity", "base_loss", "base_perplexity", "kl", "top1_agreement", "kv_budget", "kv_bytes_per_token",
    "base_kv_bytes_per_token", "tokens",
]  # fmt: skip


def run(*arguments):
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout.strip().splitlines()[-1])


@pytest.fixture(scope="module")
def journey(tmp_path_factory):
    """The packaged model folded by three presets at half the bytes."""
    root = tmp_path_factory.mktemp("journey")
    options = ["--data", "self", "--num-samples", 16, "--seq-len", 256, "--run-dir", root / "run"]
    made = {}
    for name, extra in {
        "svd_a": [],
        "svd_a_group": ["--set", "width.latent=group"],
        "svd_w": [],
        "gqa": [],
    }.items():
        preset = name.removesuffix("_group")
        made[name] = run(
            "compress", MODEL, "--preset", preset, "--kv-budget", "1/2", *options, *extra, "--out", root / name
        )
    text = "\n".join(load(MODEL).tokenizer.batch_decode(_sampled(seed=11)))
    (root / "text.txt").write_text(text)
    return root, made


def _sampled(seed):
    return sample_from_model(load_weights(MODEL, "float32", "cpu"), num_samples=8, seq_len=256, seed=seed)


def test_compress_says_what_it_made(journey):
    root, made = journey
    assert made["svd_a"]["kv_budget"] == 0.5
    assert made["svd_a"]["base_kv_bytes_per_token"] == 2 * made["svd_a"]["kv_bytes_per_token"] == 6 * 6 * 32 * 2 * 2
    recipe = yaml.safe_load((root / "svd_a_group" / "recipe.yaml").read_text())
    assert recipe["width"] == {
        "method": "svd_a", "latent": "group", "v_latent": "group", "group_size": 0,
            "grouping": "neighbours", "kv_heads": 0, "multiple": 8,
    }  # fmt: skip
    card = (root / "svd_a" / "README.md").read_text()
    assert "| per token | 4,608 | 2,304 | 0.5000 |" in card and "from_pretrained" in card
    assert sorted(f.name for f in (root / "svd_a").iterdir()) == [
        "README.md", "config.json", "generation_config.json", "kvfold_manifest.json", "model.safetensors",
        "modeling_kvfold.py", "recipe.yaml", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip


def test_a_written_recipe_makes_the_same_model(journey, tmp_path):
    root, _ = journey
    run("compress", "--recipe", root / "svd_a" / "recipe.yaml", "--out", tmp_path / "again", "--run-dir", root / "run")
    again, first = (folder / "model.safetensors" for folder in (tmp_path / "again", root / "svd_a"))
    assert again.read_bytes() == first.read_bytes()


def test_the_papers_order_holds_at_half_the_bytes(journey):
    """Loss change: svd_a < svd_w < mean pooling, and one latent per layer <= one per group (arXiv 2406.07056)."""
    root, made = journey
    found = {
        name: run("evaluate", root / name, "--against", MODEL, "--data", root / "text.txt", "--seq-len", 256)
        for name in made
    }
    assert list(found["svd_a"]) == JSON_FIELDS
    change = {name: f["loss"] - f["base_loss"] for name, f in found.items()}
    assert change["svd_a"] <= change["svd_a_group"] < change["svd_w"] < change["gqa"]
    assert change["svd_a"] < 0.05 and found["svd_a"]["kl"] < 0.05
    assert found["svd_a"]["top1_agreement"] > 0.8 > found["gqa"]["top1_agreement"]


def test_evaluating_the_original_against_itself_finds_nothing(journey):
    root, _ = journey
    found = run(
        "evaluate", MODEL, "--against", MODEL, "--data", root / "text.txt", "--max-tokens", 600, "--seq-len", 100
    )
    assert found["loss"] == found["base_loss"] and abs(found["kl"]) < 1e-12
    assert found["top1_agreement"] == found["kv_budget"] == 1 and found["tokens"] == 6 * 99


def test_the_original_must_be_the_original(journey):
    root, _ = journey
    with pytest.raises(RecipeError, match="is folded itself; give the original"):
        kvfold.evaluate(root / "svd_a", against=root / "gqa", data_file=root / "text.txt")


def test_the_original_must_have_the_same_vocabulary(journey):
    root, _ = journey
    loaded, other = load(root / "svd_a"), make_tiny("llama_mha")
    with pytest.raises(RecipeError, match="vocabularies of 4096 and 211 tokens"):
        evaluate_models(loaded.model, other, torch.ones(1, 8, dtype=torch.long), loaded.plan)


def test_evaluate_measures_the_loss_that_transformers_measures(journey):
    root, _ = journey
    loaded = load(MODEL)
    ids = torch.tensor(loaded.tokenizer((root / "text.txt").read_text())["input_ids"][:512]).view(2, 256)
    with torch.no_grad():
        expected = loaded.model(ids, labels=ids).loss.item()
    found = kvfold.evaluate(root / "svd_a", against=MODEL, data_file=root / "text.txt", seq_len=256, max_tokens=512)
    assert found.base_loss == pytest.approx(expected, rel=1e-5)


def test_inspect_and_generate(journey):
    root, _ = journey
    found = run("inspect", root / "svd_a")
    assert found["kv_bytes"]["2048"] == 2048 * 2304 and found["servable_by"]["transformers"] is True
    assert run("inspect", MODEL)["folded"] is False
    made = run("generate", root / "svd_a", "--prompt", "The old man", "--max-new-tokens", 12)
    assert made["new_tokens"] == 12 and made["text"].strip() and made["kv_budget"] == 0.5
    plain = run("generate", MODEL, "--prompt", "The old man", "--max-new-tokens", 12)
    assert made["cache_bytes"] * 2 == plain["cache_bytes"] and made["dtype"] == "float32"


def test_compare_writes_a_report(tmp_path):
    found = run(
        "compare", MODEL, "--preset", "gqa", "--preset", "svd_a:width.latent=group,width.multiple=4", "--kv-budget", "1/2",
        "--kv-budget", "1/12", "--num-samples", 4, "--seq-len", 128, "--max-tokens", 512, "--out", tmp_path / "out",
    )  # fmt: skip
    rows = {(r["preset"].split(":")[0], round(r["asked_budget"], 2)): r for r in found["rows"]}
    assert rows["svd_a", 0.5]["kl"] < rows["gqa", 0.5]["kl"] and rows["svd_a", 0.08]["kv_budget"] < 1 / 12 + 1e-9
    assert "out of reach" in rows["gqa", 0.08]["note"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<svg") == 2 and "keys before rotation" in page and not re.search(r"(src|href)=.http", page)
    assert json.loads((tmp_path / "out" / "comparison.json").read_text())["energy"]["values"][5][-1] == 1.0


@pytest.mark.parametrize("preset", ["svd_a", "svd_w", "identity"])
def test_full_budget_on_the_packaged_model(preset, tmp_path):
    """In bfloat16 storage the folded weights are rounded; in the mathematics nothing is lost."""
    options = ["--data", "self", "--num-samples", 16, "--seq-len", 64]
    run("compress", MODEL, "--preset", preset, "--kv-budget", "1", *options, "--out", tmp_path / "out")
    ids = _sampled(seed=2)[:2]
    with torch.no_grad():
        expected = load_weights(MODEL, "float32", "cpu")(ids).logits
        found = load_weights(tmp_path / "out", "float32", "cpu")(ids).logits
    assert_close(found, expected, tolerance=0 if preset == "identity" else 1e-2)


def test_real_bytes_of_the_packaged_model(journey):
    root, _ = journey
    loaded = load(root / "svd_a", dtype="bfloat16")
    cache, ids = FoldedCache(loaded.plan), torch.randint(5, 4000, (4, 300))
    with torch.no_grad():
        loaded.model(ids[:, :200], past_key_values=cache)
        assert cache.nbytes_allocated == loaded.plan.kv_bytes(200, batch_size=4)
        for i in range(200, 300):
            loaded.model(ids[:, i : i + 1], past_key_values=cache)
    assert cache.nbytes_allocated == loaded.plan.kv_bytes(300, batch_size=4) == 4 * 512 * 2304
    assert cache.nbytes == 4 * 300 * 2304


def test_more_budget_never_loses_more(journey, tmp_path):
    root, _ = journey
    losses = []
    for budget in ("1/6", "1/3", "1/2", "1"):
        out = tmp_path / budget.replace("/", "-")
        run(
            "compress", MODEL, "--preset", "svd_a", "--kv-budget", budget, "--data", "self", "--num-samples", 16,
            "--seq-len", 256, "--run-dir", root / "run", "--out", out,
        )  # fmt: skip
        found = run("evaluate", out, "--against", MODEL, "--data", root / "text.txt", "--seq-len", 256)
        losses.append(found["kl"])
    assert losses == sorted(losses, reverse=True) and losses[-1] < 1e-3


def test_svd_a_keeps_the_most_energy_of_any_basis():
    """Eckart-Young: no other orthonormal basis of that size reconstructs the calibration data better."""
    from kvfold.linalg.eigen import top_eigenvectors

    x = torch.randn(400, 24, dtype=torch.float64) @ torch.randn(24, 24, dtype=torch.float64)
    moment = Moment.zeros(24)
    moment.update(x)
    basis = top_eigenvectors(moment.second_FF, 8)
    error = (x - x @ basis @ basis.T).square().sum()
    right = torch.linalg.svd(x, full_matrices=False).Vh[:8]
    assert_close(error, (x - x @ right.T @ right).square().sum())


def test_the_original_predicts_a_window_once(monkeypatch):
    """However many folded models are compared with it; windows beyond what is kept are computed again."""
    model, windows = load_weights(MODEL, "float32", "cpu"), torch.randint(5, 4000, (2, 12))
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    known = Predictions(model)
    first = [known(window) for window in windows]
    assert (
        all(torch.equal(known(window), logits) for window, logits in zip(windows, first, strict=True))
        and len(calls) == 2
    )
    monkeypatch.setattr("kvfold.evaluation.texts.ELEMENTS_KEPT", first[0].numel())
    known = Predictions(model)
    assert [known(window) is not None for window in (*windows, *windows)] and len(calls) == 5


def test_a_share_of_the_calibration_text_is_the_models_own(journey, tmp_path):
    root, _ = journey

    def drawn(data, num_samples, own=0.0):
        calibration = {"data": data, "num_samples": num_samples, "seq_len": 32, "own": own}
        recipe = make_recipe({"model": str(MODEL), "out": str(tmp_path), "preset": "svd_a", "kv_budget": 0.5})
        recipe = dataclasses.replace(recipe, calibration=Calibration(**calibration))
        return material_of(recipe, open_source(MODEL), tmp_path).tokens()

    text = str(root / "text.txt")
    assert torch.equal(drawn(text, 4, own=0.5), torch.cat([drawn(text, 2), drawn("self", 2)]))
    assert torch.equal(drawn(text, 4, own=0.99), torch.cat([drawn(text, 1), drawn("self", 3)]))
    with pytest.raises(RecipeError, match=r"calibration.own is 1.0; it is a share"):
        drawn(text, 4, own=1.0)

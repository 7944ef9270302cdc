"""Budgets shared by measured distortion."""

import json

import pytest
import torch
from tiny import load, logits, make_tiny, save_tiny, tokens

import kvfold
from kvfold.compression.probe import interpolate
from kvfold.compression.recipe import load_recipe, make_recipe
from kvfold.errors import BudgetError
from kvfold.evaluation.texts import evaluate_models


def test_interpolation_goes_through_measured_points_and_never_rises():
    distortions = [1.0, 0.5, 0.25, 0.1, 0.01, 0.0]
    kls = interpolate(distortions, {1: 0.8, 3: 0.02})
    assert kls[1] == pytest.approx(0.8) and kls[3] == pytest.approx(0.02) and kls[-1] == 0
    assert kls == sorted(kls, reverse=True)
    assert kls[0] == pytest.approx(1.6) and kls[4] == pytest.approx(0.002)  # beyond them in proportion
    assert 0.02 < kls[2] < 0.8


@pytest.fixture(scope="module")
def folded(tmp_path_factory):
    """A model whose last layer adds next to nothing, folded by measured distortion."""
    root = tmp_path_factory.mktemp("probe")
    model = make_tiny("llama_mha")
    with torch.no_grad():
        model.model.layers[2].self_attn.o_proj.weight.mul_(1e-3)
    source = save_tiny(model, root / "source")
    fields = {
        "model": str(source),
        "kv_budget": 0.5,
        "width": {"method": "svd_a"},
        "calibration": {"data": "self", "num_samples": 16, "seq_len": 32},
    }

    def run(name, **more):
        return kvfold.compress(
            make_recipe(fields | {"out": str(root / name)} | more), run_dir=root / "run", device="cpu"
        )

    return root, run


def test_numbers_go_where_they_are_missed(folded):
    root, run = folded
    plan = run("measured", allocate="measured").plan
    sizes = [spec.elements_per_token for spec in plan.owned]
    assert sizes[2] < min(sizes[:2]) and plan.kv_budget <= 0.5
    original = logits(load(root / "source"), tokens())
    measured, uniform = (
        (logits(load(folder), tokens()) - original).square().mean()
        for folder in (root / "measured", run("uniform").out)
    )
    assert measured < uniform


def test_what_was_measured_serves_other_budgets(folded, monkeypatch):
    root, run = folded
    run("half", allocate="measured")
    (file,) = (root / "run").glob("probes-*.json")
    before = json.loads(file.read_text())
    assert len(before) == 3 * 2 * 3  # the two smallest sizes fall together here
    monkeypatch.setattr("kvfold.compression.probe.Probe._kl", lambda *args: pytest.fail("measured again"))
    run("quarter", allocate="measured", kv_budget=0.25)
    assert json.loads(file.read_text()) == before


def test_bits_are_shared_out_by_what_was_measured(folded):
    """The layer that adds next to nothing gets next to nothing; a plan under a KL keeps its promise, about, on other text."""
    root, run = folded
    fields = {"width": {"method": "fisher", "multiple": 4}, "bits": {"method": "mixed"}, "allocate": "measured"}
    plan = run("auto", kv_budget=0.1, **fields).plan
    sizes = [spec.bytes_per_token(4) for spec in plan.owned]
    assert sizes[2] < min(sizes[:2]) / 2 and 0.08 < plan.kv_budget <= 0.1
    strict, loose = (run(f"kl{kl}", kv_budget=None, target_kl=kl, **fields).plan.kv_budget for kl in (0.001, 0.05))
    assert loose < strict < 1
    original = load(root / "source")
    for kl in (0.001, 0.05):
        assert evaluate_models(load(root / f"kl{kl}"), original, tokens(8, 32), plan).kl < 3 * kl


def test_a_kl_that_joint_latents_do_not_reach_names_what_does(folded):
    """The method is chosen for few of the bytes, where a KL is asked for."""
    _, run = folded
    joint = {"width": {"method": "mla"}, "bits": {"method": "mixed"}, "allocate": "greedy"}
    with pytest.raises(BudgetError, match=r"--preset auto --set width\.method=fisher --set width\.rope=banded"):
        run("out_of_reach", kv_budget=None, target_kl=1e-12, **joint)


def test_the_plain_cache_in_8_bits_is_taken_where_it_loses_less(folded, monkeypatch):
    root, run = folded
    fields = {"width": {"method": "fisher", "multiple": 4}, "bits": {"method": "mixed"}, "allocate": "measured"}
    tight = run("tight", kv_budget=0.2, **fields)  # 8 bits of 32 and their scales take more
    assert any(spec.k_bits.tiers != ((8, 8),) for spec in tight.plan.owned)
    monkeypatch.setattr("kvfold.compression.probe.Probe.kl_of", lambda self, plan, width=None: float(width is None))
    with pytest.warns(UserWarning, match="the plain cache in 8 bits .* loses less"):
        plain = run("plain", kv_budget=0.3, prefer="speed", **fields)
    assert all(spec.k_bits == spec.v_bits and spec.k_bits.tiers == ((8, 8),) for spec in plain.plan.owned)
    again = make_recipe(load_recipe(root / "plain" / "recipe.yaml"))
    assert again.width == {"method": "identity"} and again.prefer is None
    assert evaluate_models(load(root / "plain"), load(root / "source"), tokens(8, 32), plain.plan).kl < 1e-3
    monkeypatch.setattr("kvfold.compression.probe.Probe.kl_of", lambda self, plan, width=None: float(width is not None))
    kept = run("kept", kv_budget=0.3, **fields).plan
    assert all(spec.k_projection for spec in kept.owned)

"""Layers that store only what layers below leave unsaid: the oracle, what is left, and what stands in the way."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from tiny import MODELS, load, logits, rotation, tokens

import kvfold
from kvfold.calibration.text import sample_from_model
from kvfold.checkpoint.source import open_source
from kvfold.compression.compress import layer_group
from kvfold.compression.prediction import Prediction
from kvfold.compression.recipe import make_recipe, material_of
from kvfold.compression.request import Request, limits_of
from kvfold.errors import PlanError
from kvfold.evaluation.demo import MODEL
from kvfold.linalg.regression import RIDGE
from kvfold.plan.folded_weights import FoldedWeights
from kvfold.plan.number_format import NumberFormat, StoredShape
from kvfold.plan.plan import CachePlan
from kvfold.runtimes import reference
from kvfold.runtimes.kernels.dispatch import pack
from kvfold.runtimes.transformers.cache import FoldedCache
from kvfold.runtimes.transformers.load import load_weights
from kvfold.testing import assert_close, relative_rms

MIXED = {"method": "mixed", "multiple": 4}
LENGTHS = {
    "plain": {"method": "identity"},
    "recent": {"method": "recent", "tokens": 6},
    "long": {"method": "recent", "tokens": 16},
}
CALIBRATION = {"data": "self", "num_samples": 8, "seq_len": 48}
TWO_KINDS = ("qwen3_norm_window", "gemma2_softcap", "gemma3_norm")


def recipe(model, out, length, **fields):
    width = {"method": "mla", "multiple": 4, "leading": 6, "recent_leading": 10} | fields.pop("width", {})
    found = {"model": str(model), "out": str(out), "width": width, "bits": MIXED, "length": LENGTHS[length]}
    found |= {"allocate": "greedy", "kv_budget": 0.1, "calibration": CALIBRATION}
    return make_recipe(found | fields)


@pytest.fixture(scope="module")
def fold(tiny_dir, tmp_path_factory):
    root, done = tmp_path_factory.mktemp("predicted"), {}

    def run(model, length, **fields):
        key = f"{model} {length} {fields}"
        if key not in done:
            asked = recipe(tiny_dir / model, root / f"{len(done)}", length, **copy.deepcopy(fields))
            done[key] = kvfold.compress(asked, run_dir=root / "run", device="cpu")
        return done[key]

    return run


@pytest.mark.filterwarnings("ignore:kv_budget")
@pytest.mark.parametrize("length", ["plain", "recent"])
@pytest.mark.parametrize("model", MODELS)
def test_the_model_equals_the_oracle(fold, model, length):
    """In float64, where codes do not depend on how a product was rounded."""
    folded = fold(model, length)
    assert folded.plan.predicts or model in TWO_KINDS
    network, ids = load(folded.out, dtype=torch.float64), tokens(2, 20)
    assert_close(logits(network, ids), logits_by_the_oracle(network, ids), tolerance=1e-3)


def test_how_many_numbers_predict_a_layer(tiny_dir):
    """As many as let a step read two thirds of the source's numbers on average, and no more than there are tokens for."""
    source = open_source(tiny_dir / "llama_yarn")
    layers = [dataclasses.replace(source.layers[0], index=i, num_kv_heads=3, head_dim=64) for i in range(8)]

    def plan(own, tokens=None, **width):
        asked = recipe("model", "out", "recent", width={"leading": None, "recent_leading": 256} | width)
        limits = limits_of(asked, tokens)
        request = Request(layers=layers, targets=(None,) * 8, axes=asked.axes, dtype="bfloat16", limits=limits)
        shape = StoredShape(1, own, NumberFormat(tiers=((own, 4),)))
        return request.plan({(i, part): shape for i in range(8) for part in request.parts_of(layers[i])})

    found = plan(104)
    assert {spec.leading for spec in found.owned if spec.predicted_from} == {96}  # (2/3 * 384 - 104) / 1.5, in eights
    assert sum(spec.head_dim + spec.predictors for spec in found.owned) / 8 <= 2 / 3 * 384
    assert not plan(256).predicts
    few = plan(104, tokens=1024)
    assert [spec.leading for spec in few.owned] == [0, 96, 64, 40] * 2 and max(s.predictors for s in few.owned) <= 128
    assert {spec.leading for spec in plan(104, leading=0).owned} == {0}
    assert not plan(104, tokens=60).predicts


@torch.no_grad()
def logits_by_the_oracle(network, ids):
    """The family's own forward, with every attention replaced by reference.py, one sequence at a time."""
    stored = {}

    def oracle(module, args, kwargs, out):
        hidden, (cos, sin) = args[0] if args else kwargs["hidden_states"], rotation(kwargs)
        spec = module.spec
        weights = FoldedWeights.from_state_dict({name: t.double() for name, t in module.state_dict().items()})
        seen, rows = reference.causal(hidden.shape[1], spec.window), []
        for row, hidden_TD in enumerate(hidden.double()):
            inputs = (module.layer, spec, weights, hidden_TD, cos, sin)
            below = [
                (far[:, : spec.predicting(far.shape[1])], near[:, : spec.of_recent.predicting(near.shape[1])])
                for far, near in (stored[i, row] for i in spec.predicted_from)
            ]
            known = torch.cat([*(far for far, _ in below), *(near for _, near in below)], 1) if below else None
            (made,), _ = reference.stored(*inputs, known)
            far = given_back(made[:, : spec.head_dim], spec.k_bits)
            near = given_back(made[:, spec.head_dim :], spec.k_recent_bits)
            stored[module.layer_idx, row] = far, near
            whole = [torch.cat([part, *(x[age] for x in below)], 1) for age, part in enumerate((far, near))]
            caches = [([form], [form]) for form in whole]
            if spec.recent:
                rows.append(reference.folded_attention_by_age(*inputs, seen, *caches))
            else:
                rows.append(reference.folded_attention(*inputs, seen, caches[0]))
        return torch.stack(rows).to(hidden.dtype) + (args[1] if len(args) > 1 else 0), None

    hooks = [module.register_forward_hook(oracle, with_kwargs=True) for module in network.architecture.modules(network)]
    try:
        return logits(network, ids)
    finally:
        for hook in hooks:
            hook.remove()


def given_back(numbers_TR, format):
    return numbers_TR if format is None else reference.decoded(pack(numbers_TR[None, None], format)[0, 0], format)


@pytest.mark.filterwarnings("ignore:kv_budget")
def test_what_is_left_is_what_least_squares_leave(fold, tiny_dir, tmp_path):
    """Solved here as one system, whose last rows are the ridge."""
    folded = fold("llama_yarn", "recent")
    asked = recipe(tiny_dir / "llama_yarn", tmp_path / "out", "recent")
    source, width = open_source(tiny_dir / "llama_yarn"), asked.axes.width
    statistics = material_of(asked, source, folded.out.parent / "run").statistics(width.needs)

    def groups(owner):
        return layer_group(source, (None,) * 3, owner, statistics, width, recent=6)

    prediction = Prediction(groups, folded.plan, width)
    for age, form in enumerate(prediction.forms(2)):
        x, weight = groups(2).tokens().x_TF.double(), groups(2).tokens().weights[age].double()
        leading = (6, 10)[age]
        known = torch.cat([prediction._stored_by(below)[age][:, :leading] for below in (0, 1)], 1).double()
        root = (weight / weight.sum()).sqrt()[:, None]
        ridge = RIDGE**0.5 * torch.diag((known * root).norm(dim=0))
        rows = torch.cat([known * root, ridge]), torch.cat([x * root, torch.zeros(len(ridge), x.shape[1])])
        left = x - known @ torch.linalg.lstsq(*rows).solution
        assert_close(form.left_TF, left, tolerance=1e-4)
        assert (left * root).square().sum() < 0.9 * (x * root).square().sum()
        moments = (form.group.of_recent if age else form.group).moments(0)["weighted_banded_keys_and_values"]
        assert_close(moments.covariance_FF, (left * root).T @ (left * root), tolerance=1e-4)


@pytest.mark.filterwarnings("ignore:kv_budget")
def test_predictions_lose_less(tmp_path):
    """On the packaged model, which was trained: at an eighth of the bytes, with recent tokens and without."""
    model = load_weights(MODEL, "float32", "cpu")
    ids, lost = sample_from_model(model, num_samples=8, seq_len=128, seed=3), {}
    with torch.no_grad():
        original = model(ids).logits.log_softmax(-1)
        for below in (0, 3):
            calibration = {"data": "self", "num_samples": 16, "seq_len": 128}
            fields = {
                "kv_budget": 1 / 12,
                "width": {"below": below, "leading": 0},
                "calibration": calibration,
                "bits": {"method": "mixed"},
            }
            folded = kvfold.compress(recipe(MODEL, tmp_path / f"{below}", "plain", **fields), run_dir=tmp_path / "run")
            found = load(folded.out)(ids).logits.log_softmax(-1)
            lost[below] = float((original.exp() * (original - found)).sum(-1).mean())
    assert lost[3] < 0.8 * lost[0]


@pytest.mark.filterwarnings("ignore:kv_budget")
def test_runs_end_at_layers_of_another_kind(fold):
    plan = fold("gemma2_softcap", "recent").plan
    for layer, spec in enumerate(plan.owned):
        assert all(below < layer and plan.owned[below].window == spec.window for below in spec.predicted_from)


@pytest.mark.filterwarnings("ignore:kv_budget")
def test_layers_that_are_kept_predict_nothing(fold):
    plan = fold("llama_yarn", "recent", keep_layers=[1], kv_budget=0.6).plan
    assert [spec.predicted_from for spec in plan.owned] == [(), (), (0,)]


@pytest.mark.filterwarnings("ignore:kv_budget")
def test_a_layer_alone_is_an_error(fold):
    folded = fold("llama_yarn", "recent")
    network = load(folded.out)
    hidden = torch.randn(1, 4, network.config.hidden_size)
    rotary = network.model.rotary_emb(hidden, torch.arange(4)[None])
    with pytest.raises(ValueError, match="layer 2 reads the cache of layer 0, which has not run"):
        network.model.layers[2].self_attn(hidden, position_embeddings=rotary)


@pytest.mark.filterwarnings("ignore:kv_budget")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"predicted_from": (2,)}, "names layer 2, which is no EARLIER layer"),
        ({"predicted_from": (0,)}, "have .* numbers"),
        ({"predictors": 0}, "predictors and recent_predictors are 0"),
        ({"leading": 0}, "predictors and recent_predictors are"),
        ({"recent_leading": -1}, "leading and recent_leading count numbers"),
        ({"predicted_from": (), "predictors": 0, "recent_predictors": 0}, "leading and recent_leading count numbers"),
        ({"predicted_from": (0, 0)}, "no list of different layers"),
        ({"predicted_from": 0}, "predicted_from = 0 is no list"),
        ({"predicted_from": (True, 0)}, "names layer True"),
        ({"predicted_from": ("0",)}, "names layer '0'"),
    ],
)
def test_plans_that_cannot_be(fold, change, message):
    plan = fold("llama_yarn", "recent").plan
    wrong = dataclasses.replace(plan.owned[2], **change)
    with pytest.raises(PlanError, match=message):
        dataclasses.replace(plan, caches=(*plan.caches[:2], wrong))


@pytest.mark.filterwarnings("ignore:kv_budget")
def test_others_do_not_read_what_is_predicted(fold):
    plan = fold("llama_yarn", "recent").plan
    with pytest.raises(PlanError, match="layer 2 reads layer 1, whose cache is predicted"):
        dataclasses.replace(plan, caches=(*plan.caches[:2], None), kv_sharing_target_layer=(None, None, 1))


@pytest.mark.filterwarnings("ignore:kv_budget")
def test_windows_that_are_no_longer_than_what_is_recent(fold, tiny_dir):
    """Then nobody sees the common form, whose gradients are all 0."""
    folded = fold("mistral_window", "long")
    assert not any(spec.recent for spec in folded.plan.owned) and folded.plan.predicts
    ids = tokens(4, 40)
    found, original = logits(load(folded.out), ids), logits(load(tiny_dir / "mistral_window"), ids)
    assert found.isfinite().all() and relative_rms(found, original) < 1


@pytest.mark.filterwarnings("ignore:kv_budget")
def test_the_plan_survives_its_json(fold):
    plan = fold("llama_yarn", "recent").plan
    assert CachePlan.from_dict(plan.to_dict()) == plan
    assert plan.kv_read_bytes(100) > plan.kv_bytes_per_token() * 100  # what predicts is read again
    assert FoldedCache(plan).nbytes_allocated == 0

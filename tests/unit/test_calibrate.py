"""Streamed statistics against what the whole stock model computes."""

import pytest
import torch
from tiny import FULL_ATTENTION, MODELS, load, make_tiny, save_tiny, tokens
from transformers import DynamicCache

from kvfold.architectures.base import architecture
from kvfold.calibration.calibrate import STATISTICS, calibrate
from kvfold.calibration.layerwise_model import StreamedModel
from kvfold.calibration.statistics import GRADIENTS, VECTORS, Seen
from kvfold.checkpoint.source import open_source
from kvfold.compression.recipe import make_recipe, material_of
from kvfold.compression.suit_width import suited
from kvfold.linalg.eigen import Moment
from kvfold.linalg.sensitivity import TOKENS, WEIGHTED, sensitivities
from kvfold.plan.layer import FAST
from kvfold.runtimes.kernels.rotary import apply_rotary, rotate_fast, slow_tables
from kvfold.testing import assert_close

ALL = frozenset(STATISTICS)


@pytest.fixture
def calibrated(tiny_dir, tmp_path):
    def run(model, ids, needs=ALL):
        source = open_source(tiny_dir / model)
        return calibrate(source.checkpoint, source.arch, ids, needs=needs, run_dir=tmp_path)

    return run


@pytest.mark.parametrize("model", FULL_ATTENTION)
def test_moments_are_those_of_the_stock_models_cache(calibrated, tiny_dir, model):
    ids = tokens(20, 33)
    statistics, network = calibrated(model, ids), load(tiny_dir / model)
    cache = DynamicCache(config=network.config)
    with torch.no_grad():
        network(ids, past_key_values=cache)
    for index, layer in enumerate(cache.layers):
        for name, tensor in (("keys", layer.keys), ("values", layer.values)):
            x = tensor.transpose(1, 2).flatten(2).flatten(0, 1).double()
            moment = statistics.layer(index, {name})[name]
            assert_close(moment.second_FF, x.T @ x / len(x), tolerance=1e-5)
            assert_close(moment.mean_F, x.mean(0), tolerance=1e-5)
    assert statistics.tokens == 660


@pytest.mark.parametrize("model", MODELS)
def test_keys_before_rotation_are_what_the_projection_gives(calibrated, tiny_dir, model):
    """Through windows, norms and biases: what k_norm (or k_proj) of the whole stock model puts out."""
    ids = tokens(20, 33)
    statistics, network = calibrated(model, ids), load(tiny_dir / model)
    seen = []
    for attention in architecture(network.config.model_type).modules(network):
        name = next(n for n in ("query_key_value", "c_attn", "qkv_proj", "k_norm", "k_proj") if hasattr(attention, n))

        def see(m, args, out, name=name, attention=attention):
            if name == "query_key_value":
                out = out.unflatten(-1, (-1, 3, getattr(attention, "head_size", None) or attention.head_dim))[..., 1, :]
            if name == "c_attn":
                out = out.chunk(3, dim=-1)[1]
            if name == "qkv_proj":
                size = attention.num_key_value_heads * attention.head_dim
                out = out[..., -2 * size : -size]
            if (
                name == "k_norm" and out.ndim == 4 and out.shape[1] != 33
            ):  # normalised after heads and tokens changed places
                out = out.transpose(1, 2)
            seen.append(out.reshape(20 * 33, -1).double())

        getattr(attention, name).register_forward_hook(see)
    with torch.no_grad():
        network(ids)
    for index, x in enumerate(seen):
        moment = statistics.layer(index, ALL)["keys_before_rotation"]
        assert_close(moment.second_FF, x.T @ x / len(x), tolerance=1e-5)


@pytest.mark.parametrize("stretch", [1.0, 1.3])
def test_banded_keys_are_turned_in_fast_pairs_only(stretch):
    """And gradients by them lead through the rotation that is left; rope scaling may stretch tables."""
    angles = torch.randn(1, 5, 4, dtype=torch.float64).repeat(1, 1, 2)
    cos, sin = angles.cos() * stretch, angles.sin() * stretch
    k, v, g = (torch.randn(2, 3, 5, 8, dtype=torch.float64) for _ in range(3))
    banded = rotate_fast(k, cos, sin, 1).requires_grad_()
    turned = apply_rotary(banded, *slow_tables(cos, sin, 1))
    assert torch.equal(turned[..., [0, 4]], apply_rotary(k, cos, sin)[..., [0, 4]])
    assert_close(turned, apply_rotary(k, cos, sin))
    seen = Seen(k, turned.detach(), v, cos, sin, 1, k_gradient=g, v_gradient=g)
    by_banded = torch.autograd.grad((turned * g).sum(), banded)[0]
    for name, wanted in (("", banded.detach()), ("gradients", by_banded)):
        found = (GRADIENTS if name else VECTORS)["banded_keys"](seen)
        assert_close(found, wanted.transpose(1, 2).flatten(2).flatten(0, 1))
        assert_close((GRADIENTS if name else VECTORS)["banded_keys_and_values"](seen)[:, :24], found)


@pytest.mark.parametrize("model", MODELS)
def test_layers_know_how_fast_their_pairs_turn(model, tiny_dir):
    """As the family's own tables say of the second token."""
    network = load(tiny_dir / model)
    arch = architecture(network.config.model_type)
    for layer in arch.describe(network):
        speeds = torch.tensor(layer.rotary_speeds)
        if not layer.rotary_dim:
            assert not layer.rotary_speeds
            continue
        kinds = () if layer.rotary_kind is None else (layer.rotary_kind,)
        cos, sin = network.get_submodule(arch.rotary)(torch.zeros(1, 1), torch.tensor([[1]]), *kinds)
        assert_close(torch.atan2(sin, cos)[0, 0], speeds.repeat(2))
        assert layer.fast_pairs == int((speeds > FAST).sum()) < len(speeds)
        assert sum(speed == 0 for speed in layer.speeds_without(layer.fast_pairs)) == layer.fast_pairs


def test_tokens_give_the_moments_that_stand_beside_them(calibrated):
    """Keys and values of every token, without the weighted mean, and what each counts."""
    ids, part = tokens(8, 24), "keys_and_values"
    run = calibrated("qwen2_bias_tied", ids, sensitivities(part) | {TOKENS + part, part})
    for layer in range(3):
        known, weighted = run.of_tokens(layer, part), run.layer(layer, {WEIGHTED + part})[WEIGHTED + part]
        x, share = known.x_TF.double(), (known.weight_T / known.weight_T.sum())[:, None].double()
        assert known.recent_weight_T is None and x.shape == (8 * 24, 2 * 32)
        assert_close((x * share).T @ x, weighted.covariance_FF, tolerance=1e-5)
        assert_close(weighted.mean_F + x.mean(0), run.layer(layer, {part})[part].mean_F, tolerance=1e-5)


def test_statistics_are_reused_and_extended(calibrated, capsys):
    ids = tokens(8, 16)
    first = calibrated("llama_mha", ids, frozenset({"keys", "values"}))
    stamp = {f: f.stat().st_mtime_ns for f in first.folder.iterdir()}
    assert calibrated("llama_mha", ids, frozenset({"keys"})).folder == first.folder
    more = calibrated("llama_mha", ids, ALL)
    assert set(more.layer(0, ALL)) == ALL and more.folder != first.folder
    assert calibrated("llama_mha", ids, frozenset({"keys_before_rotation"})).folder == more.folder
    assert {f: f.stat().st_mtime_ns for f in first.folder.iterdir()} == stamp
    assert calibrated("llama_mha", ids.flip(1)).folder != first.folder
    assert "statistics of another" not in capsys.readouterr().err
    calibrated("llama_yarn", ids)
    assert "statistics of another" in " ".join(capsys.readouterr().err.split())


def test_only_one_layer_is_in_memory(calibrated, monkeypatch):
    """Parameters that hold data whenever one is loaded: those around the layers, or one layer's and no others, on the way up
    and on the way down."""
    streams, counts = [], []
    load_weights = StreamedModel._load

    def watch(stream, *args, **kwargs):
        load_weights(stream, *args, **kwargs)
        streams.append(stream)
        counts.append(_loaded(stream.model))

    monkeypatch.setattr(StreamedModel, "_load", watch)
    calibrated("llama_mha", tokens(4, 16))
    around, layers = {"model.embed_tokens", "model.norm"}, [{f"model.layers.{i}"} for i in range(3)]
    assert counts == [around, *layers, around | {"lm_head.weight"}, *reversed(layers)]
    assert _loaded(streams[0].model) == set()


def _loaded(model):
    names = [name for name, p in model.named_parameters() if p.device.type != "meta"]
    return {".".join(name.split(".")[: 3 if ".layers." in name else 2]) for name in names}


def test_streamed_moments_equal_moments_at_once():
    x = torch.randn(100, 7, dtype=torch.float64) + 3
    moment = Moment.zeros(7)
    for part in x.split(9):
        moment.update(part)
    assert_close(moment.second_FF, x.T @ x / 100)
    assert_close(moment.mean_F, x.mean(0))


def test_moments_between_layers_are_those_of_the_same_tokens(calibrated, tiny_dir, tmp_path):
    """Readers 1 and 2 of layer 0, in several batches, and after an interruption before the last layer."""
    ids = tokens(300, 33)
    source = open_source(tiny_dir / "llama_mha")
    options = {"needs": frozenset({"keys", "values"}), "pairs": {(1, 0), (2, 0)}, "needs_cross": frozenset({"keys"})}
    whole = calibrate(source.checkpoint, source.arch, ids, run_dir=tmp_path / "whole", **options)
    network, cache = load(tiny_dir / "llama_mha"), DynamicCache()
    with torch.no_grad():
        network(ids, past_key_values=cache)
    x = [layer.keys.transpose(1, 2).flatten(2).flatten(0, 1).double() for layer in cache.layers]
    for reader in (1, 2):
        assert_close(whole.cross(reader, 0, {"keys"})["keys"], x[reader].T @ x[0] / len(x[0]), tolerance=1e-5)
    assert not (whole.folder / "hidden.safetensors").exists()


def test_an_interrupted_run_still_knows_the_owners_vectors(tiny_dir, tmp_path, monkeypatch):
    source, ids = open_source(tiny_dir / "llama_mha"), tokens(12, 16)
    options = {"needs": frozenset({"keys"}), "pairs": {(1, 0), (2, 0)}, "needs_cross": frozenset({"keys"})}
    whole = calibrate(source.checkpoint, source.arch, ids, run_dir=tmp_path / "whole", **options)
    monkeypatch.setattr("kvfold.calibration.passes.SECONDS_BETWEEN_SAVES", 0)
    advance = StreamedModel.advance

    def die(stream, layer, *args):
        if layer.index == 2:
            raise KeyboardInterrupt
        advance(stream, layer, *args)

    monkeypatch.setattr(StreamedModel, "advance", die)
    with pytest.raises(KeyboardInterrupt):
        calibrate(source.checkpoint, source.arch, ids, run_dir=tmp_path / "cut", **options)
    monkeypatch.setattr(StreamedModel, "advance", advance)
    resumed = calibrate(source.checkpoint, source.arch, ids, run_dir=tmp_path / "cut", **options)
    for reader in (1, 2):
        assert torch.equal(resumed.cross(reader, 0, {"keys"})["keys"], whole.cross(reader, 0, {"keys"})["keys"])


def test_rotated_keys_are_calibrated_on_longer_text(tiny_dir, tmp_path):
    """They differ from position to position; what is not rotated, or taken before rotation, needs many sequences instead."""
    found = {}
    for model, width in (
        ("llama_mha", {"method": "fisher"}),
        ("llama_mha", {"method": "fisher", "rope": "on_read"}),
        ("bloom_alibi", {"method": "fisher"}),
        ("llama_mha", {"method": "svd_a"}),
    ):
        fields = {"model": str(tiny_dir / model), "out": "out", "kv_budget": 0.5, "width": width}
        material = material_of(make_recipe(fields), open_source(tiny_dir / model), tmp_path)
        found[(model, *width.values())] = (material.num_samples, material.seq_len)
    assert found["llama_mha", "fisher"] == found["llama_mha", "svd_a"] == (16, 512)  # the model's context
    assert found["llama_mha", "fisher", "on_read"] == found["bloom_alibi", "fisher"] == (64, 256)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"preset": "svd_w"}, (64, 256)),
        ({"preset": "auto"}, (16, 1024)),
        ({"preset": "auto", "context_len": 4096}, (8, 4096)),
        ({"preset": "auto", "context_len": 3000}, (8, 3000)),
        ({"preset": "auto", "context_len": 32768}, (8, 4096)),
        ({"preset": "auto", "context_len": 4096, "calibration": {"data": "self"}}, (16, 1024)),
        ({"preset": "auto", "context_len": 4096, "calibration": {"data": "t.txt", "seq_len": 300}}, (8, 300)),
        ({"preset": "observed", "context_len": 4096}, (16, 1024)),
        ({"preset": "foreseen", "length": {"method": "foreseen", "sharing": "equal"}}, (16, 1024)),
        ({"preset": "svd_w", "context_len": 4096}, (64, 256)),
    ],
    ids=str,
)
def test_text_is_as_long_as_what_is_to_be_remembered(tmp_path, fields, expected):
    """As far as the model has positions."""
    base = {"model": "m", "out": "o", "kv_budget": 0.25, "calibration": {"data": "t.txt"}}
    recipe = make_recipe(base | fields)
    for positions, longest in ((8192, 8192), (512, 512)):
        source = open_source(
            save_tiny(make_tiny("llama_mha", max_position_embeddings=positions), tmp_path / f"{positions}")
        )
        found = material_of(suited(recipe, source.layers), source, tmp_path / "run")
        asked = recipe.calibration.seq_len
        assert (found.num_samples, found.seq_len) == (expected[0], asked or min(expected[1], longest))

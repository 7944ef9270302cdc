"""Gradients of sampled labels, streamed layer by layer, against the whole stock model; and what is made of them."""

import pytest
import torch
from tiny import MODELS, load, tokens
from transformers import DynamicCache

from kvfold.calibration.calibrate import calibrate
from kvfold.calibration.layerwise_model import StreamedModel, _score, ignore
from kvfold.checkpoint.source import open_source
from kvfold.linalg.sensitivity import METRIC, WEIGHTED, fit, sensitivities
from kvfold.testing import assert_close

ALL = sensitivities("keys") | sensitivities("keys_before_rotation") | sensitivities("values")


class Watched(DynamicCache):
    """Shows the keys and values of every layer."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def update(self, keys, values, *args, **kwargs):
        self.seen += [keys.clone(), values.clone()]
        return tuple(self.seen[-2:])


@pytest.mark.parametrize("model", MODELS)
@torch.no_grad()
def test_streamed_gradients_are_those_of_the_whole_model(tiny_dir, model):
    source, ids = open_source(tiny_dir / model), tokens(4, 21)
    draws = torch.rand(ids.shape, generator=torch.Generator().manual_seed(0))
    stream, entering, found = StreamedModel(source.checkpoint, source.arch, "cpu"), [], []
    hidden = stream.embed(ids)
    for layer in stream.layers:
        entering.append(hidden.clone())
        stream.advance(layer, hidden, ignore)
    gradient = stream.label_gradients(ids, hidden, draws)
    for layer in reversed(stream.layers):
        parts = []
        stream.retreat(layer, entering[layer.index], gradient, parts.append)
        found = [torch.cat([getattr(p, name) for p in parts]) for name in ("k_gradient", "v_gradient")] + found
    network = load(tiny_dir / model, attn_implementation="eager").requires_grad_()
    with torch.enable_grad():
        logits = network(ids, past_key_values=(cache := Watched()), use_cache=True).logits
    scores = torch.stack([_score(row.detach(), drawn) for row, drawn in zip(logits, draws, strict=True)])
    for ours, theirs in zip(found, torch.autograd.grad(logits, cache.seen, scores), strict=True):
        assert_close(ours, theirs, tolerance=1e-5)


@pytest.mark.parametrize("model", ["llama_yarn", "gemma2_softcap", "mistral_window"])
@torch.no_grad()
def test_far_gradients_are_those_of_far_queries(tiny_dir, model):
    """What enters a layer keeps its whole gradient; keys and values keep that of queries at least `recent` tokens behind."""
    source, ids, recent = open_source(tiny_dir / model), tokens(4, 21), 5
    found, parts_of = {}, {}
    for far in (0, 1, recent, 21):
        stream, parts = StreamedModel(source.checkpoint, source.arch, "cpu", far), []
        hidden = stream.embed(ids)
        gradient = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
        stream.retreat(stream.layers[0], hidden, gradient, parts.append)
        found[far] = gradient, *(torch.cat([getattr(p, name) for p in parts]) for name in ("k_gradient", "v_gradient"))
        parts_of[far] = parts
    for far in (1, recent, 21):
        assert_close(found[far][0], found[0][0], tolerance=1e-5)
    for side in (1, 2):
        assert not found[21][side].any()
        assert not found[recent][side][:, :, -recent:].any() and found[recent][side][:, :, :-recent].any()
    names = ("k_gradient", "v_gradient")
    for part in parts_of[recent]:
        for name in names:
            close = getattr(part.of_recent, name)
            assert close[:, :, -1:].any() and not torch.equal(close, getattr(part, name))
    for side, name in enumerate(names, start=1):
        close = torch.cat([getattr(part.of_recent, name) for part in parts_of[recent]])
        assert_close(close + found[recent][side], found[0][side], tolerance=1e-5)
    by_hand = _far_value_gradient(source, ids, recent)
    assert_close(found[recent][2], by_hand, tolerance=1e-4)


def _far_value_gradient(source, ids, recent):
    """Of the first layer: probabilities of far queries, transposed, times the gradient of what they average."""
    stream = StreamedModel(source.checkpoint, source.arch, "cpu")
    hidden = stream.embed(ids)
    gradient = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
    layer, total = stream.layers[0], 0
    age = torch.arange(21)[:, None] - torch.arange(21)
    for n in range(21):  # one query alone sends a gradient to every value that it sees
        if n < recent:
            continue
        parts, alone = [], StreamedModel(source.checkpoint, source.arch, "cpu")
        states, only = alone.embed(ids), torch.zeros_like(gradient)
        only[:, n] = gradient[:, n]
        alone.retreat(layer, states, only, parts.append)
        sent = torch.cat([p.v_gradient for p in parts])
        total = total + sent * (age[n] >= recent)[None, None, :, None]
    return total


def test_labels_are_drawn_from_the_models_predictions():
    logits = torch.randn(1, 7).repeat(20_000, 1)
    scores = _score(logits, torch.rand(20_000, generator=torch.Generator().manual_seed(0)))
    drawn = (scores + logits.softmax(-1)).round()
    assert torch.equal(drawn.sum(-1), torch.ones(20_000))
    assert_close(drawn.mean(0), logits[0].softmax(-1), tolerance=0.03)


def planted(weight_T):
    """Vectors and gradients with these weights."""
    torch.manual_seed(0)
    root = torch.randn(6, 6)
    gradient = torch.randn(len(weight_T), 6) @ root
    return torch.randn(len(weight_T), 6) + 2, gradient * weight_T.sqrt()[:, None], (root.T @ root)[None].double()


def test_what_counts_as_the_mean_can_be_given():
    """Then the covariance is about it: what two forms of a token leave out must be the same."""
    x, gradient, _ = planted(1 + torch.arange(200) / 100)
    (free, metric, _), centre = fit(x, gradient, 2), torch.full((6,), 1.5, dtype=torch.float64)
    moment, same_metric, _ = fit(x, gradient, 2, mean_F=centre)
    off = free.mean_F - centre
    assert torch.equal(moment.mean_F, centre) and torch.equal(metric.second_FF, same_metric.second_FF)
    assert_close(moment.covariance_FF, free.covariance_FF + off[:, None] * off, tolerance=1e-6)


def test_equal_tokens_give_plain_moments():
    """Gradients of equal size still differ from token to token, which must not bend the moments of x."""
    x, gradient, metric = planted(torch.ones(20_000))
    moment, found, _ = fit(x, gradient, 2)
    assert_close(moment.mean_F, x.double().mean(0), tolerance=0.02)
    assert_close(moment.covariance_FF, x.double().T.cov(correction=0), tolerance=0.05)
    assert_close(found.second_FF / found.second_FF.norm(), metric / metric.norm(), tolerance=0.05)


def test_tokens_that_all_look_at_weigh_more():
    """One token in fifty is a hundred times as sensitive, and lies elsewhere: the mean moves there, and the metric, which
    is still that of all, is not bent by it."""
    weight = torch.ones(20_000)
    weight[::50] = 100.0
    x, gradient, metric = planted(weight)
    x[::50] += 10
    moment, found, _ = fit(x, gradient, 2)
    assert moment.mean_F.mean() > x.mean() + 3
    assert_close(found.second_FF / found.second_FF.norm(), metric / metric.norm(), tolerance=0.05)


def test_expected_damages_are_nats():
    """Of errors that do not depend on the token."""
    x, gradient, _ = planted(torch.ones(20_000))
    error = 0.1 * torch.randn(20_000, 6)
    expected = float((fit(x, gradient, 2)[1].second_FF[0] * (error.T @ error).double() / len(error)).sum())
    assert 0.6 < expected / float((gradient * error).sum(1).square().mean()) < 1.1


def test_large_layers_have_a_metric_for_each_head(monkeypatch):
    x, gradient, _ = planted(torch.ones(20_000))
    together = fit(x, gradient, 2)[1].second_FF
    monkeypatch.setattr("kvfold.linalg.sensitivity.TOGETHER", 5)
    apart = fit(x, gradient, 2)[1].second_FF
    assert together.shape == (1, 6, 6) and apart.shape == (2, 3, 3)
    for head, block in enumerate(apart):
        part = slice(3 * head, 3 * head + 3)
        assert_close(block, together[0, part, part], tolerance=0.15)


def test_statistics_of_gradients_do_not_depend_on_interruptions(tiny_dir, tmp_path, monkeypatch):
    source, ids = open_source(tiny_dir / "qwen3_norm_window"), tokens(12, 16)
    whole = calibrate(source.checkpoint, source.arch, ids, needs=ALL, run_dir=tmp_path / "whole")
    assert not list(whole.folder.glob("entering*")) and not list(whole.folder.glob("gradient*"))
    monkeypatch.setattr("kvfold.calibration.passes.SECONDS_BETWEEN_SAVES", 0)
    for method, index in (("advance", 1), ("retreat", 0)):  # a fresh run is cut on the way up, then on the way down
        original = getattr(StreamedModel, method)

        def die(stream, layer, *args, original=original, index=index):
            if layer.index == index:
                raise KeyboardInterrupt
            original(stream, layer, *args)

        monkeypatch.setattr(StreamedModel, method, die)
        with pytest.raises(KeyboardInterrupt):
            calibrate(source.checkpoint, source.arch, ids, needs=ALL, run_dir=tmp_path / "cut")
        monkeypatch.setattr(StreamedModel, method, original)
    resumed = calibrate(source.checkpoint, source.arch, ids, needs=ALL, run_dir=tmp_path / "cut")
    for index in range(3):
        for name in ALL:
            ours, theirs = resumed.layer(index, {name})[name], whole.layer(index, {name})[name]
            assert torch.equal(ours.second_FF, theirs.second_FF) and torch.equal(ours.mean_F, theirs.mean_F)


def test_keys_before_and_after_rotation_cost_the_same(tiny_dir, tmp_path):
    """An error of a key costs what its rotated form costs: full traces of metric x second moment agree without rotation."""
    source, ids = open_source(tiny_dir / "gpt2_conv"), tokens(12, 16)
    found = calibrate(source.checkpoint, source.arch, ids, needs=ALL, run_dir=tmp_path)
    moments = found.layer(1, ALL)
    for part in (WEIGHTED, METRIC):
        assert torch.equal(moments[part + "keys"].second_FF, moments[part + "keys_before_rotation"].second_FF)

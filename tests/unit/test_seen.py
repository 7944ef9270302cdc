"""Statistics that look at attention, against the stock model's own attention probabilities."""

import pytest
import torch
from tiny import load, tokens

from kvfold.calibrate import calibrate
from kvfold.fold import read_layer
from kvfold.linalg import Moment
from kvfold.loading import open_source
from kvfold.streaming import StreamedModel
from kvfold.testing import assert_close

EFFECTS = frozenset({"averaged_values", "queries_that_matter", "queries_at_keys"})


@pytest.mark.parametrize(
    "model",
    [
        "llama_mha",
        "llama_yarn",
        "neox_partial",
        "bloom_alibi",
        "opt_learned",
        "gpt2_conv",
        "qwen2_bias_tied",
        "granite_scale",
    ],
)
def test_statistics_of_attention_are_those_of_the_stock_model(tiny_dir, tmp_path, model):
    """Averaged values and effects from `output_attentions`, head by head."""
    ids = tokens(2, 21)
    source = open_source(tiny_dir / model)
    found = calibrate(source.checkpoint, source.arch, ids, needs=EFFECTS, run_dir=tmp_path)
    network = load(tiny_dir / model, attn_implementation="eager")
    with torch.no_grad():
        attentions = network(ids, output_attentions=True).attentions
    stream = StreamedModel(source.checkpoint, source.arch, "cpu")
    hidden = stream.embed(ids)
    for layer in source.layers:
        seen = []
        with torch.no_grad():
            stream.advance(layer, hidden, seen.append)
        expected = {name: Moment.zeros(*shape) for name, shape in _shapes(layer).items()}
        rows = [row for batch in seen for row in batch.sequences()]
        for row, probs_NTS in zip(rows, attentions[layer.index].double(), strict=True):
            _by_hand(layer, source, row, probs_NTS, expected)
        moments = found.layer(layer.index, EFFECTS)
        for name in EFFECTS:
            ours, theirs = moments[name].second_FF, expected[name].second_FF
            if name != "averaged_values":  # only proportions count
                ours, theirs = ours / ours.mean(), theirs / theirs.mean()
            assert_close(ours, theirs, tolerance=1e-4, name=name)
        assert_close(moments["averaged_values"].mean_F, expected["averaged_values"].mean_F, tolerance=1e-4)


def _shapes(layer):
    K, H = layer.num_kv_heads, layer.head_dim
    return {"averaged_values": (K, K * H), "queries_that_matter": (K, H), "queries_at_keys": (K, H)}


def _by_hand(layer, source, seen, probs_NTS, expected):
    N, K, H = layer.num_attention_heads, layer.num_kv_heads, layer.head_dim
    G, T = N // K, probs_NTS.shape[1]
    o_proj = read_layer(source.checkpoint, source.arch, layer).o_proj.unflatten(1, (N, H))
    q, v = seen.q[0].double(), seen.v[0].double()
    vectors = {name: [[] for _ in range(K)] for name in expected}
    positions = set(range(0, T, -(-T // 16)))
    for k in range(K):
        for n in range(k * G, (k + 1) * G):
            out = probs_NTS[n] @ v[k]
            for t in range(T):
                vectors["averaged_values"][k].append(probs_NTS[n, t] @ v.transpose(0, 1).flatten(1))
                total = 0.0
                for s in range(t + 1):
                    effect = (probs_NTS[n, t, s] * (o_proj[:, n] @ (v[k, s] - out[t]))).square().sum()
                    total = total + effect
                    if s in positions:
                        vectors["queries_at_keys"][k].append(effect.sqrt() * _turned_back(q[n, t], seen, s))
                vectors["queries_that_matter"][k].append(total.sqrt() * q[n, t])
    for name, per_head in vectors.items():
        expected[name].update(torch.stack([torch.stack(head) for head in per_head], dim=1))


def _turned_back(q_H, seen, s):
    if seen.cos is None:
        return q_H
    cos, sin = seen.cos[0, s].double(), seen.sin[0, s].double()
    half = len(cos) // 2
    first, second = q_H[:half], q_H[half : 2 * half]
    turned = [first * cos[:half] + second * sin[:half], second * cos[half:] - first * sin[half:]]
    return torch.cat([*turned, q_H[2 * half :]])

"""Which heads share a latent."""

import itertools

import pytest
import torch
from tiny import FULL_ATTENTION, key_value_heads, load, logits, make_tiny, save_tiny, tokens

import kvfold
from kvfold.compression.recipe import make_recipe
from kvfold.methods.width._head_grouping import _greedy, best_order
from kvfold.testing import assert_close, relative_rms


def likeness(pairs):
    """A loss that is 0 for groups made of these pairs and 1 per missing partner."""
    partner = {a: b for pair in pairs for a, b in (pair, pair[::-1])}
    return lambda members: float(sum(partner[head] not in members for head in members))


@pytest.mark.parametrize("search", [lambda heads, groups, loss: best_order(heads, groups, loss), None])
def test_pairs_are_found(search):
    loss = likeness([(0, 5), (1, 3), (2, 4)])
    order = best_order(6, 3, loss) if search else _greedy(6, 2, loss)
    assert order == [0, 5, 1, 3, 2, 4]


def test_the_exact_search_beats_every_other_grouping():
    generator = torch.Generator().manual_seed(0)
    table = {m: float(torch.rand(1, generator=generator)) for m in itertools.combinations(range(6), 3)}
    order = best_order(6, 2, table.__getitem__)
    found = table[tuple(order[:3])] + table[tuple(order[3:])]
    others = [table[m] + table[tuple(sorted(set(range(6)) - set(m)))] for m in table]
    assert found == min(others)


@pytest.mark.parametrize("model", [m for m in FULL_ATTENTION if m.startswith(("llama", "olmo2"))])
def test_similar_heads_are_put_together(tmp_path, model):
    """Heads that come in scattered identical pairs fit into latents of one head per pair; neighbours do not."""
    network = make_tiny(model)
    heads = network.config.num_key_value_heads
    order = [*range(heads // 2), *range(heads // 2)]  # head i and head i + heads/2 are the same
    with torch.no_grad():
        for layer in network.model.layers:
            for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):
                for tensor in projection.parameters():
                    tensor.copy_(tensor.unflatten(0, (heads, -1))[order].flatten(0, 1))
            for norm in ("k_norm",) if hasattr(layer.self_attn, "k_norm") else ():
                weight = getattr(layer.self_attn, norm).weight
                weight.copy_(weight.unflatten(0, (heads, -1))[order].flatten(0, 1))
    source = save_tiny(network, tmp_path / "source")
    fields = {"method": "svd_a", "latent": "group", "group_size": 2, "multiple": 4}
    error = {}
    for grouping in ("neighbours", "similar"):
        recipe = {
            "model": str(source),
            "out": str(tmp_path / grouping),
            "kv_budget": 0.5,
            "width": fields | {"grouping": grouping},
            "calibration": {"data": "self", "num_samples": 16, "seq_len": 32},
        }
        folded = kvfold.compress(make_recipe(recipe), run_dir=tmp_path / "run", device="cpu")
        error[grouping] = relative_rms(logits(load(folded.out), tokens()), logits(network, tokens()))
    assert error["neighbours"] > 1e-2
    assert_close(logits(load(tmp_path / "similar"), tokens()), logits(network, tokens()), tolerance=1e-4)


@pytest.mark.parametrize("method", [{"method": "svd_a", "latent": "group", "group_size": 2}, {"method": "procrustes"}])
def test_heads_with_alibi_stay_where_they_are(tmp_path, method):
    """Each has a slope of its own, by its place: in another order a head would get that of another one."""
    network = make_tiny("bloom_alibi")
    for attention in network.transformer.h:
        for heads_KHD in key_value_heads(attention.self_attention):
            heads_KHD.copy_(heads_KHD[[*range(4), *range(4)]].clone())
    source, found = save_tiny(network, tmp_path / "source"), []
    for grouping in ("neighbours", "similar"):
        recipe = {"model": str(source), "out": str(tmp_path / grouping), "width": method | {"grouping": grouping}}
        recipe |= {"kv_budget": 0.5, "calibration": {"data": "self", "num_samples": 4, "seq_len": 32}}
        folded = kvfold.compress(make_recipe(recipe), run_dir=tmp_path / "run", device="cpu")
        found.append(logits(load(folded.out), tokens()))
    assert torch.equal(*found)

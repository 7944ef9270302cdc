"""Tensor parallelism of packed layers: processes store what one stores, and their outputs add up to its output."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from kvfold.plan.cache_spec import CacheSpec, SourceLayer
from kvfold.plan.layer import AttentionLayer
from kvfold.plan.tensors import tensor_shapes
from kvfold.runtimes.transformers.attention import FoldedAttention
from kvfold.runtimes.vllm.ranks import Rank, not_shared_out

LAYER = AttentionLayer(
    index=0, hidden_size=32, num_attention_heads=8, num_kv_heads=4, head_dim=6, scaling=0.4, rotary_dim=6, qkv_bias=True
)
HEADS = CacheSpec(num_kv_heads=4, head_dim=6, num_v_heads=4, v_head_dim=6)
SPECS = {
    "heads": HEADS,
    "one latent": CacheSpec(
        num_kv_heads=1, head_dim=20, num_v_heads=1, v_head_dim=20, rope="on_read", shared_latent=True, k_projection=True,
        v_projection=True, k_offset=True, stored_bias=True, output_bias=True,
    ),
    "banded": CacheSpec(
        num_kv_heads=1, head_dim=20, num_v_heads=1, v_head_dim=20, rope="on_read", fast_pairs=1, shared_latent=True,
        k_projection=True, v_projection=True, k_offset=True, stored_bias=True, output_bias=True,
    ),
    "latents of groups": CacheSpec(
        num_kv_heads=2, head_dim=11, num_v_heads=2, v_head_dim=11, rope="on_read", fast_pairs=1, shared_latent=True,
        k_projection=True, v_projection=True, k_offset=True, stored_bias=True, output_bias=True,
    ),
    "groups and one latent": CacheSpec(
        num_kv_heads=2, head_dim=9, num_v_heads=1, v_head_dim=15, k_projection=True, v_projection=True, stored_bias=True
    ),
    "predicted": CacheSpec(
        num_kv_heads=1, head_dim=10, num_v_heads=1, v_head_dim=10, rope="on_read", shared_latent=True, k_projection=True,
        v_projection=True, k_offset=True, stored_bias=True, predicted_from=(0,), predictors=7,
    ),
}  # fmt: skip


def module(rank, spec, weights=None):
    config = SimpleNamespace(_attn_implementation="sdpa")
    shapes = rank.shapes(LAYER, spec, owns=True)
    made = FoldedAttention(config, rank.reader(LAYER), rank.spec(spec), (None, None), shapes=shapes).double()
    made.made_heads = rank.made_heads(LAYER, spec)
    for name, parameter in made.named_parameters():
        parameter.data.copy_(rank.cut(name, weights[name], LAYER, spec))
    return made


def weights_of(spec):
    generator = torch.Generator().manual_seed(5)
    return {
        name: torch.randn([axis.size for axis in axes], generator=generator, dtype=torch.float64)
        for name, axes in tensor_shapes(LAYER, spec).items()
    }


def run(attention, hidden, tables, below):
    z, y = attention._new_keys_values(hidden, tables)
    read = (torch.cat([z, below], dim=3),) * 2 if attention.spec.predicted_from else (z, y)
    out = attention._read(attention._queries(hidden, tables), *read, None, tables)[0]
    return z, y, out.flatten(2) @ attention.o_proj.weight.T


def test_processes_that_heads_cannot_be_shared_out_among():
    """Query heads, key heads and stored ones each have to divide by so many, or so many by them."""
    source = SourceLayer(num_attention_heads=12, num_kv_heads=12, head_dim=6)

    def refused(stored, heads=12):
        spec = dataclasses.replace(HEADS, num_kv_heads=stored, num_v_heads=stored)
        plan = SimpleNamespace(
            caches=(HEADS, spec),
            source=(dataclasses.replace(source, num_kv_heads=4), dataclasses.replace(source, num_kv_heads=heads)),
        )
        return [count for count in (2, 3, 4, 5) if not_shared_out(plan, count) is not None]

    assert refused(12) == [3, 5] and not_shared_out(SimpleNamespace(caches=(HEADS,), source=(source,)), 5) == 0
    assert refused(3) == [2, 3, 4, 5] and refused(1) == [3, 5] and refused(6, 6) == [3, 4, 5]


@pytest.mark.parametrize("count", [1, 2, 4, 8])
@pytest.mark.parametrize("name", SPECS)
@torch.no_grad()
def test_processes_store_what_one_stores_and_add_up_to_it(name, count):
    spec, generator = SPECS[name], torch.Generator().manual_seed(9)
    hidden = torch.randn(2, 7, 32, generator=generator, dtype=torch.float64)
    below = torch.randn(2, 1, 7, 7, generator=generator, dtype=torch.float64)
    angles = torch.randn(1, 7, 6, generator=generator, dtype=torch.float64)
    tables, weights = (angles.cos(), angles.sin()), weights_of(spec)
    z, y, whole = run(module(Rank(), spec, weights), hidden, tables, below)
    total = torch.zeros_like(whole)
    for index in range(count):
        rank = Rank(index, count)
        own_z, own_y, part = run(module(rank, spec, weights), hidden, tables, below)
        assert torch.allclose(own_z, z[:, rank.heads(spec.num_kv_heads)])
        assert torch.allclose(own_y, y[:, rank.heads(spec.num_v_heads)])
        total += part
    assert torch.allclose(total, whole)
    assert sum(Rank(i, count).spec(spec).num_kv_heads for i in range(count)) == max(count, spec.num_kv_heads)

"""Pages of bytes: what the transformers runtime's cache would hold, and its tokens, whatever the steps in which they came."""

import pytest
import torch
from conftest import PACKED
from engines import BIND, assert_same_tokens, job, prompts, serve
from safetensors.torch import load_file
from tiny import load

import kvfold

CHUNKS = {"max_num_batched_tokens": 64, "max_num_seqs": 8}
STEPS = {
    "whole": {},
    "small_pages": {"block_size": 16, "max_num_batched_tokens": 48},
    "few_pages": {"block_size": 16, "max_num_batched_tokens": 48, "num_gpu_blocks_override": 60},
}
"""Prompts at once; in other pieces, in small pages; so few pages that requests wait, or are begun anew."""
RECORDED = ("auto", "int4", "unequal_groups")
CLOSE = 1e-2
"""Of log-probabilities: a code of one or two bits that falls to the other side of a rounding is worth so much."""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("packed")


@pytest.fixture(scope="module")
def served(folder, root):
    jobs = {name: job(folder(name), root / name if name in RECORDED else None, **CHUNKS) for name in PACKED}
    jobs |= {f"auto {steps}": job(folder("auto"), **options) for steps, options in STEPS.items()}
    return serve(root, jobs | {"original": job(folder("original"))}, **{BIND: "0"})


@pytest.mark.parametrize("name", [*PACKED, *(f"auto {steps}" for steps in STEPS)])
def test_tokens_are_those_of_transformers(served, folder, name):
    assert "error" not in served[name], served[name]
    assert_same_tokens(served[name], folder(name.split()[0]), CLOSE)


@pytest.mark.parametrize("name", ["auto", "int4", "bloom_alibi_auto", "qwen3_norm_window_auto"])
def test_a_prompt_that_was_seen_is_read_from_the_cache(served, name):
    assert all(one["cached"] >= 64 for one in served[name]["rounds"][1][2:])


@pytest.mark.parametrize("name", RECORDED)
def test_pages_hold_the_bytes_of_kvfolds_own_cache(served, folder, root, name):
    found = load_file(root / name)
    model = load(folder(name), dtype=torch.float32)
    cache = kvfold.FoldedCache(model.kv_plan)
    with torch.no_grad():
        model(torch.tensor([prompts()[-1]]), past_key_values=cache)
    compared = 0
    owners = [index for index, spec in enumerate(model.kv_plan.caches) if spec is not None]
    for index, layer in zip(owners, cache.owned, strict=True):
        for side, buffer in zip("kv", layer.buffers, strict=False):
            compared += assert_alike(found[f"{index}.{side}"], buffer.view().rows[0])
        for side, recent in zip("kv", layer.recent, strict=False):
            kept = recent.rows[0]
            compared += assert_alike(found[f"{index}.{side}.recent"][:, -kept.shape[1] :], kept)
    assert compared >= 6


def assert_alike(found, expected):
    """At most one row in a hundred differs, by roundings; one of a few."""
    assert found.shape == expected.shape
    assert (found != expected).any(-1).sum() <= max(0.01 * expected[..., 0].numel(), 1)
    return 1


def test_the_cache_holds_as_many_more_tokens_as_the_plan_promises(served, folder):
    """Where all pages are of one kind; vLLM's own are of float32 here, positions take nothing there."""
    plan = kvfold.inspect(folder("int4")).plan
    promised = plan.source_kv_bytes_per_token("float32") / plan.kv_bytes_per_token("float32")
    assert served["int4"]["cache_tokens"] / served["original"]["cache_tokens"] >= 0.99 * promised

"""Pages of bytes: what the transformers runtime's cache would hold, and its tokens, whatever the steps in which they came."""

import pytest
import torch
from engines import BIND, assert_same_tokens, job, prompts, serve
from plans import PACKED
from safetensors.torch import load_file
from tiny import load

import kvfold
from kvfold.evaluation.demo import MODEL
from kvfold.runtimes.kernels.codec import unpack

CHUNKS = {"max_num_batched_tokens": 64, "max_num_seqs": 8}
STEPS = {
    "whole": {},
    "small_pages": {"block_size": 16, "max_num_batched_tokens": 48},
    "few_pages": {"block_size": 16, "max_num_batched_tokens": 48, "num_gpu_blocks_override": 60},
}
"""Prompts at once; in other pieces, in small pages; so few pages that requests wait, or are begun anew."""
UNSHARED = {"block_size": 16, "enable_prefix_caching": False}
LEFT_OUT = ("auto", "predicted", "shared_recent", "gemma2_softcap_auto")
"""Where no other request could find a prompt again, pages of its recent tokens are left out: of each layer by itself, of
layers below too, of another layer, by torch."""
RECORDED = ("auto", "int4", "unequal_groups")
BY_TEXT = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
CLOSE = 2e-2
"""Of log-probabilities: a code of few bits that falls to the other side of a rounding is worth so much, and which ones do
depends on the processor (0.014 without AVX-512)."""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("packed")


@pytest.fixture(scope="module")
def served(folder, root):
    jobs = {name: job(folder(name), root / name if name in RECORDED else None, **CHUNKS) for name in PACKED}
    jobs |= {f"auto {steps}": job(folder("auto"), **options) for steps, options in STEPS.items()}
    jobs |= {f"{name} unshared": job(folder(name), **UNSHARED) for name in LEFT_OUT}
    drafts = {"method": "draft_model", "model": str(MODEL), "num_speculative_tokens": 2}
    jobs["drafts"] = job(folder("auto"), speculative_config=drafts)
    return serve(root, jobs | {"original": job(folder("original"))}, **{BIND: "0"})


@pytest.mark.parametrize("name", [*PACKED, *(f"auto {steps}" for steps in STEPS)])
def test_tokens_are_those_of_transformers(served, folder, name):
    assert "error" not in served[name], served[name]
    assert_same_tokens(served[name], folder(name.split()[0]), CLOSE)


@pytest.mark.parametrize("name", LEFT_OUT)
def test_prompts_are_read_though_their_recent_tokens_have_no_pages(served, folder, name):
    found = served[f"{name} unshared"]
    assert found.get("left_out"), found
    assert_same_tokens(found, folder(name), CLOSE)


@pytest.mark.parametrize("name", ["auto", "bloom_alibi_auto"])
def test_drafts_of_the_text_change_no_token(folder, tmp_path, name):
    """In an engine of its own: once vLLM 0.32 has drafted on a CPU, no other can be started in its process."""
    found = serve(tmp_path, {name: job(folder(name), speculative_config=BY_TEXT, **CHUNKS)})[name]
    assert 0 < found["accepted"] < found["draft"], found
    assert_same_tokens(found, folder(name), CLOSE)


def test_drafts_of_a_second_model_are_refused(served):
    assert "speculative method draft_model" in served["drafts"]["error"]


@pytest.mark.parametrize("name", ["auto", "int4", "bloom_alibi_auto", "qwen3_norm_window_auto"])
def test_a_prompt_that_was_seen_is_read_from_the_cache(served, name):
    assert all(one["cached"] >= 64 for one in served[name]["rounds"][1][2:])


@pytest.mark.parametrize("name", RECORDED)
def test_pages_hold_the_bytes_of_kvfolds_own_cache(served, folder, root, name):
    """At most one row in a hundred differs, by a rounding, in the first two layers. From there on one code that falls to the
    other side moves hidden states by more than a step of 8 bits: numbers are close."""
    found = load_file(root / name)
    model = load(folder(name), dtype=torch.float32)
    cache = kvfold.FoldedCache(model.kv_plan)
    with torch.no_grad():
        model(torch.tensor([prompts()[-1]]), past_key_values=cache)
    owners = [index for index, spec in enumerate(model.kv_plan.caches) if spec is not None]
    compared = 0
    for index, layer in zip(owners, cache.owned, strict=True):
        sides = [
            (f"{index}.{side}", buffer.view().rows, buffer.format)
            for side, buffer in zip("kv", layer.buffers, strict=False)
        ]
        sides += [
            (f"{index}.{side}.recent", kept.rows, kept.format) for side, kept in zip("kv", layer.recent, strict=False)
        ]
        for key, expected, format in sides:
            rows = found[key][None, :, -expected.shape[2] :]
            assert rows.shape == expected.shape
            differ = (rows != expected).any(-1).float().sum()
            assert index > 1 or differ <= max(0.01 * expected[..., 0].numel(), 1)
            assert distance(unpack(rows, format, torch.float32), unpack(expected, format, torch.float32)) < 0.02
            compared += 1
    assert compared >= 6


def distance(x, y):
    """Relative."""
    return float((x - y).norm() / y.norm())


def test_the_cache_holds_as_many_more_tokens_as_the_plan_promises(served, folder):
    """Where all pages are of one kind; vLLM's own are of float32 here, positions take nothing there."""
    plan = kvfold.inspect(folder("int4")).plan
    promised = plan.source_kv_bytes_per_token("float32") / plan.kv_bytes_per_token("float32")
    assert served["int4"]["cache_tokens"] / served["original"]["cache_tokens"] >= 0.99 * promised


@pytest.mark.rare
def test_the_gpus_kernels_read_the_same_pages(folder, tmp_path):
    """Interpreted: keys that queries are turned for, recent tokens in a window of their own, sequences of any lengths."""
    found = serve(tmp_path, {"auto": job(folder("auto"), gpu=True)})["auto"]
    assert found.get("calls"), found
    assert_same_tokens(found, folder("auto"), close=1e-3)

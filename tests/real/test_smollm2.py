"""A real model, SmolLM2-135M-Instruct, folded with the defaults: `make real-models`, then `make test-real`.

Bounds stand above what was measured on books (results/real-frontier.md): here the model calibrates on 64 x 256 tokens that it
sampled.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch.nn.functional import rms_norm
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding

import kvfold
from kvfold.calibration.text import first_windows
from kvfold.checkpoint.source import load_plan
from kvfold.checkpoint.tokenizer import load_tokenizer
from kvfold.compression.recipe import make_recipe
from kvfold.evaluation.generate import continue_prompt
from kvfold.evaluation.texts import Predictions, evaluate_models
from kvfold.runtimes.transformers.cache import FoldedCache
from kvfold.runtimes.transformers.load import load_weights

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "lab" / "models" / "real" / "smollm2-135m"
TEXT = ROOT / "tests" / "data" / "books-valid-slice.txt"
CALIBRATION = {"data": "self", "num_samples": 64, "seq_len": 256}
"""One text for all methods, so that it is sampled once."""
PROMPTS = (
    "The capital of France is", "Water boils at", "Once upon a time", "def fibonacci(n):", "The largest planet is",
    "To make bread you need", "Two plus two is", "She opened the door and", "Photosynthesis is", "In 1969 people first",
)  # fmt: skip

pytestmark = pytest.mark.skipif(not MODEL.exists(), reason="SmolLM2 is not here: run `make real-models` first")


@pytest.fixture(scope="session", autouse=True)
def _all_cores():
    """Nothing runs beside this suite; the others take one core per process."""
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("real")


@pytest.fixture(scope="session")
def fold(root):
    folders = {}

    def run(preset, budget):
        if (preset, budget) not in folders:
            fields = {"model": str(MODEL), "preset": preset, "kv_budget": budget, "calibration": CALIBRATION}
            recipe = make_recipe(fields | {"out": str(root / f"{preset}-{budget}")})
            folders[preset, budget] = kvfold.compress(recipe, run_dir=root / "run", device="cpu").out
        return folders[preset, budget]

    return run


@pytest.fixture(scope="session")
def windows():
    return first_windows(load_tokenizer(MODEL), TEXT, seq_len=1024, max_tokens=2048)


@pytest.fixture(scope="session")
def original():
    return Predictions(load_weights(MODEL, "float32", "cpu"))


@pytest.fixture(scope="session")
def kl(fold, windows, original):
    def measure(preset, budget):
        folder = fold(preset, budget)
        return evaluate_models(load_weights(folder, "float32", "cpu"), original, windows, load_plan(folder)[0]).kl

    return measure


@pytest.mark.parametrize(("budget", "bound"), [(0.25, 0.003), (0.125, 0.01)])
def test_the_default_fold_loses_little(kl, budget, bound):
    assert kl("auto", budget) < bound


def test_order_of_methods_at_a_quarter(kl):
    """Within as many bytes: kvfold's default, then its fast form, plain 4 bits, and low rank alone as in the paper."""
    auto, int4, svd_a = kl("auto", 0.25), kl("int4", None), kl("svd_a", 0.25)
    assert auto < int4 / 5 < svd_a / 5


def test_greedy_continuations_stay_close(fold, original):
    """Of ten prompts, how many of 16 tokens are the original's own until the first that is not, at a quarter of the bytes."""
    model, tokenizer = load_weights(fold("auto", 0.25), "float32", "cpu"), load_tokenizer(MODEL)
    leading = []
    for prompt in PROMPTS:
        ours, theirs = (
            tokenizer(continue_prompt(which, tokenizer, prompt, 16, do_sample=False)[0])["input_ids"]
            for which in (model, original.model)
        )
        leading.append(next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), 16))
    assert sum(leading) / len(leading) >= 8, leading


def exact_norm(norm, x):
    return norm.weight * rms_norm(x, x.shape[-1:], eps=norm.variance_epsilon)


def exact_tables(rotary, x, position_ids):
    angles = (position_ids[..., None].double() * rotary.inv_freq.double()).repeat(1, 1, 2)
    return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


@torch.no_grad()
def test_cached_equals_uncached(fold, windows, monkeypatch):
    """A prompt in chunks, then tokens one by one, out of a packed cache: the very same codes. In float64 to the last step,
    which torch's fused attention and the family's norms and tables are not: a number that lies between two codes falls to
    either side, and 30 layers make of one such code KLs of 1e-5 to 1e-2."""
    monkeypatch.setattr(LlamaRMSNorm, "forward", exact_norm)
    monkeypatch.setattr(LlamaRotaryEmbedding, "forward", exact_tables)
    folder = fold("auto", 0.125)
    model, plan = load_weights(folder, "float32", "cpu").double(), load_plan(folder)[0]
    model.set_attn_implementation("eager")
    ids = windows[:1, :600]
    expected = model(ids, use_cache=False, logits_to_keep=8).logits[0]
    cache, logits = FoldedCache(plan), []
    for start, end in ((0, 200), (200, 592), *((i, i + 1) for i in range(592, 600))):
        logits.append(model(ids[:, start:end], past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1])
    expected, found = (x.log_softmax(-1) for x in (expected, torch.stack(logits[2:])))
    assert float((expected.exp() * (expected - found)).sum(-1).mean()) < 1e-6
    assert cache.nbytes_allocated == plan.kv_bytes(600)  # packed, whatever the dtype


@torch.no_grad()
def test_evaluation_is_what_the_real_cache_gives(fold, windows, original, kl):
    """KL of the first 256 tokens, token by token through a cache, as evaluation without a cache has it."""
    folder = fold("auto", 0.125)
    model, plan = load_weights(folder, "float32", "cpu"), load_plan(folder)[0]
    ids = windows[:1, :256]
    cache = FoldedCache(plan)
    steps = [model(step, past_key_values=cache, use_cache=True).logits[0] for step in ids.split(1, dim=1)]
    q, p = torch.cat(steps)[:-1].log_softmax(-1), original(ids[0]).log_softmax(-1)
    stepwise = float((p.exp() * (p - q)).sum(-1).mean())
    assert stepwise == pytest.approx(evaluate_models(model, original, ids, plan).kl, rel=0.02)

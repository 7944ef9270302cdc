"""The same results on the accelerator as on the CPU; on a machine without one these compare the CPU with itself."""

import pytest
import torch
from tiny import MODELS, load, logits, tokens

import kvfold
from kvfold.calibration.calibrate import STATISTICS, calibrate
from kvfold.checkpoint.source import open_source
from kvfold.compression.recipe import make_recipe
from kvfold.evaluation.demo import MODEL
from kvfold.runtimes.transformers.cache import FoldedCache
from kvfold.runtimes.transformers.load import resolve_device
from kvfold.testing import assert_close

DEVICE = resolve_device("auto")
FIELDS = [{}, {"latent": "group"}, {"v_latent": "layer"}]


@pytest.mark.parametrize("model", MODELS)
def test_statistics(tiny_dir, tmp_path, model):
    source, ids, found = open_source(tiny_dir / model), tokens(20, 33), []
    for device in ("cpu", DEVICE):
        run = calibrate(
            source.checkpoint, source.arch, ids, needs=frozenset(STATISTICS), run_dir=tmp_path / device, device=device
        )
        found.append(run.layer(2, STATISTICS))
    for name in STATISTICS:
        assert_close(found[1][name].second_FF, found[0][name].second_FF, tolerance=1e-4, name=name)


@pytest.mark.parametrize("fields", FIELDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model", MODELS)
def test_cached_decoding(fold, model, dtype, fields):
    folded = fold(model, "svd_a", kv_budget=0.5, **fields)
    expected, ids = logits(load(folded.out), tokens(2, 60)), tokens(2, 60).to(DEVICE)
    network, cache = load(folded.out, dtype=dtype).to(DEVICE), FoldedCache(folded.plan)
    with torch.no_grad():
        parts = [network(ids[:, :40], past_key_values=cache).logits]
        parts += [network(ids[:, i : i + 1], past_key_values=cache).logits for i in range(40, 60)]
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 8e-2, torch.float16: 1e-2}[dtype]
    assert_close(torch.cat(parts, 1).float().cpu(), expected, tolerance=tolerance)
    assert cache.nbytes_allocated == folded.plan.kv_bytes(60, batch_size=2, dtype=str(dtype).removeprefix("torch."))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rope", ["applied", "on_read"])
@pytest.mark.parametrize("bits", ["mixed", "integer", "fp8", "kivi"])
def test_packed_decoding(tiny_dir, tmp_path, bits, rope, dtype):
    """Packed on the device, token by token, near the float32 result without a cache."""
    recipe = {
        "model": str(tiny_dir / "llama_yarn"),
        "out": str(tmp_path / "out"),
        "kv_budget": 0.4 if bits == "mixed" else None,
        "width": {"method": "fisher", "rope": rope} | ({} if bits == "mixed" else {"kv_heads": 4}),
        "bits": {"method": bits} | ({} if bits in ("mixed", "fp8") else {"k_bits": 8, "v_bits": 8}),
        "allocate": "greedy",
        "calibration": {"data": "self", "num_samples": 8, "seq_len": 48},
    }
    folded = kvfold.compress(recipe, device=DEVICE)
    expected, ids = logits(load(folded.out), tokens(2, 60)), tokens(2, 60).to(DEVICE)
    network, cache = load(folded.out, dtype=dtype).to(DEVICE), FoldedCache(folded.plan)
    with torch.no_grad():
        parts = [network(ids[:, :40], past_key_values=cache).logits]
        parts += [network(ids[:, i : i + 1], past_key_values=cache).logits for i in range(40, 60)]
    # numbers that were rounded in half precision fall into other codes
    assert_close(torch.cat(parts, 1).float().cpu(), expected, tolerance=0.05 if dtype == torch.float32 else 0.2)
    assert cache.nbytes_allocated == folded.plan.kv_bytes(60, batch_size=2, dtype=str(dtype).removeprefix("torch."))


def test_the_whole_journey(tmp_path):
    recipe = make_recipe(
        {
            "model": str(MODEL),
            "out": str(tmp_path / "out"),
            "preset": "svd_a",
            "kv_budget": 0.5,
            "calibration": {"data": "self", "num_samples": 8, "seq_len": 128},
        }
    )
    folded = kvfold.compress(recipe, device=DEVICE)
    made = kvfold.generate(folded.out, "The old man", max_new_tokens=20, device=DEVICE)
    assert made.new_tokens == 20 and made.kv_budget == 0.5
    (tmp_path / "text.txt").write_text(made.text * 20)
    found = kvfold.evaluate(folded.out, against=MODEL, data_file=tmp_path / "text.txt", seq_len=64, device=DEVICE)
    assert 0 <= found.kl < 0.3

"""What attention saves goes to the MLPs, whose function stays the same."""

from __future__ import annotations

import pytest
from tiny import load, logits, tokens

import kvfold
from kvfold.architectures.base import architecture
from kvfold.compression.presets import MLKV_PAPER
from kvfold.compression.widen_mlp import widened_size
from kvfold.testing import assert_close


@pytest.mark.parametrize("model", ["neox_partial", "llama_mha"])
def test_widening_the_mlp_keeps_parameters_and_function(tiny_dir, tmp_path, model):
    """Bit for bit the logits without it, where pythia-mlkv's copies change the MLP's output by 49 %."""
    recipe = {"model": str(tiny_dir / model), "preset": "mlkv", "depth": {"owners": 1}, "width": {"kv_heads": 1}}
    plain = load(kvfold.compress(recipe | {"out": str(tmp_path / "plain")}, device="cpu").out)
    wide = load(kvfold.compress(recipe | {"out": str(tmp_path / "wide"), "keep_parameters": True}, device="cpu").out)
    assert wide.config.intermediate_size > plain.config.intermediate_size
    assert_close(logits(wide, tokens()), logits(plain, tokens()), tolerance=1e-6)
    before, after, narrow = (sum(p.numel() for p in m.parameters()) for m in (load(tiny_dir / model), wide, plain))
    assert narrow < 0.9 * before and abs(after - before) < 0.02 * before
    ids = tokens()
    wide.train()(ids, labels=ids).loss.backward()
    arch = wide.architecture
    columns = wide.get_submodule(f"{arch.layers}.0.{arch.mlp_out}").weight.grad[:, plain.config.intermediate_size :]
    assert columns.abs().min() > 0  # training finds the new neurons


@pytest.mark.parametrize(
    ("name", "size"),
    [("GQA-48", 3584), ("MLKV-48", 3584), ("MQA-12", 3777), ("MLKV-12", 3777), ("MLKV-6", 3809), ("MLKV-4", 3819),
     ("MLKV-2", 3830), ("MLKV-1", 3835)],
)  # fmt: skip
def test_widths_are_the_papers(name, size):
    owners, heads = (
        MLKV_PAPER[name].fragment[axis][field] for axis, field in (("depth", "owners"), ("width", "kv_heads"))
    )
    saved = (144 - owners * heads) * 2 * (768 * 64 + 64)
    config = {"hidden_size": 768, "intermediate_size": 3072}
    assert widened_size(architecture("gpt_neox"), config, 12, saved) == size

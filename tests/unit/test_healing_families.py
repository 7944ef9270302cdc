"""Healing of families that differ in what surrounds attention: images beside text, sinks, chunks, experts."""

import pytest
import torch
from safetensors.torch import load_file
from test_healing import healing, lost, with_text
from tiny import COMMON, FAMILIES, make_tiny, save_tiny

import kvfold

DEFAULT = ("qwen2_vl_beside_vision", "llama4_beside_vision")
CASES = [
    *DEFAULT,
    *(pytest.param(name, marks=pytest.mark.rare) for name in ("qwen3_vl_beside_vision", "gpt_oss_experts")),
]


def with_words(name):
    """A tiny model of a family that knows the tokens of the packaged tokenizer."""
    fields = FAMILIES[name][1]
    if "text_config" in fields:
        return make_tiny(name, text_config=COMMON | fields["text_config"] | {"vocab_size": 4096})
    return make_tiny(name, vocab_size=4096)


@pytest.mark.parametrize("name", CASES)
def test_text_heals_attention_and_nothing_else(tmp_path, name):
    save_tiny(with_words(name), tmp_path / "source")
    with_text(tmp_path)
    recipe = {"model": str(tmp_path / "source"), "out": str(tmp_path / "folded"), "width": {"method": "svd_w"}}
    calibration = {"data": str(tmp_path / "text.txt"), "num_samples": 8, "seq_len": 48}
    kvfold.compress(recipe | {"kv_budget": 0.25, "calibration": calibration}, device="cpu")
    fields = {"objective": "kd", "train": "attention", "max_tokens": 1280}
    kvfold.heal(healing(tmp_path, "healed", **fields), device="cpu")
    before, after = (lost(tmp_path, folder).kl for folder in ("folded", "healed"))
    assert after < 0.98 * before, (before, after)
    old, new = (load_file(tmp_path / folder / "model.safetensors") for folder in ("folded", "healed"))
    assert old.keys() == new.keys()
    changed = {key for key in old if not torch.equal(old[key], new[key])}
    assert changed and all("self_attn" in key for key in changed)

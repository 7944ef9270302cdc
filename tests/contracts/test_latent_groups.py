"""mla: latents of keys and values of groups of heads."""

import pytest
import torch
from safetensors.torch import load_file
from tiny import kv_heads, load, logits, tokens

from kvfold.errors import RecipeError
from kvfold.testing import assert_close, relative_rms


@pytest.mark.parametrize("model", ["llama_yarn", "qwen3_norm_window", "bloom_alibi", "neox_partial", "gemma2_softcap"])
@pytest.mark.parametrize("rope", ["on_read", "banded"])
def test_all_numbers_give_the_original_logits(fold, tiny_dir, model, rope):
    heads = kv_heads(model)
    folded = fold(model, "mla", kv_budget=None, kv_heads=heads, group_size=1, below=0, rope=rope)
    assert {spec.num_kv_heads for spec in folded.plan.owned} == {heads}
    assert_close(logits(load(folded.out), tokens()), logits(load(tiny_dir / model), tokens()), tolerance=1e-5)


def test_one_group_is_one_latent(fold):
    one, group = (fold("llama_yarn", "mla", kv_budget=1 / 2, below=0, group_size=size) for size in (0, 4))
    assert one.plan == group.plan
    found, expected = (load_file(made.out / "model.safetensors") for made in (group, one))
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_more_heads_that_share_lose_less(fold, tiny_dir):
    """Each group stores what it says alone."""
    original = logits(load(tiny_dir / "llama_mha"), tokens())
    lost = [
        relative_rms(
            logits(load(fold("llama_mha", "mla", kv_budget=3 / 4, below=0, group_size=size).out), tokens()), original
        )
        for size in (1, 2, 8)
    ]
    assert lost[0] > lost[1] > lost[2]


def test_groups_that_cannot_be(fold):
    with pytest.raises(RecipeError, match=r"group_size = 3 does not divide the 8 key/value heads"):
        fold("llama_mha", "mla", kv_budget=1 / 2, below=0, group_size=3)
    with pytest.raises(RecipeError, match=r"not predicted by layers below; leave width\.below out"):
        fold("llama_mha", "mla", kv_budget=1 / 2, group_size=2, below=3)

"""What Trainer needs: gradients through a cache, through absorbed queries, and with checkpointing."""

from __future__ import annotations

import pytest
from tiny import load, tokens

from kvfold.runtimes.transformers.cache import FoldedCache
from kvfold.testing import assert_close, relative_rms


def test_gradients_flow_through_two_forwards_of_one_cache(fold):
    folded = fold("llama_mha", "svd_a", kv_budget=0.5)
    network, ids = load(folded.out), tokens(2, 20)
    network(ids, use_cache=False).logits[:, 12:].sum().backward()
    expected = {n: p.grad.clone() for n, p in network.named_parameters()}
    network.zero_grad()
    cache = FoldedCache(folded.plan)
    network(ids[:, :12], past_key_values=cache)
    network(ids[:, 12:], past_key_values=cache).logits.sum().backward()
    for name, parameter in network.named_parameters():
        assert_close(parameter.grad, expected[name], tolerance=1e-4, name=name)


@pytest.mark.parametrize("model", ["llama_mha", "gpt2_conv"])
def test_what_absorbs_queries_can_be_trained_alone(fold, model):
    """Queries ask for no gradient then, but absorbed they do: a kernel without a backward pass must not take them."""
    folder = fold(model, "svd_a", kv_budget=0.5, latent="layer").out
    found = []
    for T in (8, 40):  # few tokens read stored numbers, many rebuild them
        network = load(folder).requires_grad_(False)
        wanted = [p.requires_grad_() for n, p in network.named_parameters() if "k_b_proj" in n]
        network(tokens(2, 40)[:, :8] if T == 8 else tokens(2, 40), use_cache=False).logits[
            :, :8
        ].square().sum().backward()
        found.append([p.grad for p in wanted])
    assert found[0]
    for few, many in zip(*found, strict=True):
        assert few is not None
        assert_close(few, many, tolerance=1e-4)


def test_gradient_checkpointing_changes_nothing(fold):
    network, ids = load(fold("llama_mha", "svd_a", kv_budget=0.5).out).train(), tokens(2, 20)
    network(ids, labels=ids).loss.backward()
    expected = {n: p.grad.clone() for n, p in network.named_parameters()}
    network.zero_grad()
    network.gradient_checkpointing_enable()
    network(ids, labels=ids).loss.backward()
    assert all(relative_rms(p.grad, expected[n]) < 1e-5 for n, p in network.named_parameters())

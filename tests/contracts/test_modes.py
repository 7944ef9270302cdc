"""Folded models as users call them: embeddings as prompts, evaluation before training, written weights, dead layers."""

from __future__ import annotations

import pytest
import torch
from tiny import load, logits, make_tiny, save_tiny, tokens

import kvfold
from kvfold.compression.recipe import make_recipe
from kvfold.runtimes.kernels import packed_tokens
from kvfold.runtimes.transformers.projections import GroupedLinear
from kvfold.testing import assert_close


@pytest.fixture(scope="module")
def fold(tiny_dir, tmp_path_factory):
    """fold(model, preset, kv_budget, **fields) -> the folded folder."""
    root = tmp_path_factory.mktemp("modes")

    def make(model, preset, kv_budget, **fields):
        out = root / f"{model}-{preset}"
        if not out.exists():
            recipe = {
                "model": str(tiny_dir / model),
                "out": str(out),
                "preset": preset,
                "kv_budget": kv_budget,
            } | fields
            recipe["calibration"] = {"data": "self", "num_samples": 4, "seq_len": 32}
            kvfold.compress(make_recipe(recipe), device="cpu")
        return out

    return make


@pytest.mark.parametrize("model", ["llama_mha", "qwen2_bias_tied", "gemma2_softcap"])
def test_embeddings_as_a_prompt(fold, model):
    network, ids = load(fold(model, "small", 0.5), dtype=torch.float64).eval(), tokens(2, 20)
    asked = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    expected = network.generate(ids, **asked)[:, 20:]
    embeddings = network.get_input_embeddings()(ids)
    assert torch.equal(network.generate(inputs_embeds=embeddings, **asked), expected)


def test_training_after_inference_mode(fold):
    """What is kept of heads that were picked there is for everyone."""
    packed_tokens.index_of.cache_clear()
    network, ids = load(fold("llama_mha", "windows", 0.5, context_len=120)), tokens(1, 60)
    with torch.inference_mode():
        network(ids)
    network.train()
    network(ids, labels=ids).loss.backward()
    assert network.get_input_embeddings().weight.grad.abs().sum() > 0


@pytest.mark.parametrize("told", ["eval", "gradients"])
def test_weights_that_are_written_beside_their_versions(fold, told):
    """As some optimizers do, through `.data`: what kernels made of them is made anew when the model is told of it."""
    network, ids = load(fold("llama_mha", "small", 0.5)).eval(), tokens(1, 40)

    def said():
        with torch.no_grad():
            cache = network(ids[:, :-1], use_cache=True).past_key_values
            return network(ids[:, -1:], past_key_values=cache).logits[0, 0], network(ids, use_cache=False).logits[0, -1]

    before = said()[0]
    for module in network.modules():
        if isinstance(module, GroupedLinear):
            module.weight.data.mul_(1.5)
    if told == "eval":
        network.eval()
    else:
        network(ids)
    found, expected = said()
    assert (found - before).abs().max() > 1e-2
    assert torch.allclose(found, expected, atol=1e-3)


@pytest.mark.parametrize("method", ["fisher", "logit", "kq_svd"])
@pytest.mark.parametrize("dead", ["o_proj", "q_proj", "k_proj", "v_proj"])
def test_layers_that_say_nothing(tmp_path, method, dead):
    """As of blocks that were added with zeros, or heads that were pruned."""
    network = make_tiny("llama_mha")
    with torch.no_grad():
        getattr(network.model.layers[1].self_attn, dead).weight.zero_()
        network.model.layers[2].self_attn.q_proj.weight[:8].zero_()
    source = save_tiny(network, tmp_path / "source")
    recipe = {"model": str(source), "out": str(tmp_path / "out"), "width": {"method": method}, "kv_budget": 1.0}
    recipe |= {"calibration": {"data": "self", "num_samples": 8, "seq_len": 64}, "allocate": "uniform"}
    out = kvfold.compress(make_recipe(recipe), device="cpu").out
    assert_close(logits(load(out), tokens()), logits(load(source), tokens()), tolerance=1e-2)


@pytest.mark.parametrize(
    "bits", [{"method": "integer", "k_bits": 4, "v_bits": 8}, {"method": "kivi"}, {"method": "turboquant"}]
)
def test_fitted_heads_that_are_quantized(tiny_dir, tmp_path, bits):
    """Keys and values have as many heads, in formats of their own."""
    recipe = {"model": str(tiny_dir / "llama_mha"), "out": str(tmp_path / "out"), "kv_budget": 0.2, "bits": bits}
    recipe |= {"width": {"method": "procrustes"}, "calibration": {"data": "self", "num_samples": 4, "seq_len": 32}}
    plan = kvfold.compress(make_recipe(recipe), device="cpu").plan
    assert all(spec.num_kv_heads == spec.num_v_heads and spec.k_bits and spec.v_bits for spec in plan.owned)

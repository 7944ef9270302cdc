"""Latents that several layers fill together: exact in one step, compressed for past tokens, stored once."""

from __future__ import annotations

import pytest
import torch
from tiny import MODELS, load, logits, make_tiny, rotation, save_tiny, tokens

import kvfold
from kvfold.architectures.base import architecture
from kvfold.compression.recipe import make_recipe
from kvfold.evaluation.texts import evaluate_models
from kvfold.plan.folded_weights import FoldedWeights
from kvfold.runtimes import reference
from kvfold.runtimes.transformers.cache import FoldedCache
from kvfold.testing import assert_close, relative_rms

FULL = [model for model, (_, fields) in MODELS.items() if "sliding_window" not in fields]


@pytest.fixture(scope="module")
def joint(tiny_dir, tmp_path_factory):
    root, done = tmp_path_factory.mktemp("joint"), {}

    def run(model, kv_budget, **width):
        key = f"{model} {kv_budget} {width}"
        if key not in done:
            recipe = {"model": str(tiny_dir / model), "out": f"{root}/{len(done)}", "kv_budget": kv_budget}
            recipe |= {
                "depth": {"method": "explicit", "uses": LAYOUT.get(model, "0,0,0")},
                "width": {"method": "cross_layer"} | width,
            }
            calibration = {"data": "self", "num_samples": 16, "seq_len": 64}
            done[key] = kvfold.compress(
                make_recipe(recipe | {"calibration": calibration}), run_dir=root / "run", device="cpu"
            )
        return done[key]

    return run


LAYOUT = {"qwen3_norm_window": "0,1,0", "gemma3_norm": "0,1,0", "gemma2_softcap": "0,1,0", "llama_mha": "0,0,2"}
"""Which layers share; windows must agree, and a group of one is a latent of its own."""


def steps(network, ids, cuts, cache):
    start, out = 0, []
    for end in cuts:
        with torch.no_grad():
            out.append(network(ids[:, start:end], past_key_values=cache, use_cache=True).logits)
        start = end
    return torch.cat(out, 1)


@pytest.mark.parametrize("model", MODELS)
def test_full_width_is_the_original_however_tokens_come(joint, tiny_dir, model):
    folded = joint(model, 1.0)
    network, ids, expected = load(folded.out), tokens(2, 30), logits(load(tiny_dir / model), tokens(2, 30))
    assert_close(logits(network, ids), expected)
    for cuts in ([*range(1, 31)], [17, *range(18, 31)], [8, 20, 30]):
        cache = FoldedCache(folded.plan)
        assert_close(steps(network, ids, cuts, cache), expected, tolerance=2e-5, name=f"{cuts[:3]}")
        assert cache.nbytes_allocated == folded.plan.kv_bytes(30, batch_size=2)


@pytest.mark.parametrize("model", FULL)
@pytest.mark.parametrize("cuts", [[*range(1, 13)], [7, 8, 9, 12], [12]], ids=str)
def test_compressed_steps_equal_the_oracle(joint, model, cuts):
    folded = joint(model, 0.4)
    network, ids = load(folded.out), tokens(2, 12)
    found = steps(network, ids, cuts, FoldedCache(folded.plan))
    assert_close(found, oracle_steps(network, ids, cuts), tolerance=2e-5)
    if len(cuts) > 1:
        assert relative_rms(found[:, -1], logits(network, ids)[:, -1]) > 1e-3  # something is lost, so the test can fail


def oracle_steps(network, ids, cuts):
    """The family's forward with every attention replaced by reference.py, step by step, past latents in plain lists."""
    plan, T = network.kv_plan, ids.shape[1]
    rows = range(len(ids))
    sizes = {owner: plan.cache_of(owner) for owner in map(plan.owner, range(plan.num_layers))}
    past = {(o, row): (torch.zeros(0, s.head_dim).double(), torch.zeros(0, s.v_head_dim).double())
            for o, s in sizes.items() for row in rows}  # fmt: skip
    pending = {}

    def oracle(module, args, kwargs, out):
        hidden = args[0] if args else kwargs["hidden_states"]
        cos, sin = rotation(kwargs)
        weights = FoldedWeights.from_state_dict({name: t.double() for name, t in module.state_dict().items()})
        owner, outs = plan.owner(module.layer_idx), []
        for row in rows:
            out, share = reference.joint_attention(
                module.layer, weights, hidden[row].double(), cos, sin, past[owner, row]
            )
            before = pending.get((owner, row), (0, 0))
            pending[owner, row] = tuple(a + b for a, b in zip(share, before, strict=True))
            outs.append(out)
        return torch.stack(outs).to(hidden.dtype) + (args[1] if len(args) > 1 else 0), None

    hooks = [module.register_forward_hook(oracle, with_kwargs=True) for module in network.architecture.modules(network)]
    start, found = 0, []
    for end in cuts:
        positions = torch.arange(start, end)[None]
        with torch.no_grad():
            found.append(network(ids[:, start:end], position_ids=positions, use_cache=False).logits)
        for key, share in pending.items():
            past[key] = tuple(torch.cat([old, new]) for old, new in zip(past[key], share, strict=True))
        pending.clear()
        start = end
    for hook in hooks:
        hook.remove()
    assert start == T
    return torch.cat(found, 1)


@pytest.mark.parametrize("model", FULL)
def test_decoded_tokens_are_compressed_and_stored_once(joint, model):
    """One storage per group and side, of the planned bytes, after each of 40 decoded tokens."""
    folded = joint(model, 0.4)
    network, cache, ids = load(folded.out), FoldedCache(folded.plan), tokens(2, 60)
    assert folded.plan.kv_budget <= 0.4
    with torch.no_grad():
        network(ids[:, :20], past_key_values=cache)
        for i in range(20, 60):
            network(ids[:, i : i + 1], past_key_values=cache)
            assert cache.nbytes_allocated == folded.plan.kv_bytes(i + 1, batch_size=2)
    assert len(cache.owned) == len(set(map(folded.plan.owner, range(3)))) and cache.get_seq_length() == 60


@pytest.mark.parametrize("model", FULL)
def test_generation(joint, model):
    """A padded row is the row alone; beams of one prompt agree with a beam of one at width one; crops keep the latents."""
    network, ids = load(joint(model, 0.5).out), tokens(2, 12)
    mask = torch.ones_like(ids)
    mask[0, :5], ids[0, :5] = 0, 0
    alone = network.generate(ids[:1, 5:], max_new_tokens=12, do_sample=False)
    batch = network.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
    assert torch.equal(batch[0, 5 : 5 + alone.shape[1]], alone[0])
    assert network.generate(ids, attention_mask=mask, max_new_tokens=8, num_beams=3, do_sample=False).shape[0] == 2
    cache = FoldedCache(network.kv_plan)
    expected = steps(network, tokens(1, 20), [10, 15, 20], cache)[:, 15:]
    cache.crop(-5)
    with torch.no_grad():
        assert_close(network(tokens(1, 20)[:, 15:], past_key_values=cache).logits, expected)


def test_a_planted_map_between_layers_costs_no_width(tmp_path):
    """All heads of every layer are scaled copies of one: a latent of one head per layer holds everything."""
    from tiny import copy_heads

    original = copy_heads(make_tiny("llama_mha"), [1.0, -0.5, 2.0, 0.7, 1.3, -1.1, 0.4, 0.9])
    recipe = {"model": str(save_tiny(original, tmp_path / "source")), "out": str(tmp_path / "out"), "kv_budget": 1 / 8}
    recipe |= {"depth": {"method": "explicit", "uses": "0,0,0"}, "width": {"method": "cross_layer"}}
    folded = kvfold.compress(recipe | {"calibration": {"data": "self", "num_samples": 16, "seq_len": 64}}, device="cpu")
    found = steps(load(folded.out), tokens(1, 20), [*range(1, 21)], FoldedCache(folded.plan))
    assert_close(found, logits(original, tokens(1, 20)), tolerance=1e-4)


def test_evaluation_counts_what_decoding_loses(joint, tiny_dir):
    """Windows are decoded token by token: in one step nothing would be lost."""
    folded = joint("llama_mha", 0.25)
    network, original = load(folded.out), load(tiny_dir / "llama_mha")
    assert_close(logits(network, tokens()), logits(original, tokens()))
    found = evaluate_models(network, original, tokens(4, 24), folded.plan)
    assert found.kl > 1e-3
    assert (
        evaluate_models(load(joint("llama_mha", 1.0).out), original, tokens(4, 24), joint("llama_mha", 1.0).plan).kl
        < 1e-6
    )


def test_parts_and_foreign_caches_are_refused(joint):
    from transformers import DynamicCache

    network = load(joint("llama_yarn", 0.5).out)
    with pytest.raises(ValueError, match="several layers fill together"):
        network(tokens(), past_key_values=DynamicCache(config=network.config))
    assert architecture("llama").model_type == "llama"


def test_training_needs_no_cache(joint):
    """A plain training step, in which the stock forward would make a cache of its own."""
    network, ids = load(joint("llama_yarn", 0.5).out).train(), tokens()
    network(ids, labels=ids).loss.backward()
    assert network.get_submodule("model.layers.0.self_attn.k_proj").weight.grad.abs().sum() > 0


def test_prompt_lookup_beyond_a_sliding_window(joint):
    network, one = load(joint("mistral_window", 0.5).out), tokens(1, 12).repeat(1, 2)
    assert network.generate(one, max_new_tokens=10, do_sample=False, prompt_lookup_num_tokens=3).shape[1] > 24

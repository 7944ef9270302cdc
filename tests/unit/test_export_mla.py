"""Exports to DeepSeek's class: by the obvious sums of complex numbers, exact where one key head serves all queries."""

import json

import pytest
import torch
import transformers
from tiny import load, logits, make_tiny, save_tiny, tokens

from kvfold.checkpoint.source import open_source, read_layer
from kvfold.compression.export_mla import export_mla
from kvfold.errors import BudgetError, CheckpointError, RecipeError
from kvfold.linalg.decoupled_rotation import decouple, mean_turn, turned_by
from kvfold.testing import assert_close

CALIBRATION = {"data": "self", "num_samples": 8, "seq_len": 64}


@pytest.fixture
def exported(tmp_path):
    """exported(K, kv_budget) -> (the source, the folder)."""

    def made(kv_heads, kv_budget, rms_norm_eps=1e-6, dtype=torch.float32, **options):
        model = make_tiny("llama_mha", num_key_value_heads=kv_heads, rms_norm_eps=rms_norm_eps)
        source = save_tiny(model.to(dtype), tmp_path / "source")
        export_mla(source, tmp_path / "out", kv_budget=kv_budget, calibration=CALIBRATION, **options)
        return source, tmp_path / "out"

    return made


def test_one_key_head_is_rotated_as_it_is(exported):
    """Nothing is left that would have to stop rotating, and at full width nothing is lost: the logits and the tokens of the
    original, by the stock class in a cache of latents."""
    source, out = exported(1, 1.0)
    original, stock = load(source), transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    assert type(stock) is transformers.DeepseekV3ForCausalLM
    assert_close(logits(stock, tokens()), logits(original, tokens()), tolerance=1e-4)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(stock.generate(tokens(2, 9), **options), original.generate(tokens(2, 9), **options))


@pytest.mark.parametrize("dead", ["o_proj", "q_proj", "k_proj"])
def test_layers_that_say_nothing(tmp_path, dead):
    """Whose keys cost nothing."""
    network = make_tiny("llama_mha")
    with torch.no_grad():
        getattr(network.model.layers[1].self_attn, dead).weight.zero_()
    source, out = save_tiny(network, tmp_path / "source"), tmp_path / "out"
    export_mla(source, out, kv_budget=0.6, calibration=CALIBRATION, runtime="transformers")
    assert logits(load(out), tokens()).isfinite().all()


def test_epsilon_is_that_of_whom_it_is_for(exported):
    """Where vLLM would take another one, which is read is said; the folder that is read by the other is wrong."""
    with pytest.raises(RecipeError, match="rms_norm_eps is 1e-05.* --runtime transformers, or vllm"):
        exported(1, 1.0, rms_norm_eps=1e-5)
    source, out = exported(1, 1.0, rms_norm_eps=1e-5, runtime="vllm")
    original, stock = load(source), transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    with pytest.raises(AssertionError):
        assert_close(logits(stock, tokens()), logits(original, tokens()), tolerance=1e-2)
    for layer in stock.model.layers:
        layer.self_attn.kv_a_layernorm.variance_epsilon = 1e-5
    assert_close(logits(stock, tokens()), logits(original, tokens()), tolerance=1e-4)


def test_numbers_that_float16_does_not_have(exported):
    source, out = exported(1, 1.0, dtype=torch.float16)
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    original, stock = load(source, dtype=torch.float32), load(out, dtype=torch.float32)
    assert_close(logits(stock, tokens()), logits(original, tokens()), tolerance=2e-2)


def test_a_rope_type_that_vllm_reads_as_another(tmp_path):
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    source = save_tiny(make_tiny("llama_mha", rope_parameters=rope, rms_norm_eps=1e-6), tmp_path / "source")
    for runtime, error in ((None, RecipeError), ("vllm", CheckpointError)):
        with pytest.raises(error, match="vLLM reads rope_type 'linear'"):
            export_mla(source, tmp_path / "out", kv_budget=0.5, calibration=CALIBRATION, runtime=runtime)
    export_mla(source, tmp_path / "out", kv_budget=0.5, calibration=CALIBRATION, runtime="transformers")


@pytest.mark.parametrize("published", [False, True], ids=["", "published"])
@pytest.mark.parametrize("kv_heads", [2, 8])
def test_attention_by_complex_numbers(exported, kv_heads, published):
    """At full width: of each speed one mixture of heads turns with the distance, the rest by what a turn is in the mean."""
    source, out = exported(kv_heads, 1.0 if kv_heads == 8 else 0.9999, published=published)
    layer = open_source(source).layers[0]
    weights = read_layer(open_source(source).checkpoint, open_source(source).arch, layer)
    stock = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float64).eval()
    attention, rank = stock.model.layers[0].self_attn, stock.config.kv_lora_rank
    T, N, K, H = 7, layer.num_attention_heads, kv_heads, layer.head_dim
    x = torch.randn(1, T, layer.hidden_size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tables = stock.model.rotary_emb(x, torch.arange(T)[None])
    causal = torch.full((T, T), -torch.inf, dtype=torch.float64).triu(1)[None, None]
    with torch.no_grad():
        found = attention(x, position_embeddings=tables, attention_mask=causal)[0][0]
        latent = attention.kv_a_layernorm(attention.kv_a_proj_with_mqa(x)[..., :rank])
        up = attention.kv_b_proj(latent)[0].unflatten(1, (N, -1))
    rest, v = up[..., :H], up[..., H:]  # [T, N, H]: what does not turn, and values
    shared = (x[0] @ attention.kv_a_proj_with_mqa.weight[rank:].T).detach()
    q_rest, q_shared = (x[0] @ attention.q_proj.weight.T).detach().unflatten(1, (N, -1)).chunk(2, dim=-1)
    turn = torch.polar(
        torch.ones(T, H // 2).double(), torch.arange(T)[:, None] * torch.tensor(layer.rotary_speeds).double()
    )
    neighbours = [torch.complex(z[..., ::2], z[..., 1::2]) for z in (q_shared, shared)]
    turned = (neighbours[0] * turn[:, None]).conj(), neighbours[1] * turn
    scores = torch.einsum("tnh,snh->nts", q_rest, rest) + torch.einsum("tnf,sf->nts", *turned).real
    probs = (scores / (2 * H) ** 0.5 + causal[0]).softmax(-1)
    wanted = torch.einsum("nts,snh->tnh", probs, v).flatten(1) @ weights.o_proj.T
    assert_close(found, wanted, tolerance=1e-6)
    values = (x[0] @ weights.v_proj.T).unflatten(1, (K, H)).repeat_interleave(N // K, 1)
    if kv_heads == 8:  # more latents than numbers: nothing of values is lost
        assert_close(v, values, tolerance=1e-3)


def test_heads_that_are_multiples_of_one_are_one_head():
    """By complex numbers: heads that are turned and stretched copies leave no rest; by real ones those that are stretched."""
    generator = torch.Generator().manual_seed(0)
    K, H, T = 3, 8, 400
    first = torch.randn(T, H // 2, dtype=torch.complex128, generator=generator)
    factors = torch.randn(K, H // 2, dtype=torch.complex128, generator=generator)

    def rest(factors_Kh, published):
        heads = first[:, None] * factors_Kh
        k_TF = torch.cat([heads.real, heads.imag], -1).flatten(1)
        found = decouple(
            k_TF.T @ k_TF / T, torch.rand(K, H).double() + 0.1, (1.0, 0.1, 0.01, 0.001), 100, published=published
        )
        back = (found.back_KHH @ (k_TF @ found.shared_HF.T).T).permute(2, 0, 1).flatten(1)
        return (k_TF - back).norm() / k_TF.norm(), (k_TF @ found.rest_FF.T).norm() / k_TF.norm()

    assert max(rest(factors, published=False)) < 1e-6
    assert min(rest(factors, published=True)) > 0.1
    assert max(rest(factors.real.to(factors.dtype), published=True)) < 1e-6


def test_what_a_turn_is_in_the_mean():
    """Nothing of what turns fast, all of what does not turn; multiplication by numbers is a matrix."""
    still, slow, fast = mean_turn((0.0, 1e-5, 3.0), 1000)
    assert abs(still - 1) < 1e-12 and abs(slow - 1) < 0.01 and abs(fast) < 0.3 and slow.imag < 0
    assert torch.equal(mean_turn((0.5, 2.0), 1), torch.ones(2, dtype=torch.complex128))
    factor, x = torch.tensor([1 + 2j, 3 - 1j]).to(torch.complex128), torch.randn(4).double()
    product = torch.complex(x[:2], x[2:]) * factor
    assert_close(turned_by(factor) @ x, torch.cat([product.real, product.imag]), tolerance=1e-12)


def test_budgets_and_models_that_do_not_go(tmp_path):
    source = save_tiny(make_tiny("llama_mha"), tmp_path / "source")
    with pytest.raises(BudgetError, match=r"the least is 0\.07"):
        export_mla(source, tmp_path / "out", kv_budget=1 / 32, calibration=CALIBRATION)
    for name, reason in (("qwen2_bias_tied", "biases"), ("qwen3_norm_window", "norms"), ("mixtral_experts", "MLP")):
        other = save_tiny(make_tiny(name), tmp_path / name)
        with pytest.raises(CheckpointError, match=f"models with .*{reason}"):
            export_mla(other, tmp_path / "out", kv_budget=0.5, calibration=CALIBRATION)
    assert not (tmp_path / "out").exists()


def test_a_runtime_that_is_none(exported):
    with pytest.raises(RecipeError, match="Did you mean 'vllm'"):
        exported(1, 1.0, runtime="vlm")


def test_bytes_are_those_of_the_budget(exported):
    """(latent and rotated head) per token, in the cache of the stock class too."""
    source, out = exported(4, 0.5)
    config = json.loads((out / "config.json").read_text())
    whole = 2 * 4 * 8
    assert config["kv_lora_rank"] + config["qk_rope_head_dim"] == whole / 2
    cache = transformers.AutoModelForCausalLM.from_pretrained(out)(tokens(1, 9), use_cache=True).past_key_values
    held = sum(x.numel() for layer in cache.layers for x in (layer.keys, layer.values))
    assert held == 9 * len(cache.layers) * whole / 2 and source.exists()


YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 128}


def exported_logits(tmp_path, rope, kv_heads, dead=False):
    network = make_tiny("llama_mha", num_key_value_heads=kv_heads, rms_norm_eps=1e-6, rope_parameters=rope)
    for layer in network.model.layers if dead else ():  # of which only what hardly turns says anything
        with torch.no_grad():
            layer.self_attn.k_proj.weight.unflatten(0, (kv_heads, 2, -1))[:, :, 0] = 0
    source, out = save_tiny(network, tmp_path / "source"), tmp_path / "out"
    export_mla(source, out, kv_budget=1.0, calibration=CALIBRATION, runtime="transformers")
    return logits(transformers.AutoModelForCausalLM.from_pretrained(out).eval(), tokens()), logits(
        load(source), tokens()
    )


@pytest.mark.parametrize("more", [{}, {"attention_factor": 3.0}, {"mscale": 1.0, "mscale_all_dim": 1.0}])
def test_yarn_of_one_key_head(tmp_path, more):
    """DeepSeek's class would scale scores once more by what `mscale_all_dim` says."""
    assert_close(*exported_logits(tmp_path, YARN | more, 1), tolerance=1e-4)


def test_yarn_scales_what_does_not_turn_as_well(tmp_path):
    rope = YARN | {"factor": 40.0, "rope_theta": 1e24, "attention_factor": 1.5}
    assert_close(*exported_logits(tmp_path, rope, 8, dead=True), tolerance=1e-3)

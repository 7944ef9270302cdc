"""Whether the tiny models with a sink have the habits of trained ones that they are there for (sinks.py)."""

import pytest
import torch
from sinks import MASSIVE
from tiny import SINKS, make_tiny, tokens

LENGTH = 40


@pytest.fixture(scope="module", params=SINKS)
def seen(request):
    """Attention, hidden states, and norms [B, T, K] of keys and values of every layer, of a forward without begin-of-text."""
    model, norms = make_tiny(request.param), {}
    model.set_attn_implementation("eager")
    for index, layer in enumerate(model.model.layers):
        attention = layer.self_attn
        for side, module in {"v": attention.v_proj, "k": getattr(attention, "k_norm", attention.k_proj)}.items():
            module.register_forward_hook(
                lambda module, args, out, place=(side, index), H=attention.head_dim: norms.__setitem__(
                    place, out.reshape(4, LENGTH, -1, H).norm(dim=-1)
                )
            )
    with torch.no_grad():
        out = model(tokens(4, LENGTH), output_attentions=True, output_hidden_states=True)
    return model, out, norms


@pytest.mark.parametrize("layer", [1, 2])
def test_the_first_token_gets_most_of_the_attention(seen, layer):
    """Whatever it is, from most queries of every head; and not all of it, or nothing else could be tested."""
    share_BNT = seen[1].attentions[layer][:, :, 1:, 0]
    assert 0.5 < share_BNT.mean() < 0.95
    assert (share_BNT.mean((0, 2)) > 0.4).all()
    assert (share_BNT > 0.5).float().mean() > 0.6


@pytest.mark.parametrize("layer", [1, 2])
def test_its_value_is_small_and_its_key_is_large(seen, layer):
    model, _, norms = seen
    values, keys = norms["v", layer], norms["k", layer]
    assert values[:, 0].max() < 0.5 * values[:, 1:].median()
    assert (
        keys[:, 0].min() > (1.2 if model.model.layers[layer].self_attn.k_proj.bias is not None else 5) * keys.median()
    )


def test_one_channel_is_hundreds_of_times_the_others(seen):
    """At the first token only, between the first layer and the last."""
    for hidden_BTD in seen[1].hidden_states[1:-1]:
        massive_BT = hidden_BTD[..., MASSIVE].abs()
        assert massive_BT[:, 0].min() > 100 * hidden_BTD.abs().median()
        assert massive_BT[:, 1:].max() < 0.02 * massive_BT[:, 0].min()


def test_heads_have_odd_counts_and_keys_have_large_biases():
    for name in SINKS:
        config = make_tiny(name).config
        assert config.num_attention_heads // config.num_key_value_heads % 2 == 1
    attention = make_tiny("qwen2_sink").model.layers[1].self_attn
    assert attention.k_proj.bias.view(-1, attention.head_dim).norm(dim=1).min() > 30
    assert make_tiny("qwen3_sink").model.layers[1].self_attn.k_norm.weight.max() > 5

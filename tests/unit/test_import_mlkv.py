"""Checkpoints in the layout of the MLKV paper's public code, against the formula that this code computes without a cache."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tiny import load, logits, tokens

from kvfold.compression.import_mlkv import import_mlkv
from kvfold.errors import CheckpointError
from kvfold.runtimes.transformers.cache import FoldedCache
from kvfold.testing import assert_close

L, N, H, D, VOCAB, ROTARY = 6, 4, 8, 32, 211, 4


def checkpoint(folder, owners, heads, *, pickle=False, **config):
    """A random checkpoint: three projections in owning layers, a query alone in the others."""
    torch.manual_seed(0)
    state = {"gpt_neox.embed_in.weight": torch.randn(VOCAB, D), "embed_out.weight": torch.randn(VOCAB, D) / 3}
    own = {0} | {int((i + 1) * (L / owners)) for i in range(owners - 1)}
    for i in range(L):
        layer = f"gpt_neox.layers.{i}."
        sizes = {"query": D, "dense": D} | ({"key": heads * H, "value": heads * H} if i in own else {})
        for name, size in sizes.items():
            state |= linear(f"{layer}attention.{name}", size, D)
        state |= linear(f"{layer}mlp.dense_h_to_4h", 48, D) | linear(f"{layer}mlp.dense_4h_to_h", D, 48)
        state |= norm(f"{layer}input_layernorm") | norm(f"{layer}post_attention_layernorm")
        state[f"{layer}attention.bias"] = torch.ones(1, 1, 64, 64, dtype=torch.bool)
        state[f"{layer}attention.rotary_emb.inv_freq"] = torch.ones(ROTARY // 2)
    state |= norm("gpt_neox.final_layer_norm")
    folder.mkdir()
    sizes = {"hidden_size": D, "num_attention_heads": N, "num_hidden_layers": L, "intermediate_size": 48}
    fields = {
        "model_type": "gpt_neox_mlkv",
        "rotary_pct": ROTARY / H,
        "vocab_size": VOCAB,
        "max_position_embeddings": 64,
    }
    fields |= {"num_key_value_layers": owners, "num_key_value_heads": heads, "hidden_act": "gelu", "bos_token_id": 1}
    fields |= {
        "use_parallel_residual": True,
        "use_key_value_mlp": False,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(fields | sizes | config))
    if pickle:
        torch.save(state, folder / "pytorch_model.bin")
    else:
        save_file(state, folder / "model.safetensors")
    return folder, state, sorted(own)


def linear(name, out, size):
    return {f"{name}.weight": torch.randn(out, size) * size**-0.5, f"{name}.bias": 0.1 * torch.randn(out)}


def norm(name):
    return {f"{name}.weight": 1 + 0.1 * torch.randn(D), f"{name}.bias": 0.1 * torch.randn(D)}


def published(state, ids, own, heads, *, rotate_readers):
    """GPT-NeoX with parallel residual; head j uses key/value head j // (N / g) of the nearest owner at or below its layer.

    The owner rotates its keys; a reader gets them as they were before rotation (`rotate_readers` mends that), and rotates its
    queries in either case.
    """
    state = {name: tensor.double() for name, tensor in state.items()}

    def apply(x, name):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def layer_norm(x, name):
        return F.layer_norm(x, (D,), state[f"{name}.weight"], state[f"{name}.bias"], 1e-5)

    def rope(x_THh):
        T = x_THh.shape[0]
        angle = torch.arange(T, dtype=torch.float64)[:, None] / 1e4 ** (torch.arange(0, ROTARY, 2).double() / ROTARY)
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        a, b, rest = x_THh[..., : ROTARY // 2], x_THh[..., ROTARY // 2 : ROTARY], x_THh[..., ROTARY:]
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)

    rows = []
    for row in ids:
        x, T = state["gpt_neox.embed_in.weight"][row], len(row)
        for i in range(L):
            layer = f"gpt_neox.layers.{i}."
            h = layer_norm(x, f"{layer}input_layernorm")
            q = rope(apply(h, f"{layer}attention.query").view(T, N, H))
            if i in own:
                raw = apply(h, f"{layer}attention.key").view(T, heads, H)
                v = apply(h, f"{layer}attention.value").view(T, heads, H)
            k = rope(raw) if i in own or rotate_readers else raw
            out = []
            for j in range(N):
                g = j // (N // heads)
                scores = (q[:, j] @ k[:, g].T) * H**-0.5
                scores = scores.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), float("-inf"))
                out.append(scores.softmax(-1) @ v[:, g])
            attention = apply(torch.cat(out, dim=-1), f"{layer}attention.dense")
            mlp = F.gelu(apply(layer_norm(x, f"{layer}post_attention_layernorm"), f"{layer}mlp.dense_h_to_4h"))
            x = x + attention + apply(mlp, f"{layer}mlp.dense_4h_to_h")
        rows.append(layer_norm(x, "gpt_neox.final_layer_norm") @ state["embed_out.weight"].T)
    return torch.stack(rows)


@pytest.mark.parametrize("as_trained", [True, False], ids=["as trained", "rotated"])
@pytest.mark.parametrize(("owners", "heads"), [(6, 2), (3, 4), (2, 1), (1, 1), (4, 2)])
def test_logits_are_those_of_the_published_formula(tmp_path, owners, heads, as_trained):
    folder, state, own = checkpoint(tmp_path / "mlkv", owners, heads)
    plan = import_mlkv(folder, tmp_path / "out", as_trained=as_trained)
    network, ids = load(tmp_path / "out"), tokens(2, 20)
    expected = published(state, ids, own, heads, rotate_readers=not as_trained)
    assert_close(logits(network, ids), expected, tolerance=1e-5)
    cache = FoldedCache(plan)
    with torch.no_grad():
        parts = [network(ids[:, a:b], past_key_values=cache).logits for a, b in ((0, 7), (7, 8), (8, 15), (15, 20))]
    assert_close(torch.cat(parts, 1), expected, tolerance=1e-5)
    assert cache.nbytes_allocated == plan.kv_bytes(20, batch_size=2)
    elements = 2 * owners * heads * H
    assert plan.kv_bytes_per_token() == 4 * elements + (4 if as_trained and owners < L else 0)


def test_rows_with_padding_are_rotated_by_their_own_positions(tmp_path):
    folder, *_ = checkpoint(tmp_path / "mlkv", 2, 2)
    import_mlkv(folder, tmp_path / "out")
    network, ids = load(tmp_path / "out"), tokens(2, 12)
    alone = network.generate(ids[:1, 5:], max_new_tokens=10, do_sample=False)
    mask = torch.ones_like(ids)
    mask[0, :5], ids[0, :5] = 0, 0
    batch = network.generate(ids, attention_mask=mask, max_new_tokens=10, do_sample=False)
    assert torch.equal(batch[0, 5 : 5 + alone.shape[1]], alone[0])
    for options in ({"num_beams": 3}, {"prompt_lookup_num_tokens": 2}):
        one = tokens(1, 6).repeat(1, 2)
        found = network.generate(one, max_new_tokens=12, do_sample=False, **options)
        without = {k: v for k, v in options.items() if k == "num_beams"} | {"use_cache": False}
        assert torch.equal(found, network.generate(one, max_new_tokens=12, do_sample=False, **without))


def test_pickles_only_when_asked_for(tmp_path):
    folder, *_ = checkpoint(tmp_path / "mlkv", 3, 2, pickle=True)
    with pytest.raises(CheckpointError, match="--allow-pickle"):
        import_mlkv(folder, tmp_path / "out")
    import_mlkv(folder, tmp_path / "out", allow_pickle=True)
    assert load(tmp_path / "out").kv_plan.kv_sharing_target_layer == (None, 0, None, 2, None, 4)


def test_pickles_of_the_hub(tmp_path, monkeypatch):
    """Asked for by name where they are allowed."""
    folder, *_ = checkpoint(tmp_path / "source", 3, 2, pickle=True)
    asked = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download",
        lambda model, allow_patterns, **rest: asked.append(allow_patterns) or folder,
    )
    import_mlkv("me/pythia-mlkv", tmp_path / "out", allow_pickle=True)
    with pytest.raises(CheckpointError, match="a pickle"):
        import_mlkv("me/pythia-mlkv", tmp_path / "other")
    assert ["pytorch_model*.bin" in patterns for patterns in asked] == [True, False]


def test_broken_files_are_named(tmp_path):
    folder, *_ = checkpoint(tmp_path / "source", 3, 2)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError):
        import_mlkv(folder, tmp_path / "out")
    other, *_ = checkpoint(tmp_path / "pickled", 3, 2, pickle=True)
    torch.save({"state_dict": {}}, other / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="holds other things"):
        import_mlkv(other, tmp_path / "out", allow_pickle=True)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_key_value_layers": None}, "this is no MLKV checkpoint"),
        ({"num_key_value_heads": 3}, "the first must divide"),
        ({"use_key_value_mlp": True}, "use_key_value_mlp"),
        ({"num_key_value_layers": 2}, "does not hold the tensors that its config asks for"),
        ({"intermediate_size": 40}, "has shape"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0, which is no number above 0"),
        ({"num_attention_heads": "4"}, "num_attention_heads is '4'"),
    ],
    ids=str,
)
def test_other_folders_are_refused(tmp_path, config, message):
    folder, *_ = checkpoint(tmp_path / "mlkv", 3, 2, **config)
    with pytest.raises(CheckpointError, match=message):
        import_mlkv(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_imported_models_train_and_tied_ones_import(tmp_path):
    folder, state, _ = checkpoint(tmp_path / "mlkv", 2, 2, tie_word_embeddings=True)
    state = {name: tensor for name, tensor in state.items() if name != "embed_out.weight"}
    save_file(state, folder / "model.safetensors")
    import_mlkv(folder, tmp_path / "out")
    network, ids = load(tmp_path / "out").train(), tokens(2, 12)
    network(ids, labels=ids).loss.backward()
    assert network.get_submodule("gpt_neox.layers.0.attention.k_proj").weight.grad.abs().sum() > 0

"""Folders as they lie on the hub: old config keys, dead buffers, tied tensors, wrong tokenizer classes, offloading."""

import json

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from tiny import COMMON, load, logits, make_tiny, save_tiny, tokens
from torch.utils._pytree import tree_map

import kvfold
from kvfold.checkpoint.tokenizer import load_tokenizer
from kvfold.compression.recipe import make_recipe
from kvfold.evaluation.demo import MODEL
from kvfold.runtimes.transformers import recent_buffer
from kvfold.runtimes.transformers.cache import FoldedCache
from kvfold.testing import assert_close


def fold(source, out, kv_budget=1.0, method="svd_w"):
    tree = {
        "model": str(source),
        "out": str(out),
        "kv_budget": kv_budget,
        "width": {"method": method},
        "calibration": {"data": "self", "num_samples": 8, "seq_len": 32},
    }
    return kvfold.compress(make_recipe(tree), device="cpu")


def edit_json(file, drop=(), **changes):
    data = {name: value for name, value in json.loads(file.read_text()).items() if name not in drop}
    file.write_text(json.dumps(data | changes))


LEGACY = {
    "theta": {"rope_theta": 5e5},
    "linear": {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}},
    "llama3": {
        "rope_theta": 5e5,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
    "dynamic": {"rope_theta": 1e4, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
}


@pytest.mark.parametrize("rope", LEGACY)
def test_old_config_keys_and_dead_buffers(tmp_path, rope):
    """rope_theta and rope_scaling at the top level, torch_dtype, head_dim absent, bfloat16 beside a float32 inv_freq."""
    source = save_tiny(make_tiny("llama_mha").bfloat16(), tmp_path / "source")
    edit_json(
        source / "config.json", drop=("rope_parameters", "dtype", "head_dim"), torch_dtype="bfloat16", **LEGACY[rope]
    )
    tensors = load_file(source / "model.safetensors")
    for i in range(3):
        tensors[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    folded = fold(source, tmp_path / "out")
    assert folded.plan.dtype == "bfloat16"
    stock = tf.LlamaForCausalLM.from_pretrained(source, dtype=torch.float32)
    expected = logits(stock, tokens(length=60))
    # weights were rounded to bfloat16 twice
    assert_close(logits(load(folded.out, dtype=torch.float32), tokens(length=60)), expected, tolerance=3e-2)
    assert not [n for n in load_file(folded.out / "model.safetensors") if "inv_freq" in n]


@pytest.mark.parametrize("stored", [["lm_head.weight"], ["lm_head.weight", "model.embed_tokens.weight"]], ids=len)
def test_tied_embeddings_under_either_name(tmp_path, stored):
    """Usually only the embedding is stored; some folders hold the head, or both."""
    model = make_tiny("qwen2_bias_tied")
    source = save_tiny(model, tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    embedding = tensors.pop("model.embed_tokens.weight")
    tensors |= {name: embedding.clone() for name in stored}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    folded = fold(source, tmp_path / "out", method="svd_a")
    assert_close(logits(load(folded.out), tokens()), logits(model, tokens()))
    names = load_file(folded.out / "model.safetensors")
    assert [n for n in sorted(names) if n in ("lm_head.weight", "model.embed_tokens.weight")] == stored


@pytest.mark.parametrize("config_class", [tf.Qwen2Config, tf.Qwen3Config])
def test_a_window_that_is_switched_off(tmp_path, config_class):
    """As in Qwen2.5 on the hub: sliding_window is given, use_sliding_window is false."""
    config = config_class(**COMMON, sliding_window=5, use_sliding_window=False, max_window_layers=2)
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config).eval()
    source = save_tiny(model, tmp_path / "source")
    edit_json(source / "config.json", drop=("layer_types",), sliding_window=5, use_sliding_window=False)
    folded = fold(source, tmp_path / "out")
    assert {spec.window for spec in folded.plan.owned} == {None}
    assert_close(logits(load(folded.out), tokens()), logits(model, tokens()))


def test_mistral_without_a_window(tmp_path):
    model = make_tiny("mistral_window", sliding_window=None)
    folded = fold(save_tiny(model, tmp_path / "source"), tmp_path / "out")
    assert_close(logits(load(folded.out), tokens()), logits(model, tokens()))


def test_the_tokenizer_stays_the_one_that_the_source_gets(tmp_path):
    """AutoTokenizer corrects a wrong class by model type (here mistral's); the folded type must not undo that."""
    source = save_tiny(make_tiny("mistral_window"), tmp_path / "source")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).write_text((MODEL / name).read_text())
    edit_json(source / "tokenizer_config.json", tokenizer_class="LlamaTokenizer")
    folded = fold(source, tmp_path / "out")
    text = "The old man looked at the sea, and said nothing."
    before, after = load_tokenizer(source), load_tokenizer(folded.out)
    assert type(before) is type(after)
    assert before(text)["input_ids"] == after(text)["input_ids"] == load_tokenizer(MODEL)(text)["input_ids"]


def test_side_files_are_copied_and_others_are_not(tmp_path):
    source = save_tiny(make_tiny("llama_mha"), tmp_path / "source")
    for name in ("chat_template.jinja", "LICENSE", "trainer_state.json", "pytorch_model.bin.index.json", "README.md"):
        (source / name).write_text("{}")
    names = {file.name for file in fold(source, tmp_path / "out").out.iterdir()}
    assert {"chat_template.jinja", "LICENSE"} <= names
    assert not {"trainer_state.json", "pytorch_model.bin.index.json"} & names
    assert (tmp_path / "out" / "README.md").read_text() != "{}"


def test_weights_on_disk_and_in_memory_at_once(tmp_path):
    """device_map with offloaded layers, as accelerate does where a GPU is too small."""
    source = save_tiny(make_tiny("llama_mha"), tmp_path / "source")
    out = fold(source, tmp_path / "out", kv_budget=0.5).out
    expected = load(out)
    devices = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    devices |= {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}
    spread = load(out, device_map=devices, offload_folder=str(tmp_path / "offload"))
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(spread.generate(tokens(), **options), expected.generate(tokens(), **options))


def test_layers_on_two_devices(tmp_path, monkeypatch):
    """As accelerate spreads a model over GPUs: each layer's arguments come to its device. The second one is imitated by one
    without numbers, which refuses what lies elsewhere as a GPU does."""
    source = save_tiny(make_tiny("llama_yarn"), tmp_path / "source")
    recipe = {"preset": "auto", "kv_budget": 0.25, "calibration": {"data": "self", "num_samples": 8, "seq_len": 128}}
    folded = kvfold.compress(recipe | {"model": str(source), "out": str(tmp_path / "out")}, device="cpu")
    network = load(folded.out)
    monkeypatch.setattr(recent_buffer, "stores_in_place", lambda *args: False)  # which a CPU alone does
    for module in (*network.model.layers[1:], network.model.norm, network.lm_head):
        module.to("meta").register_forward_pre_hook(to_meta, with_kwargs=True)
    cache = FoldedCache(folded.plan)
    with torch.no_grad():
        for ids in (tokens(2, 140), tokens(2, 1), tokens(2, 20)):
            assert network(ids, past_key_values=cache).logits.is_meta
        assert network(tokens(2, 40)).logits.is_meta


def to_meta(module, *given):
    """Arguments and keyword arguments of a layer."""
    return tree_map(lambda x: x.to("meta") if isinstance(x, torch.Tensor) else x, given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_token_with_gradients(tmp_path, dtype):
    source = save_tiny(make_tiny("llama_mha"), tmp_path / "source")
    network = load(fold(source, tmp_path / "out", kv_budget=0.5).out, dtype=dtype)
    network(tokens(2, 1)).logits.sum().backward()
    assert all(p.grad is not None for p in network.parameters())


def test_short_steps_equal_long_ones(tmp_path):
    """Chunks below and above FEW_TOKENS take different ways through attention."""
    source = save_tiny(make_tiny("llama_yarn"), tmp_path / "source")
    folded = fold(source, tmp_path / "out", kv_budget=0.5)
    network, ids = load(folded.out), tokens(2, 60)
    expected, cache, start, out = logits(network, ids), FoldedCache(folded.plan), 0, []
    for length in (5, 16, 17, 2, 20):
        with torch.no_grad():
            out.append(network(ids[:, start : start + length], past_key_values=cache).logits)
        start += length
    assert_close(torch.cat(out, 1), expected)


@pytest.mark.parametrize("model", ["llama_mha", "qwen2_bias_tied"])
@pytest.mark.parametrize("method", ["svd_w", "svd_a"])
def test_a_rotary_field_that_the_family_ignores(tmp_path, model, method):
    """What is rotated is what the family's tables rotate."""
    partial = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    source = save_tiny(make_tiny(model, rope_parameters=partial), tmp_path / "source")
    folded = fold(source, tmp_path / "out", method=method)
    assert_close(logits(load(folded.out), tokens()), logits(load(source), tokens()))


@pytest.mark.parametrize("form", ["identity", "svd_a"])
def test_longrope_across_its_switch(tmp_path, form):
    """Every step is that of the whole sequence, with padding too; transformers' own goes on with the last token alone."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 4,
        "long_factor": [3.0, 2.0, 4.0, 5.0],
    }
    lengths = {"original_max_position_embeddings": 32, "max_position_embeddings": 128}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}
    rope |= {"original_max_position_embeddings": 32, "partial_rotary_factor": 1.0}
    changes = heads | {"rope_parameters": rope}
    source = save_tiny(make_tiny("phi3_partial", **changes, **lengths), tmp_path / "source")
    network, ids = load(fold(source, tmp_path / "out", method=form).out), tokens(2, 28)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "output_logits": True}
    said = network.generate(ids, attention_mask=mask, return_dict_in_generate=True, **options)
    mask = torch.nn.functional.pad(mask, (0, 12), value=1)
    for step in range(12):
        seen, at = said.sequences[:, : 28 + step], (mask[:, : 28 + step].cumsum(1) - 1).clamp_min(0)
        with torch.no_grad():
            whole = network(seen, attention_mask=mask[:, : 28 + step], position_ids=at, use_cache=False).logits[:, -1]
        assert_close(said.logits[step], whole, tolerance=1e-4, name=f"{28 + step} tokens")


def test_a_foreign_cache_of_a_packed_model_is_named(tmp_path):
    """Its tokens are those of kvfold's own, its bytes are not."""
    source = save_tiny(make_tiny("llama_mha"), tmp_path / "source")
    tree = {"model": str(source), "out": str(tmp_path / "out"), "preset": "int4"}
    network = load(kvfold.compress(make_recipe(tree), device="cpu").out)
    ids, options = tokens(1, 20), {"max_new_tokens": 8, "do_sample": False}
    own = network.generate(ids, **options)
    with pytest.warns(UserWarning, match="a DynamicCache keeps its numbers as they are, at full size"):
        found = network.generate(ids, past_key_values=tf.DynamicCache(config=network.config), **options)
    assert torch.equal(found, own)


def test_a_cache_with_room_for_tokens_to_come_is_refused(tmp_path):
    """Its empty places would be seen as tokens."""
    network = load(fold(save_tiny(make_tiny("llama_mha"), tmp_path / "source"), tmp_path / "out").out)
    with pytest.raises(ValueError, match="a StaticCache shows a folded model places of tokens that are not there yet"):
        network.generate(tokens(1, 12), past_key_values=tf.StaticCache(network.config, 64), max_new_tokens=4)

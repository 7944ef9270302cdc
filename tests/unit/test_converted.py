"""Checkpoints that are no plain folder of safetensors: pickles, adapters, names that tools left, shards in folders."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import load, logits, make_tiny, save_tiny, tokens
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

import kvfold
from kvfold.checkpoint.converted import converted
from kvfold.compression.recipe import make_recipe
from kvfold.errors import CheckpointError


def fold(source, out, **options):
    recipe = make_recipe({"model": str(source), "out": str(out), "width": {"method": "identity"}})
    kvfold.compress(recipe, device="cpu", **options)
    return out


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return save_tiny(make_tiny("qwen2_bias_tied"), tmp_path_factory.mktemp("original"))


def as_pickles(original, folder, parts):
    """The same model as pytorch_model.bin, or several with an index."""
    folder.mkdir()
    (folder / "config.json").write_bytes((original / "config.json").read_bytes())
    tensors = load_file(original / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    files = [f"pytorch_model-{i}.bin" for i in range(parts)] if parts > 1 else ["pytorch_model.bin"]
    of = {name: files[i % parts] for i, name in enumerate(sorted(tensors))}
    for file in files:
        torch.save({name: tensors[name] for name in tensors if of[name] == file}, folder / file)
    if parts > 1:
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": of}))
    return folder


@pytest.mark.parametrize("parts", [1, 3])
def test_pickles_are_read_where_they_are_allowed(original, tmp_path, parts):
    source = as_pickles(original, tmp_path / "source", parts)
    with pytest.raises(CheckpointError, match="--allow-pickle"):
        fold(source, tmp_path / "out")
    out = fold(source, tmp_path / "out", allow_pickle=True)
    assert torch.equal(logits(load(out), tokens()), logits(load(original), tokens()))
    (folder,) = (tmp_path / "out.run").glob("unpickled-*")
    assert converted(source, tmp_path / "out.run", allow_pickle=True) == folder


def test_pickles_of_old(original, tmp_path):
    """As torch wrote them before 1.6, which are no zip files."""
    source = as_pickles(original, tmp_path / "source", 1)
    state = torch.load(source / "pytorch_model.bin", weights_only=True)
    torch.save(state, source / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    out = fold(source, tmp_path / "out", allow_pickle=True)
    assert torch.equal(logits(load(out), tokens()), logits(load(original), tokens()))


class Harmful:
    def __reduce__(self):
        return print, ("harm",)


def test_pickles_run_no_code(original, tmp_path, capsys):
    source = as_pickles(original, tmp_path / "source", 1)
    for content in (pickle.dumps({"x": Harmful()}), b"no pickle"):
        (source / "pytorch_model.bin").write_bytes(content)
        with pytest.raises(CheckpointError, match="without running code"):
            fold(source, tmp_path / "out", allow_pickle=True)
    torch.save({"model": {"x": torch.ones(2)}}, source / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="holds other things than named tensors"):
        fold(source, tmp_path / "out", allow_pickle=True)
    assert "harm" not in capsys.readouterr().out and not (tmp_path / "out").exists()


def test_an_adapter_is_merged_into_its_base(original, tmp_path):
    base = tf.AutoModelForCausalLM.from_pretrained(original)
    torch.manual_seed(0)
    adapted = get_peft_model(
        base, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"], init_lora_weights=False)
    )
    adapted.save_pretrained(tmp_path / "adapter")
    expected = logits(adapted.merge_and_unload(), tokens())
    assert not torch.allclose(expected, logits(load(original), tokens()), atol=1e-2)
    found = logits(load(fold(tmp_path / "adapter", tmp_path / "out")), tokens())
    assert torch.allclose(found, expected, atol=1e-5)
    base = save_tiny(make_tiny("qwen2_bias_tied"), tmp_path / "base")
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": str(base)}))
    first = converted(str(tmp_path / "adapter"), tmp_path / "run", allow_pickle=False)
    tensors = {name: tensor * 1.5 for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    assert converted(str(tmp_path / "adapter"), tmp_path / "run", allow_pickle=False) != first  # of another base
    config.write_text(
        json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": str(tmp_path / "nothing")})
    )
    with pytest.raises(CheckpointError, match="is an adapter of .*nothing"):
        fold(tmp_path / "adapter", tmp_path / "other")


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "module._orig_mod.", "base"])
def test_names_that_tools_left(original, tmp_path, wrapper):
    """What distributed training and torch.compile put before them, and a base model that was saved alone."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_bytes((original / "config.json").read_bytes())
    tensors = load_file(original / "model.safetensors")
    renamed = {n.removeprefix("model.") if wrapper == "base" else wrapper + n: t for n, t in tensors.items()}
    save_file(renamed, source / "model.safetensors", {"format": "pt"})
    out = fold(source, tmp_path / "out")
    assert torch.equal(logits(load(out), tokens()), logits(load(original), tokens()))


def test_a_base_model_without_a_head_is_refused(tmp_path):
    model = make_tiny("llama_mha")
    model.model.save_pretrained(tmp_path / "source")
    with pytest.raises(CheckpointError, match=r"lm_head.weight.*without its head predicts nothing"):
        fold(tmp_path / "source", tmp_path / "out")


@pytest.mark.parametrize("decoy", [False, True])
def test_shards_in_a_sub_folder(original, tmp_path, decoy):
    """Numbers come from the file of which the header was read, whatever lies beside it."""
    source = tmp_path / "source"
    (source / "sub").mkdir(parents=True)
    (source / "config.json").write_bytes((original / "config.json").read_bytes())
    tensors = load_file(original / "model.safetensors")
    save_file(tensors, source / "sub" / "w.safetensors", {"format": "pt"})
    if decoy:
        save_file({n: torch.zeros_like(t) for n, t in tensors.items()}, source / "w.safetensors", {"format": "pt"})
    index = source / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(tensors, "sub/w.safetensors")}))
    out = fold(source, tmp_path / "out")
    assert torch.equal(logits(load(out), tokens()), logits(load(original), tokens()))
    for wrong in ("../outside.safetensors", "/etc/outside.safetensors", "sub/../../outside.safetensors", 3, None, ""):
        index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, wrong)}))
        with pytest.raises(CheckpointError, match="no file of its folder"):
            fold(source, tmp_path / "other")


@pytest.mark.parametrize("model", ["qwen2_bias_tied", "neox_partial", "opt_learned", "gemma3_norm"])
def test_a_tokenizer_of_one_file_goes_along(tmp_path, model):
    """Without tokenizer_config.json the class follows from the model type, which the folded model no longer has."""
    source = save_tiny(make_tiny(model), tmp_path / "source")
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=True), decoders.ByteLevel()
    special, alphabet = ["<pad>", "<s>", "</s>", "<unk>"], pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    made.train_from_iterator(["the quick brown fox jumps over lazy dogs"] * 50, trainer)
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made.save(str(source / "tokenizer.json"))
    out = fold(source, tmp_path / "out")
    before, after = (tf.AutoTokenizer.from_pretrained(path) for path in (source, out))
    assert type(before) is type(after)
    for text in ("the quick brown Fox", " jumps", "日本 dogs\n"):
        assert before(text)["input_ids"] == after(text)["input_ids"]


def test_an_index_that_names_no_files(original, tmp_path):
    source = as_pickles(original, tmp_path / "source", 2)
    file = source / "pytorch_model.bin.index.json"
    missing = r"lacks the weight file missing\.bin that pytorch_model\.bin\.index\.json names"
    no_file = r"pytorch_model\.bin\.index\.json names 1 things that are no file of its folder"
    for weight_map, said in (([1, 2], no_file), ({"x": "missing.bin"}, missing), ({"x": 3}, no_file)):
        file.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(CheckpointError, match=said):
            fold(source, tmp_path / "out", allow_pickle=True)

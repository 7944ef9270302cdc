"""GGUF files as input: the same numbers, one dequantization, and an error for everything that cannot be read."""

import json
import shutil
import sys

import gguf
import pytest
import torch
import yaml
from gguf import GGMLQuantizationType as Quantization
from gguf import GGUFWriter, RopeScalingType
from tiny import load, logits, make_tiny, tokens
from transformers import AutoTokenizer

import kvfold
from kvfold.checkpoint import folder as output
from kvfold.checkpoint.converted import converted
from kvfold.checkpoint.reader import Checkpoint
from kvfold.checkpoint.source import load_plan
from kvfold.errors import CheckpointError
from kvfold.testing import assert_close

BYTES = [chr(c) for c in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))]
"""The byte-level alphabet: all 256 bytes as printable characters."""

VOCAB = [*BYTES, "ab", "abc", "<|end|>", "<|pad|>"]
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@pytest.fixture(scope="module")
def original():
    return make_tiny("llama_mha", num_key_value_heads=4, vocab_size=len(VOCAB), head_dim=8, rms_norm_eps=1e-6)


def write(model, file, *, quantization=Quantization.F32, arch="llama", extra=()):
    """A GGUF file as llama.cpp's converter would write it; `extra`: calls of more of the writer's methods."""
    writer, config = GGUFWriter(file, arch), model.config
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(VOCAB)
    writer.add_token_types([1] * (len(VOCAB) - 2) + [3, 3])
    writer.add_token_merges(["a b", "ab c"])
    writer.add_bos_token_id(len(VOCAB) - 2)
    writer.add_eos_token_id(len(VOCAB) - 2)
    writer.add_pad_token_id(len(VOCAB) - 1)
    writer.add_chat_template(TEMPLATE)
    for method, *arguments in extra:
        getattr(writer, method)(*arguments)
    for name, tensor in model.state_dict().items():
        _add(writer, config, name, tensor, quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _add(writer, config, name, tensor, quantization):
    new = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers).get_name(name, (".weight",))
    if "attn_q." in new or "attn_k." in new:  # llama.cpp turns neighbours, not halves
        heads = config.num_attention_heads if "attn_q." in new else config.num_key_value_heads
        tensor = tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
    kind = quantization if tensor.ndim > 1 else Quantization.F32
    writer.add_tensor(new, gguf.quantize(tensor.contiguous().numpy(), kind), raw_dtype=kind)


def test_unquantized_numbers_stay_as_they_are(original, tmp_path):
    folder = converted(write(original, tmp_path / "m.gguf"), tmp_path / "run")
    loaded = load(folder)
    assert loaded.dtype == torch.float32 and type(loaded) is type(original)
    assert all(torch.equal(t, original.state_dict()[name]) for name, t in loaded.state_dict().items())
    assert torch.equal(logits(loaded, tokens()), logits(original, tokens()))


def test_quantized_numbers_become_bfloat16(original, tmp_path):
    folder = converted(write(original, tmp_path / "m.gguf", quantization=Quantization.Q8_0), tmp_path / "run")
    loaded = load(folder)
    expected = original.state_dict()["model.layers.1.mlp.up_proj.weight"].numpy()
    expected = torch.from_numpy(gguf.dequantize(gguf.quantize(expected, Quantization.Q8_0), Quantization.Q8_0))
    assert torch.equal(loaded.state_dict()["model.layers.1.mlp.up_proj.weight"], expected.to(torch.bfloat16))
    assert load_plan(folder)[0].dtype == "bfloat16"


def test_the_folder_is_an_ordinary_one(original, tmp_path):
    """Tokenizer and chat template are in it; nothing says that it was quantized, or where it came from."""
    folder = converted(write(original, tmp_path / "m.gguf"), tmp_path / "run")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("abcab\n")["input_ids"] == [VOCAB.index(token) for token in ("abc", "ab", "Ċ")]
    assert tokenizer.chat_template == TEMPLATE and tokenizer.eos_token == "<|end|>"
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["eos_token_id"] == len(VOCAB) - 2
    assert "quantization_config" not in config and str(tmp_path) not in (folder / "config.json").read_text()


def test_tied_embeddings_are_stored_once(tmp_path):
    tied = make_tiny("llama_mha", num_key_value_heads=4, vocab_size=len(VOCAB), head_dim=8, tie_word_embeddings=True)
    file = tmp_path / "m.gguf"
    state = {name: tensor for name, tensor in tied.state_dict().items() if name != "lm_head.weight"}
    tied.state_dict = lambda: state
    folder = converted(write(tied, file), tmp_path / "run")
    assert "lm_head.weight" not in Checkpoint.open(folder).tensors
    assert torch.equal(logits(load(folder), tokens()), logits(tied, tokens()))


def test_compress_folds_it_and_the_second_run_reuses_what_the_first_made(original, tmp_path, capfd, monkeypatch):
    file = write(original, tmp_path / "m.gguf")
    recipe = {"model": str(file), "preset": "int8", "out": str(tmp_path / "out"), "kv_budget": None}
    made = kvfold.compress(recipe, device="cpu")
    folder = next((tmp_path / "out.run").glob("dequantized-*"))
    assert f"{file} is being dequantized into {folder}\n" in capfd.readouterr().err
    assert yaml.safe_load((made.out / "recipe.yaml").read_text())["model"] == str(file)
    assert_close(logits(load(made.out), tokens()), logits(original, tokens()), tolerance=0.02)
    monkeypatch.setattr("kvfold.checkpoint.gguf.dequantize", None)
    kvfold.compress(recipe, device="cpu", overwrite=True)
    assert f"was dequantized before: {folder}\n" in capfd.readouterr().err
    assert len(list((tmp_path / "out.run").glob("dequantized-*"))) == 1


def test_a_folder_that_holds_one_file_stands_for_it(original, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    write(original, source / "m.gguf")
    folder = converted(source, tmp_path / "run")
    assert folder == converted(source / "m.gguf", tmp_path / "run")
    shutil.copy(source / "m.gguf", source / "other.gguf")
    with pytest.raises(CheckpointError, match=r"holds 2 GGUF files: m\.gguf, other\.gguf\. Give one of them"):
        converted(source, tmp_path / "run")
    assert converted(folder, tmp_path / "run") == folder


def test_an_interrupted_run_leaves_nothing_that_looks_finished(original, tmp_path, monkeypatch):
    file = write(original, tmp_path / "m.gguf")
    with monkeypatch.context() as broken:
        broken.setattr(output, "write_tensors", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            converted(file, tmp_path / "run")
    assert [path.suffix for path in (tmp_path / "run").iterdir()] == [".partial"]
    assert load(converted(file, tmp_path / "run")) is not None
    assert [path.suffix for path in (tmp_path / "run").iterdir()] == [""]


@pytest.mark.parametrize("arch", ["falcon", "gptneox"])  # transformers reads the first, not the second
def test_other_architectures_are_refused_with_the_list(original, tmp_path, arch):
    file = write(original, tmp_path / "m.gguf", arch=arch)
    with pytest.raises(CheckpointError, match=f"architecture '{arch}'.*bloom, gemma2, gemma3, gpt2, llama"):
        converted(file, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (("add_rope_scaling_type", RopeScalingType.YARN), "a yarn scaling of rotary positions"),
        (("add_tensor", "rope_freqs.weight", torch.ones(4).numpy()), r"\+4 of those of the model"),
        (("add_tensor", "blk.0.attn_q.bias", torch.ones(64).numpy()), r"\+64 of those"),
    ],
    ids=["yarn", "llama3", "bias"],
)
def test_what_the_reader_would_leave_out_is_an_error(original, tmp_path, extra, message):
    """Otherwise a model that turns differently, or has lost its biases, would be folded without a word."""
    with pytest.raises(CheckpointError, match=f"{message}.*does not carry over"):
        converted(write(original, tmp_path / "m.gguf", extra=[extra]), tmp_path / "run")


def test_damaged_files_and_parts(original, tmp_path):
    file = write(original, tmp_path / "m.gguf", extra=[("add_uint16", "split.count", 3)])
    with pytest.raises(CheckpointError, match=r"one of 3 parts; join them first"):
        converted(file, tmp_path / "run")
    (tmp_path / "cut.gguf").write_bytes(file.read_bytes()[:100_000])
    (tmp_path / "text.gguf").write_text("no model at all, but long enough to hold a header")
    for name in ("cut.gguf", "text.gguf"):
        with pytest.raises(CheckpointError, match="not a GGUF file or is cut off"):
            converted(tmp_path / name, tmp_path / "run")


def test_without_the_package(original, tmp_path, monkeypatch):
    file = write(original, tmp_path / "m.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(CheckpointError, match=r"pip install 'kvfold\[gguf\]'"):
        converted(file, tmp_path / "run")


def test_other_commands_say_what_to_do(original, tmp_path):
    file = write(original, tmp_path / "m.gguf")
    for model in (file, tmp_path):
        with pytest.raises(CheckpointError, match="only `kvfold compress` reads"):
            kvfold.inspect(model)

"""Everything a user can get wrong: an error that says what was found and what to do, and no folder that looks finished."""

import errno
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from short_runs import CALIBRATION, compress, copy_tokenizer, digests

import kvfold
from kvfold.checkpoint import atomic as storage
from kvfold.compression import fold as fold_module
from kvfold.compression.recipe import make_recipe
from kvfold.errors import BudgetError, CheckpointError, DataError, KvfoldError, OutputError, RecipeError


def refused(source, error, message, **options):
    out = source.parent / "out"
    with pytest.raises(error, match=message):
        compress(source, out, **options)
    assert not out.exists()
    assert not (source.parent / "out.partial" / "config.json").exists()


def edit_config(source, **changes):
    config = json.loads((source / "config.json").read_text()) | changes
    (source / "config.json").write_text(json.dumps(config))


def test_unknown_model_type(source):
    edit_config(source, model_type="lama")
    refused(source, CheckpointError, "model_type 'lama' are not folded.*mistral.*add_an_architecture.md")


def test_folded_already(fold, tmp_path):
    folder = shutil.copytree(fold("llama_mha", "svd_a", kv_budget=0.5).out, tmp_path / "source")
    refused(folder, CheckpointError, "folded already")


def test_query_heads_not_divisible(source):
    edit_config(source, num_key_value_heads=3)
    refused(source, CheckpointError, "8 query heads are not divisible by 3 key/value heads")


def test_kv_heads_not_divisible(source):
    with pytest.raises(RecipeError, match=r"kv_heads = 3 does not divide the 8 .* choose one of \[1, 2, 4, 8\]"):
        kvfold.compress(
            make_recipe(
                {
                    "model": str(source),
                    "out": str(source.parent / "out"),
                    "width": {"method": "mean_pool", "kv_heads": 3},
                }
            )
        )


def test_budget_out_of_reach(source):
    refused(source, BudgetError, "0.05 is out of reach: the smallest cache of this method keeps 0.125", kv_budget=0.05)


def test_missing_shard(source):
    next(source.glob("*-00002-*.safetensors")).unlink()
    refused(source, CheckpointError, "lacks the weight file model-00002-.*download it again")


def test_truncated_shard(source):
    shard = next(source.glob("*-00002-*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-100])
    refused(source, CheckpointError, "model-00002.* bytes where its header promises .*download it again")


@pytest.mark.parametrize("content", [b"", b"\x00" * 50, b"\xff" * 50, b"<!doctype html>" * 10], ids=str)
def test_foreign_shard(source, content):
    next(source.glob("*-00002-*.safetensors")).write_bytes(content)
    refused(source, CheckpointError, "model-00002.*(is not a safetensors file or is cut off|header promises)")


def test_missing_tensor(source):
    shard = next(source.glob("*-00002-*.safetensors"))
    tensors = load_file(shard)
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, shard)
    refused(source, CheckpointError, "names 1 tensors that their shards do not hold")


def test_config_of_another_model(source):
    edit_config(source, num_hidden_layers=4)
    refused(source, CheckpointError, "lacks .* tensors of a llama model, for example model.layers.3")
    edit_config(source, num_hidden_layers=2)
    refused(source, CheckpointError, "tensors that a llama model does not have, for example model.layers.2")


@pytest.mark.parametrize("method", ["svd_w", "svd_a"])
@pytest.mark.parametrize("name", ["model.layers.1.self_attn.v_proj.weight", "model.layers.2.mlp.up_proj.weight"])
def test_nan_in_weights(source, method, name):
    index = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
    tensors = load_file(source / index[name])
    tensors[name][3, 5] = torch.nan
    save_file(tensors, source / index[name])
    # `self` would run the damaged model; calibrate on fixed text instead
    text = source.parent / "text.txt"
    text.write_text("word " * 5000)
    copy_tokenizer(source)
    calibration = CALIBRATION | {"data": str(text)}
    refused(source, CheckpointError, f"{name}' holds 1 NaN", method=method, calibration=calibration)


def test_no_safetensors(source):
    for file in source.glob("*.safetensors*"):
        file.unlink()
    (source / "pytorch_model.bin").write_bytes(b"x")
    refused(
        source, CheckpointError, "neither model.safetensors nor .*pytorch_model.bin: kvfold compress --allow-pickle"
    )


def test_quantized(source):
    edit_config(source, quantization_config={"quant_method": "hqq"})
    refused(source, CheckpointError, "hqq-quantized")


def test_broken_or_missing_config(source):
    (source / "config.json").write_text("{")
    refused(source, CheckpointError, "config.json is not valid JSON")
    (source / "config.json").unlink()
    refused(source, CheckpointError, "has no config.json")


@pytest.mark.parametrize(
    "changes",
    [{"hidden_size": 65}, {"hidden_size": "64"}, {"rope_parameters": {"rope_type": "warp", "rope_theta": 1e4}}],
    ids=str,
)
def test_config_that_makes_no_model(source, changes):
    edit_config(source, **changes)
    refused(
        source, CheckpointError, "config.json (does not describe|describes)|that config.json describes|was expected"
    )


def test_adapter_beside_the_model(source):
    (source / "adapter_config.json").write_text("{}")
    refused(source, CheckpointError, "PEFT adapter beside the model; merge it first")


def test_device_that_is_not_there(source):
    with pytest.raises(RecipeError, match="--device cuda:7 cannot be used"):
        kvfold.load(source, device="cuda:7")


def test_numbers_that_do_not_fit_half_precision(source):
    """A low-rank basis adds up columns: float16 weights near the type's limit overflow."""
    for shard in source.glob("*.safetensors"):
        halves = {n: t.half() for n, t in load_file(shard).items()}
        save_file({n: torch.full_like(t, 60000.0) if "v_proj" in n else t for n, t in halves.items()}, shard)
    refused(source, CheckpointError, "is not finite after folding: its numbers do not fit into torch.float16")


def test_not_a_folder(tmp_path):
    refused(tmp_path / "nothing", CheckpointError, "is not a folder")


def test_unsupported_dtype(source):
    for shard in source.glob("*.safetensors"):
        save_file({n: t.to(torch.float8_e4m3fn) for n, t in load_file(shard).items()}, shard)
    refused(source, CheckpointError, "stored as .*F8_E4M3")


def test_tokenizer_missing(source):
    text = source.parent / "text.txt"
    text.write_text("word " * 5000)
    message = "has no tokenizer.*Copy tokenizer.json"
    refused(source, CheckpointError, message, method="svd_a", calibration=CALIBRATION | {"data": str(text)})


def test_calibration_text(source):
    copy_tokenizer(source)
    text = source.parent / "text.txt"
    text.write_text("word " * 31)
    calibration = CALIBRATION | {"data": str(text)}
    refused(source, DataError, "31 tokens, fewer than one sequence of 32", method="svd_a", calibration=calibration)
    refused(source, DataError, "does not exist", method="svd_a", calibration=CALIBRATION | {"data": "./none.txt"})
    refused(source, DataError, "needs calibration text", method="svd_a", calibration={})
    table = source.parent / "rows.jsonl"
    table.write_text('{"body": "word"}\n')
    calibration = CALIBRATION | {"data": str(table)}
    refused(source, DataError, r"fields \['body'\], no 'text'", method="svd_a", calibration=calibration)
    text.write_text("word " * 70)
    with pytest.warns(UserWarning, match="holds only 2 sequences of 32 tokens; 4 were asked for"):
        compress(source, source.parent / "fine", method="svd_a", calibration=CALIBRATION | {"data": str(text)})


def test_existing_output(source):
    out = source.parent / "out"
    out.mkdir()
    (out / "precious").write_text("x")
    with pytest.raises(OutputError, match=r"exists already.*--overwrite"):
        compress(source, out)
    assert (out / "precious").exists()
    with pytest.raises(OutputError, match="was not written by kvfold, so --overwrite does not replace it"):
        compress(source, out, overwrite=True)
    assert (out / "precious").exists()
    (out / "precious").unlink()
    compress(source, out, overwrite=True)
    compress(source, out, overwrite=True, kv_budget=0.25)
    assert kvfold.inspect(out).plan.kv_budget == 0.25
    for place in (source, source.parent):
        with pytest.raises(OutputError, match="is or holds .*, which is needed"):
            compress(source, place, overwrite=True)
    with pytest.raises(OutputError, match="is or holds .*, which is needed"):
        compress(source, source.parent / "new", run_dir=source.parent / "new" / "run")


def test_output_that_cannot_be_made(source):
    (source.parent / "file").write_text("x")
    with pytest.raises(OutputError, match="cannot be made"):
        compress(source, source.parent / "file" / "out")


def test_a_disk_that_is_too_small_is_noticed_before(source, monkeypatch):
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 90, 10))
    refused(source, OutputError, "MB free and what is to be written takes")


def test_a_disk_that_fills_up(source, monkeypatch):
    """The error names the remedy; with space again the same command finishes, with the same bytes."""
    monkeypatch.setattr(fold_module, "MAX_SHARD_BYTES", 60_000)
    expected = digests(compress(source, source.parent / "expected").out)
    save = storage.save_file
    for allowed in (0, 2):
        left = [allowed]

        def full(*args, left=left, **kwargs):
            if not left[0]:
                raise OSError(errno.ENOSPC, "No space left on device")
            left[0] -= 1
            save(*args, **kwargs)

        monkeypatch.setattr(storage, "save_file", full)
        refused(source, OutputError, "disk is full while writing .*run the same command again")
        assert not list((source.parent / "out.partial").glob("*.unfinished"))
    monkeypatch.setattr(storage, "save_file", save)
    assert digests(compress(source, source.parent / "out").out) == expected


def test_an_incomplete_folded_folder_is_not_loaded(fold, tmp_path):
    from tiny import load

    folder = shutil.copytree(fold("llama_mha", "svd_a", kv_budget=0.5).out, tmp_path / "folded")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.self_attn.k_b_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"missing_keys.*k_b_proj"):
        load(folder)


def test_all_errors_are_value_errors():
    assert all(issubclass(e, KvfoldError) for e in (BudgetError, CheckpointError, DataError, OutputError, RecipeError))
    assert issubclass(KvfoldError, ValueError)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"preset": "svd_a"}, "say how much to keep"),
        ({"preset": "xkv"}, "say how much to keep"),
        ({"preset": "procrustes", "width": {"kv_heads": 5}}, "does not divide 8"),
        ({"preset": "procrustes", "depth": {"method": "cla", "factor": 2}, "kv_budget": 0.5}, "does not span layers"),
        ({"preset": "svd_a", "kv_budget": 0.001}, "out of reach"),
        ({"depth": {"method": "dissimilar"}}, "needs depth.owners"),
        ({"depth": {"method": "explicit"}}, "needs depth.uses"),
        ({"preset": "mlkv", "depth": {"owners": 9}}, "the model has 3 layers"),
    ],
    ids=str,
)
def test_requests_that_cannot_be_are_refused_before_calibration(tiny_dir, tmp_path, monkeypatch, fields, message):
    monkeypatch.setattr(
        "kvfold.calibration.material.calibrate", lambda *args, **kwargs: pytest.fail("calibrated first")
    )
    recipe = {
        "model": str(tiny_dir / "llama_mha"),
        "out": str(tmp_path / "out"),
        "calibration": {"data": "self"},
    } | fields
    with pytest.raises(KvfoldError, match=message):
        kvfold.compress(recipe, device="cpu")


def test_widening_what_has_no_width_is_refused_before_calibration(tiny_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "kvfold.calibration.material.calibrate", lambda *args, **kwargs: pytest.fail("calibrated first")
    )
    recipe = {"model": str(tiny_dir / "bloom_alibi"), "out": str(tmp_path / "out"), "calibration": {"data": "self"}}
    with pytest.raises(RecipeError, match="has no width of its own to enlarge"):
        kvfold.compress(recipe | {"preset": "svd_a", "kv_budget": 0.5, "keep_parameters": True}, device="cpu")

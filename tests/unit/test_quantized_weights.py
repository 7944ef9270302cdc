"""Checkpoints with quantized weights: attention is folded from what the codes mean, all else is copied as it lies."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from short_runs import copy_tokenizer
from tiny import load, logits, make_tiny, tokens

import kvfold
from kvfold.checkpoint.quantized import AWQ_ORDER
from kvfold.checkpoint.source import open_source
from kvfold.compression.export_gqa import export_gqa
from kvfold.compression.recipe import make_recipe
from kvfold.errors import CheckpointError, PlanError, RecipeError
from kvfold.testing import assert_close

GROUP = 16


def into_words(codes, bits, dim):
    """The lowest codes first, along one dimension."""
    parts = codes.long().unflatten(dim, (-1, 32 // bits)).movedim(dim + 1, 0)
    words = sum(part << (bits * i) for i, part in enumerate(parts))
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def of_groups(weight, bits, symmetric):
    """codes [out, in], zero [out, groups], scale [out, groups], by rows."""
    grouped = weight.float().unflatten(1, (-1, GROUP))
    low, high = grouped.amin(-1), grouped.amax(-1)
    scale = (high - low).clamp_min(1e-6) / (2**bits - 1)
    zero = torch.full_like(low, 2 ** (bits - 1)) if symmetric else (-low / scale).round().clamp(0, 2**bits - 1)
    scale = torch.maximum(high.abs(), low.abs()) / (2 ** (bits - 1) - 1) if symmetric else scale
    codes = (grouped / scale[..., None] + zero[..., None]).round().clamp(0, 2**bits - 1).flatten(1)
    return codes, zero, scale.half().float()


def meant(codes, zero, scale):
    return ((codes.unflatten(1, (-1, GROUP)) - zero[..., None]) * scale[..., None]).flatten(1)


def packed(weight, symmetric=True):
    codes, zero, scale = of_groups(weight, 4, symmetric)
    parts = {
        "weight_packed": into_words(codes, 4, 1),
        "weight_scale": scale,
        "weight_shape": torch.tensor(weight.shape),
    }
    parts |= {} if symmetric else {"weight_zero_point": into_words(zero, 4, 0)}
    return parts, meant(codes, zero, scale)


def float8(weight, rows=True):
    scale = weight.float().abs().amax(1, keepdim=True) / 448 if rows else (weight.float().abs().amax() / 448)[None]
    numbers = (weight.float() / scale).to(torch.float8_e4m3fn)
    return {"weight": numbers, "weight_scale": scale}, numbers.float() * scale


def blocks(weight):
    side = 24
    padded = torch.nn.functional.pad(weight.float(), (0, -weight.shape[1] % side, 0, -weight.shape[0] % side))
    tiles = padded.unflatten(1, (-1, side)).unflatten(0, (-1, side))
    scale = tiles.abs().amax((1, 3)).clamp_min(1e-6) / 448
    wide = scale.repeat_interleave(side, 0).repeat_interleave(side, 1)[: weight.shape[0], : weight.shape[1]]
    numbers = (weight.float() / wide).to(torch.float8_e4m3fn)
    return {"weight": numbers, "weight_scale_inv": scale}, numbers.float() * wide


def awq(weight):
    codes, zero, scale = of_groups(weight, 4, False)
    order = torch.tensor(AWQ_ORDER).argsort()

    def words(rows):
        return into_words(rows.unflatten(1, (-1, 8))[..., order].flatten(1), 4, 1)

    parts = {"qweight": words(codes.T), "qzeros": words(zero.T), "scales": scale.T.half()}
    return parts, meant(codes, zero, scale)


def gptq(weight, newer=False, shuffled=False):
    group = torch.arange(weight.shape[1]) // GROUP
    order = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(0)) if shuffled else group.argsort()
    codes, zero, scale = of_groups(weight[:, order], 4, False)
    zero = zero.clamp_min(0 if newer else 1)
    numbers = torch.empty_like(weight, dtype=torch.float32)
    numbers[:, order] = meant(codes, zero, scale)
    own, of = torch.empty_like(codes), torch.empty_like(group)
    own[:, order], of[order] = codes, group
    zeros = into_words(zero.T - (0 if newer else 1), 4, 1)
    return {"qweight": into_words(own.T, 4, 0), "qzeros": zeros, "scales": scale.T.half(), "g_idx": of.int()}, numbers


WEIGHTS = {"num_bits": 4, "type": "int", "group_size": GROUP, "strategy": "group", "symmetric": True}
ROWS = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
TENSORS = {"quant_method": "compressed-tensors", "ignore": ["lm_head"], "quantization_status": "compressed"}


def group(**weights):
    return {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}


FORMATS = {
    "w4a16": (packed, TENSORS | {"format": "pack-quantized"} | group(**WEIGHTS)),
    "w4a16_zeros": (
        lambda w: packed(w, symmetric=False),
        TENSORS | {"format": "pack-quantized"} | group(**WEIGHTS | {"symmetric": False}),
    ),
    "fp8_rows": (float8, TENSORS | {"format": "float-quantized"} | group(**ROWS)),
    "fp8_matrix": (
        lambda w: float8(w, rows=False),
        TENSORS | {"format": "float-quantized"} | group(**ROWS | {"strategy": "tensor"}),
    ),
    "fp8_blocks": (blocks, {"quant_method": "fp8", "weight_block_size": [24, 24]}),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}),
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": GROUP}),
    "gptq_v2": (lambda w: gptq(w, newer=True), {"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_v2"}),
    "gptq_order": (lambda w: gptq(w, shuffled=True), {"quant_method": "gptq", "bits": 4, "desc_act": True}),
}
LEFT_OUT = {
    "compressed-tensors": "ignore",
    "awq": "modules_to_not_convert",
    "fp8": "modules_to_not_convert",
    "gptq": "dynamic",
}


def quantized(root, form, model="llama_mha"):
    """A folder with quantized weights, and one with what they mean."""
    quantize, scheme = FORMATS[form]
    network = make_tiny(model, intermediate_size=96)
    network.save_pretrained(root / "plain")
    tensors, meaning = {}, {}
    for name, tensor in load_file(root / "plain" / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            parts, numbers = quantize(tensor)
            tensors |= {name.removesuffix("weight") + part: x.contiguous() for part, x in parts.items()}
            meaning[name] = numbers
        else:
            tensors[name] = meaning[name] = tensor
    source = root / "quantized"
    source.mkdir(parents=True)
    config = json.loads((root / "plain" / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"quantization_config": scheme}))
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    save_file({n: x.contiguous() for n, x in meaning.items()}, root / "plain" / "model.safetensors", {"format": "pt"})
    return source, root / "plain"


def fold(source, out, **fields):
    copy_tokenizer(source)
    text = out.parent / "text.txt"
    text.write_text(" ".join(f"t{i * 7 % 200}" for i in range(3000)))
    calibration = {"data": str(text), "num_samples": 4, "seq_len": 32}
    recipe = make_recipe({"model": str(source), "out": str(out), "calibration": calibration} | fields)
    return kvfold.compress(recipe, device="cpu").out


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("method", [{"preset": "int4"}, {"preset": "svd_a", "kv_budget": 0.5}], ids=["int4", "svd_a"])
def test_attention_is_that_of_what_the_codes_mean(tmp_path, form, method):
    """Tensor by tensor; all others are the same bytes, and the config says which modules are not quantized any more."""
    source, plain = quantized(tmp_path, form)
    out, expected = fold(source, tmp_path / "out", **method), fold(plain, tmp_path / "expected", **method)
    before, found, other = (load_file(folder / "model.safetensors") for folder in (source, out, expected))
    attention = [name for name in found if ".self_attn." in name]
    assert sorted(attention) == sorted(name for name in other if ".self_attn." in name)
    for name in attention:
        assert_close(found[name], other[name], tolerance=1e-5, name=name)
    outside = [name for name in before if ".self_attn." not in name]
    assert sorted(outside) == sorted(name for name in found if ".self_attn." not in name)
    for name in outside:
        assert found[name].dtype == before[name].dtype
        assert torch.equal(found[name].view(torch.uint8), before[name].view(torch.uint8)), name
    scheme = json.loads((out / "config.json").read_text())["quantization_config"]
    assert "self_attn" in json.dumps(scheme[LEFT_OUT[scheme["quant_method"]]])


def test_what_cannot_be_read_is_refused(tmp_path):
    source, _ = quantized(tmp_path, "awq")
    config = json.loads((source / "config.json").read_text())
    with pytest.raises(RecipeError, match="MLPs, whose weights are quantized"):
        fold(source, tmp_path / "out", preset="mqa", keep_parameters=True)
    for scheme, named in (
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, r"bitsandbytes-quantized.*dequantize\(\)"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "in form gemv"),
        ({"quant_method": "gptq", "bits": 3}, "GPTQ with 3 bits"),
    ):
        (source / "config.json").write_text(json.dumps(config | {"quantization_config": scheme}))
        with pytest.raises(CheckpointError, match=named):
            fold(source, tmp_path / "out", preset="int4")


def test_a_part_that_is_missing_is_named(tmp_path):
    source, _ = quantized(tmp_path, "w4a16")
    tensors = load_file(source / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight_packed"]
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"matrix model\.layers\.1\.mlp\.up_proj\.weight lacks weight"):
        open_source(source)


def test_the_meaning_is_close_to_what_was_quantized(tmp_path):
    """Of the helpers above: otherwise both sides could be wrong alike."""
    for form, (quantize, _) in FORMATS.items():
        weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
        assert (quantize(weight)[1] - weight).norm() < 0.15 * weight.norm(), form
    source, plain = quantized(tmp_path, "gptq")
    assert logits(load(plain), tokens()).isfinite().all() and source.exists()


def fold_of_blocks(tmp_path):
    source, _ = quantized(tmp_path, "fp8_blocks")
    return fold(source, tmp_path / "folded", width={"method": "svd_w"}, kv_budget=0.5)


def test_codes_stay_codes_when_a_fold_is_truncated(tmp_path):
    folded = fold_of_blocks(tmp_path)
    kvfold.truncate(folded, tmp_path / "narrow", kv_budget=0.32)
    before, after = (load_file(folder / "model.safetensors") for folder in (folded, tmp_path / "narrow"))
    codes = [name for name in before if before[name].dtype == torch.float8_e4m3fn]
    assert codes
    for name in codes:
        assert torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8)), name


def test_quantized_folds_are_neither_healed_nor_exported(tmp_path):
    """Said before anything is trained or written."""
    folded, text = fold_of_blocks(tmp_path), tmp_path / "text.txt"
    with pytest.raises(RecipeError, match="has quantized matrices .*not trained"):
        kvfold.heal({"folded": str(folded), "out": str(tmp_path / "healed"), "data": str(text), "objective": "ce"})
    source, _ = quantized(tmp_path / "other", "w4a16")
    merged = fold(source, tmp_path / "other" / "merged", preset="procrustes", kv_budget=0.5)
    with pytest.raises(PlanError, match="has quantized matrices .*not exported"):
        export_gqa(merged, tmp_path / "stock")
    assert not (tmp_path / "healed").exists() and not (tmp_path / "stock").exists()

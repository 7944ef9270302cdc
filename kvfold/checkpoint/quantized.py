"""Checkpoints whose weights are quantized: what their numbers mean, and how a config says that attention's are not any more.

Read one matrix at a time, by the layouts that compressed-tensors, AWQ, GPTQ, block-wise FP8 and MXFP4 document. Everything
outside attention is copied as it lies; attention is folded from the numbers that its codes mean.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvfold.errors import CheckpointError
from kvfold.plan.typed import shortened

Read = Callable[[str], Tensor]
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Which of the eight codes of a word each column of AWQ has."""
MARKS = {
    ".weight_scale": "scaled", ".weight_scale_inv": "blocks", ".qweight": "words", ".weight_packed": "packed",
    "_blocks": "mxfp4",
}  # fmt: skip
"""By what a quantized matrix is known -> the kind of its layout; later ones say more."""
PARTS = {
    "scaled": ("weight", "weight_scale"),
    "blocks": ("weight", "weight_scale_inv"),
    "awq_words": ("qweight", "qzeros", "scales"),
    "gptq_words": ("qweight", "qzeros", "scales"),
    "packed": ("weight_packed", "weight_scale", "weight_shape"),
    "mxfp4": ("blocks", "scales"),
}
"""Kind -> what every matrix of it has."""
FLOAT4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""What the codes of E2M1 say, behind a bit that is their sign."""


class Quantized(NamedTuple):
    """A matrix, or (MXFP4) those of all experts. module: what the names of its parts begin with."""

    module: str
    kind: str

    def numbers(self, read: Read, has: Collection[str], scheme: Mapping[str, Any]) -> Tensor:
        """[out, in] in float32; of experts as the model holds them."""

        def part(name: str) -> Tensor | None:
            return read(self.stored(name)) if self.stored(name) in has else None

        return KINDS[self.kind](part, scheme)

    @property
    def name(self) -> str:
        """Of the parameter."""
        return self.module if self.kind == "mxfp4" else f"{self.module}.weight"

    def stored(self, part: str) -> str:
        """The name of a part in files."""
        return f"{self.module}{'_' if self.kind == 'mxfp4' else '.'}{part}"


Part = Callable[[str], Any]
"""A part of one matrix by its name; None where there is none."""


def quantized(config: Mapping[str, Any], names: Collection[str]) -> dict[str, Quantized]:
    """Name of each quantized matrix as a current model has it -> where its numbers are. Raises CheckpointError on a scheme
    that is not known."""
    scheme = config.get("quantization_config")
    if not scheme:
        return {}
    if not isinstance(scheme, Mapping):
        raise CheckpointError(f"config.json: quantization_config is {shortened(scheme)}; fields were expected.")
    method = scheme.get("quant_method")
    if method not in METHODS:
        raise CheckpointError(
            f"config.json: {method}-quantized weights; kvfold reads those of {', '.join(METHODS)}, and float32, bfloat16 or"
            " float16. Save a dequantized copy (model.dequantize(), then save_pretrained)."
        )
    found: dict[str, Quantized] = {}
    for mark, kind in MARKS.items():
        modules = [name.removesuffix(mark) for name in names if name.endswith(mark)]
        kind = f"{method}_words" if kind == "words" else kind
        found |= {one.name: one for one in (Quantized(module, kind) for module in modules)}
    for one in found.values():
        if missing := [part for part in PARTS[one.kind] if one.stored(part) not in names]:
            raise CheckpointError(f"the quantized matrix {one.name} lacks {missing[0]}; download the folder again.")
    return found


def without_attention(config: Mapping[str, Any], attention: str) -> dict[str, Any]:
    """The `quantization_config` of a folded model, whose attention is not quantized: `attention` as its module is called."""
    scheme: dict[str, Any] = copy.deepcopy(config["quantization_config"])
    METHODS[scheme["quant_method"]](scheme, attention)
    return scheme


def _ignore(scheme: dict[str, Any], attention: str) -> None:
    scheme["ignore"] = [*(scheme.get("ignore") or []), f"re:.*\\.{attention}\\..*"]


def _not_converted(scheme: dict[str, Any], attention: str) -> None:
    scheme["modules_to_not_convert"] = [*(scheme.get("modules_to_not_convert") or []), attention]


def _dynamic(scheme: dict[str, Any], attention: str) -> None:
    scheme["dynamic"] = {f"-:.*\\.{attention}\\..*": {}} | (scheme.get("dynamic") or {})


METHODS: dict[str, Callable[[dict[str, Any], str], None]] = {
    "compressed-tensors": _ignore, "awq": _not_converted, "gptq": _dynamic, "fp8": _not_converted,
    "mxfp4": _not_converted,
}  # fmt: skip
"""quant_method -> how its config leaves modules out."""


def _codes(words: Tensor, bits: int, dim: int) -> Tensor:
    """Codes out of words of 32 bits, the lowest first, along one dimension, which becomes as many times longer."""
    shifts = torch.arange(0, 32 // bits * bits, bits)
    codes = (words.unsqueeze(dim + 1) >> shifts.view(-1, *[1] * (words.ndim - 1 - dim))) & ((1 << bits) - 1)
    return codes.flatten(dim, dim + 1)


def _over_groups(scale_oG: Tensor, columns: int, group: Tensor | None = None) -> Tensor:
    """[out, in]: the scale of each column's group."""
    if group is not None:
        return scale_oG[:, group.long()]
    return scale_oG.repeat_interleave(-(-columns // scale_oG.shape[1]), dim=1)[:, :columns]


def _packed(part: Part, scheme: Mapping[str, Any]) -> Tensor:
    """compressed-tensors' `pack-quantized`: codes of a row one after the other, shifted by half of their range."""
    rows, columns = (int(size) for size in part("weight_shape"))
    bits = next(iter(scheme["config_groups"].values()))["weights"]["num_bits"]
    codes, scale, group = (
        _codes(part("weight_packed"), bits, 1)[:, :columns],
        part("weight_scale").float(),
        part("weight_g_idx"),
    )
    half, zeros = 1 << (bits - 1), part("weight_zero_point")
    zero = torch.zeros(())
    if zeros is not None:
        zero = _over_groups(_codes(zeros, bits, 0)[:rows].float() - half, columns, group)
    return (codes.float() - half - zero) * _over_groups(scale, columns, group)


def _scaled(part: Part, scheme: Mapping[str, Any]) -> Tensor:
    """Float8 or int8 numbers times a scale per row, per matrix or per block."""
    numbers, scale = part("weight").float(), part("weight_scale").float()
    if scale.ndim < 2:
        return numbers * (scale if scale.numel() == 1 else scale[:, None])
    return numbers * _of_blocks(scale, numbers)


def _blocks(part: Part, scheme: Mapping[str, Any]) -> Tensor:
    """Float8 numbers of square blocks times the scale of each."""
    numbers = part("weight").float()
    return numbers * _of_blocks(part("weight_scale_inv").float(), numbers, scheme.get("weight_block_size"))


def _of_blocks(scale: Tensor, numbers: Tensor, sizes: Any = None) -> Tensor:
    heights = [sizes[dim] if sizes else -(-numbers.shape[dim] // scale.shape[dim]) for dim in (0, 1)]
    wide = scale.repeat_interleave(heights[0], 0).repeat_interleave(heights[1], 1)
    return wide[: numbers.shape[0], : numbers.shape[1]]


def _awq(part: Part, scheme: Mapping[str, Any]) -> Tensor:
    """Words of eight columns, in AWQ_ORDER; zeros alike. Stored as [in, out]."""
    if scheme.get("bits", 4) != 4 or str(scheme.get("version", "gemm")).lower() != "gemm":
        raise CheckpointError(
            f"config.json: AWQ with {scheme.get('bits')} bits in form {scheme.get('version')}; only 4, gemm."
        )
    scales = part("scales").float()
    codes, zeros = (_in_order(_codes(part(name), 4, 1)) for name in ("qweight", "qzeros"))
    height = codes.shape[0] // scales.shape[0]
    return ((codes - zeros.repeat_interleave(height, 0)).float() * scales.repeat_interleave(height, 0)).T


def _in_order(codes: Tensor) -> Tensor:
    return codes.unflatten(1, (-1, 8))[..., list(AWQ_ORDER)].flatten(1)


def _gptq(part: Part, scheme: Mapping[str, Any]) -> Tensor:
    """Words of codes down the columns of [in, out]; zeros, less one in the older form, along its rows."""
    bits, scales = scheme["bits"], part("scales").float()
    if 32 % bits:
        raise CheckpointError(f"config.json: GPTQ with {bits} bits; kvfold reads 2, 4 and 8.")
    codes, zeros = _codes(part("qweight"), bits, 0), _codes(part("qzeros"), bits, 1)
    zeros = zeros + (scheme.get("checkpoint_format", "gptq") != "gptq_v2")
    group = part("g_idx")
    if group is None:
        group = torch.arange(len(codes)) // -(-len(codes) // len(scales))
    return ((codes - zeros[group.long()]).float() * scales[group.long()]).T


def _mxfp4(part: Part, scheme: Mapping[str, Any]) -> Tensor:
    """Two codes of E2M1 in each byte, the lower first, and a power of two for 32 of them. Rows become columns: experts are
    stored as [experts, out, in / 32, 16], and held as [experts, in, out]."""
    blocks, exponents = part("blocks"), part("scales").int() - 127
    values = torch.tensor([*FLOAT4, *(-value for value in FLOAT4)])
    codes = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(-2).long()
    return torch.ldexp(values[codes], exponents[..., None]).flatten(-2).transpose(-2, -1)


KINDS: dict[str, Callable[[Part, Mapping[str, Any]], Tensor]] = {
    "packed": _packed, "scaled": _scaled, "blocks": _blocks, "awq_words": _awq, "gptq_words": _gptq,
    "mxfp4": _mxfp4,
}  # fmt: skip

"""Attention over tokens of two forms by the kernels that read one: each form by itself, then one softmax over both."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kvfold.runtimes.kernels import cpu_decode
from kvfold.runtimes.kernels.attention import additive, kernels_for
from kvfold.runtimes.kernels.cpu_layer import Asked, Form, Steps
from kvfold.runtimes.kernels.packed_tokens import AgedTokens, part
from kvfold.runtimes.kernels.sinks import beside_sinks


def serves(q: tuple[Tensor, Tensor], z: AgedTokens, y: AgedTokens) -> bool:
    """Whether the device's kernels take both forms, for few queries that meet stored keys or keys that a CPU rebuilds."""
    kernels = kernels_for(q[0])
    return kernels.serves(q[0], z.far, y.far) and kernels.serves(q[1], z.near, y.near)


def by_one_call(
    steps: Steps,
    q: tuple[Tensor, Tensor],
    z: AgedTokens,
    y: AgedTokens,
    mask: Tensor | None,
    width: int,
    *,
    rebuild: tuple[Any, Any] | None = None,
    map: cpu_decode.ValueMap | None = None,
    **sizes: Any,
) -> Tensor | None:
    """As `attend`, on a CPU; None where its kernel does not serve. steps: of the layer."""
    (_, N, T, _), S, recent = q[0].shape, z.shape[2], z.recent
    (of_far, of_near), ages = rebuild or (None, None), ((recent, cpu_decode.ALL_OLDER), (0, recent))
    forms = [
        Form(z.far, y.far, ages[0], of_far),
        Form(z.near, y.near, ages[1], of_near, last=True),
    ]
    ranges = (0, max(S - recent, 0)), (max(S - T - recent + 1, 0), S)
    asked = [
        Asked(queries, *_of_storage(form.keys.shape[2] - S, start, end, S - T, mask, queries))
        for form, queries, (start, end) in zip(forms, q, ranges, strict=True)
    ]
    return steps.read(forms, asked, width, map, heads=N, **sizes)


def _of_storage(
    first: int, start: int, end: int, position: int, mask: Tensor | None, q_BNTR: Tensor
) -> tuple[Tensor, None, Tensor | None]:
    """Where the tokens start:end of those that are seen lie in a storage that begins `first` tokens before them, no table of
    pages, and what is added to scores, if masks say something."""
    B, _, T, _ = q_BNTR.shape
    sequences_B3 = torch.tensor([[start + first, end + first, position + first]] * B, dtype=torch.int64)
    if mask is None:
        return sequences_B3, None, None
    seen = position + T
    bias = additive(mask, T, seen, 0, seen, q_BNTR)
    assert bias is not None, "there is a mask"
    return sequences_B3, None, F.pad(bias.float(), (first, 0))


def attend(
    q: tuple[Tensor, Tensor],
    z: AgedTokens,
    y: AgedTokens,
    mask: Tensor | None,
    width: int,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    rebuild: tuple[Any, Any] | None = None,
    map: cpu_decode.ValueMap | None = None,
) -> Tensor:
    """[B, T, N, V] of queries as they meet far and near keys: absorbed, or as they are where keys of both are rebuilt. width:
    V, of which far values are the first numbers and near ones the last. map: how the source's values are made of them."""
    T, S, recent = q[0].shape[2], z.shape[2], z.recent
    ways, sizes = rebuild or (None, None), {"scale": scale, "softcap": softcap}
    near = _part(q[1], z.near, y.near, mask, max(S - T - recent + 1, 0), S, S, (0, recent), rebuild=ways[1], **sizes)
    parts = [near._replace(last=True)]
    if recent < S:
        parts.insert(
            0,
            _part(q[0], z.far, y.far, mask, 0, S - recent, S, (recent, cpu_decode.ALL_OLDER), rebuild=ways[0], **sizes),
        )
    values: Tensor = kernels_for(q[0]).values_of(parts, width, q[0].dtype, map)
    return beside_sinks(values, [part.log_sums for part in parts], sinks)


def _part(
    q_BNTR: Tensor,
    keys: Any,
    values: Any,
    mask: Tensor | None,
    start: int,
    end: int,
    tokens: int,
    ages: tuple[int, int],
    *,
    rebuild: cpu_decode.Rebuild | None,
    **sizes: Any,
) -> cpu_decode.Averages:
    """Over the tokens start:end of all, of which each query sees those of some ages."""
    T, first = q_BNTR.shape[2], keys.shape[2] - tokens  # where the newest tokens' own storage begins
    if start + first > 0 or end < tokens:
        keys, values = _cut(keys, values, start + first, end + first)
        if rebuild is not None:
            rebuild = rebuild.of_tokens(start + first, end + first)
    bias = None if mask is None else additive(mask, T, tokens, start, end, q_BNTR)
    added, position = None if bias is None else bias.float(), tokens - T - start
    decode_part = kernels_for(q_BNTR).decode_part
    averages: cpu_decode.Averages = decode_part(
        q_BNTR, keys, values, added, position=position, ages=ages, rebuild=rebuild, **sizes
    )
    return averages


def _cut(keys: Any, values: Any, start: int, end: int) -> tuple[Any, Any]:
    """The tokens start:end of both; the same object where they are."""
    cut = part(keys, start, end)
    return cut, cut if values is keys else part(values, start, end)

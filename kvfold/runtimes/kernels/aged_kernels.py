"""Attention over tokens of two forms by the kernels that read one: each form by itself, then one softmax over both."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kvfold.runtimes.kernels import cpu_decode
from kvfold.runtimes.kernels.attention import additive, kernels_for
from kvfold.runtimes.kernels.cpu_layer import Form, Steps, asked_of
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
    of_far, of_near = rebuild or (None, None)
    far = Form(z.far, y.far, (recent, cpu_decode.ALL_OLDER), of_far)
    near = Form(z.near, y.near, (0, recent), of_near, last=True)
    asked = [
        asked_of(q[0], S, mask, (0, max(S - recent, 0))),
        asked_of(q[1], S, mask, (max(S - T - recent + 1, 0), S), first=z.near.shape[2] - S),
    ]
    return steps.read([far, near], asked, width, map, heads=N, **sizes)


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

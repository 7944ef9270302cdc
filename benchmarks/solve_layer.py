"""How long, and in how much memory, one layer of Llama-2-7B's size is solved from ready statistics.

The statistics are those of random vectors whose energy falls by a power law, as that of keys and values does; method
`attended`, one latent for all heads, at the given share of the original numbers.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import time
from pathlib import Path

import torch

from kvfold import registry
from kvfold.attention import AttentionLayer, AttentionWeights
from kvfold.linalg import Moment
from kvfold.number_format import StoredShape
from kvfold.width.base import LayerGroup

HEADS, HEAD_DIM = 32, 128


def main() -> None:
    """Solve and print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--share", type=float, default=0.25, help="numbers kept / numbers of the original")
    parser.add_argument("--json", type=Path, help="write the result here")
    arguments = parser.parse_args()
    group, width = _group(), registry.load("width", "attended")(rope="on_read")
    shape = StoredShape(1, int(arguments.share * HEADS * HEAD_DIM))
    start = time.perf_counter()
    (folded,) = width.fold(group, width.spec(group.owner, shape, shape))
    seconds = time.perf_counter() - start
    assert all(torch.isfinite(t).all() for t in folded.state_dict(torch.float32).values()), "a solve must give numbers"
    result = {
        "heads": HEADS,
        "head_dim": HEAD_DIM,
        "share": arguments.share,
        "seconds": round(seconds, 1),
        "peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


def _group() -> LayerGroup:
    generator = torch.Generator().manual_seed(0)
    F = HEADS * HEAD_DIM
    layer = AttentionLayer(
        index=0, hidden_size=F, num_attention_heads=HEADS, num_kv_heads=HEADS, head_dim=HEAD_DIM, scaling=HEAD_DIM**-0.5,
        rotary_dim=HEAD_DIM,
    )  # fmt: skip
    q, k, v, o = (torch.randn(F, F, generator=generator, dtype=torch.float64) / F**0.5 for _ in range(4))
    moments = {
        "keys_before_rotation": _moment(F, generator),
        "averaged_values": _pooled(_moment(F, generator)),
        "queries_at_keys": _per_head(generator),
    }
    weights = AttentionWeights(q_proj=q, k_proj=k, v_proj=v, o_proj=o)
    return LayerGroup(layers=(layer,), weights=lambda i: weights, moments=lambda i: moments, cross=lambda i, j=0: {})


def _moment(size: int, generator: torch.Generator) -> Moment:
    mix = torch.randn(size, size, generator=generator) * torch.arange(1, size + 1).rsqrt()
    return Moment(torch.zeros(size).double(), (mix @ mix.T / size).double(), 4 * size)


def _pooled(moment: Moment) -> Moment:
    """As calibration gathers averaged values of so many heads: one moment for all."""
    return Moment(moment.mean_F[None], moment.second_FF[None], moment.count)


def _per_head(generator: torch.Generator) -> Moment:
    mix = torch.randn(HEADS, HEAD_DIM, HEAD_DIM, generator=generator, dtype=torch.float64)
    return Moment(torch.zeros(HEADS, HEAD_DIM).double(), mix @ mix.transpose(1, 2), HEAD_DIM)


if __name__ == "__main__":
    main()

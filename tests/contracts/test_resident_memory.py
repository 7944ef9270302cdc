"""What the system counts as this process's memory follows the bytes that a plan promises."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

SCRIPT = """
import ctypes, dataclasses, json, sys
import torch
from kvfold.plan.cache_spec import SourceLayer
from kvfold.plan.plan import source_plan
from kvfold.plan.token_runs import TokenRun, TokenRuns
from kvfold.runtimes.transformers.cache import FoldedCache

def resident():
    # what was freed goes back first
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(open("/proc/self/statm").read().split()[1]) * 4096

torch.set_num_threads(1)
rule = sys.argv[1]
plan = source_plan([SourceLayer(num_attention_heads=8, num_kv_heads=8, head_dim=64)] * 4, "float32")
if rule != "all":
    prompt = "masked" if rule == "foreseen" else "whole"
    runs = (TokenRun(heads=tuple(range(4)), share=0.375, least=64), TokenRun(heads=tuple(range(4, 8)), share=0.125, least=64))
    tokens = TokenRuns(runs=runs, rule=rule, newest=0 if rule == "recency" else 32, prompt=prompt)
    plan = dataclasses.replace(plan, caches=tuple(dataclasses.replace(spec, tokens=tokens) for spec in plan.caches))
cache, worth = FoldedCache(plan), torch.randn(1, 8, 2048)
part = torch.randn(1, 8, 2048, 64)
before, found = resident(), []
for length in range(2048, 16385, 2048):
    for layer in cache.layers:
        layer.update(part, part, worth_BCT=worth)
    for _ in range(70 if length % 8192 == 0 else 0):
        for layer in cache.layers:
            layer.update(part[:, :, :1], part[:, :, :1], worth_BCT=worth[:, :, :1])
    found.append((cache.nbytes_allocated, resident() - before, plan.kv_bytes(cache.get_seq_length())))
print(json.dumps(found))
"""


def bytes_of(rule):
    done = subprocess.run([sys.executable, "-c", SCRIPT, rule], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux what is resident")
@pytest.mark.parametrize("rule", ["recency", "observed", "foreseen"])
def test_resident_memory_follows_the_plan(rule):
    """Of 8,192 and 16,384 tokens a quarter, when some were decoded; what the allocator holds back is not counted."""
    whole, kept = bytes_of("all"), bytes_of(rule)
    for at in (3, 7):
        assert whole[at][0] == whole[at][2] and kept[at][0] == kept[at][2] < 0.27 * whole[at][0]
        for allocated, resident, _ in (whole[at], kept[at]):
            assert abs(resident - allocated) < 16e6

"""Two processes of one run: they find what one finds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from test_healing import healing, with_text
from tiny import make_tiny, save_tiny

import kvfold
from kvfold.checkpoint.source import load_plan

WORKER = """
import json, sys
import torch
import accelerate.state as state

torch.set_num_threads(1)
made = state.AcceleratorState.__init__


def shards_on_a_cpu_too(self, *args, fsdp_plugin=None, **kwargs):
    made(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None and self.distributed_type == state.DistributedType.MULTI_CPU:
        self.distributed_type, self.fsdp_plugin = state.DistributedType.FSDP, fsdp_plugin


state.AcceleratorState.__init__ = shards_on_a_cpu_too
import kvfold

call, fields = json.loads(sys.argv[1])
getattr(kvfold, call)(fields, device="cpu")
"""


def in_two_processes(tmp_path, call, fields):
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    environment = os.environ | {"PYTHONPATH": str(Path(kvfold.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(worker)]
    done = subprocess.run([*command, json.dumps([call, fields])], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


def close(one, other, tolerance):
    assert one.keys() == other.keys()
    for name in one:
        distance = (one[name].double() - other[name].double()).norm()
        assert distance <= tolerance * one[name].double().norm(), name


@pytest.fixture(scope="module")
def folded(tmp_path_factory):
    """Layers that share a cache, so that readers must find their owners under FSDP too; documents of different lengths."""
    root = with_text(
        save_tiny(make_tiny("llama_mha", vocab_size=4096), tmp_path_factory.mktemp("two") / "source").parent
    )
    recipe = {
        "model": str(root / "source"),
        "out": str(root / "folded"),
        "depth": {"method": "contiguous", "owners": 2},
    }
    recipe |= {
        "width": {"method": "logit", "v_latent": "layer"},
        "kv_budget": 0.25,
        "calibration": {"data": "self", "num_samples": 9, "seq_len": 48},
    }
    kvfold.compress(recipe, device="cpu")
    return root, recipe


@pytest.mark.parametrize("shard", [False, True], ids=["ddp", "fsdp"])
def test_healing_follows_the_same_curve(folded, tmp_path, shard):
    root, _ = folded
    fields = healing(root, "whole", batch_size=8, epochs=0.5, save_every=4, train="all") | {
        "out": str(tmp_path / "one")
    }
    kvfold.heal(fields, device="cpu")
    split = {"out": str(tmp_path / "two"), "batch_size": 2, "accumulate": 2, "shard": shard}
    in_two_processes(tmp_path, "heal", fields | split)
    close(*(load_file(tmp_path / name / "model.safetensors") for name in ("one", "two")), 1e-5)
    one, two = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    for mine, theirs in zip(one, two, strict=True):
        for name in {"loss", "kl", "ce"} & mine.keys():
            assert mine[name] == pytest.approx(theirs[name], rel=1e-5)
    assert (tmp_path / "two.heal" / "checkpoint-4").exists()


def test_a_killed_run_of_two_goes_on(folded, tmp_path):
    """From a sharded checkpoint, in the middle, to the same weights."""
    root, _ = folded
    fields = healing(root, "x", batch_size=4, epochs=0.5, save_every=4, shard=True) | {"out": str(tmp_path / "whole")}
    in_two_processes(tmp_path, "heal", fields)
    (tmp_path / "whole").rename(tmp_path / "first")
    for checkpoint in (tmp_path / "whole.heal").glob("checkpoint-*"):
        if checkpoint.name != "checkpoint-8":
            for file in sorted(checkpoint.rglob("*"), reverse=True):
                file.rmdir() if file.is_dir() else file.unlink()
            checkpoint.rmdir()
    in_two_processes(tmp_path, "heal", fields)
    close(*(load_file(tmp_path / name / "model.safetensors") for name in ("first", "whole")), 1e-6)


def test_calibration_finds_the_same_moments(folded, tmp_path):
    root, recipe = folded
    in_two_processes(tmp_path, "compress", recipe | {"out": str(tmp_path / "two")})
    one, two = (next(run.glob("statistics-*")) for run in (root / "folded.run", tmp_path / "two.run"))
    files = sorted(file.name for file in one.glob("layer-*.safetensors"))
    assert files and sorted(file.name for file in two.glob("layer-*")) == files and not list(two.glob("hidden*"))
    for name in files:
        close(load_file(one / name), load_file(two / name), 1e-6)
    close(*(load_file(folder / "model.safetensors") for folder in (root / "folded", tmp_path / "two")), 1e-5)


def test_each_process_gives_its_tokens(folded, tmp_path):
    """Where a layer stores what those below leave unsaid, tokens themselves are kept: all of them, in any order."""
    _, recipe = folded
    fields = {name: recipe[name] for name in ("model", "calibration")} | {"width": {"method": "mla"}, "kv_budget": 0.25}
    kvfold.compress(fields | {"out": str(tmp_path / "one")}, device="cpu")
    in_two_processes(tmp_path, "compress", fields | {"out": str(tmp_path / "two")})
    for name in ("tokens_of_banded_keys_and_values", "weights_of_banded_keys_and_values"):
        one, two = (
            load_file(next(tmp_path.glob(f"{run}.run/statistics-*")) / "layer-00001.safetensors")[name]
            for run in ("one", "two")
        )
        assert one.shape == two.shape and one.shape[0] == 9 * 48
        close({name: one.flatten().sort().values}, {name: two.flatten().sort().values}, 1e-5)
    close(*(load_file(tmp_path / run / "model.safetensors") for run in ("one", "two")), 1e-3)


def test_what_forgetting_costs_is_measured_together(tmp_path):
    source = save_tiny(make_tiny("llama_mha"), tmp_path / "source")
    recipe = {"model": str(source), "preset": "windows", "kv_budget": 0.5, "context_len": 40}
    recipe |= {"length": {"sinks": 2, "newest": 3}, "calibration": {"data": "self", "num_samples": 4, "seq_len": 32}}
    kvfold.compress(recipe | {"out": str(tmp_path / "one")}, device="cpu")
    in_two_processes(tmp_path, "compress", recipe | {"out": str(tmp_path / "two")})
    one, two = (
        load_file(next(tmp_path.glob(f"{name}.run/forgetting-*/curves.safetensors"))) for name in ("one", "two")
    )
    close(one, two, 1e-6)
    plans = [load_plan(tmp_path / name)[0] for name in ("one", "two")]
    assert all(plan.drops_tokens and 0.4 < plan.kv_budget <= 0.501 for plan in plans)  # ties may fall to either head

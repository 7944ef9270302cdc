"""Fold a folder shaped like Llama-2-7B: peak resident memory and time, with random weights made here.

    python benchmarks/fold_llama2_7b.py --folder /somewhere/with/30GB [--preset svd_w] [--kv-budget 0.5]

Options: --layers N for a part of the model, --keep to keep the result. Writes the random model once (13.5 GB, bfloat16,
shards of 5 GB as on the hub), folds it in a process of its own, and prints one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from accelerate import init_empty_weights
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

SHARD_BYTES = 5_000_000_000


def main() -> None:
    """Make the model if it is not there, fold it, and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--preset", default="svd_w")
    parser.add_argument("--kv-budget", default="0.5")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--set", action="append", default=[], help="passed on to kvfold compress")
    parser.add_argument("--name", help="of the folded folder; default folded-PRESET")
    parser.add_argument("--json", type=Path, help="write the result here too")
    parser.add_argument("--keep", action="store_true", help="keep the folded model as FOLDER/folded-PRESET")
    arguments = parser.parse_args()
    source = arguments.folder / f"llama2-7b-{arguments.layers}-layers"
    if not (source / "config.json").exists():
        write_random_model(source, arguments.layers)
    out = arguments.folder / (arguments.name or f"folded-{arguments.preset}")
    command = [sys.executable, "-m", "kvfold", "compress", str(source), "--preset", arguments.preset]
    command += ["--kv-budget", arguments.kv_budget, "--out", str(out), "--overwrite"]
    command += [part for assignment in arguments.set for part in ("--set", assignment)]
    start = time.perf_counter()
    made = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    result = {
        "layers": arguments.layers,
        "preset": arguments.preset,
        "peak_resident_gb": round(peak / 1e9, 3),
        "seconds": round(seconds, 1),
        "source_gb": round(folder_bytes(source) / 1e9, 2),
        "folded_gb": round(folder_bytes(out) / 1e9, 2),
        "threads": torch.get_num_threads(),
        "compress": json.loads(made.stdout.strip().splitlines()[-1]),
    }
    if not arguments.keep:
        shutil.rmtree(out)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


def write_random_model(folder: Path, layers: int) -> None:
    """Random bfloat16 tensors under Llama's names, shard by shard, so that writing needs little memory too."""
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_attention_heads=32, num_hidden_layers=layers, dtype="bfloat16"
    )
    config.architectures = ["LlamaForCausalLM"]
    with init_empty_weights():
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        if size + 2 * shape.numel() > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += 2 * shape.numel()
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: (torch.randn(shapes[name]) * 0.02).bfloat16() for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config.save_pretrained(folder)


def folder_bytes(folder: Path) -> int:
    """Bytes of all files."""
    return sum(file.stat().st_size for file in folder.iterdir())


if __name__ == "__main__":
    main()

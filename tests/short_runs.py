"""Folds of tiny models with the least of everything."""

import os
import subprocess
import sys
from pathlib import Path

import kvfold
from kvfold.compression.recipe import make_recipe
from kvfold.evaluation.demo import MODEL

CALIBRATION = {"data": "self", "num_samples": 4, "seq_len": 32}


def compress(source, out, method="svd_w", calibration=CALIBRATION, kv_budget=0.5, **options):
    tree = {
        "model": str(source),
        "out": str(out),
        "kv_budget": kv_budget,
        "width": {"method": method},
        "calibration": calibration,
    }
    return kvfold.compress(make_recipe(tree), device="cpu", **options)


def copy_tokenizer(source):
    """A tokenizer with the tiny models' vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {f"t{i}": i for i in range(200)} | {"word": 200, "[UNK]": 201}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]").save_pretrained(source)


def digests(folder):
    """Bytes of every file but the two that name the folder itself, and the manifest, which knows one of them."""
    names_folder = ("README.md", "recipe.yaml", "kvfold_manifest.json")
    return {f.name: f.read_bytes() for f in Path(folder).iterdir() if f.name not in names_folder}


def started(out, *options, samples="4", tokens="64", model=MODEL, environment=None):
    """`kvfold compress` of a model, as a process."""
    command = [sys.executable, "-m", "kvfold", "compress", str(model), "--preset", "svd_a", "--kv-budget", "0.5"]
    command += ["--data", "self", "--num-samples", samples, "--seq-len", tokens, "--device", "cpu"]
    command += ["--out", str(out), *map(str, options)]
    environment = {**os.environ, **(environment or {})}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

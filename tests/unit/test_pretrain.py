"""The lab's training script: it learns, and an interrupted run ends with the bytes of an uninterrupted one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

LAB = Path(__file__).parents[2] / "lab"
SIZE = ["--steps", "6", "--batch-size", "2", "--seq-len", "32", "--device", "cpu"]


def run(config, text, out, *extra):
    command = [sys.executable, LAB / "pretrain.py", "--config", config, "--data", text, "--out", out, *SIZE, *extra]
    made = subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True)
    return json.loads(made.stdout.strip().splitlines()[-1])


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("<|endoftext|>".join(f"The captain of ship {i} walked along the shore. " * 20 for i in range(40)))
    return file


@pytest.mark.rare
@pytest.mark.parametrize("config", ["books-llama", "books-bloom"])
def test_interrupted_training_ends_the_same(config, text, tmp_path):
    whole = run(config, text, tmp_path / "whole", "--valid", text)
    stops = 0
    while not run(config, text, tmp_path / "parts", "--valid", text, "--max-seconds", "0")["finished"]:
        stops += 1
    assert stops == 5
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "parts")]
    assert weights[0] == weights[1]
    losses = [json.loads(line)["loss"] for line in (tmp_path / "whole" / "training.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]
    card = (tmp_path / "whole" / "README.md").read_text()
    assert f"{whole['validation']['text.txt']:.4f}" in card and "seed 0" in card.replace("\n", " ")
    assert not list((tmp_path / "whole").glob("state*"))


@pytest.mark.parametrize("file", sorted((LAB / "configs").glob("*.json")), ids=lambda f: f.stem)
def test_every_model_fits_into_12_megabytes(file):
    config = json.loads(file.read_text())["model"]
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config))
    assert 2 * sum(p.numel() for p in model.parameters()) <= 12_000_000

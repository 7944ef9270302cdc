"""Loss right after conversion to the nine configurations of the MLKV paper (arXiv 2406.09297), before any uptraining.

    python benchmarks/mlkv_start.py MODEL --valid TEXT [--seq-len 256] [--max-tokens 16384]

MODEL has 12 layers of 12 heads. MLPs are widened as in the paper, without changing their function. Beside mean merging stands
the regression of preset `shared` at the same bytes. One JSON line last.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from pathlib import Path
from typing import Any

from kvfold.compression.compress import compress
from kvfold.compression.presets import MLKV_PAPER
from kvfold.compression.recipe import make_recipe
from kvfold.evaluation.texts import evaluate


def main() -> None:
    """Run and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--valid", type=Path, required=True)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--max-tokens", type=int, default=16384)
    parser.add_argument("--num-samples", type=int, default=128)
    parser.add_argument("--markdown", type=Path, help="write the table here too")
    options = parser.parse_args()
    rows, vocabulary = [], 0
    with tempfile.TemporaryDirectory() as scratch:
        for name, preset in MLKV_PAPER.items():
            depth, width = preset.fragment["depth"], preset.fragment["width"]
            budget = depth["owners"] * width["kv_heads"] / 144
            merged = measure(options, {"preset": name, "keep_parameters": budget < 1}, Path(scratch))
            ours = {"preset": "shared", "depth": {"owners": depth["owners"]}, "width": {"kv_heads": width["kv_heads"]}}
            regressed = measure(options, ours, Path(scratch))
            if not vocabulary:
                vocabulary = json.loads((Path(options.model) / "config.json").read_text())["vocab_size"]
                base = merged.base_loss
            rows.append((name, f"{merged.kv_budget:.4f}", f"{merged.loss:.4f}", f"{regressed.loss:.4f}"))
            print(rows[-1], flush=True)
    lines = [
        f"Original: loss {base:.4f}; guessing: ln {vocabulary} = {math.log(vocabulary):.4f}. Validated on"
        f" {options.max_tokens} tokens of {options.valid.name} in windows of {options.seq_len}; `shared` calibrated on"
        f" {options.num_samples} sequences that the model sampled.",
        "",
        "| configuration | kv_budget | mean merge, widened MLP | shared (regression) |",
        "|---|---|---|---|",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]
    print("\n".join(lines))
    if options.markdown:
        options.markdown.write_text("\n".join(lines) + "\n")
    print(json.dumps({"base_loss": base, "guessing": math.log(vocabulary), "rows": rows}))


def measure(options: argparse.Namespace, fields: dict[str, Any], scratch: Path) -> Any:
    """Fold and evaluate."""
    calibration = {"data": "self", "num_samples": options.num_samples, "seq_len": options.seq_len}
    recipe = make_recipe({"model": options.model, "out": str(scratch / "out"), "calibration": calibration} | fields)
    compress(recipe, run_dir=scratch / "run", overwrite=True)
    return evaluate(
        scratch / "out",
        against=options.model,
        data_file=options.valid,
        max_tokens=options.max_tokens,
        seq_len=options.seq_len,
    )


if __name__ == "__main__":
    main()

"""What exports to DeepSeek's class lose before any training, ours and TransMLA's choice, beside folds of as many bytes.

    python benchmarks/mla_loss.py MODEL --data CALIBRATION --valid FILE --scratch FOLDER [--markdown FILE]

One JSON line last.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import kvfold
from kvfold.calibration.text import first_windows
from kvfold.checkpoint.tokenizer import load_tokenizer
from kvfold.compression.export_mla import export_mla
from kvfold.report.table import Table

BUDGETS = (0.5, 0.25)


def main() -> None:
    """Export, measure, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--data", required=True)
    parser.add_argument("--valid", required=True, type=Path)
    parser.add_argument("--scratch", required=True, type=Path)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    windows_WT = first_windows(load_tokenizer(options.model), options.valid, seq_len=1024, max_tokens=options.tokens)
    expected = predictions(options.model, windows_WT)
    rows = [(name, budget, *losses(folder, windows_WT, expected)) for name, budget, folder in exported(options)]
    title = f"{Path(options.model).name}, {options.valid.name}, {windows_WT.numel():,} tokens, before any training."
    table = Table(("what", "of the bytes", "KL", "loss change"), title=title)
    for name, budget, kl, change in rows:
        table.add(name, f"{budget:.3f}", f"{kl:.4f}", f"{change:+.4f}")
    print(table.markdown())
    if options.markdown:
        options.markdown.write_text(table.markdown())
    print(json.dumps([dict(zip(("what", "kv_budget", "kl", "loss_change"), row, strict=True)) for row in rows]))


def exported(options: argparse.Namespace) -> list[tuple[str, float, Path]]:
    """(what, budget, folder)."""
    calibration: dict[str, Any] = {"data": options.data}
    run_dir, made = options.scratch / "run", []
    for budget in BUDGETS:
        for name, published in (("mla", False), ("mla, heads mixed as TransMLA", True)):
            folder = options.scratch / f"mla-{budget}-{published}"
            choice = {"kv_budget": budget, "published": published, "run_dir": run_dir, "runtime": "transformers"}
            if not folder.exists():
                export_mla(options.model, folder, calibration=calibration, **choice)
            made.append((name, budget, folder))
        folder = options.scratch / f"auto-{budget}"
        if not folder.exists():
            recipe = {"model": options.model, "out": str(folder), "kv_budget": budget, "calibration": calibration}
            kvfold.compress(recipe, run_dir=run_dir)
        made.append(("auto", budget, folder))
    return made


@torch.no_grad()
def predictions(folder: str | Path, windows_WT: torch.Tensor) -> torch.Tensor:
    """[W, T, vocabulary] log-probabilities."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return torch.stack([model(row[None], use_cache=False).logits[0].log_softmax(-1) for row in windows_WT])


def losses(folder: Path, windows_WT: torch.Tensor, expected_WTV: torch.Tensor) -> tuple[float, float]:
    """KL to the original, and the change of loss, in nats per token."""
    found_WTV = predictions(folder, windows_WT)
    kl = (expected_WTV.exp() * (expected_WTV - found_WTV)).sum(-1)[:, :-1].mean()
    labels = windows_WT[:, 1:, None]
    own, base = (x[:, :-1].gather(2, labels).mean() for x in (found_WTV, expected_WTV))
    return float(kl), float(base - own)


if __name__ == "__main__":
    main()

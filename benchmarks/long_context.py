"""What a folded model loses the farther it is into a long text: loss, KL and top-1 agreement by position.

    python benchmarks/long_context.py FOLDED --against MODEL --data TEXT [--seq-len 8192] [--windows 1]

Windows go through the caches piece by piece, so that the logits of one piece are in memory at a time. One JSON line last.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvfold.calibration.text import first_windows
from kvfold.checkpoint.source import warn_if_too_long
from kvfold.evaluation.standard_errors import stderr
from kvfold.evaluation.texts import compare_tokens, load_pair
from kvfold.plan.plan import CachePlan
from kvfold.progress import track
from kvfold.report.plots import SVG, svg

PIECE = 256
FIRST = 512
"""Positions of the first range; every further one is as long as all before it."""

Row = dict[str, float]


def main() -> None:
    """Run and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folded")
    parser.add_argument("--against", required=True, help="the original model")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seq-len", type=int, default=8192)
    parser.add_argument("--windows", type=int, default=1)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--markdown", type=Path, help="write the table here too")
    parser.add_argument("--plot", type=Path, help="an SVG of loss and KL over positions")
    options = parser.parse_args()
    model, base = load_pair(options.folded, options.against, dtype="auto", device=options.device)
    warn_if_too_long(options.seq_len, base.model.config.to_dict())
    windows_WT = first_windows(
        base.tokenizer, options.data, seq_len=options.seq_len, max_tokens=options.windows * options.seq_len
    )
    rows = by_position(measured(model.model, base.model, windows_WT, model.plan))
    lines = table(rows)
    print("\n".join(lines))
    if options.markdown:
        caption = (
            f"{Path(options.folded).name} against {Path(options.against).name}, kv_budget {model.plan.kv_budget:.4f};"
            f" {len(windows_WT)} windows of {windows_WT.shape[1]:,} tokens of {options.data.name}. Position: of the"
            " predicted token. Nats per token."
        )
        options.markdown.write_text("\n".join([caption, "", *lines]) + "\n")
    if options.plot:
        options.plot.write_text(SVG + plot(rows))
    print(json.dumps({"windows": len(windows_WT), "kv_budget": model.plan.kv_budget, "rows": rows}))


def measured(model: Any, base: Any, windows_WT: Tensor, plan: CachePlan) -> Tensor:
    """[W, T - 1, 4] of every predicted token: loss, base loss, KL and agreement."""
    found = []
    for window_T in track(windows_WT, "reading windows", len(windows_WT)):
        pieces = zip(
            logits_by_piece(model, window_T[:-1], 1 if plan.depends_on_steps else PIECE),
            logits_by_piece(base, window_T[:-1], PIECE),
            window_T[1:].to(base.device).split(PIECE),
            strict=True,
        )
        found.append(torch.cat([compare_tokens(*piece) for piece in pieces]))
    return torch.stack(found)


@torch.no_grad()
def logits_by_piece(model: Any, window_T: Tensor, step: int) -> Iterator[Tensor]:
    """[PIECE, vocabulary] after one piece and the next; `step` tokens at a time go through the model."""
    cache = None
    for piece_T in window_T.to(model.device).split(PIECE):
        logits = []
        for tokens in piece_T[None].split(step, dim=1):
            out = model(tokens, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            logits.append(out.logits[0])
        yield torch.cat(logits)


def by_position(measured_WT4: Tensor) -> list[Row]:
    """Means over ranges of positions; the token after the first has position 1."""
    rows, start, last = [], 0, measured_WT4.shape[1]
    while start < last:
        end = min(2 * start or FIRST, last + 1)
        part_WP4 = measured_WT4[:, max(start - 1, 0) : end - 1]
        loss, base_loss, kl, agreement = part_WP4.mean((0, 1)).tolist()
        change = stderr((part_WP4[..., 0] - part_WP4[..., 1]).mean(1))
        rows.append(
            {"from": start, "to": end, "loss": loss, "base_loss": base_loss, "kl": kl, "top1_agreement": agreement}
            | ({} if len(measured_WT4) == 1 else {"loss_change_stderr": change})
        )
        start = end
    return rows


def table(rows: list[Row]) -> list[str]:
    """As Markdown."""
    lines = ["| positions | loss | folded | loss change | KL | top-1 agreement |", "|---|---|---|---|---|---|"]
    for row in rows:
        change = f"{row['loss'] - row['base_loss']:+.4f}"
        if "loss_change_stderr" in row:
            change += f" ± {row['loss_change_stderr']:.4f}"
        cells = (
            f"{row['from']:,}-{row['to']:,}", f"{row['base_loss']:.4f}", f"{row['loss']:.4f}", change, f"{row['kl']:.5f}",
            f"{row['top1_agreement']:.2%}",
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def plot(rows: list[Row]) -> str:
    """Losses and KL, side by side, over the ends of the ranges."""
    labels = [f"to {row['to']:,}" for row in rows]

    def draw(axes: list[Any]) -> None:
        axes[0].plot(labels, [row["base_loss"] for row in rows], marker="o", color="0.5", label="original")
        axes[0].plot(labels, [row["loss"] for row in rows], marker="o", color="black", label="folded")
        axes[0].set_ylabel("loss (nats per token)")
        axes[0].legend(frameon=False)
        axes[1].plot(labels, [row["kl"] for row in rows], marker="o", color="black")
        axes[1].set(ylabel="KL (nats per token)", ylim=(0, None))
        for panel in axes:
            panel.set_xlabel("position in the text")
            panel.grid(alpha=0.3)

    return svg(draw, panels=2, size=(10, 3.8))


if __name__ == "__main__":
    main()

"""Recovery training of one model, side by side: the tables that the papers have, in small, with the control that they lack.

    python benchmarks/healing.py {mlkv,starts,objectives,large} --model DIR --data TEXT --valid TEXT [--tokens 262144]

mlkv: the configurations of the MLKV paper that fit the model's layers and heads, uptrained on equal tokens, beside
the original uptrained on the same tokens (the paper, arXiv 2406.09297, compares with an original that was not).
starts: mean-pooled heads, SVD of the weights and SVD of activations (arXiv 2406.07056), before and after LoRA and
distillation. objectives: distillation against cross-entropy at equal tokens. large: what a model that takes hours on
a CPU gets in one, the default at 1/32 and every second layer's cache, distilled. Loss changes are those against the
untrained original, on the same held-out text; "of the gap" is the share of the loss before healing that is gone (in
mlkv, where all weights are trained, what the control lost does not count). A finished run is not repeated. One JSON
line last.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
from pathlib import Path
from typing import Any

import kvfold
from kvfold.evaluation.inspection import inspect
from kvfold.evaluation.texts import Evaluation
from kvfold.report.plots import SVG, svg

UPTRAINING = {"objective": "ce", "train": "all", "weight_decay": 0.01}
DISTILLATION = {"objective": "kd", "train": "attention"}
LORA = {"objective": "ce", "train": "lora", "lora_rank": 64, "lora_alpha": 128}
CONTROL = "original"


@dataclasses.dataclass(frozen=True)
class Run:
    """One fold and how it is healed; `tokens`: of those that the table has, the share that it gets."""

    label: str
    fold: dict[str, Any]
    heal: dict[str, Any]
    tokens: float = 1.0


def main() -> None:
    """Run and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", choices=("mlkv", "starts", "objectives", "large"))
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, help="to train and calibrate on")
    parser.add_argument("--valid", required=True, help="to evaluate on")
    parser.add_argument("--tokens", type=int, default=262_144)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="its peak; small models take more")
    parser.add_argument("--eval-tokens", type=int, default=65_536)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where folders are kept")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--markdown", type=Path, help="write the table here too, and a plot beside it (.svg)")
    options = parser.parse_args()
    rows = [
        measure(run, options)
        for run in {"mlkv": mlkv, "starts": starts, "objectives": objectives, "large": large}[options.table](options)
    ]
    lines = table(rows, options)
    print(*lines, sep="\n")
    if options.markdown:
        options.markdown.write_text("\n".join(lines) + "\n")
        options.markdown.with_suffix(".svg").write_text(SVG + plot(rows))
    print(json.dumps({"table": options.table, "rows": rows}))


def mlkv(options: argparse.Namespace) -> list[Run]:
    """Mean-merged heads and layers, all weights trained on the next token, and the original trained likewise."""
    plan = inspect(options.model).plan
    layers, heads = plan.num_layers, plan.source[0].num_kv_heads
    runs = [Run(CONTROL, {"preset": "identity"}, UPTRAINING)]
    for owners, kv_heads in (
        (layers, heads // 3),
        (layers // 3, heads),
        (layers, 1),
        (layers // 3, heads // 2),
        (layers // 2, 1),
        (layers // 3, 1),
        (1, 1),
    ):
        name = "MQA" if owners == layers and kv_heads == 1 else "GQA" if owners == layers else "MLKV"
        fold = {
            "depth": {"method": "contiguous", "owners": owners},
            "width": {"method": "mean_pool", "kv_heads": kv_heads},
        }
        runs.append(Run(f"{name}-{owners * kv_heads} ({owners} caches x {kv_heads})", fold, UPTRAINING))
    return runs


def starts(options: argparse.Namespace) -> list[Run]:
    """At half the bytes; ours, `auto`, at 1/32."""
    half = inspect(options.model).plan.source[0].num_kv_heads // 2
    folds: dict[str, dict[str, Any]] = {
        "mean-pooled heads": {"preset": "gqa", "width": {"method": "mean_pool", "kv_heads": half}},
        "SVD of weights": {"preset": "svd_w", "kv_budget": 0.5},
        "SVD of activations": {"preset": "svd_a", "kv_budget": 0.5},
        "auto": {"preset": "auto", "kv_budget": 1 / 32},
    }
    control = [Run(CONTROL, {"preset": "identity"}, UPTRAINING)]
    return control + [
        Run(f"{name}, {how}", fold, fields)
        for name, fold in folds.items()
        for how, fields in (("LoRA on the next token", LORA), ("distilled", DISTILLATION))
        if name != "auto" or fields is DISTILLATION
    ]


def objectives(options: argparse.Namespace) -> list[Run]:
    """One fold, a sixth of the bytes: cross-entropy on all of the tokens, distillation on a quarter, half and all."""
    fold = {"preset": "svd_a", "kv_budget": 1 / 6}
    return [
        Run(f"{name}, {share:.0%} of the tokens", fold, DISTILLATION | {"objective": name}, share)
        for name, share in (("ce", 1.0), ("kd", 0.25), ("kd", 0.5), ("kd", 1.0))
    ]


def large(options: argparse.Namespace) -> list[Run]:
    """The default at its smallest, calibrated as it asks by default."""
    fold = {"preset": "auto", "kv_budget": 1 / 32, "calibration": {"data": options.data}}
    return [Run("auto, distilled", fold, DISTILLATION)]


def measure(run: Run, options: argparse.Namespace) -> dict[str, Any]:
    """Loss and KL before and after."""
    folder = options.runs / f"healing-{Path(options.model).name}"
    name = "".join(c if c.isalnum() or c == "-" else "_" for c in json.dumps(run.fold, sort_keys=True)).replace("_", "")
    folded = folder / name
    tokens = int(run.tokens * options.tokens)
    settings = [run.heal, tokens, options.learning_rate, options.seq_len, options.seed, options.data]
    how = f"{run.heal['objective']}-{run.heal['train']}-{hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:8]}"
    healed = folder / f"{name}-{how}"
    if not folded.exists():
        calibration = {"data": options.data, "num_samples": 128, "seq_len": options.seq_len}
        recipe = {"model": options.model, "out": str(folded), "calibration": calibration} | run.fold
        kvfold.compress(recipe, run_dir=folder / "run", device=options.device)
    if not healed.exists():
        fields = {"folded": str(folded), "out": str(healed), "data": options.data, "seq_len": options.seq_len}
        teacher = {} if run.heal["objective"] == "ce" else {"teacher": options.model}
        size = {"max_tokens": tokens, "learning_rate": options.learning_rate, "seed": options.seed}
        kvfold.heal(fields | run.heal | teacher | size, device=options.device)
    before, after = (evaluated(path, options) for path in (folded, healed))
    facts = {"tokens": tokens, "kv_budget": before.kv_budget, "base_loss": before.base_loss}
    return {"label": run.label} | facts | {
        "before": before.loss_change, "after": after.loss_change, "stderr": after.loss_change_stderr,
        "kl_before": before.kl, "kl_after": after.kl,
    }  # fmt: skip


def evaluated(path: Path, options: argparse.Namespace) -> Evaluation:
    """Against the original, in its own file so that a table continues where it was interrupted."""
    kept = path / "healing-evaluation.json"
    if not kept.exists():
        found = kvfold.evaluate(
            path, against=options.model, data_file=options.valid, max_tokens=options.eval_tokens, seq_len=options.seq_len,
            device=options.device,
        )  # fmt: skip
        kept.write_text(json.dumps(dataclasses.asdict(found)))
    return Evaluation(**json.loads(kept.read_text()))


def table(rows: list[dict[str, Any]], options: argparse.Namespace) -> list[str]:
    """As Markdown."""
    control = min((row["after"] for row in rows if row["label"] == CONTROL), default=0.0)
    lines = [
        "| | kv_budget | tokens | loss change before | after | against the control | of the gap | KL before | after |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    nothing = control if options.table == "mlkv" else 0.0
    for row in rows:
        gap = row["before"] - nothing
        share = (row["before"] - row["after"]) / gap if row["label"] != CONTROL and gap > 0 else math.nan
        cells = (
            row["label"], f"{row['kv_budget']:.3f}", f"{row['tokens']:,}", f"{row['before']:+.4f}",
            f"{row['after']:+.4f} ± {row['stderr']:.4f}", f"{row['after'] - control:+.4f}",
            "" if math.isnan(share) else f"{share:.0%}", f"{row['kl_before']:.4f}", f"{row['kl_after']:.4f}",
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def plot(rows: list[dict[str, Any]]) -> str:
    """Loss changes before and after, as an SVG."""

    def draw(axes: list[Any]) -> None:
        labels = [row["label"] for row in rows]
        axes[0].barh(labels, [row["before"] for row in rows], color="0.82", label="before")
        axes[0].barh(labels, [row["after"] for row in rows], height=0.45, label="after")
        axes[0].invert_yaxis()
        axes[0].set_xlabel("loss change against the untrained original (nats per token)")
        axes[0].grid(axis="x", alpha=0.3)
        axes[0].legend(frameon=False)

    return svg(draw, panels=1, size=(9.5, 0.42 * len(rows) + 1.3))


if __name__ == "__main__":
    main()

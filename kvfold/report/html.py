"""A comparison as one self-contained HTML page: table, plots as inline SVG, continuations."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvfold.evaluation.compare import Comparison, Row
from kvfold.evaluation.context import KINDS, Remembered
from kvfold.evaluation.texts import Evaluation
from kvfold.plan.plan import CachePlan
from kvfold.report.plots import frontier_plot, plan_plot, svg
from kvfold.report.table import Table, plus_minus
from kvfold.version import __version__

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>kvfold: {model}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222; }}
table {{ border-collapse: collapse; margin: 1rem 0; }}
th, td {{ padding: .25rem .7rem; border-bottom: 1px solid #ddd; text-align: right; }}
th:first-child, td:first-child, .words td:last-child {{ text-align: left; }}
.words td:last-child {{ font-size: 13px; color: #444; }}
svg {{ max-width: 100%; height: auto; }}
</style></head><body>
<h1>{model}</h1>
<p>Calibrated on {calibration}; evaluated on {evaluated_on}. KL is KL(original &#8214; folded) in nats per token. Bytes are
those of the checkpoint's dtype. Nothing was trained after folding.</p>
<h2>Side by side</h2>
{table}
<h2>Budget against KL</h2>
{budget_plot}
<h2>What every layer stores</h2>
{plans}
<h2>Where the energy of keys and values lies</h2>
<p>Share of the squared norm of keys and values that the leading directions of a layer hold, over all heads of the layer. A
steep curve means that few numbers suffice. One line per layer.</p>
{energy_plot}
<h2>The same prompt, continued greedily</h2>
<p>Prompt: <b>{prompt}</b></p>
<div class="words">{continuations}</div>
<p>kvfold {version}</p>
</body></html>
"""

LEAST = 1e-8
"""KL below which a logarithmic plot shows nothing."""

TITLES = {
    "keys_before_rotation": "keys before rotation",
    "keys": "keys after rotation",
    "values": "values",
}


def render(comparison: Comparison) -> str:
    """The page."""
    return PAGE.format(
        model=html.escape(comparison.model),
        calibration=html.escape(comparison.calibration),
        evaluated_on=html.escape(comparison.evaluated_on),
        table=numbers_table(comparison).html(),
        budget_plot=budget_plot(comparison),
        plans=_plans(comparison),
        energy_plot=energy_plot(comparison),
        prompt=html.escape(comparison.prompt),
        continuations=_continuations(comparison),
        version=__version__,
    )


def numbers_table(comparison: Comparison) -> Table:
    """The table of numbers, with a line that says on what it was measured; the same for terminal, page and README."""
    columns = [*COLUMNS, *(f"{what} on {name}" for name in comparison.also_on for what in ("loss change", "KL"))]
    columns += next((_asked(row) for row in comparison.rows if row.remembered), [])
    title = f"`{comparison.model}`, calibrated on {comparison.calibration}, evaluated on {comparison.evaluated_on}"
    return Table(columns, [_cells(row, columns) for row in comparison.rows], title=title)


def _cells(row: Row, columns: list[str]) -> list[str]:
    e = row.evaluation
    if e is None or row.kv_bytes_at_32k is None:
        return [row.preset, f"{row.asked_budget or 1:.3f}", "out of reach", *[""] * (len(columns) - 3)]
    return [
        row.preset,
        f"{e.kv_budget:.3f}",
        f"{e.kv_bytes_per_token:,}",
        f"{row.kv_bytes_at_32k / 1e6:.1f}",
        _change(e),
        f"{e.kl:.5f}",
        f"{e.top1_agreement:.1%}",
        *(cell for other in row.further for cell in (_change(other), f"{other.kl:.5f}")),
        *(remembered(one) for one in row.remembered),
    ]


def _asked(row: Row) -> list[str]:
    """Columns of what a cache still knows of a context."""
    length = f"after {row.remembered[0].context_len:,} tokens"
    others = (f"{one.kind} {length} (original {one.base_accuracy:.1%})" for one in row.remembered[1:])
    return [f"KL {length}", *others]


def remembered(one: Remembered) -> str:
    """What a cache still knows, beside the original, with errors."""
    if one.kind == KINDS[0]:
        return f"{one.kl:.5f}{plus_minus(one.kl_stderr, '.5f')}"
    change = 100 * (one.accuracy - one.base_accuracy)
    return f"{one.accuracy:.1%} ({change:+.1f}{plus_minus(100 * one.change_stderr, '.1f')})"


def _change(e: Evaluation) -> str:
    return f"{e.loss_change:+.4f}{plus_minus(e.loss_change_stderr)}"


COLUMNS = ("preset", "kv_budget", "bytes per token", "MB at 32k tokens", "loss change", "KL", "top-1 agreement")


def budget_plot(comparison: Comparison) -> str:
    """KL over bytes kept, one line per preset; of those that have one size one mark."""
    points: dict[str, list[tuple[float, float]]] = {}
    for row in comparison.rows:
        if row.evaluation is not None:
            points.setdefault(row.preset, []).append((row.evaluation.kv_budget, max(row.evaluation.kl, LEAST)))
    return frontier_plot(list(points.items()))


def energy_plot(comparison: Comparison) -> str:
    """Cumulative singular-value energy of K before rotation, K after rotation and V, one line per layer."""
    from matplotlib import colormaps

    def draw(axes: list[Axes]) -> None:
        for panel, (name, title) in zip(axes, TITLES.items(), strict=True):
            layers = comparison.energy[name]
            for index, shares in enumerate(layers):
                directions = [(i + 1) / len(shares) for i in range(len(shares))]
                color = colormaps["viridis"](0.9 * index / max(len(layers) - 1, 1))
                label = f"layer {index}" if index in (0, len(layers) - 1) else None
                panel.plot(directions, shares, color=color, linewidth=1.2, label=label)
            panel.axvline(0.25, color="#bbb", linewidth=0.8, linestyle="--")
            panel.axvline(0.5, color="#bbb", linewidth=0.8, linestyle="--")
            panel.set(title=title, xlabel="share of directions", xlim=(0, 1), ylim=(0, 1.01))
            panel.grid(alpha=0.3)
        axes[0].set_ylabel("share of energy")
        axes[-1].legend(frameon=False, loc="lower right")

    return svg(draw, panels=len(TITLES), size=(11, 3.6))


def _plans(comparison: Comparison) -> str:
    """A picture of every plan in which layers differ."""
    parts = []
    for row in comparison.rows:
        plan = row.plan and CachePlan.from_dict(row.plan)
        if plan and len(set(plan.caches)) > 1:
            parts.append(f"<h3>{html.escape(row.preset)} at {plan.kv_budget:.4g}</h3>{plan_plot(plan)}")
    return "\n".join(parts) or "<p>Every layer stores the same.</p>"


def _continuations(comparison: Comparison) -> str:
    entries: list[Sequence[str]] = [("original", "1.000", comparison.continuation)]
    entries += [
        (row.preset, f"{row.evaluation.kv_budget:.3f}", row.continuation or "")
        for row in comparison.rows
        if row.evaluation is not None
    ]
    return Table(("preset", "kv_budget", "continuation"), entries).html()

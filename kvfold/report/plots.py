"""Pictures: what every layer of a plan stores and in how many bits, frontiers, losses over steps, speeds."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kvfold.plan.number_format import StoredShape
from kvfold.plan.plan import CachePlan

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from kvfold.evaluation.speed import Benchmark
    from kvfold.evaluation.throughput import ThroughputBenchmark

CELLS = 24
"""Characters for all numbers that a side of the source has."""
SHADES = {2: "░", 4: "▒", 6: "▓", 64: "█"}
"""Bits up to which a character stands for numbers; what is not stored is a dot."""

SVG = '<?xml version="1.0" encoding="utf-8"?>\n'
"""Before a picture that is a file of its own."""


def bar(side: StoredShape, source_numbers: int, itemsize: int) -> str:
    """One side of one cache as CELLS characters."""
    cells, drawn, at = CELLS / source_numbers, "", 0.0
    for elements, bits in tiers(side, itemsize):
        at += elements * cells
        drawn += shade(bits) * max(round(at) - len(drawn), 0)
    return drawn[:CELLS].ljust(CELLS, "·")


def shade(bits: int) -> str:
    """The character for numbers of so many bits."""
    return next(char for most, char in SHADES.items() if bits <= most)


def tiers(side: StoredShape, itemsize: int) -> list[tuple[int, int]]:
    """(numbers over all heads, bits of each)."""
    if not side.num_heads:
        return []
    if side.format is None:
        return [(side.elements, 8 * itemsize)]
    return [(side.num_heads * elements, bits) for elements, bits in side.format.tiers]


def described(side: StoredShape) -> str:
    """`1 x 48: 8x8 16x3 24x1`: heads x width, and of a head how many numbers have how many bits."""
    size = f"{side.num_heads} x {side.width}"
    if not side.num_heads:
        return "in the latents of keys"
    if side.format is None:
        return size
    kind = f" {side.format.codec.word}".rstrip()
    if len(side.format.tiers) == 1:
        return f"{size}: {side.format.tiers[0][1]} bits{kind}"
    return f"{size}: {' '.join(f'{n}x{b}' for n, b in side.format.tiers)}{kind}"


def plan_plot(plan: CachePlan) -> str:
    """Layers x {keys, values} as inline SVG: a bar is what is stored, colours are bits."""
    from matplotlib import colormaps

    def draw(axes: list[Axes]) -> None:
        itemsize = plan.itemsize()
        labelled: set[int] = set()
        for panel, side, title in zip(axes, (0, 1), ("keys", "values"), strict=True):
            for layer, spec in enumerate(plan.caches):
                at = 0
                for elements, bits in tiers(spec.sides[side], itemsize) if spec else []:
                    color = colormaps["viridis_r"](min(bits, 8) / 9)
                    label = f"{bits} bits" if bits not in labelled else None
                    panel.barh(layer, elements, left=at, color=color, edgecolor="white", linewidth=0.4, label=label)
                    labelled.add(bits)
                    at += elements
            full = max(layer.num_kv_heads * layer.head_dim for layer in plan.source)
            full = max(full, *(spec.widest for spec in plan.owned))
            panel.set(title=title, xlabel="numbers per token", xlim=(0, full), ylim=(plan.num_layers - 0.4, -0.6))
        axes[0].set_ylabel("layer")
        handles = [pair for panel in axes for pair in zip(*panel.get_legend_handles_labels(), strict=True)]
        ordered = sorted(handles, key=lambda pair: -int(pair[1].split()[0]))
        axes[1].legend(*zip(*ordered, strict=True), frameon=False, fontsize=8, loc="lower right")

    return svg(draw, panels=2, size=(9, 1.2 + 0.22 * plan.num_layers))


def svg(draw: Callable[[list[Any]], None], panels: int, size: tuple[float, float]) -> str:
    """What `draw` puts on `panels` axes side by side, as SVG; the same input gives the same bytes."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with rc_context({"svg.hashsalt": "kvfold", "font.size": 10}):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        draw(list(figure.subplots(1, panels, squeeze=False)[0]))
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def frontier_plot(
    lines: Sequence[tuple[str, Sequence[tuple[float, float]]]], title: str = "", highlighted: str = "auto"
) -> str:
    """KL over bytes kept, both logarithmic: (name, points) as a line, or as a mark where there is one point only."""
    from matplotlib import colormaps
    from matplotlib.ticker import FixedLocator, FuncFormatter

    def draw(axes: list[Axes]) -> None:
        (panel,) = axes
        for index, (name, points) in enumerate(lines):
            bold = name == highlighted
            panel.plot(
                *zip(*sorted(points), strict=True),
                marker="o" if len(points) > 1 else "Xsd^vP*<>"[index % 9],
                linestyle="-" if len(points) > 1 else "",
                linewidth=2.5 if bold else 1.3,
                color="black" if bold else colormaps["tab20"](index % 20),
                zorder=3 if bold else 2,
                label=name,
            )
        panel.set(xlabel="bytes kept / bytes of the original cache", ylabel="KL (nats per token)", title=title)
        panel.set(xscale="log", yscale="log")
        panel.xaxis.set_major_locator(FixedLocator([1 / 2**i for i in range(8)]))
        panel.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"1/{1 / x:.0f}" if x < 1 else "1"))
        panel.xaxis.set_minor_locator(FixedLocator([]))
        panel.grid(alpha=0.3)
        panel.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))

    return svg(draw, panels=1, size=(10, 4.8))


def loss_plot(entries: Sequence[Mapping[str, float]]) -> str:
    """What was logged over the steps of a training run."""

    def draw(axes: list[Axes]) -> None:
        for name in ("loss", "kl", "ce", "layers", "eval_loss", "eval_kl", "eval_ce"):
            points = [(entry["step"], entry[name]) for entry in entries if name in entry]
            if points:
                style = {"linewidth": 2.2, "marker": "o"} if name.startswith("eval_") else {"linewidth": 1.2}
                axes[0].plot(*zip(*points, strict=True), label=name, **style)
        axes[0].set(xlabel="step", ylabel="nats per token")
        axes[0].grid(alpha=0.3)
        axes[0].legend(frameon=False)

    return svg(draw, panels=1, size=(7.5, 4.2))


def speed_plot(found: Benchmark) -> str:
    """Decode steps and bytes read, beside each other."""
    rows = found.rows
    return _bars(
        [row.label for row in rows],
        {
            "ms per decode step": [row.tpot * 1e3 for row in rows],
            "MB of cache read per step": [row.read_bytes / 1e6 for row in rows],
        },
    )


def throughput_plot(found: ThroughputBenchmark) -> str:
    """Generated tokens per second and cached tokens, beside each other."""
    rows = found.rows
    return _bars(
        [row.label for row in rows],
        {
            "generated tokens per second": [row.tokens_per_second for row in rows],
            "tokens that the cache holds": [float(row.cache_tokens) for row in rows],
        },
    )


def _bars(labels: list[str], panels: Mapping[str, Sequence[float]]) -> str:
    def draw(axes: list[Axes]) -> None:
        for panel, (name, values) in zip(axes, panels.items(), strict=True):
            panel.barh(labels, values)
            panel.invert_yaxis()
            panel.set_xlabel(name)
            panel.grid(axis="x", alpha=0.3)
        for panel in axes[1:]:
            panel.set_yticklabels([])

    return svg(draw, panels=len(panels), size=(10, 0.5 * len(labels) + 1.2))

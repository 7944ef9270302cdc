"""What the command line prints: tables for people, one JSON line last for programs."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from kvfold import distributed as processes
from kvfold.checkpoint.atomic import write_text
from kvfold.evaluation.compare import Comparison
from kvfold.evaluation.context import Remembered
from kvfold.evaluation.inspection import shared_out
from kvfold.evaluation.memory import Capacity
from kvfold.evaluation.recall import Recall
from kvfold.evaluation.standard_errors import defined
from kvfold.evaluation.tasks import TaskScore
from kvfold.evaluation.texts import Evaluation
from kvfold.plan.cache_spec import CacheSpec
from kvfold.plan.plan import CachePlan
from kvfold.report.html import budget_plot, numbers_table, render
from kvfold.report.plots import SVG, bar, described
from kvfold.report.table import Table, plus_minus

STDOUT = Console(width=None if sys.stdout.isatty() else 160, quiet=processes.rank() > 0)
LENGTHS = (1024, 4096, 32_768)
"""Contexts for which is said what a cache takes that drops tokens."""
LEGIBLE = 24
"""Characters below which a continuation is shown under the table instead of in it."""


def print_json(values: dict[str, Any]) -> None:
    """One line for programs."""
    # not through rich, which would wrap the line at the width of the terminal
    if not processes.rank():
        print(json.dumps(defined(values), allow_nan=False), flush=True)


def print_plan(plan: CachePlan, title: str) -> None:
    """What every layer stores, and what it adds up to."""
    table = RichTable(title=escape(title), title_justify="left")
    for column in ("layers", "keys", "", "values", "", "tokens", "bytes per token", "of the original"):
        left = column in ("layers", "keys", "values", "")
        table.add_column(column, justify="left" if left else "right", no_wrap=not column)
    for layers, line in _plan_lines(plan):
        table.add_row(layers, *line)
    STDOUT.print(table)
    over = f" over {plan.context_len:,} tokens" if plan.recent_bytes() or plan.drops_tokens else ""
    STDOUT.print(
        f"{plan.kv_bytes_per_token():,} bytes per token ({plan.dtype}) instead of {plan.source_kv_bytes_per_token():,};"
        f" {plan.kv_budget:.4g} of the original's bytes{over}; 32,768 tokens take {plan.kv_bytes(32_768) / 1e6:,.1f} MB"
        f" instead of {plan.source_kv_bytes(32_768) / 1e6:,.1f} MB."
    )
    if any(side.format for spec in plan.owned for side in spec.sides):
        STDOUT.print(
            "heads x width: numbers x bits. █ 7 bits and more, ▓ 5 and 6, ▒ 3 and 4, ░ 1 and 2, · not stored. Where no"
            f" kernel reads them as they lie, a decode step turns {plan.kv_workspace_bytes() / 1e6:,.2f} MB per sequence"
            " back into numbers at a time.",
            highlight=False,
        )
    if once := plan.recent_bytes():
        newest = max(spec.recent for spec in plan.owned)
        STDOUT.print(
            f"The newest {newest} tokens are kept in a finer form as well: {once / 1e6:,.2f} MB per sequence, which the share"
            f" above counts over {plan.context_len:,} tokens."
        )
    if plan.drops_tokens:
        lengths = sorted({plan.context_len, *LENGTHS})
        shares = (f"{plan.kv_bytes(n) / plan.source_kv_bytes(n):.3g} at {n:,}" for n in lengths)
        STDOUT.print(
            f"heads x tokens that they keep of {plan.context_len:,}: {_kept_tokens(plan)}. Allocated, of"
            f" the original's bytes: {', '.join(shares)} tokens.",
            highlight=False,
        )
    if plan.reads_some:
        shares = (f"{plan.kv_read_bytes(n) / plan.kv_bytes(n):.3g} at {n:,}" for n in LENGTHS)
        STDOUT.print(f"A decode step reads, of the stored bytes: {', '.join(shares)} tokens.", highlight=False)
    if most := max(len(spec.predicted_from) for spec in plan.owned):
        STDOUT.print(
            f"A layer stores what the numbers of up to {most} layers below do not say; every step reads those as well:"
            f" {plan.kv_read_bytes(plan.context_len) / plan.context_len:,.0f} bytes per token over {plan.context_len:,}."
        )
    if plan.position_bytes:
        fast = {spec.fast_pairs for spec in plan.owned if spec.rope == "on_read"}
        how = (
            "Keys are stored before rotation; every step rotates (and rebuilds) what it reads."
            if fast == {0}
            else f"Of keys the {max(fast)} fastest pairs are stored after rotation, the others before it."
        )
        STDOUT.print(f"{how} {plan.position_bytes} bytes per token are the tokens' positions.")


def print_parameters(plan: CachePlan, before: int, after: int) -> None:
    """What a fold's weights take more, and how much cache saves as much."""
    grown = (after - before) * plan.itemsize()
    if grown <= 0:
        return
    saved = plan.source_kv_bytes_per_token() - plan.kv_bytes_per_token()
    tokens = f", as much as the cache of {math.ceil(grown / saved):,} tokens saves" if saved > 0 else ""
    millions = f"{after / 1e6:,.1f} million parameters instead of {before / 1e6:,.1f}"
    STDOUT.print(f"Attention has {millions}: {grown / 1e6:,.1f} MB more{tokens}.", highlight=False)


def _kept_tokens(plan: CachePlan) -> str:
    """Which, in words."""
    dropping = [spec.tokens for spec in plan.owned if spec.tokens is not None]
    first = f"the first {max(tokens.sinks for tokens in dropping)}"
    if any(tokens.foreseen for tokens in dropping):
        return f"{first}, the newest {dropping[0].newest}, and what is foreseen to be worth most"
    scored = next((tokens for tokens in dropping if tokens.scored), None)
    if scored is None:
        return f"{first} and the newest"
    return f"{first}, the newest {scored.newest}, and what {scored.rule} chooses of a prompt"


def print_processes(plan: CachePlan) -> None:
    """What each process of vLLM's tensor parallelism stores: of a latent that serves all heads, all of it."""
    sizes = shared_out(plan)
    if sizes:
        told = ", ".join(f"{size:,.0f} on each of {n}" for n, size in sizes.items())
        STDOUT.print(f"vLLM, tensor parallel: {told} processes (bytes per token).", highlight=False)


def print_capacity(found: Capacity) -> None:
    """What fits, cache by cache, and the budget that so many sequences need."""
    title = (
        f"{found.memory / 1e9:,.4g} GB, {found.weights / 1e9:,.4g} GB of it weights, 10 % left for activations;"
        f" {found.context:,} tokens per sequence"
    )
    table = Table(("cache", "GB per sequence", "sequences", "tokens"), title=title)
    for row in found.rows:
        size = f"{row.bytes_per_sequence / 1e9:,.4g}"
        table.add(row.label, size, f"{row.sequences:,}", f"{row.sequences * found.context:,}")
    table.show(STDOUT)
    if not any(row.sequences for row in found.rows):
        STDOUT.print("Not one sequence fits beside the weights: more memory, fewer tokens, or a smaller model.")
    if found.wanted and found.needed is not None:
        need = f"a kv_budget of {found.needed:.4g}" if 0 < found.needed < 1 else "no smaller cache"
        need = need if found.needed else "more memory: the weights alone do not leave room"
        STDOUT.print(f"{found.wanted:,} sequences need {need}.", highlight=False)


def _plan_lines(plan: CachePlan) -> list[tuple[str, list[str]]]:
    """One line per run of equal layers."""
    lines: list[tuple[list[int], list[str]]] = []
    for index, spec in enumerate(plan.caches):
        if spec is None:
            line = [f"reads layer {plan.owner(index)}", "", "", "", "", "0", "0"]
        else:
            kept = spec.kept(plan.context_len) / plan.context_len
            size, source = spec.bytes_per_token(plan.itemsize()) * kept, plan.source[index].elements_per_token
            drawn = [(described(side), bar(side, source // 2, plan.itemsize())) for side in spec.sides]
            line = [
                *drawn[0],
                *drawn[1],
                _tokens_kept(spec, plan.context_len),
                f"{size:,g}",
                f"{size / source / plan.itemsize():.4g}",
            ]
        if lines and lines[-1][1] == line:
            lines[-1][0].append(index)
        else:
            lines.append(([index], line))
    return [(f"{run[0]}" if len(run) == 1 else f"{run[0]}-{run[-1]}", line) for run, line in lines]


def _tokens_kept(spec: CacheSpec, context_len: int) -> str:
    """The sliding window, or how many tokens how many heads keep."""
    if spec.tokens is None:
        return f"{spec.window or ''}"
    return ", ".join(f"{len(run.heads)} x {run.kept(context_len):,}" for run in spec.tokens.runs)


def print_evaluation(found: Evaluation) -> None:
    """Original and folded side by side."""
    quality_table(found).show(STDOUT)
    STDOUT.print(_difference(found))


def quality_table(found: Evaluation, text: str = "") -> Table:
    """The same as a table; with the name of the text, that and the difference as its title."""
    table = Table(("", "original", "folded"), title=f"On {text}: {_difference(found)}" if text else "")
    table.add("bytes per token", f"{found.base_kv_bytes_per_token:,}", f"{found.kv_bytes_per_token:,}")
    table.add("loss (nats per token)", f"{found.base_loss:.4f}", f"{found.loss:.4f}")
    table.add("perplexity", f"{found.base_perplexity:.3f}", f"{found.perplexity:.3f}")
    return table


def _difference(found: Evaluation) -> str:
    return (
        f"loss change {found.loss_change:+.4f}{plus_minus(found.loss_change_stderr)}, KL {found.kl:.5f} nats per token, top-1"
        f" agreement {found.top1_agreement:.2%}, {found.tokens:,} tokens"
    )


def print_texts(names: Sequence[str], found: Sequence[Evaluation]) -> None:
    """One row per text: what is lost at home, on the first, and what elsewhere."""
    table = Table(("text", "tokens", "loss", "folded", "loss change", "KL", "KL / first", "top-1 agreement"))
    for name, one in zip(names, found, strict=True):
        change = f"{one.loss_change:+.4f}{plus_minus(one.loss_change_stderr)}"
        times = f"{one.kl / found[0].kl:.2f}" if found[0].kl else ""
        elements = [
            f"{one.base_loss:.4f}",
            f"{one.loss:.4f}",
            change,
            f"{one.kl:.5f}",
            times,
            f"{one.top1_agreement:.2%}",
        ]
        table.add(name, f"{one.tokens:,}", *elements)
    table.show(STDOUT)


def print_tasks(rows: Sequence[TaskScore]) -> None:
    """Scores of both models side by side; members of a group that has a score of its own are in the JSON line."""
    table = Table(("task", "metric", "examples", "samples", "original", "folded", "change", "recovery"), left=2)
    tasks = {row.task for row in rows}
    for row in rows:
        if row.part_of not in tasks:
            pairs = [
                _with_error(row.base_score, row.base_stderr),
                _with_error(row.score, row.stderr),
                _with_error(row.score - row.base_score, row.change_stderr, sign="+"),
                _with_error(row.recovery, row.recovery_stderr),
            ]
            table.add(row.task, row.metric, f"{row.num_fewshot}", f"{row.samples:,}", *pairs)
    table.show(STDOUT)
    STDOUT.print("± standard errors; of change and recovery paired by sample, to first order (delta method).")


def print_recall(rows: Sequence[Recall]) -> None:
    """Per length and depth what each model finds; where the original finds nothing, that is said instead of a ratio."""
    table = Table(("length", "depth", "original finds", "folded finds", "without passage", "KL", "gain kept"), left=0)
    for row in rows:
        kept = _with_error(row.kept, row.kept_stderr) if row.recalls else "the original does not recall"
        shares = [f"{share:.1%}" for share in (row.base_accuracy, row.accuracy, row.base_control)]
        table.add(f"{row.length:,}", f"{row.depth:.2f}", *shares, f"{row.kl:.5f}", kept)
    table.show(STDOUT)
    STDOUT.print(
        f"{rows[0].trials} passages each. finds: tokens of a passage that are predicted after its beginning was repeated;"
        " depth 0: it stands first, 1: last."
    )
    for length in sorted({row.length for row in rows if not row.recalls}):
        if not any(row.recalls for row in rows if row.length == length):
            STDOUT.print(
                f"The original does not recall at {length:,} tokens, so recall cannot show there what folding lost."
            )


def print_context(rows: Sequence[Remembered]) -> None:
    """Per length and kind of question what each cache knows."""
    table = Table(("context", "asked for", "original", "folded", "change", "KL"), left=2)
    for row in rows:
        change = _with_error(100 * (row.accuracy - row.base_accuracy), 100 * row.change_stderr, sign="+")
        shares = [f"{share:.1%}" for share in (row.base_accuracy, row.accuracy)]
        table.add(f"{row.context_len:,}", row.kind, *shares, change, _with_error(row.kl, row.kl_stderr))
    table.show(STDOUT)
    for row in rows:
        if row.kind == rows[0].kind:
            STDOUT.print(
                f"{row.sequences} contexts of {row.context_len:,} tokens, after which the cache took"
                f" {row.cache_bytes / 1e6:,.2f} MB (the original's: {row.base_cache_bytes / 1e6:,.2f} MB);"
                f" {row.kv_share:.4g} of the original's in the checkpoint's dtype."
                + (f" A step read {row.share_read:.3g} of its tokens." if row.share_read < 1 else "")
            )
    STDOUT.print("Shares of the expected tokens that are predicted; changes in points.")


def _with_error(value: float, error: float, *, sign: str = "") -> str:
    if math.isnan(value):
        return "-"
    form = ".4f" if abs(value) < 100 else ",.1f"
    return f"{value:{sign}{form}}{plus_minus(error, form)}"


def print_comparison(found: Comparison, out: Path) -> None:
    """The table, with continuations where the terminal is wide enough; table and report are also written to `out`."""
    report = out / "report.html"
    write_text(report, render(found))
    elements = numbers_table(found)
    write_text(out / "table.md", elements.markdown())
    write_text(out / "frontier.svg", SVG + budget_plot(found))
    continued = [("original", found.continuation)] + [(row.preset, row.continuation or row.note) for row in found.rows]
    columns = elements.columns
    lines = [["original", "1.000", *[""] * (len(columns) - 2)], *elements.rows]
    lines = [[cell.partition(" ±")[0] for cell in line] for line in lines]
    title = escape(f"{found.model}, calibrated on {found.calibration}")
    table = RichTable(box=SIMPLE_HEAD, title=title, title_justify="left")
    left = STDOUT.width - 2
    for column, cells_below in zip(columns, zip(*lines, strict=True), strict=True):
        width = max(map(len, [*cells_below, *column.split()]))  # headers wrap at words, numbers never
        table.add_column(column, justify="left" if column == "preset" else "right", width=width)
        left -= width + 3
    wide = left >= LEGIBLE
    if wide:
        table.add_column("continuation", width=left - 3, no_wrap=True, overflow="ellipsis")
    for line, (_, text) in zip(lines, continued, strict=True):
        table.add_row(*line, *([escape(_one_line(text))] if wide else []))
    STDOUT.print(table)
    of_text = f"evaluated on {found.evaluated_on}; prompt: {found.prompt!r}; report: {report}"
    STDOUT.print(of_text, markup=False, highlight=False)
    if not wide:
        for name, text in continued:
            STDOUT.print(f"{name}: {_one_line(text)}", no_wrap=True, overflow="ellipsis", markup=False, highlight=False)
    print_json({"model": found.model, "report": str(report), "rows": [_json_row(row) for row in found.rows]})


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _json_row(row: Any) -> dict[str, Any]:
    found = {"preset": row.preset, "asked_budget": row.asked_budget}
    if not row.evaluation:
        return found | {"note": row.note}
    return found | row.evaluation.to_json() | {"further": [other.to_json() for other in row.further]}

"""Writes what documentation shares with the code: cli.md, presets.md, and what stands between `<!-- generated -->` marks.

python docs/generate.py            # writes
python docs/generate.py --check    # says which page is not what the code says
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import typer.main

from kvfold.cli.main import app
from kvfold.compression.presets import MLKV_PAPER, PRESETS
from kvfold.healing.presets import HEALING_PRESETS
from kvfold.plan.tensors import TENSORS

DOCS = Path(__file__).parent
PACKAGE = DOCS.parent / "kvfold"


def cli() -> str:
    """Every command with its options."""
    group = typer.main.get_command(app)
    lines = ["# Commands", "", "Every command ends with one line of JSON. `kvfold COMMAND --help` says the same."]
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        lines += ["", f"## kvfold {name}", "", command.help or "", "", "| option | |", "|---|---|"]
        lines += [row for parameter in command.params for row in _option(parameter)]
    return "\n".join(lines) + "\n"


def _option(parameter: click.Parameter) -> Iterator[str]:
    if parameter.name != "help" and not getattr(parameter, "hidden", False):
        names = ", ".join((*parameter.opts, *parameter.secondary_opts))
        names = names if parameter.param_type_name == "option" else names.upper()
        told = (getattr(parameter, "help", None) or "").replace("|", "\\|").replace("\n", " ")
        default = parameter.default
        shown = f" (default {default})" if default not in (None, False, "", ()) and not callable(default) else ""
        yield f"| `{names}` | {told}{shown} |"


def presets() -> str:
    """What every preset is."""
    lines = ["# Presets", "", "A preset is a point on the four axes (`kvfold compress --preset NAME`).", ""]
    lines += ["| preset | what it does |", "|---|---|"]
    lines += [f"| `{name}` | {preset.about} |" for name, preset in PRESETS.items() if name not in MLKV_PAPER]
    mlkv = ", ".join(f"`{name}`" for name in MLKV_PAPER)
    lines += [f"| {mlkv} | the configurations of arXiv 2406.09297, for models of 12 layers x 12 heads (Pythia-160M) |"]
    lines += [
        "",
        "`autoencoder` comes with the package in `extras/` of the repository: small networks beside the latents.",
    ]
    lines += ["", "## Healing (`kvfold heal --preset NAME`)", "", "| preset | what it does |", "|---|---|"]
    lines += [f"| `{name}` | {preset.about} |" for name, preset in HEALING_PRESETS.items()]
    return "\n".join(lines) + "\n"


def tensors() -> str:
    """The table of docs/format.md."""
    lines = ["| name | axes | where |", "|---|---|---|"]
    for name, axes, needed in TENSORS:
        words = [f"not {word[1:]}" if word.startswith("!") else word for word in needed.split()]
        lines.append(f"| `{name}` | {f'[{axes}]' if axes else 'the first of its weight'} | {', '.join(words)} |")
    return "\n".join(lines) + "\n"


def rooms() -> str:
    """Every room and its files, by their first sentences."""
    lines = []
    for folder in (PACKAGE, *sorted(p for p in PACKAGE.rglob("*") if (p / "__init__.py").exists())):
        name = folder.relative_to(PACKAGE.parent)
        lines += ["", f"**`{name}/`** {first_line(folder / '__init__.py')}", ""]
        lines += [
            f"- `{file.name}` {first_line(file)}" for file in sorted(folder.glob("*.py")) if file.stem != "__init__"
        ]
    return "\n".join(lines).strip() + "\n"


def first_line(file: Path) -> str:
    """Of its docstring."""
    match = re.match(r'"""(.*?)(?:"""|\n\n)', file.read_text(), re.DOTALL)
    assert match, file
    return " ".join(match[1].split())


def pages() -> dict[Path, str]:
    """What every page has to be."""
    made = {DOCS / "cli.md": cli(), DOCS / "presets.md": presets()}
    for page, table in ((DOCS / "format.md", tensors()), (DOCS / "files.md", rooms())):
        text = page.read_text() if page.exists() else "# Files\n\n<!-- generated -->\n<!-- end -->\n"
        made[page] = re.sub(
            r"(<!-- generated -->\n).*?(<!-- end -->)", lambda m, t=table: f"{m[1]}{t}{m[2]}", text, flags=re.DOTALL
        )
    return made


if __name__ == "__main__":
    stale = [page for page, text in pages().items() if not page.exists() or page.read_text() != text]
    if "--check" in sys.argv:
        sys.exit("".join(f"{page} is not what the code says; run python docs/generate.py\n" for page in stale) or 0)
    for page, text in pages().items():
        page.write_text(text)

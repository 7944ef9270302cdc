"""The command line: one file per command, found by its name. Tables for people, one JSON line last for programs."""

from __future__ import annotations

import importlib
import pkgutil
import sys
import warnings
from typing import Annotated, Any

import typer

import kvfold.cli
from kvfold.errors import KvfoldError
from kvfold.progress import STDERR
from kvfold.version import __version__

FIRST = ("compress", "evaluate", "inspect", "generate", "heal", "bench", "compare", "demo")
"""Their order in the help; others follow by name."""

INTERRUPTED = 130
"""What typer exits with after Ctrl-C."""

app = typer.Typer(
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def kvfold_command(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and stop.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Make the KV cache of a pretrained decoder smaller, and tell the truth about bytes."""


def commands() -> list[str]:
    """Names of the files that hold one, in the order of the help."""
    names = {m.name for m in pkgutil.iter_modules(kvfold.cli.__path__)} - {"__main__", "main", "options"}
    return [*FIRST, *sorted(names - {*FIRST})]


for _name in commands():
    app.command(_name.replace("_", "-"))(importlib.import_module(f"kvfold.cli.{_name}").command)


def main() -> None:
    """Entry point: errors that a user can mend are one line, not a traceback."""
    warnings.showwarning = _show_warning
    try:
        app()
    except KvfoldError as error:
        STDERR.print(f"[bold red]{type(error).__name__}:[/] ", end="")
        STDERR.print(str(error), markup=False, highlight=False)
        sys.exit(1)
    except SystemExit as stop:
        if stop.code == INTERRUPTED:
            STDERR.print(
                "interrupted. compress, compare and heal keep what they have finished: the same command goes on there."
            )
        raise


def _show_warning(message: Any, category: type, *_: Any, **__: Any) -> None:
    STDERR.print("[yellow]warning:[/] ", end="")
    STDERR.print(str(message), markup=False, highlight=False)

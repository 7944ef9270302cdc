"""`kvfold version`."""

from __future__ import annotations


def command() -> None:
    """Show the version."""
    from kvfold.report.tables import print_json
    from kvfold.version import __version__

    print_json({"version": __version__})

"""`kvfold presets`: the methods by name."""

from __future__ import annotations


def command() -> None:
    """List the presets of compress and heal."""
    from kvfold.compression.presets import all_presets
    from kvfold.healing.presets import HEALING_PRESETS
    from kvfold.report.tables import STDOUT, print_json

    compress = all_presets()
    for title, presets in (("compress", compress), ("heal", HEALING_PRESETS)):
        STDOUT.print(f"kvfold {title} --preset", style="bold")
        for name, preset in presets.items():
            STDOUT.print(f"  {name}: {preset.about}", markup=False, highlight=False)
    print_json({"compress": [*compress], "heal": [*HEALING_PRESETS]})

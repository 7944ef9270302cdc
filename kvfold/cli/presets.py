"""`kvfold presets`: the methods by name."""

from __future__ import annotations


def command() -> None:
    """List the presets of compress and heal."""
    from kvfold.compression.presets import PRESETS
    from kvfold.healing.presets import HEALING_PRESETS
    from kvfold.report.tables import STDOUT, print_json

    for title, presets in (("compress", PRESETS), ("heal", HEALING_PRESETS)):
        STDOUT.print(f"kvfold {title} --preset", style="bold")
        for name, preset in presets.items():
            STDOUT.print(f"  {name}: {preset.about}", markup=False, highlight=False)
    print_json({"compress": [*PRESETS], "heal": [*HEALING_PRESETS]})

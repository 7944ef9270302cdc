"""Sizes and hashes of the files of a folder that kvfold wrote: written last, so that whoever copies it can see whether all
arrived."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from kvfold.checkpoint.atomic import write_text
from kvfold.checkpoint.reader import read_json
from kvfold.errors import CheckpointError

FILE = "kvfold_manifest.json"
EDITED = ("README.md",)
"""What people change."""
BYTES_AT_ONCE = 2**20


def write_manifest(folder: Path, without: Sequence[str] = ()) -> None:
    """Of all files that the folder holds."""
    left_out = (FILE, *EDITED, *without)
    names = sorted(file.name for file in folder.iterdir() if file.is_file() and file.name not in left_out)
    files = {name: {"size": (folder / name).stat().st_size, "sha256": sha256(folder / name)} for name in names}
    write_text(folder / FILE, json.dumps({"version": 1, "files": files}, indent=1) + "\n")


def faults(folder: str | Path) -> list[str]:
    """What is not as it was written; nothing where all is. Raises CheckpointError where there is no manifest."""
    path = Path(folder)
    if not (path / FILE).is_file():
        raise CheckpointError(f"{folder} has no {FILE}: an earlier kvfold, or something else, wrote it.")
    files = read_json(path / FILE).get("files")
    if not isinstance(files, dict) or not all(isinstance(facts, dict) for facts in files.values()):
        raise CheckpointError(f"{path / FILE} lists no files; download it again.")
    return [fault for name, facts in files.items() if (fault := _fault(path / Path(name).name, facts))]


def _fault(file: Path, facts: dict[str, object]) -> str | None:
    if not file.is_file():
        return f"{file.name} is missing"
    if (size := file.stat().st_size) != facts.get("size"):
        return f"{file.name} has {size:,} bytes instead of {facts.get('size')}"
    return None if sha256(file) == facts.get("sha256") else f"{file.name} has other bytes than were written"


def sha256(file: Path) -> str:
    """In hexadecimal."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while part := stream.read(BYTES_AT_ONCE):
            digest.update(part)
    return digest.hexdigest()


def check_files(folder: str | Path) -> None:
    """Raise CheckpointError unless every file is as it was written."""
    if found := faults(folder):
        more = f", and {len(found) - 3} more" if len(found) > 3 else ""
        raise CheckpointError(
            f"{folder} is not what kvfold wrote: {'; '.join(found[:3])}{more}. Copy or fold it again."
        )

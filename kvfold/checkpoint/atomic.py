"""Writing files so that a crash or a full disk never leaves a half-written one under its final name."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from kvfold.errors import OutputError

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """A safetensors file that appears under its name only when it is complete. Raises OutputError on a full disk."""
    with _appearing(path) as unfinished:
        save_file(dict(tensors), unfinished, metadata=dict(metadata))
        unfinished.chmod(0o644)  # safetensors makes files that only their owner may read


def write_text(path: Path, text: str) -> None:
    """The same for a text file."""
    with _appearing(path) as unfinished:
        unfinished.write_text(text)


def copy_file(source: Path, path: Path) -> None:
    """The same for a copy."""
    with _appearing(path) as unfinished:
        shutil.copyfile(source, unfinished)


def make_folder(folder: Path) -> None:
    """The folder and its parents. Raises OutputError where that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder} cannot be made: {error.strerror}. Give a place where you may write.") from error


def require_space(folder: Path, needed: int) -> None:
    """Raise OutputError unless the disk under `folder` has `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OutputError(
            f"{folder} has {free / 1e6:,.1f} MB free and what is to be written takes {needed / 1e6:,.1f} MB; free some space"
            " or give another folder."
        )


@contextlib.contextmanager
def _appearing(path: Path) -> Iterator[Path]:
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.unfinished")
    try:
        yield unfinished
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except (OSError, SafetensorError) as error:
        unfinished.unlink(missing_ok=True)
        if getattr(error, "errno", None) in NO_SPACE or "No space left" in str(error):
            raise OutputError(
                f"the disk is full while writing {path}. Free some space and run the same command again: what was"
                " finished is kept and continued."
            ) from error
        raise

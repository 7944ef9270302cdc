"""The folder that a result is written to: what may be replaced, where it grows, and how it gets its name."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch import Tensor

from kvfold.checkpoint.atomic import copy_file, make_folder, write_tensors, write_text
from kvfold.checkpoint.manifest import write_manifest
from kvfold.checkpoint.reader import INDEX, Checkpoint, read_json
from kvfold.checkpoint.remote_code import FILE, class_names, remote_code
from kvfold.checkpoint.tokenizer import load_tokenizer
from kvfold.errors import OutputError
from kvfold.plan.naming import CONFIG_KEY

MARKER = "fold.txt"
EXPORT_MARKER = "kvfold_export.json"
"""In an exported folder, whose config.json says nothing of kvfold."""


def refuse_out(out: Path, overwrite: bool, keep: Sequence[Path]) -> None:
    """Raise OutputError where writing `out` would destroy something (a file, what is in `keep`, a foreign folder), where
    nothing can be written, and where it is a symbolic link, of which nobody can say which end is meant."""
    if not out.name:
        raise OutputError(f"--out {out} is no name of a folder; give another one.")
    if out.is_symlink():
        raise OutputError(
            f"--out {out} is a symbolic link to {os.readlink(out)}; give that folder itself, or another one."
        )
    for path in keep:
        if path.resolve().is_relative_to(out.resolve()):
            raise OutputError(f"--out {out} is or holds {path}, which is needed; give another folder.")
        if path.resolve() in [beside.resolve() for beside in _beside(out)]:
            raise OutputError(
                f"{path} is needed, and is what --out {out} is called while it is written; give another --out."
            )
    if not out.exists():
        place = next(path for path in out.absolute().parents if path.exists())
        if not (place.is_dir() and os.access(place, os.W_OK | os.X_OK)):
            raise OutputError(f"--out {out} cannot be made: {place} takes no new files; give another folder.")
        return
    if not overwrite:
        raise OutputError(f"{out} exists already. Give another --out, or --overwrite to replace it.")
    empty = out.is_dir() and not any(out.iterdir())
    folded = (out / "config.json").exists() and CONFIG_KEY in read_json(out / "config.json")
    if not empty and not folded and not (out / EXPORT_MARKER).exists():
        raise OutputError(f"{out} was not written by kvfold, so --overwrite does not replace it; remove it yourself.")


def _beside(out: Path) -> list[Path]:
    """What a folder is called while it is written, and while it is replaced."""
    return [out.with_name(out.name + end) for end in (".partial", ".replaced")]


def partial_folder(out: Path, identity: str) -> Path:
    """The folder in which the result grows: that of an interrupted run with the same identity, or a new one."""
    partial, _ = _beside(out)
    marker = partial / MARKER
    if not marker.exists() or marker.read_bytes() != identity.encode():
        shutil.rmtree(partial, ignore_errors=True)
        make_folder(partial)
        write_text(marker, identity)
    return partial


@contextmanager
def new_folder(out: Path, identity: str, *, overwrite: bool) -> Iterator[Path]:
    """The folder to write into, which gets its name when all is written. What was interrupted goes on where it was, if
    `identity` (fingerprint.py) is the same. Raises OutputError where another process is writing it."""
    with _alone(out):
        partial = partial_folder(out, identity)
        yield partial
        publish(partial, out, overwrite)


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """As the only process that writes this folder. The system frees the lock of one that dies."""
    file = out.with_name(out.name + ".lock")
    make_folder(file.parent)
    lock = FileLock(file)
    try:
        lock.acquire(timeout=0)
    except OSError as error:
        if isinstance(error, Timeout) and file.exists():
            raise OutputError(
                f"another process is writing {out} ({_read_owner(file)}). Wait for it, or give another --out."
            ) from error
        raise OutputError(f"nothing can be written beside {out} ({error}); give another --out.") from error
    owner = file.with_name(file.name + ".owner")
    try:
        owner.write_text(f"process {os.getpid()} on {socket.gethostname()}")
        yield
    finally:
        owner.unlink(missing_ok=True)
        file.unlink(missing_ok=True)
        lock.release()


def _read_owner(lock: Path) -> str:
    owner = lock.with_name(lock.name + ".owner")
    return owner.read_text() if owner.exists() else "which says no more of itself"


def write_files(folder: Path, files: Mapping[str, str | Mapping[str, Any]], *, beside: Checkpoint | None) -> None:
    """What belongs beside the weights: texts and JSON by file name, and the side files of a checkpoint."""
    for name, content in files.items():
        write_text(folder / name, content if isinstance(content, str) else json.dumps(content, indent=2) + "\n")
    if beside is not None:
        copy_side_files(beside, folder)


def copy_side_files(checkpoint: Checkpoint, folder: Path) -> None:
    """Tokenizer, generation config and licence of a checkpoint.

    AutoTokenizer chooses the class by model type, which a folded model no longer has: its choice is written down.
    """
    for file in checkpoint.side_files():
        copy_file(file, folder / file.name)
    config_file = folder / "tokenizer_config.json"
    if not config_file.exists():
        if (folder / "tokenizer.json").exists():
            load_tokenizer(checkpoint.path).save_pretrained(folder)
        return
    config, chosen = read_json(config_file), type(load_tokenizer(checkpoint.path)).__name__
    if config.get("tokenizer_class") != chosen:
        write_text(config_file, json.dumps(config | {"tokenizer_class": chosen}, indent=2, ensure_ascii=False) + "\n")


def write_weights(folder: Path, shards: Mapping[str, str], read: Callable[[list[str]], Mapping[str, Tensor]]) -> None:
    """Tensors shard by shard. shards: name -> file; read: the tensors of these names."""
    for shard in sorted(set(shards.values())):
        write_tensors(folder / shard, read([name for name in shards if shards[name] == shard]), {"format": "pt"})
    if len(set(shards.values())) > 1:
        write_text(folder / INDEX, json.dumps({"metadata": {}, "weight_map": dict(shards)}, indent=1))


def publish(partial: Path, out: Path, overwrite: bool) -> None:
    """Give the finished folder its name in one step."""
    if out.exists() and not overwrite:
        raise OutputError(f"{out} appeared meanwhile; the finished model is in {partial}, apart from its name.")
    if (names := class_names(read_json(partial / "config.json"))) is not None:
        write_text(partial / FILE, remote_code(*names))
    for leftover in partial.glob("*.unfinished"):
        leftover.unlink()
    write_manifest(partial, without=(MARKER,))
    (partial / MARKER).unlink()
    _, replaced = _beside(out)
    shutil.rmtree(replaced, ignore_errors=True)
    if out.exists():
        out.rename(replaced)
    partial.rename(out)
    shutil.rmtree(replaced, ignore_errors=True)


MAX_SHARD_BYTES = 512 * 1024**2
"""Small shards keep the memory of a fold low: one shard and one layer are in memory at a time."""


def by_name(folders: Iterable[str | Path], taken: Container[str]) -> dict[str, Path]:
    """Folders by their names, or by their paths where a name is taken."""
    found: dict[str, Path] = {}
    for folder in folders:
        whole = Path(folder).resolve()
        found[str(whole) if whole.name in found or whole.name in taken else whole.name] = Path(folder)
    return found

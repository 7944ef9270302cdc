"""A folded model whose cache is plain grouped-query attention -> a GGUF file, by llama.cpp's own converter."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from kvfold.checkpoint.atomic import make_folder
from kvfold.compression.export_gqa import export_gqa
from kvfold.errors import OutputError, RecipeError

CONVERTER = "convert_hf_to_gguf.py"
HOME = "LLAMA_CPP"
"""The variable that names llama.cpp's folder."""


def export_gguf(folder: str | Path, out: str | Path, *, overwrite: bool = False) -> int:
    """Write the file `out`, and return the number of key/value heads of every layer.

    Raises RecipeError where llama.cpp's converter is not installed, PlanError as `export_gqa` does, OutputError where the
    file exists or the converter fails.
    """
    script, file = converter(folder), Path(os.path.abspath(out))
    if file.is_dir():
        raise OutputError(f"{out} is a folder; --out names the file.")
    if file.exists() and not overwrite:
        raise OutputError(f"{out} exists already. Give another --out, or --overwrite to replace it.")
    make_folder(file.parent)
    with tempfile.TemporaryDirectory(prefix=f".{file.name}-", dir=file.parent) as scratch:
        heads, made = export_gqa(folder, Path(scratch) / "stock"), Path(scratch) / file.name
        command = [sys.executable, str(script), str(Path(scratch) / "stock"), "--outfile", str(made)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode or not made.exists():
            said = " ".join((done.stderr or done.stdout).split())[-300:]
            raise OutputError(f"{script} did not write a file: {said or 'it said nothing'}")
        os.replace(made, file)
    return heads


def converter(folder: str | Path) -> Path:
    """llama.cpp's script, on the PATH or in the folder that LLAMA_CPP names. Raises RecipeError that says how it goes by
    hand."""
    if home := os.environ.get(HOME):
        found = Path(home) / CONVERTER
        if found.is_file():
            return found
        raise RecipeError(f"{HOME} is {home}, where there is no {CONVERTER}.")
    if on_path := shutil.which(CONVERTER):
        return Path(on_path)
    raise RecipeError(
        f"{CONVERTER} of llama.cpp is not on the PATH. Name its folder ({HOME}=/path/to/llama.cpp), or go by hand:"
        f" kvfold export {folder} --out STOCK, then python llama.cpp/{CONVERTER} STOCK --outfile OUT.gguf."
    )

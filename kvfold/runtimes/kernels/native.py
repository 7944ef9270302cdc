"""The CPU's own kernels (cpp/*.cpp): compiled when first needed, kept, called through ctypes.

Why: torch's fused kernel reads the cache of a step at a tenth (one query per head) to a quarter of the speed of a copy, this
one at about 0.8 (results/speed-llama2-7b.md). Where there is no compiler, torch's operations serve as before.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

SOURCES = Path(__file__).with_name("cpp")
FLAGS = (
    "-std=c++17",
    "-O3",
    "-march=native",
    "-fno-math-errno",
    "-fno-strict-aliasing",
    "-fopenmp",
    "-fPIC",
    "-shared",
)
SECONDS = 120
"""After which a compiler is given up."""


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernel; None, with one line in the log, where it cannot be made. KVFOLD_NATIVE=0 leaves it out."""
    if os.environ.get("KVFOLD_NATIVE") == "0":
        return None
    try:
        return ctypes.CDLL(str(_compiled()))
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or error
        logging.getLogger(__name__).warning(
            "decoding on this CPU goes without kvfold's own kernel, several times slower: it could not be compiled (%s)."
            " It needs a C++ compiler (g++ 12 or clang; CXX names another one) and a folder for the result (XDG_CACHE_HOME).",
            (str(detail).strip().splitlines() or ["?"])[-1],
        )
        return None


def _compiled() -> Path:
    """The library's file. Raises OSError or SubprocessError."""
    compiler = shlex.split(os.environ.get("CXX") or "c++")
    found = shutil.which(compiler[0])
    if found is None:
        raise OSError(f"there is no {compiler[0]}")
    sources = [file.read_bytes() for file in sorted(SOURCES.glob("*.[ch]*"))]
    facts = (sources, FLAGS, found, compiler, platform.machine(), _processor())
    key = hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
    file = _folder() / f"decode-{key}.so"
    if not file.exists():
        with tempfile.TemporaryDirectory(dir=file.parent) as scratch:  # another process may be compiling it, too
            made = Path(scratch) / file.name
            command = [*compiler, *FLAGS, *map(str, sorted(SOURCES.glob("*.cpp"))), "-o", str(made)]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=SECONDS)
            made.chmod(0o700)
            os.replace(made, file)
    return file


def _folder() -> Path:
    """Where what was compiled is kept: the user's cache, or a folder of this process where there is none that is the user's
    alone. What lies there is code that will run."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvfold"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not is_private(folder):
            folder.chmod(0o700)  # which only its owner may do
        for file in folder.glob("*.so"):
            if not is_private(file):  # somebody else may have written it
                file.unlink()
    except (OSError, RuntimeError):  # no home, or one that is not ours or cannot be written
        return Path(tempfile.mkdtemp(prefix="kvfold-"))
    return folder if os.access(folder, os.W_OK) else Path(tempfile.mkdtemp(prefix="kvfold-"))


def is_private(path: Path) -> bool:
    """Whether nobody but this user (and root) can write there."""
    if not hasattr(os, "getuid"):
        return True
    status = path.stat()
    return status.st_uid in (os.getuid(), 0) and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _processor() -> str:
    """What the compiler makes code for: homes are shared by machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return platform.processor()

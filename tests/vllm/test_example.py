"""The example that serves a folded model and asks it through OpenAI's client."""

import os
import subprocess
import sys
from pathlib import Path

from engines import BIND, free_port

import kvfold
from kvfold.evaluation.demo import MODEL

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_served_and_asked(tmp_path):
    recipe = {"model": str(MODEL), "out": str(tmp_path / "out"), "preset": "int8", "runtime": "vllm"}
    folded = kvfold.compress(recipe, device="cpu")
    paths = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": paths, "VLLM_CPU_KVCACHE_SPACE": "1", BIND: "0"}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "serve_with_vllm.py"), str(folded.out), str(free_port())],
        capture_output=True, text=True, env=environment, check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    expected = kvfold.generate(
        str(folded.out), prompt="The old man looked at the sea and", max_new_tokens=16, device="cpu"
    )
    assert " ".join(expected.text.split()[:6]) in " ".join(done.stdout.split())

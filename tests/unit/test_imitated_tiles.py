"""Products by a processor's tiles, where it has none: the kernels' tests with tiles that are imitated, and watched memory."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from kvfold.runtimes.kernels import native

HERE = Path(__file__).parent
TESTS = (
    "test_turned_queries.py::test_queries_that_are_turned_meet_keys_that_are_not",
    "test_rebuilding.py::test_keys_are_rebuilt_as_torch_rebuilds_them",
    "test_rebuilding.py::test_heads_of_a_prompt_are_those_of_torch",
    "test_rebuilding.py::test_a_layer_is_its_parts",
    "test_rebuilding.py::test_a_part_without_tokens_counts_nothing",
    "test_rebuilding.py::test_values_are_led_back_as_torch_leads_them",
    "test_layer_call.py::test_any_number_of_tokens",
)
JOB = """
import sys
from pathlib import Path
import pytest
from kvfold.runtimes.kernels import native
native._compiled = lambda: Path(sys.argv[1])
assert native.library() is not None
sys.exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", *sys.argv[2:]]))
"""


def multiplies_bfloat16():
    facts = Path("/proc/cpuinfo")
    return facts.exists() and "avx512_bf16" in facts.read_text()


@pytest.mark.parametrize("test", TESTS)
def test_what_tiles_are_tested_by_is_there(test):
    """The test below is rare, and not every processor runs it."""
    file, name = test.split("::")
    assert f"def {name}(" in (HERE / file).read_text()


@pytest.mark.rare
@pytest.mark.skipif(native.library() is None or not multiplies_bfloat16(), reason="tiles come with AVX512-BF16")
def test_kernels_with_tiles(tmp_path):
    compiler = shlex.split(os.environ.get("CXX") or "c++")
    asked = subprocess.run([*compiler, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    watcher, made = asked.stdout.strip(), tmp_path / "kernels.so"
    watched = ("-fsanitize=address",) if os.path.isabs(watcher) else ()
    tiles = ("-O1", "-D__AMX_BF16__", '-DTILES_BY="imitated_tiles.h"', f"-I{HERE}")
    sources = map(str, sorted(native.SOURCES.glob("*.cpp")))
    subprocess.run([*compiler, *native.FLAGS, *tiles, *watched, *sources, "-o", str(made)], check=True, timeout=600)
    done = subprocess.run(
        [sys.executable, "-c", JOB, str(made), *(str(HERE / test) for test in TESTS)],
        env=os.environ | ({"LD_PRELOAD": watcher, "ASAN_OPTIONS": "detect_leaks=0"} if watched else {}),
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

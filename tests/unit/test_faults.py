"""Disks that are full, clocks that jump, processes that die or run side by side: the same bytes in the end, or a refusal."""

import errno
import itertools
import os
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from short_runs import CALIBRATION, digests, started
from tiny import make_tiny, save_tiny

import kvfold
from kvfold.calibration import passes
from kvfold.checkpoint import atomic
from kvfold.checkpoint.manifest import check_files
from kvfold.compression import fold as fold_module
from kvfold.compression.recipe import make_recipe
from kvfold.errors import OutputError
from kvfold.evaluation.demo import MODEL

RECIPES = {
    "auto": {"preset": "auto", "kv_budget": 0.25, "calibration": CALIBRATION | {"seq_len": 160}},
    "observed": {
        "preset": "observed",
        "kv_budget": 0.5,
        "context_len": 256,
        "calibration": CALIBRATION | {"seq_len": 160},
    },
    "int4": {"preset": "int4"},
}
SHORT = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
static long calls;
static size_t half(int file, size_t count) {
  char link[32], path[4096] = "", *folder = getenv("FOLDER");
  snprintf(link, sizeof link, "/proc/self/fd/%d", file);
  if (count < 2 || readlink(link, path, sizeof path - 1) < 0 || strncmp(path, folder, strlen(folder))) return count;
  __atomic_add_fetch(&calls, 1, __ATOMIC_RELAXED);
  return (count + 1) / 2;
}
#define SHORTER(name, data, more, ...)                                             \\
  ssize_t name(int file, data bytes, size_t count more) {                          \\
    static ssize_t (*real)(int, data, size_t more);                                \\
    if (!real) real = (ssize_t(*)(int, data, size_t more))dlsym(RTLD_NEXT, #name); \\
    return real(file, bytes, half(file, count) __VA_ARGS__);                             \\
  }
#define AT , off_t at
SHORTER(read, void *, , )
SHORTER(write, const void *, , )
SHORTER(pread, void *, AT, , at)
SHORTER(pwrite, const void *, AT, , at)
SHORTER(pread64, void *, AT, , at)
SHORTER(pwrite64, const void *, AT, , at)
__attribute__((destructor)) static void say(void) {
  fprintf(stderr, "%ld calls were cut short\\n", calls);
}
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(name, recipe): folds the same model, in many small files."""
    monkeypatch.setattr(fold_module, "MAX_SHARD_BYTES", 60_000)
    monkeypatch.setattr(passes, "SECONDS_BETWEEN_SAVES", 0)
    source = save_tiny(make_tiny("llama_mha"), tmp_path / "source")

    def run(name, recipe):
        fields = {"model": str(source), "out": str(tmp_path / name)} | RECIPES[recipe]
        return kvfold.compress(make_recipe(fields), device="cpu").out

    return run


def parts():
    """Every second recipe by default."""
    return [pytest.param(name, marks=[pytest.mark.rare] * (name == "observed")) for name in RECIPES]


@pytest.mark.parametrize("recipe", parts())
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_every_write_may_fail(run, tmp_path, monkeypatch, recipe, code):
    """A full disk is said; a broken one is its own error. Either way nothing looks finished, and the same call goes on."""
    expected, writes, limit, failures = digests(run("expected", recipe)), [], 0, 0
    fsync = os.fsync

    def failing(descriptor):
        writes.append(descriptor)
        if len(writes) > limit:
            raise OSError(code, os.strerror(code))
        fsync(descriptor)

    monkeypatch.setattr(atomic.os, "fsync", failing)
    while True:
        writes.clear()
        try:
            run("out", recipe)
            break
        except OutputError as error:
            assert code != errno.EIO and "disk is full" in str(error)
        except OSError as error:
            assert error.errno == code == errno.EIO
        failures += 1
        limit += failures % 4 == 0  # several times at the same place, then one further
        assert not (tmp_path / "out").exists() and not list(tmp_path.rglob("*.unfinished"))
    assert failures > 8 and digests(tmp_path / "out") == expected
    check_files(tmp_path / "out")
    left = {path.name for path in tmp_path.iterdir()} - {"expected.run", "out.run"}
    assert left == {"source", "expected", "out"}


@pytest.mark.parametrize("recipe", parts())
def test_clocks_may_jump(run, monkeypatch, recipe):
    """By years, back and forth."""
    expected, real, ticks = digests(run("expected", recipe)), {}, random.Random(0)
    for name in ("time", "monotonic", "perf_counter"):
        real[name] = getattr(time, name)
        monkeypatch.setattr(time, name, lambda name=name: real[name]() + ticks.choice([-1e9, 0, 1e9]))
    found = run("out", recipe)
    monkeypatch.undo()
    assert digests(found) == expected


@pytest.mark.rare
def test_reads_and_writes_may_be_short(tmp_path):
    """The system may do less of a file than it was asked for, at every call: the same bytes, from Python, Rust and C++."""
    model = shutil.copytree(MODEL, tmp_path / "model")
    first = started(tmp_path / "expected", model=model)
    assert first.wait() == 0, first.stderr.read()
    second = started(tmp_path / "out", model=model, environment=halving(tmp_path))
    _, said = second.communicate()
    assert second.returncode == 0, said
    assert int(re.findall(r"(\d+) calls were cut short", said)[-1]) > 100
    assert digests(tmp_path / "out") == digests(tmp_path / "expected")
    check_files(tmp_path / "out")


def halving(folder):
    """An environment in which read, pread, write and pwrite do half of what they are asked with files below a folder."""
    (folder / "short.c").write_text(SHORT)
    command = ["cc", "-shared", "-fPIC", "-O1", "-o", str(folder / "short.so"), str(folder / "short.c"), "-ldl"]
    subprocess.run(command, check=True)
    return {"LD_PRELOAD": str(folder / "short.so"), "FOLDER": str(folder)}


@pytest.mark.rare
def test_two_at_once_share_what_they_gather(tmp_path):
    """The same statistics, into two folders."""
    both = [started(tmp_path / name, "--run-dir", tmp_path / "run") for name in ("first", "second")]
    assert [process.wait() for process in both] == [0, 0], [process.stderr.read() for process in both]
    assert digests(tmp_path / "first") == digests(tmp_path / "second")


@pytest.mark.rare
def test_another_comes_at_every_write(run, tmp_path, monkeypatch):
    """With another recipe, into the same folder: whoever is refused, the folder is wholly the other one's."""
    expected = {recipe: digests(run(f"expected-{recipe}", recipe)) for recipe in ("auto", "int4")}
    fsync, writes, found = os.fsync, [], []

    def disturbed(descriptor):
        writes.append(descriptor)
        if len(writes) == turn:
            found.append(attempt("int4"))
        fsync(descriptor)

    def attempt(recipe):
        try:
            run("out", recipe)
        except OutputError as error:
            assert re.search("another process is writing|exists already|appeared meanwhile", str(error)), error
            return False
        return True

    monkeypatch.setattr(atomic.os, "fsync", disturbed)
    for turn in itertools.count(1):
        writes.clear()
        first = attempt("auto")
        if len(writes) < turn:
            break
        assert first != found[-1], f"write {turn}: {(first, found[-1])}"
        assert digests(tmp_path / "out") == expected["auto" if first else "int4"]
        check_files(tmp_path / "out")
        shutil.rmtree(tmp_path / "out")
        shutil.rmtree(tmp_path / "out.run", ignore_errors=True)
    assert {True, False} == set(found), "it came before the folder was begun, and after"


@pytest.mark.rare
@pytest.mark.long
@pytest.mark.parametrize("delay", [0.0, 0.5, 2.0])
def test_two_at_once_into_one_folder(tmp_path, delay):
    """One makes it, the other is refused or finds it made."""
    first = started(tmp_path / "out", "--run-dir", tmp_path / "run")
    time.sleep(delay)
    second = started(tmp_path / "out", "--run-dir", tmp_path / "run")
    codes, said = [first.wait(), second.wait()], first.stderr.read() + second.stderr.read()
    assert sorted(codes) == [0, 1] and (
        "another process" in said or "exists already" in said or "appeared meanwhile" in said
    )
    assert "Traceback" not in said
    check_files(tmp_path / "out")


@pytest.mark.rare
@pytest.mark.long
def test_killed_at_any_time(tmp_path):
    """SIGKILL at random moments of a run, again and again, then once to the end."""
    generator, killed = random.Random(int(time.time())), 0
    fresh = started(tmp_path / "fresh")
    before = time.time()
    assert fresh.wait() == 0
    whole = time.time() - before
    while killed < 8:
        process, pause = started(tmp_path / "out", "--run-dir", tmp_path / "run"), generator.uniform(0.3, 0.95) * whole
        try:
            process.wait(pause)
            break
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            killed += 1
            assert not (tmp_path / "out").exists() or check_files(tmp_path / "out") is None, f"killed after {pause} s"
    if not (tmp_path / "out").exists():
        assert started(tmp_path / "out", "--run-dir", tmp_path / "run").wait() == 0
    assert digests(tmp_path / "out") == digests(tmp_path / "fresh")
    assert not list(Path(tmp_path).glob("out.partial"))

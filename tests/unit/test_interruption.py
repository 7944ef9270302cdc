"""A run that is interrupted anywhere loses nothing, and the same command goes on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from short_runs import CALIBRATION, compress, copy_tokenizer, digests, started

from kvfold.calibration import passes
from kvfold.checkpoint import atomic as storage
from kvfold.compression import fold as fold_module
from kvfold.errors import OutputError


@pytest.mark.parametrize("method", ["svd_a", "fisher"])
def test_interrupted_anywhere_continues_with_the_same_result(source, monkeypatch, method):
    """The process dies at every write in turn; each time the same command goes on, and the result is the same."""
    monkeypatch.setattr(fold_module, "MAX_SHARD_BYTES", 60_000)
    monkeypatch.setattr(passes, "SECONDS_BETWEEN_SAVES", 0)
    options = {"method": method, "calibration": {"data": "self", "num_samples": 4, "seq_len": 32}}
    expected = digests(compress(source, source.parent / "expected", **options).out)
    out, replace, writes = source.parent / "out", os.replace, []

    class Killed(BaseException):
        pass

    def dying(a, b):
        if len(writes) >= limit:
            raise Killed
        writes.append(Path(b).name)
        replace(a, b)

    monkeypatch.setattr(storage.os, "replace", dying)
    limit, deaths = 1, 0
    while True:
        writes.clear()
        try:
            compress(source, out, **options)
            break
        except Killed:
            deaths += 1
            assert not out.exists()
            limit += 1 if not deaths % 3 else 0
    assert deaths > 10
    assert digests(out) == expected
    assert not out.with_name("out.partial").exists()


def test_other_text_after_an_interruption_starts_anew(source, monkeypatch):
    """The plan is the same, the bases are not: what the first text left must not be mixed in."""
    monkeypatch.setattr(fold_module, "MAX_SHARD_BYTES", 60_000)
    copy_tokenizer(source)
    text, out = source.parent / "text.txt", source.parent / "out"
    options = {"method": "svd_a", "calibration": CALIBRATION | {"data": str(text)}}
    text.write_text(" ".join(f"t{i * 7 % 200}" for i in range(3000)))
    monkeypatch.setattr(passes, "SECONDS_BETWEEN_SAVES", 0)
    with monkeypatch.context() as patch:
        patch.setattr("kvfold.compression.compress._complete", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            compress(source, out, **options)
    assert len(list(source.parent.glob("out.partial/*.safetensors"))) > 4
    text.write_text(" ".join(f"t{i * 13 % 190}" for i in range(3000)))
    compress(source, out, **options)
    assert digests(out) == digests(compress(source, source.parent / "fresh", **options).out)


def test_kill_9_and_again(tmp_path):
    """A real SIGKILL while the packaged model is being folded."""
    options = {"samples": "8", "tokens": "128"}
    killed = started(tmp_path / "out", **options)
    deadline = time.time() + 120
    while not list((tmp_path / "out.run").glob("statistics-*/layer-00001*.safetensors")) and time.time() < deadline:
        time.sleep(0.002)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "out").exists()
    for name in ("out", "fresh"):
        process = started(tmp_path / name, **options)
        assert process.wait() == 0, process.stderr.read()
    assert digests(tmp_path / "out") == digests(tmp_path / "fresh")


def test_two_runs_into_one_folder(source, monkeypatch):
    """The second is refused while the first writes, whatever it would write; one that died is in nobody's way."""
    out = source.parent / "out"
    script = f"""
import time
from pathlib import Path
from kvfold.checkpoint.folder import new_folder
with new_folder(Path({str(out)!r}), "other", overwrite=False) as partial:
    print("writing", flush=True)
    time.sleep(60)
"""
    other = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "writing\n"
    with pytest.raises(OutputError, match=f"another process is writing .*out .process {other.pid} on "):
        compress(source, out, method="svd_w")
    other.kill()
    other.wait()
    compress(source, out, method="svd_w")
    left = {path.name for path in source.parent.iterdir()}
    assert out.exists() and not left & {"out.lock", "out.lock.owner", "out.partial"}

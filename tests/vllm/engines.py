"""Engines in processes of their own, and what they have to give."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import torch
from tiny import VOCAB, load

ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"}
BIND = "VLLM_CPU_OMP_THREADS_BIND"
"""The cores of each process of an engine."""


def prompts():
    """The last two begin with the same tokens."""

    def tokens(count, seed):
        return torch.randint(3, VOCAB, (count,), generator=torch.Generator().manual_seed(seed)).tolist()

    return [tokens(3, 1), tokens(50, 2), tokens(140, 3), [*tokens(140, 3), 7, 8]]


def job(folder, rows=None, gpu=False, **options):
    """`rows`: where to write what was read from pages of bytes. gpu: short prompts by its kernels."""
    asked = prompts()[:2] if gpu else prompts()
    return {"folder": str(folder), "prompts": asked, "options": options, "rows": rows and str(rows), "gpu": gpu}


def serve(root, jobs, **environment):
    """What serve_jobs.py says of every job."""
    (root / "jobs.json").write_text(json.dumps(jobs))
    script = Path(__file__).with_name("serve_jobs.py")
    command = [sys.executable, str(script), str(root / "jobs.json"), str(root / "out.json")]
    done = subprocess.run(command, env=os.environ | ENVIRONMENT | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads((root / "out.json").read_text())


def assert_same_tokens(found, folder, close=2e-3):
    """Those of transformers, and their log-probabilities, up to two tokens that are as likely but for `close`."""
    model = load(folder, dtype=torch.float32)
    for place, prompt in enumerate(prompts()[: len(found["rounds"][0])]):
        tokens = len(found["rounds"][0][place]["tokens"])
        out = model.generate(
            torch.tensor([prompt]), max_new_tokens=tokens, do_sample=False, output_scores=True,
            return_dict_in_generate=True, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        expected = out.sequences[0, len(prompt) :].tolist()
        likeliest_T2 = torch.stack([score[0].log_softmax(-1).topk(2).values for score in out.scores])
        log_probs, ahead = likeliest_T2[:, 0].tolist(), -likeliest_T2.diff(dim=1)[:, 0]
        for one in (served[place] for served in found["rounds"]):
            other = [i for i, (a, b) in enumerate(zip(one["tokens"], expected, strict=True)) if a != b]
            same = other[0] if other else tokens
            assert not other or ahead[same] <= close, f"token {same} is another one, ahead by {ahead[same]:.2g}"
            compared = zip(one["log_probs"][:same], log_probs[:same], strict=True)
            off = max((abs(a - b) for a, b in compared), default=0.0)
            assert off <= close, f"log-probabilities are off by {off:.2g}"


def free_port():
    """Of this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def wait_for(server, port, log):
    """Until the server says that it is there."""
    deadline = time.monotonic() + 600  # kernels are compiled first, and others may work on the same cores
    while True:
        assert server.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
            return
        except OSError:
            time.sleep(1)

"""vLLM's server with a folded model: requests that are wrong, left alone or many at once change no token and leak no page."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
from engines import BIND, ENVIRONMENT, free_port, wait_for

import kvfold
from kvfold.evaluation.demo import MODEL

OPTIONS = ["--max-model-len", "192", "--block-size", "16", "--max-num-seqs", "8"]
OPTIONS += ["--gpu-memory-utilization", "0.2"]  # of which it asks how much is free, on a CPU too
OPTIONS += ["--dtype", "float32"]  # in bfloat16 what runs beside a request decides between equals
PROMPTS = [f"{beginning} {number}" for number in range(5) for beginning in ("The old man", "In the year", "She said")]
PLANS = [
    pytest.param(({"preset": "int8", "runtime": "vllm"}, 40), id="int8"),
    pytest.param(({"preset": "auto", "runtime": "vllm", "kv_budget": 0.25}, 150), id="auto", marks=pytest.mark.rare),
]
"""And blocks of the cache, enough for three requests: one of `auto` takes more of them, as layers have their own."""


class Server:
    """One that runs, and what it answers."""

    def __init__(self, folder, log, blocks):
        self.folder, self.port = str(folder), free_port()
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", self.folder]
        command += ["--port", str(self.port), "--num-gpu-blocks-override", str(blocks)]
        environment = {**os.environ, **ENVIRONMENT, BIND: "0"}
        with log.open("w") as said:
            self.process = subprocess.Popen(
                [*command, *OPTIONS], env=environment, stdout=said, stderr=subprocess.STDOUT
            )
        wait_for(self.process, self.port, log)

    def url(self, path):
        return f"http://localhost:{self.port}{path}"

    def get(self, path):
        try:
            with urllib.request.urlopen(self.url(path), timeout=5) as answer:
                return answer.status
        except OSError:
            return None

    def post(self, body, raw=False, timeout=300):
        """(status, what was answered)."""
        data = body if raw else json.dumps({"model": self.folder, "temperature": 0} | body).encode()
        request = urllib.request.Request(self.url("/v1/completions"), data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def text(self, prompt, tokens=24):
        status, answer = self.post({"prompt": prompt, "max_tokens": tokens})
        assert status == 200, answer
        return answer["choices"][0]["text"]

    def leave(self, prompt):
        """Ask for a stream and go after its first bytes."""
        body = json.dumps({"model": self.folder, "prompt": prompt, "max_tokens": 150, "stream": True}).encode()
        head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(body)}\r\n\r\n"
        with socket.create_connection(("localhost", self.port), timeout=60) as connection:
            connection.sendall(head.encode() + body)
            connection.recv(64)

    def used_pages(self):
        """Of the cache, as a share."""
        with urllib.request.urlopen(self.url("/metrics"), timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        found = [float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("vllm:kv_cache_usage_perc")]
        assert found, "vLLM says how much of its cache is used"
        return max(found)


@pytest.fixture(scope="module", params=PLANS)
def server(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("served")
    calibration = {"data": "self", "num_samples": 4, "seq_len": 256}
    recipe, blocks = request.param
    fields = {"model": str(MODEL), "out": str(root / "out"), "calibration": calibration} | recipe
    folder = kvfold.compress(fields, device="cpu").out
    running = Server(folder, root / "log.txt", blocks)
    yield running
    running.process.terminate()
    running.process.wait(60)


def idle(server):
    """Whether it comes to rest with an empty cache."""
    for _ in range(60):
        if server.used_pages() == 0:
            return True
        time.sleep(0.5)
    return False


def test_wrong_requests_are_refused(server):
    """By a status of 400 and more, one after the other; then it answers as before."""
    before = server.text(PROMPTS[0])
    wrong = [
        {"prompt": "x" * 100_000}, {"prompt": PROMPTS[0], "max_tokens": -1}, {"prompt": PROMPTS[0], "max_tokens": 10**9},
        {"prompt": PROMPTS[0], "temperature": -1}, {"prompt": [10**9]}, {"prompt": [-1]}, {"prompt": {"a": 1}},
        {"prompt": []}, {"prompt": PROMPTS[0], "n": -1}, {"prompt": PROMPTS[0], "top_p": 7},
        {"prompt": PROMPTS[0], "model": "another"},
    ]  # fmt: skip
    for body in wrong:
        status, answer = server.post(body)
        assert 400 <= status < 500, (body, status, answer)
    for raw in (b"", b"{", b"[]", b"\xff\xfe", b"[" * 10_000):
        assert 400 <= server.post(raw, raw=True)[0] < 500
    assert server.get("/health") == 200 and server.text(PROMPTS[0]) == before and idle(server)


def test_streams_that_are_left_leave_nothing(server):
    before = [server.text(prompt) for prompt in PROMPTS[:3]]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(server.leave, PROMPTS * 2))
    assert idle(server) and [server.text(prompt) for prompt in PROMPTS[:3]] == before


@pytest.mark.parametrize("count", [60, pytest.param(500, marks=pytest.mark.rare)])
def test_many_at_once_say_what_each_says_alone(server, count):
    """More than the cache holds: some wait, some are put aside and come again."""
    alone = {prompt: server.text(prompt, 100) for prompt in PROMPTS}
    asked = [PROMPTS[n % len(PROMPTS)] for n in range(count)]
    with ThreadPoolExecutor(count) as threads:
        found = list(threads.map(lambda prompt: server.text(prompt, 100), asked))
    wrong = [(prompt, text, alone[prompt]) for prompt, text in zip(asked, found, strict=True) if text != alone[prompt]]
    assert not wrong, wrong[:2]
    assert idle(server)

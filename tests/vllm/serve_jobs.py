"""Serve folders one after the other in this process and write what came out: python serve_jobs.py JOBS.json OUT.json."""

import functools
import json
import os
import sys

from safetensors.torch import save_file

sys.path.append(os.path.join(os.path.dirname(__file__), ".."))
os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


def serve(folder, prompts, options, rows=None, gpu=False, reload=None):
    """rows: where to write what the last prompt's first layer-by-layer reading found in its pages, if that is wanted. gpu: by
    its kernels, interpreted. reload: a folder whose weights it gets once it has answered, after a sleep."""
    from vllm import LLM, SamplingParams

    calls = by_gpu() if gpu else []

    llm = LLM(
        folder,
        dtype="float32",
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=256,
        kv_cache_memory_bytes=2**26,
        disable_log_stats="speculative_config" not in options,
        **options,
    )
    read = recorded(len(prompts[-1])) if rows else {}
    left_out = pages_left_out()
    left_out.clear()
    sampling = SamplingParams(max_tokens=4 if gpu else 16, temperature=0, logprobs=1, ignore_eos=True, detokenize=False)
    rounds = []
    if reload:
        llm.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)
        llm.apply_model(sleep)
        llm.collective_rpc("reload_weights", kwargs={"weights_path": reload})
        llm.reset_prefix_cache()
    for _ in range(2):  # the second finds its prompts in the prefix cache
        done = llm.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)
        rounds.append([described(one) for one in done])
    if rows:
        save_file(read, rows)
    cache = llm.llm_engine.vllm_config.cache_config
    sizes = {"cache_tokens": cache.num_gpu_blocks * cache.block_size, "blocks": cache.num_gpu_blocks}
    return {"rounds": rounds, "calls": len(calls), "left_out": sum(left_out), **sizes, **drafted(llm, options)}


@functools.cache
def pages_left_out():
    """A list that fills with how many pages of prompts' recent tokens stand for none, of each request and step."""
    from kvfold.runtimes.vllm.recent_pages import RecentManager

    found, allocate = [], RecentManager.allocate_new_blocks

    def watched(self, *args):
        new = allocate(self, *args)
        found.append(sum(block.is_null for block in new))
        return new

    RecentManager.allocate_new_blocks = watched
    return found


def drafted(llm, options):
    """Tokens that were drafted and that were right."""
    if "speculative_config" not in options:
        return {}
    counted = {metric.name: getattr(metric, "value", None) for metric in llm.get_metrics()}
    return {name: counted[f"vllm:spec_decode_num_{name}_tokens"] for name in ("draft", "accepted")}


def by_gpu():
    from gpu_kernels import ask_gpu

    from kvfold.runtimes.vllm import packed_attention, reading

    for module in (packed_attention, reading):
        module.reads_in_place = lambda *args: True
    return ask_gpu(setattr)


def sleep(model):
    """What the second level of vLLM's sleep leaves, which a CPU has not: buffers, as they were."""
    saved = {name: buffer.clone() for name, buffer in model.named_buffers()}
    for module in model.modules():
        for made in filter(None, (getattr(module, "tables", None), getattr(module, "read_tables", None))):
            for table in (made.cos_Sr, made.sin_Sr):
                table.fill_(7.0)
        if getattr(module, "slopes_N", None) is not None:
            module.slopes_N.fill_(7.0)
    for name, buffer in model.named_buffers():
        buffer.copy_(saved[name])


def recorded(length):
    """A dictionary that fills with the bytes [heads, tokens, bytes] that layers read of a prompt of this length."""
    from kvfold.runtimes.vllm.packed_attention import PackedFoldedAttention

    found, read = {}, PackedFoldedAttention.read

    def watched(self, q, far, batch, place, out=None):
        own = self.owner == self.layer_idx
        if batch.lengths == [length] and own and f"{self.owner}.k" not in found:
            for name, side in zip("kv", self._tokens(self.owner, far, batch, place), strict=True):
                found[f"{self.owner}.{name}"] = getattr(side, "far", side).rows[0].clone()
                if hasattr(side, "near"):
                    found[f"{self.owner}.{name}.recent"] = side.near.rows[0].clone()
        return read(self, q, far, batch, place, out)

    PackedFoldedAttention.read = watched
    return found


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
            found[name] = serve(**job)
        except Exception as error:
            found[name] = {"error": f"{type(error).__name__}: {error}"}
    with open(sys.argv[2], "w") as file:
        json.dump(found, file)

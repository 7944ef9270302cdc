"""Folded models ask the GPU's kernels, which Triton's interpreter runs where there is no GPU."""

import importlib

from kvfold.runtimes.kernels import cpu_decode, gpu_decode

ASKING = ("kernels.attention", "kernels.aged_kernels", "transformers.on_read", "vllm.reading")
LEADING_BACK = ("transformers.attention", "transformers.attention_by_age", "vllm.reading")


def ask_gpu(replace, *, vllm=False):
    """replace(object, name, value), as `setattr` does. The list of what the kernels were called with."""
    calls, decode_part = [], gpu_decode.decode_part

    def noted(*args, **options):
        calls.append(options)
        return decode_part(*args, **options)

    def serves(q, *sides):
        return all(gpu_decode._is_known(part, q) for side in sides for part in gpu_decode._parts(side))

    for names, name, value in (
        (ASKING, "kernels_for", lambda q: gpu_decode),
        (LEADING_BACK, "value_map", lambda *args: None),
    ):
        for module in names if vllm else names[:-1]:
            replace(importlib.import_module(f"kvfold.runtimes.{module}"), name, value)
    replace(gpu_decode, "serves", serves)
    replace(gpu_decode, "decode_part", noted)
    replace(cpu_decode, "serves", lambda *args: False)
    return calls

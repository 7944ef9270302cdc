"""Folded models ask the GPU's kernels, which Triton's interpreter runs where there is no GPU."""

import sys

from kvfold.runtimes.kernels import cpu_decode, gpu_decode
from kvfold.runtimes.kernels.packed_tokens import parts_of


def ask_gpu(replace):
    """replace(object, name, value), as `setattr` does, in every module that is loaded. The list of what the kernels were
    called with."""
    calls, decode_part = [], gpu_decode.decode_part

    def noted(*args, **options):
        calls.append(options)
        return decode_part(*args, **options)

    def serves(q, *sides):
        return all(gpu_decode._is_known(part, q) for side in sides for part in parts_of(side))

    asking = [module for name, module in sys.modules.items() if name.startswith("kvfold.runtimes.")]
    for name, value in (("kernels_for", lambda q: gpu_decode), ("value_map", lambda *args: None)):
        for module in asking:
            if name in vars(module):
                replace(module, name, value)
    replace(gpu_decode, "serves", serves)
    replace(gpu_decode, "decode_part", noted)
    replace(cpu_decode, "serves", lambda *args: False)
    return calls

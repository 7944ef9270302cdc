"""Numbers -> packed rows, by the device's kernel where there is one: torch's operations take dozens of calls per tier."""

from __future__ import annotations

from torch import Tensor

from kvfold.plan.number_format import NumberFormat
from kvfold.runtimes.kernels import codec as quantize
from kvfold.runtimes.kernels import cpu as native
from kvfold.runtimes.kernels import gpu
from kvfold.runtimes.kernels.packed_tokens import recorded


def pack(x_BCTR: Tensor, form: NumberFormat) -> Tensor:
    """As `quantize.pack`: equal but for scales whose errors differ by a rounding."""
    x = x_BCTR.detach()
    if form.scales == "exponent" and x.numel() and not recorded(x):
        if native.packs(x):
            return native.pack(x, form)
        if gpu.works_for(x):
            from kvfold.runtimes.kernels import triton_kernels as kernels

            return kernels.pack(x, form)
    return quantize.pack(x, form)

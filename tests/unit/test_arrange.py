"""The basis in which latents are quantized, and what the allocator expects it to lose."""

import numpy as np
import pytest
import torch

from kvfold.linalg.quantization_basis import arranged
from kvfold.linalg.reduced_rank import Latents, Term
from kvfold.methods.bits.base import shared_energy
from kvfold.plan.codecs.base import NOISE, SIZES
from kvfold.plan.number_format import NumberFormat
from kvfold.runtimes.kernels.codec import roundtrip


@pytest.mark.parametrize("tiers", [((64, 4),), ((8, 5), (24, 3), (32, 2))], ids=str)
@pytest.mark.parametrize("decay", [0.02, 0.3, 1.0], ids="{:g} per number".format)
def test_arranged_latents_lose_what_is_expected(tiers, decay):
    """Normal numbers of a steep spectrum, in a random basis, through arranged latents of full width."""
    torch.manual_seed(0)
    spectrum = torch.exp(-decay * torch.arange(64.0, dtype=torch.float64))
    basis = torch.linalg.qr(torch.randn(64, 64, dtype=torch.float64))[0]
    covariance_FF = (basis * spectrum) @ basis.T
    format = NumberFormat(tiers=tiers)
    plain = Latents(torch.eye(64, dtype=torch.float64)[None], lambda position: torch.eye(64, dtype=torch.float64)[None])
    latents = arranged(plain, lambda position: Term(covariance_FF, covariance_FF, None), 1, covariance_FF, format)

    x = torch.randn(20_000, 64, dtype=torch.float64) * spectrum.sqrt() @ basis.T
    stored = roundtrip((x @ latents.a_CRF[0].T)[None, None], format)[0, 0]
    lost = float((stored @ latents.back(0)[0].T - x).square().sum(-1).mean())

    ends = np.cumsum([elements for elements, _ in tiers])
    energies = shared_energy(spectrum.tolist(), np.array([0, *ends[:-1]]), ends)
    shares = [np.interp(elements, SIZES, NOISE[bits]) for elements, bits in tiers]
    assert lost == pytest.approx(float(energies @ shares), rel=0.2)
    assert all(
        energies <= [float(spectrum[end - n : end].sum()) * 1.3 for end, (n, _) in zip(ends, tiers, strict=True)]
    )

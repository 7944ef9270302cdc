"""Packed numbers that kernels are tried with: formats, tokens in one piece and in pages, what is in them; numbers to pack."""

import torch

from kvfold.plan.codecs._codes import BITS
from kvfold.plan.number_format import NumberFormat
from kvfold.runtimes.kernels.codec import pack, unpack
from kvfold.runtimes.kernels.packed_tokens import PackedTokens, PagedTokens, SideBySide

FORMS = {
    **{f"{bits}_bits": NumberFormat(tiers=((64, bits),)) for bits in BITS},
    "odd": NumberFormat(tiers=((13, 3),)),
    "tiers": NumberFormat(tiers=((24, 8), (40, 5), (71, 3), (130, 1))),
    "float8": NumberFormat(tiers=((77, 8),), scales="float8"),
}


def numbers(*shape, seed=0):
    """The same for the same seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def distance(found, wanted):
    """Relative, as a root of a sum of squares."""
    return (found.double() - wanted).norm() / wanted.norm()


def numbers_of(stored):
    """[B, C, S, R] in float64, as a cache would give them back."""
    if isinstance(stored, SideBySide):
        return torch.cat([numbers_of(part) for part in stored.parts], dim=3)
    return stored.double() if isinstance(stored, torch.Tensor) else unpack(stored.rows, stored.format, torch.float64)


def packed(B, C, S, dtype, format):
    return PackedTokens(pack(torch.randn(B, C, S, format.width).to(dtype), format), format, dtype)


def heads(numbers_BCSR, weight_CFR, offset_CF, head_dim):
    """[B, K, S, H] of the source, step by step."""
    x = torch.einsum("bcsr,cfr->bcsf", numbers_BCSR, weight_CFR.double())
    x = x if offset_CF is None else x + offset_CF.double()[:, None]
    return x.unflatten(3, (-1, head_dim)).transpose(2, 3).flatten(1, 2)


def in_pages(stored, lengths, page_tokens, odd):
    """The tokens of sequences at random places of pages, at odd addresses, beside bytes that are no numbers."""
    rows = stored.rows if isinstance(stored, PackedTokens) else stored.contiguous().view(torch.uint8)
    B, C, _, row_bytes = rows.shape
    pages = -(-max(lengths) // page_tokens)
    memory = torch.full((B * pages + 3, odd + C * page_tokens * row_bytes + 7), 0xFF, dtype=torch.uint8)
    region = memory.as_strided(
        (len(memory), C, page_tokens, row_bytes), (memory.shape[1], page_tokens * row_bytes, row_bytes, 1), odd
    )
    tables_Bp = torch.randperm(len(memory))[: B * pages].view(B, pages).to(torch.int32)
    for row, length in enumerate(lengths):
        for token in range(length):
            region[tables_Bp[row, token // page_tokens], :, token % page_tokens] = rows[row, :, token]
    format = stored.format if isinstance(stored, PackedTokens) else None
    return PagedTokens(region, format, stored.dtype, tables_Bp)

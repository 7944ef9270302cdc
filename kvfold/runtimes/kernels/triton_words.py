"""Packed numbers on a GPU by Triton as products take them: whole words are loaded, of rows at any address, and taken apart in
registers.

A byte by itself takes as many instructions to load as four. Triton's interpreter runs the same on a CPU, in the tests.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""The interpreter cannot multiply matrices of bfloat16, and knows no machine code."""


@triton.jit
def words_at(rows, at, last, COUNT: tl.constexpr):
    """[TOKENS, COUNT] words of 32 bits from byte `at` on of rows [TOKENS] of bytes at any address; behind the word of a row's
    `last` byte that one again."""
    start = rows.to(tl.int64)
    aligned = (start & -4).to(tl.pointer_type(tl.uint32))
    begin = (start & 3).to(tl.int32) + at
    word = (begin >> 2)[:, None] + tl.arange(0, COUNT)[None, :]
    end = (((start & 3).to(tl.int32) + last) >> 2)[:, None]
    low = tl.load(aligned[:, None] + tl.max_contiguous(tl.minimum(word, end), (1, COUNT)))
    high = tl.load(aligned[:, None] + tl.max_contiguous(tl.minimum(word + 1, end), (1, COUNT)))
    shift = ((begin & 3) * 8).to(tl.uint32)[:, None]
    return (low >> shift) | ((high << 1) << (31 - shift))  # one instruction, which knows shifts by 32


@triton.jit
def _halves(x, BITS: tl.constexpr, TOKENS: tl.constexpr, COUNT: tl.constexpr):
    """Integers of 2 BITS bits as twice as many, the low half first: [TOKENS, COUNT]."""
    return tl.reshape(tl.join(x & ((1 << BITS) - 1), x >> BITS), (TOKENS, COUNT))


@triton.jit
def _integers(word, BITS: tl.constexpr, TOKENS: tl.constexpr, COUNT: tl.constexpr):
    """Words as COUNT integers of so many bits."""
    x = _halves(word, 16, TOKENS, COUNT * BITS // 16)
    if BITS < 16:
        x = _halves(x, 8, TOKENS, COUNT * BITS // 8)
    if BITS < 8:
        x = _halves(x, 4, TOKENS, COUNT * BITS // 4)
    if BITS < 4:
        x = _halves(x, 2, TOKENS, COUNT * BITS // 2)
    if BITS < 2:
        x = _halves(x, 1, TOKENS, COUNT)
    return x


@triton.jit
def _float8(byte):
    """e4m3."""
    normal = (((byte & 0x7F) << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    size = tl.where((byte & 0x78) != 0, normal, (byte & 7).to(tl.float32) / 512)
    return tl.where((byte & 0x80) != 0, -size, size)


@triton.jit
def _pairs(x, BITS: tl.constexpr, TOKENS: tl.constexpr, NUMBERS: tl.constexpr, BY_WORDS: tl.constexpr):
    """Two codes each -> bfloat16 numbers around zero. 64 + code is exact there, its code one bit above the lowest, and so is
    the half of the largest code that is taken off; both of a pair at once, times 1, since adding alone needs an H100."""
    CODE: tl.constexpr = (1 << BITS) - 1
    x = ((x << 1) | (x << (17 - BITS))) & (CODE << 1 | CODE << 17) | 0x42804280
    if BY_WORDS:
        if BITS == 4:
            x = tl.inline_asm_elementwise(
                "{.reg .b32 a, c; mov.b32 a, 0x3F803F80; mov.b32 c, 0xC28FC28F; fma.rn.bf16x2 $0, $1, a, c;}",
                "=r,r",
                [x],
                tl.uint32,
                True,
                1,
            )
        elif BITS == 2:
            x = tl.inline_asm_elementwise(
                "{.reg .b32 a, c; mov.b32 a, 0x3F803F80; mov.b32 c, 0xC283C283; fma.rn.bf16x2 $0, $1, a, c;}",
                "=r,r",
                [x],
                tl.uint32,
                True,
                1,
            )
        else:
            x = tl.inline_asm_elementwise(
                "{.reg .b32 a, c; mov.b32 a, 0x3F803F80; mov.b32 c, 0xC281C281; fma.rn.bf16x2 $0, $1, a, c;}",
                "=r,r",
                [x],
                tl.uint32,
                True,
                1,
            )
    x = tl.reshape(tl.join(x.to(tl.uint16), (x >> 16).to(tl.uint16)), (TOKENS, NUMBERS)).to(tl.bfloat16, bitcast=True)
    if not BY_WORDS:
        x = x.to(tl.float32) - (64 + CODE / 2)
    return x


@triton.jit
def numbers_of(
    word, BITS: tl.constexpr, FLOAT8: tl.constexpr, HALF: tl.constexpr, TOKENS: tl.constexpr, NUMBERS: tl.constexpr,
    BY_WORDS: tl.constexpr,
):  # fmt: skip
    """Words of a plane of bits [TOKENS, NUMBERS * BITS / 32] -> its codes around zero, or what e4m3 means [TOKENS, NUMBERS]:
    HALF in bfloat16, otherwise in float32."""
    if FLOAT8:
        found = _float8(_integers(word, 8, TOKENS, NUMBERS).to(tl.int32))
    elif HALF and BITS < 8:
        found = _pairs(_integers(word, 2 * BITS, TOKENS, NUMBERS // 2), BITS, TOKENS, NUMBERS, BY_WORDS)
    else:  # 2^22 + code, whose lowest bit is a half
        code = (_integers(word, BITS, TOKENS, NUMBERS) << 1) | 0x4A800000
        found = code.to(tl.float32, bitcast=True) - (4194304 + ((1 << BITS) - 1) / 2)
    return found.to(tl.bfloat16) if HALF and BY_WORDS else found.to(tl.float32)

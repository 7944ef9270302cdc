"""The GPU's products with packed numbers, by Triton's interpreter where there is no GPU, are those of unpacked ones."""

import os
import subprocess
import sys

import pytest
import torch
from packed_forms import FORMS, distance

from kvfold.runtimes.kernels import gpu
from kvfold.runtimes.kernels.codec import pack, unpack

pytest.importorskip("triton")  # for Linux only

from kvfold.runtimes.kernels import aged_attention, aged_kernels, attention, gpu_decode
from kvfold.runtimes.kernels import triton_codes as codes
from kvfold.runtimes.kernels import triton_kernels as kernels
from kvfold.runtimes.kernels.attention import grouped_attention, kernel_attention
from kvfold.runtimes.kernels.packed_tokens import AgedTokens, PackedTokens, SideBySide
from kvfold.runtimes.kernels.rotary import apply_rotary

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EXACT = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@pytest.fixture(autouse=True)
def same_numbers_every_time():
    torch.manual_seed(0)


def packed(format, heads, tokens, dtype, seed):
    """A view into a larger storage, and the numbers in it."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, heads, tokens + 9, format.width, generator=generator)
    x = x * 10.0 ** torch.randint(-2, 2, (2, heads, tokens + 9, 1), generator=generator)
    rows = pack(x, format).to(DEVICE)[:, :, 4 : tokens + 4]
    return PackedTokens(rows, format, dtype), unpack(rows, format, torch.float64)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.bfloat16) for name in FORMS] + [("tiers", dtype) for dtype in (torch.float32, torch.float16)],
)
def test_products_with_packed_numbers(name, dtype):
    format = FORMS[name]
    x, elements = packed(format, 2, 77, dtype, seed=0)
    q = torch.randn(2, 6, 2, format.width, device=DEVICE).to(dtype)
    weights = torch.randn(2, 6, 2, 77, device=DEVICE).softmax(-1)
    elements = elements.repeat_interleave(3, dim=1)
    assert distance(kernels.scores(q, x), q.double() @ elements.transpose(2, 3)) < EXACT[dtype]
    assert distance(kernels.weighted(weights, x, dtype), weights.double() @ elements) < EXACT[dtype]


@pytest.mark.parametrize("name", [name for name, format in FORMS.items() if format.scales == "exponent"])
def test_packing_is_that_of_torch(name):
    """But for scales whose errors differ by a rounding."""
    format = FORMS[name]
    x = torch.randn(2, 2, 20, format.width, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    x = x * 10.0 ** torch.randint(-4, 4, (2, 2, 20, 1), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    x[0, 0, :3] = torch.stack([torch.zeros_like(x[0, 0, 0]), x[0, 0, 1] * 0 + 1e-7, x[0, 0, 2] * 0 - 3e4])
    found, wanted = codes.pack(x, format), pack(x, format)
    same = (found == wanted).all(-1)
    assert same.float().mean() > 0.97 and same[0, 0, :3].all()
    lost = [(unpack(rows, format, torch.float64) - x.double()).square().sum(-1)[~same] for rows in (found, wanted)]
    torch.testing.assert_close(*lost, rtol=1e-4, atol=0)


@pytest.mark.parametrize(("heads", "softcap"), [((2, 2, 2), None), ((8, 2, 1), 5.0), ((9, 1, 3), None)])
def test_attention_of_a_step(heads, softcap, monkeypatch):
    monkeypatch.setattr(attention, "kernels_for", lambda q: gpu_decode)
    N, C, U = heads
    (z, keys), (y, values) = (packed(FORMS["tiers"], n, 140, torch.float32, seed=n) for n in (C, U))
    q = torch.randn(2, N, 3, FORMS["tiers"].width, device=DEVICE)
    seen = torch.ones(2, 1, 3, 140, dtype=torch.bool, device=DEVICE).tril(137)
    seen[0, ..., :50] = False
    for mask in (None, seen, torch.zeros(seen.shape, device=DEVICE).masked_fill(~seen, torch.finfo(torch.float32).min)):
        found = kernel_attention(q, z, y, mask, scale=0.1, softcap=softcap)
        exact = mask if mask is None or mask.dtype == torch.bool else mask.double()
        wanted, _ = grouped_attention(q.double(), keys, values, exact, scale=0.1, softcap=softcap)
        assert distance(found, wanted) < 1e-5


def test_sums_over_many_tokens_are_split():
    x, elements = packed(FORMS["4_bits"], 1, 2 * kernels.SPLIT + 5, torch.float32, seed=0)
    weights = torch.randn(2, 1, 1, x.shape[2], device=DEVICE).softmax(-1)
    assert distance(kernels.weighted(weights, x, torch.float32), weights.double() @ elements) < 1e-5


@pytest.mark.parametrize("name", FORMS)
def test_unpacking_is_that_of_torch(name):
    """All numbers of a head, and the first so many; into memory that others share."""
    format = FORMS[name]
    x, elements = packed(format, 2, 70, torch.float32, seed=0)
    for width in {format.width, format.width // 2 + 1}:
        out = torch.full((2, 2, 70, format.width + 3), torch.nan, device=DEVICE)
        codes.unpack(x.rows, format, out[..., 2 : 2 + width])
        assert distance(out[..., 2 : 2 + width], elements[..., :width]) < 1e-6
        assert out[..., :2].isnan().all() and out[..., 2 + width :].isnan().all()


@pytest.mark.parametrize(("rotated", "rows"), [(16, 1), (24, 2)])
def test_rotation_is_that_of_torch(rotated, rows):
    x = torch.randn(2, 3, 45, 2 * 24 + 5, device=DEVICE)[..., 1:49]
    cos, sin = torch.randn(2, rows, 50, rotated, device=DEVICE)[:, :, 5:]
    heads = x.unflatten(3, (2, 24)).transpose(2, 3).flatten(1, 2)
    assert distance(codes.rotate(x, cos, sin, 24), apply_rotary(heads, cos, sin).double()) < 1e-6


@pytest.mark.parametrize("recent", [9, 200])
def test_attention_over_two_forms(recent, monkeypatch):
    """Far and near ones of two layers side by side, met by queries each of which sees other tokens in each form."""
    monkeypatch.setattr(aged_kernels, "kernels_for", lambda q: gpu_decode)
    forms, (S, T) = (FORMS["tiers"], FORMS["4_bits"]), (140, 3)
    sides = [SideBySide([packed(form, 1, S, torch.float32, seed=i)[0] for i in (0, 1)]) for form in forms]
    sides[0].parts[1].width = 100  # of a layer below some numbers only
    z = AgedTokens(*sides, recent)
    q = tuple(torch.randn(2, 4, T, side.shape[3], device=DEVICE) for side in sides)
    seen = torch.ones(2, 1, T, S, dtype=torch.bool, device=DEVICE).tril(S - T)
    seen[0, ..., :50] = False
    width = z.far.shape[3] + 5
    for mask in (None, seen):
        found = aged_kernels.attend(q, z, z, mask, width, scale=0.05, softcap=4.0)
        parts = aged_attention.Aged(*(side.read for side in sides), S, S, recent)
        wanted, _ = aged_attention.aged_attention_by_masks(q, parts, parts, mask, width, scale=0.05, softcap=4.0)
        assert distance(found, wanted) < 1e-5


BROKEN = {
    "scores": (kernels, lambda q, keys: q.new_zeros(2, 6, 1, 1100).float(), "off by"),
    "weighted": (
        kernels,
        lambda weights, values, dtype: torch.full((2, 6, 1, values.shape[3]), torch.nan),
        "off by nan",
    ),
    "softmax_": (kernels, lambda scores, bias, **sizes: scores.zero_(), "off by 1"),
    "pack": (codes, lambda x, format: 1 / 0, "ZeroDivisionError"),
}


@pytest.mark.rare
@pytest.mark.parametrize("name", [None, *BROKEN])
def test_the_kernels_are_tried_before_they_serve(name, monkeypatch, caplog):
    monkeypatch.setattr(gpu, "QUERIES", (2,))
    monkeypatch.setattr(gpu, "TRIALS", gpu.TRIALS[:1])
    if name is not None:
        monkeypatch.setattr(BROKEN[name][0], name, BROKEN[name][1])
    gpu.works.cache_clear()
    assert gpu.works(torch.device(DEVICE), torch.bfloat16) == (name is None), caplog.text
    assert name is None or BROKEN[name][2] in caplog.text
    gpu.works.cache_clear()


COMPILE = """
import torch, triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from kvfold.runtimes.kernels import triton_codes as codes, triton_kernels as kernels

TYPES = {"q": "*bf16", "weights": "*fp32", "rows": "*u8", "table": "*i32", "tried": "*i32", "out": "*fp32", "x": "*bf16"}
TYPES |= {"scores": "*fp32", "bias": "*fp32", "log_sums": "*fp32", "scale": "fp32", "cap": "fp32"}


def machine_code(kernel, constants, warps=4):
    types = {name: "constexpr" if name in constants else TYPES.get(name, "i32") for name in kernel.arg_names}
    source = triton.compiler.ASTSource(fn=kernel, signature=types, constexprs=constants)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    assert made.asm["cubin"]
    return made.asm["ptx"]


sizes = {"FIELDS": codes.FIELDS}
machine_code(codes._pack, sizes | {"BLOCK": 1024})
for capped in (False, True):
    machine_code(kernels._softmax, {"CAPPED": capped, "BIASED": capped, "AT_ONCE": kernels.AT_ONCE})
for bits, float8 in ((1, False), (4, False), (6, False), (8, False), (8, True)):
    common = sizes | {"BITS": bits, "FLOAT8": float8}
    machine_code(codes._unpack, common | {"TOKENS": codes.UNPACKED_TOKENS, "NUMBERS": codes.NUMBERS})
    common |= {"BITS": bits & 13, "HALF": True, "PRODUCT": tl.bfloat16, "PRECISION": "ieee", "QUERIES": 32, "ADD": True}
    for kernel, (tokens, numbers) in ((kernels._scores, kernels.SCORED), (kernels._weighted, kernels.WEIGHED)):
        assert "mma" in machine_code(kernel, common | {"TOKENS": tokens, "NUMBERS": numbers}, kernels.WARPS)
"""


@pytest.mark.rare
def test_the_kernels_compile_for_a_gpu(tmp_path):
    """Down to its machine code, for which none is needed. The interpreter does not see what a compiler refuses."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_cpu_is_not_asked():
    x, _ = packed(FORMS["4_bits"], 1, 20, torch.float32, seed=0)
    assert not gpu_decode.serves(torch.randn(2, 1, 1, 64), x, x)

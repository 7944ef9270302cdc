"""The GPU's products with packed numbers, by Triton's interpreter where there is no GPU, are those of unpacked ones."""

import os
import subprocess
import sys

import pytest
import torch
from gpu_kernels import ask_gpu
from packed_forms import FORMS, distance, heads, in_pages, numbers_of, packed
from tiny import load, tokens

import kvfold
from kvfold.compression.recipe import make_recipe
from kvfold.runtimes.kernels import gpu
from kvfold.runtimes.kernels.codec import pack, unpack

pytest.importorskip("triton")  # for Linux only

from kvfold.runtimes.kernels import (
    aged_attention,
    aged_kernels,
    attention,
    cpu_decode,
    cpu_maps,
    gpu_decode,
    triton_turning,
)
from kvfold.runtimes.kernels import triton_attention as kernels
from kvfold.runtimes.kernels import triton_codes as codes
from kvfold.runtimes.kernels.attention import grouped_attention, kernel_attention
from kvfold.runtimes.kernels.packed_tokens import AgedTokens, PackedTokens, PagedTokens, SideBySide
from kvfold.runtimes.kernels.rotary import apply_rotary

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EXACT = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@pytest.fixture(autouse=True)
def same_numbers_every_time():
    torch.manual_seed(0)


def strided(format, heads, tokens, dtype, seed):
    """A view into a larger storage, of rows whose sizes differ, and the numbers in it."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, heads, tokens + 9, format.width, generator=generator)
    x = x * 10.0 ** torch.randint(-2, 2, (2, heads, tokens + 9, 1), generator=generator)
    rows = pack(x, format).to(DEVICE)[:, :, 4 : tokens + 4]
    return PackedTokens(rows, format, dtype), unpack(rows, format, torch.float64)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.bfloat16) for name in FORMS] + [("tiers", dtype) for dtype in (torch.float32, torch.float16)],
)
def test_attention_over_every_format(name, dtype):
    format = FORMS[name]
    x, elements = strided(format, 2, 150, dtype, seed=0)
    q = torch.randn(2, 4, 2, format.width, device=DEVICE).to(dtype)
    found = gpu_decode.decode_part(q, x, x, scale=0.02, ages=(0, 200))
    scores = q.double() @ elements.repeat_interleave(2, dim=1).transpose(2, 3) * 0.02
    seen = torch.ones(2, 150, dtype=torch.bool, device=DEVICE).tril(148)
    scores = scores.masked_fill(~seen, float("-inf"))
    wanted = scores.softmax(-1) @ elements.repeat_interleave(2, dim=1)
    assert distance(found.averages, wanted) < EXACT[dtype]
    torch.testing.assert_close(found.log_sums.double(), scores.logsumexp(-1), rtol=EXACT[dtype], atol=EXACT[dtype])


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


@pytest.mark.parametrize(
    ("heads", "softcap", "form"), [((2, 2, 2), None, "tiers"), ((8, 2, 1), 5.0, "3_bits"), ((9, 1, 3), None, "4_bits")]
)
def test_attention_of_a_step(heads, softcap, form, monkeypatch):
    monkeypatch.setattr(attention, "kernels_for", lambda q: gpu_decode)
    N, C, U = heads
    (z, keys), (y, values) = (strided(FORMS[form], n, 140, torch.float32, seed=n) for n in (C, U))
    q = torch.randn(2, N, 3, FORMS[form].width, device=DEVICE)
    seen = torch.ones(2, 1, 3, 140, dtype=torch.bool, device=DEVICE).tril(137)
    seen[0, ..., :50] = False
    for mask in (None, seen, torch.zeros(seen.shape, device=DEVICE).masked_fill(~seen, torch.finfo(torch.float32).min)):
        found = kernel_attention(q, z, y, mask, scale=0.1, softcap=softcap)
        exact = mask if mask is None or mask.dtype == torch.bool else mask.double()
        wanted, _ = grouped_attention(q.double(), keys, values, exact, scale=0.1, softcap=softcap)
        assert distance(found, wanted) < 1e-5


@pytest.mark.parametrize("split", [1, 3])
def test_sums_over_many_tokens_are_split(split, monkeypatch):
    """Among programs, whose blocks are weighed by what they count beside others."""
    monkeypatch.setattr(kernels, "PROGRAMS", 1)
    monkeypatch.setattr(kernels, "SPLIT", split)
    x, elements = strided(FORMS["4_bits"], 1, 5 * kernels.TOKENS - 9, torch.float32, seed=0)
    q = torch.randn(2, 1, 1, 64, device=DEVICE)
    found = gpu_decode.decode_part(q, x, x, scale=0.1)
    assert distance(found.averages, (q.double() @ elements.transpose(2, 3) * 0.1).softmax(-1) @ elements) < 1e-5


@pytest.mark.parametrize("name", FORMS)
def test_unpacking_is_that_of_torch(name):
    """All numbers of a head, and the first so many; into memory that others share."""
    format = FORMS[name]
    x, elements = strided(format, 2, 70, torch.float32, seed=0)
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
    sides = [SideBySide([strided(form, 1, S, torch.float32, seed=i)[0] for i in (0, 1)]) for form in forms]
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


@pytest.mark.parametrize(
    ("B", "C", "S", "within", "H", "r", "N", "T"),
    [(2, 1, 300, 3, 32, 32, 6, 1), (1, 2, 140, 2, 32, 16, 4, 1), (2, 2, 131, 2, 16, 16, 8, 2)],
)
def test_queries_that_are_turned_meet_keys_that_are_not(B, C, S, within, H, r, N, T, monkeypatch):
    """The same scores as those of keys that are rebuilt and rotated: from any position on, after padding, over part of the
    tokens, with as many tiles of tokens at a time as there is room for."""
    monkeypatch.setattr(triton_turning, "ELSEWHERE", 1 << 17)
    padding, fast = min(5, S // 2), r // 4
    speeds = tuple(0.0 if i < fast else 1 / 64 / 1.5 ** (i - fast) for i in range(r // 2))
    first = torch.tensor([7, 90_000])[:B, None]
    positions = torch.cat([torch.ones(B, padding), first + torch.arange(S - padding)], dim=1).double()
    angles = (positions[:, :, None] * torch.tensor(speeds, dtype=torch.float64)).repeat(1, 1, 2)
    cos, sin = angles.cos().float().to(DEVICE), angles.sin().float().to(DEVICE)
    stored = SideBySide(
        [strided(FORMS[name], C, S, torch.float32, seed=i)[0] for i, name in enumerate(("tiers", "4_bits"))]
    )
    q, numbers = torch.randn(B, N, T, H, device=DEVICE), numbers_of(stored)[:B]
    for part in stored.parts:
        part.rows = part.rows[:B]
    weight = torch.randn(C, within * H, numbers.shape[3], device=DEVICE) / numbers.shape[3] ** 0.5
    offset = torch.randn(C, within * H, device=DEVICE)
    way = gpu_decode.HeadMap.of(weight, offset, H, speeds).rebuild(cos, sin, evenly=True)
    keys = apply_rotary(heads(numbers, weight, offset, H), cos.double(), sin.double())
    age = torch.arange(S - T, S)[:, None] - torch.arange(S)
    for start, ages in ((0, (0, S - padding - T + 1)), (S - 41, (3, 40))):
        mask = torch.zeros(T, S, dtype=torch.float64).masked_fill((age < ages[0]) | (age >= ages[1]), float("-inf"))
        wanted, _ = grouped_attention(q.double(), keys, numbers, mask.to(DEVICE), scale=0.05)
        some = torch.tensor([[start, S, S - T]] * B) if start else None
        found = gpu_decode.decode_part(q, stored, stored, scale=0.05, ages=ages, sequences_B3=some, rebuild=way)
        assert distance(found.averages.transpose(1, 2), wanted) < 1e-5
    assert gpu_decode.HeadMap.of(weight, offset, H, speeds).rebuild(cos, sin) is None  # for positions that jump


@pytest.mark.parametrize(
    ("page_tokens", "odd", "room", "grid"), [(7, 3, 1 << 26, 1 << 15), (16, 0, 600, 1 << 15), (16, 0, 1 << 26, 5)]
)
def test_pages_hold_what_a_contiguous_cache_holds(page_tokens, odd, room, grid, monkeypatch):
    """Sequences of 1 token, a page, a token more and less, and of a window: the same result; all at once, and
    few at a time where there is no room for more."""
    monkeypatch.setattr(gpu_decode, "ELSEWHERE", room)
    monkeypatch.setattr(gpu, "LARGEST_GRID", grid)
    marks, batches = kernels.marks_of, []
    monkeypatch.setattr(kernels, "marks_of", lambda rows, *rest: batches.append(rows) or marks(rows, *rest))
    lengths, C = [1, page_tokens, page_tokens + 1, 2 * page_tokens - 1, 3], 2
    B, S = len(lengths), 2 * page_tokens
    parts = [packed(B, C, S, torch.float32, FORMS[name]) for name in ("5_bits", "float8")]
    paged = [in_pages(part, lengths, page_tokens, odd) for part in parts]
    sequences = torch.tensor([[length // 3, length, length - 1] for length in lengths])
    q, sizes = torch.randn(B, 8, 1, sum(part.width for part in parts)), {"scale": 0.2, "sequences_B3": sequences}
    stored, lying = (SideBySide(x) for x in ([_moved(part) for part in parts], [_moved(x) for x in paged]))
    alone = SideBySide(parts)
    wanted = cpu_decode.decode_part(q, alone, alone, **sizes)
    for held in (stored, lying):
        found = gpu_decode.decode_part(q.to(DEVICE), held, held, **sizes)
        assert distance(found.averages.cpu(), wanted.averages.double()) < 1e-5
        torch.testing.assert_close(found.log_sums.cpu(), wanted.log_sums, atol=1e-5, rtol=1e-5)
    assert max(batches) * C <= max(grid, C)


def _moved(x):
    if isinstance(x, PackedTokens):
        return x.to(torch.device(DEVICE))
    return PagedTokens(x.rows.to(DEVICE), x.format, x.dtype, x.tables_Bp.to(DEVICE).contiguous())


def test_a_part_without_tokens_counts_nothing():
    stored = packed(2, 1, 40, torch.float32, FORMS["4_bits"]).to(torch.device(DEVICE))
    q = torch.randn(2, 4, 1, 64, device=DEVICE)
    halves = torch.tensor([[0, 0, 39], [0, 30, 39]]), torch.tensor([[0, 40, 39], [30, 40, 39]])
    parts = [gpu_decode.decode_part(q, stored, stored, scale=0.3, sequences_B3=half) for half in halves]
    wanted, _ = grouped_attention(q.double(), numbers_of(stored), numbers_of(stored), None, scale=0.3)
    assert distance(gpu_decode.values_of(parts, 64, torch.float32), wanted) < 1e-5
    nothing = gpu_decode.values_of([parts[0], parts[0]._replace(last=True)], 64, torch.float32)
    assert not nothing[0].any() and nothing[1].isfinite().all()


def broken(marks, values, span, dtype):
    return torch.full((1, *marks.log_sums.shape, values[0].width), torch.nan)


BROKEN = {
    "arranged": (kernels, lambda q, parts: kernels.Meeting(q.new_zeros(9**5), 4, 40, 160, 480), "off by"),
    "averages": (kernels, broken, "off by nan"),
    "pack": (codes, lambda x, format: 1 / 0, "ZeroDivisionError"),
}


@pytest.mark.rare
@pytest.mark.parametrize("name", [None, *BROKEN])
def test_the_kernels_are_tried_before_they_serve(name, monkeypatch, caplog):
    monkeypatch.setattr(gpu, "QUERIES", (1,))
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
from kvfold.runtimes.kernels import triton_attention, triton_codes as codes, triton_kernels as kernels, triton_turning
from kvfold.runtimes.kernels.tiles import NUMBERS, TIER_FIELDS, TILE_FIELDS

FLOATS = "basis constants bias raw counts log_sums shares speeds offset sums other other_log_sums".split()
HALVES = "q x exponentials weights cos sin".split()
INTEGERS = "tables sequences table tried order".split()
TYPES = dict.fromkeys(FLOATS, "*fp32") | dict.fromkeys(HALVES, "*bf16") | dict.fromkeys(INTEGERS, "*i32")
TYPES |= {"rows": "*u8", "out": "*fp32", "scale": "fp32", "cap": "fp32"}


def machine_code(kernel, constants, warps=4):
    types = {name: "constexpr" if name in constants else TYPES.get(name, "i32") for name in kernel.arg_names}
    source = triton.compiler.ASTSource(fn=kernel, signature=types, constexprs=constants)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    assert made.asm["cubin"]
    return made.asm["ptx"]


sizes = {"FIELDS": TILE_FIELDS, "NUMBERS": NUMBERS, "BY_WORDS": True}
machine_code(codes._pack, {"FIELDS": TILE_FIELDS, "BLOCK": 1024})
machine_code(kernels._arrange, {"BLOCK": 512})
for several in (False, True):
    machine_code(kernels._join, {"TWO": several, "BLOCK": 512})
machine_code(kernels._share_out, {"AT_ONCE": triton_attention.AT_ONCE}, 1)
machine_code(triton_turning._turn, {"OFFSET": True, "SPANS": True, "WIDTH": 80, "BLOCK": 128}, 1)
for kinds, float8 in ((15, False), (8, True)):
    machine_code(codes._unpack, sizes | {"KINDS": kinds, "FLOAT8": float8, "TOKENS": codes.UNPACKED_TOKENS})
for kinds, float8, half, several in ((7, False, True, True), (8, True, True, False), (12, False, False, False)):
    common = sizes | {"KINDS": kinds, "FLOAT8": float8, "HALF": half, "PRODUCT": tl.bfloat16 if half else tl.float32}
    common |= {"PRECISION": "ieee" if half else "tf32", "PAGED": several, "SPANS": several, "QUERIES": 32}
    common |= {"TOKENS": triton_attention.TOKENS}
    absent = {} if several else {"tables": None, "sequences": None}
    codes_of = machine_code(kernels._weighted, common | absent)
    common |= {"TURNED": several, "FUNCTIONS": 8 if several else 1, "OFFSET": several, "BIASED": several, "CAPPED": several}
    absent |= {} if several else {"basis": None, "constants": None, "bias": None}
    for first, last in ((True, not several), (False, True)):
        absent_too = {} if several or not first else {"raw": None}
        constants = common | absent | absent_too | {"FIRST": first, "LAST": last, "FIELDS": TIER_FIELDS}
        assert all("mma" in ptx for ptx in (codes_of, machine_code(kernels._scores, constants)))
"""


@pytest.mark.rare
def test_the_kernels_compile_for_a_gpu(tmp_path):
    """Down to its machine code, for which none is needed. The interpreter does not see what a compiler refuses."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_cpu_is_not_asked():
    x, _ = strided(FORMS["4_bits"], 1, 20, torch.float32, seed=0)
    assert not gpu_decode.serves(torch.randn(2, 1, 1, 64), x, x)


@pytest.mark.rare
@pytest.mark.skipif(DEVICE != "cpu", reason="tests/gpu has it where there is a GPU")
def test_a_folded_model_decodes_by_them(tiny_dir, tmp_path, monkeypatch):
    """The default of `auto`: keys before rotation that turn slowly, the newest tokens in a finer form."""
    recipe = {"preset": "auto", "model": str(tiny_dir / "llama_yarn"), "out": str(tmp_path / "out"), "kv_budget": 0.25}
    recipe["calibration"] = {"data": "self", "num_samples": 8, "seq_len": 128}
    out = kvfold.compress(make_recipe(recipe), device="cpu").out
    monkeypatch.setattr(cpu_maps, "OF_PACKED", 0.0)  # queries are turned as exactly as if nothing were packed
    monkeypatch.setattr(cpu_maps, "TURNED_BITS", (0,))
    ids, found = tokens(2, 74), []
    for on_gpu in (False, True):
        calls = ask_gpu(monkeypatch.setattr) if on_gpu else []
        model = load(out)
        cache = kvfold.FoldedCache(model.kv_plan)
        with torch.no_grad():
            model(ids[:, :70], past_key_values=cache)
            found.append(torch.cat([model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(70, 74)]))
    specs = model.kv_plan.owned
    assert all(spec.fast_pairs and spec.recent for spec in specs)
    assert len(calls) == 4 * 2 * len(specs) and all(options["rebuild"] for options in calls)
    assert distance(found[1], found[0].double()) < 1e-5

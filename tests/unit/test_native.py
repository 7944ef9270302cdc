"""The CPU's decode kernel gives what the obvious attention gives, and nothing breaks where it cannot be compiled."""

import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packed_forms import FORMS, distance

from kvfold.plan.number_format import NumberFormat
from kvfold.runtimes.kernels import cpu, cpu_decode, dispatch, native
from kvfold.runtimes.kernels.attention import grouped_attention, kernel_attention
from kvfold.runtimes.kernels.codec import pack, roundtrip, unpack
from kvfold.runtimes.kernels.dispatch import decode_attention
from kvfold.runtimes.kernels.packed_tokens import PackedTokens

compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="this machine has no C++ compiler")
SHAPES = {  # batch, query heads, key heads, width, value heads, width, tokens
    "one_query_per_head": (2, 4, 4, 64, 4, 64, 77),
    "grouped": (3, 12, 3, 128, 3, 128, 300),
    "unequal_heads": (1, 12, 2, 40, 3, 24, 1000),
    "one_key_latent": (2, 12, 1, 392, 6, 64, 513),
    "wide": (1, 32, 1, 520, 1, 648, 90),
    "odd": (1, 7, 1, 21, 1, 13, 5),
    "long": (1, 8, 1, 64, 1, 64, 5000),
}


@pytest.fixture(autouse=True)
def same_numbers_every_time():
    torch.manual_seed(0)


def tensors(shape, dtype, queries=1):
    B, N, C, R, U, V, S = shape
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(B, N, queries, R, generator=generator)
    z, y = (torch.randn(B, n, S + 9, w, generator=generator)[:, :, 3 : S + 3] for n, w in ((C, R), (U, V)))
    return q.transpose(1, 2).contiguous().transpose(1, 2).to(dtype), z.to(dtype), y.to(dtype)


@pytest.fixture(params=["none", "bool", "additive", "alibi"])
def masked(request):
    def make(shape, queries):
        B, N, S = shape[0], shape[1], shape[-1]
        if request.param == "none":
            return None
        seen = torch.ones(B, 1, queries, S, dtype=torch.bool).tril(S - queries)
        seen[0, ..., : S // 3] = False
        if request.param == "bool":
            return seen
        added = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
        return added if request.param == "additive" else added.expand(-1, N, -1, -1) + 0.1 * torch.randn(N, 1, S)

    return make


@compiler
@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("name", SHAPES)
def test_the_kernel_is_the_obvious_attention(name, queries, masked):
    q, z, y = tensors(SHAPES[name], torch.float32, queries)
    mask = masked(SHAPES[name], queries)
    assert cpu_decode.serves(q, z, y)
    found = decode_attention(q, z, y, mask, scale=0.2)
    exact = mask if mask is None or mask.dtype == torch.bool else mask.double()
    wanted, _ = grouped_attention(q.double(), z.double(), y.double(), exact, scale=0.2)
    torch.testing.assert_close(found, wanted.float(), atol=1e-5, rtol=1e-5)  # as near as float32 by torch


@compiler
@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("name", SHAPES)
def test_bfloat16_costs_the_rounding_of_probabilities(name, queries, masked):
    q, z, y = tensors(SHAPES[name], torch.bfloat16, queries)
    mask = masked(SHAPES[name], queries)
    assert cpu_decode.serves(q, z, y)
    exact = mask if mask is None or mask.dtype == torch.bool else mask.double()
    wanted, _ = grouped_attention(q.double(), z.double(), y.double(), exact, scale=0.2)
    torch.testing.assert_close(decode_attention(q, z, y, mask, scale=0.2).double(), wanted, atol=1e-2, rtol=1e-2)


@compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("tokens", [1, 3, 77])
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 7, 9])
def test_any_number_of_queries_per_stored_head(rows, tokens, packed, dtype):
    """They are taken 8, 4, 2 and 1 at a time."""
    q, z, y = tensors((1, 3 * rows, 3, 64, 3, 64, tokens), dtype)
    stored, exact = (z, y), (z.double(), y.double())
    if packed:
        format = FORMS["4_bits"]
        stored = [PackedTokens(pack(x, format), format, dtype) for x in stored]
        exact = [unpack(x.rows, format, torch.float64) for x in stored]
    assert cpu_decode.serves(q, *stored)
    wanted, _ = grouped_attention(q.double(), *exact, None, scale=0.2)
    found = kernel_attention(q, *stored, None, scale=0.2)
    assert distance(found, wanted) < (3e-6 if dtype == torch.float32 else 2e-2)


@compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "queries"), [((4, 4, 4), 1), ((12, 2, 1), 1), ((9, 9, 1), 3), ((20, 1, 1), 2)])
@pytest.mark.parametrize("name", FORMS)
def test_packed_tokens_are_read_as_unpack_reads_them(name, heads, queries, dtype, masked):
    (N, C, U), format, S = heads, FORMS[name], 301
    q, z, y = tensors((2, N, C, format.width, U, format.width, S), dtype, queries)
    y = y * 10.0 ** torch.randint(-3, 4, (2, U, S, 1), generator=torch.Generator().manual_seed(0))  # scales far apart
    rows = [torch.nn.functional.pad(pack(x, format), (0, 0, 4, 0))[:, :, 4:] for x in (z, y)]
    z, y = (PackedTokens(row, format, dtype) for row in rows)
    mask = masked((2, N, S), queries)
    assert cpu_decode.serves(q, z, y)
    exact = (unpack(row, format, torch.float64) for row in rows)
    mask64 = mask if mask is None or mask.dtype == torch.bool else mask.double()
    wanted, _ = grouped_attention(q.double(), *exact, mask64, scale=0.2)
    assert distance(decode_attention(q, z, y, mask, scale=0.2), wanted) < (3e-6 if dtype == torch.float32 else 2e-2)


@compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [name for name, format in FORMS.items() if format.scales == "exponent"])
def test_packing_is_that_of_torch(name, dtype):
    """But for scales whose errors differ by a rounding."""
    format = FORMS[name]
    x = torch.randn(3, 2, 101, format.width, generator=torch.Generator().manual_seed(0))
    x = (x * 10.0 ** torch.randint(-4, 4, (3, 2, 101, 1), generator=torch.Generator().manual_seed(0))).to(dtype)
    x[0, 0, :3] = torch.stack([torch.zeros_like(x[0, 0, 0]), x[0, 0, 1] * 0 + 1e-7, x[0, 0, 2] * 0 - 3e4])
    assert cpu.packs(x)
    found, wanted = cpu.pack(x, format), pack(x, format)
    same = (found == wanted).all(-1)
    assert same.float().mean() > 0.99 and same[0, 0, :3].all()
    lost = [(unpack(rows, format, torch.float64) - x.double()).square().sum(-1)[~same] for rows in (found, wanted)]
    torch.testing.assert_close(*lost, rtol=1e-4, atol=0)


@compiler
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_no_number_packs_as_some_number(value):
    """And its neighbours are packed as ever."""
    x = torch.randn(1, 2, 3, 64)
    x[0, 1, 1, 7] = value
    rows, wanted = cpu.pack(x, FORMS["4_bits"]), pack(x.nan_to_num(0, 0, 0), FORMS["4_bits"])
    alike = (rows == wanted).all(-1)[0]
    alike[1, 1] = True
    assert alike.all()


@compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("token", [0, 150, 299])
def test_a_key_that_is_no_number_is_not_hidden(token, dtype):
    q, z, y = tensors(SHAPES["grouped"], dtype)
    z[1, 2, token, 5] = torch.nan
    wanted, _ = grouped_attention(q, z, y, None, scale=0.2)
    assert torch.equal(decode_attention(q, z, y, None, scale=0.2).isnan(), wanted.isnan())


@compiler
def test_masks_of_any_strides():
    q, z, y = tensors(SHAPES["grouped"], torch.float32, queries=2)
    mask = torch.randn(300, 2).T[None, None]
    wanted, _ = grouped_attention(q, z, y, mask, scale=0.2)
    torch.testing.assert_close(decode_attention(q, z, y, mask, scale=0.2), wanted, atol=1e-5, rtol=1e-5)


@compiler
def test_transforms_of_functions_take_another_way():
    format = FORMS["4_bits"]
    x = torch.randn(1, 2, 3, 64)
    gradient = torch.func.grad(lambda x: roundtrip(x, format, dispatch.pack).square().sum())(x)
    torch.testing.assert_close(gradient, 2 * roundtrip(x, format))


@compiler
def test_one_side_may_be_packed():
    format = FORMS["4_bits"]
    q, z, y = tensors((2, 6, 3, 64, 2, 40, 200), torch.float32)
    packed = PackedTokens(pack(z, format), format, torch.float32)
    wanted, _ = grouped_attention(q, unpack(packed.rows, format, torch.float32), y, None, scale=0.2)
    torch.testing.assert_close(decode_attention(q, packed, y, None, scale=0.2), wanted, atol=1e-5, rtol=1e-5)


def test_formats_of_other_methods_are_left_to_torch():
    format = NumberFormat(tiers=((64, 4),), scales="affine")
    q, z, _ = tensors((1, 2, 2, 64, 2, 64, 20), torch.float32)
    packed = PackedTokens(pack(z, format), format, torch.float32)
    assert not cpu_decode.serves(q, packed, packed)
    wanted, _ = grouped_attention(q, packed.read(0, 20), packed.read(0, 20), None, scale=0.2)
    torch.testing.assert_close(decode_attention(q, packed, packed, None, scale=0.2), wanted)


@compiler
@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_defaults_of_torch_do_not_matter(default):
    q, z, y = tensors(SHAPES["grouped"], torch.float32)
    wanted = decode_attention(q, z, y, None, scale=0.2)
    torch.set_default_dtype(default)
    try:
        found = decode_attention(q, z, y, None, scale=0.2)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, wanted)


@compiler
def test_the_number_of_threads_changes_roundings_only():
    q, z, y = tensors(SHAPES["long"], torch.bfloat16)
    assert cpu_decode.serves(q, z, y)
    found, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(decode_attention(q, z, y, None, scale=0.2))
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(*found, atol=2e-3, rtol=1e-2)  # splits round their own probabilities


def test_gradients_and_other_dtypes_take_another_way():
    q, z, y = tensors(SHAPES["grouped"], torch.float32)
    assert not cpu_decode.serves(q.requires_grad_(), z, y)
    assert not cpu_decode.serves(q.detach().half(), z.half(), y.half())


@pytest.mark.parametrize("setting", ["CXX=no-such-compiler", "KVFOLD_NATIVE=0"])
def test_without_a_compiler_torch_serves(setting, tmp_path):
    script = (
        "import torch; from kvfold.runtimes.kernels import native\n"
        "from kvfold.runtimes.kernels.dispatch import decode_attention as d\n"
        "x = torch.ones(1, 2, 9, 8, dtype=torch.bfloat16)\n"
        "assert native.library() is None and d(x[:, :, :1], x, x, None, scale=1.0).eq(1).all()"
    )
    name, _, value = setting.partition("=")
    environment = {"PATH": "/usr/bin:/bin", "XDG_CACHE_HOME": str(tmp_path), "OMP_NUM_THREADS": "1", name: value}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert ("no no-such-compiler" in done.stderr) == (name == "CXX")


EDGES = """
import torch
from kvfold.plan.number_format import NumberFormat
from kvfold.runtimes.kernels.codec import pack
from kvfold.runtimes.kernels import cpu_decode, native
from kvfold.runtimes.kernels.attention import kernel_attention
from kvfold.runtimes.kernels.packed_tokens import PackedTokens, SideBySide

native.SECONDS = 600  # other tests may keep the processor busy
forms = (NumberFormat(tiers=((13, 5), (8, 3))), NumberFormat(tiers=((64, 4),)))
for dtype in (torch.float32, torch.bfloat16):
    for form in forms:
        for rows in (1, 2, 3, 5, 7, 9, 15, 17, 19):
            for heads, tokens in ((1, 1), (3, 1), (1, 35), (3, 37)):
                shapes = ((heads * rows, 1), (heads, tokens), (heads, tokens))
                q, z, y = (torch.randn(1, n, s, form.width, dtype=dtype) for n, s in shapes)
                kernel_attention(q, z, y, None, scale=0.1)
                kernel_attention(q, *(PackedTokens(pack(x, form), form, dtype) for x in (z, y)), None, scale=0.1)
                x, several = PackedTokens(pack(z[:, :1], form), form, dtype), heads * rows
                for stored in (x, SideBySide([x, z[:, :1, :, 8:], x])):
                    back = torch.randn(1, several * 24, stored.shape[3], dtype=dtype)
                    made = cpu_decode.HeadMap.of(back, None, 24).rebuild(*torch.randn(2, 1, tokens, 16))
                    kernel_attention(torch.randn(1, several, 1, 24).to(dtype), stored, stored, None, scale=0.1, rebuild=made)
print("inside its memory")
"""


@compiler
@pytest.mark.parametrize("guard", [pytest.param("sanitizer", marks=pytest.mark.rare), "fence"])
def test_the_kernel_stays_inside_its_memory(guard, tmp_path):
    """Of every number of queries per head: results may be right all the same, and the process die much later.

    A sanitizer sees every access, but other code is made for it; the fence is behind the kernel's own vectors, in the code
    as users have it.
    """
    settings = {"XDG_CACHE_HOME": str(tmp_path)}
    if guard == "fence":
        settings["CXX"] = shlex.join(["c++", "-Wl,-Bsymbolic", str(Path(__file__).parents[1] / "fence.cpp")])
    else:
        sanitizer = subprocess.run(
            ["c++", "-print-file-name=libasan.so"], capture_output=True, text=True
        ).stdout.strip()
        if not Path(sanitizer).is_absolute():
            pytest.skip("this compiler has no address sanitizer")
        settings["CXX"] = "env -u LD_PRELOAD c++ -fsanitize=address"
        settings |= {"LD_PRELOAD": sanitizer, "ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run([sys.executable, "-c", EDGES], env=os.environ | settings, capture_output=True, text=True)
    assert done.stdout == "inside its memory\n", (done.returncode, done.stderr[-3000:])


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The user's cache, in which nothing was compiled."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "kvfold"


def test_what_is_compiled_is_the_users_alone(cache):
    """Whatever the umask; a folder that others may write to is closed, and what lies there is not run."""
    before = os.umask(0)
    try:
        cache.mkdir(mode=0o777)
        (cache / "decode-0.so").write_text("of somebody else")
        (cache / "decode-0.so").chmod(0o666)
        assert native._folder() == cache
    finally:
        os.umask(before)
    assert native.is_private(cache) and not list(cache.iterdir())


def test_a_cache_of_somebody_else_is_not_used(cache, monkeypatch):
    """Nobody but root could give a folder away: so it is somebody else's by another number."""
    cache.mkdir()
    monkeypatch.setattr(native, "is_private", lambda path: False)
    monkeypatch.setattr(native.Path, "chmod", lambda *_: (_ for _ in ()).throw(PermissionError))
    assert native._folder() != cache


@compiler
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the compiler makes code for another kind of processor")
@pytest.mark.parametrize("processor", ["x86-64", "x86-64-v3", "skylake-avx512", "cooperlake", "sapphirerapids"])
def test_it_is_code_for_processors_that_are_not_here(processor):
    """With vectors of 4, 8 and 16 numbers, products of bfloat16, and tiles."""
    flags = [flag for flag in native.FLAGS if not flag.startswith("-march")]
    sources = sorted(map(str, native.SOURCES.glob("*.cpp")))
    command = ["c++", *flags, f"-march={processor}", "-Wall", "-fsyntax-only", *sources]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:3000]


@compiler
def test_the_library_is_private_under_any_umask(cache):
    before = os.umask(0)
    try:
        file = native._compiled()
    finally:
        os.umask(before)
    assert file.parent == cache and native.is_private(file) and native.is_private(cache)

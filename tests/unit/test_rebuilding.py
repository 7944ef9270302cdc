"""The CPU's kernel over keys that it rebuilds, over pages, and on the way back to values: what torch does step by step."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from packed_forms import FORMS, distance, heads, in_pages, numbers_of, packed

from kvfold.plan.number_format import NumberFormat
from kvfold.runtimes.kernels import cpu_decode
from kvfold.runtimes.kernels.attention import grouped_attention
from kvfold.runtimes.kernels.cpu_layer import Asked, Form, LayerReader
from kvfold.runtimes.kernels.packed_tokens import SideBySide
from kvfold.runtimes.kernels.rotary import apply_rotary

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="this machine has no C++ compiler")
FORMATS = [FORMS["tiers"], NumberFormat(tiers=((40, 5),)), FORMS["float8"]]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3}


@pytest.fixture(autouse=True)
def same_numbers_every_time():
    torch.manual_seed(0)


def tables(B, S, r, dtype):
    angles = torch.randn(B, S, r // 2, dtype=torch.float64).repeat(1, 1, 2)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def head_map(C, F, R, head_dim, dtype, bias=True):
    weight, offset = (torch.randn(C, F, R) / R**0.5).to(dtype), torch.randn(C, F).to(dtype) if bias else None
    return weight, offset, cpu_decode.HeadMap.of(weight, offset, head_dim)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("queries", [1, 4])
@pytest.mark.parametrize(
    ("B", "C", "S", "within", "H", "r", "N"),
    [
        (1, 1, 300, 3, 64, 64, 9), (2, 2, 77, 2, 16, 16, 8), (1, 1, 1, 1, 80, 32, 1), (2, 1, 33, 4, 20, 8, 20),
        (1, 4, 515, 2, 32, 32, 8),
    ],
)  # fmt: skip
def test_keys_are_rebuilt_as_torch_rebuilds_them(B, C, S, within, H, r, N, queries, dtype):
    """Of one place, of several side by side and of plain numbers; heads rotated whole and in part, with an offset."""
    queries = min(queries, S)
    places = [packed(B, C, S, dtype, form) for form in FORMATS]
    plain = torch.randn(B, C, S + 3, 24).to(dtype)[:, :, 3:]
    cos, sin = tables(B, S, r, dtype)
    q = torch.randn(B, N, queries, H).to(dtype)
    for stored in (places[0], plain, SideBySide([*places, plain])):
        numbers = numbers_of(stored)
        weight, offset, way = head_map(C, within * H, numbers.shape[3], H, dtype)
        keys = apply_rotary(heads(numbers, weight, offset, H), cos.double(), sin.double())
        wanted, _ = grouped_attention(q.double(), keys, numbers, None, scale=0.2)
        assert cpu_decode.serves(q, stored, stored)
        found = cpu_decode.decode_part(
            q, stored, stored, scale=0.2, ages=(0, S), rebuild=way.rebuild(cos, sin)
        ).averages.transpose(1, 2)
        assert distance(found, wanted) < TOLERANCE[dtype] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ages_and_caps_are_those_of_a_mask(dtype):
    """Queries at the end of sequences see tokens from an age on and below one; scores are capped."""
    B, N, S, T = 2, 6, 200, 5
    q, z, y = (torch.randn(B, n, s, 64).to(dtype) for n, s in ((N, T), (3, S), (3, S)))
    age = torch.arange(S - T, S)[:, None] - torch.arange(S)
    for youngest, oldest in ((0, S), (40, S), (0, 40), (30, 90)):
        scores = q.double().reshape(B, 3, -1, 64) @ z.double().transpose(2, 3) * 0.3
        scores = (4 * torch.tanh(scores / 4)).view(B, N, T, S)
        scores = scores.masked_fill((age < youngest) | (age >= oldest), float("-inf"))
        wanted = (scores.softmax(-1).view(B, 3, -1, S) @ y.double()).view(B, N, T, 64)
        found = cpu_decode.decode_part(q, z, y, scale=0.3, softcap=4.0, ages=(youngest, oldest))
        assert distance(found.averages, wanted) < TOLERANCE[dtype]
        torch.testing.assert_close(found.log_sums.double(), scores.logsumexp(-1), atol=3e-2, rtol=3e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("page_tokens", "odd"), [(7, 3), (16, 0), (128, 1)])
def test_pages_hold_what_a_contiguous_cache_holds(page_tokens, odd, dtype):
    """Sequences of 1 token, a page, a token more and less, under stored keys and rebuilt ones: the same numbers, so the same
    result up to the order of sums."""
    lengths, C, H = [1, page_tokens, page_tokens + 1, 2 * page_tokens - 1, 3], 2, 32
    B, S = len(lengths), 2 * page_tokens
    alike = [packed(B, C, S, dtype, FORMATS[0]), torch.randn(B, C, S, 24).to(dtype)]
    for stored in (*alike, SideBySide([*alike, packed(B, C, S, dtype, FORMATS[2])])):
        width = stored.shape[3]
        parts = stored.parts if isinstance(stored, SideBySide) else [stored]
        paged = [in_pages(part, lengths, page_tokens, odd) for part in parts]
        for part in paged[1:]:
            part.tables_Bp = part.tables_Bp.contiguous()
        found_in = paged[0] if len(paged) == 1 else SideBySide(paged)
        sequences = torch.tensor([[0, length, length - 1] for length in lengths])
        _, _, way = head_map(C, 2 * H, width, H, dtype)
        cos, sin = tables(1, S, H, dtype)
        for q_width, rebuild in ((width, None), (H, way.rebuild(cos, sin))):
            q = torch.randn(B, 8, 1, q_width).to(dtype)
            facts = {"scale": 0.2, "sequences_B3": sequences, "ages": (0, S), "rebuild": rebuild}
            wanted = cpu_decode.decode_part(q, stored, stored, **facts)
            found = cpu_decode.decode_part(q, found_in, found_in, **facts)
            assert found.averages.isfinite().all()
            assert distance(found.averages, wanted.averages.double()) < TOLERANCE[dtype]
            torch.testing.assert_close(found.log_sums, wanted.log_sums, atol=2e-2, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_part_without_tokens_counts_nothing(dtype):
    q, z = torch.randn(2, 4, 1, 16).to(dtype), torch.randn(2, 1, 40, 16).to(dtype)
    some = torch.tensor([[0, 0, 39], [0, 30, 39]])
    rest = torch.tensor([[0, 40, 39], [30, 40, 39]])
    parts = [cpu_decode.decode_part(q, z, z, scale=0.3, sequences_B3=x) for x in (some, rest)]
    whole, _ = grouped_attention(q.double(), z.double(), z.double(), None, scale=0.3)
    assert distance(cpu_decode.values_of(parts, 16, dtype, None), whole) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rebuilt", "mapped", "shared"), [(True, True, True), (False, False, False), (False, True, False)]
)
def test_a_layer_is_its_parts(rebuilt, mapped, shared, dtype):
    """Two forms in pages by one call, step after step: what each of them gives by itself."""
    B, C, H, N, recent = 3, 2, 32, 8, 20
    lengths = [50, 3, 21]
    forms = [[packed(B, C, 64, dtype, form) for form in FORMATS[:2]], [packed(B, C, 64, dtype, FORMS["tiers"])]]
    paged = [[in_pages(part, lengths, page, 1) for part in parts] for parts, page in zip(forms, (16, 7), strict=True)]
    for parts in paged:
        for part in parts[1:]:
            part.tables_Bp = parts[0].tables_Bp
            part.rows = torch.zeros(99, *part.rows.shape[1:], dtype=torch.uint8)
    keys = [SideBySide(parts) if len(parts) > 1 else parts[0] for parts in paged]
    values = keys if shared else [parts[0].of(parts[0].tables_Bp) for parts in paged]
    width = max(value.shape[3] for value in values) + 5
    ages = (recent, cpu_decode.ALL_OLDER), (0, recent)
    cos, sin = tables(1, 64, H, dtype)
    ways = [head_map(C, 2 * H, key.shape[3], H, dtype)[2].rebuild(cos, sin) if rebuilt else None for key in keys]
    back = cpu_decode.ValueMap.of((torch.randn(1, C * H, width) / width**0.5).to(dtype), H) if mapped else None
    described = [Form(*facts) for facts in zip(keys, values, ages, ways, (False, True), strict=True)]
    reader = LayerReader(described, width, back, heads=N, dtype=dtype, scale=0.2, softcap=3.0)
    for T in (1, 2):
        bias = torch.randn(1, N, 1, 64) if T == 1 else None
        queries = [torch.randn(B, N, T, H if rebuilt else key.shape[3]).to(dtype) for key in keys]
        seen = [
            torch.tensor([[0, max(length - youngest, 0), length - T] for length in lengths]) for youngest, _ in ages
        ]
        parts = [
            cpu_decode.decode_part(q, z, y, bias, sequences_B3=rows, ages=of_ages, rebuild=way, scale=0.2, softcap=3.0)
            for q, z, y, rows, of_ages, way in zip(queries, keys, values, seen, ages, ways, strict=True)
        ]
        wanted = cpu_decode.values_of([parts[0], parts[1]._replace(last=True)], width, dtype, back)
        asked = [
            Asked(q, rows, places[0].tables_Bp, bias) for q, rows, places in zip(queries, seen, paged, strict=True)
        ]
        assert torch.equal(reader(asked), wanted)
        memory = torch.empty_like(wanted)
        elsewhere = [
            one._replace(queries=one.queries.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)) for one in asked
        ]
        assert reader(elsewhere, out=memory) is memory and torch.equal(memory, wanted)
        if rebuilt:  # both forms meet the same queries
            same = [one._replace(queries=queries[0].transpose(1, 2).contiguous().transpose(1, 2)) for one in asked]
            assert torch.equal(reader(same), reader([one._replace(queries=queries[0]) for one in asked]))
            assert not torch.equal(reader(same), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("B", "N", "K", "T", "H"), [(1, 9, 3, 1, 64), (5, 8, 8, 3, 20), (40, 4, 1, 1, 16)])
def test_values_are_led_back_as_torch_leads_them(B, N, K, T, H, dtype):
    """Two parts, of which one has the first numbers of a token and one the last; beside each other and the same ones."""
    for widths, width in (((40, 33), 73), ((30, 30), 30), ((48,), 48)):
        parts = [
            cpu_decode.Averages(torch.randn(B, N, T, part), 3 * torch.randn(B, N, T), at > 0)
            for at, part in enumerate(widths)
        ]
        weight = (torch.randn(1, K * H, width) / width**0.5).to(dtype)
        shares = torch.stack([part.log_sums.double() for part in parts]).softmax(0)
        sums = torch.zeros(B, N, T, width, dtype=torch.float64)
        for share, part in zip(shares, parts, strict=True):
            columns = slice(width - part.averages.shape[3], width) if part.last else slice(part.averages.shape[3])
            sums[..., columns] += share[..., None] * part.averages
        per_head = sums.view(B, K, N // K, T, width)
        wanted = torch.einsum("bkgtv,khv->btkgh", per_head, weight.double().view(K, H, width)).flatten(2, 3)
        found = cpu_decode.values_of(parts, width, dtype, cpu_decode.ValueMap.of(weight, H))
        assert distance(found, wanted) < TOLERANCE[dtype]
        assert distance(cpu_decode.values_of(parts, width, dtype, None), sums.transpose(1, 2)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rotates", [True, False])
def test_heads_of_a_prompt_are_those_of_torch(rotates, dtype):
    """Of contiguous tokens and of pages; sequences stand at the end of rows of zeros."""
    B, C, S, H, spans = 2, 2, 150, 32, [[0, 150], [20, 90]]
    places = [packed(B, C, S, dtype, form) for form in FORMATS]
    paged = [in_pages(place, [S, S], 16, 1) for place in places]
    cos, sin = tables(1, S, H, dtype) if rotates else (None, None)
    for stored in (places[0], SideBySide(places), SideBySide(paged)):
        numbers = numbers_of(places[0] if stored is places[0] else SideBySide(places))
        weight, offset, way = head_map(C, 2 * H, numbers.shape[3], H, dtype, bias=rotates)
        wanted = heads(numbers, weight, offset, H)
        wanted = apply_rotary(wanted, cos.double(), sin.double()) if rotates else wanted
        found = cpu_decode.rebuilt(stored, way.rebuild(cos, sin), dtype, torch.tensor(spans), 160)
        assert found.shape == (B, 2 * C, 160, H)
        for row, (start, end) in enumerate(spans):
            assert not found[row, :, : 160 - (end - start)].any()
            assert distance(found[row, :, 160 - (end - start) :], wanted[row, :, start:end]) < TOLERANCE[dtype]


@pytest.mark.rare
@pytest.mark.parametrize("without", ["-mno-amx-bf16", "-mno-amx-bf16 -mno-avx512bf16"])
def test_other_processors_get_the_same(without, tmp_path):
    """Those without tiles, and without products of pairs: this file, in code that is made for them."""
    settings = {"XDG_CACHE_HOME": str(tmp_path), "CXX": f"c++ {without}"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-n",
        "0",
        "-p",
        "no:cacheprovider",
        "-k",
        "torch or mask",
        __file__,
    ]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True)
    assert done.returncode == 0 and "100%" in done.stdout, done.stdout[-3000:]
    assert list(tmp_path.rglob("*.so")), "code for them was made"

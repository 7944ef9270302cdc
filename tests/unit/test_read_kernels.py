"""Kernels of the CPU around products: unpacking, rotation, and both forms of a token under one softmax."""

import shutil

import pytest
import torch
from packed_forms import FORMS, distance

from kvfold.plan.number_format import NumberFormat
from kvfold.runtimes.kernels import aged_kernels, dispatch
from kvfold.runtimes.kernels import cpu as native
from kvfold.runtimes.kernels.aged_attention import attend_by_age
from kvfold.runtimes.kernels.codec import pack, unpack
from kvfold.runtimes.kernels.packed_tokens import AgedTokens, PackedTokens
from kvfold.runtimes.kernels.rotary import apply_rotary, rotate_fast
from kvfold.runtimes.transformers.projections import GroupedLinear

compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="this machine has no C++ compiler")


@pytest.fixture(autouse=True)
def same_numbers_every_time():
    torch.manual_seed(0)


@compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format", FORMS.values(), ids=FORMS)
def test_unpacking_gives_what_torch_gives(format, dtype):
    """A part of the tokens, and into columns of something larger, beside which nothing is written."""
    rows = pack(torch.randn(2, 3, 300, format.width), format)[:, :, 5:290]
    assert native.unpacks(rows, format, dtype)
    wanted, large = unpack(rows, format, torch.float64), torch.zeros(2, 3, 285, format.width + 80, dtype=dtype)
    tolerance = 4e-6 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(dispatch.unpack(rows, format, dtype).double(), wanted, atol=1e-6, rtol=tolerance)
    columns = large[..., 40:-40]
    assert dispatch.unpack(rows, format, dtype, columns) is columns
    torch.testing.assert_close(columns.double(), wanted, atol=1e-6, rtol=tolerance)
    assert not large[..., :40].any() and not large[..., -40:].any()


@compiler
@pytest.mark.parametrize("tables", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("B", "C", "S", "heads", "H", "r"),
    [(1, 1, 300, 3, 64, 64), (3, 2, 77, 2, 16, 16), (2, 1, 5, 3, 12, 12), (2, 1, 33, 4, 20, 8), (1, 1, 7, 1, 80, 34)],
)
def test_rotating_gives_what_torch_gives(B, C, S, heads, H, r, dtype, tables):
    """Groups of heads that stand side by side in other memory, tables for each row and for all."""
    x = torch.randn(B, S, C, heads * H + 5, dtype=torch.float64).to(dtype)[..., 5:].transpose(1, 2)
    for rows in {1, B}:
        angles = torch.randn(rows, S, r, dtype=torch.float64)
        cos, sin = angles.cos().to(tables), angles.sin().to(tables)
        wanted = apply_rotary(
            x.double().unflatten(3, (-1, H)).transpose(2, 3).flatten(1, 2), cos.double(), sin.double()
        )
        assert native.rotates(x, cos, sin)
        tolerance = 1e-6 if dtype == torch.float32 else 3e-3
        assert distance(dispatch.rotated_heads(x, H, cos, sin), wanted) < tolerance
        for pairs in {1, r // 4, r // 2 - 1}:
            fast = rotate_fast(
                x.double().unflatten(3, (-1, H)).transpose(2, 3).flatten(1, 2), cos.double(), sin.double(), pairs
            )
            assert distance(dispatch.rotated_heads(x, H, cos, sin, pairs), fast) < tolerance


@compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("N", "T", "H", "r", "pairs"), [(3, 9, 64, 64, None), (1, 400, 20, 8, 3), (4, 1, 80, 34, None)]
)
def test_heads_are_rotated_where_they_lie_by_their_own_positions(N, T, H, r, pairs, dtype):
    """A part of each row of other memory, which stays as it is."""
    memory, angles = torch.randn(T, N * H + 7).to(dtype), torch.randn(50, r, dtype=torch.float64)
    positions, before = torch.randint(0, 50, (T,)), memory.clone()
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    x = memory[:, 5 : 5 + N * H].unflatten(1, (N, H)).transpose(0, 1)
    tables = cos.double()[positions][None], sin.double()[positions][None]
    wanted = apply_rotary(x.double()[None], *tables) if pairs is None else rotate_fast(x.double()[None], *tables, pairs)
    native.rotate_at(x, positions, cos, sin, pairs)
    assert distance(x[None], wanted) < (1e-6 if dtype == torch.float32 else 3e-3)
    assert torch.equal(memory[:, :5], before[:, :5]) and torch.equal(memory[:, 5 + N * H :], before[:, 5 + N * H :])


@compiler
def test_torchs_default_device_is_not_what_counts():
    format, x, angles = FORMS["4_bits"], torch.randn(1, 1, 8, 64), torch.randn(1, 8, 32)
    rows = pack(x, format)
    with torch.device("meta"):
        numbers = dispatch.unpack(rows, format, torch.float32)
        heads = dispatch.rotated_heads(x, 32, angles, angles)
    assert numbers.device.type == heads.device.type == "cpu"
    torch.testing.assert_close(numbers, unpack(rows, format, torch.float32))


@compiler
@pytest.mark.parametrize("recent", [1, 16, 64, 500])
@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("is_packed", [False, True], ids=["numbers", "packed"])
@pytest.mark.parametrize("is_padded", [False, True], ids=["", "padded"])
def test_both_forms_under_one_softmax(is_padded, is_packed, queries, recent):
    """Whatever of the newest tokens is kept: far widths 40 and 24, near ones 64 and 33."""
    B, N, S, kept = 2, 6, 301, max(min(recent + 9, 301), min(recent + queries - 1, 301))
    widths, forms = ((40, 64), (24, 33)), []
    for at, (far, near) in enumerate(widths):
        stored = [torch.randn(B, 3 - at, tokens, width) for tokens, width in ((S, far), (kept, near))]
        formats = [NumberFormat(tiers=((width, bits),)) for width, bits in ((far, 4), (near, 8))]
        if is_packed:
            pairs = zip(stored, formats, strict=True)
            stored = [PackedTokens(pack(x, format), format, torch.float32) for x, format in pairs]
        forms.append(AgedTokens(stored[0], stored[1], recent))
    q = tuple(torch.randn(B, N, queries, width) for width in widths[0])
    mask = None
    if is_padded:
        mask = torch.ones(B, 1, queries, S, dtype=torch.bool).tril(S - queries)
        mask[0, ..., : S - 20] = False
    assert aged_kernels.serves(q, *forms)
    found = aged_kernels.attend(q, *forms, mask, 24 + 33, scale=0.3)
    wanted, _ = attend_by_age(q, *forms, mask, keys=None, width=24 + 33, by_masks=True, elements=64, scale=0.3)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_what_was_made_of_weights_follows_them(name):
    projection = GroupedLinear(1, 8, 16, bias=True)
    made = [projection.made("k_b", object) for _ in range(2)]
    assert made[0] is made[1]
    with torch.no_grad():
        getattr(projection, name).fill_(1)
    assert projection.made("k_b", object) is not made[0]

"""Queries that are turned instead of keys by the CPU's kernel (cpp/turn.h): what keys that are rebuilt and rotated give."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from packed_forms import FORMS, distance, heads, numbers_of, packed

from kvfold.plan.number_format import NumberFormat
from kvfold.runtimes.kernels import cpu_decode
from kvfold.runtimes.kernels.attention import grouped_attention
from kvfold.runtimes.kernels.codec import pack, unpack
from kvfold.runtimes.kernels.cpu_maps import _layout, met_by, tiles_for, tolerance_of
from kvfold.runtimes.kernels.packed_tokens import SideBySide
from kvfold.runtimes.kernels.rotary import apply_rotary
from kvfold.runtimes.kernels.turning import turning_functions

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="this machine has no C++ compiler")
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3}
MIXED = NumberFormat(tiers=((16, 6), (48, 4), (96, 2), (40, 1)))


@pytest.fixture(autouse=True)
def same_numbers_every_time():
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("B", "C", "S", "within", "H", "r", "N", "T"),
    [
        (2, 1, 700, 3, 64, 64, 9, 1),
        (1, 2, 515, 4, 32, 16, 8, 1),
        (3, 4, 131, 2, 16, 16, 8, 2),
        (1, 1, 2, 4, 64, 64, 4, 1),
    ],
)
def test_queries_that_are_turned_meet_keys_that_are_not(B, C, S, within, H, r, N, T, dtype):
    """The same scores as those of keys that are rebuilt and rotated: from any position on, after padding, over part of the
    tokens."""
    padding, fast = min(5, S // 2), r // 4
    speeds = tuple(0.0 if i < fast else 1 / 64 / 1.5 ** (i - fast) for i in range(r // 2))
    first = torch.tensor([0, 7, 90_000])[:B, None]
    positions = torch.cat([torch.ones(B, padding), first + torch.arange(S - padding)], dim=1).double()
    angles = (positions[:, :, None] * torch.tensor(speeds, dtype=torch.float64)).repeat(1, 1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    stored = SideBySide([packed(B, C, S, dtype, FORMS["tiers"]), torch.randn(B, C, S, 24).to(dtype)])
    q, numbers = torch.randn(B, N, T, H).to(dtype), numbers_of(stored)
    weight, offset = torch.randn(C, within * H, numbers.shape[3]) / numbers.shape[3] ** 0.5, torch.randn(C, within * H)
    way = cpu_decode.HeadMap.of(weight.to(dtype), offset.to(dtype), H, speeds)
    keys = apply_rotary(heads(numbers, weight.to(dtype), offset.to(dtype), H), cos.double(), sin.double())
    hidden = torch.zeros(B, 1, T, S, dtype=torch.float64)
    hidden[..., :padding] = float("-inf")
    seen = torch.tensor([[0, S, S - T]] * B)
    real = S - padding - T + 1
    for ages, bias in (((0, S), hidden), ((0, real), None), ((S // 3, real), None)):
        age = torch.arange(S - T, S)[:, None] - torch.arange(S)
        mask = torch.zeros(T, S, dtype=torch.float64).masked_fill((age < ages[0]) | (age >= ages[1]), float("-inf"))
        wanted, _ = grouped_attention(q.double(), keys, numbers, mask if bias is None else mask + bias, scale=0.2)
        facts = {"scale": 0.2, "ages": ages, "sequences_B3": seen}
        mask_bias = None if bias is None else bias.float().clamp_min(-1e30)
        turned = cpu_decode.decode_part(
            q, stored, stored, mask_bias, **facts, rebuild=way.rebuild(cos, sin, evenly=True)
        )
        rebuilt = cpu_decode.decode_part(q, stored, stored, mask_bias, **facts, rebuild=way.rebuild(cos, sin))
        assert distance(turned.averages.transpose(1, 2), wanted) < TOLERANCE[dtype] * 5
        if T == 1 and S > 2:  # of two queries it may be less work to rebuild keys
            assert not torch.equal(turned.averages, rebuilt.averages)


def test_queries_are_turned_as_exactly_as_bits_are():
    """An eighth of what the bits on average are off by, and never more exactly than numbers of the dtype need."""
    eight, few = NumberFormat(tiers=((40, 8),)), NumberFormat(tiers=((16, 4), (48, 2)))
    assert few.mean_bits == 2.5
    assert tolerance_of(torch.float32) == 1e-6 and tolerance_of(torch.float32, eight) == 2.0**-12
    assert tolerance_of(torch.bfloat16, eight) == 1e-3
    assert tolerance_of(torch.bfloat16, few) == tolerance_of(torch.float32, few)
    assert tolerance_of(torch.float32, few) == pytest.approx(2.0**-6.5)
    speeds = tuple(1e5 ** (-2 * i / 64) for i in range(12, 32))
    for bits in (8, 2.5):
        (basis, shares, _, reach), wanted = turning_functions(speeds, 2.0 ** -(bits + 4)), 2.0 ** -(bits + 4)
        place = torch.arange(basis.shape[1]) - (basis.shape[1] - 1) / 2
        angle_PS = torch.tensor(speeds)[:, None] * place
        assert (shares[0::2].T @ basis[0::2] - angle_PS.cos()).abs().max() < wanted
        assert (shares[1::2].T @ basis[1::2] - angle_PS.sin()).abs().max() < wanted
        assert all(not share[int(pairs) :].any() for share, pairs in zip(shares, reach, strict=True))


def turned_keys(numbers_BCSR, weight_CFR, offset_CF, H, speeds, turn):
    """Keys [B, K, S, H] as turned queries see them: tile by tile, from position 0 on, rotated as far as the middle of a tile
    and by what each function says from there on of the numbers that it meets. In float64, function by function."""
    (basis, shares, *_), step, R = turn.functions, 2 * _layout()[0], weight_CFR.shape[2]
    place_S, number_R, tokens = torch.arange(numbers_BCSR.shape[2]), torch.arange(R), basis.shape[1]
    own = R if turn.fine == R else turn.fine // step * step
    middle_S = place_S // tokens * tokens + (tokens - 1) / 2
    angle_SP = middle_S[:, None].double() * torch.tensor(speeds, dtype=torch.float64)
    made = 0
    for k, first in enumerate(turn.coarse.tolist()):
        met_R = (number_R < -(-first // step) * step) | (number_R >= own)
        said_SP = basis[k, place_S % tokens, None].double() * shares[k].double()
        cos, sin = angle_SP.cos() * said_SP, angle_SP.sin() * said_SP
        tables = (cos, sin) if k % 2 == 0 else (-sin, cos)
        keys = heads(numbers_BCSR, weight_CFR * (met_R if k else 1), offset_CF, H)
        made = made + apply_rotary(keys, *(table.repeat(1, 2)[None] for table in tables))
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("N", "within", "H", "beside"), [(9, 3, 64, 40), (9, 3, 64, 0), (4, 4, 32, 8), (4, 2, 80, 100)]
)
def test_coarse_numbers_meet_one_function(N, within, H, beside, dtype):
    """Behind numbers of few bits lie others, of layers below, that all functions meet."""
    B, S = 2, 333
    speeds = tuple(0.0 if i < 2 else 1 / 64 / 1.4 ** (i - 2) for i in range(H // 2))
    angles = (torch.arange(S)[:, None] * torch.tensor(speeds, dtype=torch.float64)).repeat(1, 2)[None]
    of_packed = packed(B, 1, S, dtype, MIXED)
    stored = SideBySide([of_packed, torch.randn(B, 1, S, beside).to(dtype)]) if beside else of_packed
    q, numbers = torch.randn(B, N, 1, H).to(dtype), numbers_of(stored)
    weight = (torch.randn(1, within * H, numbers.shape[3]) / numbers.shape[3] ** 0.5).to(dtype)
    offset = torch.randn(1, within * H).to(dtype)
    way = cpu_decode.HeadMap.of(weight, offset, H, speeds, format=MIXED)
    assert way.turn.fine == 200 and way.turn.coarse.tolist()[:3] == [200, 64, 16]
    rebuild = way.rebuild(angles.cos().to(dtype), angles.sin().to(dtype), evenly=True)
    found = cpu_decode.decode_part(q, stored, stored, scale=0.2, ages=(0, S), rebuild=rebuild).averages.transpose(1, 2)
    keys = turned_keys(numbers, weight, offset, H, speeds, way.turn)
    wanted, _ = grouped_attention(q.double(), keys, numbers, None, scale=0.2)
    exact = apply_rotary(heads(numbers, weight, offset, H), angles.cos(), angles.sin())
    assert distance(found, wanted) < TOLERANCE[dtype] * 5
    assert distance(keys, exact) > 3 * TOLERANCE[torch.float32]


def test_what_coarse_numbers_lose_is_less_than_what_they_are_off_by():
    """Of keys of a real model's speeds whose numbers all weigh the same."""
    H, S = 64, 256
    speeds = tuple(0.0 if i < 12 else 1e5 ** (-2 * i / 64) for i in range(H // 2))
    exact = torch.randn(1, 1, S, MIXED.width)
    numbers = unpack(pack(exact, MIXED), MIXED, torch.float64)
    weight = torch.randn(1, H, MIXED.width) / MIXED.width**0.5
    turn = cpu_decode.HeadMap.of(weight, None, H, speeds, format=MIXED).turn
    angles = (torch.arange(S)[:, None] * torch.tensor(speeds, dtype=torch.float64)).repeat(1, 2)[None]
    rotated = [apply_rotary(heads(x, weight, None, H), angles.cos(), angles.sin()) for x in (exact.double(), numbers)]
    assert (
        distance(turned_keys(numbers, weight, None, H, speeds, turn), rotated[1]) < distance(rotated[1], rotated[0]) / 3
    )


def test_functions_for_packed_numbers_are_as_many_as_pairs_need_on_average():
    """The fastest pair alone would need more."""
    speeds, tolerance = tuple(0.0 if i < 12 else 1e5 ** (-2 * i / 64) for i in range(32)), 2.0**-7
    every, mean = (turning_functions(speeds, tolerance, (128,), (1.0,), on_average) for on_average in (False, True))
    assert len(every.basis) == 4 and len(mean.basis) == 3
    angle_PS = torch.tensor(speeds)[:, None] * (torch.arange(128) - 63.5)
    cosines = (mean.shares[0::2].T @ mean.basis[0::2] - angle_PS.cos()).abs().amax(1)
    sines = (mean.shares[1::2].T @ mean.basis[1::2] - angle_PS.sin()).abs().amax(1)
    assert sines.max() > 2 * tolerance
    assert max(cosines.square().mean().sqrt(), sines.square().mean().sqrt()) < tolerance


def test_functions_meet_numbers_of_many_bits():
    """And the first tier, whatever its bits."""
    assert [met_by(k, MIXED) for k in range(5)] == [200, 64, 16, 16, 16]
    assert [met_by(k, NumberFormat(tiers=((32, 2),))) for k in range(3)] == [32, 32, 32]
    assert [met_by(k, NumberFormat(tiers=((16, 3), (32, 2)))) for k in range(3)] == [48, 16, 16]
    assert [met_by(k, NumberFormat(tiers=((8, 8), (16, 8), (8, 6), (8, 8)))) for k in range(3)] == [40, 40, 24]


def test_queries_are_turned_for_as_many_tokens_as_there_are():
    """At the cost of fewer functions; two tiles where one would be longer than the tokens."""
    assert [list(tiles_for(speed, tokens)) for speed, tokens in ((2 / 70, None), (2 / 70, 33), (1.0, 500), (None, 20))] == [
        [32, 64], [32, 64], [32], [32],
    ]  # fmt: skip
    assert list(tiles_for(None, None)) == list(range(32, 513, 32))
    speeds = tuple(0.0 if i < 12 else 1e5 ** (-2 * i / 64) for i in range(32))
    fine, weight = NumberFormat(tiers=((96, 8),)), torch.randn(1, 64, 96).bfloat16()
    many, few = (
        cpu_decode.HeadMap.of(weight, None, 64, speeds, format=fine, tokens=tokens).turn.functions
        for tokens in (None, 64)
    )
    assert (len(many.basis), len(few.basis)) == (4, 3) and few.basis.shape[1] == 64 < many.basis.shape[1]


def test_functions_are_chosen_by_what_they_cost():
    """Where those behind the first one meet few numbers more of them, for more tokens, are less work."""
    speeds = tuple(1e5 ** (-2 * i / 64) for i in range(12, 32))
    all_met, few_met = (turning_functions(speeds, 2.0**-7, told=told) for told in ((1.0,), (1.0, 0.3, 0.1)))
    assert few_met.basis.shape[1] > all_met.basis.shape[1]
    assert few_met.products((1.0, 0.3, 0.1)) < all_met.products((1.0, 0.3, 0.1)) < all_met.products()


@pytest.mark.rare
@pytest.mark.parametrize("without", ["-mno-avx512f", "-mno-avx512f -mno-avx2 -mno-avx"])
def test_shorter_vectors_find_the_same(without, tmp_path):
    """This file, in code for processors with vectors of 8 and of 4 numbers, whose containers are watched."""
    settings = {"XDG_CACHE_HOME": str(tmp_path), "CXX": f"c++ {without} -D_GLIBCXX_DEBUG"}
    which = ["-k", "coarse or turned", "-n", "0", "-p", "no:cacheprovider", __file__]
    command = [sys.executable, "-m", "pytest", "-q", *which]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True)
    assert done.returncode == 0 and "100%" in done.stdout, done.stdout[-3000:]
    assert list(tmp_path.rglob("*.so")), "code for them was made"

"""cos and sin that are kept from step to step are those that would be made anew, bit for bit."""

import copy
from types import SimpleNamespace

import pytest
import torch

from kvfold.runtimes.kernels.rotary import made_tables, slow_tables
from kvfold.runtimes.transformers.forward_state import ForwardState
from kvfold.runtimes.transformers.on_read import tables_on_read
from kvfold.runtimes.transformers.position_tables import BLOCK, PositionTables

SPEEDS = (1.0, 0.3, 0.01, 1e-4)


class Made:
    """Tables, and for how many positions each time."""

    def __init__(self, dtype=torch.float32):
        self.dtype, self.asked = dtype, []

    def __call__(self, positions):
        self.asked.append(positions.numel())
        return made_tables(SPEEDS, torch.empty(0, dtype=self.dtype), positions)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_tables_are_those_made_anew(dtype):
    tables, make, again = PositionTables(), Made(dtype), Made(dtype)
    counted, padded = torch.arange(1500), (torch.arange(1500) - 7).clamp_min(0)
    jumping = torch.cat([torch.arange(700), torch.arange(900, 1700)])
    for rows in ([counted[:300]], [counted] * 2, [counted, padded], [padded], [counted, jumping], [counted[1:]]):
        positions = torch.stack([row[: min(map(len, rows))] for row in rows])
        for found, wanted in zip(tables.of("all", positions, make), again(positions), strict=True):
            assert torch.equal(found.expand_as(wanted), wanted)
    assert make.asked == [BLOCK, 2 * BLOCK]  # not once for every step


def test_positions_that_follow_each_other_are_not_copied():
    tables, make = PositionTables(), Made()
    first, second = (tables.of("all", torch.arange(n).expand(3, n), make)[0] for n in (40, 41))
    assert first.data_ptr() == second.data_ptr() and first.shape[0] == 1 and len(make.asked) == 1
    other = tables.of("others", torch.arange(40)[None], make)[0]
    assert other.data_ptr() != first.data_ptr()


def test_a_position_far_away_makes_no_table_of_all_before_it():
    tables, make = PositionTables(), Made()
    (cos, _), wanted = tables.of("all", torch.tensor([[10**9]]), make), Made()(torch.tensor([[10**9]]))
    assert torch.equal(cos, wanted[0]) and make.asked == [1] and not tables.made


def test_tables_of_inference_serve_training_and_are_not_copied_with_a_model():
    tables, make = PositionTables(), Made()
    with torch.inference_mode():
        tables.of("all", torch.arange(9)[None], make)
    x = torch.ones(9, 8, requires_grad=True)
    (x * tables.of("all", torch.arange(9)[None], make)[0][0]).sum().backward()
    assert x.grad is not None and len(make.asked) == 1
    assert not copy.deepcopy(tables).made


def test_positions_before_the_first_are_those_made_anew():
    tables, make, again = PositionTables(), Made(), Made()
    tables.of("all", torch.arange(50)[None], make)
    for positions in (torch.arange(-3, 10), torch.arange(-5000, -4990)):
        for found, wanted in zip(tables.of("all", positions[None], make), again(positions[None]), strict=True):
            assert torch.equal(found, wanted)


def test_tables_are_made_anew_when_what_they_are_made_by_changes():
    tables, positions, speeds = PositionTables(), torch.arange(9)[None], torch.tensor([1.0, 0.1])

    def cos_of(speeds):
        def make(at):
            angles = at[..., None] * speeds
            return angles.cos(), angles.sin()

        return tables.of("all", positions, make, [speeds])[0]

    first = cos_of(speeds)
    assert cos_of(speeds).data_ptr() == first.data_ptr()
    assert not torch.equal(cos_of(speeds.clone() / 2), first)
    assert torch.equal(cos_of(speeds), first)
    speeds.mul_(3)
    assert not torch.equal(cos_of(speeds), first)


def test_another_default_device_makes_no_tables_there():
    with torch.device("meta"):
        cos, _ = PositionTables().of("all", torch.arange(9, device="cpu")[None], Made())
    assert cos.device.type == "cpu"


class Cache:
    """Sees positions."""

    def see(self, positions, rows):
        return positions.expand(rows, -1)


@pytest.mark.parametrize("cache", [None, Cache()])
@pytest.mark.parametrize("fast_pairs", [0, 1])
def test_a_layer_that_does_not_rotate_gets_no_tables_of_one_that_does(cache, fast_pairs):
    hidden, positions = torch.zeros(2, 6, 16), torch.arange(6)[None]

    def rotary(like, at):
        return made_tables(SPEEDS, like, at)

    def tables(rotary_dim, state):
        layer = SimpleNamespace(rotary_dim=rotary_dim, rotary_kind=None, tables_interleaved=False)
        attention = SimpleNamespace(layer=layer, spec=SimpleNamespace(fast_pairs=fast_pairs))
        own = rotary(hidden, positions) if rotary_dim else None
        return tables_on_read(attention, own, state, cache, hidden, positions)

    for order in ((0, 8), (8, 0)):
        state = ForwardState(rotary, PositionTables())
        found = {rotary_dim: tables(rotary_dim, state) for rotary_dim in order}
        assert found[0] is None
        wanted = rotary(hidden, positions)
        wanted = slow_tables(*wanted, fast_pairs) if fast_pairs else wanted
        assert all(torch.equal(a, b) for a, b in zip(found[8], wanted, strict=True))

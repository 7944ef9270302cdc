"""cos and sin that are kept from step to step are those that would be made anew, bit for bit."""

import copy

import pytest
import torch

from kvfold.runtimes.kernels.rotary import made_tables
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

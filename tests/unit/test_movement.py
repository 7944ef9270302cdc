"""How much calibration text is enough."""

import json
import warnings

import pytest
import torch
from tiny import make_tiny, save_tiny, tokens

from kvfold.calibrate import STATISTICS, calibrate
from kvfold.data import most_diverse
from kvfold.gather import MOST, SETTLED, Material
from kvfold.linalg import Moment
from kvfold.loading import open_source
from kvfold.movement import Halves, movement
from kvfold.recipe import make_recipe


def moment(x):
    return Moment(x.mean(0), x.T @ x / len(x), len(x))


def test_movement_falls_with_more_vectors():
    torch.manual_seed(0)
    x = torch.randn(40_000, 32).double() * torch.logspace(0, -1.5, 32)
    found = [movement(*(part.T @ part / n for part in (x[:n], x[-n:]))) for n in (50, 500, 5000, 20_000)]
    assert found == sorted(found, reverse=True) and found[0] > 0.1 > 0.01 > found[-1] >= 0


def test_halves_are_those_of_the_sequences():
    torch.manual_seed(0)
    x, halves, whole = torch.randn(60, 6).double(), Halves(6), {"keys": Moment.zeros(6)}
    for part in x.split(10):
        whole["keys"].update(part)
        halves.take(1, whole)
    expected = movement(*(moment(part).second_FF for part in (x[:30], x[30:])))
    assert halves.moved(whole) == pytest.approx(expected, rel=1e-9)
    assert Halves(1).moved({}) == 0.0


def test_one_sequence_says_nothing(tiny_dir, tmp_path):
    source = open_source(tiny_dir / "llama_mha")
    options = {"needs": frozenset({"keys"}), "run_dir": tmp_path}
    assert calibrate(source.checkpoint, source.arch, tokens(1, 16), **options).moved == float("inf")
    both = calibrate(source.checkpoint, source.arch, tokens(8, 16), **options)
    assert 0 < both.moved < float("inf")
    again = calibrate(source.checkpoint, source.arch, tokens(8, 16), **options)
    assert again == both and json.loads((both.folder / "statistics.json").read_text())["moved"] == both.moved
    assert "averaged_values" in STATISTICS


@pytest.fixture
def material(tmp_path, monkeypatch):
    def make(needed):
        """Statistics that settle from `needed` sequences on."""
        source = save_tiny(make_tiny("llama_mha"), tmp_path / f"source-{needed}")
        recipe = make_recipe(
            {"model": str(source), "out": str(tmp_path / "out"), "preset": "svd_a", "calibration": {"data": "self"}}
        )
        found = Material(recipe, open_source(source), tmp_path / "run")
        monkeypatch.setattr(Material, "tokens", lambda self: tokens(self.num_samples, 8))
        monkeypatch.setattr("kvfold.gather.calibrate", lambda checkpoint, arch, ids, **_: _Settling(len(ids), needed))
        return found

    return make


class _Settling:
    def __init__(self, sequences, needed):
        self.sequences = sequences
        self.moved = 0.0 if sequences >= needed else 2 * SETTLED


def test_text_is_doubled_until_the_directions_settle(material):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert material(100).statistics(frozenset({"keys"})).sequences == 128


def test_a_subspace_that_never_settles_is_a_warning(material):
    with pytest.warns(UserWarning, match=rf"after {MOST} sequences .* still\s+differ by 10%"):
        assert material(10**9).statistics(frozenset({"keys"})).sequences == MOST


def test_diverse_sequences_are_those_that_share_least():
    alike, other = torch.arange(8).repeat(5, 1), torch.arange(8, 16)
    pool = torch.cat([alike, other[None], alike + 16])
    chosen = most_diverse(pool, 3)
    assert {row[0].item() for row in chosen} == {0, 8, 16}
    assert len(most_diverse(pool, 50)) == len(pool)

"""How many sequences fit."""

import json

import pytest
from tiny import make_tiny, save_tiny
from typer.testing import CliRunner

import kvfold
from kvfold.checkpoint.reader import Checkpoint
from kvfold.cli.main import app
from kvfold.errors import RecipeError
from kvfold.evaluation.demo import MODEL
from kvfold.evaluation.memory import USED, capacity, parse_size


def test_what_fits_is_what_the_bytes_say():
    """books-6l: 4,608 bytes per token, 6,876,288 bytes of weights."""
    found = capacity(MODEL, memory=100_000_000, context=1000, wanted=80)
    room = USED * 100_000_000 - found.weights
    assert found.weights == sum(tensor.nbytes for tensor in Checkpoint.open(MODEL).tensors.values())
    assert [row.sequences for row in found.rows[:3]] == [int(room // (4_608_000 * share)) for share in (1, 0.5, 0.25)]
    assert found.needed == pytest.approx(room / 80 / 4_608_000)
    assert capacity(MODEL, memory=1000, context=10, wanted=1).needed == 0


def test_a_folded_model_shows_its_own_cache(tmp_path):
    save_tiny(make_tiny("mistral_window"), tmp_path / "source")
    recipe = {
        "model": str(tmp_path / "source"),
        "out": str(tmp_path / "out"),
        "width": {"method": "mean_pool"},
        "kv_budget": 0.5,
    }
    plan = kvfold.compress(recipe).plan
    rows = capacity(tmp_path / "out", memory=10**8, context=100).rows
    assert [row.label for row in rows] == ["original's cache", "this model"]
    assert rows[1].bytes_per_sequence == plan.kv_bytes(100) and rows[0].bytes_per_sequence == plan.source_kv_bytes(100)


def test_the_command_prints_a_table_and_what_is_needed():
    done = CliRunner().invoke(app, ["inspect", str(MODEL), "--memory", "64MB", "--context", "2k", "--sequences", "40"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout.strip().splitlines()[-1])["capacity"]
    assert found["context"] == 2048 and found["memory"] == 64_000_000 and "40 sequences" in done.stdout
    assert found["rows"][0]["sequences"] < 40 and found["needed"] < 1
    missing = CliRunner().invoke(app, ["inspect", str(MODEL), "--sequences", "40"])
    assert missing.exit_code and "--sequences goes with --memory" in missing.output
    full = CliRunner().invoke(app, ["inspect", str(MODEL), "--memory", "6MB"])
    assert "Not one sequence fits" in full.output and "--memory" not in full.output


def test_sizes():
    assert [parse_size(t) for t in ("80GB", "1.5GiB", "2,000", "7 MB")] == [80 * 10**9, 3 * 2**29, 2000, 7 * 10**6]
    assert parse_size("32k", binary=True) == 32768 and parse_size("32k") == 32000
    for wrong in ("much", "8XB", "", "1.2.3", "1,5GB", "0"):
        with pytest.raises(RecipeError, match="is not a size|is nothing"):
            parse_size(wrong)

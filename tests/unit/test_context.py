"""What a cache still knows of a long context."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import kvfold
from kvfold.checkpoint.tokenizer import load_tokenizer
from kvfold.cli.main import app
from kvfold.compression.recipe import make_recipe
from kvfold.errors import DataError, RecipeError
from kvfold.evaluation.context import KINDS, LEAST_CONTEXT, draw_samples, measure_context

MODEL = Path(kvfold.__file__).parent / "demo_model" / "books-6l"
TEXT = Path(__file__).parents[1] / "data" / "books-valid-slice.txt"


def fold(out, **length):
    fields = {"model": str(MODEL), "out": str(out), "context_len": 512, "length": {"method": "recency"} | length}
    return kvfold.compress(make_recipe(fields | {"preset": "streaming_llm"}), device="cpu")


@pytest.mark.filterwarnings("ignore:sequences of 512")
def test_everything_kept_knows_what_the_original_knows(tmp_path):
    folded = fold(tmp_path / "all", kept=1.0, sharing="equal")
    rows = measure_context(folded.out, against=MODEL, data_file=TEXT, lengths=[512], sequences=2)
    assert [row.kind for row in rows] == list(KINDS)
    for row in rows:
        assert row.kl < 1e-6 and row.accuracy == row.base_accuracy
        assert row.cache_bytes == row.base_cache_bytes


@pytest.mark.filterwarnings("ignore:sequences of 512")
def test_what_was_dropped_is_missed_and_its_bytes_are_gone(tmp_path):
    folded = fold(tmp_path / "few", kept=0.125, sharing="equal")
    rows = measure_context(folded.out, against=MODEL, data_file=TEXT, lengths=[512], sequences=2)
    assert rows[0].kl > 1e-4
    assert rows[0].cache_bytes == folded.plan.kv_bytes(512, dtype="float32") < rows[0].base_cache_bytes / 4


def test_every_fact_is_hidden_once_and_asked_for():
    tokenizer = load_tokenizer(MODEL)
    samples = draw_samples(tokenizer, TEXT, length=600, sequences=3)
    assert len({tuple(sample.context) for sample in samples}) == 3
    for sample in samples:
        text = tokenizer.decode(sample.context)
        assert len(sample.context) == 600 and text.count("The secret code of") == 4
        for question in sample.questions:
            asked = tokenizer.decode(question.tokens)
            if question.kind in ("needles", "pairs"):
                assert asked.strip() in text
            if question.kind == "copies":
                assert tokenizer.decode(question.tokens[-22:]) in text
        kinds = [question.kind for question in sample.questions]
        assert {kind: kinds.count(kind) for kind in KINDS} == dict(zip(KINDS, (1, 4, 3, 4), strict=True))


def test_bad_input():
    tokenizer = load_tokenizer(MODEL)
    with pytest.raises(RecipeError, match=f"leaves no room for what is asked; give {LEAST_CONTEXT} or more"):
        draw_samples(tokenizer, TEXT, length=100, sequences=2)
    with pytest.raises(DataError, match=r"has [\d,]+ tokens; 1000 contexts of 1,024 need"):
        draw_samples(tokenizer, TEXT, length=1024, sequences=1000)
    found = CliRunner().invoke(app, ["evaluate", str(MODEL), "--against", str(MODEL), "--context", "1024"])
    assert found.exit_code == 2 and "--data" in found.output


@pytest.mark.filterwarnings("ignore:sequences of 512")
def test_presets_are_compared_by_what_they_remember(tmp_path):
    """Beside their loss on windows, which does not see what was dropped; at equal bytes, over that context."""
    text = tmp_path / "text.txt"
    text.write_text(TEXT.read_text())
    command = [
        "compare", str(MODEL), "--preset", "streaming_llm", "--preset", "knorm", "--kv-budget", "1/4", "--context", "512",
        "--sequences", "2", "--eval-data", str(text), "--data", "self", "--num-samples", "4", "--seq-len", "64",
        "--max-tokens", "128", "--out", str(tmp_path / "out"),
    ]  # fmt: skip
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    rows = json.loads((tmp_path / "out" / "comparison.json").read_text())["rows"]
    assert [row["preset"] for row in rows] == ["streaming_llm", "knorm"]
    for row in rows:
        assert [one["kind"] for one in row["remembered"]] == list(KINDS)
        assert row["plan"]["context_len"] == 512 and 0.2 < row["remembered"][0]["kv_share"] < 0.4
    assert "needles after 512 tokens (original" in (tmp_path / "out" / "table.md").read_text()
    command[command.index("--eval-data") : command.index("--data")] = []
    assert "give it with --eval-data" in str(CliRunner().invoke(app, command).exception)

"""What a benchmark reports: bytes that are really there, times that add up."""

import json
from types import SimpleNamespace

import pytest
from tiny import make_tiny, save_tiny
from typer.testing import CliRunner

import kvfold
from kvfold.cli.main import app
from kvfold.errors import RecipeError
from kvfold.evaluation.geometries import Shape
from kvfold.evaluation.published_shapes import SHAPES
from kvfold.evaluation.speed import bench
from kvfold.evaluation.throughput import FOLLOW_UP, answer_turns


@pytest.mark.parametrize("model", ["llama_mha", "bloom_alibi", "neox_partial"])
def test_folders_against_the_original(tmp_path, model):
    source = save_tiny(make_tiny(model), tmp_path / "source")
    recipe = {"model": str(source), "out": str(tmp_path / "folded"), "width": {"method": "mean_pool"}, "kv_budget": 0.5}
    plan = kvfold.compress(recipe).plan
    found = bench([tmp_path / "folded"], against=source, batch=2, context=40, steps=3, prefills=1, device="cpu")
    rows = {row.label: row for row in found.rows}
    first, folded = rows["original, DynamicCache"], rows["folded"]
    assert ("original, StaticCache" in rows) == (model != "bloom_alibi")
    assert folded.stored_bytes == plan.kv_bytes(46, batch_size=2) and folded.read_bytes == 2 * plan.kv_read_bytes(40)
    assert first.stored_bytes == plan.source_kv_bytes(46, batch_size=2)
    assert 0 < folded.attention < folded.tpot and folded.ttft > 0 and folded.kv_budget == 0.5
    assert 0 < folded.bandwidth < 1 and found.copy_bytes_per_second > 1e8


def test_attention_to_recent_tokens_is_timed_and_counted(tmp_path):
    source = save_tiny(make_tiny("llama_mha"), tmp_path / "source")
    recipe = {"model": str(source), "out": str(tmp_path / "folded"), "width": {"method": "identity"}}
    recipe |= {"bits": {"method": "integer"}, "length": {"method": "recent", "tokens": 8}}
    plan = kvfold.compress(recipe).plan
    found = bench([tmp_path / "folded"], against=source, batch=2, context=40, steps=3, prefills=1, device="cpu")
    (row,) = (row for row in found.rows if row.label == "folded")
    assert 0 < row.attention < row.tpot and row.stored_bytes == plan.kv_bytes(46, batch_size=2)


@pytest.mark.parametrize("method", ["recency", "scored"])
def test_heads_that_drop_tokens_are_timed_and_counted(tmp_path, method):
    source = save_tiny(make_tiny("llama_mha"), tmp_path / "source")
    recipe = {"model": str(source), "out": str(tmp_path / "folded"), "width": {"method": "identity"}, "context_len": 40}
    recipe |= {"length": {"method": method, "kept": 0.5, "newest": 4, "sharing": "equal"}}
    plan = kvfold.compress(recipe).plan
    found = bench([tmp_path / "folded"], against=source, batch=2, context=40, steps=3, prefills=1, device="cpu")
    (row,) = (row for row in found.rows if row.label == "folded")
    assert 0 < row.attention < row.tpot and row.stored_bytes == plan.kv_bytes(46, batch_size=2)


def test_latents_that_layers_fill_together_are_timed(tmp_path):
    source = save_tiny(make_tiny("llama_mha"), tmp_path / "source")
    recipe = {"model": str(source), "out": str(tmp_path / "folded"), "preset": "xkv", "kv_budget": 0.5}
    kvfold.compress(recipe | {"calibration": {"data": "self", "num_samples": 4, "seq_len": 32}})
    found = bench([tmp_path / "folded"], against=source, batch=2, context=40, steps=3, prefills=1, device="cpu")
    (row,) = (row for row in found.rows if row.label == "folded")
    assert 0 < row.attention < row.tpot and row.bandwidth > 0


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_is_the_published_one(name):
    shape = Shape(name=name, layers=1)
    config = shape.config()
    assert shape.published_layers in (12, 30, 32, 40) and config.num_hidden_layers == 1
    elements = {"llama2-7b": 8192, "llama2-13b": 10240, "llama3-8b": 2048, "bloomz-7b1": 8192, "pythia-160m": 1536}
    plan = shape.plan(kvfold.make_recipe({"model": "-", "out": "-", "preset": "identity"}), "bfloat16")
    assert plan.kv_bytes_per_token() == 2 * elements[name]


def test_the_command_measures_a_shape_and_draws_it(tmp_path):
    command = [
        "bench",
        "--shape",
        "pythia-160m",
        "--layers",
        "1",
        "--kv-heads",
        "6",
        "--preset",
        "int8",
        "--batch",
        "2",
    ]
    command += [
        "--context",
        "64",
        "--steps",
        "2",
        "--prefills",
        "1",
        "--device",
        "cpu",
        "--plot",
        str(tmp_path / "speed.svg"),
    ]
    done = CliRunner().invoke(app, command, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout.strip().splitlines()[-1])
    rows = {row["label"]: row for row in found["rows"]}
    assert rows["6 heads"]["kv_budget"] == 0.5 and 0.5 < rows["int8"]["kv_budget"] < 0.53
    assert rows["6 heads"]["read_bytes"] == rows["identity"]["read_bytes"] / 2
    assert found["layers"] == 1 and found["of_layers"] == 12
    assert (tmp_path / "speed.svg").read_text().startswith("<?xml")


def test_mistakes_are_named():
    with pytest.raises(RecipeError, match="Did you mean 'llama2-7b'"):
        Shape(name="llama2-7", layers=1)
    with pytest.raises(RecipeError, match="has 12 layers; 13 were asked for"):
        Shape(name="pythia-160m", layers=13)
    for command in (["bench"], ["bench", "x"], ["bench", "x", "--against", "y", "--shape", "llama2-7b"]):
        with pytest.raises(RecipeError, match="give folders and --against MODEL, or --shape"):
            CliRunner().invoke(app, command, catch_exceptions=False)
    for option in (["--compiled"], ["--max-num-batched-tokens", "128"]):
        done = CliRunner().invoke(app, ["bench", "x", "--against", "y", *option])
        assert done.exit_code == 2 and f"{option[0]} goes with an --engine that" in done.output


def test_requests_that_come_back():
    """Each turn asks with all that was said before it; all turns are timed."""
    asked = []

    def answer(prompts, tokens):
        asked.append(prompts)
        answers = [[len(asked)] * tokens for _ in prompts]
        return SimpleNamespace(seconds=len(asked), ttft=0.1 * len(asked), tpot=0.01 * len(asked), tokens=answers)

    first = [[5, 6, 7], [8, 9]]
    speed, ttft, tpot = answer_turns(SimpleNamespace(answer=answer), first, 4, turns=3)
    assert (speed, ttft, tpot) == (2 * 4 * 3 / 6, 0.2, 0.02)
    for before, after, turn in zip(asked, asked[1:], (1, 2), strict=False):
        for old, new in zip(before, after, strict=True):
            assert new[: len(old) + 4] == [*old, *[turn] * 4] and len(new) == len(old) + 4 + FOLLOW_UP
    assert asked[0] == first and asked[2][0][-FOLLOW_UP:] != asked[2][1][-FOLLOW_UP:]

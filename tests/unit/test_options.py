"""What the command line refuses, and names of folders that lead nowhere: said before anything takes long."""

from __future__ import annotations

import json

import pytest
from tiny import make_tiny, save_tiny
from typer.testing import CliRunner

import kvfold
from kvfold.checkpoint import folder as folders
from kvfold.checkpoint.folder import new_folder, refuse_out
from kvfold.cli.main import app
from kvfold.errors import HealError, OutputError, RecipeError
from kvfold.evaluation.demo import MODEL


def run(*arguments):
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return done.exit_code, f"{done.output}{done.exception or ''}"


@pytest.fixture(scope="module")
def folded(tmp_path_factory):
    out = tmp_path_factory.mktemp("options") / "folded"
    kvfold.compress({"model": str(MODEL), "out": str(out), "preset": "int4"}, device="cpu")
    return out


EVALUATE = ("evaluate", "{}", "--against", MODEL, "--data", "a")
BENCH = ("bench", "{}", "--against", MODEL)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((*EVALUATE, "--limit", "3"), "--limit goes with --tasks"),
        ((*EVALUATE, "--limit", "3", "--num-fewshot", "0"), "--limit and --num-fewshot go with --tasks"),
        ((*EVALUATE, "--sequences", "4"), "--sequences goes with --context"),
        (
            ("evaluate", "{}", "--against", MODEL, "--recall", "16", "--max-tokens", "9"),
            "--max-tokens goes with --data",
        ),
        ((*EVALUATE, "--context", "64", "--data", "b"), "--context goes with one --data"),
        ((*EVALUATE, "--context", "64", "--max-tokens", "9"), "--context goes with one --data"),
        ((*BENCH, "--turns", "2"), "--turns goes with an --engine that serves requests"),
        ((*BENCH, "--rounds", "3"), "--rounds goes with an --engine that serves requests"),
        ((*BENCH, "--layers", "2", "--preset", "int4"), "--layers and --preset go with --shape"),
        ((*BENCH, "--engine", "vllm", "--prefills", "1"), "--prefills goes with --engine transformers"),
        (("generate", "{}", "--temperature", "0.5"), "--temperature goes with --sample"),
        (
            ("compare", "{}", "--preset", "int4", "--kv-budget", "1", "--sequences", "4"),
            "--sequences goes with --context",
        ),
    ],
)
def test_options_that_say_nothing_are_refused(folded, arguments, said):
    code, output = run(*(str(argument).format(folded) for argument in arguments))
    assert code and said in " ".join(output.replace("│", " ").split()), output


def test_fields_of_a_recipe_that_is_a_text(tmp_path):
    (tmp_path / "recipe.yaml").write_text(f"model: {MODEL}\npreset: svd_a\ncalibration: self\n")
    code, output = run("compress", "--recipe", tmp_path / "recipe.yaml", "--out", tmp_path / "out", "--seq-len", "32")
    assert code and "its fields are meant" in " ".join(output.split())


def test_brackets_in_the_name_of_a_folder(tmp_path):
    code, output = run("compress", MODEL, "--preset", "int4", "--out", tmp_path / "br[a]ck[/x]")
    assert code == 0, output
    assert json.loads(output.strip().splitlines()[-1])["out"] == str(tmp_path / "br[a]ck[/x]")
    assert "br[a]ck" in output


@pytest.mark.parametrize("end", [".partial", ".replaced"])
def test_a_source_called_as_what_is_written_is_kept(tmp_path, end):
    source = save_tiny(make_tiny("llama_mha"), tmp_path / f"out{end}")
    with pytest.raises(OutputError, match="is needed, and is what --out"):
        kvfold.compress({"model": str(source), "out": str(tmp_path / "out"), "preset": "int4"}, device="cpu")
    with pytest.raises(OutputError):
        refuse_out(tmp_path / "out", overwrite=True, keep=[source])
    assert (source / "model.safetensors").exists()


def test_a_folder_beside_which_nothing_can_be_written(tmp_path, monkeypatch):
    def refused(*args, **rest):
        raise PermissionError("not here")

    monkeypatch.setattr(folders.FileLock, "acquire", refused)
    with (
        pytest.raises(OutputError, match="nothing can be written beside"),
        new_folder(tmp_path / "out", "x", overwrite=False),
    ):
        pass


def test_a_place_that_takes_no_folder_is_refused_before_anything_else(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="file takes no new files"):
        refuse_out(tmp_path / "file" / "deep" / "out", overwrite=False, keep=())
    refuse_out(tmp_path / "deep" / "out", overwrite=False, keep=())
    monkeypatch.setattr(folders.os, "access", lambda path, mode: path != tmp_path)  # root may write everywhere
    with pytest.raises(OutputError, match="takes no new files"):
        refuse_out(tmp_path / "deep" / "out", overwrite=False, keep=())


def test_a_table_goes_into_a_new_folder(tmp_path, folded):
    code, output = run(
        "bench", folded, "--against", MODEL, "--batch", "1", "--context", "16", "--steps", "1", "--prefills", "0",
        "--markdown", tmp_path / "new" / "table.md",
    )  # fmt: skip
    assert code == 0 and (tmp_path / "new" / "table.md").exists(), output


def test_healing_that_cannot_be(tmp_path, folded):
    (tmp_path / "text.txt").write_text("It was the best of times. " * 200)
    base = {"folded": str(folded), "out": str(tmp_path / "out"), "data": str(tmp_path / "text.txt"), "objective": "ce"}
    with pytest.raises(RecipeError, match="seq_len is 1"):
        kvfold.heal(base | {"seq_len": 1}, device="cpu")
    with pytest.raises(OutputError, match="is a model that is read"):
        kvfold.heal(base, run_dir=folded, device="cpu")
    short = base | {"seq_len": 32, "max_tokens": 128, "batch_size": 4, "train": "all"}
    with pytest.raises(HealError, match="smaller --learning-rate"):
        kvfold.heal(short | {"learning_rate": 1e38}, device="cpu")
    assert not (tmp_path / "out").exists()

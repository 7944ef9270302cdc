"""What a new user meets first: `kvfold compress MODEL --kv-budget 1/8 --out DIR`, and what stands beside it."""

import json
import shutil

import pytest
from typer.testing import CliRunner

from kvfold.cli.main import app
from kvfold.errors import DataError
from kvfold.evaluation.demo import MODEL


def run(*arguments):
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout.strip().splitlines()[-1]), result.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("default")
    quick = ["--num-samples", 8, "--seq-len", 128, "--run-dir", root / "run"]
    run("compress", MODEL, "--kv-budget", "1/8", *quick, "--out", root / "eighth")
    return root / "eighth"


def test_the_default_is_auto_and_keeps_the_budget(folder):
    found, shown = run("inspect", folder)
    assert 0.12 < found["kv_budget"] <= 0.125
    assert "▓" in shown and "░" in shown and "numbers x bits" in shown and "back into numbers" in shown
    assert "method: mixed" in (folder / "recipe.yaml").read_text()


def test_what_is_said_of_a_fold(tmp_path):
    quick = ["--num-samples", 8, "--seq-len", 128, "--run-dir", tmp_path / "run", "--out", tmp_path / "out"]
    found, shown = run("compress", MODEL, "--kv-budget", "1/8", *quick)
    before, after = found["attention_parameters"]
    assert after > before and f"Attention has {after / 1e6:,.1f} million parameters instead of" in shown
    share = found["kv_bytes_per_token"] / found["base_kv_bytes_per_token"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert share < found["kv_budget"] and f" | {share:.4f} |" in card
    assert "of the original bytes over 2,048 tokens" in card
    assert f"{found['kv_budget']:.4g} of the original's bytes over 2,048 tokens" in " ".join(shown.split())


def test_a_text_that_nobody_reads_is_named(tmp_path):
    options = ["--preset", "int4", "--out", str(tmp_path / "out")]
    told = CliRunner().invoke(app, ["compress", str(MODEL), *options, "--data", "missing.txt"])
    untold = CliRunner().invoke(app, ["compress", str(MODEL), *options, "--overwrite"])
    assert "needs no calibration" in told.stderr and "calibration" not in untold.stderr


def test_too_little_text_is_named(folder, tmp_path):
    (tmp_path / "short.txt").write_text("The old man")
    with pytest.warns(UserWarning, match="gives 3 tokens: what is measured on so few says little"):
        run("evaluate", folder, "--against", MODEL, "--data", tmp_path / "short.txt")


def test_an_eighth_of_the_bytes_still_writes_english(folder):
    made, _ = run("generate", folder, "--prompt", "The old man", "--max-new-tokens", 16)
    plain, _ = run("generate", MODEL, "--prompt", "The old man", "--max-new-tokens", 16)
    assert made["new_tokens"] == 16 and made["cache_bytes"] < plain["cache_bytes"] / 3  # all are recent, and kept twice


def test_fixed_sizes_are_compared_once_and_plans_are_drawn(folder, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("It was a dark night, and the old man went out to look at the sea. " * 60)
    found, _ = run(
        "compare", MODEL, "--preset", "int8:kv_budget=null", "--preset", "kivi:kv_budget=null",
        "--preset", "auto", "--kv-budget", "1/2", "--kv-budget", "1/8", "--num-samples", 4, "--seq-len", 128,
        "--max-tokens", 512, "--eval-data", text, "--out", tmp_path / "out",
    )  # fmt: skip
    rows = {(row["preset"], row["asked_budget"]): row for row in found["rows"]}
    assert [row["preset"] for row in found["rows"]] == ["int8", "kivi", "auto", "auto"]
    assert rows["int8", None]["kl"] < rows["kivi", None]["kl"]
    assert rows["auto", 0.125]["kl"] < rows["kivi", None]["kl"]
    assert (tmp_path / "out" / "frontier.svg").read_text().startswith("<?xml")
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<svg") == 4 and "What every layer stores" in page


def test_a_chat_is_opened_by_the_template(folder, tmp_path):
    talking = shutil.copytree(folder, tmp_path / "talking")
    (talking / "chat_template.jinja").write_text("{% for m in messages %}Asked: {{ m.content }}. Said:{% endfor %}")
    chat, _ = run("generate", talking, "--chat", "--prompt", "The sea", "--max-new-tokens", 12)
    text, _ = run("generate", folder, "--prompt", "Asked: The sea. Said:", "--max-new-tokens", 12)
    assert chat["text"] == text["text"] and chat["cache_bytes"] == text["cache_bytes"]
    with pytest.raises(DataError, match="has no chat template"):
        run("generate", folder, "--chat")

"""What is printed and kept for people and programs, of names and texts of any kind."""

from __future__ import annotations

import json
import math

import pytest
import torch

from kvfold.checkpoint.folder import by_name
from kvfold.checkpoint.push import updated_card
from kvfold.evaluation.compare import Comparison, Row
from kvfold.evaluation.context import Remembered
from kvfold.evaluation.standard_errors import defined
from kvfold.evaluation.task_files import read_task_file
from kvfold.evaluation.tasks import _effects
from kvfold.evaluation.texts import perplexity_of
from kvfold.healing.trainer import read_metrics
from kvfold.report import tables
from kvfold.report.html import remembered
from kvfold.report.table import plus_minus


def test_json_has_numbers_only(capsys):
    tree = {"a": math.nan, "rows": [{"b": (1.5, math.inf), "c": "nan"}, None]}
    assert defined(tree) == {"a": None, "rows": [{"b": [1.5, None], "c": "nan"}, None]}
    tables.print_json(tree)
    json.loads(capsys.readouterr().out, parse_constant=pytest.fail)


def test_texts_in_brackets_are_texts(tmp_path, monkeypatch, capsys):
    """Which rich would take for markup."""
    monkeypatch.setattr(tables.STDOUT, "width", 200)
    for drawn in ("render", "budget_plot"):
        monkeypatch.setattr(tables, drawn, lambda found: "")
    row = Row("svd_a", 0.5, None, None, "[/b] else", note="out of reach")
    found = Comparison("model", "self", "a text", [], "[INST] hello [/INST]", "[/INST] so", [row], {})
    tables.print_comparison(found, tmp_path)
    shown = capsys.readouterr().out
    assert "[INST] hello [/INST]" in shown and "[/INST] so" in shown and "[/b] else" in shown


def test_losses_that_no_perplexity_can_say():
    assert (
        perplexity_of(2.0) == math.exp(2.0) and perplexity_of(800.0) == math.inf and math.isnan(perplexity_of(math.nan))
    )
    assert _effects(0.3, [torch.tensor([-800.0, -900.0])]) is None


def test_of_one_sample_there_is_no_error():
    assert plus_minus(0.25) == " ± 0.2500" and plus_minus(12.25, ",.1f") == " ± 12.2" and plus_minus(math.nan) == ""
    errors = {"change_stderr": math.nan, "kl_stderr": math.nan}
    sizes = {"cache_bytes": 1, "base_cache_bytes": 2, "kv_share": 0.5, "share_read": 1.0}
    asked = {"kind": "needles", "context_len": 8, "sequences": 1, "accuracy": 0.5, "base_accuracy": 0.75, "kl": 0.1}
    one = Remembered(**asked, **errors, **sizes)
    assert remembered(one) == "50.0% (-25.0)"


def test_folders_of_one_name_are_both_measured(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = by_name(["a/folded", "b/folded", ".", "original"], taken=["original"])
    root = tmp_path.resolve()
    assert list(found) == ["folded", f"{root}/b/folded", root.name, f"{root}/original"]
    assert [str(folder) for folder in found.values()] == ["a/folded", "b/folded", ".", "original"]


def test_words_of_a_card_that_are_its_folders_name_stay():
    body = """# without

A model with a smaller KV cache, folded by kvfold.

AutoModelForCausalLM.from_pretrained("folded"); kvfold evaluate folded --data x; vllm serve folded

out: folded
"""
    card = updated_card(f"---\nlicense: mit\n---\n{body}", "me/model", base_model=None, license=None, measured=None)
    assert "folded by kvfold" in card and "out: me/model" in card and "# without" in card
    assert (
        'from_pretrained("me/model")' in card and "evaluate me/model --data" in card and "vllm serve me/model" in card
    )


def test_a_line_of_metrics_that_was_cut_off(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert read_metrics(file) == [{"step": 1, "loss": 2.0}]


def test_task_files_as_programs_write_them(tmp_path):
    """With a mark of byte order, line separators within texts, an empty line at the end."""
    file = tmp_path / "asked.jsonl"
    row = {"query": "one\u2028two\u0085?", "choices": [" a", " b"], "gold": 1}
    file.write_text("\ufeff" + 2 * (json.dumps(row, ensure_ascii=False) + "\n") + "\n", encoding="utf-8")
    assert [found["query"] for found in read_task_file(file).rows] == [row["query"]] * 2

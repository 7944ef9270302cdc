"""`kvfold evaluate --recall`: a hand-made copier, the packaged model, and folds of it."""

import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from tiny import MODELS, make_tiny
from typer.testing import CliRunner

import kvfold
from kvfold.cli import app
from kvfold.demonstration import MODEL
from kvfold.errors import DataError, RecipeError
from kvfold.recall import DEPTHS, KEY, VALUE, Recall, hide, measure_recall, recall_at, value_log_probs, without_passage

VOCAB = 97


class Copier:
    """Repeats what followed the last occurrence of the last three tokens among the `memory` latest tokens."""

    device = torch.device("cpu")
    config = SimpleNamespace(vocab_size=VOCAB)

    def __init__(self, *, memory):
        self.memory = memory

    def __call__(self, ids, *, past_key_values=None, use_cache, **_):
        assert use_cache and (past_key_values is None or ids.shape[1] == 1), "a prompt, then one token at a time"
        seen = ids if past_key_values is None else torch.cat([past_key_values, ids], dim=1)
        logits = torch.stack([self.next(row[-self.memory :].tolist()) for row in seen])
        return SimpleNamespace(logits=logits[:, None], past_key_values=seen)

    def next(self, row):
        for start in range(len(row) - 4, -1, -1):
            if row[start : start + 3] == row[-3:]:
                return 20.0 * F.one_hot(torch.tensor(row[start + 3]), VOCAB)
        return torch.zeros(VOCAB)


def draw(trials, length, seed=0):
    return torch.randint(VOCAB, (trials, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def folds(tmp_path_factory):
    """One that changes nothing, and one of few bytes."""
    root = tmp_path_factory.mktemp("folds")
    made = {}
    for preset, budget in (("identity", None), ("svd_w", 1 / 6)):
        recipe = {"model": str(MODEL), "preset": preset, "kv_budget": budget, "out": str(root / preset)}
        made[preset] = kvfold.compress(kvfold.make_recipe(recipe)).out
    return made


def test_a_passage_is_hidden_where_it_is_said():
    fill, passage = draw(2, 200), draw(2, KEY + VALUE, seed=1)
    without = without_passage(fill, passage)
    assert without.shape == (2, 200 - VALUE) and torch.equal(without[:, -KEY:], passage[:, :KEY])
    for depth, start in ((0.0, 0), (0.5, 68), (1.0, 200 - VALUE - KEY - KEY - VALUE)):
        context = hide(fill, passage, depth=depth)
        assert torch.equal(context[:, start : start + KEY + VALUE], passage)
        changed = (context != without).any(0).nonzero()
        assert changed.min() >= start and changed.max() < start + KEY + VALUE
        assert torch.equal(context[:, -KEY:], passage[:, :KEY])


def test_a_perfect_copier_finds_everything():
    copier = Copier(memory=10_000)
    rows = recall_at(copier, copier, draw(3, 160), draw(3, KEY + VALUE, seed=1))
    assert [row.depth for row in rows] == list(DEPTHS)
    for row in rows:
        assert row.accuracy == row.base_accuracy == 1 and row.control < 0.2 and row.recalls
        assert row.gain == row.base_gain > 3 and row.kept == 1 and row.kept_stderr == row.kl == 0


def test_a_short_memory_finds_only_what_is_near():
    rows = recall_at(Copier(memory=90), Copier(memory=10_000), draw(3, 160), draw(3, KEY + VALUE, seed=1))
    assert [row.accuracy for row in rows][-1] == 1 and rows[0].accuracy < 0.2 and rows[0].base_accuracy == 1
    assert rows[0].kept < 0.1 < 0.99 < rows[-1].kept and rows[0].kl > 1 > 1e-9 > abs(rows[-1].kl)


@pytest.mark.parametrize("name", MODELS)
def test_predictions_are_those_of_one_pass_over_everything(name):
    model = make_tiny(name)
    context, value = draw(2, 70), draw(2, VALUE, seed=1)
    with torch.no_grad():
        expected = model(torch.cat([context, value], 1), use_cache=False).logits.double().log_softmax(-1)[:, 69:-1]
    assert torch.allclose(value_log_probs(model, context, value), expected, atol=1e-4)


def test_the_original_and_the_identity_lose_nothing(folds):
    for row in measure_recall(MODEL, against=MODEL, lengths=[128], trials=2):
        assert row.gain == row.base_gain and row.kept == 1 and row.kl == row.kept_stderr == 0
    for row in measure_recall(folds["identity"], against=MODEL, lengths=[128], trials=2):
        assert row.gain == pytest.approx(row.base_gain, abs=1e-4) and abs(row.kl) < 1e-6
        assert (row.accuracy, row.control) == (row.base_accuracy, row.base_control)


def test_few_bytes_lose_more_and_text_can_be_the_filler(folds, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"The {i}th man went to the sea, and {i * i} ships came." for i in range(80)))
    exact, small = (
        measure_recall(folds[p], against=MODEL, lengths=[128], trials=2, filler=text) for p in ("identity", "svd_w")
    )
    assert all(a.kl < 0.01 < b.kl for a, b in zip(exact, small, strict=True))
    with (
        pytest.raises(DataError, match="needs at least 20000 to draw from"),
        pytest.warns(UserWarning, match="context of 256"),
    ):
        measure_recall(MODEL, against=MODEL, lengths=[10_000], filler=text)


def test_command_line_says_that_the_original_does_not_recall(folds):
    result = CliRunner().invoke(
        app, ["evaluate", str(folds["svd_w"]), "--against", str(MODEL), "--recall", "128"], catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    assert "The original does not recall at 128 tokens: this check shows nothing" in result.stdout
    found = json.loads(result.stdout.strip().splitlines()[-1])
    assert list(found) == ["recall"] and len(found["recall"]) == len(DEPTHS)
    assert not any(row["original_recalls"] for row in found["recall"])


def test_a_ratio_is_shown_where_the_original_recalls(capsys):
    from kvfold.printing import print_recall

    fields = dict.fromkeys(("control", "base_control", "gain_stderr", "base_gain_stderr", "kl"), 0.0)
    print_recall([Recall(128, 0.5, 4, 0.5, 1.0, gain=2.0, base_gain=4.0, kept_stderr=0.1, **fields)])
    shown = capsys.readouterr().out
    assert "0.5000 ± 0.1000" in shown and "does not recall" not in shown


def test_lengths(monkeypatch):
    asked = []
    monkeypatch.setattr("kvfold.recall.recall_at", lambda model, base, fill, passage: asked.append(fill.shape) or [])
    measure_recall(MODEL, against=MODEL)
    assert asked == [(16, 128), (16, 256)]  # a quarter of 256 would leave no room
    with pytest.warns(UserWarning, match="300 tokens exceed the model's context of 256"):
        measure_recall(MODEL, against=MODEL, lengths=[300])
    with pytest.raises(RecipeError, match="--recall 64 leaves no room for passages; give lengths of 128 or more"):
        measure_recall(MODEL, against=MODEL, lengths=[64])
    result = CliRunner().invoke(app, ["evaluate", str(MODEL), "--against", str(MODEL), "--recall", "far"])
    assert result.exit_code == 2 and "is not a list of numbers" in result.stderr

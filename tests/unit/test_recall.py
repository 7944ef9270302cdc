"""`kvfold evaluate --recall`: a hand-made copier, the packaged model, and folds of it."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from tiny import MODELS, make_tiny
from transformers import GPT2Config, GPT2LMHeadModel, PretrainedConfig
from typer.testing import CliRunner

import kvfold
from kvfold.cli.main import app
from kvfold.errors import DataError, RecipeError
from kvfold.evaluation.demo import MODEL
from kvfold.evaluation.recall import (
    DEPTHS,
    LEAST_LENGTH,
    PASSAGE,
    VALUE,
    Recall,
    fill_cache,
    hide,
    measure_recall,
    recall_at,
    value_log_probs,
)
from kvfold.runtimes.transformers.load import load_weights
from kvfold.testing import assert_close

VOCAB = 97


ONE_STEP = SimpleNamespace(depends_on_steps=False)


class Seen:
    """The cache of a Copier: the tokens."""

    def __init__(self, rows):
        self.tokens = torch.empty(rows, 0, dtype=torch.long)

    def batch_repeat_interleave(self, repeats):
        self.tokens = self.tokens.repeat_interleave(repeats, dim=0)


class Copier:
    """Repeats what followed the last occurrence of the last three tokens among the `memory` latest tokens."""

    device = torch.device("cpu")
    config = PretrainedConfig(vocab_size=VOCAB)

    def __init__(self, *, memory):
        self.memory = memory

    def __call__(self, ids, *, past_key_values=None, use_cache, logits_to_keep):
        assert use_cache and (past_key_values is None or ids.shape[1] < PASSAGE), (
            "contexts, then questions to their cache"
        )
        cache = past_key_values or Seen(len(ids))
        cache.tokens = torch.cat([cache.tokens, ids], dim=1)
        ends = range(cache.tokens.shape[1] - min(logits_to_keep, ids.shape[1]) + 1, cache.tokens.shape[1] + 1)
        logits = [
            torch.stack([self.next(row[max(end - self.memory, 0) : end].tolist()) for end in ends])
            for row in cache.tokens
        ]
        return SimpleNamespace(logits=torch.stack(logits), past_key_values=cache)

    def next(self, row):
        for start in range(len(row) - 4, -1, -1):
            if row[start : start + 3] == row[-3:]:
                return 20.0 * F.one_hot(torch.tensor(row[start + 3]), VOCAB)
        return torch.zeros(VOCAB)


def draw(*shape, seed=0, vocabulary=VOCAB):
    return torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(seed))


def draw_passages(trials, **options):
    return draw(trials, len(DEPTHS), PASSAGE, seed=1, **options)


CODE = 64
TOKEN, PLACE, BEFORE, PREVIOUS, NEXT = (slice(i * CODE, (i + 1) * CODE) for i in range(5))
WORDS = 2048


@torch.no_grad()
def make_looker():
    """A GPT-2 that looks back, with weights set by hand: layer 0 notes at each place which token stands before it, layer 1
    finds the place that noted the current token and predicts the token there. Tokens and places are codes of 64 signs."""
    generator = torch.Generator().manual_seed(0)
    signs = torch.ones(CODE).index_fill(0, torch.arange(CODE // 2), -1)  # as many + as -: layer norms only scale
    codes = torch.stack([signs[torch.randperm(CODE, generator=generator)] for _ in range(WORDS + 512)])
    size = 5 * CODE
    config = GPT2Config(
        vocab_size=WORDS, n_positions=512, n_embd=size, n_head=1, n_layer=2, tie_word_embeddings=False, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).eval()
    for name, parameter in model.named_parameters():
        if ".ln_" not in name:
            parameter.zero_()
    model.transformer.wte.weight[:, TOKEN] = codes[:WORDS]
    model.transformer.wpe.weight[:, PLACE] = codes[WORDS:]
    model.transformer.wpe.weight[:, BEFORE] = codes[WORDS:].roll(1, 0)
    model.lm_head.weight[:, NEXT] = 0.5 * codes[:WORDS]
    for layer, query, key, out in ((0, BEFORE, PLACE, PREVIOUS), (1, TOKEN, PREVIOUS, NEXT)):
        attention, one = model.transformer.h[layer].attn, torch.eye(CODE)
        queries, keys, values = attention.c_attn.weight.split(size, dim=1)
        queries[query, :CODE], keys[key, :CODE], values[TOKEN, :CODE] = 8 * one, one, one
        attention.c_proj.weight[:CODE, out] = one * (3 / 5) ** 0.5
    return model


@pytest.fixture(scope="module")
def looker(tmp_path_factory):
    """It, and folds of it, loaded."""
    root = tmp_path_factory.mktemp("looker")
    make_looker().save_pretrained(root / "original")
    made = {"original": load_weights(root / "original", "float32", "cpu")}
    for name, fields in {
        "identity": {"preset": "identity"},
        "int8": {"preset": "int8", "kv_budget": None},
        "quarter": {"preset": "svd_w", "kv_budget": 1 / 4},  # keys and values have 64 directions out of 320
        "tenth": {"preset": "svd_w", "kv_budget": 1 / 10},
        "fortieth": {"preset": "svd_w", "kv_budget": 1 / 40},
    }.items():
        recipe = {
            "model": str(root / "original"),
            "out": str(root / name),
            "calibration": {"num_samples": 4, "seq_len": 64},
        }
        made[name] = load_weights(kvfold.compress(kvfold.make_recipe(recipe | fields)).out, "float32", "cpu")
    return made


@pytest.mark.parametrize("name", ["identity", "int8", "quarter", "tenth", "fortieth"])
def test_a_model_that_looks_back_does_so_through_its_folded_cache(looker, name):
    fill, passages = draw(4, 300, vocabulary=WORDS), draw_passages(4, vocabulary=WORDS)
    rows = recall_at(looker[name], looker["original"], fill, passages, looker[name].kv_plan)
    assert all(row.recalls and row.base_accuracy > 0.8 and row.base_control < 0.1 for row in rows)
    if name in ("identity", "int8", "quarter"):
        # one predicted token of the 64 may be a near tie, which rounding to 8 bits decides otherwise
        apart = VALUE * 4 * max(abs(row.accuracy - row.base_accuracy) for row in rows)
        assert all(row.kept == pytest.approx(1, abs=0.02) for row in rows) and apart <= (name == "int8")
    elif name == "tenth":  # still found, by less
        assert all(0.4 < row.kept < 0.8 and row.accuracy > 0.9 and row.kl > 0.01 for row in rows)
    else:
        assert all(row.kept < 0.1 and row.accuracy < 0.1 and row.kl > 5 for row in rows)


@pytest.fixture(scope="module")
def folds(tmp_path_factory):
    """One that changes nothing, and one of few bytes."""
    root = tmp_path_factory.mktemp("folds")
    made = {}
    for preset, budget in (("identity", None), ("svd_w", 1 / 6)):
        recipe = {"model": str(MODEL), "preset": preset, "kv_budget": budget, "out": str(root / preset)}
        made[preset] = kvfold.compress(kvfold.make_recipe(recipe)).out
    return made


@pytest.mark.parametrize("name", ["int8", "tenth"])
def test_a_question_in_one_step_is_read_as_token_by_token(looker, name):
    context, questions = draw(2, 90, vocabulary=WORDS), draw(2, 3, PASSAGE, seed=1, vocabulary=WORDS)
    cache = fill_cache(looker[name], context)
    at_once, in_steps = (value_log_probs(looker[name], cache, questions, token_by_token=b) for b in (False, True))
    assert_close(at_once, in_steps, tolerance=1e-6)


def test_a_bound_on_memory_changes_nothing(looker, monkeypatch):
    fill, passages = draw(3, LEAST_LENGTH, vocabulary=WORDS), draw_passages(3, vocabulary=WORDS)
    pair, plan = (looker["tenth"], looker["original"]), looker["tenth"].kv_plan
    expected = [row.to_json() for row in recall_at(*pair, fill, passages, plan)]
    for tokens in (1, 3 * LEAST_LENGTH):  # one question at a time; of one context three
        monkeypatch.setattr("kvfold.evaluation.recall.TOKENS_AT_ONCE", tokens)
        found = [row.to_json() for row in recall_at(*pair, fill, passages, plan)]
        assert found == [pytest.approx(row, abs=1e-4) for row in expected]


@pytest.mark.parametrize("length", [LEAST_LENGTH, LEAST_LENGTH + 1, 300])
def test_passages_stand_apart_at_their_depths(length):
    fill, passages = torch.full((2, length), VOCAB), draw_passages(2)
    context = hide(fill, passages)
    assert context.shape == (2, length - PASSAGE) and (fill == VOCAB).all()
    assert (context != VOCAB).sum() == passages.numel()
    for depth, passage in zip(DEPTHS, passages.unbind(1), strict=True):
        start = round(depth * (length - 2 * PASSAGE))
        assert torch.equal(context[:, start : start + PASSAGE], passage)


def test_a_perfect_copier_finds_everything():
    copier = Copier(memory=10_000)
    rows = recall_at(copier, copier, draw(3, 320), draw_passages(3), ONE_STEP)
    assert [row.depth for row in rows] == list(DEPTHS)
    for row in rows:
        assert row.accuracy == row.base_accuracy == 1 and row.control < 0.2 and row.recalls
        assert row.gain == row.base_gain > 3 and row.kept == 1 and row.kept_stderr == row.kl == 0


def test_a_short_memory_finds_only_what_is_near():
    rows = recall_at(Copier(memory=90), Copier(memory=10_000), draw(3, 320), draw_passages(3), ONE_STEP)
    assert [row.accuracy for row in rows][-1] == 1 and rows[0].accuracy < 0.2 and rows[0].base_accuracy == 1
    assert rows[0].kept < 0.1 < 0.99 < rows[-1].kept and rows[0].kl > 1 > 1e-9 > abs(rows[-1].kl)


def test_the_control_asks_the_same_of_another_context():
    """Every trial's filler holds the first passages of all: they are found anywhere, and hiding them adds nothing."""
    copier, fill, passages = Copier(memory=10_000), draw(3, 320), draw_passages(3)
    for trial, passage in enumerate(passages[:, 0]):  # between the places of hidden ones, 64 tokens apart
        fill[:, 64 * trial + PASSAGE : 64 * trial + 64] = passage
    first, *others = recall_at(copier, copier, fill, passages, ONE_STEP)
    assert first.accuracy == first.control == 1 and first.gain == 0
    assert all(row.control < 0.2 and row.gain > 3 for row in others)


@pytest.mark.parametrize("name", MODELS)
def test_predictions_are_those_of_one_pass_over_everything(name):
    model, context, questions = make_tiny(name), draw(2, 70), draw(2, 3, PASSAGE, seed=1)
    whole = torch.cat([context[:, None].expand(-1, 3, -1), questions], dim=-1).flatten(0, 1)
    with torch.no_grad():
        logits = model(whole, use_cache=False).logits[:, -VALUE - 1 : -1]
    expected = logits.double().log_softmax(-1).unflatten(0, (2, 3))
    cache = fill_cache(model, context)
    for token_by_token in (False, True):  # the cache of the context stays as it is
        found = value_log_probs(model, cache, questions, token_by_token=token_by_token)
        assert torch.allclose(found, expected, atol=1e-4)


def test_the_original_and_the_identity_lose_nothing(folds):
    for row in measure_recall(MODEL, against=MODEL, lengths=[LEAST_LENGTH], trials=2):
        assert row.gain == row.base_gain and row.kept == 1 and row.kl == row.kept_stderr == 0
    for row in measure_recall(folds["identity"], against=MODEL, lengths=[LEAST_LENGTH], trials=2):
        assert row.gain == pytest.approx(row.base_gain, abs=1e-4) and abs(row.kl) < 1e-6
        assert (row.accuracy, row.control) == (row.base_accuracy, row.base_control)


def test_few_bytes_lose_more_and_text_can_be_the_filler(folds, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"The {i}th man went to the sea, and {i * i} ships came." for i in range(80)))
    exact, small = (
        measure_recall(folds[p], against=MODEL, lengths=[LEAST_LENGTH], trials=2, filler=text)
        for p in ("identity", "svd_w")
    )
    assert all(a.kl < 0.01 < b.kl for a, b in zip(exact, small, strict=True))
    with (
        pytest.raises(DataError, match="needs at least 20000 to draw from"),
        pytest.warns(UserWarning, match="context of 256"),
    ):
        measure_recall(MODEL, against=MODEL, lengths=[10_000], filler=text)


def test_command_line_says_that_the_original_does_not_recall(folds):
    result = CliRunner().invoke(
        app, ["evaluate", str(folds["svd_w"]), "--against", str(MODEL), "--recall", "200"], catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    assert "The original does not recall at 200 tokens, so recall cannot show" in result.stdout
    found = json.loads(result.stdout.strip().splitlines()[-1])
    assert list(found) == ["recall"] and len(found["recall"]) == len(DEPTHS)
    assert not any(row["original_recalls"] for row in found["recall"])


def test_a_ratio_is_shown_where_the_original_recalls(capsys):
    from kvfold.report.tables import print_recall

    fields = dict.fromkeys(("control", "base_control", "gain_stderr", "base_gain_stderr", "kl"), 0.0)
    print_recall([Recall(128, 0.5, 4, 0.5, 1.0, gain=2.0, base_gain=4.0, kept_stderr=0.1, **fields)])
    shown = capsys.readouterr().out
    assert "0.5000 ± 0.1000" in shown and "does not recall" not in shown


def test_what_keeps_its_last_tokens_exactly_is_asked_token_by_token(tmp_path, monkeypatch):
    folder = kvfold.compress(
        kvfold.make_recipe({"model": str(MODEL), "preset": "kivi", "out": str(tmp_path / "out")})
    ).out
    steps = []

    def spy(model, cache, questions, *, token_by_token=False):
        steps.append((type(model).__name__, token_by_token))
        return value_log_probs(model, cache, questions, token_by_token=token_by_token)

    monkeypatch.setattr("kvfold.evaluation.recall.value_log_probs", spy)
    measure_recall(folder, against=MODEL, lengths=[LEAST_LENGTH], trials=2)
    assert set(steps) == {("KvfoldLlamaForCausalLM", True), ("LlamaForCausalLM", False)}


def test_it_is_said_beforehand_how_long_it_will_take(monkeypatch, capsys):
    monkeypatch.setattr("kvfold.progress.SECONDS_WORTH_SAYING", 0)
    measure_recall(MODEL, against=MODEL, lengths=[LEAST_LENGTH], trials=2)
    assert re.fullmatch(r"recall will take about \d+ (seconds|minutes)\n", capsys.readouterr().err)


def test_lengths(monkeypatch):
    asked = []
    monkeypatch.setattr(
        "kvfold.evaluation.recall.recall_at", lambda model, base, fill, *_: asked.append(fill.shape) or []
    )
    measure_recall(MODEL, against=MODEL)
    assert asked == [(16, 256)]  # half of 256 would leave no room
    with pytest.warns(UserWarning, match="300 tokens exceed the model's context of 256"):
        measure_recall(MODEL, against=MODEL, lengths=[300])
    with pytest.raises(RecipeError, match="--recall 64 leaves no room for passages; give lengths of 192 or more"):
        measure_recall(MODEL, against=MODEL, lengths=[64])
    with pytest.raises(RecipeError, match="1 trials leave no other context to ask as a control"):
        measure_recall(MODEL, against=MODEL, trials=1)
    monkeypatch.setattr("kvfold.evaluation.recall.default_seq_len", lambda config: 128)
    with pytest.raises(RecipeError, match="context of 128 tokens leaves no room for passages"):
        measure_recall(MODEL, against=MODEL)
    result = CliRunner().invoke(app, ["evaluate", str(MODEL), "--against", str(MODEL), "--recall", "far"])
    assert result.exit_code == 2 and "is not a list of numbers" in result.stderr

"""`kvfold evaluate --tasks`: files in every layout through the real harness, scores by hand, and their standard errors."""

import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

import kvfold
from kvfold.cli.main import app
from kvfold.errors import DataError, KvfoldError, RecipeError
from kvfold.evaluation import tasks
from kvfold.evaluation.demo import MODEL
from kvfold.evaluation.standard_errors import ratio_stderr, stderr
from kvfold.evaluation.task_files import read_task_file
from kvfold.evaluation.task_presets import TASK_PRESETS
from kvfold.evaluation.tasks import evaluate_folds, evaluate_tasks
from kvfold.report.tables import print_tasks
from kvfold.runtimes.transformers.load import load

CHOICES = [
    {
        "query": "Question: What did the old man look at?",
        "choices": ["the sea", "a", "seven green trigonometries"],
        "gold": 0,
    },
    {"query": "Question: Who is there?\n", "choices": ["It is I, my lord, and I have come", "nobody"], "gold": 1},
    {"query": "She opened the door and", "choices": ["went in.", "door the and opened she."], "gold": 0},
    {"query": "It was a dark and", "choices": ["banana stormy", "stormy night"], "gold": 1},
    {
        "query": "He did not know what to",
        "choices": ["purple", "do.", "elephantine considerations of state"],
        "gold": 2,
    },
]
CONTEXTS = [
    {
        "context_options": ["The house was old so the house", "The house was old so the sea"],
        "continuation": "fell.",
        "gold": 0,
    },
    {"context_options": ["I saw him and he", "I saw him and the"], "continuation": "was dead.", "gold": 1},
    {"context_options": ["We went to the", "We went to a"], "continuation": "same place.", "gold": 0},
]
LAST_WORDS = [
    {"context": "I said to him that I would", "continuation": "not"},
    {"context": "He looked at her, and she looked at ", "continuation": "him"},
    {"context": "It was one of the", "continuation": "most"},
    {"context": "All that is gold does not", "continuation": "glitter"},
]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("files")
    for name, rows in {"choices": CHOICES, "contexts": CONTEXTS, "last_words": LAST_WORDS}.items():
        (root / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (root / "text.txt").write_text("It was a dark night, and the old man went out to look at the sea. " * 20)
    return root


@pytest.fixture(scope="module")
def folded(tmp_path_factory):
    root = tmp_path_factory.mktemp("folded")
    return kvfold.compress(kvfold.make_recipe(_recipe("svd_w", root / "third", kv_budget=1 / 3))).out


def _recipe(preset, out, **fields):
    return {"model": str(MODEL), "preset": preset, "out": str(out), **fields}


@torch.no_grad()
def likelihood(loaded, context, continuation):
    """log p(continuation | context), without the harness."""
    before = len(loaded.tokenizer(context)["input_ids"])
    ids = torch.tensor(loaded.tokenizer(context + continuation)["input_ids"])
    log_p = loaded.model(ids[None], use_cache=False).logits[0].log_softmax(-1)
    return sum(log_p[i - 1, ids[i]].item() for i in range(before, len(ids)))


def by_hand(folder):
    """Every score of the three files."""
    loaded = load(folder)
    acc, norm = [], []
    for row in CHOICES:
        asked = row["query"].strip() + ("\nAnswer:" if row["query"].startswith("Question:") else "")
        found = torch.tensor([likelihood(loaded, asked, " " + choice) for choice in row["choices"]])
        acc.append(float(found.argmax() == row["gold"]))
        norm.append(float((found / torch.tensor([len(choice) for choice in row["choices"]])).argmax() == row["gold"]))
    contexts = []
    for row in CONTEXTS:
        found = [likelihood(loaded, option, " " + row["continuation"]) for option in row["context_options"]]
        contexts.append(float(found.index(max(found)) == row["gold"]))
    words = [likelihood(loaded, row["context"].strip(), " " + row["continuation"]) for row in LAST_WORDS]
    return {("choices", "acc"): acc, ("choices", "acc_norm"): norm, ("contexts", "acc"): contexts, "words": words}


def test_the_harness_finds_what_is_computed_by_hand(files, folded):
    from lm_eval.api.metrics import mean_stderr

    asked = [str(files / f"{name}.jsonl") for name in ("choices", "contexts", "last_words")]
    rows = {(row.task, row.metric): row for row in evaluate_tasks(folded, against=MODEL, tasks=asked)}
    assert list(rows) == [
        ("choices", "acc"), ("choices", "acc_norm"), ("contexts", "acc"), ("last_words", "perplexity"), ("last_words", "acc"),
    ]  # fmt: skip
    expected, base = by_hand(folded), by_hand(MODEL)
    for name in (name for name in expected if name != "words"):
        row = rows[name]
        assert (row.score, row.base_score) == (_mean(expected[name]), _mean(base[name])), name
        assert row.stderr == pytest.approx(mean_stderr(expected[name])) and row.samples == len(base[name])
        change = [a - b for a, b in zip(expected[name], base[name], strict=True)]
        assert row.change_stderr == pytest.approx(mean_stderr(change))
    words = rows["last_words", "perplexity"]
    assert words.score == pytest.approx(math.exp(-_mean(expected["words"])), rel=1e-4)
    assert words.base_score == pytest.approx(math.exp(-_mean(base["words"])), rel=1e-4)
    assert words.recovery == pytest.approx(words.base_score / words.score) and words.recovery < 0.97
    logs = torch.tensor(expected["words"]) - torch.tensor(base["words"])
    assert words.recovery_stderr == pytest.approx(words.recovery * stderr(logs), rel=1e-3)


def _mean(values):
    return sum(values) / len(values)


def test_the_original_recovers_itself(files):
    for row in evaluate_tasks(MODEL, against=MODEL, tasks=[str(files / "choices.jsonl")], limit=3):
        assert row.score == row.base_score and row.samples == 3 and row.change_stderr == 0
        assert row.recovery_stderr == 0 or not row.score


def test_answers_that_are_kept_are_not_asked_for_again(files, folded, tmp_path, monkeypatch):
    """They are one model's, to the same questions; a row of them is what a row without is."""
    asked = {"against": MODEL, "tasks": [str(files / "choices.jsonl")]}
    expected = evaluate_folds([folded], **asked)
    assert evaluate_folds([folded], **asked, answers=tmp_path) == expected
    kept = sorted(tmp_path.iterdir())
    monkeypatch.setattr(tasks, "load", lambda path, **_: pytest.fail(f"{path} was asked again"))
    assert len(kept) == 2 and evaluate_folds([folded], **asked, answers=tmp_path) == expected
    monkeypatch.setattr(tasks, "load", load)
    evaluate_folds([folded], **asked, answers=tmp_path, limit=3)
    kept[0].unlink()
    assert len(list(tmp_path.iterdir())) == 3
    assert evaluate_folds([folded], **asked, answers=tmp_path) == expected


def test_caches_with_exact_last_tokens_are_scored_token_by_token(tmp_path):
    from kvfold.evaluation.harness import FoldedLM

    out = kvfold.compress(kvfold.make_recipe(_recipe("kivi", tmp_path / "kivi", kv_budget=None))).out
    loaded = load(out)
    ids = torch.randint(5, 4000, (2, 80), generator=torch.Generator().manual_seed(0))
    found = FoldedLM(loaded, batch_size=2)._model_call(ids)
    with torch.no_grad():
        at_once, cache, steps = loaded.model(ids).logits, None, []
        for token in ids.split(1, dim=1):
            step = loaded.model(token, past_key_values=cache, use_cache=True)
            cache, steps = step.past_key_values, [*steps, step.logits]
    assert torch.equal(found, torch.cat(steps, dim=1)) and not torch.allclose(found, at_once, atol=1e-3)


def test_command_line(files, folded):
    (files / "other.txt").write_text("Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. " * 20)
    result = CliRunner().invoke(
        app,
        ["evaluate", str(folded), "--against", str(MODEL), "--tasks", str(files / "choices.jsonl"), "--limit", "4",
         "--data", str(files / "text.txt"), "--data", str(files / "other.txt"), "--seq-len", "64"],
        catch_exceptions=False,
    )  # fmt: skip
    assert result.exit_code == 0 and "recovery" in result.stdout and "KL / first" in result.stdout
    found = json.loads(result.stdout.strip().splitlines()[-1])
    assert [row["metric"] for row in found["tasks"]] == ["acc", "acc_norm"] and found["tasks"][0]["samples"] == 4
    assert found["further"][0]["data"].endswith("other.txt") and found["further"][0]["tokens"] > 0 < found["kl"]


def test_nothing_to_measure_is_an_error(folded):
    result = CliRunner().invoke(app, ["evaluate", str(folded), "--against", str(MODEL)])
    assert result.exit_code == 2 and "--data, --tasks or --recall" in result.stderr


def results(samples, *, groups=None, weighted=True, scores=None):
    """As simple_evaluate returns them, out of {task: {metric: [value of every sample]}}."""
    found = {
        "results": {
            task: {"alias": task} | {f"{metric},none": _score(metric, values) for metric, values in metrics.items()}
            for task, metrics in samples.items()
        },
        "samples": {
            task: [
                {"doc_id": i, "filter": "none"} | {metric: values[i] for metric, values in metrics.items()}
                for i in reversed(range(len(next(iter(metrics.values())))))
            ]
            for task, metrics in samples.items()
        },
        "n-shot": dict.fromkeys(samples, 0),
        "higher_is_better": {task: {"acc": True, "perplexity": False} for task in samples},
        "group_subtasks": groups or {},
    }
    for group, members in (groups or {}).items():
        all_values = [samples[member]["acc"] for member in members]
        mean = (
            _mean([value for values in all_values for value in values])
            if weighted
            else _mean(list(map(_mean, all_values)))
        )
        found["results"][group] = {"alias": group, "acc,none": mean, "acc_stderr,none": "N/A"}
    for task, metrics in (scores or {}).items():
        found["results"][task] |= metrics
    return found


def _score(metric, values):
    return math.exp(-_mean(values)) if metric == "perplexity" else _mean(values)


@pytest.mark.parametrize("weighted", [True, False])
def test_standard_errors_of_groups_are_those_of_simulated_ones(weighted):
    """Two tasks of 60 and 20 questions, many times; answers of the two models agree mostly."""
    generator = torch.Generator().manual_seed(3)
    found, truth = [], []
    for _ in range(1500):
        pairs = {}
        for task, count, p in (("a", 60, 0.8), ("b", 20, 0.5)):
            base = (torch.rand(count, generator=generator) < p).float()
            again = (torch.rand(count, generator=generator) < p - 0.1).float()
            kept = torch.rand(count, generator=generator) < 0.7
            pairs[task] = base, torch.where(kept, base, again)
        answers = [{task: {"acc": pair[i].tolist()} for task, pair in pairs.items()} for i in (0, 1)]
        base, folded = (results(one, groups={"g": ["a", "b"]}, weighted=weighted) for one in answers)
        *leaves, row = tasks.scores(base, folded)
        assert row.task == "g" and [leaf.part_of for leaf in leaves] == ["g", "g"] and row.samples == 80
        found.append((row.stderr, row.change_stderr, row.recovery_stderr))
        truth.append((row.score, row.score - row.base_score, row.recovery))
    expected, estimated = torch.tensor(truth).std(0), torch.tensor(found).mean(0)
    assert torch.allclose(estimated, expected, rtol=0.06)


def test_a_ratio_by_hand():
    """Independent errors add up; equal ones cancel."""
    apart = ratio_stderr(0.4, 0.5, top_stderr=0.03, bottom_stderr=0.04, change_stderr=0.05)
    assert apart == pytest.approx(0.8 * math.hypot(0.03 / 0.4, 0.04 / 0.5))
    assert ratio_stderr(0.5, 0.5, top_stderr=0.03, bottom_stderr=0.03, change_stderr=0.0) == 0
    assert math.isnan(ratio_stderr(0.5, 0.0, top_stderr=0.03, bottom_stderr=0.03, change_stderr=0.0))


def test_what_is_no_mean_of_samples_has_no_standard_error():
    samples = {"t": {"acc": [1.0, 0.0, 1.0], "perplexity": [-1.0, -2.0, -4.0]}}
    base, folded = (results(samples, scores={"t": {"f1,none": value}}) for value in (0.5, 0.25))
    row = {row.metric: row for row in tasks.scores(base, folded)}["f1"]
    assert row.recovery == 0.5 and math.isnan(row.stderr)
    shown = row.to_json()
    assert shown["recovery_stderr"] is None and "NaN" not in json.dumps(shown)


def test_presets_ask_what_the_papers_ask(monkeypatch):
    asked = []

    def run(lm, specs, *, num_fewshot, **_):
        asked.append((num_fewshot, specs))
        values = {"acc": [1.0, 0.0]} | ({"acc_norm": [1.0, 1.0]} if num_fewshot == 0 else {})
        return results({name: values if name != "boolq" else {"acc": [1.0, 0.0]} for name in specs})

    fake = SimpleNamespace(run=run, task_manager=lambda names: None, FoldedLM=lambda loaded, **_: loaded)
    monkeypatch.setattr(tasks, "_harness", lambda: fake)
    rows = evaluate_tasks(MODEL, against=MODEL, tasks=["mlkv_paper", "svd_a_commonsense", "svd_a_mmlu"])
    first = ["arc_easy", "lambada_openai", "piqa", "sciq"]
    more = ["boolq", "social_iqa", "hellaswag", "winogrande", "arc_challenge", "openbookqa", "mmlu"]
    assert asked == [(0, first + more), (5, ["mmlu"])] * 2
    averages = {row.task: row for row in rows if row.task.startswith("average")}
    assert averages["average of mlkv_paper"].score == 0.5
    assert averages["average of svd_a_commonsense"].score == (7 + 0.5) / 8  # boolq has no acc_norm
    assert averages["average of mlkv_paper"].stderr == pytest.approx(rows[0].stderr / 2)
    assert len(averages) == 2


def test_averages_count_members_of_groups_and_tables_show_groups(monkeypatch, capsys):
    def run(lm, specs, **_):
        values = {"xnli_de": [1.0, 0.0], "xnli_en": [1.0, 1.0], "xcopa_et": [0.0, 0.0], "xcopa_id": [0.0, 1.0]}
        groups = {"xnli": ["xnli_de", "xnli_en"], "xcopa": ["xcopa_et", "xcopa_id"]}
        found = results({task: {"acc": acc} for task, acc in values.items()}, groups=groups)
        del found["results"]["xcopa"]["acc,none"]  # some groups have no score of their own
        return found

    fake = SimpleNamespace(run=run, task_manager=lambda names: None, FoldedLM=lambda loaded, **_: loaded)
    monkeypatch.setattr(tasks, "_harness", lambda: fake)
    rows = evaluate_tasks(MODEL, against=MODEL, tasks=["svd_a_multilingual"])
    assert rows[-1].score == (0.5 + 1 + 0 + 0.5) / 4 and rows[-1].samples == 8
    print_tasks(rows)
    shown = capsys.readouterr().out
    assert "xnli " in shown and "xcopa_et" in shown and "xnli_de" not in shown


def test_names_are_those_of_the_harness(monkeypatch):
    from kvfold.evaluation import harness

    manager = harness.task_manager([name for preset in TASK_PRESETS.values() for name in preset.tasks])
    monkeypatch.setattr(harness, "TaskManager", lambda **_: manager)  # the index takes ten seconds
    with pytest.raises(RecipeError, match=r"no task 'arc_esy' in lm-evaluation-harness 0.* Near: .*arc_easy"):
        evaluate_tasks(MODEL, against=MODEL, tasks=["arc_esy"])
    with pytest.raises(DataError, match=r"data of arc_easy cannot be loaded: .*local \.jsonl file needs none"):
        evaluate_tasks(MODEL, against=MODEL, tasks=["arc_easy"], limit=1)


def test_mmlu_folders_show_examples_and_take_subjects_in_turn(tmp_path):
    for split in ("dev", "test"):
        (tmp_path / split).mkdir()
        for subject in ("abstract_algebra", "virology"):
            rows = [f'"{subject} {split} {i}?",one,two,"three, four",five,{i}' for i in range(3)]
            text = "\n".join(["question,choice0,choice1,choice2,choice3,answer", *rows])
            (tmp_path / split / f"{subject}_{split}.csv").write_text(text)
    task = read_task_file(tmp_path, num_fewshot=1)
    assert [row["gold"] for row in task.rows] == [0, 0, 1, 1, 2, 2]
    options = "A. one\nB. two\nC. three, four\nD. five\nAnswer:"
    assert task.rows[2]["query"] == (
        "The following are multiple choice questions (with answers) about abstract algebra.\n\n"
        f"abstract_algebra dev 0?\n{options} A\n\nabstract_algebra test 1?\n{options}"
    )
    (row,) = evaluate_tasks(MODEL, against=MODEL, tasks=[str(tmp_path)], limit=2, num_fewshot=2)
    assert row.num_fewshot == 2 and row.metric == "acc" and row.samples == 2
    with pytest.raises(DataError, match="has 3 examples of abstract_algebra; 5 were asked for"):
        read_task_file(tmp_path, num_fewshot=5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"question": "?", "answer": 1}',
            r"fields \['answer', 'question'\], which is no known layout. Known: {query, choices",
        ),
        ("", "is empty. Known layouts"),
        ("[1, 2]", "line 1 is not a JSON object"),
        ('{"query": "a"', "line 1 is not JSON"),
        ('{"query": "a", "choices": ["b", "c"], "gold": 2}', "gold 2 is not one of 2 options"),
        ('{"query": "a", "choices": ["b", 3], "gold": 0}', r"\['b', 3\] must be texts"),
        ('{"context": "a", "continuation": "b"}\n{"context": "a"}', "line 2: 'continuation' is None; it must be a str"),
    ],
)
def test_files_that_are_no_tasks(text, message, tmp_path):
    (tmp_path / "task.jsonl").write_text(text)
    with pytest.raises(DataError, match=message):
        evaluate_tasks(MODEL, against=MODEL, tasks=[str(tmp_path / "task.jsonl")])


def test_other_bad_input(files, tmp_path):
    with pytest.raises(DataError, match=r"none.jsonl does not exist"):
        evaluate_tasks(MODEL, against=MODEL, tasks=["none.jsonl"])
    with pytest.raises(DataError, match=r"holds no test/SUBJECT_test.csv"):
        evaluate_tasks(MODEL, against=MODEL, tasks=[str(tmp_path)])
    choices = str(files / "choices.jsonl")
    with pytest.raises(RecipeError, match="holds no examples to show"):
        evaluate_tasks(MODEL, against=MODEL, tasks=[choices], num_fewshot=5)
    (tmp_path / "choices.jsonl").write_text((files / "choices.jsonl").read_text())
    with pytest.raises(RecipeError, match="two tasks are called 'choices'"):
        evaluate_tasks(MODEL, against=MODEL, tasks=[choices, str(tmp_path / "choices.jsonl")])


def test_without_lm_eval_the_error_says_what_to_install(files, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "kvfold.evaluation.harness", raising=False)
    with pytest.raises(KvfoldError, match=r"pip install 'kvfold\[eval\]'"):
        evaluate_tasks(MODEL, against=MODEL, tasks=[str(files / "choices.jsonl")])

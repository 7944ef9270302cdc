"""Recovery training: what it trains on, what it minimises, and that an interrupted run loses nothing."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import MODELS, load, make_tiny, save_tiny

import kvfold
from kvfold.architectures.base import architecture
from kvfold.calibration.text import first_windows
from kvfold.checkpoint.source import load_plan
from kvfold.checkpoint.tokenizer import load_tokenizer
from kvfold.errors import DataError, HealError, PlanError, RecipeError
from kvfold.evaluation.demo import MODEL
from kvfold.evaluation.texts import evaluate_models
from kvfold.healing.objectives import distance, distance_from_top
from kvfold.healing.packing import IGNORED, pack
from kvfold.healing.recipe import make_healing
from kvfold.healing.trainer import last_checkpoint
from kvfold.testing import assert_close


class Words:
    """A tokenizer of words that are numbers."""

    eos_token, eos_token_id, pad_token_id = "<end>", 2, 0

    def __call__(self, text):
        return {"input_ids": [int(word) for word in text.split()]}


@pytest.fixture
def documents(tmp_path):
    """Documents of 3 to 14 tokens, all numbers different from document to document."""
    torch.manual_seed(0)
    texts = [" ".join(map(str, torch.randint(3, 211, (int(n),)).tolist())) for n in torch.randint(3, 15, (60,))]
    file = tmp_path / "documents.txt"
    file.write_text("<end>".join(texts))
    return file, texts


def test_documents_are_packed_whole_and_apart(documents):
    file, texts = documents
    rows = pack(Words(), str(file), seq_len=32, max_tokens=10_000, seed=0)
    assert rows.input_ids.shape[1] == 32 and (rows.labels != IGNORED).float().mean() > 0.7
    found = []
    for row in rows:
        starts = [i for i in range(32) if row["position_ids"][i] == 0]
        for start, end in zip(starts, [*starts[1:], 32], strict=True):
            piece = row["input_ids"][start:end].tolist()
            if row["labels"][start + 1 : end].eq(IGNORED).all():
                continue  # padding
            assert row["labels"][start] == IGNORED and row["labels"][start + 1 : end].tolist() == piece[1:]
            found.append(" ".join(map(str, piece[:-1])))
            assert piece[-1] == 2
    assert sorted(found) == sorted(texts)


def test_a_stream_crosses_documents_and_is_full(documents):
    rows = pack(Words(), str(documents[0]), seq_len=32, max_tokens=320, seed=0, cross=True)
    assert len(rows) == 10 and rows.position_ids is None and (rows.labels == IGNORED).sum() == 10
    with pytest.raises(DataError, match="less than one row of 4096"):
        pack(Words(), str(documents[0]), seq_len=4096, max_tokens=10_000, seed=0, cross=True)


@pytest.mark.parametrize("model", [*MODELS, "gptj_partial", "codegen_partial", "mpt_alibi"])
def test_packed_documents_see_nothing_of_each_other(documents, model):
    """Every family: a row gives what its documents give alone; the folded model too."""
    network = make_tiny(model)
    together = architecture(network.config.model_type).keeps_documents_apart
    row = pack(Words(), str(documents[0]), seq_len=32, max_tokens=64, seed=0, together=together)[0]
    inputs = {name: row[name][None] for name in row if name in ("input_ids", "position_ids", "attention_mask")}
    with torch.no_grad():
        found = network(**inputs, use_cache=False).logits[0]
        starts = [i for i in range(32) if row.get("position_ids", torch.arange(32))[i] == 0]
        for start, end in zip(starts, [*starts[1:], 32], strict=True):
            end = end if together else int(row["attention_mask"].sum())
            alone = network(row["input_ids"][None, start:end], use_cache=False).logits[0]
            assert_close(found[start:end], alone, tolerance=1e-5)


def test_the_teachers_top_is_the_whole_where_it_is_all():
    torch.manual_seed(0)
    student, teacher, labels = torch.randn(2, 9, 30), torch.randn(2, 9, 30), torch.randint(0, 30, (2, 9))
    labels[0, 4:] = IGNORED
    top = teacher.log_softmax(-1).topk(29)
    whole = distance(student, teacher, labels)
    assert_close(distance_from_top(student, top.indices, top.values, labels), whole, tolerance=1e-5)
    few = teacher.log_softmax(-1).topk(5)
    assert 0 < distance_from_top(student, few.indices, few.values, labels) < whole  # merging tokens loses some of it


WORDS = [
    "the",
    "old",
    "man",
    "looked",
    "at",
    "sea",
    "and",
    "saw",
    "a",
    "small",
    "boat",
    "that",
    "came",
    "over",
    "water",
    "in",
    "evening",
    "light",
]


def with_text(root):
    """A model in `root`/source gets a tokenizer, and a text of documents beside it."""
    for file in Path(MODEL).glob("tokenizer*"):
        (root / "source" / file.name).write_bytes(file.read_bytes())
    picks = torch.randint(len(WORDS), (6000,), generator=torch.Generator().manual_seed(0)).tolist()
    ends = ["" if i % 37 else "<|endoftext|>" for i in range(len(picks))]
    (root / "text.txt").write_text(" ".join(WORDS[pick] + end for pick, end in zip(picks, ends, strict=True)))
    return root


@pytest.fixture(scope="module")
def folded(tmp_path_factory):
    """A tiny model with a tokenizer, folded so far that there is something to heal, and a text."""
    root = tmp_path_factory.mktemp("heal")
    save_tiny(make_tiny("llama_mha", vocab_size=4096), root / "source")
    with_text(root)
    recipe = {
        "model": str(root / "source"),
        "out": str(root / "folded"),
        "width": {"method": "svd_w"},
        "kv_budget": 0.25,
    }
    kvfold.compress(recipe | {"calibration": {"data": "self", "num_samples": 8, "seq_len": 48}}, device="cpu")
    return root


def healing(root, name, **fields):
    base = {"folded": str(root / "folded"), "out": str(root / name), "data": str(root / "text.txt"), "seq_len": 32}
    base |= {"max_tokens": 3200, "batch_size": 4, "log_every": 5, "save_every": 10, "learning_rate": 5e-3, "seed": 3}
    return base | {"teacher": str(root / "source")} | fields


def lost(root, name):
    """Of the original, on the text."""
    windows = first_windows(load_tokenizer(root / "source"), root / "text.txt", seq_len=32, max_tokens=1024)
    return evaluate_models(load(root / name), load(root / "source"), windows, load_plan(root / "folded")[0])


@pytest.mark.parametrize(
    "fields",
    [
        {"objective": "kd", "train": "attention", "eval_data": "text"},
        {"objective": "mix", "train": "all", "gradient_checkpointing": True, "accumulate": 2, "epochs": 2.0},
        {"objective": "kd", "train": "fold", "teacher_top": 64},
        {"objective": "kd", "train": "lora", "lora_rank": 8, "lora_alpha": 16},
        {"objective": "layers", "train": "attention"},
        {"objective": "ce", "train": "attention", "cross_documents": True},
    ],
    ids=lambda fields: f"{fields['objective']}-{fields['train']}",
)
def test_healing_lowers_what_it_minimises(folded, fields):
    name = f"healed-{fields['objective']}-{fields['train']}"
    fields = fields | ({"eval_data": str(folded / "text.txt"), "eval_tokens": 256} if "eval_data" in fields else {})
    made = kvfold.heal(healing(folded, name, **fields), device="cpu")
    assert (made.steps, made.tokens) == ((26, 6400) if "epochs" in fields else (25, 3200))
    found = [lost(folded, n) for n in ("folded", name)]
    measure = "loss" if fields["objective"] in ("ce", "mix") else "kl"
    assert getattr(found[1], measure) < 0.98 * getattr(found[0], measure), found
    before, after = (load_file(folded / n / "model.safetensors") for n in ("folded", name))
    assert {n: (t.shape, t.dtype) for n, t in before.items()} == {n: (t.shape, t.dtype) for n, t in after.items()}
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    if fields["train"] != "all":
        assert changed and all("self_attn" in n for n in changed)
    if fields["train"] == "fold":
        assert all("_a_proj" in n or "_b_proj" in n for n in changed)
    assert json.loads((folded / name / "config.json").read_text()) == json.loads(
        (folded / "folded" / "config.json").read_text()
    )
    card = (folded / name / "README.md").read_text()
    assert f"\n# {name}\n" in card and f'from_pretrained("{folded / name}")' in card and "## How it was healed" in card
    if "eval_data" in fields:
        first = json.loads((folded / name / "metrics.jsonl").read_text().splitlines()[0])
        assert first["step"] == 0 and first["eval_loss"] > made.final["eval_loss"]
    assert (folded / name / "loss.svg").exists() and "objective: " in (folded / name / "healing.yaml").read_text()
    assert kvfold.generate(folded / name, "the old man", max_new_tokens=4, device="cpu").new_tokens == 4


def test_a_fold_that_healing_makes_worse_is_named(folded):
    fields = {"eval_data": str(folded / "text.txt"), "eval_tokens": 256, "max_tokens": 320, "learning_rate": 1.0}
    with pytest.warns(UserWarning, match="healing made it worse: .* before, .* after"):
        kvfold.heal(healing(folded, "worse", **fields), device="cpu")


def test_distillation_brings_the_original_back(folded):
    kvfold.heal(healing(folded, "distilled", preset="distil", max_tokens=6400), device="cpu")
    assert lost(folded, "distilled").kl < 0.7 * lost(folded, "folded").kl


def test_a_killed_run_goes_on_with_the_same_result(folded):
    """kill -9 after the first checkpoint; the same command ends with the weights of an uninterrupted run, bit for bit."""
    script = (
        "import sys, json, torch, kvfold; torch.set_num_threads(1); kvfold.heal(json.loads(sys.argv[1]), device='cpu')"
    )
    fields = healing(folded, "killed", save_every=5, max_tokens=6400)
    kvfold.heal(fields | {"out": str(folded / "whole")}, device="cpu")
    environment = os.environ | {"PYTHONPATH": str(Path(kvfold.__file__).parents[1])}
    command = [sys.executable, "-c", script, json.dumps(fields)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    checkpoint = folded / "killed.heal" / "checkpoint-10"
    deadline = time.monotonic() + 120
    while not (checkpoint / "trainer_state.json").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert checkpoint.exists() and not (folded / "killed").exists()
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    killed, whole = (load_file(folded / name / "model.safetensors") for name in ("killed", "whole"))
    assert all(torch.equal(killed[name], whole[name]) for name in whole)
    steps = [json.loads(line)["step"] for line in (folded / "killed" / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)


def test_a_teacher_on_disk_knows_the_evaluation_text_too(folded):
    fields = {"eval_data": str(folded / "text.txt"), "eval_tokens": 512, "max_tokens": 640, "learning_rate": 1e-9}
    found = [
        kvfold.heal(healing(folded, f"top{top}", teacher_top=top, **fields), device="cpu").final for top in (0, 4096)
    ]
    for name in ("kl", "eval_kl"):
        assert found[0][name] == pytest.approx(found[1][name], rel=2e-3)


def test_a_checkpoint_that_was_not_finished_is_passed_over(folded):
    """Trainer writes its state last; killed before that, the checkpoint before it counts."""
    fields = healing(folded, "unfinished", save_every=5)
    kvfold.heal(fields, device="cpu")
    whole = load_file(folded / "unfinished" / "model.safetensors")
    shutil.rmtree(folded / "unfinished")
    (folded / "unfinished.heal" / "checkpoint-25" / "trainer_state.json").unlink()
    assert last_checkpoint(folded / "unfinished.heal").endswith("checkpoint-20")
    kvfold.heal(fields, device="cpu")
    again = load_file(folded / "unfinished" / "model.safetensors")
    assert all(torch.equal(again[name], whole[name]) for name in whole)


def test_another_text_under_the_same_name_is_noticed(folded, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text((folded / "text.txt").read_text())
    fields = healing(folded, "moved", data=str(text), max_tokens=640)
    kvfold.heal(fields, device="cpu")
    text.write_text("evening light " * 3000)
    with pytest.raises(RecipeError, match="other settings, models or text"):
        kvfold.heal(fields, overwrite=True, device="cpu")


def test_a_healed_folder_has_the_folds_tensors(tmp_path):
    """Tied weights are stored once, in their dtype; sampling settings that do not fit together do no harm."""
    model = make_tiny("qwen2_bias_tied", vocab_size=4096).bfloat16()
    save_tiny(model, tmp_path / "source")
    (tmp_path / "source" / "generation_config.json").write_text('{"temperature": 0.6, "top_p": 0.9}')
    with_text(tmp_path)
    recipe = {"model": str(tmp_path / "source"), "out": str(tmp_path / "folded"), "width": {"method": "mean_pool"}}
    kvfold.compress(recipe | {"kv_budget": 0.5}, device="cpu")
    kvfold.heal(healing(tmp_path, "healed", train="all", max_tokens=320), device="cpu")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("folded", "healed"))
    assert {n: (t.shape, t.dtype) for n, t in before.items()} == {n: (t.shape, t.dtype) for n, t in after.items()}
    assert not any(torch.equal(before[n], after[n]) for n in before if "q_proj.weight" in n)
    assert (tmp_path / "healed" / "model.safetensors").stat().st_mode & 0o044 == 0o044


def test_a_loss_that_is_no_number_stops_the_run(folded):
    with pytest.raises(HealError, match=r"the loss is nan at step \d+"):
        kvfold.heal(healing(folded, "nan", learning_rate=1e30, save_every=1), device="cpu")
    assert not (folded / "nan").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"objective": "dk"}, "Did you mean 'kd'"),
        ({"train": "atention"}, "Did you mean 'attention'"),
        ({"teacher": None}, "give it: --teacher"),
        ({"preset": "mlvk"}, "Did you mean 'mlkv'"),
        ({"lerning_rate": 1.0}, "Did you mean 'learning_rate'"),
        ({"learning_rate": -1.0}, "above 0"),
        ({"batch_size": 0}, "at least 1"),
        ({"batch_size": "8"}, "is not a whole number"),
        ({"objective": "ce", "teacher_top": 5}, "goes with objective kd"),
        ({"objective": "layers", "gradient_checkpointing": True}, "does not go with gradient_checkpointing"),
        ({"lora_dropout": 1.5}, "a share below 1"),
        ({"teacher_top": -1}, "at least 0"),
        ({"seq_len": -3}, "at least 0"),
        ({"elastic": 1.0}, "below 1"),
    ],
)
def test_mistakes_are_named(folded, fields, message):
    with pytest.raises(RecipeError, match=message):
        make_healing(healing(folded, "mistake", **fields))


def test_what_cannot_be_healed_is_refused(folded):
    with pytest.raises(RecipeError, match="is not a folded model"):
        kvfold.heal(healing(folded, "bad", folded=str(folded / "source")), device="cpu")
    with pytest.raises(RecipeError, match="is not the original"):
        kvfold.heal(healing(folded, "bad2", teacher=str(folded / "folded")), device="cpu")
    joint = {"model": str(folded / "source"), "out": str(folded / "joint"), "preset": "xkv", "kv_budget": 0.5}
    joint |= {"depth": {"factor": 3}, "calibration": {"data": "self", "num_samples": 8, "seq_len": 48}}
    kvfold.compress(joint, device="cpu")
    with pytest.raises(PlanError, match="latents of several layers"):
        kvfold.heal(healing(folded, "bad3", folded=str(folded / "joint")), device="cpu")
    with pytest.raises(RecipeError, match="CUDA_VISIBLE_DEVICES"):
        kvfold.heal(healing(folded, "bad4"), device="cuda:1")
    with pytest.warns(UserWarning, match="tokens where 1,000,000 were asked for"):
        kvfold.heal(healing(folded, "short", max_tokens=1_000_000, batch_size=64), device="cpu")
    (folded / "other.heal").mkdir()
    (folded / "other.heal" / "healing.txt").write_text("another run")
    with pytest.raises(RecipeError, match="checkpoints of a run with other settings"):
        kvfold.heal(healing(folded, "bad"), run_dir=folded / "other.heal", device="cpu")


def test_the_papers_recipes_are_the_papers():
    base = {"folded": "f", "out": "o", "data": "d"}
    mlkv, lora = (make_healing(base | {"preset": name}) for name in ("mlkv", "svd_a"))
    assert (mlkv.learning_rate, mlkv.warmup, mlkv.weight_decay, mlkv.batch_size * mlkv.accumulate) == (
        6e-4,
        0.2,
        0.01,
        24,
    )
    assert (lora.lora_rank, lora.lora_alpha, lora.learning_rate, lora.batch_size * lora.accumulate) == (
        256,
        512,
        4e-5,
        64,
    )
    assert make_healing(base | {"preset": "mlkv", "learning_rate": 1e-3}).learning_rate == 1e-3

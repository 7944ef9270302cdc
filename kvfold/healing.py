"""heal(): short recovery training of a folded model, by transformers' Trainer, peft and accelerate."""

from __future__ import annotations

import dataclasses
import json
import os
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from transformers import TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from kvfold import processes, registry
from kvfold.checkpoint import DTYPES, Checkpoint
from kvfold.data import first_windows, load_tokenizer
from kvfold.documents import Rows, pack
from kvfold.drawing import loss_plot
from kvfold.elastic import Elastic, check_nested
from kvfold.errors import RecipeError
from kvfold.healing_presets import HEALING_PRESETS
from kvfold.loading import default_seq_len, load_plan, load_weights, open_source, resolve_device, warn_if_too_long
from kvfold.objectives import CrossEntropy, Distillation, LayerMatch, Objective
from kvfold.output import copy_side_files, partial_folder, publish, refuse_out
from kvfold.recipe import check_types
from kvfold.storage import make_folder, write_text
from kvfold.teacher_logits import keep_teacher_logits
from kvfold.trainable import CHOICES, choose_trainable, merged
from kvfold.training import METRICS, SHOWN, HealTrainer, read_metrics
from kvfold.version import __version__

OBJECTIVES = ("ce", "kd", "mix", "layers")
XML = '<?xml version="1.0" encoding="utf-8"?>\n'


@dataclass(frozen=True, kw_only=True)
class Healing:
    """One healing run.

    folded: the folder to heal; out: the folder to write; data: text, as in calibration (no `self`); teacher: the original,
    needed for all objectives but ce.
    objective: `ce` (the next token), `kd` (KL to the original's distribution), `mix` (alpha * kd + beta * ce), `layers`
        (every attention layer answers as the original's). train: all, attention, fold (its own projections) or lora.
    max_tokens: to train on, in rows of seq_len (0: the model's context, at most 2,048); epochs over them.
    batch_size rows per device and step, times accumulate, times processes.
    warmup: share of the steps; then a cosine down to 0. cross_documents: rows cut from one stream.
    shard: split weights, gradients and optimizer state over all processes (FSDP2) instead of having all of them in each.
    elastic: the least share of every stored head that is to do alone (0: only all of it counts). Each step then trains a
        share between that and all, and `kvfold truncate` cuts the healed model to any of them.
    teacher_top: keep so many of the teacher's likeliest tokens on disk, instead of the teacher in memory (0: in memory).
    """

    folded: str
    out: str
    data: str
    teacher: str | None = None
    preset: str | None = None
    objective: str = "kd"
    train: str = "attention"
    alpha: float = 1.0
    beta: float = 1.0
    lora_rank: int = 64
    lora_alpha: int = 128
    lora_dropout: float = 0.0
    max_tokens: int = 1_000_000
    epochs: float = 1.0
    seq_len: int = 0
    batch_size: int = 8
    accumulate: int = 1
    learning_rate: float = 3e-4
    weight_decay: float = 0.0
    adam_beta2: float = 0.95
    warmup: float = 0.05
    cross_documents: bool = False
    gradient_checkpointing: bool = False
    bf16: bool = False
    shard: bool = False
    elastic: float = 0.0
    teacher_top: int = 0
    eval_data: str | None = None
    eval_tokens: int = 16_384
    eval_every: int = 0
    save_every: int = 100
    log_every: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        for name, allowed in (("objective", OBJECTIVES), ("train", CHOICES)):
            if getattr(self, name) not in allowed:
                raise RecipeError(registry.unknown(name, getattr(self, name), allowed))
        if self.objective != "ce" and not self.teacher:
            raise RecipeError(f"objective {self.objective!r} learns from the original model; give it: --teacher MODEL.")
        if self.teacher_top and self.objective not in ("kd", "mix"):
            raise RecipeError("teacher_top goes with objective kd or mix.")
        for name in ("max_tokens", "batch_size", "accumulate", "save_every", "log_every", "lora_rank", "lora_alpha"):
            if getattr(self, name) < 1:
                raise RecipeError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if not 0 <= self.elastic < 1:
            raise RecipeError(f"elastic is {self.elastic}; it is the least share of a stored head, below 1.")
        if self.learning_rate <= 0 or not 0 <= self.warmup < 1 or self.epochs <= 0:
            raise RecipeError("learning_rate and epochs must be above 0, warmup a share of the steps below 1.")


@dataclass(frozen=True)
class Healed:
    """What `heal` made."""

    out: Path
    steps: int
    tokens: int
    seconds: float
    final: dict[str, float]


def make_healing(data: dict[str, Any]) -> Healing:
    """From plain data, of a preset filled up with what is given; what is None is not given."""
    given = {name: value for name, value in data.items() if value is not None}
    if preset := given.get("preset"):
        if preset not in HEALING_PRESETS:
            raise RecipeError(registry.unknown("healing preset", preset, HEALING_PRESETS))
        given = HEALING_PRESETS[preset].fragment | given
    known = {f.name: f for f in dataclasses.fields(Healing)}
    for name in given:
        if name not in known:
            raise RecipeError(registry.unknown("healing field", name, known))
    if missing := [name for name in ("folded", "out", "data") if name not in given]:
        raise RecipeError(f"healing needs {', '.join(missing)}.")
    check_types(Healing, given, "")
    return Healing(**given)


def heal(
    healing: Healing | dict[str, Any],
    *,
    run_dir: str | Path | None = None,
    overwrite: bool = False,
    device: str = "auto",
) -> Healed:
    """Train a folded folder and write the healed one, which is again a plain kvfold folder.

    Checkpoints and metrics are kept in `run_dir` (default `<out>.heal`); the same call continues an interrupted run, with the
    result of an uninterrupted one. Under torchrun or accelerate launch all processes call it.
    """
    if not isinstance(healing, Healing):
        healing = make_healing(healing)
    started, out = time.perf_counter(), Path(os.path.abspath(healing.out))
    run_dir = Path(run_dir) if run_dir else out.with_name(out.name + ".heal")
    refuse_out(
        out, overwrite, keep=[Path(healing.folded), run_dir, *([Path(healing.teacher)] if healing.teacher else [])]
    )
    checkpoint, (plan, folded) = Checkpoint.open(healing.folded), load_plan(healing.folded)
    if not folded:
        raise RecipeError(f"{healing.folded} is not a folded model; make one with `kvfold compress`.")
    if healing.elastic:
        check_nested(plan)
    _claim(run_dir, healing, checkpoint)
    tokenizer, device = load_tokenizer(checkpoint.path), processes.own_device(resolve_device(device))
    model: Any = load_weights(checkpoint.path, "float32", device)
    seq_len = healing.seq_len or default_seq_len(checkpoint.config)
    warn_if_too_long(seq_len, checkpoint.config)
    rows = pack(
        tokenizer,
        healing.data,
        seq_len=seq_len,
        max_tokens=healing.max_tokens,
        seed=healing.seed,
        cross=healing.cross_documents,
        together=model.architecture.keeps_documents_apart,
    )
    arguments = _arguments(healing, run_dir, device, len(rows), list(model._no_split_modules))
    arguments._n_gpu = (
        1  # one process per device; Trainer would wrap the model in DataParallel, where readers find no owner
    )
    objective = _objective(healing, plan, rows, run_dir, device)
    processes.wait_for_all()  # what the teacher said of the other processes' rows
    torch.manual_seed(healing.seed)
    model = _trainable(model, healing)
    trainer = HealTrainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        eval_dataset=_eval_rows(healing, tokenizer, seq_len),
        objective=objective,
        metrics=run_dir / METRICS,
        elastic=Elastic(model, least=healing.elastic, seed=healing.seed) if healing.elastic else None,
    )
    if healing.shard and not trainer.is_fsdp_enabled:
        warnings.warn("shard: accelerate shards nothing here (one process, or a CPU); every process has all weights.")
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(run_dir)))
    state = _whole(trainer.accelerator.unwrap_model(trainer.model).state_dict())
    if trainer.is_world_process_zero():
        healed = _trainable(load_weights(checkpoint.path, "float32", "cpu"), healing)
        healed.load_state_dict(state)
        _write(out, healing, checkpoint, merged(healed), run_dir, overwrite)
    trainer.accelerator.wait_for_everyone()
    logged = read_metrics(run_dir / METRICS)
    final = {k: v for entry in logged for k, v in entry.items() if k.removeprefix("eval_") in SHOWN}
    steps, seconds = trainer.state.global_step, round(time.perf_counter() - started, 3)
    tokens = steps * healing.batch_size * healing.accumulate * trainer.args.world_size * seq_len
    return Healed(Path(healing.out), steps, tokens, seconds, final)


def _trainable(model: Any, healing: Healing) -> Any:
    return choose_trainable(
        model,
        healing.train,
        lora_rank=healing.lora_rank,
        lora_alpha=healing.lora_alpha,
        lora_dropout=healing.lora_dropout,
    )


def _claim(run_dir: Path, healing: Healing, checkpoint: Checkpoint) -> None:
    """Raise RecipeError where the folder holds checkpoints of another run, which would be continued with other settings."""
    if processes.rank():
        return
    make_folder(run_dir)
    identity = "\n".join([__version__, yaml.safe_dump(dataclasses.asdict(healing)), checkpoint.fingerprint()])
    file = run_dir / "healing.txt"
    if file.exists() and file.read_text() != identity:
        raise RecipeError(
            f"{run_dir} holds checkpoints of a run with other settings. Remove it, or give another --run-dir or --out."
        )
    write_text(file, identity)


def _objective(healing: Healing, plan: Any, rows: Rows, run_dir: Path, device: str) -> Objective:
    if healing.objective == "ce" or healing.teacher is None:
        return CrossEntropy()
    source, folded = load_plan(healing.teacher)
    if folded or source.source != plan.source:
        raise RecipeError(f"--teacher {healing.teacher} is not the original of {healing.folded}: the shapes differ.")
    path = Checkpoint.open(healing.teacher).path
    teacher: Any = load_weights(path, "float32" if device == "cpu" else source.dtype, device).requires_grad_(False)
    if healing.objective == "layers":
        arch = open_source(path).arch
        return LayerMatch(teacher, list(arch.modules(teacher)))
    alpha, beta = (1.0, 0.0) if healing.objective == "kd" else (healing.alpha, healing.beta)
    if healing.teacher_top:
        folder = run_dir / f"teacher-{healing.teacher_top}"
        kept = keep_teacher_logits(teacher, rows, folder, top=healing.teacher_top, batch_size=healing.batch_size)
        return Distillation(kept, alpha, beta)
    return Distillation(teacher, alpha, beta)


def _arguments(healing: Healing, run_dir: Path, device: str, rows: int, blocks: list[str]) -> TrainingArguments:
    """blocks: class names of the layers that are sharded one by one."""
    world = processes.world_size()
    steps = max(int(rows * healing.epochs) // (healing.batch_size * healing.accumulate * world), 1)
    evaluates = healing.eval_data is not None
    sharding: dict[str, Any] = {}
    if healing.shard and world > 1:
        wrapped = {"version": 2, "transformer_layer_cls_to_wrap": blocks, "reshard_after_forward": True}
        wrapped |= {"state_dict_type": "SHARDED_STATE_DICT"}
        sharding = {"fsdp": True, "fsdp_config": wrapped}
    return TrainingArguments(
        output_dir=str(run_dir),
        per_device_train_batch_size=healing.batch_size,
        per_device_eval_batch_size=healing.batch_size,
        gradient_accumulation_steps=healing.accumulate,
        max_steps=steps,
        learning_rate=healing.learning_rate,
        weight_decay=healing.weight_decay,
        adam_beta2=healing.adam_beta2,
        warmup_steps=int(healing.warmup * steps),
        lr_scheduler_type="cosine",
        logging_steps=min(healing.log_every, steps),
        logging_nan_inf_filter=False,
        eval_strategy="steps" if evaluates else "no",
        eval_steps=min(healing.eval_every or max(steps // 10, 1), steps) if evaluates else None,
        save_strategy="steps",
        save_steps=min(healing.save_every, steps),
        save_total_limit=2,
        bf16=healing.bf16,
        gradient_checkpointing=healing.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if healing.gradient_checkpointing else None,
        seed=healing.seed,
        data_seed=healing.seed,
        use_cpu=device == "cpu",
        ddp_backend="gloo" if device == "cpu" and world > 1 else None,
        dataloader_pin_memory=device != "cpu",
        remove_unused_columns=False,
        report_to=[],
        disable_tqdm=True,
        **sharding,
    )


def _eval_rows(healing: Healing, tokenizer: Any, seq_len: int) -> Rows | None:
    if healing.eval_data is None:
        return None
    windows_WT = first_windows(tokenizer, healing.eval_data, seq_len=seq_len, max_tokens=healing.eval_tokens)
    return Rows(windows_WT.int(), windows_WT.int(), None, None)


def _write(out: Path, healing: Healing, checkpoint: Checkpoint, model: Any, run_dir: Path, overwrite: bool) -> None:
    """The healed folder: weights in the dtype in which they were stored, and what belongs beside them."""
    partial = partial_folder(out, (run_dir / "healing.txt").read_text())
    dtypes = {name: getattr(torch, DTYPES[stored.dtype]) for name, stored in checkpoint.tensors.items()}
    tensors = {n: t.to(dtypes.get(n, t.dtype)) for n, t in _whole(model.state_dict()).items()}
    model.save_pretrained(partial, state_dict=tensors)
    write_text(partial / "config.json", json.dumps(checkpoint.config, indent=2) + "\n")
    copy_side_files(checkpoint, partial)
    for name in ("README.md", "recipe.yaml"):
        if (checkpoint.path / name).exists():
            write_text(partial / name, (checkpoint.path / name).read_text())
    write_text(
        partial / "healing.yaml", yaml.safe_dump(dataclasses.asdict(healing), sort_keys=False, allow_unicode=True)
    )
    write_text(partial / METRICS, (run_dir / METRICS).read_text())
    write_text(partial / "loss.svg", XML + loss_plot(read_metrics(run_dir / METRICS)))
    publish(partial, out, overwrite)


def _whole(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sharded tensors in one piece."""
    return {name: tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor for name, tensor in state.items()}

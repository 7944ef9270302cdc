"""heal(): short recovery training of a folded model, by transformers' Trainer, peft and accelerate."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from transformers import GenerationConfig, TrainingArguments
from transformers.core_model_loading import revert_weight_conversion

from kvfold import distributed as processes
from kvfold.calibration.text import first_windows
from kvfold.checkpoint.atomic import copy_file, make_folder, write_text
from kvfold.checkpoint.fingerprint import fingerprint
from kvfold.checkpoint.folder import (
    new_folder,
    refuse_out,
    write_files,
    write_weights,
)
from kvfold.checkpoint.reader import DTYPES, Checkpoint
from kvfold.checkpoint.source import default_seq_len, load_plan, open_source, warn_if_too_long
from kvfold.checkpoint.tokenizer import load_tokenizer
from kvfold.errors import HealError, OutputError, PlanError, RecipeError
from kvfold.healing.card import CARD, healed_card
from kvfold.healing.elastic import Elastic
from kvfold.healing.objectives import CrossEntropy, Distillation, LayerMatch, Objective
from kvfold.healing.packing import Rows, pack
from kvfold.healing.recipe import Healing, make_healing
from kvfold.healing.teacher_cache import keep_teacher_logits
from kvfold.healing.trainable import choose_trainable, merged
from kvfold.healing.trainer import METRICS, SHOWN, HealTrainer, last_checkpoint, read_metrics
from kvfold.plan.nested import check_nested
from kvfold.plan.plan import CachePlan
from kvfold.plan.rounding import whole
from kvfold.progress import without_bars
from kvfold.report.plots import SVG, loss_plot
from kvfold.runtimes.transformers.load import load_weights, resolve_device
from kvfold.version import __version__


@dataclass(frozen=True)
class Healed:
    """What `heal` made."""

    out: Path
    steps: int
    tokens: int
    seconds: float
    final: dict[str, float]


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
    inputs = [Path(healing.folded), *([Path(healing.teacher)] if healing.teacher else [])]
    _refuse(out, run_dir, inputs, overwrite)
    device = processes.start(_device(device))
    checkpoint, plan = _folded(healing)
    tokenizer = load_tokenizer(checkpoint.path)
    model: Any = load_weights(checkpoint.path, "float32", device)
    model.generation_config = GenerationConfig()  # what a folder says of sampling may not be fit for saving
    rows, eval_rows = _rows(healing, checkpoint, tokenizer, together=model.architecture.keeps_documents_apart)
    _claim(run_dir, healing, checkpoint, rows, eval_rows)
    objective = _objective(healing, plan, rows, eval_rows, run_dir, device)
    processes.wait_for_all()  # for what the teacher says of the other processes' rows
    torch.manual_seed(healing.seed)
    arguments = _arguments(healing, run_dir, device, len(rows), list(model._no_split_modules))
    model = _trainable(model, healing)
    trainer = HealTrainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        eval_dataset=eval_rows,
        objective=objective,
        metrics=run_dir / METRICS,
        elastic=Elastic(model, least=healing.elastic, seed=healing.seed) if healing.elastic else None,
    )
    if healing.shard and not trainer.is_fsdp_enabled:
        warnings.warn("shard: accelerate shards nothing here (one process, or a CPU); every process has all weights.")
    with without_bars():
        trainer.train(resume_from_checkpoint=last_checkpoint(run_dir))
        state = _whole(trainer.accelerator.unwrap_model(trainer.model))
    if not processes.rank():
        healed = _trainable(load_weights(checkpoint.path, "float32", "cpu"), healing)
        healed.load_state_dict(state)
        healed = merged(healed)
        state = healed.state_dict()
        if healed.architecture.experts:  # one by one, as files have them
            state = revert_weight_conversion(healed, state)
        _write(out, healing, checkpoint, state, run_dir, overwrite)
    processes.wait_for_all()
    logged = read_metrics(run_dir / METRICS)
    _warn_if_worse(logged)
    final = {k: v for entry in logged for k, v in entry.items() if k.removeprefix("eval_") in SHOWN}
    seconds = round(time.perf_counter() - started, 3)
    tokens = int(len(rows) * healing.epochs) * rows.input_ids.shape[1]
    return Healed(Path(healing.out), trainer.state.global_step, tokens, seconds, final)


def _refuse(out: Path, run_dir: Path, inputs: list[Path], overwrite: bool) -> None:
    """Raise OutputError where something that is needed would be written over."""
    refuse_out(out, overwrite, keep=[*inputs, run_dir])
    if run_dir.resolve() in [path.resolve() for path in inputs]:
        raise OutputError(f"--run-dir {run_dir} is a model that is read; give another folder.")


def _device(device: str) -> str:
    """The one of this process. Raises RecipeError where Trainer would take another."""
    if device.partition(":")[2] not in ("", "0"):
        raise RecipeError(
            f"--device {device}: Trainer takes the first GPU that it sees; set CUDA_VISIBLE_DEVICES instead."
        )
    return processes.own_device(resolve_device(device))


def _folded(healing: Healing) -> tuple[Checkpoint, CachePlan]:
    plan, folded = load_plan(healing.folded)
    if not folded:
        raise RecipeError(f"{healing.folded} is not a folded model; make one with `kvfold compress`.")
    if plan.joint:
        raise PlanError(
            f"{healing.folded} stores latents of several layers, which only past tokens go through: training, which has none,"
            " would not see them. Heal another kind of fold."
        )
    if healing.elastic:
        check_nested(plan)
    checkpoint = Checkpoint.open(healing.folded)
    if checkpoint.packed:
        raise RecipeError(
            f"{healing.folded} has quantized matrices ({min(checkpoint.packed)} and others), which are not trained; fold and"
            " heal the model as it was before."
        )
    if any(spec.tokens is not None and spec.tokens.scored for spec in plan.owned):
        warnings.warn("what scorers drop behind a prompt is not seen by training, which heals what else was folded.")
    return checkpoint, plan


def _rows(healing: Healing, checkpoint: Checkpoint, tokenizer: Any, *, together: bool) -> tuple[Rows, Rows | None]:
    """To train on and to evaluate on."""
    seq_len = healing.seq_len or default_seq_len(checkpoint.config)
    warn_if_too_long(seq_len, checkpoint.config)
    size: dict[str, Any] = {"seq_len": seq_len, "max_tokens": healing.max_tokens, "seed": healing.seed}
    rows = pack(tokenizer, healing.data, **size, cross=healing.cross_documents, together=together)
    if rows.input_ids.numel() < 0.9 * healing.max_tokens:
        warnings.warn(
            f"{healing.data} gives {rows.input_ids.numel():,} tokens where {healing.max_tokens:,} were asked for; give more"
            " text, or --set epochs=2."
        )
    if healing.eval_data is None:
        return rows, None
    windows_WT = first_windows(tokenizer, healing.eval_data, seq_len=seq_len, max_tokens=healing.eval_tokens)
    together_count = healing.batch_size * processes.world_size()  # an incomplete batch would count twice
    windows_WT = windows_WT[: len(windows_WT) // together_count * together_count or len(windows_WT)].int()
    return rows, Rows(windows_WT, windows_WT, None, None)


def _trainable(model: Any, healing: Healing) -> Any:
    return choose_trainable(
        model,
        healing.train,
        lora_rank=healing.lora_rank,
        lora_alpha=healing.lora_alpha,
        lora_dropout=healing.lora_dropout,
    )


def _claim(run_dir: Path, healing: Healing, checkpoint: Checkpoint, rows: Rows, eval_rows: Rows | None) -> None:
    """Raise RecipeError where the folder holds checkpoints of another run, which would be continued with other settings."""
    if not processes.rank():
        make_folder(run_dir)
        teacher = healing.teacher and Checkpoint.open(healing.teacher).fingerprint()
        settings, model = dataclasses.asdict(healing), checkpoint.fingerprint()
        facts: dict[str, Any] = {"version": __version__, "settings": settings, "model": model, "teacher": teacher}
        if healing.teacher_top and eval_rows is not None:  # of which is kept what the teacher says
            facts["eval_text"] = eval_rows.input_ids
        identity = fingerprint(**facts, text=rows.input_ids)
        file = run_dir / "healing.txt"
        if file.exists() and file.read_bytes() != identity.encode():
            raise RecipeError(
                f"{run_dir} holds checkpoints of a run with other settings, models or text. Remove it, or give another"
                " --run-dir or --out."
            )
        write_text(file, identity)
    processes.wait_for_all()


def _objective(
    healing: Healing, plan: CachePlan, rows: Rows, eval_rows: Rows | None, run_dir: Path, device: str
) -> Objective:
    if healing.objective == "ce" or healing.teacher is None:
        return CrossEntropy()
    source, folded = load_plan(healing.teacher)
    if folded or source.source != plan.source:
        raise RecipeError(f"--teacher {healing.teacher} is not the original of {healing.folded}: the shapes differ.")
    path = Checkpoint.open(healing.teacher).path
    teacher: Any = load_weights(path, "float32" if device == "cpu" else source.dtype, device).requires_grad_(False)
    if healing.objective == "layers":
        return LayerMatch(teacher, list(open_source(path).arch.modules(teacher)))
    alpha, beta = (1.0, 0.0) if healing.objective == "kd" else (healing.alpha, healing.beta)
    if not healing.teacher_top:
        return Distillation(teacher, teacher, alpha, beta)
    keep = functools.partial(keep_teacher_logits, teacher, top=healing.teacher_top, batch_size=healing.batch_size)
    kept = keep(rows, run_dir / f"teacher-{healing.teacher_top}")
    return Distillation(
        kept, eval_rows and keep(eval_rows, run_dir / f"teacher-{healing.teacher_top}-eval"), alpha, beta
    )


def _arguments(healing: Healing, run_dir: Path, device: str, rows: int, blocks: list[str]) -> TrainingArguments:
    """blocks: class names of the layers that are sharded one by one."""
    world = processes.world_size()
    batches = math.ceil(rows / (healing.batch_size * world))
    steps = max(whole(math.ceil(batches / healing.accumulate) * healing.epochs), 1)
    evaluates = healing.eval_data is not None
    sharding: dict[str, Any] = {}
    if healing.shard and world > 1:
        wrapped = {"version": 2, "transformer_layer_cls_to_wrap": blocks, "reshard_after_forward": True}
        sharding = {"fsdp": True, "fsdp_config": wrapped | {"state_dict_type": "SHARDED_STATE_DICT"}}
    checkpointing: dict[str, Any] = {}
    if healing.gradient_checkpointing:
        checkpointing = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    arguments = TrainingArguments(
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
        eval_on_start=evaluates and last_checkpoint(run_dir) is None,
        eval_steps=min(healing.eval_every or max(steps // 10, 1), steps) if evaluates else None,
        save_strategy="steps",
        save_steps=min(healing.save_every, steps),
        save_total_limit=2,
        bf16=healing.bf16,
        seed=healing.seed,
        data_seed=healing.seed,
        use_cpu=device == "cpu",
        ddp_backend="gloo" if device == "cpu" and world > 1 else None,
        dataloader_pin_memory=device != "cpu",
        remove_unused_columns=False,
        report_to=[],
        disable_tqdm=True,
        **sharding,
        **checkpointing,
    )
    arguments._n_gpu = 1  # Trainer would wrap several in DataParallel, where readers do not find what owners wrote
    return arguments


def _write(
    out: Path, healing: Healing, checkpoint: Checkpoint, state: dict[str, Tensor], run_dir: Path, overwrite: bool
) -> None:
    """The healed folder: the fold's tensors in the dtypes in which they were stored, and what belongs beside them. Raises
    HealError where the last step made what is no number."""
    if wrong := [name for name, tensor in state.items() if not tensor.isfinite().all()]:
        raise HealError(
            f"{wrong[0]} and {len(wrong) - 1} others are no numbers any more; try a smaller --learning-rate."
        )

    def read(names: list[str]) -> dict[str, Tensor]:
        stored = {name: getattr(torch, DTYPES[checkpoint.tensors[name].dtype]) for name in names}
        return {name: state[name].to(dtype).contiguous() for name, dtype in stored.items()}

    settings = yaml.safe_dump(dataclasses.asdict(healing), sort_keys=False, allow_unicode=True)
    files = {"healing.yaml": settings, "loss.svg": SVG + loss_plot(read_metrics(run_dir / METRICS))}
    with new_folder(out, (run_dir / "healing.txt").read_text(), overwrite=overwrite) as partial:
        write_weights(partial, {name: stored.shard for name, stored in checkpoint.tensors.items()}, read)
        for name in ("config.json", "recipe.yaml"):
            if (checkpoint.path / name).exists():
                copy_file(checkpoint.path / name, partial / name)
        if (checkpoint.path / CARD).exists():
            write_text(partial / CARD, healed_card((checkpoint.path / CARD).read_text(), healing))
        copy_file(run_dir / METRICS, partial / METRICS)
        write_files(partial, files, beside=checkpoint)


def _warn_if_worse(logged: list[dict[str, float]]) -> None:
    """Where the text of eval_data is said worse in the end than before the first step."""
    measured = [entry["eval_loss"] for entry in logged if "eval_loss" in entry]
    if len(measured) > 1 and measured[-1] > measured[0]:
        warnings.warn(
            f"healing made it worse: {measured[0]:.4g} before, {measured[-1]:.4g} after (eval_loss). A fold that loses little"
            " has little to heal: keep it as it was, or give more --max-tokens and a smaller --learning-rate."
        )


def _whole(model: Any) -> dict[str, Tensor]:
    """Tensors in one piece, on the CPU of the first process; a sharded one is gathered by all and kept by none else."""
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        if not processes.rank():
            state[name] = whole.cpu()
    return state

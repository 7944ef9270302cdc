"""Pretrain one of the lab's small models from a plain text file.

    python lab/pretrain.py --config books-llama --data books-train.txt.xz --valid books-valid.txt --out lab/models/books-llama

The same command goes on where a killed run stopped, with the same result: every step's batch depends on seed and step alone.
Products run in bfloat16 where the processor has it; on a GPU the step is compiled, on the CPU the config's smaller
`training_on_cpu` applies.
`--steps 20` with any text file tries it out.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

LAB = Path(__file__).parent
TOKENIZER = LAB.parent / "kvfold" / "demo_model" / "books-6l"
DOCUMENT_END = "<|endoftext|>"
STATE = "state.safetensors"
LOG = "training.jsonl"
BETAS = (0.9, 0.95)
FINAL_RATE = 0.1
"""The cosine ends at this share of the peak learning rate."""

GRADIENT_CLIP = 1.0
VALIDATION_WINDOWS = 128


@dataclass(frozen=True)
class Training:
    """What a config file's `training` says; `tokens` is the length of the run."""

    seq_len: int
    batch_size: int
    tokens: int
    learning_rate: float
    warmup_share: float
    weight_decay: float
    seed: int

    @property
    def steps(self) -> int:
        return max(self.tokens // (self.seq_len * self.batch_size), 1)

    def rate(self, step: int) -> float:
        """Linear warm-up, then a cosine down to FINAL_RATE of the peak."""
        warmup = max(int(self.warmup_share * self.steps), 1)
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        progress = (step - warmup) / max(self.steps - warmup, 1)
        return self.learning_rate * (FINAL_RATE + (1 - FINAL_RATE) * (1 + math.cos(math.pi * progress)) / 2)


def main() -> None:
    """Train, go on from a state if there is one, and write the model when the last step is done."""
    options = parse()
    config = json.loads((LAB / "configs" / f"{options.config}.json").read_text())
    training = training_of(config, options)
    options.out.mkdir(parents=True, exist_ok=True)
    tokens = tokenise(options.data, options.out.parent / "tokens")
    torch.manual_seed(training.seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config["model"])).to(options.device)
    optimizer = make_optimizer(model, training)
    step = restore(options.out, model, optimizer)
    done = train(model, optimizer, tokens, training, options, step)
    if not done:
        print(json.dumps({"config": options.config, "finished": False, "out": str(options.out)}))
        return
    losses = {Path(file).name: validate(model, file, training.seq_len) for file in options.valid}
    write_model(model, options, config, training, losses)
    print(json.dumps({"config": options.config, "finished": True, "out": str(options.out), "validation": losses}))


def parse() -> argparse.Namespace:
    """The command line."""
    names = sorted(file.stem for file in (LAB / "configs").glob("*.json"))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", choices=names, required=True)
    parser.add_argument("--data", type=Path, required=True, help="plain text, also .xz")
    parser.add_argument("--valid", type=Path, nargs="*", default=[], help="texts that the card states the loss on")
    parser.add_argument("--out", type=Path, help="default: lab/models/CONFIG")
    parser.add_argument("--steps", type=int, help="instead of the config's tokens")
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--seq-len", type=int)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--max-seconds", type=float, default=math.inf, help="stop then; the same command goes on")
    parser.add_argument("--save-seconds", type=float, default=120, help="how often the state is written")
    options = parser.parse_args()
    options.out = options.out or LAB / "models" / options.config
    return options


def training_of(config: dict[str, Any], options: argparse.Namespace) -> Training:
    """The config's training, for this device, with what the command line gives instead."""
    fields = config["training"] | (config["training_on_cpu"] if options.device == "cpu" else {})
    names = ("tokens", "seq_len", "batch_size", "seed")
    fields |= {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if options.steps is not None:
        fields["tokens"] = options.steps * fields["seq_len"] * fields["batch_size"]
    return Training(**fields)


def tokenise(data: Path, folder: Path) -> np.ndarray:
    """All tokens of a text as uint16, kept in `folder` for the next model."""
    file = folder / f"{data.name}-{data.stat().st_size}.npy"
    if not file.exists():
        tokenizer = AutoTokenizer.from_pretrained(TOKENIZER).backend_tokenizer
        end = tokenizer.token_to_id(DOCUMENT_END)
        parts = []
        for texts in _batches(_documents(data), 64):
            for encoded in tokenizer.encode_batch(texts, add_special_tokens=False):
                parts.append(np.array([end, *encoded.ids], dtype=np.uint16))
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_suffix(".unfinished.npy")
        np.save(unfinished, np.concatenate(parts))
        unfinished.rename(file)
    return np.load(file, mmap_mode="r")


def _documents(data: Path) -> Iterator[str]:
    opener = lzma.open if data.suffix == ".xz" else open
    with opener(data, "rt", encoding="utf-8", errors="replace") as file:
        yield from (text for text in file.read().split(DOCUMENT_END) if text.strip())


def _batches(items: Iterator[str], size: int) -> Iterator[list[str]]:
    batch: list[str] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def make_optimizer(model: torch.nn.Module, training: Training) -> torch.optim.AdamW:
    """AdamW, with weight decay on matrices only."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": training.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=training.learning_rate, betas=BETAS, fused=True)


def train(
    model: Any,
    optimizer: torch.optim.AdamW,
    tokens: np.ndarray,
    training: Training,
    options: argparse.Namespace,
    first: int,
) -> bool:
    """Run the steps from `first` on; False if time ran out before the last."""
    on_gpu = options.device != "cpu"
    loss_of = torch.compile(step_loss) if on_gpu else step_loss
    start = saved = time.monotonic()
    model.train()
    for step in range(first, training.steps):
        for group in optimizer.param_groups:
            group["lr"] = training.rate(step)
        with torch.autocast(options.device.partition(":")[0], torch.bfloat16, enabled=on_gpu or has_fast_bfloat16()):
            loss = loss_of(model, batch(tokens, training, step).to(options.device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % max(training.steps // 200, 1) == 0 or step + 1 == training.steps:
            log(options.out, step, loss.item(), training, time.monotonic() - start)
        now, last = time.monotonic(), step + 1 == training.steps
        if last or now - saved > options.save_seconds or now - start > options.max_seconds:
            save(options.out, model, optimizer, step + 1)
            saved = now
        if not last and now - start > options.max_seconds:
            return False
    return True


def has_fast_bfloat16() -> bool:
    """Whether the CPU multiplies in bfloat16 (4 times float32's speed there); emulated it is slower than float32."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def step_loss(model: Any, ids_BT: Tensor) -> Tensor:
    """Mean cross-entropy of the next token."""
    logits = model(input_ids=ids_BT[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), ids_BT[:, 1:].flatten())


def batch(tokens: np.ndarray, training: Training, step: int) -> Tensor:
    """[batch_size, seq_len + 1]: windows at random places, a function of seed and step."""
    if len(tokens) <= training.seq_len + 1:
        raise SystemExit(f"the text has {len(tokens)} tokens, a window takes {training.seq_len + 1}; give more text.")
    rng = np.random.default_rng((training.seed, step))
    starts = rng.integers(0, len(tokens) - training.seq_len - 1, training.batch_size)
    return torch.from_numpy(np.stack([tokens[i : i + training.seq_len + 1] for i in starts]).astype(np.int64))


@torch.no_grad()
def validate(model: Any, file: Path, seq_len: int) -> float:
    """Mean loss over the first windows of a text, in float32."""
    ids = AutoTokenizer.from_pretrained(TOKENIZER)(file.read_text(errors="replace"))["input_ids"]
    count = min(len(ids) // seq_len, VALIDATION_WINDOWS)
    if not count:
        raise SystemExit(f"{file} is shorter than one window of {seq_len} tokens.")
    windows = torch.tensor(ids[: count * seq_len]).view(count, seq_len).to(model.device)
    model.eval()
    return sum(step_loss(model, window[None]).item() for window in windows) / count


def save(out: Path, model: Any, optimizer: torch.optim.AdamW, step: int) -> None:
    """Weights and moments of AdamW in one safetensors file that appears only when it is complete."""
    tensors = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    for index, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": value for name, value in moments.items()}
    unfinished = out / f"{STATE}.unfinished"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, unfinished, metadata={"step": str(step)})
    unfinished.rename(out / STATE)


def restore(out: Path, model: Any, optimizer: torch.optim.AdamW) -> int:
    """Load what `save` wrote, if anything, and return the step to go on with."""
    if not (out / STATE).exists():
        (out / LOG).unlink(missing_ok=True)
        return 0
    state: dict[int, dict[str, Tensor]] = {}
    with safe_open(out / STATE, framework="pt") as file, torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(file.get_tensor(f"model.{name}"))
        for key in file.keys():  # noqa: SIM118, a safetensors file is no dictionary
            kind, index, name = key.split(".", 2)
            if kind == "optimizer":
                state.setdefault(int(index), {})[name] = file.get_tensor(key)
        step = int(file.metadata()["step"])
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    return step


def log(out: Path, step: int, loss: float, training: Training, seconds: float) -> None:
    """One line of the loss curve, for people and for the card."""
    seen = (step + 1) * training.batch_size * training.seq_len
    with (out / LOG).open("a") as file:
        file.write(
            json.dumps({"step": step, "tokens": seen, "loss": round(loss, 4), "seconds": round(seconds, 1)}) + "\n"
        )
    print(f"step {step + 1}/{training.steps}  {seen / 1e6:.2f} M tokens  loss {loss:.4f}  {seconds:.0f} s", flush=True)


def write_model(
    model: Any, options: argparse.Namespace, config: dict[str, Any], training: Training, losses: dict[str, float]
) -> None:
    """The model in bfloat16, its tokenizer and its card; the training state is removed.

    Its config states the length it was trained on, since rotary models fall apart beyond it.
    """
    if hasattr(model.config, "max_position_embeddings"):
        model.config.max_position_embeddings = training.seq_len
    model.to(torch.bfloat16).save_pretrained(options.out)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TOKENIZER / name, options.out / name)
    (options.out / "README.md").write_text(card(options, config, training, losses))
    (options.out / STATE).unlink()


def card(options: argparse.Namespace, config: dict[str, Any], training: Training, losses: dict[str, float]) -> str:
    """Data, tokens, loss curve, validation loss, seed, hardware."""
    lines = [json.loads(line) for line in (options.out / LOG).read_text().splitlines()]
    curve = lines[:: max(len(lines) // 20, 1)]
    hardware = torch.cuda.get_device_name() if options.device != "cpu" else f"CPU, {torch.get_num_threads()} threads"
    rows = "\n".join(f"| {line['tokens'] / 1e6:.1f} | {line['loss']:.3f} |" for line in curve)
    valid = "\n".join(f"| {name} | {loss:.4f} |" for name, loss in losses.items()) or "| (none) | |"
    seen = training.steps * training.batch_size * training.seq_len
    return f"""# {options.config}

{config["about"]}. Trained by the kvfold project with
`lab/pretrain.py --config {options.config}` on `{options.data.name}` (public-domain English books): {seen / 1e6:.1f} M tokens
in sequences of {training.seq_len}, batch {training.batch_size}, AdamW, peak learning rate {training.learning_rate}, seed
{training.seed}, on {hardware}. Tokenizer: byte-level BPE, 4,096 entries. Same licence as kvfold.

| validation text (first {VALIDATION_WINDOWS} windows of {training.seq_len} tokens) | loss, nats per token |
|---|---|
{valid}

| M tokens | training loss of one batch |
|---|---|
{rows}
"""


if __name__ == "__main__":
    main()

"""Checkpoint + tokens -> Statistics: streamed second moments, with one layer of the model in memory at a time."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from kvfold.architectures.base import Architecture, empty_model, source_config
from kvfold.attention import AttentionLayer
from kvfold.checkpoint import Checkpoint, read_json
from kvfold.linalg import Moment
from kvfold.progress import track
from kvfold.runtime.attention import apply_rotary
from kvfold.storage import make_folder, require_space, write_tensors, write_text

OBSERVED = "kvfold_observed"
"""Name under which attention that shows its queries, keys and values is registered with transformers."""

TOKENS_PER_BATCH = 4096
SECONDS_BETWEEN_SAVES = 60.0
"""How often the hidden states of all sequences are written, for an interrupted run to go on from."""

STATISTICS_VERSION = 1
"""To be raised when a statistic is computed differently, so that old ones on disk are not taken for new ones."""

FINISHED = "statistics.json"
HIDDEN = "hidden.safetensors"

Observer = Callable[[Tensor, Tensor, Tensor], None]


def _flat(x_BKTH: Tensor) -> Tensor:
    return x_BKTH.transpose(1, 2).flatten(2).flatten(0, 1)


def _unrotated(k_BKTH: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Keys before rotation. Rope scaling may also stretch cos and sin; that is undone as well."""
    stretch = cos.square() + sin.square()
    return apply_rotary(k_BKTH, cos / stretch, -sin / stretch)


STATISTICS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "keys": lambda q, k, v, cos, sin: _flat(k),
    "keys_before_rotation": lambda q, k, v, cos, sin: _flat(_unrotated(k, cos, sin)),
    "values": lambda q, k, v, cos, sin: _flat(v),
}
"""Statistic -> the vectors [tokens, K*H] whose moment it is, of rotated q [B, N, T, H], rotated k and v [B, K, T, H]."""


@dataclass(frozen=True)
class Statistics:
    """Moments of every layer, on disk in `folder`, read one layer at a time. `tokens` is how many went in."""

    folder: Path
    tokens: int

    def layer(self, index: int, needs: Iterable[str]) -> dict[str, Moment]:
        moments = {}
        with safe_open(_layer_file(self.folder, index), framework="pt") as file:
            for name in sorted(needs):
                mean, second = file.get_tensor(f"{name}.mean"), file.get_tensor(f"{name}.second")
                moments[name] = Moment(mean.clone(), second.clone(), self.tokens)
        return moments


def calibrate(
    checkpoint: Checkpoint,
    arch: Architecture,
    tokens_BT: Tensor,
    *,
    needs: frozenset[str],
    run_dir: Path,
    device: str = "cpu",
) -> Statistics:
    """Moments of all layers over the given sequences, in float64.

    They are kept in `run_dir` and reused whenever model and tokens are the same; an interrupted run continues where it
    last wrote its hidden states. Peak memory: the hidden states, one layer in float32 and its moments.
    """
    key = _key(checkpoint, tokens_BT)
    if (finished := _finished(run_dir, key, needs)) is not None:
        return Statistics(finished, tokens_BT.numel())
    folder = run_dir / f"statistics-{key}-{'+'.join(sorted(needs))}"
    make_folder(folder)
    config = source_config(arch, checkpoint.config)
    config._attn_implementation = _register_observed_attention()
    model = empty_model(arch, config)
    layers = arch.describe(model)
    moment_bytes = sum(8 * len(needs) * (layer.num_kv_heads * layer.head_dim) ** 2 for layer in layers)
    require_space(folder, moment_bytes + 4 * tokens_BT.numel() * layers[0].hidden_size)
    with torch.no_grad():
        resumed = _resume(folder)
        # masks and rotary tables are the same for every sequence: a resumed run needs one to make them again
        hidden_BTD, calls = _embed(model, checkpoint, arch, tokens_BT if resumed is None else tokens_BT[:1], device)
        first, hidden_BTD = resumed or (0, hidden_BTD)
        saved = time.monotonic()
        for layer in track(layers[first:], "calibrating layers", len(layers) - first):
            moments = _run_layer(model, checkpoint, arch, layer, hidden_BTD, calls[layer.index], needs, device)
            _save_moments(folder, layer.index, moments)
            if time.monotonic() - saved >= SECONDS_BETWEEN_SAVES:
                _save_hidden(folder, layer.index + 1, hidden_BTD)
                saved = time.monotonic()
    write_text(folder / FINISHED, json.dumps({"needs": sorted(needs), "tokens": tokens_BT.numel()}))
    (folder / HIDDEN).unlink(missing_ok=True)
    return Statistics(folder, tokens_BT.numel())


def _run_layer(
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    arch: Architecture,
    layer: AttentionLayer,
    hidden_BTD: Tensor,
    call: dict[str, Any],
    needs: frozenset[str],
    device: str,
) -> dict[str, Moment]:
    """Advance the hidden states by one layer, in place, and return the moments seen on the way."""
    module = model.get_submodule(arch.prefix(layer.index).rstrip("."))
    _load(module, arch.prefix(layer.index), checkpoint, device)
    moments = {name: Moment.zeros(layer.num_kv_heads * layer.head_dim, device) for name in sorted(needs)}
    cos, sin = call["position_embeddings"]

    def observe(q: Tensor, k: Tensor, v: Tensor) -> None:
        for name, moment in moments.items():
            moment.update(STATISTICS[name](q, k, v, cos, sin))

    rows = max(TOKENS_PER_BATCH // hidden_BTD.shape[1], 1)
    for part in hidden_BTD.split(rows):
        out = module(part.to(device), **call, kvfold_observer=observe)
        part.copy_(out[0] if isinstance(out, tuple) else out)
    module.to("meta")
    return moments


def _embed(
    model: PreTrainedModel, checkpoint: Checkpoint, arch: Architecture, tokens_BT: Tensor, device: str
) -> tuple[Tensor, list[dict[str, Any]]]:
    """Hidden states that enter the first layer [B, T, D], and the keyword arguments (masks, rotary tables) of every layer.

    The family's own forward computes them, with layers that only record. All sequences are full and equally long, so the
    arguments of one serve all.
    """
    base = model.base_model
    prefix = f"{model.base_model_prefix}."
    _load(base, prefix, checkpoint, device, skip=arch.layers.removeprefix(prefix) + ".")
    modules = list(model.get_submodule(arch.layers).children())
    hidden_BTD = torch.empty(*tokens_BT.shape, arch.describe(model)[0].hidden_size)
    calls: list[dict[str, Any]] = []
    row = 0

    def record(hidden_states: Tensor, **kwargs: Any) -> Tensor:
        if not calls:
            hidden_BTD[row] = hidden_states[0].cpu()
        calls.append(kwargs | {"past_key_values": None, "use_cache": False})
        return hidden_states

    for module in modules:
        module.forward = record
    for row in range(len(tokens_BT)):
        calls.clear()
        base(input_ids=tokens_BT[row : row + 1].to(device), use_cache=False)
    for module in modules:
        del module.forward
    model.to("meta")
    return hidden_BTD, calls


def _load(module: torch.nn.Module, prefix: str, checkpoint: Checkpoint, device: str, skip: str | None = None) -> None:
    """Give a module its weights, in float32. `skip`: parameters that stay on the meta device."""
    names = [name for name, _ in module.named_parameters() if skip is None or not name.startswith(skip)]
    state = {name: checkpoint.read(prefix + name).to(device, torch.float32) for name in names}
    module.load_state_dict(state, assign=True, strict=skip is None)


def _register_observed_attention() -> str:
    AttentionInterface.register(OBSERVED, _observed_attention)
    AttentionMaskInterface.register(OBSERVED, sdpa_mask)
    return OBSERVED


def _observed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *args: Any,
    kvfold_observer: Observer,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    kvfold_observer(query, key, value)
    return sdpa_attention_forward(module, query, key, value, *args, **kwargs)


def _key(checkpoint: Checkpoint, tokens_BT: Tensor) -> str:
    digest = hashlib.sha256(f"{STATISTICS_VERSION} {checkpoint.fingerprint()} {tuple(tokens_BT.shape)}".encode())
    digest.update(tokens_BT.to(torch.int64).numpy().tobytes())
    return digest.hexdigest()[:12]


def _finished(run_dir: Path, key: str, needs: frozenset[str]) -> Path | None:
    """The folder of an earlier run over the same model and tokens that gathered at least these statistics."""
    for file in sorted(run_dir.glob(f"statistics-{key}-*/{FINISHED}")):
        if needs <= set(read_json(file)["needs"]):
            return file.parent
    return None


def _layer_file(folder: Path, index: int) -> Path:
    return folder / f"layer-{index:05d}.safetensors"


def _save_moments(folder: Path, index: int, moments: dict[str, Moment]) -> None:
    tensors: dict[str, Tensor] = {}
    for name, moment in moments.items():
        tensors |= {f"{name}.mean": moment.mean_F.cpu(), f"{name}.second": moment.second_FF.cpu()}
    write_tensors(_layer_file(folder, index), tensors, {})


def _save_hidden(folder: Path, next_layer: int, hidden_BTD: Tensor) -> None:
    write_tensors(folder / HIDDEN, {"hidden": hidden_BTD}, {"next_layer": str(next_layer)})


def _resume(folder: Path) -> tuple[int, Tensor] | None:
    """The layer at which an interrupted run goes on, and the hidden states that enter it."""
    if not (folder / HIDDEN).exists():
        return None
    with safe_open(folder / HIDDEN, framework="pt") as file:
        return int(file.metadata()["next_layer"]), file.get_tensor("hidden").clone()

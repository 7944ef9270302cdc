"""What people bring that is no folder of safetensors, made into one once: GGUF files, pickles, adapters of a base model."""

from __future__ import annotations

import contextlib
import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from kvfold.checkpoint.atomic import copy_file, write_tensors, write_text
from kvfold.checkpoint.fingerprint import fingerprint
from kvfold.checkpoint.folder import MAX_SHARD_BYTES, new_folder
from kvfold.checkpoint.gguf import dequantize
from kvfold.checkpoint.reader import INDEX, SIDE_FILES, gguf_files, read_json, shards_of_index
from kvfold.checkpoint.tokenizer import load_tokenizer
from kvfold.errors import CheckpointError, one_line
from kvfold.progress import STDERR, without_bars

PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
ADAPTER = "adapter_config.json"


def converted(model: str | Path, run_dir: Path, *, allow_pickle: bool = False) -> str | Path:
    """What to read a model from: `model` itself, or a copy as a folder of safetensors, made in `run_dir` or found there.

    A folder without safetensors that holds one GGUF file stands for the file. Raises CheckpointError where it cannot be read,
    and on pickles unless they are allowed.
    """
    files = gguf_files(model)
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise CheckpointError(f"{model} holds {len(files)} GGUF files: {names}. Give one of them.")
    if files:
        return _once(run_dir, "dequantized", files[0], files, lambda folder: dequantize(files[0], folder))
    path = Path(model)
    if not path.is_dir():
        return model
    if (path / ADAPTER).exists() and not (path / "config.json").exists():
        base = Path(str(read_json(path / ADAPTER).get("base_model_name_or_path")))
        facts = [path / ADAPTER, *sorted(path.glob("adapter_model.*"))]
        facts += [*sorted(base.glob("*.safetensors")), base / "config.json"] if (base / "config.json").is_file() else []
        return _once(run_dir, "merged", path, facts, lambda folder: _merge(path, folder))
    pickles = pickled(path)
    if pickles and allow_pickle:
        return _once(run_dir, "unpickled", path, pickles, lambda folder: _unpickle(path, pickles, folder))
    return model


def pickled(path: Path) -> list[Path]:
    """The pickles that hold a folder's weights, where nothing else does."""
    if any(path.glob("*.safetensors")):
        return []
    if (path / PICKLE_INDEX).exists():
        return [path / name for name in sorted(set(shards_of_index(path, PICKLE_INDEX).values()))]
    return [path / PICKLE] if (path / PICKLE).exists() else []


def _once(run_dir: Path, kind: str, what: Path, files: list[Path], make: Callable[[Path], None]) -> Path:
    key = fingerprint(file=files[0]) if len(files) == 1 else fingerprint(**{file.name: file for file in files})
    folder = run_dir / f"{kind}-{key[:12]}"
    if folder.exists():
        _say(f"{what} was {kind} before: {folder}")
    else:
        _say(f"{what} is being {kind} into {folder}")
        make(folder)
    return folder


def _say(text: str) -> None:
    STDERR.print(text, markup=False, highlight=False, soft_wrap=True)


def _unpickle(path: Path, pickles: list[Path], folder: Path) -> None:
    """Tensors only: torch's unpickler for weights makes nothing else."""
    with new_folder(folder, fingerprint(pickles=[file.name for file in pickles]), overwrite=False) as partial:
        weight_map: dict[str, str] = {}
        for number, file in enumerate(pickles):
            shard = (
                "model.safetensors"
                if len(pickles) == 1
                else f"model-{number + 1:05d}-of-{len(pickles):05d}.safetensors"
            )
            tensors = unpickled(file)
            write_tensors(partial / shard, tensors, {"format": "pt"})
            weight_map |= dict.fromkeys(tensors, shard)
        if len(pickles) > 1:
            write_text(partial / INDEX, json.dumps({"metadata": {}, "weight_map": weight_map}, indent=1))
        for pattern in ("config.json", *SIDE_FILES):
            for one in filter(Path.is_file, path.glob(pattern)):
                copy_file(one, partial / one.name)


def unpickled(file: Path) -> dict[str, Tensor]:
    """Tensors by name, by torch's unpickler for weights. Raises CheckpointError."""
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # whatever a broken or hostile file makes of the unpickler
        raise CheckpointError(
            f"{file} is no file of weights that torch loads without running code ({one_line(error)})."
        ) from error
    if not isinstance(state, dict) or not all(isinstance(x, Tensor) for x in state.values()):
        raise CheckpointError(f"{file} holds other things than named tensors; save the model's state_dict().")
    return {name: tensor.contiguous().clone() for name, tensor in state.items()}  # tied ones share memory


def _merge(path: Path, folder: Path) -> None:
    """The base model that the adapter names, with the adapter in its weights."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = read_json(path / ADAPTER).get("base_model_name_or_path")
    if not base:
        raise CheckpointError(f"{path / ADAPTER} names no base_model_name_or_path; merge the adapter yourself.")
    try:
        with without_bars():
            model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
            merged = PeftModel.from_pretrained(model, path).merge_and_unload(safe_merge=True)
    except Exception as error:  # whatever transformers or peft find wrong with either
        raise CheckpointError(
            f"{path} is an adapter of {base}, and both together cannot be loaded ({one_line(error)})."
            " Merge it yourself (merge_and_unload, then save_pretrained)."
        ) from error
    with new_folder(folder, fingerprint(adapter=path / ADAPTER), overwrite=False) as partial:
        merged.save_pretrained(partial, max_shard_size=MAX_SHARD_BYTES)
        with contextlib.suppress(CheckpointError):  # without one, commands that need it say so
            load_tokenizer(path if any(path.glob("tokenizer*")) else base).save_pretrained(partial)

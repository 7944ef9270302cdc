"""GGUF files as models: dequantized into an ordinary model folder, with which everything else goes on."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel

from kvfold.architectures.base import all_architectures
from kvfold.checkpoint.atomic import make_folder, require_space
from kvfold.checkpoint.fingerprint import fingerprint
from kvfold.checkpoint.folder import MAX_SHARD_BYTES, new_folder, write_files, write_weights
from kvfold.errors import CheckpointError, one_line
from kvfold.progress import without_bars

UNQUANTIZED = {"F32": torch.float32, "F16": torch.float16}
OUTPUT = "output.weight"
"""What GGUF calls the output embedding; a copy of the input's in some files of models that tie them."""


def dequantize(file: Path, folder: Path) -> None:
    """Write the new model folder `folder`, with tokenizer: unquantized numbers as they are, quantized ones as bfloat16.

    It appears under its name only when it is complete. Raises CheckpointError on a file of an architecture that kvfold or
    transformers' GGUF reader does not know, and on one of which that reader would leave out a part.
    """
    reader = _open(file)
    _check_architecture(file, reader)
    _check_rotation(file, reader)
    model, tokenizer = _load(file, _dtype(reader))
    tied = set(model._tied_weights_keys or {}) if model.config.tie_word_embeddings else set()
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    _check_numbers(file, reader, tensors, bool(tied))
    make_folder(folder.parent)
    require_space(folder.parent, sum(t.numel() * t.element_size() for t in tensors.values()))
    shards = split_torch_state_dict_into_shards(tensors, max_shard_size=MAX_SHARD_BYTES).tensor_to_filename
    with new_folder(folder, _identity(file), overwrite=False) as partial:
        write_weights(partial, shards, lambda names: {name: tensors[name].contiguous() for name in names})
        write_files(partial, {"config.json": _config(model)}, beside=None)
        tokenizer.save_pretrained(partial)


def _identity(file: Path) -> str:
    return fingerprint(file=file)


def _open(file: Path) -> Any:
    """The `gguf` package's reader: facts, and tensors that are not read yet."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise CheckpointError(
            f"{file} is a GGUF file; reading it needs the gguf package ({error}): pip install 'kvfold[gguf]'"
        ) from error
    try:
        reader = GGUFReader(file)
    except (ValueError, IndexError, KeyError, OSError) as error:
        raise CheckpointError(f"{file} is not a GGUF file or is cut off ({error}). Download it again.") from error
    if (parts := _fact(reader, "split.count") or 1) > 1:
        raise CheckpointError(f"{file} is one of {parts} parts; join them first (llama-gguf-split --merge).")
    return reader


def _fact(reader: Any, name: str) -> Any:
    field = reader.get_field(name)
    return None if field is None else field.contents()


def _check_architecture(file: Path, reader: Any) -> None:
    """Before the long work."""
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    families = [arch.model_type for arch in all_architectures() if arch.in_gguf]
    try:
        known = AutoConfig.from_pretrained(file.parent, gguf_file=file.name).model_type in families
    except (ValueError, KeyError):  # transformers' reader does not know it
        known = False
    if not known:
        readable = [
            name for name in GGUF_SUPPORTED_ARCHITECTURES if any(family.startswith(name) for family in families)
        ]
        raise CheckpointError(
            f"{file} holds a model of architecture {_fact(reader, 'general.architecture')!r}. From GGUF files these can be"
            f" read: {', '.join(sorted(readable))}. For others give the model's folder of safetensors."
        )


def _check_rotation(file: Path, reader: Any) -> None:
    scaling = _fact(reader, f"{_fact(reader, 'general.architecture')}.rope.scaling.type") or "none"
    if scaling != "none":
        raise CheckpointError(_left_out(file, f"a {scaling} scaling of rotary positions"))


def _check_numbers(file: Path, reader: Any, tensors: dict[str, Tensor], tied: bool) -> None:
    """transformers' reader passes over what it has no name for, such as factors of rotation and some biases."""
    stored = sum(int(t.n_elements) for t in reader.tensors if not (tied and t.name == OUTPUT))
    taken = sum(tensor.numel() for tensor in tensors.values())
    if stored != taken:
        raise CheckpointError(_left_out(file, f"{stored} numbers, {stored - taken:+} of those of the model,"))


def _left_out(file: Path, what: str) -> str:
    return (
        f"{file} holds {what} that transformers' GGUF reader does not carry over, so that another model would come out. Give"
        " the model's folder of safetensors instead."
    )


def _dtype(reader: Any) -> torch.dtype:
    """That of most numbers where they are not quantized, else bfloat16."""
    elements: Counter[str] = Counter()
    for tensor in reader.tensors:
        elements[tensor.tensor_type.name] += int(tensor.n_elements)
    return UNQUANTIZED.get(max(elements, key=lambda name: elements[name], default=""), torch.bfloat16)


def _load(file: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, Any]:
    options = {"dtype": dtype, "quantization_config": GgufConfig(dequantize=True), "output_loading_info": True}
    try:
        with without_bars():
            model, found = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, **options)
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except Exception as error:  # whatever fails inside transformers' reader
        raise CheckpointError(
            f"{file}: transformers cannot load it ({one_line(error)}). Give the model's folder of safetensors instead."
        ) from error
    if missing := sorted(found["missing_keys"]):
        raise CheckpointError(f"{file} lacks {len(missing)} tensors of its model, for example {missing[0]}.")
    return model, tokenizer


def _config(model: PreTrainedModel) -> dict[str, Any]:
    """config.json of the plain model: what was loaded calls itself quantized, and names a folder of this machine."""
    config = model.config.to_diff_dict()
    for name in ("quantization_config", "_model_name_or_path", "_name_or_path"):
        config.pop(name, None)
    return config | {"architectures": [type(model).__name__]}

"""Reading a Hugging Face model folder tensor by tensor, with every fault named before it can do harm."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kvfold.checkpoint.quantized import Quantized, quantized
from kvfold.errors import CheckpointError
from kvfold.plan.cache_spec import ITEMSIZE

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SIDE_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "*.tiktoken",
    "tekken.json", "preprocessor_config.json", "processor_config.json", "chat_template*",
    "generation_config.json", "LICENSE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip
HUB_FILES = ("*.safetensors", "*.safetensors.index.json", "config.json", *SIDE_FILES)
HUB_NOT = ("consolidated*", "*/*")
MAX_HEADER_BYTES = 100_000_000
MOST_LETTERS = 200
"""Of a weight file's path."""


DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""Names of floating-point types in safetensors headers, and in config.json."""


class StoredTensor(NamedTuple):
    """Where a tensor lies (`name` is its name there), and what its shard's header says of it."""

    name: str
    shard: str
    dtype: str
    nbytes: int
    shape: tuple[int, ...]

    @property
    def itemsize(self) -> int:
        """Bytes per number, for floating-point types that kvfold folds; 1 for others."""
        return ITEMSIZE.get(DTYPES.get(self.dtype, ""), 1)


@dataclass(frozen=True)
class Checkpoint:
    """A model folder whose files have been checked: its config, and what its weight files hold.

    `aliases`: names under which a tensor that is stored under another name (a tied embedding) may be read as well. `stacks`:
    names under which several may be read as one: of each entry the rows of its parts. `packed`: quantized matrices.
    """

    path: Path
    config: dict[str, Any]
    tensors: dict[str, StoredTensor]
    aliases: dict[str, str] = field(default_factory=dict)
    stacks: dict[str, list[tuple[str, ...]]] = field(default_factory=dict)
    packed: dict[str, Quantized] = field(default_factory=dict)

    @classmethod
    def open(cls, model: str | Path) -> Checkpoint:
        """A local folder, or a model id on the hub. Raises CheckpointError on anything missing, truncated or foreign."""
        path = locate(model)
        config = read_json(path / "config.json")
        if (path / "adapter_config.json").exists():
            raise CheckpointError(
                f"{path} holds a PEFT adapter beside the model; merge it first (merge_and_unload, then save_pretrained)."
            )
        shard_of = _shard_of(path)
        tensors: dict[str, StoredTensor] = {}
        for shard in sorted(set(shard_of.values())):
            tensors.update(_read_header(path, shard))
        if missing := sorted(set(shard_of) - set(tensors)):
            raise CheckpointError(
                f"{path / INDEX} names {len(missing)} tensors that their shards do not hold, for example {missing[0]} in"
                f" {shard_of[missing[0]]}. Download the folder again."
            )
        return cls(path, config, tensors, packed=quantized(config, tensors))

    def read(self, name: str) -> Tensor:
        """One tensor in its own dtype, in memory of its own; of a quantized matrix what its codes mean. Raises
        CheckpointError if it is missing or holds NaN."""
        if name in self.packed:
            return self.packed[name].numbers(self.raw, self.tensors, self.config["quantization_config"])
        if name in self.stacks:
            return torch.stack([torch.cat([self.read(part) for part in parts]) for parts in self.stacks[name]])
        return self.read(self.aliases[name]) if name in self.aliases else self.raw(name)

    def raw(self, name: str) -> Tensor:
        """One tensor as it is stored."""
        if name not in self.tensors:
            raise CheckpointError(
                f"{self.path} has no tensor {name!r}; it holds {len(self.tensors)}, for example"
                f" {sorted(self.tensors)[0]!r}. Is config.json that of another model?"
            )
        stored = self.tensors[name]
        shard = self.path / stored.shard
        try:
            # Opened anew for each tensor: a mapping that stays open keeps every page it touched in resident memory.
            with safe_open(shard, framework="pt") as file:
                tensor = file.get_tensor(stored.name).clone()
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{shard} cannot be read at tensor {name!r}: {error}. Download it again.") from error
        if stored.dtype in DTYPES and not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            raise CheckpointError(
                f"{shard}: tensor {name!r} holds {bad} NaN or infinite numbers of {tensor.numel()}."
                " The checkpoint is damaged or diverged in training; use an intact one."
            )
        return tensor

    def fingerprint(self) -> str:
        """A short hash of config, headers and the weight files' sizes and times: says whether statistics still fit."""
        digest = hashlib.sha256(json.dumps([self.config, self.tensors], sort_keys=True).encode())
        for shard in sorted({stored.shard for stored in self.tensors.values()}):
            status = (self.path / shard).stat()
            digest.update(f"{shard} {status.st_size} {status.st_mtime_ns}".encode())
        return digest.hexdigest()[:16]

    def side_files(self) -> Iterator[Path]:
        """Everything beside weights and config that belongs to the model: tokenizer, generation config, chat template."""
        for file in sorted(self.path.iterdir()):
            if file.is_file() and any(fnmatch.fnmatch(file.name, pattern) for pattern in SIDE_FILES):
                yield file


def gguf_files(model: str | Path) -> list[Path]:
    """The GGUF files that a model consists of: itself, or what a folder without safetensors holds of them."""
    path = Path(model)
    if path.is_dir() and not any(path.glob("*.safetensors")):
        return sorted(path.glob("*.gguf"))
    return [path] if path.is_file() and path.suffix == ".gguf" else []


def is_model_id(model: str | Path) -> bool:
    """Whether this is a name on the hub, and no folder or file."""
    return not Path(model).exists() and not str(model).startswith((".", "/", "~")) and str(model).count("/") <= 1


def locate(model: str | Path, *, pickles: bool = False) -> Path:
    """The local folder of a model: itself, or the hub's snapshot, with its pickles if they are wanted. Raises CheckpointError
    if there is neither."""
    path = Path(model)
    if files := gguf_files(model):
        raise CheckpointError(
            f"{files[0]} is a GGUF file, which only `kvfold compress` reads. Compress it; what it was dequantized into is"
            " then the folder dequantized-* in the run folder, and can be given here."
        )
    if path.is_dir():
        return path
    if not is_model_id(model):
        raise CheckpointError(
            f"{model} is not a folder; give a model folder with config.json and *.safetensors, or a GGUF file to compress."
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        wanted = [*HUB_FILES, *(["pytorch_model*.bin"] if pickles else [])]
        return Path(snapshot_download(str(model), allow_patterns=wanted, ignore_patterns=list(HUB_NOT)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{model} is neither a local folder nor a model that the hub would give: {error}"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises CheckpointError that names the file."""
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.parent} has no {path.name}; give a Hugging Face model folder.") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {str(error)[:200]}. Download it again.") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds a {type(data).__name__} where a JSON object was expected.")
    return data


def _shard_of(path: Path) -> dict[str, str]:
    if (path / SINGLE).exists():  # transformers, too, prefers it to an index
        return dict.fromkeys(_read_header(path, SINGLE), SINGLE)
    if (path / INDEX).exists():
        return shards_of_index(path)
    pickles = sorted(p.name for p in path.glob("*.bin"))
    hint = f" It has {pickles[0]}: kvfold compress --allow-pickle reads pickles (weights only)." if pickles else ""
    raise CheckpointError(f"{path} has neither {SINGLE} nor {INDEX}.{hint}")


def shards_of_index(path: Path, index: str = INDEX) -> dict[str, str]:
    """Of an index: the file of every tensor, inside the folder. Raises CheckpointError where it names what is not there."""
    shard_of = read_json(path / index).get("weight_map")
    pairs = shard_of.items() if isinstance(shard_of, dict) else [("weight_map", shard_of)]
    wrong = [f"{name}: {shard!r}" for name, shard in pairs if not (isinstance(shard, str) and _is_inside(shard))]
    if wrong or not isinstance(shard_of, dict) or not shard_of:
        raise CheckpointError(
            f"{path / index} names {len(wrong)} things that are no file of its folder, for example {wrong[:1]}; download it"
            " again."
        )
    if missing := sorted(s for s in set(shard_of.values()) if not (path / s).is_file()):
        raise CheckpointError(f"{path} lacks the weight file {missing[0]} that {index} names; download it again.")
    return shard_of


def _is_inside(shard: str) -> bool:
    """Whether a path leads into the folder that it is given for."""
    named = bool(shard) and "\0" not in shard and len(shard) <= MOST_LETTERS
    return named and not PurePosixPath(shard).is_absolute() and ".." not in PurePosixPath(shard).parts


def _read_header(path: Path, name_of_shard: str) -> dict[str, StoredTensor]:
    """What a shard's header promises, after checking that the file is as long as the header says."""
    shard = path / name_of_shard
    actual = shard.stat().st_size
    try:
        with shard.open("rb") as file:
            (header_size,) = struct.unpack("<Q", file.read(8))
            if header_size > min(actual, MAX_HEADER_BYTES):
                raise ValueError(f"a header of {header_size} bytes")
            header = json.loads(file.read(header_size))
        header.pop("__metadata__", None)
        spans = {name: entry["data_offsets"] for name, entry in header.items()}
        tensors = {
            name: StoredTensor(name, name_of_shard, header[name]["dtype"], end - start, tuple(header[name]["shape"]))
            for name, (start, end) in spans.items()
        }
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{shard} is not a safetensors file or is cut off ({str(error)[:200]}). Download it again."
        ) from error
    expected = 8 + header_size + max((end for _, end in spans.values()), default=0)
    if actual != expected:
        raise CheckpointError(f"{shard} has {actual} bytes where its header promises {expected}; download it again.")
    try:
        with safe_open(shard, framework="pt"):  # which looks whether spans, shapes and types agree
            return tensors
    except SafetensorError as error:
        raise CheckpointError(f"{shard} is damaged: {error}. Download it again.") from error

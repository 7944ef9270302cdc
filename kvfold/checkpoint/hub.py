"""What is known of a model on the hub without its weights: config.json, and the headers of its files."""

from __future__ import annotations

from pathlib import Path

from kvfold.checkpoint.reader import Checkpoint, StoredTensor, is_model_id, read_json
from kvfold.errors import CheckpointError


def headers(model: str | Path) -> Checkpoint:
    """A checkpoint of which nothing can be read: a local folder, or a model id, whose weights stay where they are."""
    if not is_model_id(model):
        return Checkpoint.open(model)
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        NotASafetensorsRepoError,
    )

    try:
        config = Path(hf_hub_download(str(model), "config.json"))
        files = HfApi().get_safetensors_metadata(str(model)).files_metadata
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, NotASafetensorsRepoError, OSError) as error:
        raise CheckpointError(
            f"{model} is neither a local folder nor a model of which the hub gives config.json and headers of safetensors:"
            f" {error}"
        ) from error
    tensors = {
        name: StoredTensor(name, file, x.dtype, x.data_offsets[1] - x.data_offsets[0], tuple(x.shape))
        for file, metadata in files.items()
        for name, x in metadata.tensors.items()
    }
    return Checkpoint(config.parent, read_json(config), tensors)

"""The tokenizer of a model folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvfold.errors import CheckpointError, one_line


def load_tokenizer(path: str | Path) -> Any:
    """The tokenizer of a model folder. Raises CheckpointError where it is missing."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path)
    except Exception as error:  # transformers raises whatever the missing file's loader raised
        files = sorted(p.name for p in Path(path).iterdir()) if Path(path).is_dir() else []
        raise CheckpointError(
            f"{path} has no tokenizer that transformers can load ({one_line(error, 160)})."
            f" It holds {files}. Copy tokenizer.json and tokenizer_config.json of the model into it."
        ) from error

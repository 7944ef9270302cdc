"""A folded folder to the hub, with a card that says what it came from and what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from kvfold.checkpoint.atomic import write_text
from kvfold.checkpoint.reader import is_model_id, read_json
from kvfold.errors import CheckpointError, OutputError, one_line
from kvfold.plan.naming import CONFIG_KEY

NOT_UPLOADED = ["*.unfinished", "fold.txt", ".cache/*"]


def push(
    folder: str | Path,
    repo: str,
    *,
    base_model: str | None = None,
    license: str | None = None,
    measured: str | None = None,
    private: bool = False,
) -> str:
    """Upload a folder that kvfold wrote; returns the address. The card in the folder gets what is given here and its repo's
    name, unless the upload fails.

    base_model: the original's id on the hub, where the folder was made from a local copy. measured: a table, in Markdown.
    Raises CheckpointError where the folder is none of kvfold's, OutputError where the hub refuses.
    """
    path = Path(folder)
    if CONFIG_KEY not in read_json(path / "config.json"):
        raise CheckpointError(f"{folder} is not a folded model; make one with `kvfold compress`.")
    card = path / "README.md"
    before = card.read_text()
    after = updated_card(before, repo, base_model=base_model, license=license, measured=measured)
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        write_text(card, after)
        done = api.upload_folder(repo_id=repo, folder_path=path, ignore_patterns=NOT_UPLOADED)
    except BaseException as error:  # what the hub's library raises depends on its version
        write_text(card, before)
        if not isinstance(error, Exception):
            raise
        raise OutputError(
            f"the hub did not take {folder} as {repo}: {one_line(error, 300)}. `hf auth login` signs in; then"
            " the same command goes on where it was."
        ) from error
    return str(getattr(done, "commit_url", done))


USES = ('from_pretrained("{}")', "kvfold evaluate {} ", "serve {}")
"""Where a card names its folder; its name may be a word of the text."""
BEGIN, END = "<!-- measured -->", "<!-- /measured -->"


def updated_card(text: str, repo: str, *, base_model: str | None, license: str | None, measured: str | None) -> str:
    """The same card for this repo. A base model that is a path on this machine is left out of its metadata."""
    card = ModelCard(text)
    facts: Any = card.data
    named = (base for base in (base_model, facts.base_model) if base and is_model_id(base))
    facts.base_model = next(named, None)  # a local copy of the original does not hide its id
    facts.license = license or facts.license
    body = renamed(card.text, repo).replace(f"\nout: {_folder_in(card.text)}\n", f"\nout: {repo}\n")
    if measured:
        before, found, after = body.partition(BEGIN)
        before, after = (before, after.partition(END)[2]) if found else _around_quality(body)
        body = f"{before}{BEGIN}\n\n{measured.strip()}\n\n{END}{after}"
    return f"---\n{facts.to_yaml()}\n---\n{body}"


def renamed(text: str, name: str, *, title: str | None = None) -> str:
    """A card whose commands name another folder or repo, perhaps under another title."""
    if folder := _folder_in(text):
        for use in USES:
            text = text.replace(use.format(folder), use.format(name))
        if title:
            text = text.replace(f"\n# {Path(folder).name}\n", f"\n# {title}\n", 1)
    return text


def _around_quality(body: str) -> tuple[str, str]:
    """What stands before and behind the paragraph that says that quality was not measured."""
    before, found, after = body.partition("Quality is not stated here")
    return (before, "\n\n" + after.partition("\n\n")[2]) if found else (body + "\n", "\n")


def _folder_in(body: str) -> str:
    """The folder that the card says to load."""
    return body.partition('AutoModelForCausalLM.from_pretrained("')[2].partition('"')[0]

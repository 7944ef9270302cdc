"""What leaves this machine: folders that load where nobody imports kvfold, headers of the hub, uploads."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError
from tiny import load, logits, make_tiny, save_tiny, tokens
from typer.testing import CliRunner

import kvfold
from kvfold.checkpoint.push import push, updated_card
from kvfold.checkpoint.remote_code import FILE
from kvfold.cli.main import app
from kvfold.compression.recipe import make_recipe
from kvfold.errors import CheckpointError, OutputError
from kvfold.evaluation.demo import MODEL
from kvfold.evaluation.memory import capacity


@pytest.fixture(scope="module")
def folded(tmp_path_factory):
    root = tmp_path_factory.mktemp("sharing")
    source = save_tiny(make_tiny("llama_mha"), root / "source")
    return kvfold.compress(
        make_recipe({"model": str(source), "out": str(root / "out"), "preset": "int4"}), device="cpu"
    ).out


REMOTE = """
import sys
class Absent:
    def find_spec(self, name, *_):
        if name.startswith("kvfold"):
            raise ModuleNotFoundError(f"No module named {name!r}")

if sys.argv[3] == "absent":
    sys.meta_path.insert(0, Absent())
import torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
model.save_pretrained(sys.argv[2])
with torch.no_grad():
    torch.save(model(torch.load(sys.argv[2] + "/ids.pt")).logits, sys.argv[2] + "/logits.pt")
"""


def test_folders_load_where_nobody_imports_kvfold(folded, tmp_path):
    """And what is saved from there does again; where kvfold is missing it is named."""
    expected, first = logits(load(folded), tokens()), folded
    for name in ("a", "b"):
        out = tmp_path / name
        out.mkdir()
        torch.save(tokens(), out / "ids.pt")
        command = [sys.executable, "-c", REMOTE, str(first), str(out), "here"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        assert torch.equal(torch.load(out / "logits.pt"), expected) and (out / FILE).exists()
        assert not list(out.glob("modeling.py"))
        first = out
    done = subprocess.run([*command[:-1], "absent"], capture_output=True, text=True)
    assert done.returncode and "pip install kvfold" in done.stderr


class Hub:
    """A stand-in for the hub's client that keeps what it gets in a folder."""

    def __init__(self, root, fault=None):
        self.root, self.fault = root, fault

    def create_repo(self, repo, *, private, exist_ok):
        (self.root / repo).mkdir(parents=True, exist_ok=exist_ok)

    def upload_folder(self, *, repo_id, folder_path, ignore_patterns):
        if self.fault:
            raise self.fault
        ignore = shutil.ignore_patterns(*ignore_patterns)
        shutil.copytree(folder_path, self.root / repo_id, dirs_exist_ok=True, ignore=ignore)
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")

    def get_safetensors_metadata(self, model):
        file = parse_local(self.root / model / "model.safetensors")
        return SimpleNamespace(files_metadata={"model.safetensors": file})


def parse_local(path):
    header = json.loads(path.read_bytes()[8:][: int.from_bytes(path.read_bytes()[:8], "little")])
    header.pop("__metadata__", None)
    kinds = {
        n: SimpleNamespace(dtype=e["dtype"], data_offsets=e["data_offsets"], shape=e["shape"])
        for n, e in header.items()
    }
    return SimpleNamespace(tensors=kinds)


def test_push_writes_the_card_and_uploads(folded, tmp_path, monkeypatch):
    """The card names the original, the licence and what was measured; pushed again it is the same."""
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: Hub(tmp_path))
    own = tmp_path / "own"
    shutil.copytree(folded, own)
    for _ in range(2):
        address = push(
            own, "me/model", base_model="they/original", license="apache-2.0", measured="| KL |\n|---|\n| 0.1 |"
        )
    assert address == "https://hub/me/model/commit/1"
    card = ModelCard((tmp_path / "me" / "model" / "README.md").read_text())
    assert (card.data.base_model, card.data.license, card.data.library_name) == (
        "they/original",
        "apache-2.0",
        "transformers",
    )
    assert (
        'from_pretrained("me/model")' in card.text and str(folded) not in card.text and card.text.count("| 0.1 |") == 1
    )
    assert "was not measured" not in card.text and "## Load" in card.text
    again = load(tmp_path / "me" / "model")
    assert torch.equal(logits(again, tokens()), logits(load(folded), tokens()))


def test_push_without_anything_said(folded, tmp_path, monkeypatch):
    """A base model that is a folder of this machine is not named."""
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: Hub(tmp_path))
    own = tmp_path / "own"
    shutil.copytree(folded, own)
    push(own, "model")
    card = ModelCard((tmp_path / "model" / "README.md").read_text())
    assert card.data.base_model is None and "was not measured" in card.text


def test_a_local_copy_of_the_original_does_not_hide_its_id():
    text = "---\nbase_model: they/original\n---\nbody"
    for given, named in (("./copy", "they/original"), ("we/other", "we/other"), (None, "they/original")):
        card = updated_card(text, "me/model", base_model=given, license=None, measured=None)
        assert ModelCard(card).data.base_model == named


def test_saving_to_the_hub_uploads_what_loads_the_folder(folded, tmp_path, monkeypatch):
    """transformers uploads before its save_pretrained returns."""
    sent = []
    api = SimpleNamespace(
        create_repo=lambda repo_id, **rest: SimpleNamespace(repo_id=repo_id),
        create_commit=lambda operations, **rest: sent.extend(operation.path_in_repo for operation in operations),
    )
    monkeypatch.setattr("transformers.utils.hub._hf_api", api)
    card = SimpleNamespace(save=lambda path: Path(path).write_text("card"))
    monkeypatch.setattr("transformers.modeling_utils.create_and_tag_model_card", lambda *args, **rest: card)
    load(folded).save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id="me/model")
    assert {"modeling_kvfold.py", "config.json", "model.safetensors"} <= set(sent)


def test_push_measures(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: Hub(tmp_path))
    text = tmp_path / "text.txt"
    text.write_text("It was the best of times, it was the worst of times. " * 200)
    folder = tmp_path / "out"
    kvfold.compress(make_recipe({"model": str(MODEL), "out": str(folder), "preset": "int4"}), device="cpu")
    options = ["--against", str(MODEL), "--data", str(text), "--max-tokens", "400"]
    done = CliRunner().invoke(app, ["push", str(folder), "me/model", *options])
    assert done.exit_code == 0, done.output
    found = json.loads(done.output.strip().splitlines()[-1])
    card = (tmp_path / "me" / "model" / "README.md").read_text()
    assert f"KL {found['measured']['kl']:.5f} nats per token" in card and "On text.txt: loss change" in card


FAULTS = {
    "401 Unauthorized": HfHubHTTPError("401 Unauthorized", response=SimpleNamespace(headers={}, request=None)),
    "Name or service not known": type("ConnectError", (Exception,), {})("[Errno -2] Name or service not known"),
}


@pytest.mark.parametrize("said", FAULTS)
def test_what_the_hub_does_not_take(folded, tmp_path, monkeypatch, said):
    """The card stays as it was."""
    fault = FAULTS[said]
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: Hub(tmp_path, fault))
    own = tmp_path / "own"
    shutil.copytree(folded, own)
    with pytest.raises(OutputError, match=rf"the hub did not take .*{said}.*hf auth login"):
        push(own, "me/model")
    assert (own / "README.md").read_text() == (folded / "README.md").read_text()
    with pytest.raises(CheckpointError, match="is not a folded model"):
        push(folded.parent / "source", "me/model")


def test_inspect_fetches_no_weights(folded, tmp_path, monkeypatch):
    """Of a model on the hub config.json and headers say everything."""
    source = folded.parent / "source"
    shutil.copytree(source, tmp_path / "me" / "stock")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: Hub(tmp_path))
    given = []

    def config_only(model, file):
        given.append(file)
        return str(tmp_path / model / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", config_only)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("weights were fetched"))
    found, local = kvfold.inspect("me/stock"), kvfold.inspect(source)
    assert found.plan == local.plan and set(given) == {"config.json"}
    assert capacity("me/stock", memory=10**9, context=1024) == capacity(source, memory=10**9, context=1024)

"""A folder that looks finished is finished, and `kvfold inspect --verify` sees what was lost or changed since."""

import json
import shutil

import pytest
from tiny import load, make_tiny, save_tiny
from typer.testing import CliRunner

import kvfold
from kvfold.checkpoint.manifest import FILE, check_files, sha256
from kvfold.cli.main import app
from kvfold.errors import CheckpointError


@pytest.fixture
def folder(tmp_path):
    source = save_tiny(make_tiny("llama_mha"), tmp_path / "source")
    return kvfold.compress({"model": str(source), "out": str(tmp_path / "out"), "preset": "int8"}, device="cpu").out


def test_every_file_is_in_it(folder):
    files = json.loads((folder / FILE).read_text())["files"]
    assert {*files, FILE, "README.md"} == {file.name for file in folder.iterdir()}
    assert all(sha256(folder / name) == facts["sha256"] for name, facts in files.items())
    check_files(folder)
    (folder / "README.md").write_text("of my own")
    check_files(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "modeling_kvfold.py", "recipe.yaml"])
def test_what_is_lost_cut_or_changed_is_named(folder, name):
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[:-1])
    with pytest.raises(CheckpointError, match=f"{name} has {len(whole) - 1:,} bytes instead of {len(whole)}"):
        check_files(folder)
    (folder / name).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=f"{name} has other bytes"):
        check_files(folder)
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        check_files(folder)


def test_a_manifest_leads_nowhere_else(folder, tmp_path):
    """Names in it are names of files in the folder."""
    manifest = json.loads((folder / FILE).read_text())
    (tmp_path / "secret").write_text("x")
    manifest["files"] = {"../secret": {"size": 1, "sha256": sha256(tmp_path / "secret")}}
    (folder / FILE).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="secret is missing"):
        check_files(folder)


def test_the_command(folder):
    done = CliRunner().invoke(app, ["inspect", str(folder), "--verify"])
    assert done.exit_code == 0 and json.loads(done.stdout.splitlines()[-1])["verified"] is True
    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    done = CliRunner().invoke(app, ["inspect", str(folder), "--verify"])
    assert isinstance(done.exception, CheckpointError)


def test_folders_without_one_say_so(folder, tmp_path):
    """What transformers saves of a folded model has none."""
    load(folder).save_pretrained(tmp_path / "saved")
    with pytest.raises(CheckpointError, match="has no kvfold_manifest.json"):
        check_files(tmp_path / "saved")


def test_copies_are_checked_where_they_are(folder, tmp_path):
    check_files(shutil.copytree(folder, tmp_path / "copy"))

"""Whatever stands in plans, recipes, configs, indices and headers: our named errors or a result, soon, in little memory."""

import json
import os
import resource
import shutil
import struct
import warnings
from pathlib import Path

import pytest
from hostile import mutated
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from tiny import make_tiny, save_tiny

import kvfold
from kvfold.checkpoint.source import open_source
from kvfold.compression.recipe import load_recipe, make_recipe
from kvfold.errors import KvfoldError
from kvfold.plan.plan import CachePlan

SECONDS, MEGABYTES = 20, 500
MANY = pytest.mark.parametrize(
    "many", [False, pytest.param(True, marks=[pytest.mark.rare, pytest.mark.long])], ids=["", "many"]
)
"""A tenth by default, always the same; with --rest others each time."""
FOLDS = (
    {"preset": "auto", "kv_budget": 0.25},
    {"preset": "int4"},
    {"preset": "svd_a", "kv_budget": 0.5},
    {"preset": "observed", "kv_budget": 0.5, "context_len": 256},
    {"preset": "foreseen", "kv_budget": 0.6, "context_len": 256},
    {"preset": "cla", "kv_budget": 0.7},
    {"preset": "quest", "length": {"method": "pages", "least": 40}},
)
SOURCES = (
    "llama_yarn", "qwen3_norm_window", "neox_partial", "bloom_alibi", "gemma2_softcap", "gemma3_beside_vision",
    "mixtral_experts", "gpt2_conv", "opt_learned", "phi3_partial", "cohere2_nope", "falcon_groups", "llama4_chunks",
)  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def limited_memory():
    """So that what takes too much fails here, and not the machine."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + 8 * 2**30, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def examples(count, many):
    """Without shrinking: what fails is small as it is, and the seed is printed."""
    quiet = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]
    return settings(
        max_examples=10 * count if many else count, deadline=SECONDS * 1000, suppress_health_check=quiet, database=None,
        phases=(Phase.generate,), print_blob=True, derandomize=not many,
    )  # fmt: skip


def survives(call, *arguments):
    """Memory is what this process ever took, which can only be too much."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            call(*arguments)
        except KvfoldError as error:
            assert str(error) and len(str(error)) < 20_000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1000 * MEGABYTES


@pytest.fixture(scope="module")
def folds(tmp_path_factory):
    root = tmp_path_factory.mktemp("folds")
    source, calibration = (
        save_tiny(make_tiny("llama_yarn"), root / "source"),
        {"data": "self", "num_samples": 4, "seq_len": 160},
    )
    common = {"model": str(source), "calibration": calibration}
    return [
        kvfold.compress(common | {"out": str(root / str(i))} | fold, run_dir=root / "run", device="cpu").out
        for i, fold in enumerate(FOLDS)
    ]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    root = tmp_path_factory.mktemp("sources")
    return {name: save_tiny(make_tiny(name), root / name) for name in SOURCES}


@MANY
def test_plans(folds, many):
    plans = [json.loads((folder / "config.json").read_text())["kv_compression_config"] for folder in folds]

    @examples(4500, many)
    @given(mutated(plans))
    def holds(data):
        survives(CachePlan.from_dict, data)

    holds()


@MANY
def test_recipes(folds, many):
    recipes = [load_recipe(folder / "recipe.yaml") for folder in folds]

    @examples(4500, many)
    @given(mutated(recipes))
    def holds(data):
        survives(make_recipe, data)

    holds()


def linked(folder, source, weights="model.safetensors"):
    """A new folder with the weights of `source`."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    os.link(source / "model.safetensors", folder / weights)
    return folder


@MANY
def test_configs(sources, tmp_path, many):
    configs = {name: json.loads((folder / "config.json").read_text()) for name, folder in sources.items()}

    @examples(400, many)
    @given(st.data())
    def holds(data):
        name = data.draw(st.sampled_from(SOURCES))
        folder = linked(tmp_path / "folder", sources[name])
        (folder / "config.json").write_text(json.dumps(data.draw(mutated([configs[name]]))))
        survives(open_source, folder)

    holds()


@MANY
def test_indices(sources, tmp_path, many):
    source = sources["llama_yarn"]
    with safe_open(source / "model.safetensors", "pt") as file:
        index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(file.keys(), "weights.safetensors")}

    @examples(300, many)
    @given(mutated([index]))
    def holds(data):
        folder = linked(tmp_path / "folder", source, "weights.safetensors")
        shutil.copy(source / "config.json", folder)
        (folder / "model.safetensors.index.json").write_text(json.dumps(data))
        survives(open_source, folder)

    holds()


@MANY
def test_headers(sources, tmp_path, many):
    """Other headers, files that are cut off, bytes that are others, lengths that are lies."""
    source = sources["llama_yarn"]
    raw = (source / "model.safetensors").read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + size])
    shutil.copytree(source, tmp_path / "folder")

    def open_and_read():
        checkpoint = open_source(tmp_path / "folder").checkpoint
        for name in checkpoint.tensors:
            checkpoint.read(name)

    def damaged(draw):
        how = draw(st.integers(0, 9))
        if how < 6:
            text = json.dumps(draw(mutated([header]))).encode()
            return struct.pack("<Q", len(text)) + text + raw[8 + size :]
        if how < 8:
            return raw[: draw(st.integers(0, len(raw) - 1))]
        if how < 9:
            place, byte = draw(st.integers(0, 8 + size)), draw(st.integers(0, 255))
            return raw[:place] + bytes([byte]) + raw[place + 1 :]
        return struct.pack("<Q", draw(st.sampled_from([0, 1, 2**40, 2**63, len(raw)]))) + raw[8:]

    @examples(300, many)
    @given(st.data())
    def holds(data):
        (tmp_path / "folder" / "model.safetensors").write_bytes(damaged(data.draw))
        survives(open_and_read)

    holds()


@pytest.mark.parametrize(
    "text",
    [b"[" * 100_000, b'{"hidden_size": ' + b"9" * 5000 + b"}", b"\xff\xfe", b"", b"null", b'{"rope_theta": NaN}'],
    ids=["deep", "digits", "utf16", "empty", "null", "nan"],
)
def test_what_is_hardly_json(sources, tmp_path, text):
    folder = linked(tmp_path / "folder", sources["llama_yarn"])
    (folder / "config.json").write_bytes(text)
    with pytest.raises(KvfoldError, match=r"config\.json"):
        open_source(folder)


@pytest.mark.parametrize("size", [-1, 0, 10**6, 10**9, 10**30, 1.5, True, "64"])
@pytest.mark.parametrize("field", ["num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size", "head_dim"])
def test_sizes_that_no_model_has(sources, tmp_path, field, size):
    """Refused at once, however much memory or time a model of such sizes would take."""
    folder = linked(tmp_path / "folder", sources["llama_yarn"])
    config = json.loads((sources["llama_yarn"] / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {field: size}))
    with pytest.raises(KvfoldError, match=rf"{field} is|config\.json"):
        open_source(folder)


def test_shapes_that_contradict_the_config(sources, tmp_path):
    folder = linked(tmp_path / "folder", sources["llama_yarn"])
    config = json.loads((sources["llama_yarn"] / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 100}))
    with pytest.raises(
        KvfoldError, match=r"mlp\.\w+\.weight has shape \[.*96.*\] where config.json asks for \[.*100.*\]"
    ):
        open_source(folder)

"""Exported checkpoints are stock ones: same logits, without kvfold."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import MODELS, copy_heads, load, logits, make_tiny, save_tiny, tokens

import kvfold
from kvfold.compression import export_gguf
from kvfold.compression.export_gqa import export_gqa
from kvfold.errors import CheckpointError, OutputError, PlanError, RecipeError
from kvfold.testing import assert_close, relative_rms

NO_STOCK_CLASS = ("neox_partial", "bloom_alibi", "opt_learned", "gpt2_conv", "olmo2_flat_norm")
EXPORTED = [model for model in MODELS if model not in NO_STOCK_CLASS]


@pytest.mark.parametrize("method", ["mean_pool", "procrustes"])
def test_exports_load_without_kvfold(fold, tmp_path, method):
    """In a process where kvfold cannot be imported, the stock class gives the folded model's logits."""
    for model in EXPORTED:
        folded = fold(model, method, kv_budget=0.5)
        heads = export_gqa(folded.out, tmp_path / model)
        assert heads == folded.plan.owned[0].num_kv_heads
        torch.save(logits(load(folded.out), tokens()), tmp_path / f"{model}.pt")
    script = """
import sys
sys.modules["kvfold"] = None
import json, torch, transformers
folder, ids = sys.argv[1], torch.load(f"{sys.argv[1]}/ids.pt")
for name in sys.argv[2:]:
    eager = {"attn_implementation": "eager"} if "softcap" in name else {}
    model = transformers.AutoModelForCausalLM.from_pretrained(f"{folder}/{name}", dtype=torch.float32, **eager).eval()
    assert not type(model).__name__.startswith("Kvfold")
    assert model.config.num_key_value_heads == json.load(open(f"{folder}/{name}/config.json"))["num_key_value_heads"]
    with torch.no_grad():
        found, expected = model(ids, use_cache=False).logits, torch.load(f"{folder}/{name}.pt")
    error = ((found - expected).square().mean() / expected.square().mean()).sqrt().item()
    assert error < 1e-5, (name, error)
    generated = model.generate(ids[:1, :5], max_new_tokens=4, do_sample=False)
    assert generated.shape == (1, 9)
"""
    torch.save(tokens(), tmp_path / "ids.pt")
    run = subprocess.run([sys.executable, "-c", script, str(tmp_path), *EXPORTED], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]


@pytest.mark.parametrize("model", [model for model in NO_STOCK_CLASS if "olmo" not in model])
def test_families_without_a_stock_class_say_so(fold, tmp_path, model):
    with pytest.raises(PlanError, match=r"have no stock grouped-query class: .*import kvfold"):
        export_gqa(fold(model, "mean_pool", kv_budget=0.5).out, tmp_path / "out")


def test_obstacles_are_named_with_the_nearest_plan(fold, tiny_dir, tmp_path):
    folder = fold("llama_mha", "svd_a", kv_budget=0.5).out
    with pytest.raises(
        PlanError, match=r"layer 0 keeps projections beside its weights .*--preset procrustes --kv-heads 4"
    ):
        export_gqa(folder, tmp_path / "out")
    shared = {"model": str(tiny_dir / "llama_mha"), "out": str(tmp_path / "shared"), "preset": "mlkv"}
    kvfold.compress(shared | {"depth": {"owners": 2}, "width": {"kv_heads": 4}}, device="cpu")
    with pytest.raises(PlanError, match="shares its cache with layers"):
        export_gqa(tmp_path / "shared", tmp_path / "out")
    quantized = tmp_path / "int4"
    kvfold.compress({"model": str(tiny_dir / "llama_mha"), "out": str(quantized), "preset": "int4"}, device="cpu")
    with pytest.raises(PlanError, match="stores its numbers in few bits"):
        export_gqa(quantized, tmp_path / "out")
    with pytest.raises(CheckpointError, match="is not a folded model"):
        export_gqa(tiny_dir / "llama_mha", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_export_can_be_replaced_and_may_be_spread_over_shards(fold, tmp_path):
    """As after healing and save_pretrained with small shards, which part a layer's attention."""
    for model in ("qwen2_bias_tied", "phi3_partial"):
        network = load(fold(model, "mean_pool", kv_budget=0.5).out)
        network.save_pretrained(tmp_path / f"{model}-saved", max_shard_size="20KB")
        assert len(list((tmp_path / f"{model}-saved").glob("*.safetensors"))) > 5
        for overwrite in (False, True):
            export_gqa(tmp_path / f"{model}-saved", tmp_path / model, overwrite=overwrite)
        stock = load(tmp_path / model)
        assert not type(stock).__name__.startswith("Kvfold")
        assert_close(logits(stock, tokens()), logits(network, tokens()))


def test_uneven_layers_are_an_obstacle(fold, tmp_path):
    folder = fold("llama_mha", "mean_pool", kv_budget=0.5).out
    config = json.loads((Path(folder) / "config.json").read_text())
    config["kv_compression_config"]["caches"][1] |= {"num_kv_heads": 2, "num_v_heads": 2}
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text(json.dumps(config))
    (broken / "model.safetensors").symlink_to(Path(folder) / "model.safetensors")
    with pytest.raises(PlanError, match=r"different numbers of heads, \[2, 4\]"):
        export_gqa(broken, tmp_path / "out")


def test_fused_bloom_has_nothing_but_linear_layers(fold):
    """Grouped svd_a without rotation: ordinary projections, fewer and smaller heads."""
    from kvfold.runtimes.transformers.projections import GroupedLinear

    for model in ("bloom_alibi", "opt_learned", "gpt2_conv"):
        network = load(fold(model, "svd_a", kv_budget=0.5, latent="group").out)
        assert not [m for m in network.modules() if isinstance(m, GroupedLinear)]
        attention = network_attention(network)
        names = [name for name, _ in attention.named_children()]
        assert sorted(names) == ["k_proj", "o_proj", "q_proj", "v_proj"]


@pytest.mark.parametrize(("model", "heads", "rotated"), [("neox_partial", 4, 4), ("phi3_partial", 2, 8)])
def test_only_rotated_numbers_keep_a_projection(fold, model, heads, rotated):
    """Of 16 numbers per head the unrotated ones reach the latents by one ordinary projection of the input."""
    folded = fold(model, "svd_a", kv_budget=0.5)
    attention = network_attention(load(folded.out))
    width = folded.plan.owned[0].head_dim
    assert attention.k_proj.out_features == heads * rotated and attention.k_u_proj.out_features == width
    assert attention.k_a_proj.weight.shape == (1, width, heads * rotated)


def network_attention(network):
    return network.architecture.modules(network)[0]


@pytest.mark.parametrize("grouping", ["neighbours", "similar"])
def test_heads_that_differ_by_rotations_merge_without_loss(tmp_path, grouping):
    """Keys turned in each frequency pair, values by any orthogonal map: a mean loses them, aligned heads do not."""
    original = turned_heads(make_tiny("llama_mha"))
    source = save_tiny(original, tmp_path / "source")
    expected = logits(original, tokens())
    for merge in ("svd", "align"):
        recipe = {"model": str(source), "out": str(tmp_path / f"{merge}"), "kv_budget": 1 / 8}
        width = {"method": "procrustes", "merge": merge, "grouping": grouping}
        calibration = {"data": "self", "num_samples": 16, "seq_len": 64}
        folded = kvfold.compress(recipe | {"width": width, "calibration": calibration}, device="cpu")
        assert_close(logits(load(folded.out), tokens()), expected, tolerance=1e-4)
    pooled = kvfold.compress(recipe | {"out": str(tmp_path / "pool"), "preset": "gqa", "width": {}}, device="cpu")
    assert relative_rms(logits(load(pooled.out), tokens()), expected) > 0.1


def turned_heads(model):
    """Every head a copy of the first, its keys turned by an angle per frequency pair, its values by an orthogonal map."""
    generator = torch.Generator().manual_seed(5)
    for layer in copy_heads(model, [1.0] * 8).model.layers:
        keys = layer.self_attn.k_proj.weight.data.unflatten(0, (8, 2, 4))
        angle = 6.28 * torch.rand(8, 4, 1, generator=generator)
        a, b = keys[:, 0].clone(), keys[:, 1].clone()
        keys[:, 0], keys[:, 1] = a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()
        values = layer.self_attn.v_proj.weight.data.unflatten(0, (8, 8))
        for head in range(8):
            turn = torch.linalg.qr(torch.randn(8, 8, generator=generator)).Q
            values[head] = turn @ values[head]
    return model


STAND_IN = """import sys, pathlib
folder, option, out = sys.argv[1:]
assert option == "--outfile"
{does}
"""


def test_gguf_is_written_by_llama_cpps_converter(fold, tmp_path, monkeypatch):
    """It gets a stock folder, which is gone afterwards, and what it writes gets its name when it is there."""
    folded, home, out = (
        fold("llama_mha", "mean_pool", kv_budget=0.5).out,
        tmp_path / "llama.cpp",
        tmp_path / "half.gguf",
    )
    home.mkdir()
    copies = 'pathlib.Path(out).write_bytes((pathlib.Path(folder) / "config.json").read_bytes())'
    (home / export_gguf.CONVERTER).write_text(STAND_IN.format(does=copies))
    monkeypatch.setenv(export_gguf.HOME, str(home))
    assert export_gguf.export_gguf(folded, out) == 4
    assert json.loads(out.read_text())["architectures"] == ["LlamaForCausalLM"]
    assert sorted(tmp_path.iterdir()) == sorted([home, out])
    with pytest.raises(OutputError, match="exists already"):
        export_gguf.export_gguf(folded, out)
    (home / export_gguf.CONVERTER).write_text(STAND_IN.format(does='sys.exit("no such architecture")'))
    before = out.read_bytes()
    with pytest.raises(OutputError, match="did not write a file: no such architecture"):
        export_gguf.export_gguf(folded, out, overwrite=True)
    assert out.read_bytes() == before and sorted(tmp_path.iterdir()) == sorted([home, out])


def test_without_a_converter_the_way_by_hand_is_said(fold, tmp_path, monkeypatch):
    folded = fold("llama_mha", "mean_pool", kv_budget=0.5).out
    monkeypatch.delenv(export_gguf.HOME, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RecipeError, match=f"kvfold export {folded} --out STOCK, then python llama.cpp/convert_hf"):
        export_gguf.export_gguf(folded, tmp_path / "half.gguf")


def test_an_export_names_no_code_of_kvfolds(fold, tmp_path):
    export_gqa(fold("llama_mha", "mean_pool", kv_budget=0.5).out, tmp_path / "stock")
    assert "auto_map" not in json.loads((tmp_path / "stock" / "config.json").read_text())


def test_tied_weights_under_the_head_s_name(tmp_path):
    source = save_tiny(make_tiny("qwen2_bias_tied"), tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    recipe = {"model": str(source), "out": str(tmp_path / "folded"), "width": {"method": "mean_pool"}, "kv_budget": 0.5}
    export_gqa(kvfold.compress(recipe, device="cpu").out, tmp_path / "stock")
    assert_close(
        logits(load(tmp_path / "stock"), tokens()), logits(load(tmp_path / "folded"), tokens()), tolerance=1e-6
    )

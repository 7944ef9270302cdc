"""Exports to DeepSeek's class under vLLM's latent attention, in the CPU's only size: 512 numbers and 64 that rotate."""

from engines import BIND, assert_same_tokens, job, serve
from tiny import make_tiny, save_tiny

from kvfold.compression.export_mla import export_mla

SIZE = {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 6, "head_dim": 64, "rms_norm_eps": 1e-5}
NATIVE = {"compilation_config": {"custom_ops": ["all", "-rotary_embedding"]}}
"""vLLM's CPU kernel for plain rotation takes a slice of queries for all of them (0.32)."""


def test_tokens_are_those_of_transformers(tmp_path):
    """Each reads the folder that was made for it."""
    source = save_tiny(make_tiny("llama_mha", **SIZE), tmp_path / "source")
    what = {"kv_budget": 576 / 768, "calibration": {"data": "self", "num_samples": 8, "seq_len": 64}}
    for runtime in ("transformers", "vllm"):
        assert export_mla(source, tmp_path / runtime, runtime=runtime, **what) == 512 + 64
    served = serve(tmp_path, {"mla": job(tmp_path / "vllm", **NATIVE)}, **{BIND: "0"})["mla"]
    assert "error" not in served, served
    assert_same_tokens(served, tmp_path / "transformers")

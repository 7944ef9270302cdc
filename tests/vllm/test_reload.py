"""An engine that gets other weights, as training by rewards gives it, answers by them."""

import pytest
import torch
from engines import assert_same_tokens, job, serve
from safetensors.torch import load_file, save_file

NAMES = ("auto", "groups", "bloom_alibi_auto")


@pytest.mark.rare
def test_other_weights_after_a_sleep(folder, tmp_path):
    """Of attention, whose maps and packed copies are made of them, in pages of bytes and in vLLM's own."""
    jobs = {name: job(other(folder(name), tmp_path / name)) | {"reload": str(folder(name))} for name in NAMES}
    found = serve(tmp_path, jobs)
    for name in NAMES:
        assert "error" not in found[name], found[name]
        assert_same_tokens(found[name], folder(name), close=2e-2)


def other(folder, copy):
    """The same folder with other weights in attention."""
    copy.mkdir()
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            (copy / file.name).write_bytes(file.read_bytes())
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            if "attn" in name or "attention" in name:
                tensors[name] = tensor * (1 + 0.3 * torch.randn_like(tensor.float())).to(tensor.dtype)
        save_file(tensors, copy / file.name, metadata={"format": "pt"})
    return copy

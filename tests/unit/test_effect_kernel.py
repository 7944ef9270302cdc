"""The CPU's kernel that says what queries lose with each token, against the definition in float64."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch

from kvfold.runtimes.kernels import effects
from kvfold.runtimes.scorers.base import root_of
from kvfold.runtimes.transformers.projections import Made
from kvfold.testing import assert_close

compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="this machine has no C++ compiler")

FORMS = {
    "few": {"tokens": 40},
    "blocks": {"tokens": 1100, "batch": 1},
    "widths": {"tokens": 90, "key_width": 20, "width": 37},
    "queries": {"tokens": 90, "queries": 41},
    "softcap": {"tokens": 90, "softcap": 3.0},
    "padding": {"tokens": 90, "hidden": 30},
    "sharp": {"tokens": 90, "scale": 12.0},
    "one": {"tokens": 1},
}


def by_definition(q, k, v, seen, root, softcap):
    """[B, n, Q, S]: squares of p R (v - o), with the average o of the other tokens; log-sums and averages of all."""
    group = q.shape[1] // k.shape[1]
    q, k, v, root = q.double(), *(x.double().repeat_interleave(group, 1) for x in (k, v)), root.double()
    scores = q @ k.transpose(2, 3)
    scores = scores if softcap is None else softcap * (scores / softcap).tanh()
    scores = scores if seen is None else scores + seen.double()[:, :, None]
    probs = scores.softmax(-1)
    average = probs @ v
    lost = torch.empty_like(probs)
    for token in range(k.shape[2]):
        others = [i for i in range(k.shape[2]) if i != token]
        without = scores[..., others].softmax(-1) @ v[:, :, others]
        far = (v[:, :, token, None] - without) @ root.mT
        lost[..., token] = probs[..., token].square() * far.square().sum(-1)
    return lost, scores.logsumexp(-1), average


@compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_losses_are_what_the_definition_says(form, dtype):
    torch.manual_seed(0)
    batch, tokens, width = form.get("batch", 2), form["tokens"], form.get("width", 32)
    key_width = form.get("key_width", 32)
    q = torch.randn(batch, 6, form.get("queries", 64), key_width) * form.get("scale", 1) / key_width**0.5
    k, v = torch.randn(2, batch, 2, tokens + 3, max(key_width, width)).to(dtype)[:, :, :, 3:].unbind()
    k, v, root = k[..., :key_width], v[..., :width], torch.randn(6, width, width)
    seen = None
    if "hidden" in form:
        seen = torch.zeros(batch, 1, tokens)
        seen[0, :, : form["hidden"]] = torch.finfo(torch.float32).min
    found = effects.losses(q, k, v, seen, root, softcap=form.get("softcap"))
    effect = found.effect_BnpS.sum(2)
    lost, log_sums, averages = by_definition(q, k, v, seen, root, form.get("softcap"))
    assert_close(effect, lost.sum(2).float(), tolerance=1e-4)
    assert_close(found.log_sums_BnQ, log_sums.float())
    assert_close(found.averages_BnQV, averages.float())
    if tokens > 1:  # every token by itself, not only those that are worth most
        shown = lost.sum(2) > 1e-6 * lost.sum(2).amax(-1, keepdim=True)
        assert ((effect - lost.sum(2)).abs() < 2e-3 * lost.sum(2))[shown].all()


def test_a_root_says_what_values_weigh():
    """Of a head that says nothing as well."""
    torch.manual_seed(0)
    output = torch.randn(50, 3, 8)
    output[:, 1] = 0
    output[:, 2, 4:] = 0
    v, root = torch.randn(3, 8), root_of(output)
    wanted = torch.einsum("dnv,nv->dn", output, v).square().sum(0)
    assert_close(torch.einsum("nwv,nv->nw", root, v).square().sum(1), wanted, tolerance=1e-5)


@pytest.mark.parametrize("rank", [1, 8, 32])
def test_a_root_of_few_directions(rank):
    """As values in a latent are that is wider than their heads."""
    torch.manual_seed(0)
    output = (torch.randn(2, 200, rank) @ torch.randn(2, rank, 96)).transpose(0, 1)
    v, root = torch.randn(30, 2, 96), root_of(output)
    wanted = torch.einsum("dnv,bnv->bdn", output, v).square().sum(1)
    found = torch.einsum("nwv,bnv->bnw", root, v).square().sum(2)
    assert ((found - wanted).abs() < 1e-5 * wanted.mean()).all()


@compiler
def test_another_default_device_and_dtype_change_nothing():
    torch.manual_seed(0)
    given = torch.randn(1, 2, 64, 16), torch.randn(1, 1, 9, 16), torch.randn(1, 1, 9, 16), None, torch.randn(2, 16, 16)
    wanted = effects.losses(*given)
    with torch.device("meta"):
        found = effects.losses(*given)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_merged_adapters_are_seen():
    """They write through `.data`, of which no version tells."""
    weight, made = torch.nn.Parameter(torch.ones(8, 8)), Made()
    assert made.of("sum", (weight, None), lambda: float(weight.sum()), some=3) == 64
    weight.data += 1
    assert made.of("sum", (weight, None), lambda: float(weight.sum()), some=3) == 128


def test_what_was_made_of_weights_is_made_anew_by_who_copies_them():
    weight, made, calls = torch.ones(2), Made(), []
    for holder in (made, made, copy.deepcopy(made)):
        holder.of("name", (weight, None), lambda: calls.append(1))
    assert len(calls) == 2
    weight += 1
    made.of("name", (weight,), lambda: calls.append(1))
    assert len(calls) == 3

"""Steps that read some of the stored tokens by the CPU's own kernels, against torch's operations."""

import shutil

import pytest
import torch
from packed_forms import FORMS, distance

from kvfold.plan.reading import Reading
from kvfold.runtimes.kernels import chosen_tokens, cpu_decode
from kvfold.runtimes.kernels.codec import pack, unpack
from kvfold.runtimes.kernels.gathering import taken
from kvfold.runtimes.kernels.packed_tokens import PackedTokens
from kvfold.runtimes.readers.base import Asked
from kvfold.runtimes.readers.lead import Lead

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="this machine has no C++ compiler")
LENGTHS = [40, 512, 1301]
B, C, N, R = 2, 2, 6, 64


@pytest.fixture(autouse=True)
def same_numbers_every_time():
    torch.manual_seed(0)


def hidden_in(S, T, padding=(9, 0)):
    """What queries [B, 1, T, S] do not see: behind themselves, and padding before the first row."""
    at = torch.arange(S)
    seen = (at <= torch.arange(S - T, S)[:, None]) & (at >= torch.tensor(padding)[:, None, None])
    return torch.zeros(B, 1, T, S).masked_fill(~seen[:, None], torch.finfo(torch.float32).min)


@pytest.mark.parametrize("softcap", [None, 1.5], ids=["", "capped"])
@pytest.mark.parametrize(("T", "padded"), [(1, False), (1, True), (3, True)])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("S", LENGTHS)
def test_leading_numbers_choose_what_torch_chooses(S, groups, T, padded, softcap):
    """As part of a larger storage; a softmax over all, the mean over queries, the best beside those that are always read."""
    keys = torch.randn(B, C, S + 50, R)[:, :, 25 : 25 + S]
    reader = Lead(Reading(rule="lead", share=0.2, least=12, leading=10, sinks=3, newest=5))
    asked = Asked(
        queries_BNTR=torch.randn(B, N, T, R), keys=keys, index=(), seen=hidden_in(S, T) if padded else None,
        groups=groups, count=reader.reading.chosen(S), softcap=softcap,
    )  # fmt: skip
    assert chosen_tokens.chooses(asked.queries_BNTR, keys)
    assert torch.equal(reader._by_kernel(asked), reader._best(asked))


@pytest.mark.parametrize("form", ["tiers", "4_bits", "float8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_leading_numbers_of_packed_keys(form, dtype):
    """Two in a thousand differ at most: those beside the last, whose weights differ by a rounding."""
    format, S = FORMS[form], 900
    keys = PackedTokens(pack(torch.randn(B, C, S, format.width), format), format, dtype)
    reader = Lead(Reading(rule="lead", share=0.25, leading=30))
    queries = torch.randn(B, N, 1, format.width)
    asked = Asked(queries_BNTR=queries, keys=keys, index=(), seen=None, groups=C, count=reader.reading.chosen(S))
    found, wanted = reader._by_kernel(asked), reader._best(asked)
    assert (found[..., None] == wanted[:, :, None]).any(3).float().mean() > 0.998


def test_no_number_is_read_not_passed_over():
    """Whoever reads it gets no number, as without a kernel."""
    keys, queries = torch.randn(1, 1, 600, R), torch.randn(1, 1, 1, R)
    keys[0, 0, 100, 3] = torch.nan
    found = chosen_tokens.best_by_leading(queries, keys, None, leading=8, groups=1, count=200, sinks=0, newest=1)
    out = chosen_tokens.attend_to(queries, keys, keys, found, None, scale=1.0, map=None)
    assert found.unique().numel() == 200 and out.isnan().all()


@pytest.mark.parametrize("hides", [False, True], ids=["", "hidden"])
@pytest.mark.parametrize("form", ["numbers", "tiers", "float8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shared", [False, True], ids=["", "shared"])
def test_attention_where_tokens_lie(shared, dtype, form, hides):
    """Against copies of the chosen tokens; values of other heads and widths, led back by a map."""
    S, n, T, format = 700, 77, 2, FORMS.get(form)
    widths = (R, 40) if format is None else (format.width, format.width)
    k, v = (torch.randn(B, heads, S, width).to(dtype) for heads, width in zip((C, 1), widths, strict=True))
    if format is not None:
        k, v = (PackedTokens(pack(x, format), format, dtype) for x in (k, v))
    k = v if shared else k
    q, G = torch.randn(B, N, T, k.shape[3]).to(dtype), 1
    index = torch.stack([torch.randperm(S)[:n].sort().values for _ in range(B * G)]).view(B, G, n)
    hidden = torch.randn(B, N, T, n).masked_fill(torch.rand(B, N, T, n) < 0.5, -1e30) if hides else None
    weight = torch.randn(2 * 32, v.shape[3]).to(dtype).view(1, 64, -1)
    for map in (None, cpu_decode.ValueMap.of(weight, 32)):
        assert chosen_tokens.attends(q, k, v)
        found = chosen_tokens.attend_to(q, k, v, index, hidden, scale=0.1, map=map)
        numbers = [taken(x, index.expand(-1, x.shape[1], -1)) for x in (k, v)]
        numbers = [x if format is None else unpack(x.rows, format, torch.float64) for x in numbers]
        wanted = attention(q, *numbers, hidden)
        if map is not None:
            heads = wanted.unflatten(2, (2, -1))
            wanted = torch.einsum("btkgv,khv->btkgh", heads, weight.double().view(2, 32, -1)).flatten(2, 3)
        assert distance(found, wanted) < (1e-5 if dtype == torch.float32 else 1e-2)


def attention(q, k, v, hidden):
    """[B, T, N, V] in float64."""
    k, v = (x.double().repeat_interleave(N // x.shape[1], dim=1) for x in (k, v))
    scores = 0.1 * q.double() @ k.transpose(2, 3)
    return ((scores if hidden is None else scores + hidden).softmax(-1) @ v).transpose(1, 2)


def test_tokens_whose_heads_do_not_lie_in_rows_are_copied():
    """As heads of a projection that nobody has stored yet."""
    x = torch.randn(1, 30, 2, 7)[..., :5].transpose(1, 2)
    assert not chosen_tokens.attends(torch.randn(1, 2, 1, 5), x, x)

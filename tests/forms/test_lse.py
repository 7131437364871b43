"""The log-sum-exp of the scores beside the attention; and sinks that differ from row to row, which are made of it."""

import math

import pytest
import torch

from fa3_inductor import Reason

from .harness import assert_as_good_as_eager, error, fuse, run

B, H, S, D = 2, 6, 23, 16
LOWEST = torch.finfo(torch.bfloat16).min


def qkv(kv_heads=H, seqlen_q=S):
    return [torch.randn(B, h, s, D) for h, s in ((H, seqlen_q), (kv_heads, S), (kv_heads, S))]


def causal(fill):
    return torch.full((S, S), fill).triu(1)


def granite(q, k, v, sinks):
    """transformers' GraniteSWA: the share of the keys beside a sink, as a factor of the result."""
    scores = q @ k.mT * 0.25 + causal(LOWEST).to(q.dtype)
    share = (torch.logsumexp(scores, -1) - sinks.view(1, -1, 1)).float().sigmoid()
    return scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v * share.unsqueeze(-1).to(q.dtype)


def of_a_row(q, k, v, column):
    """transformers' Inkling: a sink of each query's own."""
    joined = torch.cat([q @ k.mT * 0.25, column], -1).float()
    return joined.softmax(-1)[..., :-1].to(q.dtype) @ v


def of_the_query(q, k, v):
    return torch.cat([q @ k.mT, q.sum(-1, keepdim=True)], -1).softmax(-1)[..., :-1] @ v


def of_a_row_behind_a_mask(q, k, v, column):
    scores = (q @ k.mT * 0.25).masked_fill(causal(1.0) > 0, -math.inf)
    scores = scores.masked_fill(torch.arange(S)[:, None] < 3, -math.inf)  # of some rows, all
    return torch.cat([column, scores], -1).softmax(-1)[..., 1:] @ v


def returned(q, k, v):
    scores = q @ k.mT * 0.25
    return torch.cat([scores.softmax(-1) @ v, scores.logsumexp(-1, keepdim=True)], -1)


def wider(q, k, v):
    scores = q @ k.mT * 0.25 + causal(-math.inf).to(q.dtype)
    total = scores.float().logsumexp(dim=3)
    return scores.softmax(-1) @ v * total.tanh()[..., None].to(q.dtype)


def heads_in_the_batch(q, k, v):
    scores = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT) * 0.25
    gate = scores.logsumexp(2).sigmoid()
    return (torch.bmm(scores.softmax(2), v.flatten(0, 1)) * gate[..., None]).view(B, H, S, D)


def heads_last(q, k, v):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * 0.25
    gate = scores.logsumexp(-1).sigmoid().transpose(1, 2)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v) * gate[..., None]


def grouped(q, k, v):
    q = q.unflatten(1, (2, 3))
    scores = torch.einsum("bgrqd,bgkd->bgrqk", q, k) * 0.25
    gate = scores.logsumexp(-1, keepdim=True).sigmoid()
    return torch.einsum("bgrqk,bgkd->bgrqd", scores.softmax(-1), v) * gate


def of_all_keys(q, k, v):
    """Keys that only the log-sum-exp sees: the scores have to exist."""
    scores = q @ k.mT * 0.25
    return scores.masked_fill(causal(1.0) > 0, -math.inf).softmax(-1) @ v * scores.logsumexp(-1, keepdim=True)


def of_queries(q, k, v):
    scores = q @ k.mT * 0.25
    return scores.softmax(-1) @ v * scores.logsumexp(-2).unsqueeze(-1)


def beside_a_sink(q, k, v):
    """That of the scores with the sink: not what the kernels return."""
    joined = torch.nn.functional.pad(q @ k.mT * 0.25, (0, 1))
    return joined.softmax(-1)[..., :-1] @ v * joined.logsumexp(-1, keepdim=True)


def padded(q, k, v, seen):
    """Some rows see nothing, and lose the number of their keys in the lowest number."""
    scores = q @ k.mT * 0.25 + torch.where(seen, 0.0, LOWEST)[:, None, None].to(q.dtype)
    return scores.softmax(-1) @ v * (scores.logsumexp(-1, keepdim=True) / 100).clamp_min(-2.0)


def biased(q, k, v, bias):
    scores = q @ k.mT * 0.25 + bias
    return scores.softmax(-1) @ v * (scores.logsumexp(-1, keepdim=True) / 100).tanh()


def bias():
    x = torch.randn(H, S, S)
    x[0, 4], x[1, 5], x[2], x[3, :, 7] = -1e9, 1e9, 300.0, -math.inf
    return x


FUSED = {
    granite: lambda: [*qkv(), torch.randn(H)],
    of_a_row: lambda: [*qkv(), torch.randn(B, H, S, 1)],
    of_the_query: qkv,
    of_a_row_behind_a_mask: lambda: [*qkv(), torch.randn(B, H, S, 1)],
    returned: qkv,
    wider: qkv,
    heads_in_the_batch: qkv,
    heads_last: qkv,
    grouped: lambda: qkv(2),
    padded: lambda: [*qkv(), torch.rand(B, S).gt(0.5) & torch.tensor([[True], [False]])],
}
LEFT_ALONE = (of_all_keys, of_queries, beside_a_sink)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fn", FUSED)
def test_result_and_gradients(fn, dtype):
    torch.manual_seed(0)
    args = FUSED[fn]()
    exact = run(fn, args, torch.float64)
    compiled, report = fuse(fn, target="reference")
    ours, eager = run(compiled, args, dtype), run(fn, args, dtype)
    assert [s.status for s in report.sites] == ["fused"], report.sites[0].verdict
    if fn is padded:  # whose lowest number is none in float64
        for x, y in zip((ours.out, *ours.grads), (eager.out, *eager.grads)):
            assert error(x, y) < 100 * torch.finfo(dtype).eps
    else:
        assert_as_good_as_eager(ours, eager, exact, dtype)


@pytest.mark.parametrize("fn", LEFT_ALONE)
def test_what_is_another_sum(fn):
    args = qkv()
    compiled, report = fuse(fn, target="reference")
    torch.testing.assert_close(compiled(*args), fn(*args))
    assert [s.reason for s in report.sites] == [Reason.SCORES_USED]


@pytest.mark.parametrize("fn", [granite, of_a_row, returned])
def test_not_onto_sdpa(fn):
    args = FUSED[fn]()
    compiled, report = fuse(fn, target="sdpa")
    torch.testing.assert_close(compiled(*args), fn(*args))
    wanted = Reason.SCORE_OP if fn is of_a_row else Reason.SCORES_USED
    assert [s.reason for s in report.sites] == [wanted] and "scaled_dot_product_attention" in report.sites[0].detail


@pytest.mark.parametrize("trains", [False, True])
def test_an_unknown_bias(trains):
    """It may be -inf all along a row, whose log-sum-exp has a gradient of NaN."""
    args = [x.requires_grad_(trains) for x in (*qkv(), bias())]
    compiled, report = fuse(biased, target="reference")
    torch.testing.assert_close(compiled(*args), biased(*args), rtol=1e-4, atol=1e-4)
    (site,) = report.sites
    assert (site.status, site.reason) == (("rejected", Reason.SCORES_USED) if trains else ("fused", None)), site.verdict


@pytest.mark.parametrize("fn", [granite, of_a_row, returned])
def test_dynamic_shapes(fn):
    compiled, report = fuse(fn, target="reference", dynamic=True)
    for batch in (2, 3, 5):
        args = [x[:1].expand(batch, *x.shape[1:]) if x.ndim == 4 else x for x in FUSED[fn]()]
        torch.testing.assert_close(compiled(*args), fn(*args))
    assert {s.status for s in report.sites} == {"fused"}


def test_values_that_come_later():
    """The attention cannot be where its log-sum-exp is wanted."""

    def fn(q, k, v):
        scores = q @ k.mT * 0.25
        gate = scores.logsumexp(-1, keepdim=True).sigmoid()
        return scores.softmax(-1) @ (v * gate) * gate

    args = qkv()
    compiled, report = fuse(fn, target="reference")
    torch.testing.assert_close(compiled(*args), fn(*args))
    assert [s.reason for s in report.sites] == [Reason.SCORES_USED]


def test_written_to_between():
    def fn(q, k, v):
        v = v * 1
        scores = q @ k.mT * 0.25
        total = scores.logsumexp(-1, keepdim=True)
        v.mul_(2)
        return scores.softmax(-1) @ v * total

    args = qkv()
    compiled, report = fuse(fn, target="reference")
    torch.testing.assert_close(compiled(*args), fn(*args))
    assert [s.reason for s in report.sites] == [Reason.SCORES_USED]

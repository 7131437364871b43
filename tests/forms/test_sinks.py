"""Attention sinks: one more logit for each head that takes weight and has no value, as in gpt-oss."""

import pytest
import torch

from fa3_inductor import Reason, plan

from .harness import assert_as_good_as_eager, fuse, run

B, H, S, D = 2, 16, 23, 16


def tensors():
    return [*torch.randn(3, B, H, S, D).unbind(), torch.randn(H)]


def column(sinks, q):
    return sinks.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], -1)


def causal(q, fill):
    return torch.full((S, S), fill, dtype=q.dtype).triu(1)


def gpt_oss(q, k, v, sinks):
    """transformers' eager GPT-OSS."""
    scores = torch.matmul(q, k.transpose(2, 3)) * 0.25 + causal(q, torch.finfo(q.dtype).min)
    joined = torch.cat([scores, column(sinks, q)], dim=-1)
    joined = joined - joined.max(dim=-1, keepdim=True).values
    weights = torch.softmax(joined, dim=-1, dtype=joined.dtype)[..., :-1]
    return torch.matmul(torch.dropout(weights, 0.1, False), v)


def plain(q, k, v, sinks):
    return torch.cat([q @ k.mT * 0.25, column(sinks, q)], -1).softmax(-1)[..., :-1] @ v


def narrowed(q, k, v, sinks):
    weights = torch.cat([(q @ k.mT).float(), column(sinks, q).float()], -1).softmax(-1).narrow(-1, 0, S)
    return weights.to(q.dtype) @ v


def in_front(q, k, v, sinks):
    """In front of the keys, with a mask."""
    scores = (q @ k.mT * 0.25).masked_fill(torch.ones(S, S, dtype=torch.bool).triu(1), float("-inf"))
    return torch.cat([column(sinks, q), scores], -1).softmax(-1)[..., 1:] @ v


def capped(q, k, v, sinks):
    return torch.cat([torch.tanh(q @ k.mT / 8) * 2, column(sinks, q)], -1).softmax(-1)[..., :S] @ v


def empty_rows(q, k, v, sinks):
    """Queries that see no key give all of their weight to the sink."""
    hidden = torch.arange(S) > torch.arange(S)[:, None] - 3
    scores = (q @ k.mT * 0.25).masked_fill(hidden, float("-inf"))
    return torch.cat([scores, column(sinks, q)], -1).softmax(-1)[..., :-1] @ v


def off_by_one(q, k, v, sinks):
    """A softmax with 1 added to its sum."""
    return torch.nn.functional.pad(q @ k.mT * 0.25, (0, 1)).softmax(-1)[..., :-1] @ v


def off_by_one_joined(q, k, v, sinks):
    scores = (q @ k.mT * 0.25).masked_fill(torch.ones(S, S, dtype=torch.bool).triu(1), float("-inf"))
    return torch.cat([scores, torch.zeros_like(scores[..., :1])], -1).softmax(-1)[..., :-1] @ v


def of_one_number(q, k, v, sinks):
    scores = q @ k.mT * 0.25
    return torch.cat([scores, scores.new_full((*scores.shape[:-1], 1), 1.5)], -1).softmax(-1)[..., :-1] @ v


def off_by_one_written_out(q, k, v, sinks):
    scores = (q @ k.mT * 0.25).masked_fill(torch.ones(S, S, dtype=torch.bool).triu(1), float("-inf"))
    peak = scores.amax(-1, keepdim=True).clamp_min(0.0)
    weights = (scores - peak).exp()
    return weights / (torch.exp(-peak) + weights.sum(-1, keepdim=True)) @ v


def off_by_one_unshifted(q, k, v, sinks):
    weights = torch.exp(q @ k.mT * 0.25)
    return weights / (1 + weights.sum(-1, keepdim=True)) @ v


SINKS = {
    off_by_one_written_out: "causal",
    off_by_one_unshifted: "full",
    off_by_one: "full",
    off_by_one_joined: "causal",
    of_one_number: "full",
    gpt_oss: "causal",
    plain: "full",
    in_front: "causal",
    narrowed: "full",
    capped: "full",
    empty_rows: "causal (shifted by -3)",
}


def compare(compiled, fn, args, dtype, grads=True):
    ours, eager, exact = (run(f, args, d, grads) for f, d in ((compiled, dtype), (fn, dtype), (fn, torch.float64)))
    assert_as_good_as_eager(ours, eager, exact, dtype)


@pytest.mark.parametrize("fn", SINKS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_reference(fn, dtype):
    """Forward and every gradient, the sinks' among them."""
    compiled, report = fuse(fn, target="reference")
    compare(compiled, fn, tensors(), dtype)
    (site,) = report.sites
    assert (site.status, site.target, site.mask) == ("fused", "reference", SINKS[fn]), site.verdict


@pytest.mark.parametrize("grads", [False, True])
def test_as_planned_for_hopper(grads, monkeypatch):
    monkeypatch.setattr(plan, "_not_hopper", lambda device: None)
    compiled, report = fuse(gpt_oss)
    compare(compiled, gpt_oss, tensors(), torch.bfloat16, grads)
    (site,) = report.sites
    assert (site.status, site.target) == ("fused", "hopper") and "sinks" in site.kernel, site.verdict


def test_sdpa_has_none():
    compiled, report = fuse(gpt_oss)
    compare(compiled, gpt_oss, tensors(), torch.float32)
    (site,) = report.sites
    assert (site.status, site.reason) == ("rejected", Reason.SCORE_OP) and "sinks" in site.detail


def two_sinks(q, k, v, sinks):
    return torch.cat([q @ k.mT, column(sinks, q), column(sinks, q)], -1).softmax(-1)[..., :-2] @ v


def wide_sink(q, k, v, sinks):
    return torch.cat([q @ k.mT, column(sinks, q).expand(-1, -1, -1, 2)], -1).softmax(-1)[..., :-2] @ v


def last_key_dropped(q, k, v, sinks):
    return (q @ k.mT).softmax(-1)[..., :-1] @ v[:, :, :-1]


def masked_after(q, k, v, sinks):
    joined = torch.cat([q @ k.mT, column(sinks, q)], -1)
    return joined.masked_fill(torch.ones(S, S + 1, dtype=torch.bool).triu(1), -1e9).softmax(-1)[..., :-1] @ v


def scaled_after(q, k, v, sinks):
    return (torch.cat([q @ k.mT, column(sinks, q)], -1) * 0.25).softmax(-1)[..., :-1] @ v


def maximum_of_queries(q, k, v, sinks):
    scores = q @ k.mT
    return (scores - scores.amax(-2, keepdim=True)).softmax(-1) @ v


def shallow_mask(q, k, v, sinks):
    hidden = torch.arange(S) > torch.arange(S)[:, None] - 3
    scores = (q @ k.mT).masked_fill(hidden, -2e4)
    return torch.cat([scores, column(sinks, q)], -1).softmax(-1)[..., :-1] @ v


def two_products(q, k, v, sinks):
    return torch.cat([q @ k.mT, q @ v.mT], -1).softmax(-1)[..., :S] @ v


def shifted_by_key(q, k, v, sinks):
    shift = k.sum(-1)[:, :, None]
    weights = (q @ k.mT * 0.25 - shift).exp()
    return weights / (weights.sum(-1, keepdim=True) + (-shift).exp()) @ v


def off_by_two(q, k, v, sinks):
    weights = torch.exp(q @ k.mT * 0.25)
    return weights / (2 + weights.sum(-1, keepdim=True)) @ v


def padded_by_two(q, k, v, sinks):
    return torch.nn.functional.pad(q @ k.mT, (0, 2)).softmax(-1)[..., :-2] @ v


def padded_by_infinity(q, k, v, sinks):
    return torch.nn.functional.pad(q @ k.mT, (0, 1), value=float("-inf")).softmax(-1)[..., :-1] @ v


def padded_and_used(q, k, v, sinks):
    return torch.nn.functional.pad(q @ k.mT, (0, 1)).softmax(-1) @ torch.nn.functional.pad(v, (0, 0, 0, 1), value=1.0)


def shifted_before(q, k, v, sinks):
    return torch.cat([q @ k.mT * 0.25 + 3.0, column(sinks, q)], -1).softmax(-1)[..., :-1] @ v


def stable_before(q, k, v, sinks):
    scores = q @ k.mT * 0.25
    return torch.cat([scores - scores.amax(-1, keepdim=True), column(sinks, q)], -1).softmax(-1)[..., :-1] @ v


def padded_when_shifted(q, k, v, sinks):
    return torch.nn.functional.pad(q @ k.mT * 0.25 + 3.0, (0, 1)).softmax(-1)[..., :-1] @ v


def written_out_when_shifted(q, k, v, sinks):
    weights = torch.exp(q @ k.mT * 0.25 + 3.0)
    return weights / (1 + weights.sum(-1, keepdim=True)) @ v


def empty_rows_of_nan(q, k, v, sinks):
    scores = (q @ k.mT).masked_fill(torch.arange(S) > torch.arange(S)[:, None] - 3, float("-inf"))
    peak = scores.amax(-1, keepdim=True)
    weights = (scores - peak).exp()
    return weights / (weights.sum(-1, keepdim=True) + (-peak).exp()) @ v


def capped_when_shifted(q, k, v, sinks):
    scores = q @ k.mT
    return (torch.tanh((scores - scores.amax(-1, keepdim=True)) / 8) * 8).softmax(-1) @ v


LEFT_ALONE = {  # and the reason, None if it is not taken for an attention
    shifted_before: Reason.SCORE_OP,
    stable_before: Reason.SCORE_OP,
    padded_when_shifted: Reason.SCORE_OP,
    written_out_when_shifted: Reason.SCORE_OP,
    capped_when_shifted: Reason.SCORE_OP,
    empty_rows_of_nan: None,
    shifted_by_key: None,
    off_by_two: None,
    padded_by_two: Reason.SCORE_OP,
    padded_by_infinity: Reason.SCORE_OP,
    padded_and_used: Reason.SCORE_OP,
    two_sinks: Reason.SCORE_OP,
    wide_sink: Reason.SCORE_OP,
    last_key_dropped: Reason.SOFTMAX_DIM,
    masked_after: Reason.SCORE_OP,
    scaled_after: Reason.SCORE_OP,
    maximum_of_queries: Reason.SCORE_OP,
    shallow_mask: Reason.EMPTY_ROWS,
    two_products: Reason.SOFTMAX_DIM,
}


@pytest.mark.parametrize("fn", LEFT_ALONE, ids=lambda f: f.__name__)
def test_left_alone(fn):
    compiled, report = fuse(fn, target="reference")
    args = tensors()
    ours, eager = (run(f, args, torch.float32) for f in (compiled, fn))
    for mine, theirs in zip([ours.out, *ours.grads], [eager.out, *eager.grads], strict=True):
        torch.testing.assert_close(mine, theirs, equal_nan=True)
    reasons = [] if LEFT_ALONE[fn] is None else [LEFT_ALONE[fn]]
    assert [s.reason for s in report.sites] == reasons, [s.verdict for s in report.sites]


@pytest.mark.parametrize("reduce", ["amax", "max"])
def test_a_maximum_subtracted_for_stability_is_nothing(reduce):
    def stable(q, k, v):
        scores = q @ k.mT * 0.25
        top = scores.amax(-1, keepdim=True) if reduce == "amax" else scores.max(-1, keepdim=True)[0]
        return (scores - top).softmax(-1) @ v

    compiled, report = fuse(stable)
    compare(compiled, stable, tensors()[:3], torch.float32)
    (site,) = report.sites
    assert (site.status, site.mask) == ("fused", "full"), site.verdict


@pytest.mark.parametrize("number", [1e9, 2e3, -1e9])
@pytest.mark.parametrize("sink", ["learned", "one"])
def test_unknown_numbers_beside_a_sink(sink, number):
    """Found by fuzzing: the backward lost the number of a row's keys beside a log-sum-exp of 1e9."""

    def fn(q, k, v, sinks, factor):
        scores = q @ k.mT * 0.25 + factor * number
        joined = torch.cat([scores, column(sinks if sink == "learned" else torch.zeros(H), q)], -1)
        return joined.softmax(-1)[..., :-1] @ v

    factor = torch.randint(0, 2, (S, S)).float()
    factor[3], factor[4] = 0.0, 1.0
    args = [*tensors(), factor]
    compiled, report = fuse(fn, target="reference")
    ours, theirs = (run(f, args, torch.float32) for f in (compiled, fn))
    for mine, grad in zip([ours.out, *ours.grads[:4]], [theirs.out, *theirs.grads[:4]], strict=True):
        if mine is not None or grad is not None:
            torch.testing.assert_close(mine, grad, atol=1e-3, rtol=1e-3)
    assert [site.status for site in report.sites] == ["fused"], report

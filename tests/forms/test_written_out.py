"""Softmax written out by exp, sum and division, with all that people add to it."""

import pytest
import torch

from fa3_inductor import Report

from .test_regressions import D, H, S, same_as_eager

INF = float("-inf")
TARGETS = pytest.mark.parametrize("target", ["sdpa", "reference"])


def qkv():
    return [torch.randn(2, H, S, D) for _ in range(3)]


def scores(q, k):
    return q @ k.mT * D**-0.5


def causal(x):
    return torch.ones(S, S, device=x.device).tril().bool()


def padding(x):
    """Of the second sample every key is hidden."""
    lengths = torch.tensor([15, 0], device=x.device)
    return (torch.arange(S, device=x.device) < lengths[:, None])[:, None, None]


def plain(s):
    e = torch.exp(s)
    return e / e.sum(-1, keepdim=True)


def shifted(s):
    e = (s - s.max(dim=-1, keepdim=True).values).exp()
    return e / torch.sum(e, dim=-1, keepdim=True)


def shifted_by_a_constant(s):
    e = (s - s.amax(-1, keepdim=True).detach()).exp()
    return e / e.sum(-1).unsqueeze(-1)


def to_the_base_two(s):
    e = torch.exp2(s - s.amax(-1, keepdim=True))
    return e / e.sum(-1, keepdim=True)


def by_reciprocal(s):
    e = torch.exp(s - s.amax(-1, keepdim=True))
    return e.sum(-1, keepdim=True).reciprocal() * e


def by_logsumexp(s):
    return torch.exp(s - torch.logsumexp(s, -1, keepdim=True))


def by_log_softmax(s):
    return s.log_softmax(-1).exp()


def with_eps(s):
    e = (s - s.amax(-1, keepdim=True)).exp()
    return e / (e.sum(-1, keepdim=True) + 1e-9)


def clamped(s):
    e = (s - s.amax(-1, keepdim=True)).exp()
    return e / e.sum(-1, keepdim=True).clamp(min=1e-8)


def in_place(s):
    e = (s - s.amax(-1, keepdim=True)).exp_()
    return e.div(e.sum(-1, keepdim=True))


WAYS = [
    plain, shifted, shifted_by_a_constant, to_the_base_two, by_reciprocal, by_logsumexp, by_log_softmax, with_eps,
    clamped, in_place,
]  # fmt: skip


def fused(report: Report) -> list:
    return [(site.status, site.mask) for site in report.sites]


@TARGETS
@pytest.mark.parametrize("way", WAYS, ids=lambda f: f.__name__)
def test_without_a_mask(way, target):
    report = same_as_eager(lambda q, k, v: way(scores(q, k)) @ v, qkv(), True, target)
    assert fused(report) == [("fused", "full")]


@TARGETS
@pytest.mark.parametrize("fill", [INF, -1e9])
@pytest.mark.parametrize("way", WAYS, ids=lambda f: f.__name__)
def test_causal(way, fill, target):
    def attention(q, k, v):
        return way(scores(q, k).masked_fill(~causal(q), fill)) @ v

    assert fused(same_as_eager(attention, qkv(), True, target)) == [("fused", "causal")]


@pytest.mark.parametrize("grads", [False, True])
@pytest.mark.parametrize("fill", [INF, -1e9])
@pytest.mark.parametrize("way", WAYS, ids=lambda f: f.__name__)
def test_rows_without_keys(way, fill, grads):
    def attention(q, k, v):
        return way(scores(q, k).masked_fill(~padding(q), fill)) @ v

    (site,) = same_as_eager(attention, qkv(), grads).sites
    if way in (plain, by_logsumexp) and fill != INF:  # 0 / 0 or a sum of weights that is not 1, but no equal weights
        assert site.reason.name == "EMPTY_ROWS"
    else:
        assert site.status == "fused", site.verdict


@pytest.mark.parametrize("way", WAYS, ids=lambda f: f.__name__)
def test_rows_hidden_by_a_number_that_scores_are_not_lost_in(way):
    def attention(q, k, v):
        return way(scores(q, k) + torch.where(padding(q), 0.0, -1e4)) @ v

    (site,) = same_as_eager(attention, qkv(), False, atol=5e-3).sites
    if site.status == "rejected":
        assert way in (plain, by_logsumexp) and site.reason.name == "EMPTY_ROWS", site.verdict


@TARGETS
@pytest.mark.parametrize("product", [torch.matmul, lambda a, b: torch.einsum("bhqk,bhkd->bhqd", a, b)])
def test_normalised_last(product, target):
    def attention(q, k, v):
        s = scores(q, k).masked_fill(~causal(q), INF)
        e = torch.exp(s - s.amax(-1, keepdim=True))
        return product(e, v) / e.sum(-1, keepdim=True)

    report = same_as_eager(attention, qkv(), True, target)
    if product is torch.matmul:
        assert fused(report) == [("fused", "causal")], report.sites[0].verdict


def multiplied(s, visible):
    e = torch.exp(s - s.amax(-1, keepdim=True)) * visible
    return e / e.sum(-1, keepdim=True)


def multiplied_floats(s, visible):
    e = visible.float() * torch.exp(s - s.amax(-1, keepdim=True))
    return e / e.sum(-1, keepdim=True)


def multiplied_after(s, visible):
    weights = s.softmax(-1) * (1 - (~visible).float())
    return weights / weights.sum(-1, keepdim=True)


def multiplied_with_tiny(s, visible):
    e = torch.exp(s) * visible
    return e / (e.sum(-1, keepdim=True) + torch.finfo(torch.float32).tiny)


@TARGETS
@pytest.mark.parametrize("grads", [False, True])
@pytest.mark.parametrize("mask, proved", [(causal, "causal"), (padding, "mask[b, k]")])
@pytest.mark.parametrize("way", [multiplied, multiplied_floats, multiplied_after, multiplied_with_tiny])
def test_hidden_by_a_factor(way, mask, proved, grads, target):
    (site,) = same_as_eager(lambda q, k, v: way(scores(q, k), mask(q)) @ v, qkv(), grads, target).sites
    if way is multiplied_with_tiny and mask is padding:
        assert site.reason.name == "EMPTY_ROWS"
    else:
        assert (site.status, site.mask) == ("fused", proved), site.verdict


def in_part(s):
    e = torch.exp(s) * torch.linspace(0, 1, S, device=s.device)
    return e / e.sum(-1, keepdim=True)


def large_eps(s):
    e = torch.exp(s)
    return e / (e.sum(-1, keepdim=True) + 1e-6)


def softmax_one(s):
    e = torch.exp(s)
    return e / (e.sum(-1, keepdim=True) + 1)


def other_sum(s):
    return torch.exp(s) / torch.exp(2 * s).sum(-1, keepdim=True)


def over_queries(s):
    e = torch.exp(s)
    return e / e.sum(-2, keepdim=True)


@pytest.mark.parametrize("way", [in_part, large_eps, softmax_one, other_sum, over_queries])
def test_what_is_no_softmax(way):
    report = same_as_eager(lambda q, k, v: way(scores(q, k)) @ v, qkv(), True)
    assert all(site.status == "rejected" for site in report.sites)


def test_weights_that_are_used():
    def attention(q, k, v):
        weights = shifted(scores(q, k))
        return weights @ v + weights.sum()

    report = same_as_eager(attention, qkv(), False)
    assert [site.reason.name for site in report.sites] == ["WEIGHTS_USED"]


@pytest.mark.parametrize("grads", [False, True])
@pytest.mark.parametrize("added", [False, True])
def test_nan_to_num(added, grads):
    def attention(q, k, v):
        s, visible = scores(q, k), padding(q)
        s = s + torch.where(visible, 0.0, INF) if added else s.masked_fill(~visible, INF)
        return s.softmax(-1).nan_to_num(0.0) @ v

    (site,) = same_as_eager(attention, qkv(), grads).sites
    assert (site.status, site.reason and site.reason.name) == (("rejected", "EMPTY_ROWS") if added else ("fused", None))


def test_nan_to_some_other_number():
    report = same_as_eager(lambda q, k, v: scores(q, k).softmax(-1).nan_to_num(1.0) @ v, qkv(), True)
    assert [site.reason.name for site in report.sites] == ["WEIGHTS_OP"]


@TARGETS
@pytest.mark.parametrize("grads", [False, True])
@pytest.mark.parametrize("fill", [INF, -1e9])
@pytest.mark.parametrize("mask, proved", [(causal, "causal"), (padding, "mask[b, k]")])
def test_hidden_again_after_the_softmax(mask, proved, fill, grads, target):
    def attention(q, k, v):
        hidden = ~mask(q)
        return scores(q, k).masked_fill(hidden, fill).softmax(-1).masked_fill(hidden, 0.0) @ v

    (site,) = same_as_eager(attention, qkv(), grads, target).sites
    assert (site.status, site.mask) == ("fused", proved), site.verdict


@pytest.mark.parametrize("case", ["never before", "another", "the opposite", "by a number", "of several"])
def test_hidden_after_the_softmax_otherwise(case):
    def attention(q, k, v):
        s, hidden = scores(q, k), ~padding(q)
        before = {"never before": None, "another": ~causal(q), "the opposite": ~hidden}.get(case, hidden)
        if case == "of several":
            s = s.masked_fill(torch.arange(S, device=q.device) > 5, -1e9)
        s = s if before is None else s.masked_fill(before, -1e9)
        return s.softmax(-1).masked_fill(hidden, 0.5 if case == "by a number" else 0.0) @ v

    (site,) = same_as_eager(attention, qkv(), True).sites
    reason = {"of several": "EMPTY_ROWS", "by a number": "WEIGHTS_OP"}.get(case)
    assert (site.reason and site.reason.name) == reason  # else the values are hidden, as they differ by key alone

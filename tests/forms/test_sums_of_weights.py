"""Weights of several softmaxes that are added up in front of the values, and weights that several products use."""

import pytest
import torch
import torch.nn.functional as F

from fa3_inductor import Reason

from .harness import assert_as_good_as_eager, fuse, run

B, H, S, D = 2, 4, 12, 8
TARGETS = pytest.mark.parametrize("target", ["reference", "sdpa"])


def weights_of(q, k):
    return (q @ k.mT * 0.3).softmax(-1)


def differential(q, k, v, factor):
    """timm's and the paper's own code: the heads come in pairs."""
    weights = weights_of(q, k).view(B, H, 2, S, S)
    return (weights[:, :, 0] - factor * weights[:, :, 1]) @ v


def differential_causal(q, k, v, factor):
    hidden = torch.ones(S, S, dtype=torch.bool).triu(1)
    scores = (q @ k.mT * 0.3).masked_fill(hidden, float("-inf"))
    weights = F.softmax(scores, -1, dtype=torch.float32).type_as(q).view(B, H, 2, S, S)
    return torch.einsum("bhqk,bhkd->bqhd", weights[:, :, 0] - weights[:, :, 1] * factor, v)


def unbound(q, k, v, factor):
    first, second = weights_of(q, k).unflatten(1, (H, 2)).unbind(2)
    return (first - factor * second) @ v


def halves(q, k, v, factor):
    first, second = weights_of(q, k).chunk(2, dim=1)
    return torch.matmul(first - factor * second, v)


def mean_of_pairs(q, k, v, factor):
    weights = weights_of(q, k).view(B, H, 2, S, S)
    return (weights[:, :, 0] + weights[:, :, 1]) / 2 @ v * factor


def paired():
    return [torch.randn(B, 2 * H, S, D), torch.randn(B, 2 * H, S, D), torch.randn(B, H, S, 2 * D), torch.rand(1) + 0.5]


def two_softmaxes(q, k, v, q2, k2, factor):
    return (weights_of(q, k) - factor * weights_of(q2, k2)) @ v


def grouped(q, k, v, q2, k2, factor):
    k, k2, v = (x[:, :2].repeat_interleave(2, dim=1) for x in (k, k2, v))
    return (weights_of(q, k) + torch.sigmoid(factor) * weights_of(q2, k2)) @ v


def three(q, k, v, q2, k2, factor):
    return (weights_of(q, k) - (weights_of(q2, k2) - weights_of(q, k2)) * factor) @ v


def alone():
    return [*torch.randn(5, B, H, S, D).unbind(), torch.rand(H, 1, 1) + 0.5]


SUMS = {
    differential: paired, differential_causal: lambda: [*paired()[:3], torch.rand(H, 1, 1)], unbound: paired,
    halves: paired, mean_of_pairs: paired, two_softmaxes: alone, grouped: alone, three: alone,
}  # fmt: skip


@TARGETS
@pytest.mark.parametrize("fn", SUMS)
def test_sums(fn, target):
    args = SUMS[fn]()
    compiled, report = fuse(fn, target=target)
    ours, eager, exact = (
        run(f, args, dtype) for f, dtype in ((compiled, torch.float32), (fn, torch.float32), (fn, torch.float64))
    )
    (site,) = report.sites
    assert site.status == "fused" and site.form.endswith(f"sum of {3 if fn is three else 2}"), site.verdict
    assert_as_good_as_eager(ours, eager, exact, torch.float32)


def with_a_matrix(q, k, v, q2, k2, factor):
    return (weights_of(q, k) + factor) @ v


def with_itself(q, k, v, q2, k2, factor):
    weights = weights_of(q, k)
    return (weights + weights) @ v


def normalised_again(q, k, v, q2, k2, factor):
    weights = weights_of(q, k) + factor * weights_of(q2, k2)
    return weights / weights.sum(-1, keepdim=True) @ v


def without_scores(q, k, v, q2, k2, factor):
    """One of the two is no attention."""
    return (weights_of(q, k) + q2.mean(-1, keepdim=True).expand(B, H, S, S).softmax(-1)) @ v


def clamped(q, k, v, q2, k2, factor):
    return (weights_of(q, k) - weights_of(q2, k2)).relu() @ v


LEFT_ALONE = {
    with_a_matrix: Reason.WEIGHTS_OP, with_itself: Reason.WEIGHTS_OP, normalised_again: Reason.WEIGHTS_USED,
    without_scores: Reason.WEIGHTS_OP, clamped: Reason.WEIGHTS_OP,
}  # fmt: skip


@pytest.mark.parametrize("fn", LEFT_ALONE)
def test_what_is_another_sum(fn):
    args = alone()
    compiled, report = fuse(fn, target="reference")
    torch.testing.assert_close(compiled(*args), fn(*args))
    assert {s.reason for s in report.sites} == {LEFT_ALONE[fn]}, [s.verdict for s in report.sites]


def test_dropped_out_alike():
    def fn(q, k, v, q2, k2, factor):
        return F.dropout(weights_of(q, k) - factor * weights_of(q2, k2), 0.5) @ v

    _, report = compiled = fuse(fn, target="reference")
    compiled[0](*alone())
    assert {s.reason for s in report.sites} == {Reason.WEIGHTS_OP}


def two_values(q, k, v, u):
    weights = weights_of(q, k)
    return torch.cat([weights @ v, weights @ u], -1)


def two_values_in_another_order(q, k, v, u):
    """As in invariant point attention."""
    weights = weights_of(q, k).to(v.dtype)
    return torch.cat(
        [(weights @ v).transpose(1, 2).flatten(2), torch.einsum("bhqk,bhkd->bqhd", weights, u).flatten(2)], -1
    )


@TARGETS
@pytest.mark.parametrize("fn", [two_values, two_values_in_another_order])
def test_two_products(fn, target):
    args = [*torch.randn(3, B, H, S, D).unbind(), torch.randn(B, H, S, 3)]
    compiled, report = fuse(fn, target=target)
    ours, eager, exact = (
        run(f, args, dtype) for f, dtype in ((compiled, torch.float32), (fn, torch.float32), (fn, torch.float64))
    )
    assert [s.status for s in report.sites] == ["fused"] * 2, [s.verdict for s in report.sites]
    assert_as_good_as_eager(ours, eager, exact, torch.float32)


def test_a_product_that_needs_the_weights_keeps_both():
    """The second is over queries: no attention, so that the weights have to exist."""

    def fn(q, k, v, u):
        weights = weights_of(q, k)
        return torch.cat([weights @ v, weights.mT @ u], -1)

    args = [*torch.randn(3, B, H, S, D).unbind(), torch.randn(B, H, S, D)]
    compiled, report = fuse(fn, target="reference")
    torch.testing.assert_close(compiled(*args), fn(*args))
    assert {s.status for s in report.sites} == {"rejected"}, [s.verdict for s in report.sites]


def test_two_products_dropped_out_alike():
    def fn(q, k, v, u):
        weights = F.dropout(weights_of(q, k), 0.5)
        return torch.cat([weights @ v, weights @ u], -1)

    compiled, report = fuse(fn, target="reference")
    compiled(*torch.randn(4, B, H, S, D).unbind())
    assert [s.reason for s in report.sites] == [Reason.WEIGHTS_USED]

"""Scores that several attentions have in common: no longer needed once all of these are fused."""

import pytest
import torch

from fa3_inductor import Reason

from .harness import fuse

B, H, S, D = 2, 3, 11, 16
INF = float("-inf")


def operands():
    return list(torch.randn(4, B, H, S, D).unbind())


def both_directions(q, k, v, w):
    """Cross attention from either sequence to the other (BiCrossAttention, Grounding DINO)."""
    s = q @ k.mT * 0.25
    return s.softmax(-1) @ v, s.mT.softmax(-1) @ w


def two_values(q, k, v, w):
    s = q @ k.mT * 0.25
    return s.softmax(-1) @ v, (s + 1.0).softmax(-1) @ w


def sums_of_two_products(q, k, v, w):
    """Of two streams, each with the other's scores as a bias (LiLT)."""
    of_text, of_layout = q @ k.mT * 0.25, w @ v.mT * 0.5
    return (of_text + of_layout).softmax(-1) @ v, (of_layout + of_text).softmax(-1) @ w


def masked_otherwise(q, k, v, w):
    s = q @ k.mT * 0.25
    later = torch.ones(S, S, dtype=torch.bool).triu(1)
    return s.masked_fill(later, INF).softmax(-1) @ v, s.masked_fill(later.mT, INF).softmax(-1) @ w


def written_in_place_between(q, k, v, w):
    s = q @ k.mT
    s.mul_(0.25)
    first = s.softmax(-1) @ v
    s.masked_fill_(torch.ones(S, S, dtype=torch.bool).triu(1), INF)
    return first, s.softmax(-1) @ w


def padding(last_sees_nothing):
    lengths = torch.tensor([S - 4, 0 if last_sees_nothing else S])
    return (torch.arange(S) >= lengths[:, None])[:, None, None]


def handed_down(fill, last_sees_nothing=False):
    """RealFormer: masked scores are a bias of the next layer's, which the same mask hides."""

    def fn(q, k, v, w):
        hidden = padding(last_sees_nothing)
        a = (q @ k.mT * 0.25).masked_fill(hidden, fill)
        b = (w @ k.mT * 0.25 + a).masked_fill(hidden, fill)
        c = torch.where(padding(last_sees_nothing), fill, v @ w.mT * 0.25 + b)
        return a.softmax(-1) @ v, b.softmax(-1) @ w, c.softmax(-1) @ v

    return fn


def handed_down_in_place(q, k, v, w):
    hidden = padding(False)
    a = q @ k.mT * 0.25
    a.masked_fill_(hidden, -1e9)
    first = a.softmax(-1) @ v
    b = w @ k.mT * 0.25
    b += a
    b.masked_fill_(hidden, -1e9)
    return first, b.softmax(-1) @ w


def results(fn, args):
    """What a function returns, and the gradients of all of it."""
    leaves = [x.clone().requires_grad_() for x in args]
    out = fn(*leaves)
    return [*out, *torch.autograd.grad(sum((x * x.sin()).sum() for x in out), leaves)]


def compare(fn, target):
    args = operands()
    compiled, report = fuse(fn, target=target)
    torch.testing.assert_close(results(compiled, args), results(fn, args), atol=2e-5, rtol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*args), fn(*args), atol=2e-5, rtol=1e-4)
    return report


@pytest.mark.parametrize("target", ["sdpa", "reference"])
@pytest.mark.parametrize(
    "fn",
    [both_directions, two_values, sums_of_two_products, masked_otherwise, written_in_place_between],
    ids=lambda f: f.__name__,
)
def test_all_are_fused(fn, target):
    assert [s.status for s in compare(fn, target).sites] == ["fused"] * 4  # of two captures


@pytest.mark.parametrize("target", ["sdpa", "reference"])
@pytest.mark.parametrize("fill", [INF, -1e9, torch.finfo(torch.float32).min])
def test_masked_scores_handed_down(fill, target):
    assert [s.status for s in compare(handed_down(fill), target).sites] == ["fused"] * 6


def test_masked_scores_handed_down_in_place():
    assert [s.status for s in compare(handed_down_in_place, "reference").sites] == ["fused"] * 4


def test_masked_scores_handed_down_where_a_query_sees_nothing():
    """It sees the same weights everywhere, and its gradients end at the mask."""
    assert [s.status for s in compare(handed_down(-1e9, True), "reference").sites] == ["fused"] * 6


def test_scores_that_another_mask_hid_are_a_mask():
    def fn(q, k, v, w):
        hidden = padding(False)
        a = (q @ k.mT * 0.25).masked_fill(hidden, -1e9)
        b = (w @ k.mT * 0.25 + a).masked_fill(~hidden, -1e9)
        return a.softmax(-1) @ v, b.softmax(-1) @ w

    reasons = [s.reason for s in compare(fn, "reference").sites]
    assert reasons == [None, Reason.EMPTY_ROWS, None, None]  # in training, and without gradients


def and_returned(q, k, v, w):
    s = q @ k.mT * 0.25
    return s.softmax(-1) @ v, s.mT.softmax(-1) @ w, s


def and_another_needs_them(q, k, v, w):
    s = q @ k.mT * 0.25
    weights = s.mT.softmax(-1)
    return s.softmax(-1) @ v, weights @ w, weights.mean(1)


def one_after_the_other(q, k, v, w):
    """The third has to exist for its weights, so the second's scores do, and so the first's."""
    a = q @ k.mT * 0.25
    b = a + w @ v.mT * 0.5
    weights = (b * 2.0).softmax(-1)
    return a.softmax(-1) @ v, b.softmax(-1) @ w, weights @ v, weights


@pytest.mark.parametrize(
    "fn, reasons",
    [
        (and_returned, [Reason.SCORES_USED] * 2),
        (and_another_needs_them, [Reason.SCORES_USED, Reason.WEIGHTS_USED]),
        (one_after_the_other, [Reason.SCORES_USED] * 2 + [Reason.WEIGHTS_USED]),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_what_something_else_needs_stays(fn, reasons):
    assert sorted(s.reason.name for s in compare(fn, "reference").sites) == sorted(r.name for r in reasons * 2)


def test_of_one_that_is_left_to_eager_code_what_was_written_stays():
    """The second is refused only when it is to take its place: what the first wrote to the scores must not go."""

    def fn(q, k, v, w):
        s = q @ k.mT
        s.mul_(0.25)
        first = s.softmax(-1) @ v
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return first, s.mT.softmax(-1) @ w

    statuses = [s.status for s in compare(fn, "reference").sites]
    assert statuses == ["fused", "rejected"] * 2  # of two captures

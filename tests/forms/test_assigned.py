"""Assignments to the scores and weights by an index: near misses of a mask, which may be fused or not but not wrong."""

import pytest
import torch

from .test_regressions import B, H, S, qkv, same_as_eager

HIDDEN = torch.ones(S, S, dtype=torch.bool).triu(1)


def scores(q, k):
    return q @ k.mT * 0.25


def numbers_of_each(q, k, v, more):
    s = scores(q, k)
    s[:, :, HIDDEN] = more
    return s.softmax(-1) @ v


def number_in_a_tensor(q, k, v, more):
    s = scores(q, k)
    s[HIDDEN.expand_as(s)] = more[0, 0, :1]
    return s.softmax(-1) @ v


def learned_number(q, k, v, more):
    s = scores(q, k)
    s[:, :, HIDDEN] = more[0, 0, 0]
    return s.softmax(-1) @ v


def added_where_a_mask_is(q, k, v, more):
    s = scores(q, k)
    s[:, :, HIDDEN] += more
    return s.softmax(-1) @ v


def masks_of_two_axes(q, k, v, more):
    s = scores(q, k)
    s[torch.tensor([True, False]), :, :, torch.arange(S) > 5] = -1e9
    return s.softmax(-1) @ v


def rows_by_number(q, k, v, more):
    s = scores(q, k)
    s[:, :, torch.arange(3)] = -1e9
    return s.softmax(-1) @ v


def one_entry(q, k, v, more):
    s = scores(q, k)
    s[0, 1, 2, 3] = float("-inf")
    return s.softmax(-1) @ v


def whole_samples(q, k, v, more):
    s = scores(q, k)
    s[torch.tensor([True, False])] = -1e9
    return s.softmax(-1) @ v


def before_and_after(q, k, v, more):
    """The tensor is read before the assignment too."""
    s = scores(q, k)
    total = s.sum(-1, keepdim=True)
    s[:, :, HIDDEN] = -1e9
    return s.softmax(-1) @ v + total


def weights_by_a_number(q, k, v, more):
    weights = scores(q, k).softmax(-1).clone()
    weights[:, :, HIDDEN] = 0.01
    return weights @ v


def zeros_for_weights_that_are_numbers(q, k, v, more):
    weights = scores(q, k).masked_fill(HIDDEN, float("-inf")).softmax(-1)
    return torch.where(weights == weights, 0.0, weights) @ v


def zeros_for_nan_of_others(q, k, v, more):
    weights = scores(q, k).softmax(-1)
    return weights.masked_fill(torch.isnan(scores(q, k) / 0.0), 0.0) @ v


def zeros_of_another_shape(q, k, v, more):
    weights = scores(q, k)[:1].softmax(-1)
    return torch.where(weights.isnan(), weights.new_zeros(B, H, S, S), weights) @ v


def power_of_two_of_what_is_less_another_maximum(q, k, v, more):
    s = scores(q, k)
    e = torch.exp2(s - (2 * s).amax(-1, keepdim=True))
    return e / e.sum(-1, keepdim=True) @ v


@pytest.mark.parametrize("target", ["sdpa", "reference"])
@pytest.mark.parametrize(
    "fn",
    [
        numbers_of_each, number_in_a_tensor, learned_number, added_where_a_mask_is, masks_of_two_axes, rows_by_number,
        one_entry, whole_samples, before_and_after, weights_by_a_number, zeros_for_weights_that_are_numbers,
        zeros_for_nan_of_others, zeros_of_another_shape, power_of_two_of_what_is_less_another_maximum,
    ],
    ids=lambda f: f.__name__,
)  # fmt: skip
def test_right(fn, target):
    more = torch.randn(B, H, int(HIDDEN.sum()))
    same_as_eager(fn, [*qkv(), more], True, target)


def test_dynamic_shapes():
    def attention(q, k, v):
        s = scores(q, k)
        s[:, :, torch.ones(s.shape[-2:], dtype=torch.bool).triu(1)] = float("-inf")
        return s.softmax(-1) @ v

    import fa3_inductor

    torch._dynamo.reset()
    fa3_inductor.clear_reports()
    compiled = torch.compile(attention, backend="fa3_inductor", dynamic=True)
    for seqlen in (S, S + 9):
        args = torch.randn(3, B, H, seqlen, 16).unbind()
        torch.testing.assert_close(compiled(*args), attention(*args), atol=1e-5, rtol=1e-4)
    report = fa3_inductor.reports()
    assert [site.mask for site in report.sites] == ["causal"], report

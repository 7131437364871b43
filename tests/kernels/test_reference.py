"""The specification against float64 autograd of softmax attention written out the plain way."""

import math

import pytest
import torch

from fa3_inductor.kernels import output_like
from fa3_inductor.kernels.reference import attention_backward_reference, attention_reference


def plain(q, k, v, bias, allowed, scale):
    """softmax(...) @ v with zeros for rows that see no key, in whatever dtype comes in; differentiable."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("bhid,bhjd->bhij", q, k) * scale
    if bias is not None:
        scores = scores + bias
    empty = ~allowed.any(-1, keepdim=True)
    scores = scores.masked_fill(~allowed & ~empty, -math.inf)
    weights = scores.softmax(-1).masked_fill(empty, 0.0)
    lse = scores.logsumexp(-1).masked_fill(empty.squeeze(-1), -math.inf)
    return weights @ v, lse


def window(seqlen_q, seqlen_k, left, right):
    i, j = torch.meshgrid(torch.arange(seqlen_q), torch.arange(seqlen_k), indexing="ij")
    allowed = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool)
    if left is not None:
        allowed &= j >= i - left
    if right is not None:
        allowed &= j <= i + right
    return allowed


CASES = {
    "full": dict(),
    "causal": dict(right=0),
    "causal-bottom-right": dict(sq=9, sk=23, right=14),
    "causal-empty-rows": dict(sq=23, sk=9, right=-14),
    "window": dict(left=3, right=2),
    "window-off-the-end": dict(sq=30, sk=5, left=2, right=1),
    "gqa": dict(hq=6, hkv=2, right=0),
    "mqa": dict(hq=4, hkv=1),
    "values-wider": dict(dv=12),
    "one-query": dict(sq=1, sk=17),
    "one-key": dict(sq=17, sk=1),
    "bias": dict(bias=(2, 4, 16, 16)),
    "bias-per-head": dict(bias=(1, 4, 1, 16), hq=4, hkv=2),
    "bias-two-dims": dict(bias=(16, 1), right=0),
    "mask": dict(mask=(2, 1, 16, 16)),
    "key-padding": dict(mask=(2, 1, 1, 16), bias=(4, 16, 16), right=0),
}


def inputs(case):
    c = dict(b=2, hq=4, hkv=4, sq=16, sk=16, d=8, dv=8, left=None, right=None, bias=None, mask=None) | CASES[case]
    gen = torch.Generator().manual_seed(0)
    rand = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=gen)  # noqa: E731
    q, k, v = (
        rand(c["b"], c["hq"], c["sq"], c["d"]),
        rand(c["b"], c["hkv"], c["sk"], c["d"]),
        rand(c["b"], c["hkv"], c["sk"], c["dv"]),
    )
    bias = None if c["bias"] is None else rand(*c["bias"])
    mask = None if c["mask"] is None else rand(*c["mask"]) > 0.3
    allowed = window(c["sq"], c["sk"], c["left"], c["right"])
    if mask is not None:
        mask[0, :, 0] = False
        allowed = allowed & mask
    return (
        (q, k, v, bias, mask),
        allowed.expand(c["b"], c["hq"], -1, -1),
        dict(scale=0.3, window_left=c["left"], window_right=c["right"]),
    )


@pytest.mark.parametrize("case", CASES)
def test_forward_and_gradients(case):
    (q, k, v, bias, mask), allowed, kw = inputs(case)
    leaves = [x.clone().requires_grad_() for x in (q, k, v, bias) if x is not None]
    expected, expected_lse = plain(*leaves[:3], leaves[3] if bias is not None else None, allowed, kw["scale"])
    out, lse = attention_reference(q, k, v, bias, mask, **kw)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)

    dout = torch.randn_like(out)
    wanted = torch.autograd.grad(expected, leaves, dout)
    got = attention_backward_reference(dout, q, k, v, bias, mask, out, lse, **kw)
    assert (got[3] is None) == (bias is None)
    for g, w in zip(got, wanted):
        torch.testing.assert_close(g, w)


def test_rows_without_a_key_are_zero():
    (q, k, v, bias, mask), allowed, kw = inputs("causal-empty-rows")
    out, lse = attention_reference(q, k, v, **kw)
    empty = ~allowed.any(-1)
    assert empty.any() and not empty.all()
    assert (out[empty] == 0).all() and (lse[empty] == -math.inf).all()
    dq, *_ = attention_backward_reference(torch.ones_like(out), q, k, v, None, None, out, lse, **kw)
    assert (dq[empty] == 0).all()


def test_masks_by_minus_infinity_bias_and_by_bool_agree():
    (q, k, v, _, mask), _, kw = inputs("mask")
    bias = torch.zeros(mask.shape, dtype=q.dtype).masked_fill(~mask, -math.inf)
    for a, b in zip(attention_reference(q, k, v, bias, None, **kw), attention_reference(q, k, v, None, mask, **kw)):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_bad_numbers_spoil_their_row_only(value):
    (q, k, v, _, _), _, kw = inputs("full")
    clean, _ = attention_reference(q, k, v, **kw)
    q[1, 2, 5, 3] = value
    out, lse = attention_reference(q, k, v, **kw)
    assert out[1, 2, 5].isnan().all() and lse[1, 2, 5].isnan()
    out[1, 2, 5] = clean[1, 2, 5]
    torch.testing.assert_close(out, clean, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_rounds_once(dtype):
    (q, k, v, _, _), allowed, kw = inputs("gqa")
    q, k, v = (x.to(dtype) for x in (q, k, v))
    out, lse = attention_reference(q, k, v, **kw)
    expected, expected_lse = plain(q.double(), k.double(), v.double(), None, allowed, kw["scale"])
    assert out.dtype == dtype and lse.dtype == torch.float32
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)
    step = torch.finfo(dtype).eps
    assert ((out.double() - expected).abs() <= 0.51 * step * expected.abs() + 2e-6).all()


def test_output_layout_follows_the_order_of_heads_and_positions():
    bshd = torch.empty(2, 7, 3, 8).transpose(1, 2)
    assert output_like(bshd, 8).stride() == bshd.stride()
    packed = torch.empty(2, 7, 3, 3, 8)[:, :, 0].transpose(1, 2)
    assert output_like(packed, 16).stride() == torch.empty(2, 7, 3, 16).transpose(1, 2).stride()
    bhsd = torch.empty(2, 3, 7, 8)
    assert output_like(bhsd, 8).is_contiguous()

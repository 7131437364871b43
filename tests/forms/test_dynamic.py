"""Symbolic sizes: what was proved for one size is right for every other, and few compilations serve them all."""

import pytest
import torch
import torch.nn.functional as F

from .harness import fuse

INF = float("-inf")
D = 16
TARGETS = pytest.mark.parametrize("target", ["sdpa", "reference"])
MODES = pytest.mark.parametrize("dynamic", [True, None], ids=["dynamic", "automatic"])


def qkv(batch, heads, seqlen_q, seqlen_k=None, kv_heads=None):
    kv = batch, kv_heads or heads, seqlen_k or seqlen_q, D
    return [torch.randn(batch, heads, seqlen_q, D), torch.randn(kv), torch.randn(kv)]


def hide(q, k, hidden):
    return (q @ k.mT * 0.25).masked_fill(hidden, INF)


def full(q, k, v):
    return (q @ k.mT * 0.25).softmax(-1) @ v


def top_left(q, k, v):
    return hide(q, k, torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).triu(1)).softmax(-1) @ v


def bottom_right(q, k, v):
    n, m = q.shape[-2], k.shape[-2]
    return hide(q, k, torch.ones(n, m, dtype=torch.bool).triu(m - n + 1)).softmax(-1) @ v


def bottom_right_arange(q, k, v):
    n, m = q.shape[-2], k.shape[-2]
    return hide(q, k, torch.arange(m)[None] > torch.arange(m - n, m)[:, None]).softmax(-1) @ v


def sdpa_top_left(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril())


def sdpa_bottom_right(q, k, v):
    n, m = q.shape[-2], k.shape[-2]
    return F.scaled_dot_product_attention(q, k, v, torch.ones(n, m, dtype=torch.bool).tril(m - n))


def flat_bmm(q, k, v):
    b, h = q.shape[:2]
    q, k, v = (x.reshape(b * h, x.shape[2], D) for x in (q, k, v))
    return torch.bmm(torch.bmm(q, k.transpose(1, 2)).mul(0.25).softmax(-1), v).view(b, h, -1, D)


def grouped(q, k, v):
    b, h, s, d = k.shape
    k, v = (x[:, :, None].expand(b, h, 2, s, d).reshape(b, 2 * h, s, d) for x in (k, v))
    return full(q, k, v)


def same_as_eager(fn, calls, **options):
    compiled, report = fuse(fn, **options)
    with torch.no_grad():
        for args in calls:
            torch.testing.assert_close(compiled(*args), fn(*args), atol=2e-5, rtol=1e-4, equal_nan=True)
    return report


@TARGETS
@MODES
@pytest.mark.parametrize(
    "fn,mask", [(full, "full"), (top_left, "causal"), (sdpa_top_left, "causal"), (flat_bmm, "full")]
)
def test_batch_and_sequence(fn, mask, dynamic, target):
    calls = [qkv(2, 3, 7), qkv(2, 3, 9), qkv(4, 3, 9), qkv(3, 3, 40), qkv(5, 3, 17), qkv(6, 3, 12)]
    report = same_as_eager(fn, calls, dynamic=dynamic, target=target)
    assert {(s.status, s.mask) for s in report.sites} == {("fused", mask)}
    assert len(report.graphs) <= 3  # once static, once each for the sequence and the batch


RECTANGLES = [(7, 7), (7, 12), (5, 12), (5, 30), (30, 5), (12, 12), (12, 5), (1, 12), (12, 1), (9, 31), (31, 9)]


@TARGETS
@MODES
@pytest.mark.parametrize("fn", [full, top_left, bottom_right, bottom_right_arange, sdpa_top_left, sdpa_bottom_right])
def test_queries_and_keys_of_different_lengths(fn, dynamic, target):
    report = same_as_eager(fn, [qkv(2, 3, *lengths) for lengths in RECTANGLES], dynamic=dynamic, target=target)
    assert len(report.graphs) <= 6  # a length of one is a graph of its own


@pytest.mark.parametrize("first", [(7, 7), (5, 12)])
def test_bottom_right_is_never_taken_for_top_left(first):
    report = same_as_eager(bottom_right, [qkv(2, 3, *first), qkv(2, 3, 5, 30), qkv(2, 3, 30, 5)], dynamic=True)
    assert "causal (bottom-right)" in {s.mask for s in report.sites}


@TARGETS
def test_grouped_queries(target):
    calls = [qkv(b, 4, s, kv_heads=2) for b, s in ((2, 7), (3, 9), (4, 11), (5, 30))]
    report = same_as_eager(grouped, calls, target=target)
    assert {s.status for s in report.sites} == {"fused"}
    assert len(report.graphs) <= 3


@TARGETS
def test_padding_mask_of_symbolic_length(target):
    def fn(q, k, v, keep):
        return hide(q, k, ~keep[:, None, None]).softmax(-1) @ v

    calls = [[*qkv(b, 3, s), torch.rand(b, s) > 0.4] for b, s in ((2, 7), (3, 9), (4, 40))]
    report = same_as_eager(fn, calls, dynamic=True, target=target)
    assert [(s.status, s.mask) for s in report.sites] == [("fused", "key padding[b, k]")]


@TARGETS
def test_gradients_with_symbolic_sizes(target):
    compiled, report = fuse(top_left, dynamic=True, target=target)
    for batch, seqlen in ((2, 7), (3, 9), (4, 30)):
        leaves = [x.requires_grad_() for x in qkv(batch, 3, seqlen)]
        dout = torch.randn(batch, 3, seqlen, D)
        ours, eager = (torch.autograd.grad(f(*leaves), leaves, dout) for f in (compiled, top_left))
        torch.testing.assert_close(ours, eager, atol=1e-4, rtol=1e-3)
    assert [s.mask for s in report.sites] == ["causal"]


@TARGETS
def test_scale_given_as_a_float_argument(target):
    def fn(q, k, v, scale):
        return (q @ k.mT * scale).softmax(-1) @ v

    args = qkv(2, 3, 9)
    same_as_eager(fn, [[*args, x] for x in (0.3, 0.5, -2.0, 0.25)], target=target)


@TARGETS
def test_sequence_of_a_buffer_slice(target):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("keep", torch.ones(64, 64).tril()[None, None])

        def forward(self, q, k, v):
            n = q.shape[-2]
            return hide(q, k, self.keep[:, :, :n, :n] == 0).softmax(-1) @ v

    report = same_as_eager(Model(), [qkv(2, 3, s) for s in (7, 9, 30, 64)], dynamic=True, target=target)
    assert {(s.status, s.mask) for s in report.sites} == {("fused", "causal")}

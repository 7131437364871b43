"""Soft caps: found however they are spelled, run where something has them, and left alone where nothing has."""

import pytest
import torch

from fa3_inductor import Reason, plan

from .harness import assert_as_good_as_eager, fuse, run


def gemma(q, k, v):
    """transformers' Gemma 2: the scores divided by the cap, tanh, times the cap, then the mask."""
    scores = torch.matmul(q, k.transpose(2, 3)) * 0.25
    scores = torch.tanh(scores / 2.0) * 2.0
    later = torch.full((q.shape[2], k.shape[2]), torch.finfo(q.dtype).min, dtype=q.dtype).triu(1)
    return torch.softmax(scores + later, dim=-1, dtype=torch.float32).to(q.dtype) @ v


def scaled_query(q, k, v):
    return (3 * torch.tanh((q * 0.1) @ k.mT)).softmax(-1) @ v


def by_multiplication(q, k, v):
    return ((q @ k.mT * 0.25 * 0.5).tanh() * -4).softmax(-1) @ v


def biased(q, k, v):
    return (torch.tanh(q @ k.mT / 8) * 8 + k.sum(-1)[:, :, None] / 4).softmax(-1) @ v


CAPS = {gemma: (2.0, "causal"), scaled_query: (3.0, "full"), by_multiplication: (4.0, "full"), biased: (8.0, "bias")}


def qkv():
    return list((torch.randn(3, 2, 4, 23, 16) * 1.5).unbind())


def compare(compiled, fn, args, dtype, grads):
    ours, eager, exact = (run(f, args, d, grads) for f, d in ((compiled, dtype), (fn, dtype), (fn, torch.float64)))
    assert_as_good_as_eager(ours, eager, exact, dtype)


@pytest.mark.parametrize("fn", CAPS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_reference(fn, dtype):
    """Forward and every gradient."""
    compiled, report = fuse(fn, target="reference")
    compare(compiled, fn, qkv(), dtype, True)
    (site,) = report.sites
    assert (site.status, site.target, site.mask) == ("fused", "reference", CAPS[fn][1]), site.verdict


@pytest.mark.parametrize("fn, grads", [(f, g) for f in CAPS for g in (False, True) if f is not biased or not g])
def test_as_planned_for_hopper(fn, grads, monkeypatch):
    monkeypatch.setattr(plan, "_not_hopper", lambda device: None)
    seen = []
    monkeypatch.setattr(plan, "_kernel_name", lambda spec, *_: seen.append(spec.softcap) or "kernel")
    compiled, report = fuse(fn)
    compare(compiled, fn, qkv(), torch.bfloat16, grads)
    (site,) = report.sites
    assert (site.status, site.target) == ("fused", "hopper") and seen == [pytest.approx(CAPS[fn][0])]


def test_no_kernel_has_the_gradient_of_a_bias_beside_it(monkeypatch):
    monkeypatch.setattr(plan, "_not_hopper", lambda device: None)
    compiled, report = fuse(biased)
    compare(compiled, biased, qkv(), torch.bfloat16, True)
    (site,) = report.sites
    assert (site.status, site.reason) == ("rejected", Reason.SCORE_OP) and "gradient of a bias" in site.detail


def test_a_mask_beside_it_has_no_gradient(monkeypatch):
    """Though it comes from floats, as a bias would."""
    monkeypatch.setattr(plan, "_not_hopper", lambda device: None)

    def padded(q, k, v, padding):
        scores = torch.tanh(q @ k.mT / 8) * 2
        return scores.masked_fill(padding[:, None, None] == 0, torch.finfo(q.dtype).min).softmax(-1) @ v

    padding = (torch.arange(23) < torch.tensor([[23], [17]])).float()
    compiled, report = fuse(padded)
    args = qkv()
    ours, eager, exact = (
        run(lambda q, k, v, f=f: f(q, k, v, padding.to(q.dtype)), args, dtype)
        for f, dtype in ((compiled, torch.bfloat16), (padded, torch.bfloat16), (padded, torch.float64))
    )
    assert_as_good_as_eager(ours, eager, exact, torch.bfloat16)
    (site,) = report.sites
    assert (site.status, site.target) == ("fused", "hopper"), site.verdict


def test_sdpa_has_none():
    compiled, report = fuse(gemma)
    compare(compiled, gemma, qkv(), torch.float32, True)
    (site,) = report.sites
    assert (site.status, site.reason) == ("rejected", Reason.SCORE_OP) and "soft cap" in site.detail


def test_dropout_beside_it_is_not_lost():
    def dropped(q, k, v):
        return torch.dropout((torch.tanh(q @ k.mT) * 2).softmax(-1), 0.5, True) @ v

    compiled, report = fuse(dropped, target="reference")
    q, k = torch.randn(2, 1, 1, 512, 16).unbind()
    out = compiled(q, k, torch.ones(1, 1, 512, 16))
    assert [s.status for s in report.sites] == ["fused"]
    assert abs(out.mean() - 1) < 0.02 and 0.03 < out.std() < 0.1

"""Every spelling as it is planned and spliced for a Hopper GPU, computed on the CPU by the kernels' specification."""

import pytest
import torch

from fa3_inductor import plan

from . import forms
from .harness import assert_as_good_as_eager, fuse, run

FUSED = [f for f in forms.FORMS if f.reason is None]

# What the backward has kernels for. Other masks and biases run on scaled_dot_product_attention in training.
TRAINABLE_MASKS = ("full", "causal", "sliding window")


@pytest.fixture(autouse=True)
def as_on_hopper(monkeypatch):
    monkeypatch.setattr(plan, "_not_hopper", lambda device: None)


@pytest.mark.parametrize("form", FUSED, ids=lambda f: f.name)
def test_inference(form):
    """Without gradients every mask and bias runs on the kernel, whatever its shape and dtype."""
    compiled, report = fuse(form.fn)
    args, dtype = form.args(), torch.bfloat16
    ours, eager, exact = (
        run(f, args, d, False) for f, d in ((compiled, dtype), (form.fn, dtype), (form.fn, torch.float64))
    )
    assert_as_good_as_eager(ours, eager, exact, dtype)
    (site,) = report.sites
    assert (site.status, site.mask, site.target) == ("fused", form.mask, "hopper"), site.verdict


@pytest.mark.parametrize("form", [f for f in FUSED if f.grads], ids=lambda f: f.name)
def test_training(form):
    compiled, report = fuse(form.fn)
    args, dtype = form.args(), torch.bfloat16
    ours, eager, exact = (
        run(f, args, d, True) for f, d in ((compiled, dtype), (form.fn, dtype), (form.fn, torch.float64))
    )
    assert_as_good_as_eager(ours, eager, exact, dtype)
    (site,) = report.sites
    kernel = form.mask.startswith(TRAINABLE_MASKS) and "&" not in form.mask
    assert (site.status, site.mask, site.target) == ("fused", form.mask, "hopper" if kernel else "sdpa"), site.verdict


def shifted(q, k, v, fill):
    """A window in which the first rows see nothing."""
    seqlen = q.shape[2]
    later = torch.arange(seqlen) > torch.arange(seqlen)[:, None] - 3
    return torch.softmax((q @ k.transpose(-2, -1)).masked_fill(later, fill), dim=-1) @ v


def shifted_and_padded(q, k, v, fill, padding):
    seqlen = q.shape[2]
    hidden = (torch.arange(seqlen) > torch.arange(seqlen)[:, None]) | padding[:, None, None]
    return torch.softmax((q @ k.transpose(-2, -1)).masked_fill(hidden, fill), dim=-1) @ v


@pytest.mark.parametrize("grads", [False, True])
@pytest.mark.parametrize("fill", [float("-inf"), torch.finfo(torch.bfloat16).min])
@pytest.mark.parametrize("fn", [shifted, shifted_and_padded])
def test_rows_that_see_nothing(fn, fill, grads):
    q, k, v = torch.randn(3, 2, 4, 23, 16).unbind()
    args = [q, k, v, fill]
    if fn is shifted_and_padded:
        args.append(torch.arange(23) < torch.tensor([[4], [0]]))  # left padding: its queries see nothing
    compiled, report = fuse(fn)
    dtype = torch.bfloat16
    ours, eager, exact = (run(f, args, d, grads) for f, d in ((compiled, dtype), (fn, dtype), (fn, torch.float64)))
    (site,) = report.sites
    assert site.target == ("hopper" if fn is shifted or not grads else "sdpa"), site.verdict
    assert_as_good_as_eager(ours, eager, exact, dtype)

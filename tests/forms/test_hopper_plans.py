"""Every spelling as it is planned and spliced for a Hopper GPU, computed on the CPU by the kernels' specification."""

import pytest
import torch
import torch.utils.checkpoint

import fa3_inductor
from fa3_inductor import config, plan

from . import forms
from .harness import assert_as_good_as_eager, error, fuse, run

FUSED = [f for f in forms.FORMS if f.reason is None]


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
    assert (site.status, site.mask, site.target) == ("fused", form.mask, "hopper"), site.verdict


@pytest.mark.parametrize("way", ["torch", "config", "neither"])
def test_deterministic_algorithms(way):
    """The operator is told, whichever way it was asked for."""

    def fn(q, k, v):
        return torch.softmax(q @ k.mT, dim=-1) @ v

    args = list(torch.randn(3, 2, 4, 23, 16).unbind())
    graphs = []
    compiled, report = fuse(fn, graphs=graphs)
    torch.use_deterministic_algorithms(way == "torch")
    try:
        with config.patch(deterministic_backward=way == "config"):
            run(compiled, args, torch.bfloat16)
    finally:
        torch.use_deterministic_algorithms(False)
    (site,) = report.sites
    assert site.target == "hopper", site.verdict
    told = [n.args[13] for n in graphs[0].graph.nodes if n.target is torch.ops.fa3.attention.default]
    assert told == [way != "neither"]


def dropped(q, k, v):
    return torch.dropout(torch.softmax(q @ k.mT * 0.25, dim=-1), 0.4, True) @ v


def dropped_by_sdpa(q, k, v):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=0.4)


@pytest.mark.parametrize("fn", [dropped, dropped_by_sdpa])
def test_dropout(fn):
    """The backward drops what the forward has dropped."""
    q, k = torch.randn(2, 2, 4, 64, 16, dtype=torch.bfloat16).unbind()
    v = torch.eye(64, dtype=torch.bfloat16).expand(2, 4, 64, 64).clone().requires_grad_()
    compiled, report = fuse(fn)
    weights = compiled(q, k, v)
    (site,) = report.sites
    assert (site.status, site.target) == ("fused", "hopper") and "dropout" in site.kernel
    assert abs((weights == 0).double().mean() - 0.4) < 0.02
    again = compiled(q, k, v)
    assert not torch.equal(weights, again)
    dout = torch.randn_like(weights)
    (grad,) = torch.autograd.grad(weights, v, dout)
    torch.testing.assert_close(grad, weights.detach().mT @ dout, rtol=2e-2, atol=2e-2)


def test_dropout_in_a_checkpoint():
    """What is computed again in the backward drops the same weights again."""

    def fn(q, k, v):
        return torch.utils.checkpoint.checkpoint(dropped, q, k, v, use_reentrant=False)

    q, k = (x.requires_grad_() for x in torch.randn(2, 2, 4, 64, 16).unbind())
    v = torch.eye(64).expand(2, 4, 64, 64).clone().requires_grad_()
    torch._dynamo.reset()
    fa3_inductor.clear_reports()
    compiled = torch.compile(fn, backend="fa3_inductor", options={"target": "reference"})
    weights, again = compiled(q, k, v), compiled(q, k, v)
    assert [s.target for s in fa3_inductor.reports().sites] == ["reference"]
    assert not torch.equal(weights, again)
    dout = torch.randn_like(weights)
    (grad,) = torch.autograd.grad(weights, v, dout)
    torch.testing.assert_close(grad, weights.detach().mT @ dout)


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
    assert site.target == "hopper", site.verdict
    assert_as_good_as_eager(ours, eager, exact, dtype)


def additive(q, fill, shift, padding):
    """A float mask: `fill` above a diagonal, and once more over padding."""
    index = torch.arange(q.shape[2])
    mask = torch.zeros(len(index), len(index), dtype=q.dtype).masked_fill(index > index[:, None] + shift, fill)
    if padding is not None:
        over_padding = torch.zeros(2, 1, 1, len(index), dtype=q.dtype).masked_fill(padding[:, None, None], fill)
        mask = mask + over_padding
    return mask


def two_depths(q, fill, shift, padding):
    """A float mask that hides some keys more than others."""
    index = torch.arange(q.shape[2])
    deeper = torch.where(index > index[:, None] + shift + 4, 2 * fill, fill)
    mask = torch.where(index > index[:, None] + shift, deeper, 0.0).to(q.dtype)
    return mask if padding is None else torch.where(padding[:, None, None], 3 * fill, mask).to(q.dtype)


def by_sdpa(q, k, v, mask):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def by_softmax(q, k, v, mask):
    return (q @ k.mT * 0.25 + mask).softmax(-1) @ v


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("shift", [-3, 0, 2])
@pytest.mark.parametrize("fill", [float("-inf"), -1e9, -2e4])
@pytest.mark.parametrize("attend", [by_sdpa, by_softmax], ids=lambda f: f.__name__)
@pytest.mark.parametrize("make", [additive, two_depths], ids=lambda f: f.__name__)
def test_float_masks_that_hide_whole_rows(make, attend, fill, shift, padded):
    """A finite mask over a whole row leaves its keys their weights, by how deep each of them is hidden."""
    q, k, v = torch.randn(3, 2, 4, 23, 16).unbind()
    padding = torch.arange(23) < torch.tensor([[4], [0]]) if padded else None

    def fn(q, k, v, padding):
        return attend(q, k, v, make(q, fill, shift, padding))

    compiled, report = fuse(fn)
    dtype = torch.float16 if fill == -2e4 else torch.bfloat16
    args = [q, k, v, padding]
    ours, eager, exact = (run(f, args, d, False) for f, d in ((compiled, dtype), (fn, dtype), (fn, torch.float64)))
    assert [(s.status, s.target) for s in report.sites] == [("fused", "hopper")], [s.verdict for s in report.sites]
    visible = make(q, -1.0, shift, padding).eq(0).any(-1, keepdim=True).expand_as(exact.out)
    # Where every key is hidden, a sum in 16 bits may have lost the scores: as eager has it, or as it is exactly.
    hidden = [x.out[~visible].double() for x in (ours, eager, exact)]
    assert min(error(hidden[0], hidden[1]), error(hidden[0], hidden[2])) < 2e-2
    rows = [type(x)(x.out[visible], []) for x in (ours, eager, exact)]
    assert_as_good_as_eager(*rows, dtype)

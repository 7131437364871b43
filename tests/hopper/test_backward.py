"""The backward kernel and the gradients of `fa3::attention` on a Hopper GPU, against float64."""

import math

import pytest
import torch

from fa3_inductor import ops  # noqa: F401  (registers the operators)
from fa3_inductor.kernels import output_like
from fa3_inductor.kernels.formulas import NO_FORMULAS, is_shift
from fa3_inductor.kernels.reference import attention_backward_reference, attention_reference

if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
    pytest.skip("needs a Hopper GPU", allow_module_level=True)

from fa3_inductor.kernels import backward
from fa3_inductor.kernels.backward import attention_backward
from fa3_inductor.kernels.forward import attention_forward

from .problems import MASKS, SIZES, S, assert_as_good, drawn, eager, exactly, lies_like, make


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """What the kernels are to write is NaN before."""
    real = backward._buffers

    def poisoned(*args):
        buffers = real(*args)
        for x in buffers[:6]:
            x.fill_(math.nan if x.is_floating_point() else 99)
        return buffers

    monkeypatch.setattr(backward, "_buffers", poisoned)


def check(
    q, k, v, *, scale, window_left=None, window_right=None, bias=None, mask=None, softcap=None, sinks=None, seed=None,
    dropout_p=0.0, formulas=NO_FORMULAS, deterministic=False,
):  # fmt: skip
    """All gradients of one problem, the bias's too if it requires one."""
    window = dict(window_left=window_left, window_right=window_right)
    bias_grad = bias is not None and bias.requires_grad
    leaves = [x.detach().requires_grad_() for x in (q, k, v)] + [bias] * bias_grad
    theirs = eager(*leaves[:3], scale, window_right, window_left, bias, mask, softcap, sinks, seed, dropout_p, formulas)
    dout = torch.randn_like(theirs)
    theirs = torch.autograd.grad(theirs, leaves, dout)
    q, k, v, dout = (x.detach() for x in (q, k, v, dout))
    bias = None if bias is None else bias.detach()
    dropout = dict(seed=seed, dropout_p=dropout_p)
    out, lse = attention_forward(
        q, k, v, bias, mask, scale=scale, softcap=softcap, sinks=sinks, **window, **dropout, formulas=formulas
    )
    got = attention_backward(
        dout, q, k, v, bias, mask, out, lse, scale=scale, softcap=softcap, bias_grad=bias_grad, **window,
        **dropout, formulas=formulas, deterministic=deterministic,
    )  # fmt: skip
    double = [None if x is None else x.double() for x in (q, k, v, bias)]
    in_double = dict(scale=scale, softcap=softcap, formulas=formulas, **window)
    in_double |= exactly(dropout)[1]((*q.shape[:3], k.shape[2]))
    exact_out = attention_reference(*double, mask, sinks=None if sinks is None else sinks.double(), **in_double)
    exact = attention_backward_reference(dout.double(), *double, mask, *exact_out, **in_double)
    # Gradients that may be zero are differences of what they would be if out were.
    minuends = attention_backward_reference(
        dout.double(), *double, mask, torch.zeros_like(exact_out[0]), exact_out[1], **in_double
    )
    for x, ours, t, e, minuend in zip((q, k, v, bias), got, theirs, exact, minuends):
        assert ours.is_contiguous() if x is bias else lies_like(ours, output_like(x, x.shape[3]))
        size = 0.0 if minuend is None else minuend.abs().max().item()
        if seed is not None:  # then the subtrahend comes of an output that was rounded, be it of one key
            size *= 3
        if x is bias:  # a sum that may be zero, of numbers that were rounded to 16 bits
            ours = ours.to(q.dtype)
            whole = double[3].expand(*q.shape[:3], k.shape[2])
            terms = attention_backward_reference(dout.double(), *double[:3], whole, mask, *exact_out, **in_double)[3]
            terms_size = 6 * terms.square().sum_to_size(bias.shape).sqrt().max().item() + 1e-2
            size = terms_size if seed is None else max(size, terms_size)
        assert_as_good(ours, t, e, factor=2.0, size=size)


@pytest.mark.parametrize("seed", range(150))
def test_matches_float64(seed):
    for again in SIZES:
        (q, k, v), options = drawn(seed, again)
        bias = options.get("bias")
        score = options.get("formulas", NO_FORMULAS).score
        is_linear = "softcap" not in options and (not score or is_shift(score))
        if bias is not None and is_linear and seed % 2:
            bias.requires_grad_()
        check(q, k, v, **options)


@pytest.mark.parametrize("seed", range(1000, 1080))
def test_in_order_matches_float64(seed):
    for again in SIZES:
        (q, k, v), options = drawn(seed, again)
        check(q, k, v, **options, deterministic=True)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("window", [(None, None), (None, 0), (100, 50)], ids=str)
def test_ctas_that_take_several_tiles(head_dim, window, monkeypatch):
    """Those of keys that no query sees among them; and heads take the memory for dQ's sums in turn."""
    monkeypatch.setattr(backward, "multiprocessors", lambda device: 3)
    monkeypatch.setattr(backward, "_calls", {})
    q = make("bshd", 5, 4, 300, head_dim, torch.bfloat16)
    k, v = (make("bshd", 5, 2, 700, head_dim, torch.bfloat16) for _ in "kv")
    check(q, k, v, scale=head_dim**-0.5, window_left=window[0], window_right=window[1])


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize(
    "left, right, masked", [(None, None, False), (None, 0, False), (300, 0, False), (300, None, False), (None, 0, True)]
)
@pytest.mark.parametrize("heads, kv_heads, seqlen", [(16, 16, 3000), (8, 2, 1111), (40, 40, 512)])
def test_in_order_is_bit_for_bit(head_dim, left, right, masked, heads, kv_heads, seqlen):
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(2, n, seqlen, head_dim, device="cuda", dtype=torch.bfloat16) for n in (heads, kv_heads, kv_heads)
    )
    mask = torch.rand(2, 1, 1, seqlen, device="cuda") > 0.3 if masked else None
    options = dict(scale=0.1, window_left=left, window_right=right)
    out, lse = attention_forward(q, k, v, None, mask, **options)
    dout = torch.randn_like(out)
    first = attention_backward(dout, q, k, v, None, mask, out, lse, deterministic=True, **options)
    for _ in range(30):
        again = attention_backward(dout, q, k, v, None, mask, out, lse, deterministic=True, **options)
        assert all(torch.equal(a, b) for a, b in zip(first[:3], again[:3]))


GRADIENTS = {  # (b, hq, hkv, sq, sk, window_right[, window_left])
    "full": (2, 4, 4, 512, 512, None),
    "full-odd": (2, 3, 3, 257, 1000, None),
    "full-gqa": (1, 8, 2, 300, 300, None),
    "causal": (2, 4, 4, 640, 640, 0),
    "causal-gqa": (2, 8, 2, 333, 333, 0),
    "causal-mqa": (1, 6, 1, 127, 127, 0),
    "top-left-wide": (1, 4, 4, 100, 300, 0),
    "top-left-tall": (1, 4, 2, 300, 100, 0),
    "bottom-right-wide": (1, 4, 2, 100, 300, 200),
    "bottom-right-tall": (1, 4, 4, 300, 100, -200),
    "shift": (1, 4, 2, 200, 300, 37),
    "one-query": (2, 8, 2, 1, 300, 299),
    "one-key": (2, 4, 4, 300, 1, None),
    "window": (2, 4, 2, 640, 640, 0, 100),
    "window-tall": (1, 4, 4, 300, 100, 5, 20),
    "window-wide": (1, 4, 2, 100, 300, 40, 7),
    "window-bottom-right": (1, 2, 2, 100, 300, 200, -150),
    "left-only": (1, 2, 2, 200, 200, None, 30),
    "left-tall": (1, 4, 2, 300, 100, None, 250),
    "window-taller": (1, 2, 2, 300, 50, 0, 290),
    "nothing": (1, 2, 2, 200, 200, -100, 50),
}


@pytest.mark.parametrize("head_dim, head_dim_v", [(64, 64), (128, 128), (96, 96), (40, 24), (192, 128), (256, 256)])
@pytest.mark.parametrize("name", GRADIENTS)
def test_windows(name, head_dim, head_dim_v):
    b, hq, hkv, sq, sk, right, left = (*GRADIENTS[name], None)[:7]
    torch.manual_seed(0)
    shapes = ((hq, sq, head_dim), (hkv, sk, head_dim), (hkv, sk, head_dim_v))
    q, k, v = (make("bshd", b, h, s, d, torch.bfloat16) for h, s, d in shapes)
    check(q, k, v, scale=head_dim**-0.5, window_left=left, window_right=right)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("options", [{}, {"window_right": 0}, {"window_left": 200, "softcap": 5.0}], ids=str)
@pytest.mark.parametrize("name", MASKS)
def test_masks_that_leave_tiles_out(name, options, head_dim):
    torch.manual_seed(0)
    q = torch.randn(4, 4, S, head_dim, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(4, 2, S, head_dim, device="cuda", dtype=torch.bfloat16) for _ in "kv")
    check(q, k, v, scale=0.1, mask=MASKS[name].cuda(), **options)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(1, 4, 300, 333), (2, 4, 300, 333), (4, 1, 333), (300, 1), (2, 1, 1, 333), (1,)])
def test_gradient_of_a_bias(shape, dtype, head_dim):
    """Summed over the axes that the bias lacks."""
    q = torch.randn(2, 4, 300, head_dim, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(2, 2, 333, head_dim, device="cuda", dtype=torch.bfloat16) for _ in "kv")
    bias = torch.randn(shape, device="cuda", dtype=dtype, requires_grad=True)
    check(q, k, v, scale=0.1, bias=bias, window_right=33)
    if shape == (1, 4, 300, 333):
        check(q, k, v, scale=0.1, bias=bias.detach().expand(2, -1, -1, -1).requires_grad_(), window_right=33)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("left, right, masked", [(None, None, False), (None, 0, False), (400, 0, True)])
def test_repeats(head_dim, left, right, masked):
    """dk and dv bit for bit; dq is a sum in whatever order."""
    torch.manual_seed(0)
    q, k, v, dout = (torch.randn(3, 8, 1500, head_dim, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    mask = torch.rand(3, 1, 1500, 1500, device="cuda") > 0.2 if masked else None
    options = dict(scale=0.1, window_left=left, window_right=right)
    out, lse = attention_forward(q, k, v, None, mask, **options)
    first = attention_backward(dout, q, k, v, None, mask, out, lse, **options)
    for _ in range(1000):
        again = attention_backward(dout, q, k, v, None, mask, out, lse, **options)
        assert torch.equal(again[1], first[1]) and torch.equal(again[2], first[2])
        torch.testing.assert_close(again[0], first[0], rtol=2e-2, atol=1e-2)


def test_gradient_of_sinks():
    q, k, v = (torch.randn(2, 4, 300, 64, device="cuda", dtype=torch.bfloat16) for _ in "qkv")
    sinks = torch.randn(4, device="cuda", dtype=torch.bfloat16)
    leaves = [x.requires_grad_() for x in (q, k, v, sinks)]
    double = [x.detach().double().requires_grad_() for x in leaves]
    out, _ = torch.ops.fa3.attention(q, k, v, None, None, 0.1, None, 0, "hopper", None, sinks)
    dout = torch.randn_like(out)
    theirs = eager(q, k, v, 0.1, 0, sinks=sinks)
    exact, _ = attention_reference(*double[:3], scale=0.1, window_right=0, sinks=double[3])
    grads = (torch.autograd.grad(o, x, dout.to(o.dtype)) for o, x in ((out, leaves), (theirs, leaves), (exact, double)))
    for ours, baseline, want in zip(*grads):
        assert_as_good(ours, baseline, want, factor=2.0, size=1e-1)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize("both", [False, True])
def test_gradient_of_lse(head_dim, has_sinks, both):
    """Alone, and beside that of out; some rows see nothing."""
    torch.manual_seed(0)
    leaves = [torch.randn(2, 4, 300, head_dim, device="cuda", dtype=torch.bfloat16) for _ in "qkv"]
    leaves = [x.requires_grad_() for x in (*leaves, *[torch.randn(4, device="cuda")] * has_sinks)]
    double = [x.detach().double().requires_grad_() for x in leaves]
    results = torch.ops.fa3.attention(
        *leaves[:3], None, None, 0.1, None, -3, "hopper", None, leaves[3] if has_sinks else None
    )
    dout, dlse = torch.randn_like(results[0]), torch.randn(300, 2, 4, device="cuda").permute(1, 2, 0)

    def plain(q, k, v, *sinks):
        scores = (q @ k.mT * 0.1).masked_fill(torch.ones(300, 300, device="cuda").triu(-2) > 0, -math.inf)
        column = (x.to(q.dtype).view(1, -1, 1, 1).expand(2, -1, 300, 1) for x in sinks)
        joined = torch.cat([scores, *column], -1)[:, :, 0 if sinks else 3 :]
        out, lse = joined.softmax(-1)[..., :300] @ v, joined.float().logsumexp(-1)
        return out, lse.double() if q.dtype == torch.float64 else lse

    def gradients(out, lse, x):
        rows = out.shape[2]
        outputs, grads = [lse, out][: 1 + both], [dlse[:, :, -rows:], dout[:, :, -rows:]][: 1 + both]
        grads = [grad.to(output.dtype) for grad, output in zip(grads, outputs)]
        return torch.autograd.grad(outputs, x, grads, materialize_grads=True)

    baseline, exact = gradients(*plain(*leaves), leaves), gradients(*plain(*double), double)
    for ours, theirs, want in zip(gradients(*results, leaves), baseline, exact):
        assert_as_good(ours, theirs, want, factor=2.0, size=1.0)


def test_in_a_cuda_graph():
    q, k, v, dout = (torch.randn(2, 4, 1000, 64, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    out, lse = attention_forward(q, k, v, scale=0.1, window_right=0)
    backward._calls.clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        grads = attention_backward(dout, q, k, v, None, None, out, lse, scale=0.1, window_right=0)
    dout.copy_(torch.randn_like(dout))
    for _ in range(2):
        for x in grads[:3]:
            x.fill_(math.nan)
        graph.replay()
        expected = attention_backward(dout, q, k, v, None, None, out, lse, scale=0.1, window_right=0)
        for x, want in zip(grads[:3], expected):
            torch.testing.assert_close(x, want, rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_training_step(dynamic):
    """Forward and backward inside torch.compile, on views of one packed projection."""
    torch._dynamo.reset()
    weight = torch.randn(3 * 4 * 64, 256, device="cuda", dtype=torch.bfloat16).mul_(0.06).requires_grad_()

    def f(x):
        q, k, v = (x @ weight.T).unflatten(-1, (3, 4, 64)).permute(2, 0, 3, 1, 4)
        return torch.ops.fa3.attention(q, k, v, None, None, 0.125, None, 0, "hopper")[0].transpose(1, 2).flatten(2)

    compiled = torch.compile(f, dynamic=dynamic, fullgraph=True)
    for seqlen in (256, 321) if dynamic else (256,):
        x = torch.randn(2, seqlen, 256, device="cuda", dtype=torch.bfloat16)
        want, got = f(x), compiled(x)
        torch.testing.assert_close(got, want)
        dout = torch.randn_like(want)
        (want,), (got,) = (torch.autograd.grad(y, weight, dout) for y in (want, got))
        torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2 * want.abs().max().item())


@pytest.mark.parametrize("dout_layout", ["bhsd", "bshd", "packed", "misaligned", "strided", "expanded"])
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_gradients_of_any_dout(layout, dout_layout):
    """The gradient that arrives need not lie in memory as the output does."""
    q, k, v = (make(layout, 2, 3, 131, 64, torch.bfloat16).requires_grad_() for _ in range(3))
    dout = make(dout_layout, 2, 3, 131, 64, torch.bfloat16)
    out, _ = torch.ops.fa3.attention(q, k, v, None, None, 0.3, None, None, "hopper")
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    truth = torch.softmax(exact[0] @ exact[1].mT * 0.3, -1) @ exact[2]
    wanted = torch.autograd.grad(truth, exact, dout.double())
    for grad, want in zip(torch.autograd.grad(out, (q, k, v), dout), wanted):
        assert ((grad.double() - want).norm() / want.norm()).item() < 1e-2

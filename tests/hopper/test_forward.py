"""The forward kernel and the gradients of `fa3::attention` on a Hopper GPU, against float64.

The tolerance scales with what the dtype can do: at most 1.5 times the error of eager PyTorch attention in the same
dtype (gradients: twice), plus one rounding of the result.
"""

import math
import random

import pytest
import torch

from fa3_inductor import ops  # noqa: F401  (registers the operators)
from fa3_inductor.kernels import output_like
from fa3_inductor.kernels.reference import attention_backward_reference, attention_reference

if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
    pytest.skip("needs a Hopper GPU", allow_module_level=True)

from fa3_inductor.kernels import forward
from fa3_inductor.kernels.forward import attention_forward

LENGTHS = [1, 2, 63, 64, 127, 128, 129, 191, 257, 1000, 4097]
LAYOUTS = ["bhsd", "bshd", "packed", "padded", "misaligned", "offset", "strided", "expanded"]


def make(layout, b, h, s, d, dtype):
    """A random [b, h, s, d] tensor that lies in memory as `layout` says."""
    rand = lambda *shape: torch.randn(*shape, device="cuda", dtype=dtype)  # noqa: E731
    return {
        "bhsd": lambda: rand(b, h, s, d),
        "bshd": lambda: rand(b, s, h, d).transpose(1, 2),
        "packed": lambda: rand(b, s, 3, h, d)[:, :, 1].transpose(1, 2),
        "padded": lambda: rand(b, h, s, d + 8)[..., :d],
        "misaligned": lambda: rand(b, h, s, d + 1)[..., :d],
        "offset": lambda: rand(b * h * s * d + 1)[1:].view(b, h, s, d),
        "strided": lambda: rand(b, h, d, s).mT,
        "expanded": lambda: rand(1, h, s, d).expand(b, h, s, d),
    }[layout]()


def eager(q, k, v, scale, right):
    """What a model without fused attention computes, in the dtype of its inputs; zeros for rows that see no key."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = q @ k.mT * scale
    if right is not None:
        row = torch.arange(q.shape[2], device=q.device).unsqueeze(-1)
        scores = scores.masked_fill(torch.arange(k.shape[2], device=q.device) > row + right, -math.inf)
    empty = (scores == -math.inf).all(-1, keepdim=True)
    return scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0) @ v


def assert_as_good(got, baseline, exact, factor=1.5, size=0.0):
    """The error of `got` is at most `factor` times that of `baseline`, at its worst and on average.

    Beyond that one rounding is allowed: of the largest number in `exact`, or of the terms that it is a difference of,
    should it be zero: `size` says how large those are.
    """
    assert got.shape == exact.shape
    rounding = torch.finfo(got.dtype).eps / 2 * max(exact.abs().max().item(), size)
    ours, theirs = (got.double() - exact).abs(), (baseline.double() - exact).abs()
    assert ours.max().item() <= factor * theirs.max().item() + rounding
    assert ours.square().mean().sqrt().item() <= factor * theirs.square().mean().sqrt().item() + rounding / 4


def drawn(seed):
    """A random problem: operands, scale, window_right."""
    pick = random.Random(seed)
    d, dtype = pick.choice([64, 128]), pick.choice([torch.bfloat16, torch.float16])
    b = pick.choice([1, 2, 3])
    hq, hkv = pick.choice([(1, 1), (3, 3), (8, 2), (5, 1)])
    sq = pick.choice(LENGTHS)
    sk = sq if pick.random() < 0.3 else pick.choice(LENGTHS)
    right = pick.choice([None, 0, sk - sq, pick.randint(-sq - 1, sk + 1)])
    torch.manual_seed(seed)
    q = make(pick.choice(LAYOUTS), b, hq, sq, d, dtype)
    k, v = (make(pick.choice(LAYOUTS), b, hkv, sk, d, dtype) for _ in "kv")
    return (q, k, v), pick.choice([d**-0.5, 0.02, 0.7]), right


@pytest.mark.parametrize("seed", range(60))
def test_matches_float64(seed):
    (q, k, v), scale, right = drawn(seed)
    out, lse = attention_forward(q, k, v, scale=scale, window_right=right)
    exact, exact_lse = attention_reference(*(x.double() for x in (q, k, v)), scale=scale, window_right=right)
    assert out.stride() == output_like(q, q.shape[3]).stride() and lse.is_contiguous()
    assert_as_good(out, eager(q, k, v, scale, right), exact)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("right", [None, 0, 300, -300, -2000], ids=str)
def test_writes_all_of_the_output_and_nothing_else(head_dim, right):
    q, k, v = (torch.randn(2, 2, 1000, head_dim, device="cuda", dtype=torch.bfloat16) for _ in "qkv")
    wide = torch.full((2, 2, 1192, head_dim), 7.0, device="cuda", dtype=torch.bfloat16)
    out, lse = wide[:, :, :1000], torch.full((2, 2, 1000), math.nan, device="cuda")
    out.fill_(math.nan)
    forward.launch(*forward.launch_arguments(q, k, v, out, lse, 0.1, right))
    expected, expected_lse = attention_forward(q, k, v, scale=0.1, window_right=right)
    assert torch.equal(out, expected) and torch.equal(lse, expected_lse)
    assert not out.isnan().any() and (wide[:, :, 1000:] == 7.0).all()


SCHEDULES = {  # heads, seqlen, head_dim, right -> section, paired, as for the 132 SMs of an H100 SXM or H200
    "pairs in a head": (64, 1024, 128, 0, 1, 1),
    "pairs over two heads": (74, 1300, 64, 0, 2, 1),
    "pairs of short tiles": (66, 500, 64, 0, 1, 1),
    "longest first": (7, 700, 128, 0, 7, 0),
    "longest first in sections": (21, 10000, 64, 0, 11, 0),
    "full": (70, 700, 64, None, 1, 0),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules(name):
    heads, seqlen, head_dim, right, section, paired = SCHEDULES[name]
    q, k, v = (torch.randn(1, heads, seqlen, head_dim, device="cuda", dtype=torch.bfloat16) for _ in "qkv")
    out, lse = torch.full_like(q, math.nan), torch.full((1, heads, seqlen), math.nan, device="cuda")
    grid, args = forward.launch_arguments(q, k, v, out, lse, 0.1, right, sm_count=132)
    assert args[10:12] == (section, paired)
    forward.launch(grid, args)
    for part in torch.arange(heads).split(4):  # float64 scores of a few heads at a time
        part_of = [x[:, part] for x in (q, k, v)]
        exact, exact_lse = attention_reference(*(x.double() for x in part_of), scale=0.1, window_right=right)
        assert_as_good(out[:, part], eager(*part_of, 0.1, right), exact)
        torch.testing.assert_close(lse[:, part].double(), exact_lse, rtol=1e-5, atol=1e-4)


def test_rows_that_see_no_key():
    q, k, v = (torch.randn(1, 2, 300, 64, device="cuda", dtype=torch.float16) for _ in "qkv")
    out, lse = attention_forward(q, k, v, scale=0.1, window_right=-77)
    assert (out[:, :, :77] == 0).all() and (lse[:, :, :77] == -math.inf).all()
    assert lse[:, :, 77:].isfinite().all()


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("right", [None, 0])
@pytest.mark.parametrize("operand", ["q", "k", "v"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_bad_numbers_go_where_they_go_in_eager(head_dim, right, operand, value):
    torch.manual_seed(0)
    xs = {n: torch.randn(1, 2, 400, head_dim, device="cuda", dtype=torch.bfloat16) for n in "qkv"}
    position = 399 if operand == "v" and right == 0 else 150  # 0 * inf: what a causal mask hides differs by tile
    xs[operand][0, 1, position, 5] = value
    out, lse = attention_forward(*xs.values(), scale=0.1, window_right=right)
    exact, exact_lse = attention_reference(*(x.double() for x in xs.values()), scale=0.1, window_right=right)
    if operand == "v" and right == 0:
        out, exact = out[:, :, 384:], exact[:, :, 384:]
        out, exact = (torch.cat([x[:, :1].flatten(), x[:, 1, -1].flatten()]) for x in (out, exact))
    assert exact.isfinite().logical_not().any()
    assert torch.equal(out.isnan(), exact.isnan()) and torch.equal(out.isinf(), exact.isinf())
    assert torch.equal(lse.isnan(), exact_lse.isnan())


@pytest.mark.parametrize("head_dim", [64, 128])
def test_scores_of_minus_infinity_hide_a_tile_only(head_dim):
    """Every key of the last tiles scores -inf: rows must recover once finite scores come."""
    q, k, v = (torch.randn(1, 1, 512, head_dim, device="cuda", dtype=torch.bfloat16) for _ in "qkv")
    q[..., 0], k[..., 0] = 1.0, 0.0
    k[:, :, 200:, 0] = -math.inf
    out, lse = attention_forward(q, k, v, scale=0.1)
    expected, expected_lse = attention_forward(q, k[:, :, :200], v[:, :, :200], scale=0.1)
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(lse, expected_lse)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("right", [None, 0])
def test_repeats_bit_for_bit(head_dim, right):
    q, k, v = (torch.randn(3, 8, 1500, head_dim, device="cuda", dtype=torch.bfloat16) for _ in "qkv")
    first = attention_forward(q, k, v, scale=0.1, window_right=right)
    for _ in range(200):
        again = attention_forward(q, k, v, scale=0.1, window_right=right)
        assert torch.equal(again[0], first[0]) and torch.equal(again[1], first[1])


def test_refuses_what_it_cannot_do():
    q = torch.randn(1, 2, 64, 96, device="cuda", dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="head_dim 64 and 128, not 96"):
        attention_forward(q, q, q, scale=0.1)


GRADIENTS = {  # (b, hq, hkv, sq, sk, window_right)
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
}


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients(name, head_dim):
    b, hq, hkv, sq, sk, right = GRADIENTS[name]
    torch.manual_seed(0)
    scale = head_dim**-0.5
    leaves = [make("bshd", b, h, s, head_dim, torch.bfloat16) for h, s in ((hq, sq), (hkv, sk), (hkv, sk))]
    leaves = [x.requires_grad_() for x in leaves]
    out, _ = torch.ops.fa3.attention(*leaves, None, None, scale, None, right, "hopper")
    dout = torch.randn_like(out)
    got = torch.autograd.grad(out, leaves, dout)
    theirs = torch.autograd.grad(eager(*leaves, scale, right), leaves, dout)
    exact_in = [x.detach().double() for x in leaves]
    exact_out = attention_reference(*exact_in, scale=scale, window_right=right)
    exact = attention_backward_reference(
        dout.double(), *exact_in, None, None, *exact_out, scale=scale, window_right=right
    )
    for x, g, t, e in zip(leaves, got, theirs, exact):
        assert g.stride() == output_like(x, head_dim).stride()
        assert_as_good(g, t, e, factor=2.0, size=1e-2)


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

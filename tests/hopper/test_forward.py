"""The forward kernel and the gradients of `fa3::attention` on a Hopper GPU, against float64.

The tolerance scales with what the dtype can do: at most 1.5 times the error of eager PyTorch attention in the same
dtype (gradients: twice), plus one rounding of the result.
"""

import concurrent.futures
import math
import random

import pytest
import torch

from fa3_inductor import ops  # noqa: F401  (registers the operators)
from fa3_inductor.kernels import output_like
from fa3_inductor.kernels.reference import attention_backward_reference, attention_reference

if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
    pytest.skip("needs a Hopper GPU", allow_module_level=True)

from fa3_inductor.kernels import forward, launch
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


def eager(q, k, v, scale, right, left=None, bias=None, mask=None, softcap=None, sinks=None):
    """What a model without fused attention computes, in the dtype of its inputs; zeros for rows that see no key."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = q @ k.mT * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.to(q.dtype)
    row = torch.arange(q.shape[2], device=q.device).unsqueeze(-1)
    column = torch.arange(k.shape[2], device=q.device)
    if right is not None:
        scores = scores.masked_fill(column > row + right, -math.inf)
    if left is not None:
        scores = scores.masked_fill(column < row - left, -math.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(q.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
        return scores.softmax(-1)[..., :-1] @ v
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


HEAD_DIMS = [8, 16, 40, 64, 64, 72, 96, 128, 128, 160, 192, 256]


def drawn(seed):
    """A random problem: q, k, v and the options of attention_forward."""
    pick = random.Random(seed)
    torch.manual_seed(seed)
    d, dtype = pick.choice(HEAD_DIMS), pick.choice([torch.bfloat16, torch.float16])
    dv = pick.choice([d, d, pick.choice(HEAD_DIMS)])
    b = pick.choice([1, 2, 3])
    hq, hkv = pick.choice([(1, 1), (3, 3), (8, 2), (5, 1)])
    sq = pick.choice(LENGTHS)
    sk = sq if pick.random() < 0.3 else pick.choice(LENGTHS)
    q = make(pick.choice(LAYOUTS), b, hq, sq, d, dtype)
    k, v = make(pick.choice(LAYOUTS), b, hkv, sk, d, dtype), make(pick.choice(LAYOUTS), b, hkv, sk, dv, dtype)
    options = dict(
        scale=pick.choice([d**-0.5, 0.02, 0.5 * d**-0.5]),
        window_left=pick.choice([None, None, None, 0, 100, sq, -5]),
        window_right=pick.choice([None, 0, sk - sq, pick.randint(-sq - 1, sk + 1)]),
    )
    some = lambda *sizes: [pick.choice([1, size, size]) for size in sizes]  # noqa: E731
    if pick.random() < 0.3:
        options["bias"] = torch.randn(some(b, hq, sq, sk), device="cuda", dtype=pick.choice([dtype, torch.float32]))
    if pick.random() < 0.3:
        options["mask"] = torch.rand(some(b, hq, sq, sk), device="cuda") > 0.3
    if pick.random() < 0.2:
        options["softcap"] = pick.choice([1.0, 30.0])
    if pick.random() < 0.2:
        options["sinks"] = torch.randn(hq, device="cuda", dtype=pick.choice([dtype, torch.float32]))
    return (q, k, v), options


@pytest.mark.parametrize("seed", range(120))
def test_matches_float64(seed):
    (q, k, v), options = drawn(seed)
    out, lse = attention_forward(q, k, v, **options)
    in_double = {n: x.double() if torch.is_tensor(x) and x.is_floating_point() else x for n, x in options.items()}
    exact, exact_lse = attention_reference(*(x.double() for x in (q, k, v)), **in_double)
    assert out.stride() == output_like(q, v.shape[3]).stride() and lse.is_contiguous()
    left, right = options.pop("window_left"), options.pop("window_right")
    assert_as_good(out, eager(q, k, v, right=right, left=left, **options), exact)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("right", [None, 0, 300, -300, -2000], ids=str)
def test_writes_all_of_the_output_and_nothing_else(head_dim, right):
    q, k, v = (torch.randn(2, 2, 1000, head_dim, device="cuda", dtype=torch.bfloat16) for _ in "qkv")
    wide = torch.full((2, 2, 1192, head_dim), 7.0, device="cuda", dtype=torch.bfloat16)
    out, lse = wide[:, :, :1000], torch.full((2, 2, 1000), math.nan, device="cuda")
    out.fill_(math.nan)
    launched(q, k, v, out, lse, right)
    expected, expected_lse = attention_forward(q, k, v, scale=0.1, window_right=right)
    assert torch.equal(out, expected) and torch.equal(lse, expected_lse)
    assert not out.isnan().any() and (wide[:, :, 1000:] == 7.0).all()


def launched(q, k, v, out, lse, right, sm_count=None):
    """Runs the kernel on outputs of ours."""
    grid, args = forward.launch_arguments(q, k, v, out, lse, 0.1, None, right, sm_count=sm_count)
    tensors = [x for x in (q, k, v, out, lse, args[forward._ORDER]) if x is not None]
    run = launch.prepare(forward.forward_kernel, grid, args, tuple(tensors), {"num_warps": 4})
    run(torch.cuda.current_stream().cuda_stream, *(x.data_ptr() for x in tensors))


@pytest.mark.parametrize("heads, seqlen, head_dim", [(74, 1300, 64), (7, 700, 128), (21, 10000, 64), (3, 2000, 256)])
@pytest.mark.parametrize("right", [None, 0])
@pytest.mark.parametrize("sm_count", [132, 5])
def test_every_tile_of_many(heads, seqlen, head_dim, right, sm_count):
    q, k, v = (torch.randn(1, heads, seqlen, head_dim, device="cuda", dtype=torch.bfloat16) for _ in "qkv")
    out, lse = torch.full_like(q, math.nan), torch.full((1, heads, seqlen), math.nan, device="cuda")
    launched(q, k, v, out, lse, right, sm_count)
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


@pytest.mark.parametrize("head_dim", [64, 128, 96, 256])
@pytest.mark.parametrize("left, right, masked", [(None, None, False), (None, 0, False), (400, 0, True)])
def test_repeats_bit_for_bit(head_dim, left, right, masked):
    q, k, v = (torch.randn(3, 8, 1500, head_dim, device="cuda", dtype=torch.bfloat16) for _ in "qkv")
    options = dict(scale=0.1, window_left=left, window_right=right)
    if masked:
        options["mask"] = torch.rand(3, 1, 1500, 1500, device="cuda") > 0.2
    first = attention_forward(q, k, v, **options)
    for _ in range(1000):
        again = attention_forward(q, k, v, **options)
        assert torch.equal(again[0], first[0]) and torch.equal(again[1], first[1])


REFUSED = {
    "head_dim 8, 16, ... 256, not 20": lambda q: dict(q=q[..., :20], k=q[..., :20]),
    "do not fit together": lambda q: dict(v=q.half()),
    "bias is floating point": lambda q: dict(bias=torch.ones(64, 64, device="cuda", dtype=torch.int64)),
    "mask is bool": lambda q: dict(mask=torch.ones(64, 64, device="cuda")),
    "does not broadcast": lambda q: dict(mask=torch.ones(3, 64, 64, device="cuda", dtype=torch.bool)),
    "sinks are a contiguous .2.": lambda q: dict(sinks=torch.zeros(3, device="cuda")),
    "softcap is a positive number": lambda q: dict(softcap=0.0),
    "positive scale": lambda q: dict(scale=-1.0),
    "the operands are on cpu, cuda:0": lambda q: dict(sinks=torch.zeros(2)),
}


@pytest.mark.parametrize("words", REFUSED)
def test_refuses_what_it_cannot_do(words):
    q = torch.randn(1, 2, 64, 96, device="cuda", dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=words):
        attention_forward(**(dict(q=q, k=q, v=q, scale=0.1) | REFUSED[words](q)))


def test_other_addresses_and_streams():
    """A problem is prepared once and then only told where its tensors are."""
    forward._calls.clear()
    for _ in range(3):
        q, k, v = (torch.randn(2, 2, 300, 64, device="cuda", dtype=torch.bfloat16) for _ in "qkv")
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            out, _ = attention_forward(q, k, v, scale=0.1, window_right=0)
        torch.cuda.current_stream().wait_stream(stream)
        exact, _ = attention_reference(*(x.double() for x in (q, k, v)), scale=0.1, window_right=0)
        assert_as_good(out, eager(q, k, v, 0.1, 0), exact)
    assert len(forward._calls) == 1


def test_one_tensor_for_all_first():
    """What was prepared for q = k = v serves three tensors as well."""
    forward._calls.clear()
    q, k, v = (torch.randn(2, 2, 300, 64, device="cuda", dtype=torch.bfloat16) for _ in "qkv")
    attention_forward(q, q, q, scale=0.1)
    out, _ = attention_forward(q, k, v, scale=0.1)
    assert len(forward._calls) == 1
    exact, _ = attention_reference(*(x.double() for x in (q, k, v)), scale=0.1)
    assert_as_good(out, eager(q, k, v, 0.1, None), exact)


def test_in_a_thread_and_in_a_cuda_graph():
    q, k, v = (torch.randn(2, 40, 1000, 64, device="cuda", dtype=torch.bfloat16) for _ in "qkv")
    expected, _ = attention_forward(q, k, v, scale=0.1, window_right=0)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for out, _ in pool.map(lambda _: attention_forward(q, k, v, scale=0.1, window_right=0), range(100)):
            assert torch.equal(out, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = attention_forward(q, k, v, scale=0.1, window_right=0)
    out.fill_(math.nan)
    q.copy_(torch.randn_like(q))
    graph.replay()
    assert torch.equal(out, attention_forward(q, k, v, scale=0.1, window_right=0)[0])


def test_first_seen_in_a_cuda_graph():
    """What a problem needs for good is not in the graph's memory, and outlives the memory of what was prepared."""
    q, k, v = (torch.randn(3, 41, 1200, 64, device="cuda", dtype=torch.bfloat16) for _ in "qkv")
    attention_forward(*(x[:, :, :1100] for x in (q, k, v)), scale=0.1, window_right=0)
    forward._calls.clear()
    forward._orders.clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = attention_forward(q, k, v, scale=0.1, window_right=0)
    assert len(forward._orders) == 1
    forward._calls.clear()
    for _ in range(2):
        out.fill_(math.nan), lse.fill_(math.nan)
        q.copy_(torch.randn_like(q))
        graph.replay()
        assert all(map(torch.equal, (out, lse), attention_forward(q, k, v, scale=0.1, window_right=0)))


S = 1000
ROW, COLUMN = torch.arange(S)[:, None], torch.arange(S)
DOCUMENT = torch.arange(S) // 130
PADDED = torch.tensor([0, 1, 640, 777])[:, None, None, None]
MASKS = {  # what leaves KV tiles out, or leaves tiles in which nothing is hidden
    "padding": COLUMN < PADDED,
    "left padding": COLUMN >= PADDED,
    "documents": DOCUMENT[:, None] == DOCUMENT,
    "causal documents": (DOCUMENT[:, None] == DOCUMENT) & (ROW >= COLUMN),
    "padded documents": (DOCUMENT[:, None] == DOCUMENT) & (COLUMN < PADDED),
    "chunks and a prefix": (ROW // 256 == COLUMN // 256) | (COLUMN < 200),
    "a band": (COLUMN > ROW + 100) & (COLUMN < ROW + 700),
    "far from the diagonal": (COLUMN - ROW).abs() > 300,
    "one hole": (ROW != 500) | (COLUMN != 500),
    "one key": (ROW == 500) & (COLUMN == 500),
    "by head": torch.tensor([True, False, True, False])[:, None, None],
    "by query": ROW % 3 != 0,
}


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("options", [{}, {"window_right": 0}, {"window_left": 200, "softcap": 5.0}], ids=str)
@pytest.mark.parametrize("name", MASKS)
def test_masks_that_leave_tiles_out(name, options, head_dim):
    torch.manual_seed(0)
    mask = MASKS[name].cuda()
    q = torch.randn(4, 4, S, head_dim, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(4, 2, S, head_dim, device="cuda", dtype=torch.bfloat16) for _ in "kv")
    options = options | dict(scale=0.1, mask=mask)
    out, lse = attention_forward(q, k, v, **options)
    exact, exact_lse = attention_reference(*(x.double() for x in (q, k, v)), **options)
    left, right = options.pop("window_left", None), options.pop("window_right", None)
    assert_as_good(out, eager(q, k, v, right=right, left=left, **options), exact)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-4)
    again, _ = attention_forward(q, k, v, window_left=left, window_right=right, **options)
    assert torch.equal(out, again)


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


@pytest.mark.parametrize("head_dim, head_dim_v", [(64, 64), (128, 128), (96, 96), (192, 128), (256, 256)])
@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients(name, head_dim, head_dim_v):
    b, hq, hkv, sq, sk, right, left = (*GRADIENTS[name], None)[:7]
    torch.manual_seed(0)
    scale = head_dim**-0.5
    shapes = ((hq, sq, head_dim), (hkv, sk, head_dim), (hkv, sk, head_dim_v))
    leaves = [make("bshd", b, h, s, d, torch.bfloat16).requires_grad_() for h, s, d in shapes]
    out, _ = torch.ops.fa3.attention(*leaves, None, None, scale, left, right, "hopper")
    dout = torch.randn_like(out)
    got = torch.autograd.grad(out, leaves, dout)
    theirs = torch.autograd.grad(eager(*leaves, scale, right, left), leaves, dout)
    exact_in = [x.detach().double() for x in leaves]
    window = dict(window_left=left, window_right=right)
    exact_out = attention_reference(*exact_in, scale=scale, **window)
    exact = attention_backward_reference(dout.double(), *exact_in, None, None, *exact_out, scale=scale, **window)
    for x, g, t, e in zip(leaves, got, theirs, exact):
        assert g.stride() == output_like(x, x.shape[3]).stride()
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

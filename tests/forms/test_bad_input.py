"""Input that is odd, hostile or no attention at all: always the numbers that eager gives."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fa3_inductor import Reason

from .harness import fuse

INF = float("-inf")
MIN = torch.finfo(torch.float32).min
B, H, S, D = 2, 3, 11, 16
TORCH = tuple(map(int, torch.__version__.split(".")[:2]))

TARGETS = pytest.mark.parametrize("target", ["sdpa", "reference"])


def qkv(*shape):
    return [torch.randn(shape or (B, H, S, D)) for _ in range(3)]


def attention(q, k, v):
    return (q @ k.mT * 0.25).softmax(-1) @ v


def causal_sdpa(q, k, v):
    keep = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()
    return F.scaled_dot_product_attention(q, k, v, keep)


def run(fn, args, grads=True):
    args = [a.detach().clone() for a in args]
    leaves = [a.requires_grad_() for a in args if a.is_floating_point() and grads]
    out = fn(*args)
    if not leaves:
        return [out]
    return [out, *torch.autograd.grad(out, leaves, torch.linspace(-1, 1, out.numel()).view(out.shape).to(out.dtype))]


def same_as_eager(fn, args, grads=True, target="auto"):
    """The sites found, after comparing with eager."""
    compiled, report = fuse(fn, target=target)
    # (PyTorch's fused kernels have gradients of their own where a number hides all of a row.)
    with sdpa_kernel(SDPBackend.MATH) if target == "reference" else contextlib.nullcontext():
        expected = run(fn, args, grads)
    for ours, eager in zip(run(compiled, args, grads), expected, strict=True):
        torch.testing.assert_close(ours, eager, atol=1e-4, rtol=1e-3, equal_nan=True)
    return report.sites


# ------------------------------------------------------------------------------------------- sizes and dtypes


@TARGETS
@pytest.mark.parametrize("fn", [attention, causal_sdpa])
@pytest.mark.parametrize("head_dim", [1, 20, 300])
def test_unusual_head_dim(fn, head_dim, target):
    assert [s.status for s in same_as_eager(fn, qkv(B, H, S, head_dim), target=target)] == ["fused"]


@pytest.mark.parametrize("fn", [attention, causal_sdpa])
@pytest.mark.parametrize("shape", [(B, H, 0, D), (0, H, S, D), (B, 0, S, D), (B, H, S, 0)])
def test_a_size_of_zero(fn, shape):
    if fn is causal_sdpa and shape[1] == 0 and TORCH < (2, 13):
        pytest.skip("SDPA over no heads divides by zero on the CPU in torch 2.11, and takes the process with it")
    assert [s.reason for s in same_as_eager(fn, qkv(*shape))] == [Reason.EMPTY]


@pytest.mark.parametrize("lengths", [(5, 0), (0, 5)])
def test_no_keys_or_no_queries(lengths):
    seqlen_q, seqlen_k = lengths
    args = [torch.randn(B, H, seqlen_q, D), *(torch.randn(B, H, seqlen_k, D) for _ in range(2))]
    assert [s.reason for s in same_as_eager(attention, args)] == [Reason.EMPTY]


@TARGETS
@pytest.mark.parametrize("shape", [(1, 1, 1, D), (B, H, 1, D), (1, 1, S, D), (2, 2, 2, 2)])
def test_sizes_of_one_and_equal_sizes(shape, target):
    assert [s.status for s in same_as_eager(attention, qkv(*shape), target=target)] == ["fused"]


@pytest.mark.parametrize("fn", [attention, causal_sdpa])
def test_float64_is_left_alone(fn):
    assert [s.reason for s in same_as_eager(fn, [x.double() for x in qkv()])] == [Reason.DTYPE]


def test_integers_are_left_alone():
    def fn(q, k, v):
        return (q @ k.mT).float().softmax(-1) @ v.float()

    args = [torch.randint(-2, 3, (B, H, S, D)) for _ in range(3)]
    assert [s.reason for s in same_as_eager(fn, args)] == [Reason.DTYPE]


# ------------------------------------------------------------------------------------------- axes


def softmax_over_queries(q, k, v):
    return (q @ k.mT).softmax(-2) @ v


def softmax_over_heads(q, k, v):
    return (q @ k.mT).softmax(1) @ v


def weights_transposed(q, k, v):
    return (q @ k.mT).softmax(-1).mT @ v


@pytest.mark.parametrize("fn", [softmax_over_queries, softmax_over_heads, weights_transposed])
def test_softmax_over_another_axis_than_the_keys(fn):
    assert [s.reason for s in same_as_eager(fn, qkv(S, S, S, S))] == [Reason.SOFTMAX_DIM]


def key_not_transposed(q, k, v):
    return (q @ k).softmax(-1) @ v


def key_permuted(q, k, v):
    return (q @ k.permute(0, 2, 3, 1)).softmax(-1) @ v


def key_of_another_head(q, k, v):
    return (q @ k.permute(1, 0, 3, 2)).softmax(-1) @ v


def key_reshaped(q, k, v):
    return (q @ k.reshape(k.shape[0], k.shape[1], k.shape[3], k.shape[2])).softmax(-1) @ v


def both_from_one(q, k, v):
    return (q @ q.mT).softmax(-1) @ q


def transposed_all_through(q, k, v):
    return (v.mT @ (k @ q.mT).softmax(-2)).mT


@TARGETS
@pytest.mark.parametrize(
    "fn", [key_not_transposed, key_permuted, key_of_another_head, key_reshaped, both_from_one, transposed_all_through]
)
def test_equal_sizes_hide_no_permutation(fn, target):
    def all_used(q, k, v):
        return fn(q, k, v) + 0 * (k + v)

    same_as_eager(all_used, qkv(4, 4, 4, 4), target=target)


@TARGETS
def test_bmm_with_a_permuted_key(target):
    def fn(q, k, v):
        return torch.bmm(torch.bmm(q, k.permute(1, 2, 0)).softmax(-1), v)

    same_as_eager(fn, qkv(S, S, S), target=target)


@TARGETS
def test_five_dimensions_then_view_and_linear(target):
    def fn(q, k, v):
        return F.linear(attention(q, k, v).view(2, 3, 4, -1), torch.ones(7, 5 * D))

    assert [s.status for s in same_as_eager(fn, qkv(2, 3, 4, 5, D), target=target)] == ["fused"]


@TARGETS
@pytest.mark.parametrize("shapes", [(1, B, B), (B, 1, 1), (B, B, 1)])
def test_batch_is_broadcast(shapes, target):
    args = [torch.randn(n, H, S, D) for n in shapes]
    assert [s.status for s in same_as_eager(attention, args, target=target)] == ["fused"]


# ------------------------------------------------------------------------------------------- masks


@TARGETS
@pytest.mark.parametrize("shape", [(S,), (S, 1), (1, S), (1, 1), ()])
def test_masks_that_broadcast(shape, target):
    def fn(q, k, v, m):
        return (q @ k.mT * 0.25).masked_fill(m, -1e9).softmax(-1) @ v

    same_as_eager(fn, [*qkv(), torch.rand(shape) > 0.4], target=target)


@TARGETS
@pytest.mark.parametrize("fill", [INF, MIN, -1e9])
def test_a_computed_mask_that_is_causal_but_for_one_entry(fill, target):
    def fn(q, k, v):
        hidden = torch.ones(S, S, dtype=torch.bool).triu(1)
        hidden[2, 7] = False
        return (q @ k.mT * 0.25).masked_fill(hidden, fill).softmax(-1) @ v

    sites = same_as_eager(fn, qkv(), target=target)
    assert [(s.status, s.mask) for s in sites] == [("fused", "mask[k, q]")]


@TARGETS
def test_an_input_that_happens_to_be_causal_is_only_a_mask(target):
    def fn(q, k, v, hidden):
        return (q @ k.mT * 0.25).masked_fill(hidden, INF).softmax(-1) @ v

    hidden = torch.ones(S, S, dtype=torch.bool).triu(1)
    compiled, report = fuse(fn, target=target)
    args = qkv()
    torch.testing.assert_close(compiled(*args, hidden), fn(*args, hidden))
    hidden[2, 7] = False
    torch.testing.assert_close(compiled(*args, hidden), fn(*args, hidden))
    assert [s.mask for s in report.sites] == ["mask[k, q]"]


@TARGETS
@pytest.mark.parametrize("dtype,proved", [(torch.bfloat16, False), (torch.float16, True), (torch.float32, True)])
def test_positions_in_a_dtype_that_cannot_count_so_far(dtype, proved, target):
    def fn(q, k, v):
        i = torch.arange(300).to(dtype)
        return (q @ k.mT * 0.25).masked_fill(i[None] > i[:, None], -1e9).softmax(-1) @ v

    (site,) = same_as_eager(fn, qkv(1, 1, 300, D), target=target)
    assert (site.mask == "causal") == proved


def keep():
    """Some keys hidden, and in one row of one batch entry all of them."""
    keep = torch.rand(B, 1, S, S) > 0.3
    keep[0, :, :, 0] = keep[1, :, :2, 0] = keep[1, :, 3:, 0] = True
    keep[1, :, 2] = False
    return keep


def filled(fill):
    return lambda q, k, v, keep: (q @ k.mT * 0.25).masked_fill(~keep, fill).softmax(-1) @ v


def chosen(fill):
    return lambda q, k, v, keep: torch.where(keep, q @ k.mT * 0.25, fill).softmax(-1) @ v


def added(fill):
    return lambda q, k, v, keep: ((q @ k.mT * 0.25) + torch.zeros(keep.shape).masked_fill(~keep, fill)).softmax(-1) @ v


def times(fill):
    return lambda q, k, v, keep: ((q @ k.mT * 0.25) + (1.0 - keep.float()) * fill).softmax(-1) @ v


def filled_twice(fill):
    causal = torch.ones(S, S, dtype=torch.bool).triu(1)
    return lambda q, k, v, keep: (q @ k.mT).masked_fill(~keep, fill).masked_fill(causal, fill).softmax(-1) @ v


def sdpa_float(fill):
    return lambda q, k, v, keep: F.scaled_dot_product_attention(
        q, k, v, torch.zeros(keep.shape).masked_fill(~keep, fill)
    )


def sdpa_bool(fill):
    return lambda q, k, v, keep: F.scaled_dot_product_attention(q, k, v, keep)


EMPTY = [(f, x) for f in (filled, chosen, filled_twice, sdpa_float) for x in (INF, MIN, -1e9, -1e4)]
EMPTY += [(added, INF), (added, MIN), (times, MIN), (times, MIN / 2), (sdpa_bool, INF)]


@TARGETS
@pytest.mark.parametrize("grads", [True, False], ids=["train", "infer"])
@pytest.mark.parametrize("spelling,fill", EMPTY, ids=lambda x: getattr(x, "__name__", str(x)))
def test_a_row_with_every_key_masked(spelling, fill, grads, target):
    sites = same_as_eager(spelling(fill), [*qkv(), keep()], grads, target)
    assert [s.status for s in sites] == ["fused"]


@TARGETS
@pytest.mark.parametrize("fill", [-1e9, -1e4])
@pytest.mark.parametrize("spelling", [added, times])
def test_an_offset_over_a_whole_row_is_as_close_to_float64_as_eager(spelling, fill, target):
    # float32 rounds the scores of such a row away, more or less; the fused attention may be better, never worse.
    args = [*qkv(), keep()]
    exact = spelling(fill)(*(x.double() if x.is_floating_point() else x for x in args))
    eager, ours = spelling(fill)(*args), fuse(spelling(fill), target=target)[0](*args)
    assert (ours - exact).abs().max() <= 1.5 * (eager - exact).abs().max() + 1e-6


def test_every_key_of_every_query_masked():
    def fn(q, k, v):
        return (q @ k.mT).masked_fill(torch.ones(S, S, dtype=torch.bool), INF).softmax(-1) @ v

    assert [s.reason for s in same_as_eager(fn, qkv(), grads=False)] == [Reason.EMPTY_ROWS]


@TARGETS
def test_masks_that_overflow_to_infinity(target):
    def fn(q, k, v):
        return (q @ k.mT * 0.25 + torch.ones(S, S).triu(1) * MIN * 2).softmax(-1) @ v

    assert [s.mask for s in same_as_eager(fn, qkv(), target=target)] == ["causal"]


@TARGETS
def test_zero_times_infinity_is_nan(target):
    def fn(q, k, v):
        return (q @ k.mT * 0.25 + torch.ones(S, S).triu(1) * INF).softmax(-1) @ v

    assert torch.isnan(fn(*qkv())).all()
    assert "causal" not in {s.mask for s in same_as_eager(fn, qkv(), target=target)}


# ------------------------------------------------------------------------------------------- values


@TARGETS
def test_nan_and_infinity_in_the_operands(target):
    q, k, v = qkv()
    q[0, 0, 3, 2], k[1, 1, 0, 0], v[0, 2, 0, 0] = torch.nan, torch.inf, torch.nan
    if target == "sdpa" and not F.scaled_dot_product_attention(q, k, v)[0, 0, 3].isnan().any():
        pytest.skip("torch's own SDPA gives zeros for a query of NaN on this CPU")
    same_as_eager(attention, [q, k, v], grads=False, target=target)


@TARGETS
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_and_infinity_in_a_bias(value, target):
    bias = torch.zeros(S, S)
    bias[4, 5] = bias[7, 0] = value
    fn = lambda q, k, v, bias: (q @ k.mT * 0.25 + bias).softmax(-1) @ v  # noqa: E731
    out = same_as_eager(fn, [*qkv(), bias], grads=False, target=target)
    assert [s.status for s in out] == ["fused"]


@TARGETS
@pytest.mark.parametrize("scale", [-0.25, 0.0, 1e-3, 30.0])
def test_odd_scales(scale, target):
    same_as_eager(lambda q, k, v: (q @ k.mT * scale).softmax(-1) @ v, qkv(), target=target)


@pytest.mark.parametrize("scale", [0.3, -0.3, 0.0, 30.0])
def test_a_tensor_as_scale(scale):
    fn = lambda q, k, v, s: (q @ k.mT * s).softmax(-1) @ v  # noqa: E731
    assert [s.status for s in same_as_eager(fn, [*qkv(), torch.tensor(scale)])] == ["fused"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 10.0])
def test_the_gradient_of_a_tensor_as_scale(temperature, dtype):
    """It is a sum over the queries' gradients, rounded to 16 bits there: no further off than as written."""
    fn = lambda q, k, v, s: (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * s).softmax(-1) @ v  # noqa: E731
    compiled, report = fuse(fn)
    errors = torch.zeros(2, 5, dtype=torch.float64)
    for _ in range(8):
        args = *qkv(2, 3, 128, 32), temperature * torch.rand(3, 1, 1).add(0.5)
        args, dout = [x.to(dtype).requires_grad_() for x in args], torch.randn(2, 3, 128, 32).to(dtype)
        exact = [x.detach().double().requires_grad_() for x in args]
        want = results(fn, exact, dout.double())
        for row, f in enumerate((compiled, fn)):
            errors[row] += torch.stack([(x - y).norm() / y.norm() for x, y in zip(results(f, args, dout), want)])
    assert [site.status for site in report.sites] == ["fused"]
    assert (errors[0] < 1.5 * errors[1] + 1e-4).all(), errors


def results(fn, args, dout):
    out = fn(*args)
    return out.detach(), *torch.autograd.grad(out, args, dout)


def test_a_tensor_as_scale_in_float16():
    """Queries times a large number are infinite there, and their products with keys need not be."""
    fn = lambda q, k, v, s: (q @ k.mT * s).softmax(-1) @ v  # noqa: E731
    q, k, v = (x.half() for x in qkv())
    args = [q * 100, k * 1e-5, v, torch.tensor(2000.0)]
    (site,) = same_as_eager(fn, args, grads=False)
    assert site.reason == Reason.TENSOR_SCALE and fn(*args).isfinite().all()


def test_a_tensor_that_scales_more_than_the_product():
    for fn in (
        lambda q, k, v, s: ((q @ k.mT + 1.0 / (1 + q[..., :1])) * s).softmax(-1) @ v,
        lambda q, k, v, s: (torch.tanh(q @ k.mT) * s).softmax(-1) @ v,
        lambda q, k, v, s: (q @ k.mT * s.expand(S)).softmax(-1) @ v,
    ):
        reports = same_as_eager(fn, [*qkv(), torch.tensor(0.3)])
        assert [s.reason for s in reports if s.status == "rejected"] in ([], [Reason.TENSOR_SCALE])


# ------------------------------------------------------------------------------------------- no attention


@pytest.mark.parametrize(
    "fn",
    [
        lambda x, w: (x @ w).softmax(-1),
        lambda x, w: (x @ w).softmax(-1).topk(2).values,
        lambda x, w: F.cross_entropy(x @ w, torch.zeros(6, dtype=torch.long)),
        lambda x, w: x.softmax(-1) @ w,
    ],
    ids=["classifier", "router", "loss", "mixture of inputs"],
)
def test_a_softmax_that_is_no_attention_is_no_site(fn):
    assert same_as_eager(fn, [torch.randn(6, 16), torch.randn(16, 4)]) == []


def test_scores_used_twice():
    def fn(q, k, v):
        s = q @ k.mT * 0.25
        return s.softmax(-1) @ v + s.mean()

    assert [s.reason for s in same_as_eager(fn, qkv())] == [Reason.SCORES_USED]


def test_nested_tensors():
    def fn(q, k, v):
        return F.scaled_dot_product_attention(q, k, v)

    parts = [torch.randn(n, H, D) for n in (5, 9)]
    x = torch.nested.nested_tensor(parts, layout=torch.jagged).transpose(1, 2)
    compiled, report = fuse(fn)
    torch.testing.assert_close(compiled(x, x, x).values(), fn(x, x, x).values(), atol=1e-5, rtol=1e-5)
    assert not report.fused


@TARGETS
def test_a_mask_on_another_device(target):
    def fn(q, k, v):
        keep = torch.ones(S, S, dtype=torch.bool, device="meta").tril()
        return attention(q, k, v) * keep.dim()

    assert [s.status for s in same_as_eager(fn, qkv(), target=target)] == ["fused"]


@pytest.mark.parametrize("spelling", ["fill", "add"])
@pytest.mark.parametrize("target", ["reference", "sdpa"])
def test_a_row_of_nan_scores_is_not_taken_for_one_that_sees_nothing(target, spelling):
    def fn(q, k, v, mask):
        scores = q @ k.mT
        if spelling == "fill":
            scores = scores.masked_fill(~mask, -1e9)
        else:
            scores = scores + (1 - mask.float()) * torch.finfo(torch.float32).min
        return scores.softmax(-1) @ v

    q, k, v = torch.randn(3, 2, 3, 8, 16).unbind()
    q[1, 2, 5] = float("nan")
    mask = torch.rand(2, 1, 1, 8) > 0.3
    compiled, report = fuse(fn, target=target)
    out = compiled(q, k, v, mask)
    assert [s.status for s in report.sites] == ["fused"]
    assert torch.equal(out.isnan(), fn(q, k, v, mask).isnan()) and out.isnan().any()

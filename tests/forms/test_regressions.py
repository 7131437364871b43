"""Cases that the pass once got wrong, each the smallest that shows it."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fa3_inductor import Reason

from .harness import fuse

INF = float("-inf")
B, H, S, D = 2, 4, 23, 16


def qkv(heads=H, seqlen_k=S):
    return [torch.randn(B, heads, S, D), *(torch.randn(B, heads, seqlen_k, D) for _ in range(2))]


def plain(q, k, v):
    return (q @ k.mT * 0.25).softmax(-1) @ v


def bshd():
    return [torch.randn(B, S, H, D) for _ in range(3)]


def one_empty():
    return torch.arange(S)[None] < torch.tensor([[S], [0]])


def run(fn, args, grads):
    args = [a.detach().clone() if isinstance(a, torch.Tensor) else a for a in args]
    leaves = [a.requires_grad_() for a in args if isinstance(a, torch.Tensor) and a.is_floating_point() and grads]
    with torch.set_grad_enabled(grads):
        out = fn(*args)
    if not grads:
        return [out]
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out.dtype)
    return [out, *torch.autograd.grad(out, leaves, dout, allow_unused=True)]


def same_as_eager(fn, args, grads=True, target="auto", atol=1e-4):
    compiled, report = fuse(fn, target=target)
    for ours, eager in zip(run(compiled, args, grads), run(fn, args, grads), strict=True):
        assert (ours is None) == (eager is None), "a gradient that eager does not have, or the other way round"
        if eager is not None:
            torch.testing.assert_close(ours, eager, atol=atol, rtol=1e-3, equal_nan=True)
    return report


TARGETS = pytest.mark.parametrize("target", ["sdpa", "reference"])


def kv_prefix(q, k, v):
    return plain(q, k[:, :, :S], v[:, :, :S])


def head_prefix(q, k, v):
    return plain(q[:, :2], k[:, :2], v[:, :2])


def head_dim_prefix(q, k, v):
    return (q[..., :8] @ k[..., :8].mT * 0.25).softmax(-1) @ v[..., :8]


def batch_prefix(q, k, v):
    return plain(*(torch.cat([x, x + 1])[:3] for x in (q, k, v)))


def query_prefix(q, k, v):
    return plain(q[:, :, :7], k, v)


def packed_within_heads(q, k, v):
    x = torch.cat([q, k, v], -1)
    return plain(x[..., :D], x[..., D : 2 * D], x[..., 2 * D :])


@TARGETS
@pytest.mark.parametrize(
    "fn", [kv_prefix, head_prefix, head_dim_prefix, batch_prefix, query_prefix, packed_within_heads]
)
def test_a_prefix_is_not_the_whole_tensor(fn, target):
    args = qkv(seqlen_k=40) if fn is kv_prefix else qkv()
    assert [s.status for s in same_as_eager(fn, args, target=target).sites] == ["fused"]


@TARGETS
def test_the_prefix_of_a_mask_is_fused(target):
    def masked(q, k, v, m):
        return (q @ k.mT * 0.25).masked_fill(m[:, :, :S, :S], -1e9).softmax(-1) @ v

    report = same_as_eager(masked, [*qkv(), torch.rand(1, 1, 40, 40) > 0.4], target=target)
    assert [s.status for s in report.sites] == ["fused"], report


def test_sdpa_with_the_prefix_of_a_mask_on_the_reference():
    def masked(q, k, v, m):
        return F.scaled_dot_product_attention(q, k, v, m[:, :, :S, :S])

    same_as_eager(masked, [*qkv(), torch.rand(1, 1, 40, 40) > 0.4], target="reference")


def scores_without_grad(q, k, v):
    with torch.no_grad():
        s = q @ k.mT * 0.25
    return s.softmax(-1) @ v


def weights_without_grad(q, k, v):
    with torch.no_grad():
        p = (q @ k.mT * 0.25).softmax(-1)
    return p @ v


def query_scaled_without_grad(q, k, v):
    with torch.no_grad():
        q = q * 0.25
    return (q @ k.mT).softmax(-1) @ v


def key_transposed_without_grad(q, k, v):
    with torch.no_grad():
        k = k.transpose(-1, -2)
    return (q @ k * 0.25).softmax(-1) @ v


def value_cloned_without_grad(q, k, v):
    with torch.no_grad():
        v = v.clone()
    return plain(q, k, v)


def scale_without_grad(q, k, v):
    s = q @ k.mT
    with torch.no_grad():
        s = s * 0.25
    return s.softmax(-1) @ v


def grad_mode_set(q, k, v):
    torch.set_grad_enabled(False)
    s = q @ k.mT
    torch.set_grad_enabled(True)
    return s.softmax(-1) @ v


NO_GRAD = [scores_without_grad, weights_without_grad, query_scaled_without_grad, key_transposed_without_grad]
NO_GRAD += [value_cloned_without_grad, scale_without_grad, grad_mode_set]


@TARGETS
@pytest.mark.parametrize("fn", NO_GRAD)
def test_no_gradient_flows_out_of_a_no_grad_region(fn, target):
    same_as_eager(fn, qkv(), target=target)


@TARGETS
def test_no_gradient_flows_into_a_bias_made_without_grad(target):
    def fn(q, k, v, b):
        with torch.no_grad():
            m = b + torch.triu(torch.full((S, S), INF), 1)
        return (q @ k.mT * 0.25 + m).softmax(-1) @ v

    same_as_eager(fn, [*qkv(), torch.randn(S, S)], target=target)


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 0.25

    @staticmethod
    def backward(ctx, g):
        return g * 7


class Copied(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g * 7


FUNCTIONS = {
    "on the scores": lambda q, k, v: Scaled.apply(q @ k.mT).softmax(-1) @ v,
    "on the query": lambda q, k, v: (Scaled.apply(q) @ k.mT).softmax(-1) @ v,
    "a copy of the query": lambda q, k, v: plain(Copied.apply(q), k, v),
    "a copy of the value": lambda q, k, v: plain(q, k, Copied.apply(v)),
    "on the weights": lambda q, k, v: Copied.apply((q @ k.mT * 0.25).softmax(-1)) @ v,
}


@TARGETS
@pytest.mark.parametrize("fn", FUNCTIONS.values(), ids=FUNCTIONS)
def test_a_custom_backward_is_kept(fn, target):
    same_as_eager(fn, qkv(), target=target)


def fill_scaled_down(q, k, v, keep):
    return ((q @ k.mT).masked_fill(~keep[:, None, None], -1e4) / 2000).softmax(-1) @ v


def fill_negated(q, k, v, keep):
    return (-((q @ k.mT * 0.2).masked_fill(~keep[:, None, None], -1e9))).softmax(-1) @ v


@TARGETS
@pytest.mark.parametrize("fn", [fill_scaled_down, fill_negated])
def test_a_fill_that_no_longer_hides(fn, target):
    same_as_eager(fn, [*qkv(), torch.arange(S)[None] < torch.tensor([[S], [5]])], target=target)


def min_filled_then_narrowed(q, k, v, keep):
    s = (q @ k.mT * 0.25).float().masked_fill(~keep[:, None, None], torch.finfo(torch.float32).min)
    return s.to(q.dtype).softmax(-1) @ v


def min_added_then_narrowed(q, k, v, keep):
    s = (q @ k.mT * 0.25).float() + torch.where(keep[:, None, None], 0.0, torch.finfo(torch.float32).min)
    return s.to(q.dtype).softmax(-1) @ v


def min_filled_then_scaled_up(q, k, v, keep):
    return ((q @ k.mT).masked_fill(~keep[:, None, None], torch.finfo(torch.float32).min) * 4).softmax(-1) @ v


@TARGETS
@pytest.mark.parametrize("fn", [min_filled_then_narrowed, min_added_then_narrowed, min_filled_then_scaled_up])
def test_a_fill_that_overflows_makes_nan_in_an_empty_row(fn, target):
    args = qkv()
    if fn is not min_filled_then_scaled_up:
        args = [x.bfloat16() for x in args]
    same_as_eager(fn, [*args, one_empty()], target=target, atol=0.06)


@TARGETS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_sum_that_cannot_overflow_in_the_narrower_dtype(dtype, target):
    """Local LongT5 adds a float32 mask of -1e10, in bfloat16. In float16 that is -inf."""

    def fn(q, k, v, keep, bias):
        s = (q @ k.mT * 0.25).float() + (bias + torch.where(keep[:, None, None], 0.0, -1e10))
        return s.to(q.dtype).softmax(-1) @ v

    args = [*(x.to(dtype) for x in qkv()), one_empty(), torch.randn(S, S).to(dtype)]
    report = same_as_eager(fn, args, False, target, atol=0.06)
    assert [site.status for site in report.sites] == ["fused" if dtype == torch.bfloat16 else "rejected"]


def filled_then_biased(q, k, v, keep):
    s = (q @ k.mT * 0.25).masked_fill(~keep[:, None, None], -1e4)
    return (s + torch.linspace(0, 1, S)).softmax(-1) @ v


def filled_then_causal(q, k, v, keep):
    s = (q @ k.mT * 0.25).masked_fill(~keep[:, None, None], -1e9)
    return s.masked_fill(torch.ones(S, S, dtype=torch.bool).triu(1), INF).softmax(-1) @ v


@TARGETS
@pytest.mark.parametrize("fn", [filled_then_biased, filled_then_causal])
def test_an_empty_row_of_overwritten_scores(fn, target):
    same_as_eager(fn, [*qkv(), one_empty()], grads=False, target=target)


def causal_where(hidden):
    return lambda q, k, v: (q @ k.mT * 0.25).masked_fill(hidden(), -1e9).softmax(-1) @ v


def wraps_in_subtraction():
    i = torch.arange(S, dtype=torch.uint8)
    return ~(i[:, None] - i[None, :] >= 0)  # unsigned: nothing is hidden


def wraps_in_a_cast():
    i = torch.arange(300).to(torch.int8)[:S] if S >= 300 else (torch.arange(S) + 120).to(torch.int8)
    return i[None] > i[:, None]


def cumsum_at_one_position():
    return torch.arange(S) >= torch.arange(S).cumsum(0)[5]


def cumsum_at_the_end():
    return torch.arange(S) >= (torch.arange(S) < 7).long().cumsum(0)[-1:]


@TARGETS
@pytest.mark.parametrize("hidden", [wraps_in_subtraction, wraps_in_a_cast, cumsum_at_one_position, cumsum_at_the_end])
def test_a_mask_out_of_machine_numbers(hidden, target):
    report = same_as_eager(causal_where(hidden), qkv(), target=target)
    assert [s.reason for s in report.sites] == [None], report


@TARGETS
def test_nan_differs_from_itself(target):
    def fn(q, k, v, x):
        return (q @ k.mT * 0.25).masked_fill(x != x, INF).softmax(-1) @ v

    same_as_eager(fn, [*qkv(), torch.where(torch.arange(S) > 9, torch.nan, 1.0)], grads=False, target=target)


@TARGETS
def test_an_integer_argument_may_be_negative(target):
    def shifted(q, k, v, shift):
        i = torch.arange(S)
        return (q @ k.mT * 0.25).masked_fill(i[None] > i[:, None] + shift, INF).softmax(-1) @ v

    def from_shift(q, k, v, shift):
        return (q @ k.mT * 0.25).masked_fill(torch.arange(S) + shift < 0, INF).softmax(-1) @ v

    for fn in (shifted, from_shift):
        compiled, _ = fuse(fn, target=target, dynamic=True)
        args = qkv()
        for shift in (3, 5, -2):
            torch.testing.assert_close(compiled(*args, shift), fn(*args, shift), equal_nan=True, atol=1e-4, rtol=1e-4)


@TARGETS
def test_product_written_into_a_given_tensor(target):
    def fn(q, k, v, out):
        torch.matmul((q @ k.mT * 0.25).softmax(-1), v, out=out)
        return out * 1

    same_as_eager(fn, [*qkv(), torch.zeros(B, H, S, D)], grads=False, target=target)


def heads_in_the_middle(after):
    def fn(q, k, v):
        return after(plain(*(x.transpose(1, 2) for x in (q, k, v))))

    return fn


STRIDES = {
    "add, view": lambda o: (o + 1.0).view(B, -1),
    "relu, view": lambda o: o.relu().view(B, -1),
    "dropout, view": lambda o: F.dropout(o, 0.0).view(B, -1),
    "as_strided": lambda o: torch.as_strided(o, (S, D), (D, 1)) + 0,
    "mul, as_strided": lambda o: torch.as_strided(o * 2, (S, D), (D, 1)) + 0,
}


@pytest.mark.parametrize("after", STRIDES.values(), ids=STRIDES)
def test_code_that_relies_on_the_strides_of_the_product(after):
    same_as_eager(heads_in_the_middle(after), bshd())


def test_what_is_returned_has_eagers_strides():
    fn = heads_in_the_middle(lambda o: o * 2)
    args = bshd()
    assert fuse(fn)[0](*args).stride() == fn(*args).stride()


def test_a_view_right_after_is_fused():
    report = same_as_eager(heads_in_the_middle(lambda o: o.view(B, -1)), bshd())
    assert [s.status for s in report.sites] == ["fused"], report


@TARGETS
def test_a_mask_that_broadcasts_the_batch_up(target):
    def fn(q, k, v, m):
        return (q @ k.mT * 0.25).masked_fill(m, -1e9).softmax(-1) @ v

    same_as_eager(fn, [*(x[:1] for x in qkv()), torch.rand(B, 1, S, S) > 0.5], target=target)


@TARGETS
def test_an_einsum_that_broadcasts_the_contracted_axis(target):
    def fn(q, k, v):
        return torch.einsum("bhqd,bhkd->bhqk", q, k).softmax(-1) @ v

    same_as_eager(fn, [torch.randn(B, H, 5, D), torch.randn(B, H, 7, 1), torch.randn(B, H, 7, D)], target=target)


@pytest.mark.parametrize("backend", ["pass", "fa3_inductor"])
def test_vmap_and_grad_inside_the_region(backend):
    def mapped(q, k, v):
        return torch.vmap(plain)(q, k, v)

    def differentiated(q, k, v):
        return torch.func.grad(lambda q: plain(q, k, v).sum())(q)

    for fn in (mapped, differentiated):
        torch._dynamo.reset()
        compiled = fuse(fn)[0] if backend == "pass" else torch.compile(fn, backend=backend)
        args = qkv()
        torch.testing.assert_close(compiled(*args), fn(*args), atol=1e-4, rtol=1e-4)


def test_two_dropouts():
    def fn(q, k, v):
        p = (q @ k.mT * 0.0).softmax(-1)
        return F.dropout(F.dropout(p, 0.5), 0.5) @ v

    n = 64
    q, k, v = torch.randn(1, 1, 4096, 4), torch.randn(1, 1, n, 4), torch.ones(1, 1, n, 4)
    with torch.no_grad():
        out = fuse(fn)[0](q, k, v)[0, 0, :, 0]
    assert abs(out.mean() - 1) < 0.02
    assert abs(out.std() - (3 / n) ** 0.5) < 0.02  # keep 1/4: variance (1/0.25 - 1) / n


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("keep", torch.ones(32, 32, dtype=torch.bool).tril())

    def forward(self, q, k, v):
        return (q @ k.mT * 0.25).masked_fill(~self.keep[:S, :S], -1e9).softmax(-1) @ v


def test_a_buffer_given_other_data():
    model = Masked()
    compiled, report = fuse(model)
    args = qkv()
    compiled(*args)
    assert report.sites[0].mask == "causal"
    other = model.keep.clone()
    other[2, 7] = True
    model.keep.data = other
    torch.testing.assert_close(compiled(*args), model(*args))


def test_autocast_is_seen():
    def fn(x, w):
        with torch.autocast("cpu", torch.bfloat16):
            y = x @ w
            return plain(y, y, y).float()

    compiled, report = fuse(fn)
    args = [torch.randn(B, H, S, D), torch.randn(D, D) / 4]
    torch.testing.assert_close(compiled(*args), fn(*args), atol=2e-2, rtol=2e-2)
    assert [(s.status, s.dtype) for s in report.sites] == [("fused", "bfloat16")]


@TARGETS
def test_autocast_with_operands_of_two_dtypes(target):
    def fn(x, w):
        with torch.autocast("cpu", torch.bfloat16):
            y = x @ w
            return plain(F.layer_norm(y.float(), (D,)), y, y).float()

    args = [torch.randn(B, H, S, D), torch.randn(D, D) / 4]
    torch.testing.assert_close(fuse(fn, target=target)[0](*args), fn(*args), atol=3e-2, rtol=3e-2)


def where_with_a_fill_below_float16(q, k, v, keep):
    return torch.where(keep, q @ k.mT * 0.25, -1e30).softmax(-1) @ v


@TARGETS
def test_a_fill_is_rounded_to_the_dtype_of_the_scores(target):
    keep = torch.ones(S, S, dtype=torch.bool).tril()
    keep[3] = False
    args = [*(x.half() for x in qkv()), keep]
    report = same_as_eager(where_with_a_fill_below_float16, args, grads=False, target=target, atol=1e-2)
    assert [s.status for s in report.sites] == ["fused"]


def test_a_sum_of_bools_is_an_or():
    args = [*qkv(), *(torch.rand(S, S) > 0.5 for _ in range(2))]
    same_as_eager(lambda q, k, v, a, b: (q @ k.mT + (a + b).float()).softmax(-1) @ v, args)


def test_a_comparison_with_nan():
    def fn(q, k, v):
        hidden = torch.ones(S, S).triu(1) > float("nan")
        return (q @ k.mT).masked_fill(hidden, INF).softmax(-1) @ v

    assert [(s.status, s.mask) for s in same_as_eager(fn, qkv()).sites] == [("fused", "full")]


def test_a_mask_that_compares_in_float32():
    def fn(q, k, v):
        keep = torch.full((S, S), 0.1).tril() == 0.1
        return (q @ k.mT).masked_fill(~keep, INF).softmax(-1) @ v

    assert [(s.status, s.mask) for s in same_as_eager(fn, qkv()).sites] == [("fused", "causal")]


def test_a_position_that_counts_from_the_end():
    def fn(q, k, v, n):
        row = torch.arange(64)[n] - 60
        return (q @ k.mT).masked_fill(torch.arange(S) > row + torch.arange(S)[:, None], INF).softmax(-1) @ v

    compiled, report = fuse(fn)
    args = qkv()
    for n in (-4, -3, -2):
        torch.testing.assert_close(compiled(*args, n), fn(*args, n), atol=1e-4, rtol=1e-3)
    assert "+ 4" in report.sites[-1].mask


@pytest.mark.parametrize("target", ["sdpa", "reference"])
@pytest.mark.parametrize("attend", [plain, F.scaled_dot_product_attention])
@pytest.mark.parametrize("which, shape", [(0, (B, H, 1, D)), (1, (B, H, 1, D)), (2, (B, H, 1, D)), (2, (B, H, S, 1))])
def test_an_operand_that_is_the_same_all_along_an_axis(attend, target, which, shape):
    """The tensor before it was expanded is not the operand: the result had its shape."""

    def fn(*args):
        return attend(*(x.expand(B, H, S, D) for x in args))

    args = qkv()
    args[which] = torch.randn(shape)
    same_as_eager(fn, args, target=target)


# ------------------------------------------------------------------------------------------- found by tests/fuzz


@pytest.mark.parametrize("grads", [False, True])
def test_a_factor_of_keys_behind_a_shift(grads):
    """What is subtracted from every score of a row is scaled as well, by another factor for each key."""

    def fn(q, k, v, temperature):
        scores = q @ k.mT
        scores = scores - scores.amax(-1, keepdim=True)
        return (scores * temperature).softmax(-1) @ v

    def earlier(q, k, v, temperature):
        scores = q @ k.mT * temperature
        return (scores - scores.amax(-1, keepdim=True)).softmax(-1) @ v

    args = [*qkv(), torch.rand(S) + 0.5]
    assert not same_as_eager(fn, args, grads, target="reference").fused
    assert bool(same_as_eager(earlier, args, False, target="reference").fused)


def test_a_learned_mask_of_numbers_in_sdpa():
    """Where -1e9 hides all of a row, its log-sum-exp has no room for the number of keys."""

    def fn(q, k, v, bias):
        hidden = torch.ones(S, S, dtype=torch.bool).tril(S // 2)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.masked_fill(hidden, -1e9))

    report = same_as_eager(fn, [*qkv(), torch.randn(S, S)], target="reference")
    assert [s.target for s in report.fused] == ["reference"]


@pytest.mark.parametrize("grads", [False, True])
@TARGETS
def test_a_bias_and_scores_overwritten_by_infinity(grads, target):
    """Of a row that is overwritten, only the gradient of v is NaN."""

    def fn(q, k, v, bias):
        below = torch.ones(S, S, dtype=torch.bool).tril(-1)
        return (q @ k.mT + bias).masked_fill(~below, INF).softmax(-1) @ v

    report = same_as_eager(fn, [*qkv(), torch.randn(S, S)], grads, target)
    assert bool(report.fused) != grads


def test_a_packed_projection_of_any_length():
    def fn(qkv):
        q, k, v = (x.view(B, S, H, D).transpose(1, 2) for x in qkv.chunk(3, dim=-1))
        return plain(q, k, v)

    compiled, report = fuse(fn, target="reference", dynamic=True)
    x = torch.randn(B, S, 3 * H * D)
    torch.testing.assert_close(compiled(x), fn(x))
    assert len(report.fused) == 1


def test_a_sum_that_is_inverted_first():
    def fn(q, k, v):
        e = (q @ k.mT * 0.25).exp()
        return (e * (1 / e.sum(-1, keepdim=True))) @ v

    assert same_as_eager(fn, qkv(), target="reference").fused


@pytest.mark.parametrize("same", [True, False])
def test_weights_hidden_by_the_mask_of_the_scores(same):
    """By its condition, however each of the two is written."""

    def fn(q, k, v, keep):
        scores = torch.where(keep[:, None, None], q @ k.mT, INF)
        hidden = ~keep if same else ~keep.roll(1, 1)
        return scores.softmax(-1).masked_fill(hidden[:, None, None], 0.0) @ v

    keep = torch.rand(B, S) > 0.3
    assert bool(same_as_eager(fn, [*qkv(), keep], target="reference").fused) == same


@pytest.mark.parametrize("fill", [INF, torch.finfo(torch.float32).min], ids=["inf", "min"])
@pytest.mark.parametrize("order", ["bias, mask", "mask, bias"])
def test_weights_hidden_beside_a_bias(fill, order):
    """ESPnet's relative attention. Of a bias behind the mask, a row that is hidden whole has a gradient of NaN."""

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = nn.Parameter(torch.randn(H, S, S))

        def forward(self, q, k, v, keep):
            hidden = ~keep[:, None, None]
            scores = q @ k.mT * 0.25
            if order == "bias, mask":
                scores = (scores + self.bias).masked_fill(hidden, fill)
            else:
                scores = scores.masked_fill(hidden, fill) + self.bias
            return scores.softmax(-1).masked_fill(hidden, 0.0) @ v

    assert bool(same_as_eager(Attention(), [*qkv(), one_empty()], target="reference").fused) == (order == "bias, mask")


@pytest.mark.parametrize("fill", [INF, -1e9], ids=["inf", "1e9"])
def test_weights_hidden_beside_what_may_be_a_mask(fill):
    """A row that the other mask hides whole has weights nevertheless, or NaN."""

    def fn(q, k, v, other, keep):
        hidden = ~keep[:, None, None]
        scores = (q @ k.mT * 0.25 + other).masked_fill(hidden, INF)
        return scores.softmax(-1).masked_fill(hidden, 0.0) @ v

    other = torch.zeros(B, 1, S, S)
    other[0, 0, 3] = fill
    args = [*qkv(), other, torch.rand(B, S) > 0.3]
    assert not same_as_eager(fn, args, target="reference").fused


def test_weights_hidden_by_a_tensor_of_zero():
    def fn(q, k, v, keep):
        hidden = ~keep[:, None, None]
        scores = (q @ k.mT).masked_fill(hidden, torch.scalar_tensor(INF))
        return scores.softmax(-1).masked_fill(hidden, torch.scalar_tensor(0.0)) @ v

    assert same_as_eager(fn, [*qkv(), one_empty()], target="reference").fused


def test_weights_hidden_where_infinity_was_added():
    """The gradient of a row that is hidden whole is NaN, where a mask written over the scores would stop it."""

    def fn(q, k, v, keep):
        scores = q @ k.mT + torch.zeros(B, 1, 1, S).masked_fill(~keep[:, None, None], INF)
        return scores.softmax(-1).masked_fill(~keep[:, None, None], 0.0) @ v

    same_as_eager(fn, [*qkv(), one_empty()], target="reference")


@pytest.mark.parametrize("first", ["q", "k"])
def test_one_key_and_one_query(first):
    """Which of the operands is the query, only the number of heads says."""

    def fn(q, k, v):
        k, v = (x.repeat_interleave(2, dim=1) for x in (k, v))
        scores = q @ k.mT if first == "q" else (k @ q.mT).mT
        return scores.softmax(-1) @ v

    args = [torch.randn(B, H, 1, D), *(torch.randn(B, H // 2, 1, D) for _ in "kv")]
    assert same_as_eager(fn, args, target="reference").fused


def test_a_mask_that_is_multiplied_until_it_is_infinite():
    def fn(q, k, v, keep):
        mask = torch.zeros(B, 1, 1, S).masked_fill(~keep[:, None, None], torch.finfo(torch.float32).min)
        return ((q @ k.mT + mask) / 0.5).softmax(-1) @ v

    same_as_eager(fn, [*qkv(), one_empty()], grads=False, target="reference")
    same_as_eager(fn, [*qkv(), one_empty()], target="reference")


def test_squeezing_a_size_that_is_symbolic():
    def fn(qkv):
        q, k, v = (x.squeeze(2).transpose(1, 2) for x in qkv.chunk(3, dim=2))
        return plain(q, k, v)

    compiled, report = fuse(fn, target="reference", dynamic=True)
    x = torch.randn(B, S, 3, H, D)
    torch.testing.assert_close(compiled(x), fn(x))
    assert len(report.fused) == 1


def test_a_factor_beside_a_mask_by_a_number():
    """What the number hides still has weight where nothing else is left."""

    def fn(q, k, v, keep):
        later = torch.ones(S, S, dtype=torch.bool).triu(1)
        scores = (q @ k.mT).masked_fill(torch.arange(S) < 3, INF) + later * -1e9
        e = torch.exp(scores - scores.amax(-1, keepdim=True)) * keep[:, None, None]
        return (e / e.sum(-1, keepdim=True)) @ v

    same_as_eager(fn, [*qkv(), torch.ones(B, S, dtype=torch.bool)], grads=False, target="reference")


def added_narrow_and_filled_wide(q, k, v, keep):
    """The least number of float32 is -inf in the dtype of the mask that was added."""
    s = q @ k.mT * 0.25 + torch.zeros(S, S, dtype=q.dtype).masked_fill(torch.ones(S, S).triu(1).bool(), -math.inf)
    return s.float().masked_fill(~keep[:, None, None], torch.finfo(torch.float32).min).softmax(-1).to(q.dtype) @ v


@TARGETS
def test_the_least_number_of_a_wider_dtype(target):
    keep = torch.arange(S)[None] >= torch.tensor([[0], [5]])
    args = [*(x.bfloat16() for x in qkv()), keep]
    report = same_as_eager(added_narrow_and_filled_wide, args, grads=False, target=target, atol=0.03)
    assert [site.status for site in report.sites] == ["fused"]


def low_less_maximum(q, k, v, keep):
    """A row of nothing but -1e9 is one of zeros by the time that it is masked again."""
    s = (q @ k.mT * 0.25).masked_fill(~keep[:1], -1e9)
    s = s - s.amax(-1, keepdim=True)
    return s.masked_fill(torch.ones(S, S).triu(1).bool(), -1e9).softmax(-1) @ v


def infinite_less_maximum(q, k, v, keep):
    """A row of nothing but -inf is one of NaN by then."""
    later = torch.ones(S, S).triu(1).bool()
    s = (q @ k.mT * 0.25 + torch.where(keep, 0.0, -math.inf)).masked_fill(later, -math.inf)
    s = s - s.amax(-1, keepdim=True)
    return s.masked_fill(later, -1e9).softmax(-1) @ v


@TARGETS
@pytest.mark.parametrize("fn", [low_less_maximum, infinite_less_maximum])
def test_masked_less_their_maximum_and_masked_again(fn, target):
    keep = torch.rand(S, S) > 0.5
    keep[0] = False
    same_as_eager(fn, [*qkv(), keep], grads=False, target=target)


@TARGETS
def test_masked_after_the_maximum_only(target):
    def fn(q, k, v):
        s = q @ k.mT * 0.25
        return (s - s.amax(-1, keepdim=True)).masked_fill(torch.ones(S, S).triu(1).bool(), -1e9).softmax(-1) @ v

    report = same_as_eager(fn, qkv(), target=target)
    assert [site.status for site in report.sites] == ["fused"]


def scaled_in_place(returns_its_input, which):
    """torchtune's Gemma 2: queries that are cast to what they are already, and scaled in place."""

    def fn(q, k, v):
        x = {"q": q, "k": k}
        x[which] = returns_its_input(x[which] + 1, v)
        x[which].mul_(0.25)
        x[which] *= 2
        return (x["q"] @ x["k"].mT).softmax(-1) @ v

    return fn


@TARGETS
@pytest.mark.parametrize("which", "qk")
@pytest.mark.parametrize(
    "returns_its_input",
    [
        lambda x, like: x.type_as(like),
        lambda x, like: x.type_as(other=like),
        lambda x, like: torch.einsum("bhsd->bshd", x).transpose(1, 2),
        lambda x, like: torch.broadcast_tensors(x, like)[0],
        lambda x, like: x.sum_to_size(like.shape),
        lambda x, like: x.to(like.dtype),
    ],
    ids=["type_as", "type_as by name", "einsum", "broadcast_tensors", "sum_to_size", "to"],
)
def test_operators_that_may_return_their_input(returns_its_input, which, target):
    same_as_eager(scaled_in_place(returns_its_input, which), qkv(), target=target)


@pytest.mark.parametrize("is_read_later", [False, True])
def test_a_write_that_changes_what_a_trace_takes_for_another_tensor(is_read_later):
    """Then nothing that was proved of that other tensor holds: the graph stays as it is."""

    def fn(q, k, v):
        later = torch.ones(S, S, device=q.device).triu(1)
        hidden = later.sum_to_size(S, S)
        later.zero_()
        scores = q @ k.mT
        return (scores.masked_fill(hidden > 0, -1e9) if is_read_later else scores + later).softmax(-1) @ v

    compiled, report = fuse(fn, target="reference")
    args = qkv()
    with torch.no_grad():
        torch.testing.assert_close(compiled(*args), fn(*args))
    assert [s.status for s in report.sites] == ([] if is_read_later else ["fused"])


@TARGETS
@pytest.mark.parametrize("whole", [lambda x: x[:2, ...], lambda x: x[:, :], lambda x: x[...], lambda x: x])
def test_a_cache_that_is_written_to_through_the_whole_of_it(whole, target):
    """LitGPT's."""

    class Cached(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for name in "kv":
                self.register_buffer(name, torch.zeros(2, H, 2 * S, D))
            self.register_buffer("visible", torch.ones(2 * S, 2 * S, dtype=torch.bool).tril())

        def forward(self, q, k, v, positions):
            k = whole(self.k).index_copy_(-2, positions, k)
            v = whole(self.v).index_copy_(-2, positions, v)
            mask = self.visible.index_select(0, positions)[None, None]
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    ours, theirs = Cached(), Cached()
    compiled, report = fuse(ours, target=target)
    with torch.no_grad():
        for positions in (torch.arange(S), torch.arange(S) + S):
            args = [*qkv(), positions]
            torch.testing.assert_close(compiled(*args), theirs(*args))
    torch.testing.assert_close(ours.k, theirs.k)
    assert {s.status for s in report.sites} == {"fused"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_berts_mask_in_any_dtype(dtype):
    """-10000, which bfloat16 rounds to -9984."""
    keep = torch.arange(S) < torch.tensor([S, S - 3])[:, None, None, None]

    def added(q, k, v):
        return (q @ k.mT * 0.25 + (1.0 - keep.to(q.dtype)) * -10000.0).softmax(-1) @ v

    def written(q, k, v):
        return (q @ k.mT * 0.25).masked_fill(~keep, -1e4).softmax(-1) @ v

    args = [x.to(dtype) for x in qkv()]
    for fn in (added, written):
        compiled, report = fuse(fn, target="reference")
        with torch.no_grad():
            compiled(*args)
        (site,) = report.sites
        assert (site.status, site.mask) == ("fused", "key padding[b, k]"), site.verdict


def test_a_number_added_beside_one_that_is_written():
    """Of a row with nothing else, a key behind -1e4 added still has its score, one behind -1e4 written has none."""
    near = (torch.arange(S)[:, None] - torch.arange(S)).abs() <= 1
    later = torch.ones(S, S).tril() == 0

    def fn(q, k, v, shown):
        scores = q @ k.mT * 0.25 + torch.where(later, -1e4, 0.0)
        return scores.masked_fill(~(near & shown), -1e4).softmax(-1) @ v

    args = [*qkv(), torch.rand(S, S) > 0.5]
    compiled, report = fuse(fn, target="reference")
    torch.testing.assert_close(compiled(*args), fn(*args))
    assert report.sites[0].reason is Reason.EMPTY_ROWS and "-10000" in report.sites[0].detail

    def given(q, k, v, added, shown):
        return (q @ k.mT * 0.25 + added).masked_fill(~shown, -1e4).softmax(-1) @ v

    for target in ("reference", "sdpa"):
        args = [*qkv(), torch.where(later, -1e4, 0.0), torch.rand(S, S) > 0.7]
        compiled, report = fuse(given, target=target)
        torch.testing.assert_close(compiled(*args), given(*args))
        assert report.sites[0].reason is Reason.EMPTY_ROWS and "may add such a number" in report.sites[0].detail

    def gpt2(q, k, v, padding):
        scores = (q @ k.mT * 0.25).masked_fill(later, torch.finfo(q.dtype).min)
        return (scores + torch.where(padding[:, None, None], 0.0, -1e4)).softmax(-1) @ v

    args = [*qkv(), torch.arange(S) >= torch.tensor([[0], [7]])]
    compiled, report = fuse(gpt2, target="reference")
    torch.testing.assert_close(compiled(*args), gpt2(*args), atol=3e-3, rtol=0)  # -1e4 leaves three digits to a score
    assert report.sites[0].status == "fused", report.sites[0].verdict


def test_a_mask_that_hides_nothing_behind_an_ordinary_bias():
    everything = torch.ones(S, S, dtype=torch.bool).tril(S)
    distance = -0.1 * (torch.arange(S)[:, None] - torch.arange(S)).abs()

    def fn(q, k, v, padding):
        scores = q @ k.mT * 0.25 + torch.where(padding[:, None, None], 0.0, -1e9) + distance
        return scores.masked_fill(~everything, INF).softmax(-1) @ v

    args = [*qkv(), torch.arange(S) < torch.tensor([[S], [0]])]
    compiled, report = fuse(fn, target="reference")
    torch.testing.assert_close(compiled(*args), fn(*args))
    assert report.sites[0].status == "fused", report.sites[0].verdict


def test_a_mask_of_infinity_with_the_wrong_sign():
    """NaN, and the gradients of all values too."""
    later = torch.ones(S, S).tril() == 0
    fn = lambda q, k, v: (q @ k.mT * 0.25 + torch.where(later, -INF, 0.0)).softmax(-1) @ v  # noqa: E731
    args = qkv()
    compiled, _ = fuse(fn, target="reference")
    for ours, theirs in zip(run(compiled, args, True), run(fn, args, True)):
        torch.testing.assert_close(ours, theirs, equal_nan=True)

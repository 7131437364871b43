"""Problems for the kernels on a GPU, and how their results are judged.

The tolerance scales with what the dtype can do: at most 1.5 times the error of eager PyTorch attention in the same
dtype (gradients: twice), plus one rounding of the result.
"""

import math
import os
import random

import torch

from fa3_inductor.kernels.dropout import keep_scale, kept_weights
from fa3_inductor.kernels.formulas import NO_FORMULAS, Formulas, evaluate

LENGTHS = [1, 2, 63, 64, 127, 128, 129, 191, 257, 1000, 1024, 4097]
LAYOUTS = ["bhsd", "bshd", "gated", "packed", "padded", "misaligned", "offset", "strided", "expanded"]


def make(layout, b, h, s, d, dtype):
    """A random [b, h, s, d] tensor that lies in memory as `layout` says."""
    rand = lambda *shape: torch.randn(*shape, device="cuda", dtype=dtype)  # noqa: E731
    return {
        "bhsd": lambda: rand(b, h, s, d),
        "bshd": lambda: rand(b, s, h, d).transpose(1, 2),
        "gated": lambda: rand(b, s, h * d + 1)[..., 1:].unflatten(-1, (h, d)).transpose(1, 2),
        "packed": lambda: rand(b, s, 3, h, d)[:, :, 1].transpose(1, 2),
        "padded": lambda: rand(b, h, s, d + 8)[..., :d],
        "misaligned": lambda: rand(b, h, s, d + 1)[..., :d],
        "offset": lambda: rand(b * h * s * d + 1)[1:].view(b, h, s, d),
        "strided": lambda: rand(b, h, d, s).mT,
        "expanded": lambda: rand(1, h, s, d).expand(b, h, s, d),
    }[layout]()


def eager(
    q, k, v, scale, right, left=None, bias=None, mask=None, softcap=None, sinks=None, seed=None, dropout_p=0.0,
    formulas=NO_FORMULAS,
):  # fmt: skip
    """What a model without fused attention computes, in the dtype of its inputs; zeros for rows that see no key."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = q @ k.mT * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if formulas.score:
        scores = evaluate(formulas.score, formulas.tables, scores.shape, torch.float32, q.device, scores.float())
        scores = scores.to(q.dtype)
    if bias is not None:
        scores = scores + bias.to(q.dtype)
    if formulas.bias:
        computed = evaluate(formulas.bias, formulas.tables, scores.shape, torch.float32, q.device)
        scores = scores + computed.to(q.dtype)
    row = torch.arange(q.shape[2], device=q.device).unsqueeze(-1)
    column = torch.arange(k.shape[2], device=q.device)
    if right is not None:
        scores = scores.masked_fill(column > row + right, -math.inf)
    if left is not None:
        scores = scores.masked_fill(column < row - left, -math.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    if formulas.mask:
        visible = evaluate(formulas.mask, formulas.tables, scores.shape, torch.float32, q.device)
        scores = scores.masked_fill(~visible, -math.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(q.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
        weights = scores.softmax(-1)[..., :-1]
    else:
        empty = (scores == -math.inf).all(-1, keepdim=True)
        weights = scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)
    if seed is not None:
        weights = weights * kept_weights(seed, dropout_p, weights.shape) * keep_scale(dropout_p)
    return weights @ v


def exactly(options):
    """The options of the kernels as those of the reference in float64; for dropout, a function of the scores' shape."""
    exact = {n: x.double() if torch.is_tensor(x) and x.is_floating_point() else x for n, x in options.items()}
    seed, p = exact.pop("seed", None), exact.pop("dropout_p", 0.0)
    return (
        exact,
        lambda shape: {} if seed is None else dict(kept=kept_weights(seed, p, shape), keep_scale=keep_scale(p)),
    )


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


def lies_like(x, y):
    """Whether x has the strides of y, where they mean something, which is what Inductor asserts too."""
    return all(a == b for size, a, b in zip(x.shape, x.stride(), y.stride()) if size > 1)


HEAD_DIMS = [8, 16, 40, 64, 64, 72, 96, 128, 128, 160, 192, 256]


# How often the sizes of a drawn problem are drawn again: what else there is of it is compiled once.
SIZES = range(int(os.environ.get("FA3_INDUCTOR_SIZES", "1")))


def drawn_sizes(seed, again, few=False):
    """b, (hq, hkv), sq, sk, the right edge of a window, and where numbers come from that nothing is compiled for."""
    size = random.Random(f"{seed} {again}")
    torch.manual_seed(seed + 1_000_003 * again)
    b, heads = size.choice([1, 2, 3]), size.choice([(1, 1), (3, 3), (8, 2), (5, 1)])
    sq = size.choice(LENGTHS)
    sk = sq if size.random() < 0.3 else size.choice(LENGTHS)
    if few:
        heads, sq = size.choice([(4, 4), (8, 2), (5, 1), (32, 8), (150, 1)]), size.choice([1, 1, 1, 1, 3, 64, 65, 200])
        sk = size.choice([*LENGTHS, 300, 600, 2000, 9000, 20000])
    return b, heads, sq, sk, size.randint(-sq - 1, sk + 1)


def drawn(seed, again, few=False):
    """A random problem: q, k, v and the options of attention_forward. `again` draws other sizes of it.

    Few queries are mostly one, and then of several heads with the same keys.
    """
    pick = random.Random(seed)
    b, (hq, hkv), sq, sk, edge = drawn_sizes(seed, again, few)
    d, dtype = pick.choice(HEAD_DIMS), pick.choice([torch.bfloat16, torch.float16])
    dv = pick.choice([d, d, pick.choice(HEAD_DIMS)])
    q = make(pick.choice(LAYOUTS), b, hq, sq, d, dtype)
    k, v = make(pick.choice(LAYOUTS), b, hkv, sk, d, dtype), make(pick.choice(LAYOUTS), b, hkv, sk, dv, dtype)
    options = drawn_options(pick, b, hq, sq, sk, edge, dtype)
    options["scale"] = pick.choice([d**-0.5, 0.02, 0.5 * d**-0.5])
    if pick.random() < 0.2:
        options["seed"] = torch.randint(0, 2**63 - 1, (1,), device="cuda")
        options["dropout_p"] = pick.choice([0.1, 0.5])
    return (q, k, v), options


def drawn_plain(seed, again):
    """Likewise one with nothing on its scores but a window, of a head_dim that forward_plain_kernel has."""
    pick = random.Random(seed)
    b, (hq, hkv), sq, sk, edge = drawn_sizes(seed, again)
    sq = max(sq, 2)  # of one, query heads that share keys are the rows
    d, dv = pick.choice([(128, 128), (128, 128), (104, 120), (256, 256), (256, 256), (200, 232)])
    dtype = pick.choice([torch.bfloat16, torch.float16])
    shapes = (hq, sq, d), (hkv, sk, d), (hkv, sk, dv)
    qkv = tuple(make(pick.choice(LAYOUTS), b, *shape, dtype) for shape in shapes)
    options = drawn_window(pick, sq, sk, edge) | dict(scale=pick.choice([d**-0.5, 0.02, 0.5 * d**-0.5]))
    if pick.random() < 0.3:
        options["sinks"] = torch.randn(hq, device="cuda", dtype=pick.choice([dtype, torch.float32]))
    return qkv, options


def drawn_window(pick, sq, sk, edge):
    left = pick.choice([None, None, None, 0, 100, sq, -5])
    return dict(window_left=left, window_right=pick.choice([None, 0, sk - sq, edge]))


def drawn_options(pick, b, hq, sq, sk, edge, dtype):
    """A window and terms on the scores, of those that all of the forward kernels take."""
    options = drawn_window(pick, sq, sk, edge)
    some = lambda *sizes: [pick.choice([1, size, size]) for size in sizes]  # noqa: E731
    if pick.random() < 0.3:
        options["bias"] = torch.randn(some(b, hq, sq, sk), device="cuda", dtype=pick.choice([dtype, torch.float32]))
    if pick.random() < 0.3:
        options["mask"] = torch.rand(some(b, hq, sq, sk), device="cuda") > 0.3
    if pick.random() < 0.2:
        options["softcap"] = pick.choice([1.0, 30.0])
    if pick.random() < 0.2:
        options["sinks"] = torch.randn(hq, device="cuda", dtype=pick.choice([dtype, torch.float32]))
    if pick.random() < 0.3:
        options["formulas"] = drawn_formulas(pick, b, hq, sq, sk, dtype, "softcap" not in options)
    return options


def drawn_formulas(pick, b, h, sq, sk, dtype, of_scores):
    """A bias, a mask or both, of the kinds that models have; or, if `of_scores`, what becomes of the scores."""
    some = lambda *sizes: [pick.choice([1, size]) for size in sizes]  # noqa: E731
    slopes = torch.rand(*some(b, h), 1, 1, device="cuda").to(pick.choice([dtype, torch.float32]))
    integer = pick.choice([torch.int64, torch.int32, torch.uint8])
    documents = lambda *shape: torch.randint(0, 3, shape, device="cuda").sort(-1).values.to(integer)  # noqa: E731
    if of_scores and pick.random() < 0.4:
        text = pick.choice([
            "where(s > 1.5, 1.5, where(s < -1.5, -1.5, s))", "where(s <= 0.0, 0.0, s)", "2.0 * tanh(s / 2.0)",
            "s * exp(-0.02 * real(t0) * abs(real(k) - real(q)))", "where(k > q, 0.0, s)", "s * sigmoid(s + real(t0))",
            "log(1.0 + exp(s)) - real(t0)", "where(s > 0.0, s, 0.2 * s)", "abs(s) * real(t0)", "1.0 - s * s / 4.0",
            "absorb(q % 3 == 1, s)",
        ])  # fmt: skip
        return Formulas("", *pick.choice([("", (slopes,)), ("k <= q + 50", (slopes,))]), text)
    bias, mask, tables = pick.choice([
        ("real(t0) * (real(k) - real(q))", "", lambda: [slopes]),
        ("-0.5 * real(t0) * abs(real(q) - real(k))", "", lambda: [slopes]),
        ("minimum(real(abs(k - q)), 8.0) + exp(-real(t0) * real(q))", "", lambda: [slopes]),
        ("where(k < 100, real(t0), sqrt(real(q)))", "", lambda: [slopes]),
        ("real(t0) + real(t1)", "", lambda: [
            torch.randn(*some(b, h), sq, 1, device="cuda"), torch.randn(*some(b, h), 1, sk, device="cuda")
        ]),
        ("", "t0 == t1", lambda: [documents(b, 1, 1, sq).mT, documents(b, 1, 1, sk)]),
        ("", "(k <= q) | (k < t0)", lambda: [torch.randint(0, 200, (*some(b, h), 1, 1), device="cuda")]),
        ("", "q // 96 == k // 96", lambda: []),
        ("", "~((k - q > 70) & (k % 5 != 0))", lambda: []),
        ("", "(t0 != 0) & (k - t1 < q)", lambda: [
            torch.rand(*some(b, h), 1, sk, device="cuda") > 0.3, documents(b, 1, 1, sq).mT.to(torch.int64) * 100,
        ]),
        ("real(t0) * real(k)", "(t1 == t2) & (k <= q)", lambda: [
            slopes, documents(b, 1, 1, sq).mT, documents(b, 1, 1, sk)
        ]),
    ])  # fmt: skip
    return Formulas(bias, mask, tuple(tables()))


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


def check_rounded(out, lse, unrounded, scale, exact):
    """What a kernel returns with an out_scale, beside what it returns without, `unrounded`, and the exact result."""
    assert out.dtype == torch.float8_e4m3fn and lies_like(out, unrounded[0]) and torch.equal(lse, unrounded[1])
    off = (unrounded[0].double() - exact).abs().nan_to_num().amax() * scale.double().abs()
    exact = (exact * scale.double()).clamp(-448.0, 448.0)
    got = out.double()
    assert torch.equal(got.isnan(), exact.isnan())
    wrong = (got - exact).abs().nan_to_num() > exact.abs().nan_to_num() / 15 + 2.0**-9 + 4 * off
    assert not wrong.any(), (got[wrong], exact[wrong])

"""`fa3::attention` as an operator: fakes, strides, autograd, opcheck, torch.compile. No GPU needed."""

import pytest
import torch

from fa3_inductor import ops
from fa3_inductor.kernels import dropout
from fa3_inductor.kernels.reference import attention_reference

attention = torch.ops.fa3.attention


def qkv(b=2, hq=4, hkv=2, sq=16, sk=16, d=8, dtype=torch.float32, layout="bhsd", grad=True):
    torch.manual_seed(0)
    if layout == "bhsd":
        xs = [torch.randn(b, h, s, d, dtype=dtype) for h, s in ((hq, sq), (hkv, sk), (hkv, sk))]
    elif layout == "bshd":
        xs = [torch.randn(b, s, h, d, dtype=dtype).transpose(1, 2) for h, s in ((hq, sq), (hkv, sk), (hkv, sk))]
    else:
        assert hq == hkv and sq == sk
        xs = list(torch.randn(b, sq, 3, hq, d, dtype=dtype).permute(2, 0, 3, 1, 4))
    return [x.detach().requires_grad_(grad) for x in xs]


EXTRAS = {
    "full": dict(),
    "causal": dict(window_right=0),
    "window": dict(window_left=4, window_right=1),
    "empty-rows": dict(window_right=-3),
    "bias": dict(bias=(4, 16, 16)),
    "bias-broadcast": dict(bias=(2, 1, 1, 16), window_right=0),
    "mask": dict(mask=(2, 1, 16, 16)),
    "bias-and-mask": dict(bias=(1, 4, 16, 1), mask=(2, 1, 1, 16)),
}


def arguments(extra, dtype=torch.float32, bias_grad=True):
    """bias, mask, scale, window_left, window_right, target of one case."""
    e = dict(bias=None, mask=None, window_left=None, window_right=None) | EXTRAS[extra]
    bias = None if e["bias"] is None else torch.randn(e["bias"], dtype=dtype).requires_grad_(bias_grad)
    mask = None if e["mask"] is None else torch.rand(e["mask"]) > 0.3
    return bias, mask, 0.35, e["window_left"], e["window_right"], "reference"


@pytest.mark.parametrize("extra", EXTRAS)
def test_opcheck_forward(extra):
    torch.library.opcheck(attention.default, (*qkv(), *arguments(extra)))


@pytest.mark.parametrize("layout", ["bhsd", "bshd", "packed"])
def test_opcheck_layouts(layout):
    torch.library.opcheck(attention.default, (*qkv(hkv=4, layout=layout), *arguments("causal")))


@pytest.mark.parametrize("extra", ["causal", "bias-broadcast"])
@pytest.mark.parametrize("bias_grad", [False, True])
def test_opcheck_backward(extra, bias_grad):
    q, k, v = qkv(layout="bshd", grad=False)
    bias, mask, *rest = arguments(extra, bias_grad=False)
    out, lse = attention(q, k, v, bias, mask, *rest)
    args = (torch.randn_like(out), q, k, v, bias, mask, out, lse, *rest, bias_grad and bias is not None)
    torch.library.opcheck(torch.ops.fa3.attention_backward.default, args)
    torch.library.opcheck(torch.ops.fa3.attention_backward.default, args, dict(dlse=torch.randn_like(lse)))


@pytest.mark.parametrize("extra", EXTRAS)
def test_gradients_are_those_of_the_reference(extra):
    leaves = qkv(dtype=torch.float64)
    bias, mask, scale, left, right, target = arguments(extra, dtype=torch.float64)
    out, lse = attention(*leaves, bias, mask, scale, left, right, target)
    expected, expected_lse = attention_reference(*leaves, bias, mask, scale=scale, window_left=left, window_right=right)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)
    if bias is not None:
        leaves.append(bias)
    # Both in one go: autograd through the reference's own arithmetic, and through the op's formula.
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    keep = expected_lse.isfinite()
    expected, expected_lse = expected.where(keep.unsqueeze(-1), 0.0), expected_lse.where(keep, 0.0)
    given = {"out": ((out, expected, dout),), "lse": ((lse, expected_lse, dlse),)}
    for name in ("out", "lse", "both"):
        ours, theirs, grads = zip(*given.get(name, given["out"] + given["lse"]))
        wanted = torch.autograd.grad(theirs, leaves, grads, retain_graph=True, materialize_grads=True)
        got = torch.autograd.grad(ours, leaves, grads, retain_graph=True)
        for x, want in zip(got, wanted):
            torch.testing.assert_close(x, want)


def test_gradcheck():
    leaves = qkv(b=1, hq=2, hkv=1, sq=5, sk=4, d=3, dtype=torch.float64)
    bias = torch.randn(1, 2, 1, 4, dtype=torch.float64, requires_grad=True)
    f = lambda q, k, v, b: attention(q, k, v, b, None, 0.5, None, 1, "reference")  # noqa: E731
    torch.autograd.gradcheck(f, (*leaves, bias))


def test_bias_without_gradient_gets_none():
    q, k, v = qkv()
    bias, *rest = arguments("bias", bias_grad=False)
    attention(q, k, v, bias, *rest)[0].sum().backward()
    assert q.grad is not None and bias.grad is None


def test_a_bias_inside_the_score_has_no_gradient():
    q, k, v = qkv()
    bias, *rest = arguments("bias")
    with pytest.raises(NotImplementedError, match="a bias inside the formula of the score has no gradient"):
        attention(q, k, v, bias, *rest, score_formula="tanh(s + b)")
    with pytest.raises(ValueError, match="names a bias, and there is none"):
        attention(q, k, v, None, *rest, score_formula="tanh(s + b)")


def test_double_backward_says_no():
    q, k, v = qkv()
    (dq,) = torch.autograd.grad(attention(q, k, v, *arguments("full"))[0].sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward"):
        dq.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("layout", ["bhsd", "bshd", "packed"])
def test_fake_promises_the_real_strides_and_dtypes(dtype, layout):
    args = (*qkv(hkv=4, dtype=dtype, layout=layout, grad=False), *arguments("causal"))
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = attention(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args))
    real = attention(*args)
    for f, r in zip(fake, real):
        assert (f.shape, f.stride(), f.dtype) == (r.shape, r.stride(), r.dtype)


@pytest.mark.parametrize("extra", ["causal", "bias-broadcast", "mask"])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("layout", ["bhsd", "bshd", "packed"])
def test_compiles_with_inductor(extra, dynamic, layout):
    torch._dynamo.reset()

    def f(q, k, v, bias, mask, scale, left, right, target):
        return attention(q * 2, k, v + 1, bias, mask, scale, left, right, target)[0].sin()

    # The second length differs from the first, so that with dynamic=True one graph has to serve both.
    compiled = torch.compile(f, dynamic=dynamic, fullgraph=True)
    for seqlen in (16, 16) if not dynamic or extra == "mask" else (16, 24):
        leaves = qkv(sq=seqlen, sk=seqlen, hkv=4, layout=layout)
        bias, *rest = arguments(extra)
        if bias is not None:
            bias = torch.randn(2, 1, 1, seqlen, requires_grad=True)
            leaves.append(bias)
        results = []
        for g in (f, compiled):
            out = g(*leaves[:3], bias, *rest)
            results.append((out, *torch.autograd.grad(out.sum(), leaves)))
        for want, got in zip(*results):
            assert want.stride() == got.stride()
            torch.testing.assert_close(got, want)


def test_packed_views_are_not_copied(monkeypatch):
    """Inductor must hand the op the very views that the projection was cut into."""
    torch._dynamo.reset()
    seen = []
    real = ops.attention_reference

    def spy(q, k, v, *args, **kwargs):
        seen.append([x.stride() for x in (q, k, v)])
        return real(q, k, v, *args, **kwargs)

    monkeypatch.setattr(ops, "attention_reference", spy)
    weight = torch.randn(3 * 4 * 8, 32)

    @torch.compile(fullgraph=True)
    def f(x):
        q, k, v = (x @ weight.T).view(2, 16, 3, 4, 8).permute(2, 0, 3, 1, 4)
        return attention(q, k, v, None, None, 0.3, None, 0, "reference")[0]

    f(torch.randn(2, 16, 32))
    assert seen == [[(16 * 96, 8, 96, 1)] * 3]


BAD = {
    "target": (dict(), dict(target="cuda"), "target"),
    "rank": (dict(q=(4, 16, 8)), dict(), "batch, heads"),
    "head_dim": (dict(q=(2, 4, 16, 16)), dict(), "shapes do not fit"),
    "kv_length": (dict(v=(2, 2, 15, 8)), dict(), "shapes do not fit"),
    "heads": (dict(q=(2, 3, 16, 8)), dict(), "do not divide"),
    "mask": (dict(), dict(mask=torch.zeros(16, 16)), "mask is bool"),
    "bias": (dict(), dict(bias=torch.zeros(16, 16, dtype=torch.bool)), "bias is floating"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_refused(name):
    shapes, over, message = BAD[name]
    xs = dict(zip("qkv", qkv(grad=False))) | {n: torch.randn(s) for n, s in shapes.items()}
    o = dict(bias=None, mask=None, target="reference") | over
    with pytest.raises((ValueError, RuntimeError), match=message):
        attention(xs["q"], xs["k"], xs["v"], o["bias"], o["mask"], 1.0, None, None, o["target"])


@pytest.mark.parametrize("masked", [False, True])
def test_dropout(masked):
    """The weights that are kept hang on the seed alone, in the backward as in the forward."""
    q, k, v = qkv()
    bias, mask, *rest = arguments("mask" if masked else "full")
    seed, p = torch.tensor([2**40 + 7]), 0.3
    out, lse = attention(q, k, v, bias, mask, *rest[:-1], "reference", None, None, seed, p)
    kept = dropout.kept_weights(seed, p, (*q.shape[:3], k.shape[2]))
    whole, whole_lse = attention(q, k, v, bias, mask, *rest[:-1], "reference")
    torch.testing.assert_close(lse, whole_lse)
    assert not torch.equal(out, whole)
    want, _ = attention_reference(
        q, k, v, bias, mask, scale=rest[0], window_left=rest[1], window_right=rest[2], kept=kept,
        keep_scale=dropout.keep_scale(p),
    )  # fmt: skip
    torch.testing.assert_close(out, want)
    dout = torch.randn_like(out)
    for got, grad in zip(torch.autograd.grad(out, (q, k, v), dout), torch.autograd.grad(want, (q, k, v), dout)):
        torch.testing.assert_close(got, grad)


def of_formulas():
    """The operators' last arguments, and the bias, in float64, and mask that they are."""
    slopes, document = torch.rand(1, 4, 1, 1), (torch.arange(32).view(2, 1, 1, 16) // 5)
    q, k = torch.arange(16)[:, None], torch.arange(16)
    formulas = "real(t0) * (real(k) - real(q))", "t1 == t2", "", slopes, document.mT, document
    return formulas, slopes.double() * (k - q), document.mT == document


def test_opcheck_formulas():
    formulas, _, _ = of_formulas()
    args = (*qkv(), *arguments("causal"), None, None, None, 0.0, False, None, *formulas)
    torch.library.opcheck(attention.default, args)


def test_formulas_are_the_tensors_that_they_stand_for():
    formulas, bias, mask = of_formulas()
    leaves = qkv(dtype=torch.float64)
    _, _, *rest = arguments("causal")
    out, lse = attention(*leaves, None, None, *rest, None, None, None, 0.0, False, None, *formulas)
    expected, expected_lse = attention(*leaves, bias, mask, *rest)
    torch.testing.assert_close((out, lse), (expected, expected_lse))
    dout = torch.randn_like(out)
    ours, theirs = (torch.autograd.grad(x, leaves, dout) for x in (out, expected))
    torch.testing.assert_close(ours, theirs)


SCORES = {  # a formula of the scores, with tables [1, 4, 1, 1] and [2, 1, 1, 16]; and the same in PyTorch
    "where(s > 0.5, 0.5, where(s < -0.5, -0.5, s))": lambda s, q, k, a, b: s.clamp(-0.5, 0.5),
    "where(s <= 0.0, 0.0, s) * real(t0) - s / real(t1)": lambda s, q, k, a, b: s.relu() * a - s / b,
    "tanh(s + real(t1)) * sigmoid(2.0 * s)": lambda s, q, k, a, b: (s + b).tanh() * (2 * s).sigmoid(),
    "s * exp(-real(t0) * abs(real(q) - real(k)))": lambda s, q, k, a, b: s * (-a * (q - k).abs()).exp(),
    "where(k > q, 0.25, -s * s) + abs(s)": lambda s, q, k, a, b: (-s * s).masked_fill(k > q, 0.25) + s.abs(),
    "maximum(s, -0.1) + minimum(exp(s), real(t1))": lambda s, q, k, a, b: s.clamp(min=-0.1) + torch.minimum(s.exp(), b),
    "log(1.0 + exp(s)) + sqrt(s * s + 1.0) / (2.0 + s * s)": lambda s, q, k, a, b: (
        (1 + s.exp()).log() + (s * s + 1).sqrt() / (2 + s * s)
    ),
}  # fmt: skip


@pytest.mark.parametrize("text", SCORES)
def test_formulas_of_scores(text):
    """Forward and gradients, beside a window."""
    tables = torch.rand(1, 4, 1, 1) + 0.5, torch.rand(2, 1, 1, 16) + 0.5
    q, k, v = leaves = qkv(dtype=torch.float64)
    rest = (0.25, None, 2, "reference", None, None, None, 0.0, False, None, "", "", text, *tables)
    out, _ = attention(*leaves, None, None, *rest)
    rows, columns = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
    group = q.shape[1] // k.shape[1]
    scores = SCORES[text](q @ k.repeat_interleave(group, 1).mT * 0.25, rows, columns, *(x.double() for x in tables))
    expected = scores.masked_fill(columns > rows + 2, float("-inf")).softmax(-1) @ v.repeat_interleave(group, 1)
    torch.testing.assert_close(out, expected)
    dout = torch.randn_like(out)
    ours, theirs = (torch.autograd.grad(x, leaves, dout) for x in (out, expected))
    torch.testing.assert_close(ours, theirs)


def test_a_formula_of_scores_takes_the_place_of_a_soft_cap():
    leaves, options = qkv(), (*arguments("causal"), None, None, None, 0.0, False, None)
    formula = attention(*leaves, *options, "", "", "30.0 * tanh(s / 30.0)")
    torch.testing.assert_close(formula, attention(*leaves, *arguments("causal"), 30.0))
    with pytest.raises(ValueError, match="a bias or of a mask names the score"):
        attention(*leaves, *options, "s", "")


def test_tables_have_no_gradient():
    formulas, _, _ = of_formulas()
    formulas[3].requires_grad_()
    with pytest.raises(NotImplementedError, match="tables of formulas have no gradient"):
        attention(*qkv(), *arguments("causal"), None, None, None, 0.0, False, None, *formulas)


@pytest.mark.parametrize("operator", ["attention_fp8", "attention_quantised"])
def test_formulas_in_8_bits(operator):
    formulas, bias, mask = of_formulas()
    q, k, v = qkv(d=16, grad=False)
    _, _, *rest = arguments("causal")
    if operator == "attention_fp8":
        ones = [torch.ones(1, 1)] * 3
        q, k, v = (x.to(torch.float8_e4m3fn) for x in (q, k, v))
        call = lambda *terms, more=(): torch.ops.fa3.attention_fp8(  # noqa: E731
            q, k, v, *ones, *terms, *rest, torch.bfloat16, None, None, None, *more
        )
    else:
        call = lambda *terms, more=(): torch.ops.fa3.attention_quantised(  # noqa: E731
            q, k, v, *terms, *rest, 0, None, None, False, None, *more
        )
    torch.testing.assert_close(call(None, None, more=formulas), call(bias.float(), mask))

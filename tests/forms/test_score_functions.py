"""Functions of the scores that nobody listed: written as a formula for the kernels, forward and backward."""

import math

import pytest
import torch
import torch.nn.functional as F

from fa3_inductor import Reason, plan

from .harness import assert_as_good_as_eager, fuse, run

B, H, S, D = 2, 4, 23, 16


def qkv():
    """Numbers that bfloat16 has: where a derivative jumps, roundings would tell the one side from the other."""
    return list((torch.randn(3, B, H, S, D) * 1.5).bfloat16().float().unbind())


def without_oneself(s):
    """Demucs: a query hardly sees its own key."""
    return s.masked_fill(torch.eye(S, dtype=torch.bool), -100)


def attend(function):
    """Attention whose scores become `function` of them."""

    def attention(q, k, v, *more):
        scores = q @ k.mT * 0.25
        return function(scores, *more).to(v.dtype).softmax(-1) @ v

    return attention


def silu(s):
    return s * torch.sigmoid(s)


def decay(s):
    i, j = torch.arange(S)[:, None], torch.arange(S)
    return (s * torch.exp(-0.1 * (i - j).abs())).masked_fill(j > i, -math.inf)


def capped_sum(s):
    return 3 * torch.tanh(s + 0.1 * torch.arange(S))


def neutral(s):
    return s.masked_fill(torch.ones(S, S, dtype=torch.bool).triu(1), 0.0)


def gated(s, gate):
    return s.relu() * gate.view(H, 1, 1)


def of_keys(s, weight):
    return s * weight[:, None, None, :]


def hardly_hidden(s, hidden):
    """A mask by a number that is not low enough for one."""
    return s.masked_fill(hidden[:, None, None, :], -10.0)


FUNCTIONS = {  # what scores become, and arguments beside q, k and v
    "where(s > 1.0, 1.0, where(s < -1.0, -1.0, s))": (lambda s: s.clamp(-1, 1), ()),
    "where(s > 0.5, 0.5, s)": (lambda s: s.clamp(max=0.5), ()),
    "where(s < -2.0, -2.0, s)": (lambda s: torch.clamp_min(s, -2.0), ()),
    "where(s <= -1.0, -1.0, where(s >= 1.0, 1.0, s))": (F.hardtanh, ()),
    "where(s <= 0.0, 0.0, s)": (F.relu, ()),
    "where(s > 0.0, s, s * 0.2)": (lambda s: F.leaky_relu(s, 0.2), ()),
    "s * sigmoid(s)": (silu, ()),
    "-(s * s)": (lambda s: -(s**2), ()),
    "1.0 - abs(s)": (lambda s: 1.0 - torch.abs(s), ()),
    "abs(s)": (torch.abs, ()),
    "(1.0 / (exp(s) + 1.0)) * 1.0": (lambda s: 1 / (1 + torch.exp(s)), ()),
    "where(s > 0.0, 1.0 * s, 1.0 * 1.0 * (exp(1.0 * s) - 1.0))": (F.elu, ()),
    "where(1.0 * s > 20.0, s, log(1.0 + exp(1.0 * s)) / 1.0)": (F.softplus, ()),
    "s * exp(abs(real(q) - real(k)) * (-0.1))": (decay, ()),
    "tanh(s + real(t0)) * 3.0": (capped_sum, ()),
    "where(k >= (1 + q), 0.0, s)": (neutral, ()),
    "where(s <= 0.0, 0.0, s) * real(t0)": (gated, (lambda: torch.linspace(-1, 1, H).double(),)),
    "s * real(t0)": (of_keys, (lambda: torch.rand(B, S).double(),)),
    "where(k == q, -100.0, s)": (without_oneself, ()),
    "where(t0 != 0, -10.0, s)": (hardly_hidden, (lambda: torch.rand(B, S) > 0.3,)),
}


def arguments(more):
    return [*qkv(), *(make() for make in more)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("text", FUNCTIONS)
def test_fused(text, dtype):
    """Forward and every gradient, with the formula in the report."""
    function, more = FUNCTIONS[text]
    fn = attend(function)
    trains = not any(make().is_floating_point() for make in more)
    args = arguments(more)
    compiled, report = fuse(fn, target="reference")
    ours, eager, exact = (run(f, args, d, trains) for f, d in ((compiled, dtype), (fn, dtype), (fn, torch.float64)))
    assert_as_good_as_eager(ours, eager, exact, dtype)
    (site,) = report.sites
    assert (site.status, site.detail) == ("fused", f"scores become {text}"), site.verdict
    assert site.mask == ("causal" if function is decay else "full")


@pytest.mark.parametrize("text", FUNCTIONS)
def test_as_planned_for_hopper(text, monkeypatch):
    monkeypatch.setattr(plan, "_not_hopper", lambda device: None)
    seen = []
    monkeypatch.setattr(plan, "_kernel_name", lambda spec, *_: seen.append(spec.score.text) or "kernel")
    function, more = FUNCTIONS[text]
    compiled, report = fuse(attend(function))
    run(compiled, arguments(more), torch.bfloat16, False)
    assert [s.status for s in report.sites] == ["fused"] and seen == [text]


@pytest.mark.parametrize("text", FUNCTIONS)
def test_left_as_written_where_there_is_no_kernel(text):
    function, more = FUNCTIONS[text]
    args = arguments(more)
    compiled, report = fuse(attend(function))
    torch.testing.assert_close(
        run(compiled, args, torch.float32, False).out, run(attend(function), args, torch.float32, False).out
    )
    (site,) = report.sites
    assert site.status == "rejected" and "no kernel, which would compute it: cpu tensors" in site.detail


@pytest.mark.parametrize("broken", [None, math.nan, math.inf])
def test_nan_to_num(broken):
    """torchscale: between the products and the mask."""

    def fn(q, k, v):
        scores = torch.nan_to_num(q @ k.mT * 0.25)
        return (scores + torch.full((S, S), -math.inf).triu(1)).softmax(-1) @ v

    args = qkv()
    if broken is not None:
        args[1][0, 1, 5, 2] = broken
    compiled, report = fuse(fn, target="reference")
    ours, eager = (run(f, args, torch.float32, broken is None) for f in (compiled, fn))
    for mine, theirs in zip([ours.out, *ours.grads], [eager.out, *eager.grads], strict=True):
        torch.testing.assert_close(mine, theirs, equal_nan=True)
    (site,) = report.sites
    limit = torch.finfo(torch.float32).max
    text = f"where(s != s, 0.0, where(s > {limit}, {limit}, where(s < {-limit}, {-limit}, s)))"
    assert (site.status, site.mask, site.detail) == ("fused", "causal", f"scores become {text}")


def test_infinities_that_become_a_number_leave_it_alone():
    fn = attend(lambda s: torch.nan_to_num(s, posinf=3.0))
    compiled, report = fuse(fn, target="reference")
    args = qkv()
    torch.testing.assert_close(*(run(f, args, torch.float32, False).out for f in (compiled, fn)))
    assert [site.reason for site in report.sites] == [Reason.SCORE_OP]


def test_learned(monkeypatch):
    """What a function has of its own is no part of the kernels' gradients."""
    fn, args = attend(gated), arguments((lambda: torch.ones(H),))
    compiled, report = fuse(fn, target="reference")
    ours, eager = (run(f, args, torch.float32) for f in (compiled, fn))
    torch.testing.assert_close([ours.out, *ours.grads], [eager.out, *eager.grads])
    (site,) = report.sites
    assert (site.status, site.reason) == ("rejected", Reason.SCORE_OP) and "has a gradient" in site.detail


def of_keys_then_biased_then_scaled(s, weight, bias):
    return (s * weight[:, None, None, :] + bias) * 0.5


def of_keys_then_hidden_then_divided(s, weight, bias):
    """GPT's masking of old, scaled."""
    return (s * (weight > 0.5)[:, None, None, :] - 1e9 * (weight <= 0.5)[:, None, None, :]) / -2.0


@pytest.mark.parametrize("function", [of_keys_then_biased_then_scaled, of_keys_then_hidden_then_divided])
def test_a_scale_behind_what_is_added(function):
    """It scales the function as well."""
    fn, args = attend(function), arguments((lambda: torch.rand(B, S), lambda: torch.randn(S)))
    compiled, report = fuse(fn, target="reference")
    ours, eager = (run(f, args, torch.float32, grads=False) for f in (compiled, fn))
    torch.testing.assert_close(ours.out, eager.out)
    assert [s.status for s in report.sites] == ["fused"]


def capped_with_positions(s, positions):
    """The audio encoders of Gemma 3n and 4: the cap is over the product and a tensor."""
    hidden = torch.ones(S, S, dtype=torch.bool).triu(5)
    return (torch.tanh((s + positions) / 3.0) * 3.0).masked_fill(hidden, -1e9)


def gated_by_pairs(s, pairs):
    return s * torch.sigmoid(pairs)


def of_queries_and_keys(s, pairs):
    return torch.sigmoid(s * pairs[:, None] + pairs[:, None]) * 4.0


PAIRS = {
    capped_with_positions: lambda: torch.randn(B, H, S, S),
    gated_by_pairs: lambda: torch.randn(H, S, S),
    of_queries_and_keys: lambda: torch.randn(B, S, S),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("function", PAIRS)
def test_a_tensor_of_queries_and_keys_inside(function, dtype):
    """In training it has a gradient, which the kernels do not give."""
    fn, args = attend(function), arguments((PAIRS[function],))
    for grads in (False, True):
        compiled, report = fuse(fn, target="reference")
        ours, eager = (run(f, args, dtype, grads) for f in (compiled, fn))
        assert_as_good_as_eager(ours, eager, run(fn, args, torch.float64, grads), dtype)
        (site,) = report.sites
        assert site.status == ("rejected" if grads else "fused"), site.verdict
        assert ("has a gradient" if grads else "b") in site.detail


def test_a_constant_of_queries_and_keys_inside():
    fn, args = attend(lambda s: s * torch.linspace(0, 1, S * S).view(S, S).sin()), qkv()
    compiled, report = fuse(fn, target="reference")
    ours, eager = (run(f, args, torch.float32) for f in (compiled, fn))
    assert_as_good_as_eager(ours, eager, run(fn, args, torch.float64), torch.float32)
    assert [s.status for s in report.sites] == ["fused"]


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_infinities_inside_a_cap(value):
    pairs = torch.randn(B, H, S, S)
    pairs[0, 0, 3, 4] = pairs[1, 2, 5] = value
    fn, args = attend(capped_with_positions), [*qkv(), pairs]
    compiled, report = fuse(fn, target="reference")
    torch.testing.assert_close(compiled(*args), fn(*args), equal_nan=True)
    assert [s.status for s in report.sites] == ["fused"]


@pytest.mark.parametrize(
    "function",
    [
        lambda s, a, b: torch.tanh(s + a) * b,  # two tensors
        lambda s, a, b: torch.tanh(s + a) + b,  # another one is added
        lambda s, a, b: torch.relu(s + a),  # may be -inf all along a row
        lambda s, a, b: torch.tanh(s + a.double()).float(),
        lambda s, a, b: 1e39 * torch.tanh(s + a),  # infinite in float32
        lambda s, a, b: 1.0 / torch.tanh(s + a),
    ],
)
def test_tensors_of_queries_and_keys_that_do_not_fit(function):
    fn, args = attend(function), arguments((lambda: torch.randn(H, S, S), lambda: torch.randn(H, S, S)))
    compiled, report = fuse(fn, target="reference")
    torch.testing.assert_close(compiled(*args), fn(*args), equal_nan=True)
    assert [s.reason for s in report.sites] == [Reason.SCORE_OP]


def fed_back(s):
    return s + s.mean(-1, keepdim=True)


def transposed(s):
    return torch.relu(s + s.mT)


def half_detached(s):
    return s * torch.sigmoid(s.detach())


def rounded(s):
    return torch.round(s)


def jumping(s):
    """Where it jumps, what is rounded differently comes out on another side."""
    return torch.where(s > 0, 1.0, 0.0)


def by_rank(s):
    return s - s.argsort(-1).to(s.dtype)


def crossed(s):
    return s.clamp(1.0, -1.0)


def larger_of_two(s):
    """Where there is a NaN, the kernels' maximum is the other operand."""
    return torch.maximum(s, torch.linspace(-1, 1, S).to(s.dtype))


def after_a_mask(s):
    return s.masked_fill(torch.ones(S, S, dtype=torch.bool).triu(1), -math.inf).relu()


@pytest.mark.parametrize(
    "function",
    [fed_back, transposed, half_detached, rounded, jumping, by_rank, crossed, larger_of_two, after_a_mask],
    ids=lambda f: f.__name__,
)
def test_refused(function):
    fn, args = attend(function), qkv()
    compiled, report = fuse(fn, target="reference")
    ours, eager = (run(f, args, torch.float32) for f in (compiled, fn))
    torch.testing.assert_close([ours.out, *ours.grads], [eager.out, *eager.grads])
    assert [s.status for s in report.sites] in ([], ["rejected"])


def test_what_is_returned_stays():
    def fn(q, k, v):
        s = torch.relu(q @ k.mT)
        return s.softmax(-1) @ v, s

    compiled, report = fuse(fn, target="reference")
    args = qkv()
    torch.testing.assert_close(compiled(*args), fn(*args))
    assert [s.reason for s in report.sites] == [Reason.SCORES_USED]


def test_one_query():
    """A query axis of size one has no index: what is a score must not be taken for a tensor beside it."""

    def fn(q, k, v):
        return (torch.relu(q[:, :, -1:] @ k.mT) * torch.arange(S)).softmax(-1) @ v

    compiled, report = fuse(fn, target="reference")
    args = qkv()
    torch.testing.assert_close(compiled(*args), fn(*args))
    assert [s.detail for s in report.sites] == ["scores become where(s <= 0.0, 0.0, s) * real(k)"]


def capped_and_masked(function):
    def fn(q, k, v, keep):
        scores = function(q @ k.mT * 0.25)
        return (scores + torch.where(keep[:, None, None], 0.0, torch.finfo(scores.dtype).min)).softmax(-1) @ v

    return fn


@pytest.mark.parametrize("function", [lambda s: 2 * torch.tanh(s / 2), F.relu], ids=["soft cap", "relu"])
def test_a_query_with_every_key_masked(function):
    """By a finite number: its weights are equal, and its gradient has the function's derivative in it."""
    fn, keep = capped_and_masked(function), torch.rand(B, S) > 0.3
    keep[1] = False
    for grads in (False, True):
        compiled, report = fuse(fn, target="reference")
        ours, eager = (run(f, [*qkv_of(0), keep], torch.float32, grads) for f in (compiled, fn))
        torch.testing.assert_close([ours.out, *ours.grads], [eager.out, *eager.grads])
        assert [s.reason for s in report.sites] == [None]


def qkv_of(seed):
    torch.manual_seed(seed)
    return qkv()


INFINITE = {
    "filled": lambda s, hidden, floats: s + torch.zeros(S, S).masked_fill(hidden, -math.inf),
    "log": lambda s, hidden, floats: s + (~hidden).float().log(),
    "over zero": lambda s, hidden, floats: s - hidden.float() / 0.0,
    "given": lambda s, hidden, floats: s + floats,
    "given for keys": lambda s, hidden, floats: s + floats[0],
    "written over": lambda s, hidden, floats: torch.where(hidden[0], floats[0], s),
}


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("how", INFINITE)
def test_infinities_inside_a_function(how, dynamic):
    """A query that they leave no key has NaN, and not what a kernel gives it that takes them for hidden keys."""

    def attention(q, k, v, hidden, floats, temperature):
        scores = torch.einsum("bgrqd,bgkd->bgrqk", q.reshape(B, 2, 2, S, D), k)
        scores = INFINITE[how](5.0 * torch.tanh(scores / 5.0), hidden, floats)
        return torch.einsum("bgrqk,bgke->bgrqe", (scores * temperature).softmax(-1), v)

    torch._dynamo.reset()
    q, k, v = torch.randn(B, 4, S, D), torch.randn(B, 2, S, D), torch.randn(B, 2, S, D)
    hidden = torch.ones(S, S, dtype=torch.bool).triu()  # (the first query sees nothing)
    args = q, k, v, hidden, torch.zeros(S, S).masked_fill(hidden, -math.inf), torch.rand(()) + 0.5
    compiled = torch.compile(attention, backend="fa3_inductor", dynamic=dynamic, options={"target": "reference"})
    with torch.no_grad():
        torch.testing.assert_close(compiled(*args), attention(*args), equal_nan=True)


POLES = {
    "log": lambda s: s.relu().log(),
    "log1p": lambda s: torch.log1p(s.relu() - 1.0),
    "log of too little for 16 bits": lambda s: (s.relu() + 1e-9).float().log(),
    "log1p of too little for 16 bits": lambda s: (s.relu() - 0.9999).log1p(),
    "over": lambda s: -1.0 / s.relu(),
    "reciprocal": lambda s: -s.relu().reciprocal(),
    "rsqrt": lambda s: -s.abs().clamp(max=0.0).rsqrt(),
    "power": lambda s: -(s.relu() ** -0.5),
}


@pytest.mark.parametrize("how", POLES)
def test_functions_that_may_be_minus_infinity_of_every_score(how):
    """Softmax makes NaN of a row of nothing else; a kernel would take its keys for hidden ones."""
    fn, args = attend(lambda s: POLES[how](s - 50.0)), arguments(())
    if how.endswith("16 bits"):
        args = [x.bfloat16() if "log1p" in how else x.half() for x in args]
    compiled, report = fuse(fn, target="reference")
    with torch.no_grad():
        expected = fn(*args)
        torch.testing.assert_close(compiled(*args), expected, equal_nan=True)
    assert expected.isnan().all() and [site.status for site in report.sites] != ["fused"]


NO_POLES = {
    "log1p of relu": lambda s: s.relu().log1p(),
    "softplus by hand": lambda s: torch.log(1.0 + torch.exp(s)),
    "softsign": lambda s: s / (1.0 + s.abs()),
    "softsign of a square": lambda s: s * (s**2 + 1.0).rsqrt(),
    "log of what is clamped": lambda s: s.clamp(min=0.1).log(),
    "over a number": lambda s: s.relu() / 3.0,
    "over less than nothing": lambda s: s / (-2.0 - torch.sigmoid(s)),
}


@pytest.mark.parametrize("how", NO_POLES)
def test_functions_that_stay_away_from_their_pole(how):
    fn, args = attend(NO_POLES[how]), arguments(())
    compiled, report = fuse(fn, target="reference")
    with torch.no_grad():
        torch.testing.assert_close(compiled(*args), fn(*args))
    assert [site.status for site in report.sites] == ["fused"], report

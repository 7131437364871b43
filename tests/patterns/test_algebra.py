"""Tensors as functions of their indices, against the tensors themselves."""

import math
import random

import pytest
import sympy
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from fa3_inductor.patterns.algebra import Algebra, Choice, Opaque, is_condition, leaves
from fa3_inductor.patterns.indices import Space, shape_exprs

from .test_indices import everywhere, symbols
from .test_layouts import output_node

Q, K = 5, 6
MIN = torch.finfo(torch.float32).min


def rows(dtype=torch.int64):
    return torch.arange(Q, dtype=dtype)[:, None]


def columns(dtype=torch.int64):
    return torch.arange(K, dtype=dtype)[None, :]


def causal():
    return columns() <= rows()


def constant(value, dtype, shape=(1,)):
    return torch.full(shape, value, dtype=dtype)


UNDERSTOOD = {
    "int32": lambda x: columns(torch.int32) <= rows(torch.int32) + 1,
    "int64": lambda x: rows() - columns() < 3,
    "float32": lambda x: columns(torch.float32) > rows(torch.float32) - 1,
    "mixed dtypes": lambda x: columns(torch.int32) >= rows(),
    "eq": lambda x: columns() == rows(),
    "ne": lambda x: columns() != rows(),
    "arange": lambda x: torch.arange(2, 20, 3) + torch.arange(7, 1, -1),
    "tril": lambda x: torch.ones(Q, K).tril(),
    "tril bool": lambda x: torch.ones(Q, K, dtype=torch.bool).tril(-2),
    "triu": lambda x: torch.full((Q, K), float("-inf")).triu(1),
    "triu bool": lambda x: ~torch.ones(Q, K, dtype=torch.bool).triu(diagonal=2),
    "eye": lambda x: torch.eye(Q, K) + torch.eye(K)[:Q],
    "eye bool": lambda x: ~torch.eye(K, Q, dtype=torch.bool).mT,
    "and": lambda x: causal() & (rows() - columns() < 3),
    "or": lambda x: causal() | (columns() < 2),
    "xor": lambda x: causal() ^ (columns() < 2),
    "logical": lambda x: torch.logical_and(torch.logical_not(causal()), torch.logical_or(columns() > 3, rows() < 2)),
    "logical_xor": lambda x: torch.logical_xor(columns() - 1, rows() - 1),
    "where": lambda x: torch.where(causal(), 0.0, float("-inf")),
    "where nested": lambda x: torch.where(causal(), torch.where(columns() < 2, 1.0, 2.0), columns().float()),
    "masked_fill": lambda x: torch.zeros(Q, K).masked_fill(~causal(), MIN),
    "neg": lambda x: -columns() + rows(),
    "abs": lambda x: (rows() - columns()).abs() <= 2,
    "rsub": lambda x: 1 - causal().float(),
    "mul": lambda x: rows() * 3 - columns() * 2,
    "floor_divide": lambda x: (columns() // 2) == (rows() // 2),
    "div floor": lambda x: torch.div(rows() - 3, 2, rounding_mode="floor"),
    "remainder": lambda x: (rows() - columns()) % 3,
    "cumsum": lambda x: torch.ones(2, K, dtype=torch.int64).cumsum(-1) - 1,
    "diff": lambda x: torch.arange(K).diff(),
    "diff prepend": lambda x: (torch.arange(K) * 2).diff(prepend=torch.full((1,), 7)),
    "index": lambda x: torch.arange(0, 40, 4)[rows() + columns()],
    "index bool mask": lambda x: causal()[torch.arange(Q)[:, None], torch.arange(Q)[None, :]],
    "bool to float": lambda x: causal().to(torch.float32),
    "bool to bfloat16": lambda x: (1.0 - causal().to(torch.bfloat16)) * torch.finfo(torch.bfloat16).min,
    "inverted": lambda x: (1.0 - causal().float()) * MIN,
    "rounded constant": lambda x: torch.full((Q,), 0.1, dtype=torch.bfloat16),
    "new and like": lambda x: x.new_ones(Q) + x.new_zeros(Q) + x.new_full((Q,), 2.0) + torch.full_like(x[0, :1], 3.0),
    "like": lambda x: torch.ones_like(x) + torch.zeros_like(x),
    "int8": lambda x: torch.arange(100).to(torch.int8),
    "bfloat16 exact": lambda x: torch.arange(200).to(torch.bfloat16) > 150,
    "float to int": lambda x: torch.arange(K, dtype=torch.float32).to(torch.int64),
    "float32 == scalar": lambda x: constant(0.1, torch.float32) == 0.1,
    "float32 == float64 0-dim": lambda x: constant(0.1, torch.float32) == constant(0.1, torch.float64, ()),
    "int == float scalar": lambda x: torch.full((1,), 2**24 + 1) == float(2**24),
    "int64 == float32 0-dim": lambda x: torch.full((1,), 2**24 + 1) == constant(2.0**24, torch.float32, ()),
    "nan <": lambda x: constant(math.nan, torch.float32) < columns(),
    "nan >=": lambda x: columns() >= math.nan,
    "layouts": lambda x: causal()[None, None].expand(2, 1, Q, K).transpose(2, 3).reshape(2, K * Q),
}
NOT_UNDERSTOOD = {
    "input": lambda x: x,
    "uint8 wraparound": lambda x: torch.arange(K, dtype=torch.uint8) - 3,
    "int8 wraparound": lambda x: torch.arange(300).to(torch.int8),
    "bfloat16 counting": lambda x: torch.arange(300).to(torch.bfloat16) > 280,
    "float16 counting": lambda x: torch.arange(2060).to(torch.float16),
    "cumsum of a changing term": lambda x: torch.arange(K).cumsum(0),
    "nan": lambda x: x != x,
    "float compare": lambda x: x > x.mT,
    "truncation": lambda x: (torch.arange(K, dtype=torch.float32) * 0.5).to(torch.int64),
    "second diff": lambda x: torch.arange(K).diff(n=2),
    "alpha": lambda x: torch.add(rows(), columns(), alpha=2),
    "bfloat16 == scalar, to which kernels round differently": lambda x: constant(0.1, torch.bfloat16) == 0.1,
    "scalar - bfloat16, likewise": lambda x: 257 - constant(1.0, torch.bfloat16),
    "counting beyond float32": lambda x: torch.arange(2**24 - 2, 2**24 + 3) == float(2**24),
    "floor of a fraction": lambda x: constant(0.3, torch.float64) // 1,
    "sin": lambda x: torch.sin(columns().float()),
}


def evaluate(function):
    """(the value, its index symbols, the tensor)"""
    x = torch.randn(K, K)
    expected = function(x)
    space = Space()
    index = symbols(space, expected.shape)
    value = Algebra(space, constant=lambda node, index: None).value(output_node(function, x), index)
    return value, index, expected


def parts(value):
    """Every number and condition in a value."""
    if isinstance(value, Choice):
        return [value.condition, *parts(value.yes), *parts(value.no)]
    return [value]


def understood(value):
    return not any(part.has(Opaque) for part in parts(value))


def at(value, where):
    while isinstance(value, Choice):
        value = value.yes if value.condition.xreplace(where) == sympy.true else value.no
    concrete = value.xreplace(where)
    return float(bool(concrete)) if is_condition(concrete) else float(concrete)


@pytest.mark.parametrize("name", UNDERSTOOD)
def test_understood(name):
    value, index, expected = evaluate(UNDERSTOOD[name])
    assert understood(value)
    for concrete, where in everywhere(index, expected.shape):
        found, wanted = at(value, where), expected[concrete].item()
        assert found == wanted or math.isnan(found) and math.isnan(wanted), concrete


@pytest.mark.parametrize("name", NOT_UNDERSTOOD)
def test_not_understood(name):
    assert not understood(evaluate(NOT_UNDERSTOOD[name])[0])


DTYPES = [
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]
NUMBERS = [0, 1, -1, 3, 0.1, 1 / 3, -0.5, 256, 257, 2**24 + 1, 1e30, math.inf, -math.inf, math.nan]


def fits(x, dtype):
    if dtype.is_floating_point:
        return not math.isfinite(x) or abs(x) <= torch.finfo(dtype).max
    return isinstance(x, int) and (dtype == torch.bool or torch.iinfo(dtype).min <= x <= torch.iinfo(dtype).max)


def operands(dtype):
    """Every number that ``dtype`` takes, in one dimension and in none."""
    return [lambda x=x, s=s: constant(x, dtype, s) for x in NUMBERS if fits(x, dtype) for s in ((1,), ())]


def both(function, left, right):
    return lambda x: function(left(), right())


@pytest.mark.parametrize("name", ["eq", "ne", "lt", "ge", "add", "sub", "rsub", "mul", "div"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_numbers(name, dtype):
    """Whatever is known about an operation on two numbers is what torch makes of them; most is known."""
    known = total = 0
    others = [lambda x=x: x for x in NUMBERS] * 4 + [f for d in DTYPES for f in operands(d)]
    rng = random.Random(0)
    for left in operands(dtype):
        for right in rng.sample(others, 3):
            try:
                value, index, expected = evaluate(both(getattr(torch, name), left, right))
            except RuntimeError:  # bools are not subtracted, and no integer may be too large for its dtype
                continue
            total += 1
            if understood(value):
                known += 1
                found = at(value, {})
                assert found == expected.item() or found != found and expected.isnan(), (left(), right(), found)
    assert known >= 0.6 * total


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_nan_is_neither_less_nor_not_less(dtype):
    def neither(x):
        x = x.to(dtype)
        return ~(x < 0) & ~(x >= 0)

    value, *_ = evaluate(neither)
    assert (value == sympy.false) == (dtype == torch.int64)


@pytest.mark.parametrize(
    "other",
    [
        lambda x: x.to(torch.bfloat16).float(),
        lambda x: (x + 1e10) - 1e10,
        lambda x: x + 0.5 * x - 0.5 * x,
    ],
)
def test_what_rounds_an_input_is_not_the_input(other):
    value, *_ = evaluate(other)
    names = {atom.args[0].name for part in parts(value) for atom in part.atoms(Opaque)}
    assert names and not any(name.startswith(("x", "arg")) for name in names)


@pytest.mark.parametrize("dtype, factor, known", [(torch.float32, 1, True), (torch.float32, 1000, False)])
def test_a_symbolic_length_is_counted_as_far_as_a_row_is_long(dtype, factor, known):
    graph = make_fx(lambda x: (torch.arange(x.shape[0]) * factor).to(dtype), tracing_mode="symbolic")(torch.zeros(7))
    node = graph.graph.output_node().args[0]
    space = Space()
    index = symbols(space, shape_exprs(node.meta["val"]))
    assert understood(Algebra(space, constant=lambda node, index: None).value(node, index)) == known


def test_minus_infinity_times_zero_is_nan():
    value, index, expected = evaluate(lambda x: (1.0 - causal().float()) * float("-inf"))
    assert sympy.nan in leaves(value) and expected.isnan().any()


def test_an_input_has_one_name_however_it_is_reshaped():
    value, (i, j), _ = evaluate(lambda x: x.flatten().view(K, K).mT)
    assert value.func is Opaque and value.args[1:] == (j, i)


def test_a_known_input():
    node = output_node(lambda x: x + 1, torch.zeros(K))
    space = Space()
    (i,) = index = symbols(space, (K,))
    assert Algebra(space, constant=lambda node, index: 2 * index[0]).value(node, index) == 2 * i + 1

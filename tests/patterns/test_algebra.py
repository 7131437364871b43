"""Tensors as functions of their indices, against the tensors themselves."""

import pytest
import sympy
import torch

from fa3_inductor.patterns.algebra import Algebra, Choice, Opaque, is_condition, leaves
from fa3_inductor.patterns.indices import Space

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
        assert at(value, where) == expected[concrete].item(), concrete


@pytest.mark.parametrize("name", NOT_UNDERSTOOD)
def test_not_understood(name):
    assert not understood(evaluate(NOT_UNDERSTOOD[name])[0])


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

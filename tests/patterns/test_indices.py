"""Index arithmetic against brute force: division, bounds, reshapes and broadcasts at every concrete index."""

import itertools
import math

import pytest
import sympy
import torch

from fa3_inductor.patterns.indices import (
    Space,
    broadcast_index,
    is_nonnegative,
    rejoined,
    reshape_index,
    shape_exprs,
)


def symbols(space, shape):
    """One index symbol per axis."""
    return tuple(space.symbol(f"i{axis}", size) for axis, size in enumerate(shape))


def everywhere(index, shape):
    """Every concrete index, with the substitution that makes ``index`` it."""
    for concrete in itertools.product(*map(range, shape)):
        yield concrete, {s: sympy.Integer(c) for s, c in zip(index, concrete) if s.is_symbol}


def test_symbols_are_shared_by_role_and_size():
    space = Space()
    assert space.symbol("q", 4) is space.symbol("q", 4)
    assert len({space.symbol("q", 4), space.symbol("q", 5), space.symbol("k", 4)}) == 3
    assert space.symbol("q", 1) == 0
    assert space.size(space.symbol("q", 4)) == 4


@pytest.mark.parametrize("divisor", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("scale, offset", [(1, 0), (4, 0), (4, 3), (2, 1), (8, -3), (-1, 5)])
def test_divmod(divisor, scale, offset):
    space = Space()
    i, j = index = symbols(space, (6, 4))
    expr = scale * i + j + offset
    quotient, remainder = space.divmod(expr, divisor)
    for (a, b), where in everywhere(index, (6, 4)):
        expected = divmod(scale * a + b + offset, divisor)
        assert (quotient.xreplace(where), remainder.xreplace(where)) == expected


def test_divmod_is_exact_where_the_rest_is_small():
    space = Space()
    i, j = symbols(space, (6, 4))
    assert space.divmod(4 * i + j, 4) == (i, j)
    assert space.divmod(4 * i + j, 3)[0].has(sympy.floor)
    size = sympy.Symbol("s", integer=True, positive=True)
    k = space.symbol("k", size)
    assert space.divmod(size * i + k, size) == (i, k)


@pytest.mark.parametrize("a, b, c", [*itertools.product((-2, 0, 3), (-1, 1), (-4, 5))])
def test_bounds(a, b, c):
    space = Space()
    i, j = index = symbols(space, (5, 3))
    expr = a * i + b * j + c
    values = [sympy.sympify(expr).xreplace(where) for _, where in everywhere(index, (5, 3))]
    assert space.bounds(expr) == (min(values), max(values))


def test_bounds_of_what_is_not_linear_are_unknown():
    space = Space()
    i, j = symbols(space, (5, 3))
    sign_unknown = sympy.Symbol("n", integer=True)
    assert [space.bounds(e) for e in (i * j, i**2, sympy.Mod(i, 2), sign_unknown * i)] == [None] * 4


def test_is_nonnegative():
    s, t = sympy.symbols("s t", integer=True, positive=True)
    n = sympy.Symbol("n", integer=True)
    for expr in (sympy.Integer(0), s - 1, 4 * s - 4, s + t - 2, s * t - 1, s * t - s):
        assert is_nonnegative(expr)
    for expr in (sympy.Integer(-1), s - 2, s - t, n, 1 - s, -s * t):
        assert not is_nonnegative(expr)


SHAPES = [
    ((4, 6), (24,)),
    ((24,), (2, 3, 4)),
    ((2, 3, 4), (6, 4)),
    ((6, 4), (2, 3, 2, 2)),
    ((2, 6, 2), (4, 3, 2)),
    ((1, 4, 1, 6), (4, 6, 1)),
    ((4, 6), (1, 4, 1, 6, 1)),
    ((2, 12), (3, 8)),
    ((1,), (1, 1)),
    ((1, 1), ()),
]


@pytest.mark.parametrize("source_shape, shape", SHAPES + [(b, a) for a, b in SHAPES])
def test_reshape_index(source_shape, shape):
    space = Space()
    index = symbols(space, shape)
    source_index = reshape_index(space, index, shape_exprs(torch.empty(shape)), shape_exprs(torch.empty(source_shape)))
    source = torch.arange(math.prod(shape)).view(source_shape)
    expected = source.reshape(shape)
    for concrete, where in everywhere(index, shape):
        assert source[tuple(int(e.xreplace(where)) for e in source_index)] == expected[concrete]


def test_reshape_and_back_is_the_same_index():
    space = Space()
    shape, merged = shape_exprs(torch.empty(2, 3, 4)), shape_exprs(torch.empty(6, 4))
    index = symbols(space, shape)
    assert reshape_index(space, reshape_index(space, index, shape, merged), merged, shape) == index


@pytest.mark.parametrize("shape", [(2, 3, 4), (1, 3, 4), (2, 1, 1), (3, 1), (4,), (1,), ()])
def test_broadcast_index(shape):
    space = Space()
    index = symbols(space, (2, 3, 4))
    source = torch.arange(math.prod(shape)).view(shape)
    found = broadcast_index(index, shape)
    for concrete, where in everywhere(index, (2, 3, 4)):
        at = tuple(int(sympy.sympify(e).xreplace(where)) for e in found)
        assert source[at] == source.expand(2, 3, 4)[concrete]


def test_an_axis_that_was_split_is_joined_again():
    space = Space()
    i, j = space.symbol("i", sympy.Integer(60)), space.symbol("j", sympy.Integer(4))
    quotient, remainder = space.divmod(i, sympy.Integer(7))
    assert rejoined(7 * quotient + remainder) == i
    assert rejoined(3 * (7 * quotient + remainder) + j) == 3 * i + j
    for other in (7 * quotient + 2 * remainder, 6 * quotient + remainder, remainder, quotient):
        assert rejoined(other) == other

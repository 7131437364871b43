"""Windows proved from conditions, against brute force over every query and key."""

import itertools
import random

import pytest
import sympy

from fa3_inductor.patterns.algebra import Opaque
from fa3_inductor.patterns.indices import Space
from fa3_inductor.patterns.masks import FULL, Axes, Mask, describe, no_row_is_empty, prove

from .test_indices import everywhere


def axes_of(space, seqlen_q, seqlen_k):
    return Axes(space.symbol("q", seqlen_q), space.symbol("k", seqlen_k), *map(sympy.sympify, (seqlen_q, seqlen_k)))


def visible(mask, q, k):
    left, right = mask.window_left, mask.window_right
    inside = (left is None or k >= q - left) and (right is None or k <= q + right)
    return bool(inside and not mask.nothing_visible)


def opaque(name, *index):
    return sympy.Ne(Opaque(sympy.Symbol(name), *index), 0)


SPACE = Space()
AXES = axes_of(SPACE, 6, 9)
Q, K = AXES.q, AXES.k
PADDING = opaque("padding", SPACE.symbol("b", 2), K)


@pytest.mark.parametrize("seed", range(40))
def test_random_window(seed):
    rng = random.Random(seed)
    space, sizes = Space(), (rng.randint(2, 6), rng.randint(2, 6))
    axes = axes_of(space, *sizes)
    left, right, offset, scale = rng.randint(-3, 7), rng.randint(-3, 7), rng.randint(-4, 4), rng.choice((-2, -1, 1, 3))
    position = axes.q + offset
    upper = rng.choice((sympy.Le(axes.k, position + right), sympy.Lt(axes.k - position, right + 1)))
    lower = sympy.Ge(axes.k - position + left, 0)
    if scale < 0:
        lower = sympy.Le(scale * (axes.k - position + left), 0)
    condition = rng.choice((sympy.And(lower, upper), lower, upper, sympy.Not(sympy.Not(lower) | sympy.Not(upper))))
    mask = prove(space, condition, axes)
    assert mask.rest == ()
    for (q, k), where in everywhere((axes.q, axes.k), sizes):
        assert visible(mask, q, k) == bool(condition.xreplace(where))


@pytest.mark.parametrize("seed", range(60))
def test_random_ranges_of_the_distance(seed):
    """Any and, or and not of relations between q and k: a window if it is one, whatever it is written as."""
    rng = random.Random(seed)
    sizes = (rng.randint(2, 6), rng.randint(2, 6))
    space = Space()
    axes = axes_of(space, *sizes)

    def drawn(depth):
        if depth == 0 or rng.random() < 0.2:
            kind = rng.choice((sympy.Le, sympy.Lt, sympy.Ge, sympy.Gt, sympy.Eq, sympy.Ne))
            return kind(rng.choice((1, -1)) * (axes.k - axes.q), rng.randint(-4, 4))
        kind = rng.choice((sympy.And, sympy.Or, lambda a, b: sympy.Not(sympy.And(a, b))))
        return kind(drawn(depth - 1), drawn(depth - 1))

    condition = sympy.Or(drawn(2), drawn(2))
    mask = prove(space, condition, axes)
    for (q, k), where in everywhere((axes.q, axes.k), sizes):
        rest = all(bool(part.xreplace(where)) for part in mask.rest)
        assert (visible(mask, q, k) and rest) == bool(condition.xreplace(where))


@pytest.mark.parametrize(
    "condition, window",
    [
        (sympy.Or(sympy.And(K < Q, Q - K <= 2), sympy.And(K >= Q, K - Q <= 2)), (2, 2)),  # |q - k| <= 2
        (sympy.Or(sympy.And(Q >= K, Q - K < 3), sympy.And(Q < K, K - Q < 5)), (2, 4)),
        (sympy.Or(K <= Q - 2, sympy.And(K >= Q - 1, K <= Q)), (None, 0)),
    ],
)
def test_ranges_that_are_one(condition, window):
    assert prove(SPACE, condition, AXES) == Mask(*(None if x is None else sympy.Integer(x) for x in window), ())


@pytest.mark.parametrize("condition", [sympy.Or(K < Q - 1, K > Q + 1), sympy.Or(K < Q, sympy.And(K >= Q, PADDING))])
def test_ranges_that_are_not(condition):
    assert prove(SPACE, condition, AXES) == Mask(None, None, (condition,))


def test_equality_is_a_window():
    assert prove(SPACE, sympy.Eq(K - Q - 2, 0), AXES) == Mask(sympy.Integer(-2), sympy.Integer(2), ())


def test_what_is_not_understood_is_kept():
    mask = prove(SPACE, sympy.And(K <= Q, PADDING), AXES)
    assert mask == Mask(None, sympy.Integer(0), (PADDING,))
    assert not mask.is_window and not no_row_is_empty(mask, AXES)
    for other in (K + Q <= 4, sympy.Ne(K, Q), 2 * K <= Q, 2 * K - 2 * Q <= 1, K <= Q + SPACE.symbol("b", 2)):
        mask = prove(SPACE, other, AXES)
        assert len(mask.rest) == 1 and mask.window_left is mask.window_right is None


@pytest.mark.parametrize("true", [K >= 0, K < 9, Q - K < 6, K <= Q + 8, sympy.true, sympy.Ne(K, 9)])
def test_what_always_holds_is_dropped(true):
    assert prove(SPACE, true, AXES) == FULL
    assert prove(SPACE, sympy.And(true, K <= Q), AXES) == prove(SPACE, K <= Q, AXES)
    assert prove(SPACE, sympy.Or(true, PADDING), AXES) == FULL


@pytest.mark.parametrize("false", [K < 0, K >= 9, Q - K > 5, K >= Q + 9, sympy.false, sympy.Eq(K, 9)])
def test_what_never_holds(false):
    assert prove(SPACE, sympy.And(false, PADDING), AXES).nothing_visible
    assert prove(SPACE, sympy.Or(false, K > Q + 10, evaluate=False), AXES).nothing_visible
    assert prove(SPACE, sympy.Or(false, K <= Q), AXES) == Mask(None, sympy.Integer(0), ())
    assert not no_row_is_empty(prove(SPACE, false, AXES), AXES)


def test_or():
    either = sympy.Or(K <= Q, PADDING)
    assert prove(SPACE, either, AXES) == Mask(None, None, (either,))
    both = sympy.And(either, K >= Q - 2)
    assert prove(SPACE, both, AXES) == Mask(sympy.Integer(2), None, (either,))


def test_no_row_is_empty():
    for sizes in itertools.product(range(1, 7), repeat=2):
        axes = axes_of(Space(), *sizes)
        for left, right in itertools.product((None, -2, -1, 0, 1, 3), repeat=2):
            mask = Mask(*(None if e is None else sympy.Integer(e) for e in (left, right)), ())
            expected = all(any(visible(mask, q, k) for k in range(sizes[1])) for q in range(sizes[0]))
            assert no_row_is_empty(mask, axes) == expected, (sizes, left, right)


def test_no_row_is_empty_with_symbolic_lengths():
    s, t = sympy.symbols("s t", integer=True, positive=True)
    causal = Mask(None, sympy.Integer(0), ())
    assert no_row_is_empty(causal, axes_of(Space(), s, t))
    assert not no_row_is_empty(Mask(None, t - s, ()), axes_of(Space(), s, t))
    assert no_row_is_empty(Mask(None, t, ()), axes_of(Space(), s, s + t))
    assert no_row_is_empty(Mask(sympy.Integer(3), sympy.Integer(0), ()), axes_of(Space(), s, s))
    assert not no_row_is_empty(Mask(sympy.Integer(3), sympy.Integer(0), ()), axes_of(Space(), s, t))


@pytest.mark.parametrize(
    "condition, text",
    [
        (sympy.true, "full"),
        (sympy.false, "nothing visible"),
        (K <= Q, "causal"),
        (K <= Q + 3, "causal (bottom-right)"),
        (K <= Q + 1, "causal (shifted by 1)"),
        (sympy.And(K <= Q, K > Q - 4), "sliding window (left 3, right 0)"),
        (K >= Q - 2, "sliding window (left 2, right unbounded)"),
        (PADDING, "key padding[b, k]"),
        (sympy.And(K <= Q, PADDING), "causal & key padding[b, k]"),
        (opaque("any", Q, K), "mask[k, q]"),
    ],
)
def test_describe(condition, text):
    mask = prove(SPACE, condition, AXES)
    assert describe(mask, AXES, SPACE) == text

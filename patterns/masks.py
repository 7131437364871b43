"""What a mask is: a condition on (query, key) reduced to a window, plus whatever is left over.

Key ``k`` is visible to query ``q`` iff ``q - window_left <= k <= q + window_right``, both counted from zero; None means
unbounded. Causal is ``window_right = 0``; causal aligned to the last key is ``window_right = seqlen_k - seqlen_q``.
"""

import dataclasses
import functools

import sympy
from sympy.logic.boolalg import Boolean

from .algebra import FALSE, TRUE, Opaque
from .indices import Size, Space, is_nonnegative


@dataclasses.dataclass(frozen=True)
class Mask:
    """A proved window and the conditions that are not part of it (all must hold)."""

    window_left: sympy.Expr | None
    window_right: sympy.Expr | None
    rest: tuple[Boolean, ...]
    nothing_visible: bool = False

    @property
    def is_window(self) -> bool:
        return not self.rest and not self.nothing_visible


@dataclasses.dataclass(frozen=True)
class Axes:
    """The index expressions of one attention: ``q`` over seqlen_q, ``k`` over seqlen_k."""

    q: sympy.Expr
    k: sympy.Expr
    seqlen_q: Size
    seqlen_k: Size


FULL = Mask(None, None, ())


def prove(space: Space, condition: Boolean, axes: Axes) -> Mask:
    """Split a condition into the window that it implies and the rest."""
    left: list[sympy.Expr] = []
    right: list[sympy.Expr] = []
    rest: list[Boolean] = []
    for part in sympy.And.make_args(sympy.to_nnf(condition, simplify=False)):
        decided = decide(space, part)
        if decided == TRUE:
            continue
        if decided == FALSE:
            return Mask(None, None, (), nothing_visible=True)
        if isinstance(part, sympy.Or):
            undecided = [p for p in part.args if decide(space, p) != FALSE]
            if any(decide(space, p) == TRUE for p in undecided):
                continue
            part = sympy.Or(*undecided)
            if part == FALSE:
                return Mask(None, None, (), nothing_visible=True)
        bounds = _window_bounds(part, axes)
        if bounds is None and isinstance(part, sympy.Or):  # |q - k| <= n, written out
            ranges = _ranges(part, axes)
            if ranges is not None and len(ranges) == 1:
                bounds = tuple(None if edge.is_infinite else edge for edge in (-ranges[0][0], ranges[0][1]))
        if bounds is None:
            rest.append(part)
            continue
        left += [b for b in bounds[:1] if b is not None]
        right += [b for b in bounds[1:] if b is not None]
    window_left, window_right = _tightest(left), _tightest(right)
    if window_left is not None and is_nonnegative(window_left - (axes.seqlen_q - 1)):
        window_left = None
    if window_right is not None and is_nonnegative(window_right - (axes.seqlen_k - 1)):
        window_right = None
    if window_left is not None and window_right is not None and is_nonnegative(-1 - window_left - window_right):
        return Mask(None, None, (), nothing_visible=True)
    return Mask(window_left, window_right, tuple(rest))


def decide(space: Space, condition: Boolean) -> Boolean:
    """TRUE or FALSE where the ranges of the indices settle a relation, else the condition itself."""
    if condition in (TRUE, FALSE) or not isinstance(condition, sympy.core.relational.Relational):
        return condition
    difference = condition.lhs - condition.rhs
    if difference.has(Opaque):
        return condition
    bounds = space.bounds(difference)
    if bounds is None:
        return condition
    low, high = bounds
    match condition:
        case sympy.Le():
            holds, fails = is_nonnegative(-high), is_nonnegative(low - 1)
        case sympy.Lt():
            holds, fails = is_nonnegative(-high - 1), is_nonnegative(low)
        case sympy.Ge():
            holds, fails = is_nonnegative(low), is_nonnegative(-high - 1)
        case sympy.Gt():
            holds, fails = is_nonnegative(low - 1), is_nonnegative(-high)
        case sympy.Eq():
            holds, fails = low == high == 0, is_nonnegative(low - 1) or is_nonnegative(-high - 1)
        case sympy.Ne():
            holds, fails = is_nonnegative(low - 1) or is_nonnegative(-high - 1), low == high == 0
        case _:
            return condition
    return TRUE if holds else FALSE if fails else condition


def _window_bounds(condition: Boolean, axes: Axes) -> tuple[sympy.Expr | None, sympy.Expr | None] | None:
    """(window_left, window_right) that a relation between q and k alone amounts to, or None if it is no such thing."""
    if not isinstance(condition, sympy.core.relational.Relational) or condition.has(Opaque):
        return None
    difference = sympy.expand(condition.lhs - condition.rhs)
    along_k = difference.coeff(axes.k, 1) if axes.k != 0 else None
    along_q = difference.coeff(axes.q, 1) if axes.q != 0 else None
    slope = along_k if along_k is not None else -along_q if along_q is not None else None
    if slope is None or not slope.is_number or slope == 0:
        return None
    if along_q is not None and along_q != -slope:
        return None
    constant = sympy.expand((difference - slope * (axes.k - axes.q)) / slope)
    if constant.free_symbols & (axes.k.free_symbols | axes.q.free_symbols) or not constant.is_integer:
        return None
    if any(s.name.partition("#")[1] for s in constant.free_symbols):  # depends on a batch or head index
        return None
    # slope * (k - q + constant) REL 0, brought to integers: k - q <= r or k - q >= -l.
    upper, lower = (sympy.Le, sympy.Lt), (sympy.Ge, sympy.Gt)
    if slope.is_negative:
        upper, lower = lower, upper
    strict = int(isinstance(condition, (sympy.Lt, sympy.Gt)))
    if isinstance(condition, upper):
        return None, -constant - strict
    if isinstance(condition, lower):
        return constant - strict, None
    if isinstance(condition, sympy.Eq):
        return constant, -constant
    return None


_Range = tuple[sympy.Expr, sympy.Expr]  # both ends are in it


def _ranges(condition: Boolean, axes: Axes) -> list[_Range] | None:
    """The ranges of k - q in which a condition holds, apart and in order; None if it is about more than that number."""
    if isinstance(condition, (sympy.And, sympy.Or)):
        parts = [_ranges(part, axes) for part in condition.args]
        if any(part is None for part in parts):
            return None
        return _united(sum(parts, [])) if isinstance(condition, sympy.Or) else functools.reduce(_common, parts)
    if isinstance(condition, sympy.Ne):
        equal = _ranges(sympy.Eq(*condition.args), axes)
        return equal and [(-sympy.oo, equal[0][0] - 1), (equal[0][1] + 1, sympy.oo)]
    bounds = _window_bounds(condition, axes)
    if bounds is None or not all(edge is None or edge.is_Integer for edge in bounds):
        return None
    left, right = bounds
    return [(-sympy.oo if left is None else -left, sympy.oo if right is None else right)]


def _common(a: list[_Range], b: list[_Range]) -> list[_Range]:
    both = [(max(low, other), min(high, top)) for low, high in a for other, top in b]
    return [(low, high) for low, high in both if low <= high]


def _united(ranges: list[_Range]) -> list[_Range]:
    united: list[_Range] = []
    for low, high in sorted(ranges):
        if united and low <= united[-1][1] + 1:
            low, high = united[-1][0], max(high, united.pop()[1])
        united.append((low, high))
    return united


def _tightest(bounds: list[sympy.Expr]) -> sympy.Expr | None:
    return sympy.Min(*bounds) if bounds else None


def no_row_is_empty(mask: Mask, axes: Axes) -> bool:
    """Whether every query provably sees at least one key."""
    if not mask.is_window:
        return False
    left, right = mask.window_left, mask.window_right
    if right is not None and not is_nonnegative(right):
        return False
    if left is not None and not is_nonnegative(axes.seqlen_k - axes.seqlen_q + left):
        return False
    return left is None or is_nonnegative(left + (right if right is not None else axes.seqlen_k))


def describe(mask: Mask, axes: Axes, space: Space) -> str:
    """The mask in the field's words: 'full', 'causal', 'sliding window (left 127, right 0)', 'causal & mask[b, k]'."""
    if mask.nothing_visible:
        return "nothing visible"
    left, right = mask.window_left, mask.window_right
    parts = []
    if left is None and right is not None:
        if right == 0:
            parts.append("causal")
        elif sympy.expand(right - (axes.seqlen_k - axes.seqlen_q)) == 0:
            parts.append("causal (bottom-right)")
        else:
            parts.append(f"causal (shifted by {right})")
    elif left is not None:
        parts.append(f"sliding window (left {left}, right {right if right is not None else 'unbounded'})")
    for condition in mask.rest:
        used = space.indices_of(condition)
        names = [s.name.partition("#")[0] for s in sorted(used, key=lambda s: s.name)]
        is_padding = axes.k in used and axes.q not in used and condition.has(Opaque)
        what = "key padding" if is_padding else "mask"
        text = f"{what}[{', '.join(names)}]"
        if text not in parts:
            parts.append(text)
    return " & ".join(parts) or "full"

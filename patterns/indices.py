"""Index algebra: sizes and indices as sympy expressions, with the ranges that make division exact.

The value of every tensor near an attention is described as a function of index symbols. An index symbol is an integer
in ``[0, size)``; sizes are integers or, with dynamic shapes, positive sympy symbols out of torch's shape environment.
"""

from collections.abc import Sequence
from typing import Any

import sympy
import torch

Size = sympy.Expr
Index = tuple[sympy.Expr, ...]

ZERO, ONE = sympy.Integer(0), sympy.Integer(1)


def size_expr(size: int | torch.SymInt | torch.SymFloat | torch.fx.Node | sympy.Expr) -> sympy.Expr:
    """The sympy expression of a size, an index or another number, without adding a guard on a symbolic one."""
    if isinstance(size, torch.fx.Node):
        size = size.meta["val"]
    if isinstance(size, (torch.SymInt, torch.SymFloat)):
        expr = size.node.expr
        expr = expr.xreplace({s: _signed(s, size.node.shape_env) for s in expr.free_symbols})
        return expr.replace(
            lambda e: type(e).__name__ in _TORCH_FUNCTIONS, lambda e: _TORCH_FUNCTIONS[type(e).__name__](*e.args)
        )
    return sympy.sympify(size)


def _signed(symbol: sympy.Symbol, shape_env: Any) -> sympy.Symbol:
    """torch's symbol with the sign that its known range gives it: a size is positive, an int argument need not be."""
    low = shape_env.var_to_range[symbol].lower if symbol in shape_env.var_to_range else -sympy.oo
    sign = {"positive": True} if low >= 1 else {"nonnegative": True} if low >= 0 else {}
    return sympy.Symbol(symbol.name, integer=symbol.is_integer is not False, **sign)


# torch's own sympy functions, which sympy cannot simplify.
_TORCH_FUNCTIONS = {
    "ToFloat": lambda x: x,
    "FloatPow": sympy.Pow,
    "PowByNatural": sympy.Pow,
    "FloatTrueDiv": lambda a, b: a / b,
    "IntTrueDiv": lambda a, b: a / b,
    "OpaqueUnaryFn_sqrt": sympy.sqrt,
}


def shape_exprs(value: torch.Tensor) -> tuple[sympy.Expr, ...]:
    return tuple(size_expr(s) for s in value.shape)


def is_nonnegative(expr: sympy.Expr) -> bool:
    """Whether ``expr`` over positive integer symbols is provably >= 0: sympy's own answer, or all terms are."""
    expr = sympy.expand(expr)
    if expr.is_nonnegative:
        return True
    # s >= 1 for a positive symbol: substituting s = 1 + t makes "4*s - 4" visibly nonnegative.
    positive = [s for s in expr.free_symbols if s.is_positive]
    shift = {s: 1 + sympy.Symbol(f"{s.name}_less1", integer=True, nonnegative=True) for s in positive}
    return bool(sympy.expand(expr.xreplace(shift)).is_nonnegative)


class Space:
    """The index symbols of one graph and their sizes. Symbols are shared by (role, size), so proofs are too."""

    def __init__(self) -> None:
        self._sizes: dict[sympy.Symbol, Size] = {}
        self._symbols: dict[tuple[str, Size], sympy.Symbol] = {}

    def symbol(self, role: str, size: Size) -> sympy.Expr:
        """The index called ``role`` over ``size`` positions; an axis of size one has the constant index 0."""
        if size == 1:
            return ZERO
        key = (role, size)
        if key not in self._symbols:
            symbol = sympy.Symbol(f"{role}#{len(self._symbols)}", integer=True, nonnegative=True)
            self._symbols[key] = symbol
            self._sizes[symbol] = size
        return self._symbols[key]

    def size(self, symbol: sympy.Symbol) -> Size | None:
        return self._sizes.get(symbol)

    def indices_of(self, expr: Any) -> set[sympy.Symbol]:
        return {s for s in getattr(expr, "free_symbols", ()) if s in self._sizes}

    def bounds(self, expr: sympy.Expr) -> tuple[sympy.Expr, sympy.Expr] | None:
        """(smallest, largest) value of an expression that is linear in index symbols, or None."""
        expr = sympy.expand(expr)
        low = high = expr
        for symbol in self.indices_of(expr):
            coefficient = expr.coeff(symbol, 1)
            if self.indices_of(coefficient) or sympy.expand(expr - coefficient * symbol).has(symbol):
                return None
            last = self._sizes[symbol] - 1
            if is_nonnegative(coefficient):
                low, high = low.subs(symbol, 0), high.subs(symbol, last)
            elif is_nonnegative(-coefficient):
                low, high = low.subs(symbol, last), high.subs(symbol, 0)
            else:
                return None
        return sympy.expand(low), sympy.expand(high)

    def divmod(self, expr: sympy.Expr, divisor: Size) -> tuple[sympy.Expr, sympy.Expr]:
        """Floor division and remainder; exact where the terms split into multiples of ``divisor`` and a small rest."""
        if divisor == 1:
            return expr, ZERO
        multiples, rest = [], []
        for term in sympy.Add.make_args(sympy.expand(expr)):
            quotient = sympy.cancel(term / divisor)
            exact = quotient.is_integer and sympy.denom(quotient) == 1
            (multiples if exact else rest).append(quotient if exact else term)
        remainder = sympy.Add(*rest)
        bounds = self.bounds(remainder)
        if bounds is not None and is_nonnegative(bounds[0]) and is_nonnegative(divisor - 1 - bounds[1]):
            return sympy.Add(*multiples), remainder
        return sympy.floor(expr / divisor), sympy.Mod(expr, divisor)


def broadcast_index(index: Index, shape: Sequence[Size]) -> Index:
    """The index into a tensor of ``shape`` that broadcasting gives for ``index`` into the result."""
    tail = index[len(index) - len(shape) :]
    return tuple(ZERO if size == 1 else i for i, size in zip(tail, shape, strict=True))


def reshape_index(space: Space, index: Index, shape: Sequence[Size], source_shape: Sequence[Size]) -> Index:
    """The index into ``source_shape`` of the element at ``index`` in its reshape to ``shape`` (row-major)."""
    result: list[sympy.Expr] = []
    i = j = 0
    while j < len(source_shape):
        # Grow a group of axes on either side until both span the same number of elements.
        here, there = [], [j]
        span_there = source_shape[j]
        j += 1
        span_here: sympy.Expr = ONE
        while sympy.expand(span_here - span_there) != 0:
            grow_here = i < len(shape) and (j >= len(source_shape) or not _smaller(span_there, span_here))
            if grow_here:
                here.append(i)
                span_here = span_here * shape[i]
                i += 1
            elif j < len(source_shape):
                there.append(j)
                span_there = span_there * source_shape[j]
                j += 1
            else:
                break
        linear: sympy.Expr = ZERO
        for axis in here:
            linear = linear * shape[axis] + index[axis]
        linear = rejoined(linear) if len(here) > 1 else linear
        part: list[sympy.Expr] = []
        for axis in reversed(there[1:]):
            linear, remainder = space.divmod(linear, source_shape[axis])
            part.append(remainder)
        part.append(linear)
        result += reversed(part)
    return tuple(result)


def rejoined(expr: sympy.Expr) -> sympy.Expr:
    """``expr`` with what `Space.divmod` has taken apart put together: n * floor(x / n) + x % n is x."""
    for remainder in sorted(expr.atoms(sympy.Mod), key=sympy.default_sort_key):
        whole, divisor = remainder.args
        expanded = sympy.expand(expr)
        quotient, coefficient = sympy.floor(whole / divisor), expanded.coeff(remainder)
        if coefficient != 0 and sympy.expand(expanded.coeff(quotient) - coefficient * divisor) == 0:
            # (What is put together may be the quotient of another.)
            return rejoined(
                sympy.expand(expanded - coefficient * (divisor * quotient + remainder) + coefficient * whole)
            )
    return expr


def _smaller(a: sympy.Expr, b: sympy.Expr) -> bool:
    """Whether span ``a`` still has to grow to reach ``b``."""
    difference = sympy.expand(b - a)
    return difference != 0 and is_nonnegative(difference)

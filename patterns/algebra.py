"""The value of a tensor as a function of its indices: what a mask is, worked out instead of guessed.

``Algebra.value(node, index)`` walks the captured graph upwards from ``node`` and returns, at one symbolic index, a
number (sympy expression), a condition (sympy Boolean) or a ``Choice`` between values. ``arange`` is an index, layout
operations substitute indices, comparisons become relations. What is not understood becomes an ``Opaque`` atom: an
uninterpreted function of the indices that it really depends on, so that two reads of it can still be compared.
Rounding is part of the value: constants are rounded to each tensor's dtype, operands to the dtype in which torch
computes, and an index in a dtype that cannot count that far is opaque.
"""

import dataclasses
import math
import operator
from collections.abc import Callable
from typing import Any

import sympy
import torch
from sympy.logic.boolalg import Boolean
from torch.fx import Node

from .indices import ONE, ZERO, Index, Space, broadcast_index, is_nonnegative, shape_exprs, size_expr
from .layouts import argument, layout_step, packet, tensor

aten = torch.ops.aten
TRUE, FALSE = sympy.true, sympy.false


@dataclasses.dataclass(frozen=True)
class Choice:
    """``yes`` where ``condition`` holds, else ``no``."""

    condition: Boolean
    yes: "Value"
    no: "Value"


Value = sympy.Expr | Boolean | Choice


class Unknown(Exception):
    """The value of the node that is being evaluated cannot be told: it is opaque."""


class Opaque(sympy.Function):
    """A number read from a tensor that is not understood; its name is the node's."""


def is_condition(value: Value) -> bool:
    """Whether a value is true or false. sympy's symbols count as Boolean too; here every symbol is a number."""
    return isinstance(value, Boolean) and not isinstance(value, sympy.Symbol)


def choose(condition: Boolean, yes: Value, no: Value) -> Value:
    """A choice in its simplest form: decided, trivial, or Boolean if both sides are."""
    if condition == TRUE or yes == no:
        return yes
    if condition == FALSE:
        return no
    if is_condition(yes) and is_condition(no):
        if no == FALSE:
            return sympy.And(condition, yes)
        if yes == TRUE:
            return sympy.Or(condition, no)
        return sympy.Or(sympy.And(condition, yes), sympy.And(sympy.Not(condition), no))
    return Choice(condition, yes, no)


def lift(function: Callable[..., Value], *values: Value) -> Value:
    """Apply a function of plain values to values that may be choices: the choice moves outwards."""
    for position, value in enumerate(values):
        if isinstance(value, Choice):

            def side(chosen: Value, position: int = position) -> Value:
                return lift(function, *values[:position], chosen, *values[position + 1 :])

            return choose(value.condition, side(value.yes), side(value.no))
    return function(*values)


def to_boolean(value: Value) -> Value:
    return lift(lambda v: v if is_condition(v) else _relation(sympy.Ne, v, ZERO), value)


def to_number(value: Value) -> Value:
    return lift(lambda v: choose(v, ONE, ZERO) if is_condition(v) else v, value)


def _relation(kind: type, a: sympy.Expr, b: sympy.Expr) -> Boolean:
    if sympy.nan in (a, b):
        return sympy.sympify(kind is sympy.Ne)
    if a.is_infinite or b.is_infinite:
        return sympy.sympify(_PYTHON_RELATION[kind](float(a), float(b))) if a.is_number and b.is_number else kind(a, b)
    difference = sympy.expand(a - b)
    if difference.is_number:
        return sympy.sympify(bool(_PYTHON_RELATION[kind](difference, 0)))
    return kind(difference, 0)


_PYTHON_RELATION = {
    sympy.Eq: operator.eq,
    sympy.Ne: operator.ne,
    sympy.Lt: operator.lt,
    sympy.Le: operator.le,
    sympy.Gt: operator.gt,
    sympy.Ge: operator.ge,
}

# Largest count up to which every integer is exact.
_EXACT_INTEGERS = {torch.float64: 2**53, torch.float32: 2**24, torch.float16: 2**11, torch.bfloat16: 2**8}

_COMPARISONS = {
    aten.eq: sympy.Eq,
    aten.ne: sympy.Ne,
    aten.lt: sympy.Lt,
    aten.le: sympy.Le,
    aten.gt: sympy.Gt,
    aten.ge: sympy.Ge,
}
_ARITHMETIC = {
    aten.add: operator.add,
    aten.sub: operator.sub,
    aten.rsub: lambda a, b: b - a,
    aten.mul: operator.mul,
}
_HALVES = (torch.bfloat16, torch.float16)  # computed with in float32

# No dense score row has more keys than this: how far a symbolic length is taken to reach.
_LONGEST = 2**22
_AND = (aten.logical_and, aten.bitwise_and, aten.__and__)
_OR = (aten.logical_or, aten.bitwise_or, aten.__or__)
_XOR = (aten.logical_xor, aten.bitwise_xor, aten.__xor__)
_NOT = (aten.logical_not, aten.bitwise_not)
_CASTS = (aten._to_copy, aten.to, aten.type_as, aten.detach, aten._assert_tensor_metadata)
_CONSTANT_FILLS = {
    aten.zeros: 0,
    aten.zeros_like: 0,
    aten.new_zeros: 0,
    aten.ones: 1,
    aten.ones_like: 1,
    aten.new_ones: 1,
}


class Algebra:
    """Evaluates tensors of one captured graph; ``constant`` gives the value of a graph input that is known and guarded.

    ``constant(node, index)`` is asked for every placeholder and attribute; it returns a Value or None.
    """

    def __init__(self, space: Space, constant: Callable[[Node, Index], Value | None]) -> None:
        self.space = space
        self._constant = constant
        self._memo: dict[tuple[Node, Index], Value] = {}
        self.scores: dict[tuple[Any, Index], Any] = {}  # what scores.py read: a graph's attentions share their masks
        self.nodes: dict[str, Node] = {}  # what Opaque atoms name

    def forget(self) -> None:
        """Drop what was worked out: a symbolic size has become a number."""
        self._memo.clear()
        self.scores.clear()

    def value(self, node: Any, index: Index) -> Value:
        if not isinstance(node, Node):
            return number(node)
        held = node.meta.get("val")
        if not isinstance(held, torch.Tensor):
            return size_expr(node)
        key = (node, index)
        if key not in self._memo:
            try:
                value = self._evaluate(node, index)
                if value is not None:
                    value = self._as_dtype(value, held.dtype)
            except Unknown:
                value = None
            self._memo[key] = self.opaque(node, index) if value is None else value
        return self._memo[key]

    def operand(self, node: Any, index: Index) -> Value:
        """The value of an operand that broadcasting aligns with ``index``."""
        if isinstance(node, Node) and isinstance(node.meta.get("val"), torch.Tensor):
            index = broadcast_index(index, shape_exprs(tensor(node)))
        return self.value(node, index)

    def opaque(self, node: Node, index: Index) -> Value:
        # Follow pure layout so that a tensor has one name however it was reshaped.
        while True:
            try:
                step = layout_step(self.space, node, index)
            except (AttributeError, IndexError, KeyError, TypeError, ValueError):
                step = None
            if step is None:
                break
            node, index = step
        self.nodes[node.name] = node
        atom = Opaque(sympy.Symbol(node.name), *index)
        return sympy.Ne(atom, ZERO) if tensor(node).dtype == torch.bool else atom

    def converted(self, node: Any, index: Index, dtype: torch.dtype) -> Value:
        """The value of an operand after its conversion to ``dtype``.

        Raises:
            Unknown: it is not known what the conversion makes of it.
        """
        value = self.operand(node, index)
        if isinstance(node, Node) and isinstance(node.meta.get("val"), torch.Tensor):
            return self.cast(value, tensor(node).dtype, dtype)
        return self._exact(value, dtype)

    def cast(self, value: Value, source: torch.dtype, dtype: torch.dtype) -> Value:
        """What a value of dtype ``source`` is in ``dtype``; raises Unknown as :meth:`converted` does."""
        if source == dtype:
            return value
        if _is_opaque(value) and dtype != torch.bool and not _is_lossless(source, dtype):
            raise Unknown
        return self._exact(value, dtype)

    def _exact(self, value: Value, dtype: torch.dtype) -> Value:
        value = self._as_dtype(value, dtype)
        if value is None:
            raise Unknown
        return value if dtype == torch.bool else to_number(value)

    def _as_dtype(self, value: Value, dtype: torch.dtype) -> Value | None:
        if dtype == torch.bool:
            return to_boolean(value)
        exact = True

        def leaf(v: Value) -> Value:
            nonlocal exact
            if is_condition(v):
                return lift(leaf, to_number(v))
            if v.is_number and dtype.is_floating_point:
                return round_to(v, dtype)
            if not v.has(Opaque):
                exact = exact and (self._counts_exactly(v, dtype) if dtype.is_floating_point else self._fits(v, dtype))
            return v

        result = lift(leaf, value)
        return result if exact else None

    def _fits(self, value: sympy.Expr, dtype: torch.dtype) -> bool:
        """Whether an integer dtype holds every value of ``value`` without wrapping around."""
        if not value.is_integer or dtype.is_complex:
            return False
        bounds = self.space.bounds(value)
        if bounds is None:
            return dtype == torch.int64
        limits = torch.iinfo(dtype)
        if all(b.is_number for b in bounds):
            return bool(limits.min <= bounds[0]) and bool(bounds[1] <= limits.max)
        reach = _reach(bounds)
        return dtype == torch.int64 if reach is None else limits.min < 0 and reach <= limits.max

    def _counts_exactly(self, value: sympy.Expr, dtype: torch.dtype) -> bool:
        limit = _EXACT_INTEGERS.get(dtype)
        bounds = self.space.bounds(value)
        if limit is None or bounds is None or not value.is_integer:
            return False
        if all(b.is_number for b in bounds):
            return max(abs(bounds[0]), abs(bounds[1])) <= limit
        reach = _reach(bounds)
        return reach is not None and reach <= limit

    def _evaluate(self, node: Node, index: Index) -> Value | None:
        if node.op in ("placeholder", "get_attr"):
            return self._constant(node, index)
        if node.op != "call_function":
            return None
        step = layout_step(self.space, node, index)
        if step is not None:
            return self.value(*step)
        kind = packet(node)
        if kind in _CASTS:
            return self._cast(node, index)
        if kind in _COMPARISONS:
            return self._comparison(node, index)
        if kind in _ARITHMETIC:
            return self._arithmetic(node, index)
        if kind in _AND + _OR + _XOR:
            return self._logic(node, index)
        if kind in _NOT:
            return lift(sympy.Not, to_boolean(self.operand(node.args[0], index))) if _is_bool(node) else None
        if kind in _CONSTANT_FILLS:
            return sympy.Integer(_CONSTANT_FILLS[kind])
        rule = _RULES.get(kind)
        return rule(self, node, index) if rule is not None else None

    def _cast(self, node: Node, index: Index) -> Value:
        return self.cast(self.operand(node.args[0], index), tensor(node.args[0]).dtype, tensor(node).dtype)

    def _comparison(self, node: Node, index: Index) -> Value:
        relation, dtype = _COMPARISONS[packet(node)], _promoted(node)
        results = [
            lift(lambda x, y: _comparable(relation, x, y, dtype), a, b)
            for a in self._roundings(node.args[0], index, dtype)
            for b in self._roundings(node.args[1], index, dtype)
        ]
        return _only(results)

    def _roundings(self, x: Any, index: Index, dtype: torch.dtype) -> list[Value]:
        """An operand in the dtype of its operation. One that is not of these 16 bits yet, a Python number say, some
        kernels round to them and others to float32."""
        held = x.meta.get("val") if isinstance(x, Node) else None
        other = not isinstance(held, torch.Tensor) or held.dtype not in (dtype, torch.bool)
        dtypes = [dtype, torch.float32] if other and dtype in _HALVES else [dtype]
        found = [to_number(self.converted(x, index, d)) for d in dtypes]
        return found[:1] if found[-1] == found[0] else found

    def _arithmetic(self, node: Node, index: Index) -> Value | None:
        if argument(node, 2, "alpha", 1) != 1 or _is_bool(node):
            return None
        return self._computed(_ARITHMETIC[packet(node)], node, index)

    def _computed(self, function: Callable[..., Any], node: Node, index: Index) -> Value:
        """``function`` of a node's two operands, as its dtype holds it."""
        dtype = tensor(node).dtype
        results = [
            self._exact(lift(lambda x, y: compute(function, x, y, dtype), a, b), dtype)
            for a in self._roundings(node.args[0], index, dtype)
            for b in self._roundings(node.args[1], index, dtype)
        ]
        return _only(results)

    def divided(self, node: Node, index: Index, part: int) -> Value:
        """The quotient (0) or the remainder (1) of a floor division by a positive integer."""
        dtype = tensor(node).dtype
        a, b = (self.converted(x, index, dtype) for x in node.args[:2])
        if isinstance(b, Choice) or not (b.is_positive and b.is_integer):
            raise Unknown

        def divide(v: sympy.Expr) -> sympy.Expr:
            if not v.is_integer:
                raise Unknown
            return self.space.divmod(v, b)[part]

        return lift(divide, a)

    def _logic(self, node: Node, index: Index) -> Value | None:
        if not _is_bool(node):
            return None
        kind = packet(node)
        a, b = (to_boolean(self.operand(x, index)) for x in node.args[:2])
        if kind in _AND:
            return lift(sympy.And, a, b)
        return lift(sympy.Or if kind in _OR else sympy.Xor, a, b)


def _is_bool(node: Node) -> bool:
    return tensor(node).dtype == torch.bool


def _is_opaque(value: Value) -> bool:
    """Whether a value, the condition of a choice aside, is a number read from a tensor that is not understood."""
    return any(not is_condition(v) and v.has(Opaque) for v in leaves(value))


def _is_lossless(source: torch.dtype, dtype: torch.dtype) -> bool:
    """Whether a cast keeps every number as it is."""
    if source == torch.bool:
        return True
    return source.is_floating_point == dtype.is_floating_point and torch.promote_types(source, dtype) == dtype


def _promoted(node: Node) -> torch.dtype:
    """The dtype in which torch compares a node's two operands."""
    operands = [x.meta["val"] if isinstance(x, Node) else x for x in node.args[:2]]
    plain = {torch.SymInt: 1, torch.SymFloat: 1.0, torch.SymBool: True}
    return torch.result_type(*(plain.get(type(x), x) for x in operands))


def _comparable(relation: type, a: sympy.Expr, b: sympy.Expr, dtype: torch.dtype) -> Boolean:
    opaque = [x.has(Opaque) for x in (a, b)]
    if any(opaque) and sympy.nan not in (a, b):
        # It may be NaN, which is not equal to itself, and neither less than a number nor not less.
        if all(opaque) or dtype.is_floating_point and relation not in (sympy.Eq, sympy.Ne):
            raise Unknown
    return _relation(relation, a, b)


def compute(function: Callable[..., Any], a: sympy.Expr, b: sympy.Expr, dtype: torch.dtype) -> sympy.Expr:
    """``function`` of two numbers as torch computes it in ``dtype``, except for rounding 16 bits' result to them.

    Raises:
        Unknown: an operand is opaque: it may be infinite, NaN or large enough for anything to be lost.
    """
    if a.has(Opaque) or b.has(Opaque):
        raise Unknown
    if sympy.nan in (a, b):
        return sympy.nan
    if a.is_number and b.is_number and dtype.is_floating_point:
        precise = torch.float32 if dtype in _HALVES else dtype
        x, y = (torch.tensor(float(v), dtype=torch.float64, device="cpu").to(precise) for v in (a, b))
        return number(function(x, y).item())
    return sympy.expand(function(a, b))


def _only(results: list[Value]) -> Value:
    if any(r != results[0] for r in results[1:]):
        raise Unknown
    return results[0]


def _reach(bounds: tuple[sympy.Expr, sympy.Expr]) -> int | None:
    """How far from zero bounds in symbolic lengths can be, or None if they are no polynomials."""
    reach = 0
    for bound in bounds:
        lengths = bound.free_symbols
        if not bound.is_polynomial(*lengths):
            return None
        terms = sympy.Poly(bound, *lengths).terms() if lengths else [((), bound)]
        reach = max(reach, sum(abs(factor) * _LONGEST ** sum(powers) for powers, factor in terms))
    return reach


def leaves(value: Value) -> list[sympy.Expr | Boolean]:
    """Every value that a choice may turn out to be."""
    return leaves(value.yes) + leaves(value.no) if isinstance(value, Choice) else [value]


def number(x: Any) -> Value:
    """A Python number as it is: a whole float is an integer."""
    if isinstance(x, float) and math.isfinite(x):
        return sympy.Integer(int(x)) if x.is_integer() else sympy.Float(x, 17)
    return sympy.sympify(x)


def round_to(value: sympy.Expr, dtype: torch.dtype) -> sympy.Expr:
    if value in (sympy.nan, sympy.zoo):
        return sympy.nan
    whole = value.is_Integer and abs(value) < 2**63
    exact = torch.tensor(int(value) if whole else float(value), dtype=None if whole else torch.float64, device="cpu")
    return number(exact.to(dtype).item())


Rule = Callable[[Algebra, Node, Index], Value | None]
_RULES: dict[torch._ops.OpOverloadPacket, Rule] = {}


def _rule(*packets: torch._ops.OpOverloadPacket) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        for p in packets:
            _RULES[p] = function
        return function

    return register


@_rule(aten.full, aten.full_like, aten.new_full)
def _full(algebra: Algebra, node: Node, index: Index) -> Value:
    return algebra.value(argument(node, 2 if packet(node) is aten.new_full else 1, "fill_value"), ())


@_rule(aten.scalar_tensor)
def _scalar_tensor(algebra: Algebra, node: Node, index: Index) -> Value:
    return algebra.value(node.args[0], ())


@_rule(aten.arange)
def _arange(algebra: Algebra, node: Node, index: Index) -> Value | None:
    start = algebra.value(node.args[0] if len(node.args) > 1 else 0, ())
    step = algebra.value(argument(node, 2, "step", 1), ())
    return sympy.expand(start + step * index[0])


@_rule(aten.neg)
def _neg(algebra: Algebra, node: Node, index: Index) -> Value:
    def negative(v: sympy.Expr) -> sympy.Expr:
        if v.has(Opaque):
            raise Unknown
        return -v

    return lift(negative, to_number(algebra.operand(node.args[0], index)))


@_rule(aten.abs)
def _abs(algebra: Algebra, node: Node, index: Index) -> Value | None:
    def absolute(v: sympy.Expr) -> Value:
        if v is sympy.nan or v.has(Opaque):
            raise Unknown
        return choose(_relation(sympy.Lt, v, ZERO), -v, v)

    return lift(absolute, to_number(algebra.operand(node.args[0], index)))


@_rule(aten.div)
def _div(algebra: Algebra, node: Node, index: Index) -> Value | None:
    b = algebra.operand(node.args[1], index)
    if isinstance(b, Choice) or is_condition(b) or not b.is_number or b.is_zero:
        return None
    mode = node.kwargs.get("rounding_mode")
    if mode is None:
        exactly = algebra._computed(operator.truediv, node, index)
        # CUDA multiplies by the reciprocal of a scalar.
        return _only([exactly, algebra._computed(lambda x, y: x * (1 / y), node, index)])
    return algebra.divided(node, index, 0) if mode == "floor" else None


@_rule(aten.floor_divide)
def _floor_divide(algebra: Algebra, node: Node, index: Index) -> Value:
    return algebra.divided(node, index, 0)


@_rule(aten.remainder)
def _remainder(algebra: Algebra, node: Node, index: Index) -> Value:
    return algebra.divided(node, index, 1)


@_rule(aten.where)
def _where(algebra: Algebra, node: Node, index: Index) -> Value | None:
    if len(node.args) < 3:
        return None
    yes, no = (algebra.converted(x, index, tensor(node).dtype) for x in node.args[1:3])
    return lift(lambda c: choose(c, yes, no), to_boolean(algebra.operand(node.args[0], index)))


@_rule(aten.masked_fill)
def _masked_fill(algebra: Algebra, node: Node, index: Index) -> Value:
    kept, fill = (algebra.converted(x, index, tensor(node).dtype) for x in node.args[:3:2])
    return lift(lambda c: choose(c, fill, kept), to_boolean(algebra.operand(node.args[1], index)))


@_rule(aten.tril, aten.triu)
def _triangle(algebra: Algebra, node: Node, index: Index) -> Value:
    diagonal = algebra.value(argument(node, 1, "diagonal", 0), ())
    relation = sympy.Le if packet(node) is aten.tril else sympy.Ge
    inside = _relation(relation, index[-1] - index[-2], diagonal)
    zero = FALSE if _is_bool(node) else ZERO
    return choose(inside, algebra.operand(node.args[0], index), zero)


@_rule(aten.eye)
def _eye(algebra: Algebra, node: Node, index: Index) -> Value:
    yes, no = (TRUE, FALSE) if _is_bool(node) else (ONE, ZERO)
    return choose(_relation(sympy.Eq, index[0], index[1]), yes, no)


@_rule(aten.index)
def _index(algebra: Algebra, node: Node, index: Index) -> Value | None:
    """Indexing by integer tensors: the index is itself a value."""
    source, positions = node.args
    advanced = [d for d, p in enumerate(positions) if p is not None]
    if any(tensor(positions[d]).dtype in (torch.bool, torch.uint8) for d in advanced):
        return None
    together = advanced == list(range(advanced[0], advanced[-1] + 1))
    depth = max(tensor(positions[d]).ndim for d in advanced)
    first = advanced[0] if together else 0
    picked, plain = index[first : first + depth], index[:first] + index[first + depth :]
    rest = iter(plain)
    source_index: list[sympy.Expr] = []
    for dim in range(tensor(source).ndim):
        if dim in advanced:
            at = algebra.operand(positions[dim], picked)
            size = size_expr(tensor(source).shape[dim])
            bounds = None if isinstance(at, Choice) or at.has(Opaque) else algebra.space.bounds(at)
            if bounds is None or not _is_inside(bounds, size):
                return None
            source_index.append(at)
        else:
            source_index.append(next(rest))
    return algebra.value(source, tuple(source_index))


def _is_inside(bounds: tuple[sympy.Expr, sympy.Expr], size: sympy.Expr) -> bool:
    return is_nonnegative(bounds[0]) and is_nonnegative(size - 1 - bounds[1])


@_rule(aten.cumsum)
def _cumsum(algebra: Algebra, node: Node, index: Index) -> Value | None:
    """The running sum of something that does not change along the axis."""
    source, dim = node.args[:2]
    dim %= len(index)
    along = algebra.space.symbol("summed", size_expr(tensor(node).shape[dim]))
    term = algebra.operand(source, (*index[:dim], along, *index[dim + 1 :]))
    term = to_number(algebra.cast(term, tensor(source).dtype, tensor(node).dtype))
    if isinstance(term, Choice) or term.free_symbols & along.free_symbols or term.has(Opaque):
        return None
    return sympy.expand(term * (index[dim] + 1))


@_rule(aten.diff)
def _diff(algebra: Algebra, node: Node, index: Index) -> Value | None:
    source, order = node.args[0], argument(node, 1, "n", 1)
    dim = argument(node, 2, "dim", -1) % len(index)
    before, after = argument(node, 3, "prepend"), argument(node, 4, "append")
    if order != 1 or after is not None:
        return None

    def at(position: sympy.Expr) -> Value:
        return to_number(algebra.operand(source, (*index[:dim], position, *index[dim + 1 :])))

    def difference(a: Value, b: Value) -> Value:
        return lift(subtract, a, b)

    def subtract(x: sympy.Expr, y: sympy.Expr) -> sympy.Expr:
        if not (x.is_integer and y.is_integer):
            raise Unknown
        return sympy.expand(x - y)

    i = index[dim]
    if before is None:
        return difference(at(i + 1), at(i))
    if size_expr(tensor(before).shape[dim]) != 1:
        return None
    first = difference(at(ZERO), to_number(algebra.operand(before, (*index[:dim], ZERO, *index[dim + 1 :]))))
    return choose(_relation(sympy.Eq, i, ZERO), first, difference(at(i), at(i - 1)))

"""Masks and biases as formulas over positions, which the kernels compute instead of reading a tensor of all scores; and
functions of a score.

What a formula can say is in `kernels/formulas.py`. Where the algebra knows a value, that is written down; where a
tensor does not vary along queries and keys both, it becomes a table; what is between, operation by operation. Integers
and conditions are those of the user's code. Reals are computed in float32, where the code may round to less.
"""

import dataclasses
import math
import re

import sympy
import torch
from sympy.logic.boolalg import Boolean
from torch.fx import Node

from .algebra import Algebra, Choice, Opaque, Value, is_condition, round_to
from .indices import Index, broadcast_index, is_nonnegative, shape_exprs
from .layouts import NO_GRAD, argument, layout_step, packet, tensor
from .magnitude import bounds, least, magnitude
from .operands import Roles, side_operand
from .spec import Formula, Operand, Rejected

aten = torch.ops.aten


class _Inexpressible(Exception):
    """There is no formula for this."""


@dataclasses.dataclass(frozen=True)
class _Text:
    """A part of a formula: a "condition", an "integer" or a "real"; ``exact`` if no operation has rounded it.

    ``as_real`` is what an integer is as a real number, if not real() of it: sums of reals are converted before, in one
    dimension.
    ``dtype`` is that of the tables in an integer; one without is made of positions and numbers, and small.
    """

    kind: str
    text: str
    exact: bool = True
    as_real: str = ""
    dtype: torch.dtype | None = None

    def real(self) -> str:
        if self.kind == "real":
            return self.text
        # (Integers of tables may be large, and their differences be lost in float32.)
        return self.as_real if self.as_real and self.dtype is None else f"real({_as_integer(self).text})"


def formula_of_condition(algebra: Algebra, condition: Boolean, roles: Roles) -> Formula | None:
    """The formula that is true where ``condition`` is, or None if there is none."""
    writer = _Writer(algebra, roles)
    try:
        text = writer.condition(condition)
    except _Inexpressible:
        return None
    return Formula(text, tuple(writer.tables))


def formula_of_value(algebra: Algebra, node: Node, index: Index, factor: float, roles: Roles) -> Formula | None:
    """The formula for ``factor * node[index]``, or None if there is none."""
    writer = _Writer(algebra, roles)
    try:
        value = writer.read(node, index)
    except _Inexpressible:
        return None
    text = value.real()
    return Formula(text if factor == 1 else f"{_number(factor)} * {_wrapped(text)}", tuple(writer.tables))


def formula_of_score(
    algebra: Algebra, node: Node, index: Index, source: tuple[Node, Index], roles: Roles
) -> tuple[Formula, tuple[Node, ...]] | None:
    """The formula for ``node[index]`` in which s is ``source``, and the nodes from there to ``node``; None if none."""
    writer = _Writer(algebra, roles, source)
    writer.is_bounded = _limit(node) < torch.finfo(torch.float16).max
    try:
        text = writer.read(node, index).real()
    except _Inexpressible:
        return None
    return Formula(text, tuple(writer.tables), writer.bias), tuple(dict.fromkeys(writer.inside))


# Positions are below 2^22. With no larger factors and numbers than these, 32 bits hold what is made of them.
_LARGEST_FACTOR, _LARGEST_NUMBER = 2**6, 2**26

_RELATIONS = {sympy.Eq: "==", sympy.Ne: "!=", sympy.Lt: "<", sympy.Le: "<=", sympy.Gt: ">", sympy.Ge: ">="}
_COMPARISONS = {aten.eq: "==", aten.ne: "!=", aten.lt: "<", aten.le: "<=", aten.gt: ">", aten.ge: ">="}
_JUNCTIONS = {
    aten.logical_and: "&", aten.bitwise_and: "&", aten.__and__: "&",
    aten.logical_or: "|", aten.bitwise_or: "|", aten.__or__: "|",
}  # fmt: skip
_ARITHMETIC = {aten.add: "+", aten.sub: "-", aten.mul: "*"}
_OF_TWO = {aten.minimum: "minimum", aten.maximum: "maximum"}
# Of one real, x; with a NaN where torch has one, and its derivative where there are two.
_OF_ONE_REAL = {
    aten.exp: "exp({x})",
    aten.exp2: f"exp({math.log(2)!r} * {{x}})",
    aten.expm1: "exp({x}) - 1.0",
    aten.log: "log({x})",
    aten.log1p: "log(1.0 + {x})",
    aten.sqrt: "sqrt({x})",
    aten.rsqrt: "1.0 / sqrt({x})",
    aten.reciprocal: "1.0 / {x}",
    aten.square: "{x} * {x}",
    aten.tanh: "tanh({x})",
    aten.sigmoid: "sigmoid({x})",
    aten.relu: "where({x} <= 0.0, 0.0, {x})",
    aten.relu6: "where({x} <= 0.0, 0.0, where({x} >= 6.0, 6.0, {x}))",
    aten.silu: "{x} * sigmoid({x})",
    aten.log_sigmoid: "where({x} < 0.0, {x}, 0.0) - log(1.0 + exp(-abs({x})))",
}
# Those with more numbers: their names and what they are by default.
_WITH_NUMBERS: dict[torch._ops.OpOverloadPacket, tuple[tuple[tuple[str, float | None], ...], str]] = {
    aten.clamp: ((("min", None), ("max", None)), "where({x} > {max}, {max}, where({x} < {min}, {min}, {x}))"),
    aten.clamp_min: ((("min", None),), "where({x} < {min}, {min}, {x})"),
    aten.clamp_max: ((("max", None),), "where({x} > {max}, {max}, {x})"),
    aten.hardtanh: (
        (("min_val", -1.0), ("max_val", 1.0)),
        "where({x} <= {min_val}, {min_val}, where({x} >= {max_val}, {max_val}, {x}))",
    ),
    aten.leaky_relu: ((("negative_slope", 0.01),), "where({x} > 0.0, {x}, {x} * {negative_slope})"),
    aten.elu: (
        (("alpha", 1.0), ("scale", 1.0), ("input_scale", 1.0)),
        "where({x} > 0.0, {scale} * {x}, {scale} * {alpha} * (exp({input_scale} * {x}) - 1.0))",
    ),
    aten.softplus: (
        (("beta", 1.0), ("threshold", 20.0)),
        "where({beta} * {x} > {threshold}, {x}, log(1.0 + exp({beta} * {x})) / {beta})",
    ),
}
_NAN_TO_NUM = "where({x} != {x}, {nan}, where({x} > {high}, {high}, where({x} < {low}, {low}, {x})))"
# Functions with a pole: which argument has it, and where.
_POLES = {
    aten.log: (0, 0.0),
    aten.log1p: (0, -1.0),
    aten.rsqrt: (0, 0.0),
    aten.reciprocal: (0, 0.0),
    aten.div: (1, 0.0),
}
_OPERATIONS = {*_ARITHMETIC, *_OF_ONE_REAL, *_OF_TWO, *_WITH_NUMBERS, aten.nan_to_num}
_OPERATIONS |= {aten.rsub, aten.div, aten.neg, aten.abs, aten.pow}
# What may be done to a score, if nothing else is to be said of it.
OF_SCORES = {*_OPERATIONS, aten.where, aten.masked_fill}
_LONGEST_FORMULA = 4000  # characters
_CASTS = (aten._to_copy, aten.to, aten.type_as)


class _Writer:
    """Writes one formula and collects its tables; and the nodes that are made of the score, `source`, if it has one."""

    def __init__(self, algebra: Algebra, roles: Roles, source: tuple[Node, Index] | None = None) -> None:
        self.algebra = algebra
        self.roles = roles
        self.source = source
        self.tables: list[Operand] = []
        self.bias: Operand | None = None
        self.inside: list[Node] = []
        self.is_bounded = False  # whether no infinity comes out, whatever goes in
        self._of_source: dict[Node, bool] = {} if source is None else {source[0]: True}

    # ------------------------------------------------------------------ what the algebra knows

    def condition(self, condition: Boolean) -> str:
        match condition:
            case sympy.And() | sympy.Or():
                between = " & " if isinstance(condition, sympy.And) else " | "
                return between.join(_wrapped(self.condition(part)) for part in condition.args)
            case sympy.Not():
                return f"~({self.condition(condition.args[0])})"
        if type(condition) not in _RELATIONS:
            raise _Inexpressible
        if isinstance(condition.lhs, Opaque) and condition.rhs == 0 and isinstance(condition, (sympy.Eq, sympy.Ne)):
            read = self._opaque(condition.lhs)
            if read.kind == "condition":
                return read.text if isinstance(condition, sympy.Ne) else f"~({read.text})"
        kind, terms = type(condition), sympy.Add.make_args(sympy.expand(condition.lhs - condition.rhs))
        by_keys = [self.roles.k != 0 and self.roles.k in term.free_symbols for term in terms]
        # Keys on the left and the rest on the right: as far as that goes, sides of one dimension each.
        left = sympy.Add(*(term for term, by_key in zip(terms, by_keys) if by_key))
        right = -sympy.Add(*(term for term, by_key in zip(terms, by_keys) if not by_key))
        if left.could_extract_minus_sign():
            left, right, kind = -left, -right, condition.reversed.func
        return _compared(_RELATIONS[kind], self.value(left), self.value(right))

    def value(self, value: Value) -> _Text:
        """What the algebra knows of a tensor."""
        if isinstance(value, Choice):
            if _is_absolute(value):
                inner = self.value(value.no)
                return dataclasses.replace(inner, text=f"abs({inner.text})", as_real=f"abs({inner.real()})")
            return _chosen(self.condition(value.condition), self.value(value.yes), self.value(value.no))
        if is_condition(value):
            return _Text("condition", self.condition(value))
        if value.is_Integer:
            if abs(value) > _LARGEST_NUMBER:
                raise _Inexpressible
            return _Text("integer", str(value), as_real=_number(float(value)))
        if value.is_number:
            return _Text("real", _number(float(value)))
        if value == self.roles.q:
            return _Text("integer", "q")
        if value == self.roles.k:
            return _Text("integer", "k")
        match value:
            case Opaque():
                return self._opaque(value)
            case sympy.Add():
                first, *rest = sorted(value.args, key=lambda part: part.could_extract_minus_sign())
                total = self.value(first)
                for part in rest:
                    negative = part.could_extract_minus_sign()
                    total = _joined(" - " if negative else " + ", [total, self.value(-part if negative else part)])
                return total
            case sympy.Mul():
                factor, rest = value.as_coeff_Mul()
                if factor == 1 or rest.is_Mul or (factor.is_Integer and abs(factor) > _LARGEST_FACTOR):
                    raise _Inexpressible  # may be large
                return _joined(" * ", [self.value(factor), self.value(rest)])
            case sympy.floor() | sympy.Mod():
                return self._divided(value)
        raise _Inexpressible

    def _divided(self, value: sympy.Expr) -> _Text:
        if isinstance(value, sympy.Mod):
            (dividend, divisor), operation = value.args, "%"
        else:
            (dividend, divisor), operation = sympy.fraction(sympy.together(value.args[0])), "//"
        bounds = None if dividend.has(Opaque) else self.algebra.space.bounds(dividend)
        if not (divisor.is_Integer and divisor > 0) or bounds is None or not is_nonnegative(bounds[0]):
            raise _Inexpressible
        inner = self.value(dividend)
        if inner.kind != "integer":
            raise _Inexpressible
        return _Text("integer", f"{_wrapped(inner.text)} {operation} {divisor}")

    def _opaque(self, atom: Opaque) -> _Text:
        name, *index = atom.args
        return self._of_node(self.algebra.nodes[name.name], tuple(index))

    # ------------------------------------------------------------------ operation by operation

    def read(self, node: Node, index: Index) -> _Text:
        """node[index]"""
        if self._is_of_source(node):
            return self._of_node(node, index)
        value = self.algebra.value(node, index)
        is_known = not any(v.has(Opaque) for v in _atoms(value))
        return self.value(value) if is_known else self._of_node(node, index)

    def _is_of_source(self, node: Node) -> bool:
        """Whether a node is made of the score."""
        if self.source is None:
            return False
        pending = [node]
        while pending:
            last = pending[-1]
            unknown = [x for x in last.all_input_nodes if x not in self._of_source]
            if last in self._of_source or not unknown:
                pending.pop()
                if last not in self._of_source:
                    self._of_source[last] = any(self._of_source[x] for x in last.all_input_nodes)
            else:
                pending += unknown
        return self._of_source[node]

    def _of_node(self, node: Node, index: Index) -> _Text:
        text = self._written(node, index)
        if len(text.text) > _LONGEST_FORMULA:
            raise _Inexpressible
        return text

    def _written(self, node: Node, index: Index) -> _Text:
        dtype = tensor(node).dtype
        if (node, index) == self.source:
            return _Text("real", "s", exact=False)
        if self._is_of_source(node):  # (in float16 it may overflow, as the product itself may)
            if node is self.source[0] or node.op != "call_function" or dtype not in _SCORES:
                raise _Inexpressible
            self.inside.append(node)
        else:
            symbols = set().union(*(entry.free_symbols for entry in index))
            if not {self.roles.q, self.roles.k} <= symbols:
                return self._table(node, index)
            if node.op != "call_function" or node.meta.get(NO_GRAD):
                raise _Inexpressible
            if dtype in (torch.float16, torch.float64) or dtype.is_complex:
                raise _Inexpressible  # may overflow, or is computed with more than float32 has
        step = layout_step(self.algebra.space, node, index)
        if step is not None:
            return self.read(*step)
        kind = packet(node)
        if self._is_of_source(node) and kind not in (aten.mul, aten.div) and not self._is_finite_beside_scores(node):
            if not self.is_bounded:
                raise _Inexpressible
        if self._is_of_source(node) and self._may_divide_by_zero(node):
            raise _Inexpressible
        if kind in _CASTS:
            return self._cast(node, index)
        if kind in (aten.where, aten.masked_fill) and len(node.args) == 3:
            condition, *sides = node.args if kind is aten.where else (node.args[i] for i in (1, 2, 0))
            yes, no = (self._operand(x, index, dtype) for x in sides)
            return _chosen(_as_condition(self._operand(condition, index, torch.bool)), yes, no)
        if kind in _COMPARISONS and len(node.args) == 2:
            promoted = torch.result_type(*(x.meta["val"] if isinstance(x, Node) else x for x in node.args))
            if any(_is_scalar(x) and tensor(x).dtype != promoted for x in node.args):
                raise _Inexpressible  # is converted first, and may not fit
            operands = (self._operand(x, index, promoted, keeps=not promoted.is_floating_point) for x in node.args)
            return _Text("condition", _compared(_COMPARISONS[kind], *operands))
        if kind in _JUNCTIONS and dtype == torch.bool:
            left, right = (_as_condition(self._operand(x, index, torch.bool)) for x in node.args[:2])
            return _Text("condition", f"{_wrapped(left)} {_JUNCTIONS[kind]} {_wrapped(right)}")
        if kind in (aten.logical_not, aten.bitwise_not) and dtype == torch.bool:
            return _Text("condition", f"~({_as_condition(self._operand(node.args[0], index, torch.bool))})")
        if kind in _WITH_NUMBERS:
            return self._with_numbers(node, index)
        if kind is aten.nan_to_num:
            return self._nan_to_num(node, index)
        if kind not in _OPERATIONS or dtype == torch.bool or len(node.args) > 2:
            raise _Inexpressible
        if not dtype.is_floating_point and dtype not in (torch.int32, torch.int64):
            raise _Inexpressible  # narrower ones wrap around
        operands = [self._operand(x, index, dtype) for x in node.args]
        if kind is aten.mul and all(part.kind != "real" and part.dtype is None for part in operands):
            raise _Inexpressible  # of positions: may be large
        if kind is aten.rsub and argument(node, 2, "alpha", 1) == 1:
            return _joined(" - ", operands[::-1])
        if kind in _ARITHMETIC and argument(node, 2, "alpha", 1) == 1:
            return _joined(f" {_ARITHMETIC[kind]} ", operands)
        if kind is aten.div and node.kwargs.get("rounding_mode") is None:
            return _joined(" / ", operands, ["real", "real"])
        if kind is aten.neg:
            return dataclasses.replace(operands[0], text=f"-{_wrapped(operands[0].text)}", as_real="")
        if kind is aten.abs:
            inner = operands[0]
            return dataclasses.replace(inner, text=f"abs({inner.text})", as_real=f"abs({inner.real()})")
        if kind in _OF_TWO:
            left, right = _alike(operands)
            may_be_nan = self._is_of_source(node) or not all(math.isfinite(magnitude(x)) for x in node.args)
            if left.kind == "real" and may_be_nan:
                raise _Inexpressible  # where there is a NaN, the kernels' functions return the other operand
            text = f"{_OF_TWO[kind]}({left.text}, {right.text})"
            return _Text(left.kind, text, left.exact and right.exact, dtype=_dtype_of([left, right]))
        if kind is aten.pow:
            return _power(node, operands[0])
        if kind not in _OF_ONE_REAL:
            raise _Inexpressible
        return _Text("real", _OF_ONE_REAL[kind].format(x=_argument(operands[0], _OF_ONE_REAL[kind])), False)

    def _is_finite_beside_scores(self, node: Node) -> bool:
        """Whether what is added to the scores, or takes their place, is known to be finite.

        Of a row of nothing but -inf softmax makes NaN; a kernel takes them for hidden keys, and makes zeros.
        """
        tensors = [x for x in node.all_input_nodes if isinstance(x.meta.get("val"), torch.Tensor)]
        return all(self._is_of_source(x) or bounds(x) is not None for x in tensors)

    def _may_divide_by_zero(self, node: Node) -> bool:
        """Whether a function that has a pole may come to it by way of the scores: to -inf, as above."""
        kind = packet(node)
        place, pole = _POLES.get(kind, (0, None))
        if kind is aten.pow and isinstance(node.args[1], (int, float)) and node.args[1] < 0:
            pole = 0.0
        if pole is None or not isinstance(x := node.args[place], Node) or not self._is_of_source(x):
            return False
        about = torch.finfo(tensor(x).dtype)  # (what is made of scores is floating point)
        found, away = bounds(x), about.eps if pole else about.tiny
        is_below = found is not None and found[1] < pole - away
        return not (is_below or least(x) > pole + away)

    def _nan_to_num(self, node: Node, index: Index) -> _Text:
        """NaN becomes a number; infinities the largest ones, by default."""
        about = torch.finfo(tensor(node).dtype)
        values = (argument(node, 1, "nan"), argument(node, 2, "posinf"), argument(node, 3, "neginf"))
        nan, high, low = (y if x is None else x for x, y in zip(values, (0.0, about.max, about.min)))
        if not math.isfinite(nan) or (high, low) != (about.max, about.min):
            raise _Inexpressible  # (all that is beyond another number would become that)
        x = self._operand(node.args[0], index, tensor(node).dtype)
        return _Text(
            "real",
            _NAN_TO_NUM.format(x=_argument(x, _NAN_TO_NUM), nan=_number(nan), high=_number(high), low=_number(low)),
            False,
        )

    def _with_numbers(self, node: Node, index: Index) -> _Text:
        """A function of one real and numbers. One of None is none at all."""
        names, template = _WITH_NUMBERS[packet(node)]
        numbers = {name: argument(node, i + 1, name, default) for i, (name, default) in enumerate(names)}
        if packet(node) is aten.clamp and None in numbers.values():
            (name,) = (name for name, value in numbers.items() if value is not None)
            template = _WITH_NUMBERS[aten.clamp_min if name == "min" else aten.clamp_max][1]
        values = {}
        for name, value in numbers.items():
            known = None if value is None else self.algebra.value(value, ())
            if known is not None and (is_condition(known) or not known.is_number or not known.is_finite):
                raise _Inexpressible
            values[name] = "" if known is None else _number(float(known))
        if packet(node) is aten.clamp and None not in numbers.values() and float(values["min"]) > float(values["max"]):
            raise _Inexpressible
        x = self._operand(node.args[0], index, tensor(node).dtype)
        return _Text("real", template.format(x=_argument(x, template), **values), False)

    def _operand(self, x: object, index: Index, dtype: torch.dtype, keeps: bool = False) -> _Text:
        """An operand that broadcasting aligns with ``index``, in ``dtype``; as it is if it ``keeps`` its own."""
        if isinstance(x, Node) and isinstance(x.meta.get("val"), torch.Tensor):
            index = broadcast_index(index, shape_exprs(tensor(x)))
            tables = list(self.tables)
            try:
                text = self.read(x, index)
            except _Inexpressible:
                if self.source is None or self._is_of_source(x):
                    raise
                self.tables = tables
                text = self._as_bias(x, index)
            return text if keeps else _converted(text, tensor(x).dtype, dtype)
        value = self.algebra.value(x, ())
        if is_condition(value) or not value.is_number or not value.is_finite:
            raise _Inexpressible
        if not dtype.is_floating_point:
            if dtype != torch.bool and not torch.iinfo(dtype).min <= value <= torch.iinfo(dtype).max:
                raise _Inexpressible
            return self.value(value)
        return _Text("real", _number(float(value)), exact=round_to(value, dtype) == value)

    def _cast(self, node: Node, index: Index) -> _Text:
        source = node.args[0]
        return _converted(self.read(source, index), tensor(source).dtype, tensor(node).dtype)

    def _as_bias(self, node: Node, index: Index) -> _Text:
        """A tensor that is read along queries and keys both: there may be one beside the score."""
        dtype = tensor(node).dtype
        if not dtype.is_floating_point or dtype == torch.float64:
            raise _Inexpressible
        try:
            operand = side_operand(self.algebra.space, node, index, self.roles)
        except Rejected:
            raise _Inexpressible from None
        if self.bias not in (None, operand):
            raise _Inexpressible
        self.bias = operand
        return _Text("real", "b", exact=False)

    def _table(self, node: Node, index: Index) -> _Text:
        dtype = tensor(node).dtype
        if dtype == torch.float64 or dtype.is_complex:
            raise _Inexpressible
        try:
            operand = side_operand(self.algebra.space, node, index, self.roles)
        except Rejected:
            raise _Inexpressible from None
        if operand not in self.tables:
            self.tables.append(operand)
        name = f"t{self.tables.index(operand)}"
        if dtype.is_floating_point:
            return _Text("real", f"real({name})")
        return _Text("condition", f"{name} != 0") if dtype == torch.bool else _Text("integer", name, dtype=dtype)


_SCORES = (torch.float32, torch.bfloat16, torch.float16)


def _limit(node: Node) -> float:
    """What a tensor is never beyond, whatever goes in (but for NaN): of tanh or sigmoid, scaled or moved by numbers."""
    kind = packet(node)
    if kind in (aten.tanh, aten.sigmoid):
        return 1.0
    if kind in _CASTS and tensor(node).dtype.is_floating_point:
        return _limit(node.args[0])
    if kind not in (aten.mul, aten.div, aten.add, aten.sub) or len(node.args) != 2 or node.kwargs:
        return math.inf
    x, number = node.args
    if not isinstance(x, Node) or not isinstance(number, (int, float)) or (kind is aten.div and number == 0):
        return math.inf
    limit = _limit(x)
    if kind in (aten.add, aten.sub):
        return limit + abs(number)
    return limit * abs(number) if kind is aten.mul else limit / abs(number)


def _argument(x: _Text, template: str) -> str:
    """A real in place of {x}: in parentheses, unless the only place is a function's argument."""
    return x.real() if template.endswith("({x})") and template.count("{x}") == 1 else _wrapped(x.real())


def _power(node: Node, base: _Text) -> _Text:
    exponent = node.args[1]
    if isinstance(exponent, bool) or not isinstance(exponent, (int, float)):
        raise _Inexpressible
    x = _wrapped(base.real())
    texts = {0.5: f"sqrt({base.real()})", -0.5: f"1.0 / sqrt({base.real()})", -1: f"1.0 / {x}"}
    texts |= {n: " * ".join([x] * n) for n in (2, 3, 4)}
    if exponent not in texts:
        raise _Inexpressible
    return _Text("real", texts[exponent], False)


def _is_absolute(value: Choice) -> bool:
    if is_condition(value.no) or isinstance(value.no, Choice) or value.yes != -value.no:
        return False
    return value.condition in (sympy.Lt(value.no, 0), sympy.Le(value.no, 0))


def _is_scalar(x: object) -> bool:
    held = x.meta.get("val") if isinstance(x, Node) else None
    return isinstance(held, torch.Tensor) and held.ndim == 0


def _atoms(value: Value) -> list[sympy.Basic]:
    if isinstance(value, Choice):
        return [value.condition, *_atoms(value.yes), *_atoms(value.no)]
    return [value]


def _number(x: float) -> str:
    if not math.isfinite(x):
        raise _Inexpressible
    return repr(float(x))


def _converted(text: _Text, source: torch.dtype, dtype: torch.dtype) -> _Text:
    """A value of dtype ``source`` in another. To a narrower real it is not rounded."""
    if dtype == torch.bool:
        return _Text("condition", _as_condition(text))
    if dtype.is_floating_point:
        is_lossless = text.kind == "condition" or (source.is_floating_point and dtype.itemsize >= source.itemsize)
        if dtype in (torch.float16, torch.float64) and source != dtype:
            raise _Inexpressible
        return _Text("real", text.real(), text.exact and is_lossless)
    if text.kind == "real" or text.dtype not in (None, dtype) or dtype not in (torch.int32, torch.int64):
        raise _Inexpressible
    return _as_integer(text)


def _as_condition(text: _Text) -> str:
    if text.kind == "condition":
        return text.text
    if not text.exact:
        raise _Inexpressible
    return f"{_wrapped(text.text)} != " + ("0.0" if text.kind == "real" else "0")


def _as_integer(text: _Text) -> _Text:
    return _Text("integer", f"where({text.text}, 1, 0)") if text.kind == "condition" else text


def _alike(texts: list[_Text], kinds: list[str] | None = None) -> list[_Text]:
    """The parts as all integers, or as all reals."""
    if "real" in (kinds or [text.kind for text in texts]):
        return [_Text("real", text.real(), text.exact) for text in texts]
    return [_as_integer(text) for text in texts]


def _joined(between: str, texts: list[_Text], kinds: list[str] | None = None) -> _Text:
    parts = _alike(texts, kinds)
    text = between.join(_wrapped(part.text) for part in parts)
    if parts[0].kind == "real":
        return _Text("real", text, False)
    as_real = between.join(_wrapped(part.real()) for part in parts)
    return _Text("integer", text, as_real=as_real, dtype=_dtype_of(parts))


def _dtype_of(integers: list[_Text]) -> torch.dtype | None:
    return next((part.dtype for part in integers if part.dtype is not None), None)


def _wrapped(text: str) -> str:
    """A part of a formula for an operator's side: in parentheses, unless it is a name, a number or a call."""
    depth, closed = 0, [m.end() for m in re.finditer(r"[()]", text)]
    for end in closed[:-1]:
        depth += 1 if text[end - 1] == "(" else -1
        if not depth:
            return f"({text})"
    return text if re.fullmatch(r"[\w.]+(\(.*\))?", text) else f"({text})"


def _compared(relation: str, left: _Text, right: _Text) -> str:
    left, right = _alike([left, right])
    if not (left.exact and right.exact):
        raise _Inexpressible  # what is rounded differently may compare differently
    if len({left.dtype, right.dtype} - {None, torch.int32, torch.int64}) > 1:
        raise _Inexpressible  # of several narrow ones: where they have different signs, not all compare as torch does
    return f"{_wrapped(left.text)} {relation} {_wrapped(right.text)}"


def _chosen(condition: str, yes: _Text, no: _Text) -> _Text:
    yes, no = _alike([yes, no])
    return _Text(
        yes.kind, f"where({condition}, {yes.text}, {no.text})", yes.exact and no.exact, dtype=_dtype_of([yes, no])
    )

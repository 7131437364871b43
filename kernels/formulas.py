"""Formulas: masks and biases that the kernels compute from positions, where a tensor of them would be read; and what
becomes of a score.

A formula is the text of a Python expression. Its names are `q` and `k`, the positions of a query and of a key, both
integers, and `t0`, `t1`, ...: tables, which are tensors that broadcast to [B, Hq, Sq, Sk] and do not vary along queries
and keys both. They hold integers or, in real(t0) alone, floating-point numbers. In the formula of a score there is `s`
besides, the scaled product of the query and the key, a real, and there may be `b`, the bias, which is not added to what
comes out then. There are

    numbers, and + - * of two integers or two reals, / of two reals, - of one
    a // n and a % n, n being a positive number and the integer a not negative
    == != < <= > >= of two integers or two reals, & | of two conditions, ~ of one
    where(condition, a, b), minimum(a, b), maximum(a, b), abs(a)
    and of a real exp(a), log(a), sqrt(a), tanh(a), sigmoid(a)
    real(a), the real number that an integer or what a table holds is
    absorb(condition, a), which is 0 where the condition holds, as if a had been lost in the rounding of a sum, and has
        the derivative of a there too

A score and a bias are real and a mask a condition. Reals are computed in float32, integers in int32, or int64 where a
table is.
"""

import ast
import functools
from typing import NamedTuple

import torch
from torch import Tensor


class Formulas(NamedTuple):
    """What is added to the scores, and where keys are visible; the tables that formulas name; and what becomes of a
    score before anything is added to it. "" for nothing.

    The tables of the score and of the bias come first.
    """

    bias: str = ""
    mask: str = ""
    tables: tuple[Tensor, ...] = ()
    score: str = ""

    def key(self) -> tuple:
        """What the preparation of a launch depends on."""
        tables = ((x.shape, x.stride(), x.dtype, x.get_device(), x.data_ptr() & 15) for x in self.tables)
        return self.bias, self.mask, self.score, *tables


NO_FORMULAS = Formulas()

_FUNCTIONS = {
    "where": 3, "minimum": 2, "maximum": 2, "abs": 1, "exp": 1, "log": 1, "sqrt": 1, "tanh": 1, "sigmoid": 1, "real": 1,
    "absorb": 2,
}  # fmt: skip
_OPERATORS = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.BitAnd, ast.BitOr)
_COMPARISONS = (ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE)


@functools.cache
def parse(text: str) -> ast.expr:
    """The expression; to be changed by nobody.

    Raises:
        ValueError: it is no formula.
    """
    try:
        tree = ast.parse(text, mode="eval").body
    except SyntaxError as error:
        raise ValueError(f"the formula {text!r} is no expression: {error.msg}") from None
    pending = [tree]
    while pending:
        node = pending.pop()
        match node:
            case ast.Name(name):
                known = name in ("q", "k", "s", "b") or (name[0] == "t" and name[1:].isdecimal())
            case ast.Constant(value):
                known = type(value) in (int, float)
            case ast.BinOp(left, operator, right):
                known = isinstance(operator, _OPERATORS)
                pending += left, right
            case ast.UnaryOp(operator, operand):
                known = isinstance(operator, (ast.USub, ast.Invert))
                pending.append(operand)
            case ast.Compare(left, [operator], [right]):
                known = isinstance(operator, _COMPARISONS)
                pending += left, right
            case ast.Call(ast.Name(name), arguments, []):
                known = _FUNCTIONS.get(name) == len(arguments)
                pending += arguments
            case _:
                known = False
        if not known:
            raise ValueError(f"the formula {text!r} has {ast.unparse(node)!r} in it")
    return tree


@functools.cache
def names(text: str) -> frozenset[str]:
    """The names in a formula, without those of functions. Raises ValueError as `parse` does."""
    if not text:
        return frozenset()
    nodes = [*ast.walk(parse(text))]
    functions = {id(node.func) for node in nodes if isinstance(node, ast.Call)}
    return frozenset(node.id for node in nodes if isinstance(node, ast.Name) and id(node) not in functions)


def tables_of(text: str) -> list[int]:
    """The numbers of the tables in a formula, in order."""
    return sorted(int(name[1:]) for name in names(text) if name[0] == "t")


def check(formulas: Formulas, shape: tuple[int, int, int, int], bias: Tensor | None) -> None:
    """Raises ValueError for formulas that name what there is not, or tables that are none for `shape`."""
    if {"s", "b"} & (names(formulas.bias) | names(formulas.mask)):
        raise ValueError("the formula of a bias or of a mask names the score or the bias")
    if has_bias_inside(formulas) and bias is None:
        raise ValueError("the formula of the score names a bias, and there is none")
    used = set().union(*map(tables_of, (formulas.bias, formulas.mask, formulas.score)))
    if used - set(range(len(formulas.tables))):
        raise ValueError(f"formulas with {len(formulas.tables)} tables name t{max(used)}")
    for n, table in enumerate(formulas.tables):
        try:
            whole = table.expand(shape)
        except RuntimeError:
            raise ValueError(f"table t{n} of {list(table.shape)} does not broadcast to {list(shape)}") from None
        if all(size > 1 and stride for size, stride in zip(shape[2:], whole.stride()[2:])):
            raise ValueError(f"table t{n} of {list(table.shape)} varies along queries and keys both")
        if table.dtype.is_complex or table.dtype == torch.float64:
            raise ValueError(f"table t{n} is {table.dtype}")


def has_bias_inside(formulas: Formulas) -> bool:
    """Whether the formula of the score takes the bias in, which is not added to the score then."""
    return "b" in names(formulas.score)


def derivative(text: str) -> str:
    """The formula of a score's derivative by it, with PyTorch's choices where there is none: half of each side of a
    minimum of two that are equal, 0 of an absolute value at 0. Raises ValueError as `parse` does."""
    return ast.unparse(_derivative(parse(text)))


def of_first_query(text: str) -> str:
    """The formula where q is 0, which remains an integer that is computed. Raises ValueError as `parse` does."""
    return ast.unparse(_expression(text, q=ast.parse("k - k", mode="eval").body)) if "q" in names(text) else text


def is_shift(text: str) -> bool:
    """Whether the formula of a score has the derivative 1 everywhere."""
    return derivative(text) == "1.0"


def _expression(text: str, **parts: ast.expr) -> ast.expr:
    """`text` with other expressions in place of its names."""

    class Replacement(ast.NodeTransformer):
        def visit_Name(self, node: ast.Name) -> ast.expr:
            return parts.get(node.id, node)

    return Replacement().visit(ast.parse(text, mode="eval").body)


_ZERO = ast.Constant(0.0)
_DERIVATIVES = {  # of functions of one and of two reals, da and db being those of their arguments
    "abs": "where(a < 0.0, -da, where(a > 0.0, da, 0.0))",
    "exp": "exp(a) * da",
    "log": "da / a",
    "sqrt": "da / (2.0 * sqrt(a))",
    "tanh": "(1.0 - tanh(a) * tanh(a)) * da",
    "sigmoid": "sigmoid(a) * (1.0 - sigmoid(a)) * da",
    "minimum": "where(a < b, da, where(b < a, db, 0.5 * (da + db)))",
    "maximum": "where(a > b, da, where(b > a, db, 0.5 * (da + db)))",
    ast.Mult: "da * b + a * db",
    ast.Div: "da / b - a * db / (b * b)",
}


def _derivative(node: ast.expr) -> ast.expr:
    if "s" not in names(ast.unparse(node)):
        return _ZERO
    match node:
        case ast.Name():
            return ast.Constant(1.0)
        case ast.UnaryOp(_, a):
            return _expression("-da", da=_derivative(a))
        case ast.Call(ast.Name("where"), [condition, a, b]):
            return _expression("where(c, da, db)", c=condition, da=_derivative(a), db=_derivative(b))
        case ast.Call(ast.Name("absorb"), [_, a]):
            return _derivative(a)
        case ast.BinOp(a, ast.Add() | ast.Sub() as operator, b):
            return _sum(_derivative(a), operator, _derivative(b))
        case ast.BinOp(a, ast.Mult(), b) if "s" not in names(ast.unparse(b)):
            return _expression("da * b", da=_derivative(a), b=b)
        case ast.BinOp(a, ast.Mult(), b) if "s" not in names(ast.unparse(a)):
            return _expression("a * db", a=a, db=_derivative(b))
        case ast.BinOp(a, ast.Div(), b) if "s" not in names(ast.unparse(b)):
            return _expression("da / b", da=_derivative(a), b=b)
        case ast.BinOp(a, operator, b):
            rule, arguments = _DERIVATIVES[type(operator)], (a, b)
        case ast.Call(ast.Name(name), arguments):
            rule = _DERIVATIVES[name]
    parts = dict(zip("ab", arguments))
    return _expression(rule, **parts, **{f"d{name}": _derivative(x) for name, x in parts.items()})


def _sum(a: ast.expr, operator: ast.operator, b: ast.expr) -> ast.expr:
    if b is _ZERO:
        return a
    if a is _ZERO:
        return b if isinstance(operator, ast.Add) else ast.UnaryOp(ast.USub(), b)
    return ast.BinOp(a, operator, b)


def evaluate(
    text: str, tables: tuple[Tensor, ...], shape: tuple[int, ...], dtype: torch.dtype, device: torch.device,
    s: Tensor | None = None, b: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """A formula for scores of `shape` [B, Hq, Sq, Sk], in plain PyTorch; reals are `dtype`. Broadcasts to `shape`."""

    def visit(node: ast.expr):
        match node:
            case ast.Name("q"):
                return torch.arange(shape[2], device=device).unsqueeze(-1)
            case ast.Name("k"):
                return torch.arange(shape[3], device=device)
            case ast.Name("s"):
                return s
            case ast.Name("b"):
                return b.to(dtype)
            case ast.Name(name):
                table = tables[int(name[1:])]
                return table.to(torch.uint8) if table.dtype == torch.bool else table
            case ast.Constant(value):
                return torch.tensor(value, dtype=dtype if isinstance(value, float) else torch.int64, device=device)
            case ast.BinOp(left, operator, right):
                return _TORCH[type(operator)](visit(left), visit(right))
            case ast.UnaryOp(operator, operand):
                return ~visit(operand) if isinstance(operator, ast.Invert) else -visit(operand)
            case ast.Compare(left, [operator], [right]):
                return _TORCH[type(operator)](visit(left), visit(right))
            case ast.Call(ast.Name("real"), [operand]):
                return visit(operand).to(dtype)
            case ast.Call(ast.Name("absorb"), [condition, operand]):
                value = visit(operand)
                return torch.where(visit(condition), value - value.detach(), value)
            case ast.Call(ast.Name(name), arguments):
                return getattr(torch, name)(*map(visit, arguments))

    return visit(parse(text))


_TORCH = {
    ast.Add: torch.add, ast.Sub: torch.sub, ast.Mult: torch.mul, ast.Div: torch.div,
    ast.FloorDiv: torch.floor_divide, ast.Mod: torch.remainder,
    ast.BitAnd: torch.bitwise_and, ast.BitOr: torch.bitwise_or,
    ast.Eq: torch.eq, ast.NotEq: torch.ne, ast.Lt: torch.lt, ast.LtE: torch.le, ast.Gt: torch.gt, ast.GtE: torch.ge,
}  # fmt: skip


# Those that Gluon lacks: the hardware's own tanh is off by 5e-4.
_RECIPROCAL = 'gl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=r,r", [{}], gl.float32, True, 1)'
_DEVICE_FUNCTIONS = {
    "real": "x.to(gl.float32)",
    "tanh": "1.0 - 2.0 * " + _RECIPROCAL.format("gl.exp(2.0 * x) + 1.0"),
    "sigmoid": _RECIPROCAL.format("gl.exp(-x) + 1.0"),
}


def device_source(text: str, by_name: dict[str, str], factor: str = "") -> str:
    """A formula as device code, times `factor`, with what `by_name` has in place of its names."""

    class Translation(ast.NodeTransformer):
        def visit_Name(self, node: ast.Name) -> ast.expr:
            return ast.parse(by_name[node.id], mode="eval").body

        def visit_Call(self, node: ast.Call) -> ast.expr:
            arguments = [self.visit(x) for x in node.args]
            if node.func.id == "absorb":  # (NaN stays)
                return _expression("gl.where(c, x * 0.0, x)", c=arguments[0], x=arguments[1])
            if node.func.id in _DEVICE_FUNCTIONS:
                return _expression(_DEVICE_FUNCTIONS[node.func.id], x=arguments[0])
            return ast.Call(ast.Attribute(ast.Name("gl"), node.func.id), arguments, [])

    def translated(node: ast.expr) -> str:
        return ast.unparse(Translation().visit(ast.parse(ast.unparse(node), mode="eval").body))

    tree = parse(text)
    if not factor:
        return translated(tree)
    if isinstance(tree, ast.BinOp) and isinstance(tree.op, ast.Mult):  # the smaller operand is multiplied by it
        small, large = sorted((tree.left, tree.right), key=lambda x: len(names(ast.unparse(x)) & {"q", "k"}))
        return f"({translated(small)}) * {factor} * ({translated(large)})"
    return f"({translated(tree)}) * {factor}"

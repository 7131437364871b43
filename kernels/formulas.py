"""Formulas: masks and biases that the kernels compute from positions, where a tensor of them would be read.

A formula is the text of a Python expression. Its names are `q` and `k`, the positions of a query and of a key, both
integers, and `t0`, `t1`, ...: tables, which are tensors that broadcast to [B, Hq, Sq, Sk] and do not vary along queries
and keys both. They hold integers or, in real(t0) alone, floating-point numbers. There are

    numbers, and + - * of two integers or two reals, / of two reals, - of one
    a // n and a % n, n being a positive number and the integer a not negative
    == != < <= > >= of two integers or two reals, & | of two conditions, ~ of one
    where(condition, a, b), minimum(a, b), maximum(a, b), abs(a), and of a real exp(a), log(a), sqrt(a)
    real(a), the real number that an integer or what a table holds is

A bias is real and a mask a condition. Reals are computed in float32, integers in int32, or int64 where a table is.
"""

import ast
import functools
from typing import NamedTuple

import torch
from torch import Tensor


class Formulas(NamedTuple):
    """What is added to the scores, and where keys are visible, "" for nothing; and the tables that they name.

    Those of the bias come first.
    """

    bias: str = ""
    mask: str = ""
    tables: tuple[Tensor, ...] = ()

    def key(self) -> tuple:
        """What the preparation of a launch depends on."""
        tables = ((x.shape, x.stride(), x.dtype, x.get_device(), x.data_ptr() & 15) for x in self.tables)
        return self.bias, self.mask, *tables


NO_FORMULAS = Formulas()

_FUNCTIONS = {"where": 3, "minimum": 2, "maximum": 2, "abs": 1, "exp": 1, "log": 1, "sqrt": 1, "real": 1}
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
                known = name in ("q", "k") or (name[0] == "t" and name[1:].isdecimal())
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


def check(formulas: Formulas, shape: tuple[int, int, int, int]) -> None:
    """Raises ValueError for formulas that name other tables than there are, or tables that are none for `shape`."""
    used = set(tables_of(formulas.bias)) | set(tables_of(formulas.mask))
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


def evaluate(
    text: str, tables: tuple[Tensor, ...], shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """A formula for scores of `shape` [B, Hq, Sq, Sk], in plain PyTorch; reals are `dtype`. Broadcasts to `shape`."""

    def visit(node: ast.expr):
        match node:
            case ast.Name("q"):
                return torch.arange(shape[2], device=device).unsqueeze(-1)
            case ast.Name("k"):
                return torch.arange(shape[3], device=device)
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
            case ast.Call(ast.Name(name), arguments):
                return getattr(torch, name)(*map(visit, arguments))

    return visit(parse(text))


_TORCH = {
    ast.Add: torch.add, ast.Sub: torch.sub, ast.Mult: torch.mul, ast.Div: torch.div,
    ast.FloorDiv: torch.floor_divide, ast.Mod: torch.remainder,
    ast.BitAnd: torch.bitwise_and, ast.BitOr: torch.bitwise_or,
    ast.Eq: torch.eq, ast.NotEq: torch.ne, ast.Lt: torch.lt, ast.LtE: torch.le, ast.Gt: torch.gt, ast.GtE: torch.ge,
}  # fmt: skip


def device_source(text: str, by_name: dict[str, str], factor: str = "") -> str:
    """A formula as device code, times `factor`, with what `by_name` has in place of its names."""

    class Translation(ast.NodeTransformer):
        def visit_Name(self, node: ast.Name) -> ast.expr:
            return ast.parse(by_name[node.id], mode="eval").body

        def visit_Call(self, node: ast.Call) -> ast.expr:
            arguments = [self.visit(x) for x in node.args]
            if node.func.id == "real":
                to_real = ast.parse("x.to(gl.float32)", mode="eval").body
                to_real.func.value = arguments[0]
                return to_real
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

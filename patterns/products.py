"""Products of two tensors, however they are spelled, in one form: which index of each operand meets which."""

import dataclasses
import string

import sympy
import torch
from torch.fx import Node

from .indices import ZERO, Index, Space, broadcast_index, shape_exprs, size_expr
from .layouts import argument, packet, rank, tensor

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class Product:
    """``out[index] = alpha * sum_c a[a_index] * b[b_index] + beta * added[index]`` with ``c`` the contracted index."""

    node: Node
    a: Node
    a_index: Index
    b: Node
    b_index: Index
    contracted: sympy.Expr
    alpha: object = 1
    added: Node | None = None
    beta: object = 1


def is_product(node: object) -> bool:
    return packet(node) in (aten.matmul, aten.bmm, aten.mm, aten.baddbmm, aten.addmm, aten.einsum)


def as_product(space: Space, node: Node, index: Index, contracted: str) -> Product | None:
    """The product at ``node[index]``; ``contracted`` names the index summed over. None if the form is another."""
    kind = packet(node)
    if kind is aten.einsum:
        return _einsum(space, node, index, contracted)
    if kind in (aten.matmul, aten.bmm, aten.mm):
        return _matmul(space, node, node.args[0], node.args[1], index, contracted)
    if kind in (aten.baddbmm, aten.addmm):
        added, a, b = node.args[:3]
        beta, alpha = argument(node, 3, "beta", 1), argument(node, 4, "alpha", 1)
        return _matmul(space, node, a, b, index, contracted, alpha, None if beta == 0 else added, beta)
    return None


def _matmul(
    space: Space,
    node: Node,
    a: Node,
    b: Node,
    index: Index,
    contracted: str,
    alpha: object = 1,
    added: Node | None = None,
    beta: object = 1,
) -> Product | None:
    if rank(a) < 2 or rank(b) < 2:
        return None
    c = space.symbol(contracted, size_expr(tensor(a).shape[-1]))
    batch, (m, n) = index[:-2], index[-2:]
    a_index = broadcast_index((*batch, m, c), shape_exprs(tensor(a)))
    b_index = broadcast_index((*batch, c, n), shape_exprs(tensor(b)))
    return Product(node, a, a_index, b, b_index, c, alpha, added, beta)


def spell_einsum(node: Node) -> tuple[list[list[str]], list[str]] | None:
    """The axes of both operands and of the result of an einsum, by their letters; those of ``...`` are letters that are
    not in use. None if there are not two operands, or one has a letter twice."""
    equation, operands = node.args[0].replace(" ", ""), node.args[1]
    if len(operands) != 2 or "->" not in equation:
        return None
    inputs, output = equation.split("->")
    unused = [letter for letter in string.ascii_letters if letter not in equation]
    letters = [_spell_ellipsis(text, rank(x), unused) for text, x in zip(inputs.split(","), operands, strict=True)]
    if "..." in output:
        dots = max(([ch for ch in x if ch in unused] for x in letters), key=len)
        result = _splice(output, dots)
    else:
        result = list(output)
    return None if any(len(set(x)) != len(x) for x in (*letters, result)) else (letters, result)


def _einsum(space: Space, node: Node, index: Index, contracted: str) -> Product | None:
    spelled = spell_einsum(node)
    if spelled is None:
        return None
    letters, output_letters = spelled
    operands = node.args[1]
    sums = set(letters[0]) & set(letters[1]) - set(output_letters)
    if len(sums) != 1 or (set(letters[0]) | set(letters[1])) - set(output_letters) - sums:
        return None
    (summed,) = sums
    sizes = {
        ch: size_expr(s)
        for x, t in zip(letters, operands, strict=True)
        for ch, s in zip(x, tensor(t).shape, strict=True)
    }
    contracted_sizes = {
        size_expr(t.shape[x.index(summed)]) for x, t in zip(letters, map(tensor, operands), strict=True)
    }
    if len(contracted_sizes) > 1:  # one of them is broadcast along it
        return None
    c = space.symbol(contracted, sizes[summed])
    at = dict(zip(output_letters, index, strict=True)) | {summed: c}
    indices = [
        tuple(ZERO if size_expr(s) == 1 else at[ch] for ch, s in zip(x, tensor(t).shape, strict=True))
        for x, t in zip(letters, operands, strict=True)
    ]
    return Product(node, operands[0], indices[0], operands[1], indices[1], c)


def _spell_ellipsis(text: str, ndim: int, unused: list[str]) -> list[str]:
    """The letters of one operand with ``...`` spelled out; its axes are named from the right, as they broadcast."""
    missing = ndim - len(text.replace("...", ""))
    return _splice(text, unused[:missing][::-1])


def _splice(text: str, dots: list[str]) -> list[str]:
    if "..." not in text:
        return list(text)
    before, after = text.split("...")
    return [*before, *dots, *after]

"""Operations that are others in disguise, written as those.

Works on the captured graph, as `written.py` does and before it:

    x[..., mask] = value, an `index_put`                    becomes    masked_fill(x, mask, value)
    masked_fill(x, isnan(x), 0), where(isnan(x), 0, x)      become     nan_to_num(x, 0), which leaves infinities alone
    exp2(x), also of x less its maximum                     becomes    exp(x * log(2))
    x[:], and x[:] = y, a `slice_scatter`                   become     x, and y
    einsum("rid,rjd->ij"), einsum("ij,jwd->iwd")            become     einsum("iz,jz->ij"), einsum("ij,jz->iz")
"""

import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, Node

from .indices import shape_exprs, size_expr
from .layouts import argument, is_layout, packet, rank, tensor
from .products import spell_einsum
from .scores import maximum_of
from .written import become, call, erase

aten = torch.ops.aten


def respell(graph: Graph, is_zero: Callable[[Any], bool]) -> None:
    """Replace every such operation, in place. `is_zero` tells of an argument whether it is 0 everywhere."""
    for node in list(graph.nodes):
        if node._erased:
            continue
        if packet(node) in (aten.slice, aten.slice_scatter):
            _whole(graph, node, node.args[packet(node) is aten.slice_scatter])
            continue
        if packet(node) is aten.index_put:
            _fill(graph, node)
        if packet(node) is aten.masked_fill and is_zero(node.args[2]):
            _without_nan(graph, node, node.args[1], node.args[0])
        elif packet(node) is aten.where and len(node.args) == 3 and is_zero(node.args[1]):
            _without_nan(graph, node, node.args[0], node.args[2])
        elif packet(node) is aten.einsum:
            _with_flat_axes(graph, node)
        elif packet(node) is aten.exp2:
            become(graph, node, aten.exp.default, (_times_log_2(graph, node, node.args[0]),))


def _without_nan(graph: Graph, node: Node, condition: Any, x: Any) -> None:
    if (packet(condition), *getattr(condition, "args", ())) not in ((aten.isnan, x), (aten.ne, x, x)):
        return
    ours, theirs = tensor(node), tensor(x)
    if ours.dtype == theirs.dtype and shape_exprs(ours) == shape_exprs(theirs):
        become(graph, node, aten.nan_to_num.default, (x, 0.0, math.inf, -math.inf))


def _times_log_2(graph: Graph, node: Node, x: Node) -> Node:
    """x * log(2), of what `node` is the power of 2 of; what is less its maximum remains so."""
    shifted = packet(x) is aten.sub and len(x.args) == 2 and not x.kwargs
    maximum = maximum_of(x.args[1], x.args[0]) if shifted else None
    scaled = call(graph, node, aten.mul.Tensor, x if maximum is None else x.args[0], math.log(2))
    if maximum is None:
        return scaled
    return call(graph, node, aten.sub.Tensor, scaled, call(graph, node, aten.amax.default, scaled, [maximum[1]], True))


def _whole(graph: Graph, node: Node, x: Node) -> None:
    """Where a slice of x, or one that x is assigned to, is everything."""
    first = 1 + (packet(node) is aten.slice_scatter)
    start, end = argument(node, first + 1, "start"), argument(node, first + 2, "end")
    if start in (None, 0) and end in (None, sys.maxsize) and argument(node, first + 3, "step", 1) == 1:
        if shape_exprs(tensor(x)) == shape_exprs(tensor(node)) and tensor(x).dtype == tensor(node).dtype:
            node.replace_all_uses_with(x)
            erase(graph, node)


def _fill(graph: Graph, node: Node) -> None:
    """Where a condition on some neighbouring axes is the only index and one value is written."""
    x, indices, value = node.args[:3]
    masks = [(dim, index) for dim, index in enumerate(indices) if index is not None]
    if len(node.args) > 3 or node.kwargs or len(masks) != 1 or set(shape_exprs(tensor(value))) - {1}:
        return
    ((dim, mask),) = masks
    if tensor(mask).dtype != torch.bool or tensor(value).dtype != tensor(x).dtype:
        return
    if not rank(mask) or shape_exprs(tensor(mask)) != shape_exprs(tensor(x))[dim : dim + rank(mask)]:
        return
    for _ in range(rank(x) - dim - rank(mask)):
        mask = call(graph, node, aten.unsqueeze.default, mask, -1)
    if rank(value):
        value = call(graph, node, aten.reshape.default, value, [])
    become(graph, node, aten.masked_fill.Tensor, (x, mask, value))


def _with_flat_axes(graph: Graph, node: Node) -> None:
    """Several axes that are summed over, and several that only the values have, become one axis each."""
    spelled = spell_einsum(node)
    if spelled is None:
        return
    (a, b), out = spelled
    x, y = node.args[1]
    summed = [letter for letter in a if letter in b and letter not in out]
    merged = [summed] if len(summed) > 1 else []
    for one, other, weights in ((a, b, y), (b, a, x)):
        own = [letter for letter in one if letter in out and letter not in other]
        if len(own) > 1 and are_weights(weights):  # (several of the queries are heads that share keys)
            merged.append(own)
    if not merged:
        return
    places = [
        (letter, value, dim)
        for one, value in ((a, x), (b, y))
        for dim, letter in enumerate(one)
        if any(letter in letters for letters in merged)
    ]
    sizes: dict[str, Any] = {}
    for letter, value, dim in places:
        size = tensor(value).shape[dim]
        if size_expr(sizes.setdefault(letter, size)) != size_expr(size):  # one is broadcast along it
            return
    back = {
        letter: sizes[letter] if isinstance(sizes[letter], int) else call(graph, node, aten.sym_size.int, value, dim)
        for letter, value, dim in places
        if letter in out
    }
    equation = []
    operands = []
    for one, value in ((a, x), (b, y)):
        for letters in merged:
            if letters[0] in one:
                one, value = _flat(graph, node, one, value, letters)
        equation.append("".join(one))
        operands.append(value)
    result = out
    for letters in merged:
        if letters[0] in result:
            result = [letter for letter in result if letter not in letters] + [letters[0]]
    made = call(graph, node, node.target, f"{','.join(equation)}->{''.join(result)}", operands)
    for letters in merged:
        if letters[0] in result:
            at = result.index(letters[0])
            made = call(graph, node, aten.unflatten.int, made, at, [back[letter] for letter in letters])
            result = [*result[:at], *letters, *result[at + 1 :]]
    become(graph, node, aten.permute.default, (made, [result.index(letter) for letter in out]))


def are_weights(x: Any) -> bool:
    """Whether a softmax, or an exponential, is what x is made of."""
    for _ in range(_FAR):
        if packet(x) in (aten.softmax, aten._softmax, aten._safe_softmax, aten.exp):
            return True
        sources = [arg for arg in getattr(x, "args", ()) if isinstance(arg, Node)]
        if not sources or not (is_layout(x) or packet(x) in _BEHIND_SOFTMAX):
            return False
        x = max(sources, key=_dimensions)
    return False


def _dimensions(x: Node) -> int:
    return rank(x) if isinstance(x.meta.get("val"), torch.Tensor) else 0


_FAR = 16  # operations
_BEHIND_SOFTMAX = (aten._to_copy, aten.to, aten.dropout, aten.native_dropout, aten.mul, aten.div, aten.nan_to_num)
_BEHIND_SOFTMAX += (aten.masked_fill, aten.type_as)


def _flat(graph: Graph, node: Node, letters: list[str], x: Node, merged: list[str]) -> tuple[list[str], Node]:
    """x with the merged axes as its last one, which goes by the first of their letters."""
    order = [letter for letter in letters if letter not in merged] + merged
    if order != letters:
        x = call(graph, node, aten.permute.default, x, [letters.index(letter) for letter in order])
    x = call(graph, node, aten.flatten.using_ints, x, len(order) - len(merged), len(order) - 1)
    return [*order[: -len(merged)], merged[0]], x

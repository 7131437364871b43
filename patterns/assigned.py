"""Sums that are assigned to a part of a tensor, as `scores[:, :, 1:, 1:] += bias` does, put together to one sum.

Works on the captured graph, as `written.py` does and before it. In the graph, such an assignment is

    slice_scatter(x, slice(x) + bias)    becomes    x + pad(bias)

with one `slice_scatter` for each axis, `copy` where there is nothing to slice, and layout operations in between. It is
done where index algebra shows that every entry of x returns to its place.
"""

import sys
from typing import Any

import torch
from torch.fx import Graph, Node

from .indices import Index, Space, shape_exprs
from .layouts import LAYOUT_OPS, argument, layout_step, packet, rank, tensor
from .written import become, erase

aten = torch.ops.aten


def sum_up_assignments(graph: Graph, space: Space) -> None:
    """Replace every such assignment by the sum, in place."""
    for node in list(graph.nodes):
        if node._erased:
            continue
        if packet(node) is aten.copy and _is_like(node.args[1], node):
            _sum_up(graph, space, node.args[1], _sliced(node.args[0]))
            _give_way(graph, node, node.args[1])
        elif packet(node) is aten.slice_scatter:
            _sum_up(graph, space, node, node.args[0])


def _sum_up(graph: Graph, space: Space, node: Node, whole: Node) -> None:
    """Makes of a node the sum of `whole` and the rest, if it is one, or what it was if there is no rest."""
    if not _is_like(whole, node) or not tensor(node).is_floating_point():
        return
    index = _index(space, node)
    if node is whole or _place(space, node, index, whole) != index:
        return
    try:
        rest = _rest(graph, space, node, node, whole)
    except _Unclear:
        return
    if rest is None:
        _give_way(graph, node, whole)
    else:
        become(graph, node, aten.add.Tensor, (whole, rest))


def _sliced(node: Node) -> Node:
    """What a node is all of, by way of slices."""
    while packet(node) is aten.slice and _is_like(node.args[0], node):
        node = node.args[0]
    return node


def _give_way(graph: Graph, node: Node, other: Node) -> None:
    node.replace_all_uses_with(other)
    erase(graph, node)


_MOVES = (*LAYOUT_OPS, aten.slice)


def _index(space: Space, node: Node) -> Index:
    """Any entry of a node."""
    return tuple(space.symbol(f"{node.name}.{i}", size) for i, size in enumerate(shape_exprs(tensor(node))))


def _is_like(x: object, node: Node) -> bool:
    """Whether x is a tensor of the shape and dtype of a node."""
    if not isinstance(x, Node) or not isinstance(x.meta.get("val"), torch.Tensor):
        return False
    ours, theirs = tensor(node), tensor(x)
    return ours.dtype == theirs.dtype and ours.device == theirs.device and shape_exprs(ours) == shape_exprs(theirs)


def _region(node: Node) -> tuple[int, int, int] | None:
    """The axis of a `slice_scatter`, and how many entries are before and behind what it writes, without gaps."""
    dim, start, end = argument(node, 2, "dim", 0), argument(node, 3, "start") or 0, argument(node, 4, "end")
    if argument(node, 5, "step", 1) != 1 or not isinstance(start, int) or start < 0:
        return None
    size = tensor(node).shape[dim]
    behind = 0
    if end not in (None, sys.maxsize):
        if not (isinstance(end, int) and isinstance(size, int) and end >= 0):
            return None
        behind = max(size - end, 0)
    return dim % rank(node), start, behind


def _place(space: Space, node: object, index: Index, whole: Node) -> Index | None:
    """Which entry of `whole` is a summand, with factor 1, of `node[index]`; None if that is not clear."""
    if node is whole:
        return index
    if not isinstance(node, Node) or node.op != "call_function" or not isinstance(node.meta.get("val"), torch.Tensor):
        return None
    if tensor(node).dtype != tensor(whole).dtype:
        return None
    if packet(node) is aten.slice_scatter:
        base, source = node.args[:2]
        region = _region(node)
        if region is None:
            return None
        dim, start, _ = region
        inner = _index(space, source)
        around = (*inner[:dim], inner[dim] + start, *inner[dim + 1 :])
        written, kept = _place(space, source, inner, whole), _place(space, base, around, whole)
        return _place(space, base, index, whole) if written is not None and written == kept else None
    if packet(node) is aten.add:
        terms = node.args[:2] if argument(node, 2, "alpha", 1) == 1 else ()
        places = [_place(space, x, index, whole) for x in terms if _is_like(x, node)]
        places = [place for place in places if place is not None]
        return places[0] if len(places) == 1 else None
    step = layout_step(space, node, index) if packet(node) in _MOVES else None
    return None if step is None else _place(space, *step, whole)


class _Unclear(Exception):
    """A sum cannot be put together."""


def _rest(graph: Graph, space: Space, before: Node, node: Node, whole: Node) -> Node | None:
    """A new node, in front of another, that is `node` less the `whole` that `_place` finds in it. None: that is 0."""

    def call(target: torch._ops.OpOverload, *args: Any) -> Node:
        with graph.inserting_before(before):
            made = graph.call_function(target, args)
        made.meta = {**before.meta, "val": target(*torch.fx.map_arg(args, lambda x: x.meta["val"]))}
        return made

    if node is whole:
        return None
    if packet(node) is aten.add:
        index = _index(space, node)
        first, second = (x for x in node.args[:2])
        if not _is_like(first, node) or _place(space, first, index, whole) is None:
            first, second = second, first
        rest = _rest(graph, space, before, first, whole)
        if rest is not None:
            return call(aten.add.Tensor, rest, second)
        if _is_like(second, node):
            return second
        sizes = list(tensor(node).shape)
        if not isinstance(second, Node) or not all(isinstance(size, int) for size in sizes):
            raise _Unclear
        return call(aten.expand.default, second, sizes)
    rest = _rest(graph, space, before, node.args[packet(node) is aten.slice_scatter], whole)
    if rest is None:
        return None
    if packet(node) is aten.slice_scatter:
        dim, *around = _region(node)
        return call(aten.constant_pad_nd.default, rest, [0, 0] * (rank(node) - 1 - dim) + around, 0.0)
    if packet(node) in (aten.view, aten._unsafe_view):
        return call(aten.reshape.default, rest, *node.args[1:])
    return call(node.target, rest, *node.args[1:])

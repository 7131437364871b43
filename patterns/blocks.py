"""Attention to keys that come in several blocks, each with a product of its own, as attention to all of them.

    cat([q @ k^T, q @ k2^T], -1)                  becomes    q @ cat([k, k2])^T
    w[..., :n] @ v + w[..., n:] @ v2              becomes    w @ cat([v, v2])

So the local and global keys of Pegasus-X, and the text and the row of an image in DALL-E's axial attention, are one
softmax over one sequence of keys. A block that all of some axis shares is repeated along it: of a few keys, mostly.
"""

import operator
import string
from typing import Any, NamedTuple

import torch
from torch.fx import Graph, Node

from .indices import shape_exprs, size_expr
from .layouts import argument, packet, rank, tensor, users_of
from .products import spell_einsum
from .respelled import are_weights
from .written import become, call

aten = torch.ops.aten


class _Block(NamedTuple):
    """A product of ``shared``, whose axes are ``letters``, with ``other``, whose axes are ``others``.

    Letters of the result are ``a``, ``b``, ... in its order; an axis that is summed over is ``z``.
    """

    shared: Node
    letters: str
    other: Node
    others: str
    result: str


def join_blocks(graph: Graph) -> None:
    """Replace every such operation, in place."""
    for node in list(graph.nodes):
        if node._erased:
            continue
        if packet(node) is aten.cat and len(node.args[0]) > 1:
            _join_scores(graph, node)
        elif packet(node) is aten.add and argument(node, 2, "alpha", 1) == 1:
            _join_values(graph, node)


def _join_scores(graph: Graph, node: Node) -> None:
    """A concatenation of products with one tensor, along an axis that only the others have."""
    parts, dim = node.args[0], argument(node, 1, "dim", 0) % rank(node)
    if any(len(users_of(part)) != 1 or tensor(part).dtype != tensor(node).dtype for part in parts):
        return
    blocks = [_block(part, side) for side in (0, 1) for part in parts]
    for several in (blocks[: len(parts)], blocks[len(parts) :]):
        if None not in several and len({(b.shared, b.letters) for b in several}) == 1:
            key = several[0].result[dim]
            if all(key in b.others and key not in b.letters for b in several) and not are_weights(several[0].shared):
                _become_one(graph, node, several[0].shared, several[0].letters, several, key)
                return


def _join_values(graph: Graph, node: Node) -> None:
    """A sum of products of slices of one tensor that make up an axis of it, over that axis."""
    parts = [part for part in node.args[:2] if isinstance(part, Node)]
    if len(parts) != 2 or any(len(users_of(part)) != 1 for part in parts):
        return
    if any(shape_exprs(tensor(x)) != shape_exprs(tensor(node)) or tensor(x).dtype != tensor(node).dtype for x in parts):
        return
    for side in (0, 1):
        blocks = [_block(part, side) for part in parts]
        if None in blocks or len({b.letters for b in blocks}) != 1:
            continue
        slices = [_slice(b.shared) for b in blocks]
        if None in slices or len({(whole, dim) for whole, dim, *_ in slices}) != 1:
            continue
        order = sorted(range(2), key=lambda i: slices[i][2])
        whole, dim, start, middle = slices[order[0]]
        if start != 0 or slices[order[1]][2] != middle or slices[order[1]][3] != size_expr(tensor(whole).shape[dim]):
            continue
        key = blocks[0].letters[dim]
        if key == "z" and all("z" in b.others for b in blocks):
            _become_one(graph, node, whole, blocks[0].letters, [blocks[i] for i in order], key)
            return


def _block(node: Any, side: int) -> _Block | None:
    """A product as a block; the operand of that number is the shared one."""
    if packet(node) is aten.einsum:
        spelled, operands = spell_einsum(node), node.args[1]
    elif packet(node) is aten.matmul or packet(node) is aten.bmm:
        operands = node.args[:2]
        batch = [shape_exprs(tensor(x))[:-2] for x in operands]
        letters = list(string.ascii_letters[: rank(node) - 2])
        spelled = ([[*letters, "X", "Z"], [*letters, "Z", "Y"]], [*letters, "X", "Y"]) if batch[0] == batch[1] else None
    else:
        return None
    if spelled is None:
        return None
    letters, result = spelled
    summed = [x for x in letters[0] if x in letters[1] and x not in result]
    names = {x: string.ascii_lowercase[i] for i, x in enumerate(result)} | dict.fromkeys(summed, "z")
    sizes = [dict(zip(x, shape_exprs(tensor(t)))) for x, t in zip(letters, operands)]
    alike = all(sizes[0][x] == sizes[1][x] for x in letters[0] if x in letters[1])  # else one is broadcast
    if len(summed) != 1 or len(result) > 20 or not alike or any(x not in names for x in (*letters[0], *letters[1])):
        return None
    mine, other = ("".join(names[x] for x in letters[i]) for i in (side, 1 - side))
    return _Block(operands[side], mine, operands[1 - side], other, string.ascii_lowercase[: len(result)])


def _slice(node: Node) -> tuple[Node, int, int, int] | None:
    """(tensor, axis, first, end) of a part of an axis of a known size."""
    piece = node.target is operator.getitem and packet(node.args[0]) in (aten.split, aten.split_with_sizes)
    source = node.args[0] if piece else node
    if not piece and packet(node) not in (aten.slice, aten.narrow):
        return None
    whole = source.args[0]
    dim = (argument(source, 2, "dim", 0) if piece else argument(source, 1, "dim", 0)) % rank(whole)
    size = tensor(whole).shape[dim]
    if piece:
        lengths = source.args[1]
        lengths = list(lengths) if isinstance(lengths, (list, tuple)) else [lengths] * (node.args[1] + 1)
        start, end, step = sum(lengths[: node.args[1]]), sum(lengths[: node.args[1] + 1]), 1
    elif packet(node) is aten.narrow:
        start, end, step = node.args[2], node.args[2] + node.args[3], 1
    else:
        start, end = argument(node, 2, "start"), argument(node, 3, "end")
        step = argument(node, 4, "step", 1)
    if step != 1 or not isinstance(size, int) or not all(x is None or isinstance(x, int) for x in (start, end)):
        return None
    return whole, dim, *slice(start, end).indices(size)[:2]


def _become_one(graph: Graph, node: Node, shared: Node, letters: str, blocks: list[_Block], key: str) -> None:
    """Makes of a node the product of ``shared`` with all blocks, which follow each other along ``key``."""
    axes = sorted({x for b in blocks for x in b.others if x not in (key, "z")})
    order = [*axes, *([key] if key != "z" else []), "z"]
    sizes = {x: size for b in blocks for x, size in zip(b.others, tensor(b.other).shape) if x in axes}
    if not all(isinstance(size, int) for size in sizes.values()):
        return
    others = [_arranged(graph, node, b, order, sizes) for b in blocks]
    joined = call(graph, node, aten.cat.default, others, order.index(key))
    equation = f"{letters},{''.join(order)}->{blocks[0].result}"
    become(graph, node, aten.einsum.default, (equation, [shared, joined]))


def _arranged(graph: Graph, node: Node, block: _Block, order: list[str], sizes: dict[str, int]) -> Node:
    """A block's tensor with its axes in that order, repeated along those that it lacks."""
    x, letters = block.other, block.others
    own = [letter for letter in order if letter in letters]
    if own != list(letters):
        x = call(graph, node, aten.permute.default, x, [letters.index(letter) for letter in own])
    for position, letter in enumerate(order):
        if letter not in letters:
            x = call(graph, node, aten.unsqueeze.default, x, position)
    if own != order:
        x = call(graph, node, aten.expand.default, x, [-1 if a in letters else sizes[a] for a in order])
    return x

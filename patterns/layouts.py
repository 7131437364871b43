"""Layout operations as index substitutions: which element of its input an element of the output is.

One table, keyed by ATen operator: every entry takes the node and an index into its result and returns the source node
with the index into it. Whatever is in the table moves or repeats elements and never changes them.
"""

import operator
from collections.abc import Callable

import sympy
import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .indices import ZERO, Index, Space, broadcast_index, reshape_index, shape_exprs, size_expr

aten = torch.ops.aten

# In a node's meta: it was computed without gradients in a graph that has some. What is behind it must not be reached
# for in its place.
NO_GRAD = "fa3_no_grad"

Step = tuple[Node, Index]
Rule = Callable[[Space, Node, Index], Step | None]
_RULES: dict[torch._ops.OpOverloadPacket, Rule] = {}


# Other names of the same operators, with the same arguments. A trace from before autograd keeps them apart.
_ALIASES = {
    aten.subtract: aten.sub,
    aten.multiply: aten.mul,
    aten.divide: aten.div,
    aten.true_divide: aten.div,
    aten.negative: aten.neg,
    aten.absolute: aten.abs,
    aten.greater: aten.gt,
    aten.greater_equal: aten.ge,
    aten.less: aten.lt,
    aten.less_equal: aten.le,
    aten.not_equal: aten.ne,
    aten.clip: aten.clamp,
    aten.concat: aten.cat,
    aten.concatenate: aten.cat,
    aten.linalg_matmul: aten.matmul,
    aten.special_softmax: aten.softmax,
    aten.special_log_softmax: aten.log_softmax,
    aten.special_logsumexp: aten.logsumexp,
    aten.special_expit: aten.sigmoid,
    aten.special_exp2: aten.exp2,
    aten.special_log1p: aten.log1p,
}


def packet(node: object) -> torch._ops.OpOverloadPacket | None:
    """The ATen operator that a node calls, by one of its names and without its overload."""
    target = getattr(node, "target", None)
    if not isinstance(target, torch._ops.OpOverload):
        return None
    return _ALIASES.get(target.overloadpacket, target.overloadpacket)


def argument(node: Node, position: int, name: str, default: object = None) -> object:
    """An argument of an ATen call by its schema position or name."""
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


def tensor(node: Node) -> torch.Tensor:
    return node.meta["val"]


def rank(node: Node) -> int:
    return tensor(node).ndim


def layout_step(space: Space, node: Node, index: Index) -> Step | None:
    """The (source, index) that ``node[index]`` is a copy of, or None if ``node`` is no layout operation."""
    if node.op != "call_function":
        return None
    if node.target is operator.getitem:
        return _piece(space, node, index)
    rule = _RULES.get(packet(node))
    return rule(space, node, index) if rule is not None else None


def is_layout(node: Node) -> bool:
    """Whether `layout_step` may have a source for a node."""
    return node.op == "call_function" and (node.target is operator.getitem or packet(node) in _RULES)


def _rule(*packets: torch._ops.OpOverloadPacket) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        for p in packets:
            _RULES[p] = function
        return function

    return register


@_rule(aten.clone, aten.contiguous, aten.alias, aten.lift_fresh_copy, aten.lift_fresh)
def _same(space: Space, node: Node, index: Index) -> Step:
    return node.args[0], index


@_rule(aten.view, aten.reshape, aten._unsafe_view, aten.flatten, aten.unflatten, aten.view_as, aten.reshape_as)
def _reshape(space: Space, node: Node, index: Index) -> Step | None:
    source = node.args[0]
    if tensor(source).dtype != tensor(node).dtype:  # view.dtype reinterprets bits
        return None
    return source, reshape_index(space, index, shape_exprs(tensor(node)), shape_exprs(tensor(source)))


@_rule(aten.expand, aten.expand_as, aten.broadcast_to)
def _expand(space: Space, node: Node, index: Index) -> Step:
    source = node.args[0]
    return source, broadcast_index(index, shape_exprs(tensor(source)))


@_rule(aten.unsqueeze)
def _unsqueeze(space: Space, node: Node, index: Index) -> Step:
    dim = node.args[1] % rank(node)
    return node.args[0], index[:dim] + index[dim + 1 :]


@_rule(aten.squeeze)
def _squeeze(space: Space, node: Node, index: Index) -> Step:
    source = node.args[0]
    dims = argument(node, 1, "dim")
    shape = shape_exprs(tensor(source))
    if dims is None:
        dims = range(len(shape))
    named = {d % len(shape) for d in ([dims] if isinstance(dims, int) else dims)}
    # A symbolic size was compared with one when the graph was made: asking again adds no guard.
    dropped = {d for d in named if shape[d] == 1 or (not shape[d].is_number and bool(tensor(source).shape[d] == 1))}
    rest = iter(index)
    return source, tuple(ZERO if d in dropped else next(rest) for d in range(len(shape)))


@_rule(aten.transpose, aten.swapaxes, aten.swapdims)
def _transpose(space: Space, node: Node, index: Index) -> Step:
    a, b = (d % rank(node) for d in node.args[1:3])
    swapped = list(index)
    swapped[a], swapped[b] = swapped[b], swapped[a]
    return node.args[0], tuple(swapped)


@_rule(aten.numpy_T)
def _reversed(space: Space, node: Node, index: Index) -> Step:
    return node.args[0], index[::-1]


@_rule(aten.t, aten.mT, aten.adjoint)
def _last_two(space: Space, node: Node, index: Index) -> Step:
    return node.args[0], (*index[:-2], *reversed(index[-2:]))


@_rule(aten.permute)
def _permute(space: Space, node: Node, index: Index) -> Step:
    source_index: list[sympy.Expr] = [ZERO] * len(index)
    for position, dim in enumerate(node.args[1]):
        source_index[dim % len(index)] = index[position]
    return node.args[0], tuple(source_index)


@_rule(aten.movedim, aten.moveaxis)
def _movedim(space: Space, node: Node, index: Index) -> Step:
    n = len(index)
    source, destination = ([d % n for d in ([a] if isinstance(a, int) else a)] for a in node.args[1:3])
    rest = iter(d for d in range(n) if d not in source)
    order = [source[destination.index(d)] if d in destination else next(rest) for d in range(n)]
    source_index: list[sympy.Expr] = [ZERO] * n
    for position, dim in enumerate(order):
        source_index[dim] = index[position]
    return node.args[0], tuple(source_index)


@_rule(aten.select)
def _select(space: Space, node: Node, index: Index) -> Step | None:
    source, dim, at = node.args[:3]
    dim %= rank(source)
    at = _from_front(at, size_expr(tensor(source).shape[dim]))
    return None if at is None else (source, (*index[:dim], at, *index[dim:]))


def _from_front(position: object, size: sympy.Expr) -> sympy.Expr | None:
    """A position that counts from the end if it is negative, or None where its sign is not known."""
    at = size_expr(position)
    if at.is_negative or _is_guarded(position, operator.lt):
        return size + at
    return at if at.is_nonnegative or _is_guarded(position, operator.ge) else None


def _is_guarded(position: object, relation: Callable[[object, int], object]) -> bool:
    """Whether the guards that tracing has added say on which side of zero a symbolic position is."""
    value = position.meta["val"] if isinstance(position, Node) else position
    return isinstance(value, torch.SymInt) and statically_known_true(relation(value, 0))


@_rule(aten.slice)
def _slice(space: Space, node: Node, index: Index) -> Step | None:
    source = node.args[0]
    dim = argument(node, 1, "dim", 0) % rank(source)
    start, step = argument(node, 2, "start"), argument(node, 4, "step", 1)
    size = size_expr(tensor(source).shape[dim])
    first = ZERO if start is None else _from_front(start, size)
    if first is None or first.is_negative or first != 0 and not (first.is_integer and size.is_integer):
        return None
    return source, (*index[:dim], first + size_expr(step) * index[dim], *index[dim + 1 :])


@_rule(aten.narrow)
def _narrow(space: Space, node: Node, index: Index) -> Step | None:
    source, dim, start = node.args[:3]
    dim %= rank(source)
    if isinstance(start, Node) or size_expr(start).is_negative:
        return None
    return source, (*index[:dim], size_expr(start) + index[dim], *index[dim + 1 :])


@_rule(aten.repeat_interleave)
def _repeat_interleave(space: Space, node: Node, index: Index) -> Step | None:
    source, repeats = node.args[:2]
    dim = argument(node, 2, "dim")
    if isinstance(repeats, Node) or dim is None:
        return None
    dim %= rank(source)
    return source, (*index[:dim], space.divmod(index[dim], size_expr(repeats))[0], *index[dim + 1 :])


@_rule(aten.repeat, aten.tile)
def _repeat(space: Space, node: Node, index: Index) -> Step:
    source = node.args[0]
    shape = shape_exprs(tensor(source))
    tail = index[len(index) - len(shape) :]
    return source, tuple(space.divmod(i, size)[1] if size != 1 else ZERO for i, size in zip(tail, shape, strict=True))


def _piece(space: Space, node: Node, index: Index) -> Step | None:
    """``getitem`` of split, chunk or unbind: a slice or a selection of the tensor that was taken apart."""
    whole, number = node.args
    kind = packet(whole)
    if not isinstance(whole, Node) or not isinstance(number, int):
        return None
    source = whole.args[0]
    if kind is aten.unbind:
        dim = argument(whole, 1, "dim", 0) % rank(source)
        return source, (*index[:dim], sympy.Integer(number), *index[dim:])
    if kind in (aten.split, aten.split_with_sizes, aten.chunk, aten.tensor_split):
        dim = argument(whole, 2, "dim", 0) % rank(source)
        pieces = whole.meta["val"]
        before = sum((size_expr(p.shape[dim]) for p in pieces[: number % len(pieces)]), ZERO)
        return source, (*index[:dim], before + index[dim], *index[dim + 1 :])
    return None


# What moves the result of an attention around without computing anything.
LAYOUT_OPS = (aten.view, aten.reshape, aten._unsafe_view, aten.expand, aten.clone, aten.contiguous, aten.unsqueeze)
LAYOUT_OPS += (aten.squeeze, aten.transpose, aten.permute, aten.alias, aten.flatten, aten.unflatten)


def users_of(node: Node) -> list[Node]:
    return [u for u in node.users if packet(u) is not aten._assert_tensor_metadata]

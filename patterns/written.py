"""Softmax written out: exp, sum and division put together to the operator that they compute.

Works on the captured graph, which only describes the user's and is never run, before attention is looked for in it:

    exp(s) / exp(s).sum(-1, keepdim=True)           and the same by a reciprocal, with s less its maximum or not
    exp(s - logsumexp(s, -1, keepdim=True))         and log_softmax(s, -1).exp()
    (exp(s) @ v) / exp(s).sum(-1, keepdim=True)     normalised last
    x / x.sum(-1, keepdim=True)                     for x = exp(s) * mask or softmax(s) * mask
    x / (x.sum(-1, keepdim=True) + eps)             also by clamp
    exp(s - p) / (exp(s - p).sum(-1, keepdim=True) + exp(-p))   "off by one", p being bounded below, or not there

What such a spelling makes of a query that sees no key is not what softmax makes of it. `EMPTY_ROWS` in the meta of the
new softmax says what it is.
"""

import dataclasses
import enum
import math
from typing import Any

import torch
from torch.fx import Graph, Node

from .indices import shape_exprs
from .layouts import LAYOUT_OPS, argument, packet, rank, tensor
from .scores import maximum_of

aten = torch.ops.aten

EMPTY_ROWS = "fa3_empty_rows"


class Written(enum.Enum):
    """What a row gives that the masks hide all of, where it is not what softmax gives."""

    BY_INFINITY = "the same for scores hidden by -inf, but not for those that a number is written over or added to"
    MULTIPLIED = "NaN, with a gradient of NaN, since scores are hidden by a factor of 0 and 0 / 0 is NaN"
    UNCLEAR = "0 / eps or NaN, and either may be the gradient"


# Of scores less their maximum the sum is at least 1, and an eps up to here is lost in its rounding. Else, with scores
# of usual size (16 at most, on both sides), it is lost up to the second.
_EPS, _TINY_EPS = 1e-7, 1e-22


@dataclasses.dataclass(frozen=True)
class _Exponential:
    """exp(scores) times factors of 0 or 1."""

    scores: Node
    factors: tuple[Node, ...]
    is_shifted: bool  # scores are less their maximum, or the exponential is a softmax already


def put_together(graph: Graph) -> None:
    """Replace every softmax that is written out by the operator, in place."""
    for node in list(graph.nodes):
        if node._erased:
            continue
        kind = packet(node)
        if kind is aten.exp:
            _of_logarithm(graph, node)
        elif kind in (aten.div, aten.mul) and len(node.args) == 2 and not node.kwargs:
            _of_quotient(graph, node)


def _of_logarithm(graph: Graph, node: Node) -> None:
    """exp(s - logsumexp(s)) and exp(log_softmax(s))."""
    inside = node.args[0]
    if packet(inside) is aten.log_softmax and argument(inside, 2, "dtype") is None:
        _become_softmax(graph, node, inside.args[0], inside.args[1])
    elif packet(inside) is aten.sub and len(inside.args) == 2 and not inside.kwargs:
        scores, total = inside.args
        reduced = _kept(total, aten.logsumexp)
        if reduced is not None and reduced[0] is scores:
            # Hugely negative numbers are their own log-sum-exp, but for its rounding.
            _become_softmax(graph, node, scores, reduced[1], rows=Written.BY_INFINITY)


def _of_quotient(graph: Graph, node: Node) -> None:
    """x / sum(x) for an exponential x, and (x @ v) / sum(x)."""
    numerator, divisor = node.args
    if packet(node) is aten.mul:
        if _inverse_of(divisor) is None:
            numerator, divisor = divisor, numerator
        divisor = _inverse_of(divisor)
        if divisor is None:
            return
    if _off_by_one(graph, node, numerator, divisor):
        return
    total, eps = _without_eps(divisor)
    reduced = _kept(total, aten.sum)
    if reduced is None or not isinstance(numerator, Node):
        return
    x, dim = reduced
    exponential = _exponential(x, dim)
    if exponential is None or not _alike(exponential.scores, x):
        return
    multiplied, unshifted = bool(exponential.factors), not exponential.is_shifted
    if eps > (_TINY_EPS if multiplied or unshifted else _EPS):
        return
    rows = None
    if multiplied or unshifted:
        rows = Written.UNCLEAR if eps else Written.MULTIPLIED if multiplied else Written.BY_INFINITY
    if numerator is x:
        _become_softmax(graph, node, exponential.scores, dim, exponential.factors, rows)
    elif packet(numerator) in (aten.matmul, aten.bmm) and numerator.args[0] is x and dim == rank(x) - 1:
        if not _alike(node, numerator):
            return
        with graph.inserting_before(node):
            softmax = graph.call_function(aten.clone.default, (x,))
        softmax.meta = node.meta | {"val": tensor(x)}
        become(graph, node, numerator.target, (softmax, *numerator.args[1:]))
        _become_softmax(graph, softmax, exponential.scores, dim, exponential.factors, rows)


def _inverse_of(node: object) -> object | None:
    """x, if a node is 1 / x: that is a reciprocal, or one times one."""
    if packet(node) is aten.mul and len(node.args) == 2 and 1 in [x for x in node.args if isinstance(x, (int, float))]:
        node = next(x for x in node.args if isinstance(x, Node))
    if packet(node) is aten.div and node.args[0] == 1 and not node.kwargs:
        return node.args[1]
    return node.args[0] if packet(node) is aten.reciprocal else None


def _off_by_one(graph: Graph, node: Node, x: object, divisor: object) -> bool:
    """exp(s - p) / (exp(s - p).sum() + exp(-p)), p being one finite shift a row or nothing: one more score, of zero."""
    if packet(x) is not aten.exp or packet(divisor) is not aten.add or len(divisor.args) != 2 or divisor.kwargs:
        return False
    inside = x.args[0]
    for total, one in (divisor.args, divisor.args[::-1]):
        reduced = _kept(total, aten.sum)
        if reduced is None or reduced[0] is not x or reduced[1] != rank(x) - 1:
            continue
        if isinstance(one, (int, float)):
            scores = inside if one == 1 else None
        else:
            shifted = packet(inside) is aten.sub and len(inside.args) == 2 and not inside.kwargs
            negated = one.args[0] if packet(one) is aten.exp else None
            same = shifted and packet(negated) is aten.neg and negated.args[0] is inside.args[1]
            same = same and shape_exprs(tensor(one))[-1:] in ((), (1,)) and _is_bounded_below(inside.args[1])
            scores = inside.args[0] if same else None
        if not isinstance(scores, Node) or not _alike(scores, x) or not _alike(node, x):
            continue
        with graph.inserting_before(node):
            padded = graph.call_function(aten.constant_pad_nd.default, (scores, [0, 1], 0.0))
            softmax = graph.call_function(aten.softmax.int, (padded, rank(x) - 1))
        value = torch.nn.functional.pad(tensor(scores), (0, 1))
        for made in (padded, softmax):
            made.meta = node.meta | {"val": value}
        become(graph, node, aten.slice.Tensor, (softmax, rank(x) - 1, 0, -1))
        return True
    return False


def _is_bounded_below(node: Node) -> bool:
    """Whether a tensor is known not to be -inf, as the maximum of a row that sees no key is: -inf - -inf is NaN."""
    if packet(node) is aten.detach:
        return _is_bounded_below(node.args[0])
    least = argument(node, 1, "min") if packet(node) in (aten.clamp, aten.clamp_min) else None
    return packet(node) is aten.relu or (isinstance(least, (int, float)) and math.isfinite(least))


def _alike(a: Node, b: Node) -> bool:
    return shape_exprs(tensor(a)) == shape_exprs(tensor(b)) and tensor(a).dtype == tensor(b).dtype


def _exponential(x: Node, dim: int) -> _Exponential | None:
    kind = packet(x)
    if kind is aten.exp:
        inside = x.args[0]
        is_less = packet(inside) is aten.sub and len(inside.args) == 2 and not inside.kwargs
        maximum = maximum_of(inside.args[1], inside.args[0]) if is_less else None
        return _Exponential(inside, (), maximum is not None and maximum[1] == dim)
    if kind is aten.softmax and argument(x, 2, "dtype") is None and x.args[1] % rank(x) == dim:
        return _Exponential(x.args[0], (), EMPTY_ROWS not in x.meta)
    if kind is aten.mul and len(x.args) == 2:
        for whole, factor in (x.args, x.args[::-1]):
            if isinstance(whole, Node) and isinstance(factor, Node) and _is_zero_or_one(factor):
                inner = _exponential(whole, dim)
                if inner is not None:
                    return dataclasses.replace(inner, factors=(*inner.factors, factor))
    return None


def _is_zero_or_one(node: object) -> bool:
    if not isinstance(node, Node) or not isinstance(node.meta.get("val"), torch.Tensor):
        return False
    if tensor(node).dtype == torch.bool:
        return True
    kind = packet(node)
    if kind in (aten._to_copy, aten.to, aten.type_as) or kind in LAYOUT_OPS:
        return _is_zero_or_one(node.args[0])
    one_less = kind is aten.rsub and node.args[1] == 1 or kind is aten.sub and node.args[0] == 1
    if one_less and len(node.args) == 2 and not node.kwargs:
        return _is_zero_or_one(node.args[0 if kind is aten.rsub else 1])
    return kind in (aten.tril, aten.triu) and _is_zero_or_one(node.args[0]) or kind in (aten.ones, aten.ones_like)


def _kept(node: object, reduction: torch._ops.OpOverloadPacket) -> tuple[Node, int] | None:
    """(x, dim) of a reduction of x over one dim that is kept with size one."""
    dim = None
    if packet(node) is aten.unsqueeze:
        dim, node = node.args[1] % rank(node), node.args[0]
    if packet(node) is not reduction or argument(node, 3, "dtype") is not None or not isinstance(node.args[0], Node):
        return None
    dims = argument(node, 1, "dim")
    dims = [dims] if isinstance(dims, int) else list(dims or ())
    keepdim = bool(argument(node, 2, "keepdim", False))
    if len(dims) != 1 or keepdim is not (dim is None):
        return None
    over = dims[0] % rank(node.args[0])
    return (node.args[0], over) if dim in (None, over) else None


def _without_eps(node: object) -> tuple[object, float]:
    """A sum, and the small number that is added to it or below which it does not fall."""
    kind = packet(node)
    if kind is aten.add and len(node.args) == 2 and not node.kwargs and isinstance(node.args[1], (int, float)):
        return (node.args[0], float(node.args[1])) if node.args[1] >= 0 else (node, 0.0)
    if kind in (aten.clamp, aten.clamp_min) and argument(node, 2, "max") is None:
        least = argument(node, 1, "min")
        if isinstance(least, (int, float)) and least >= 0:
            return node.args[0], float(least)
    return node, 0.0


def _become_softmax(
    graph: Graph, node: Node, scores: Node, dim: int, factors: tuple[Node, ...] = (), rows: Written | None = None
) -> None:
    """Makes of `node` the softmax of `scores`, hidden where a factor is 0."""
    value = tensor(node)

    def call(target: torch._ops.OpOverload, *args: object) -> Node:
        with graph.inserting_before(node):
            made = graph.call_function(target, args)
        made.meta = dict(node.meta)
        return made

    for factor in factors:
        target, *zero = (aten.logical_not.default,) if tensor(factor).dtype == torch.bool else (aten.eq.Scalar, 0)
        hidden = call(target, factor, *zero)
        hidden.meta["val"] = target(tensor(factor), *zero)
        scores = call(aten.masked_fill.Scalar, scores, hidden, -torch.inf)
        scores.meta["val"] = value
    become(graph, node, aten.softmax.int, (scores, dim))
    if rows is not None:
        node.meta[EMPTY_ROWS] = rows


def become(graph: Graph, node: Node, target: object, args: tuple) -> None:
    """Makes of a node another call with the same value, and erases what is no longer used."""
    sources = node.all_input_nodes
    node.target, node.args, node.kwargs = target, args, {}
    for source in sources:
        if not source._erased:
            erase(graph, source)


def call(graph: Graph, before: Node, target: torch._ops.OpOverload, *args: Any, **kwargs: Any) -> Node:
    """A new node in front of another."""
    with graph.inserting_before(before):
        made = graph.call_function(target, args, kwargs)
    made.meta = {**before.meta, "val": target(*torch.fx.map_arg(args, lambda x: x.meta["val"]), **kwargs)}
    return made


def erase(graph: Graph, node: Node) -> None:
    """Takes a node out of the graph, and what was computed for it alone."""
    sources = node.all_input_nodes
    if node.users or node.op != "call_function":
        return
    graph.erase_node(node)
    for source in sources:
        if not source._erased:
            erase(graph, source)

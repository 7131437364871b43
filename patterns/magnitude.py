"""How large the values of a tensor can be: what tells a bias from a mask.

A mask that is added to the scores holds -inf or a number that swallows them, and what a query sees whose keys it hides
depends on it. A bias of ordinary numbers changes nothing about that. The bounds are those of interval arithmetic on the
captured graph. One thing is taken on trust: what a model learns, and products like the scores themselves, are of
ordinary size (below `ORDINARY`); a model in which they are not has no use for its softmax.
"""

import math
import operator
from collections.abc import Callable

import torch
from torch.fx import Node

from .layouts import LAYOUT_OPS, NO_GRAD, argument, packet
from .products import is_product

aten = torch.ops.aten

# Set in the meta of a captured input: whether it is a parameter with a gradient, and whether it has a gradient; the
# latter also of what may have one of its own.
LEARNED, REQUIRES_GRAD = "fa3_learned", "fa3_requires_grad"
# Set in the meta of inputs whose values are known: what returns their least and greatest, or None.
KNOWN_BOUNDS = "fa3_known_bounds"
ORDINARY = 1e2

Bounds = tuple[float, float]

# The values of these are values of their first argument.
_SELECTIONS = (*LAYOUT_OPS, aten.slice, aten.select, aten.index, aten.index_select, aten.gather, aten.repeat)
_SELECTIONS += (aten.repeat_interleave, aten.embedding, aten.flip, aten.roll, aten.unfold, aten.expand_as, aten.view_as)
_SELECTIONS += (aten.detach, aten.lift_fresh, aten.lift_fresh_copy, aten.broadcast_to, aten.split, aten.chunk)
_SELECTIONS += (aten.unbind, aten.take_along_dim, aten.diagonal, aten.narrow)

_CASTS = (aten._to_copy, aten.to, aten.type_as)
_NOT_NEGATIVE = (aten.exp, aten.exp2, aten.abs, aten.relu, aten.sigmoid, aten.square, aten.sqrt)

# What these make of activations is as large as the scores, which are products of such.
_LAYERS = (aten.linear, aten.conv1d, aten.conv2d, aten.convolution, aten.layer_norm, aten.rms_norm, aten.group_norm)

_FILLS = {aten.zeros: 0.0, aten.zeros_like: 0.0, aten.new_zeros: 0.0, aten.ones: 1.0, aten.ones_like: 1.0}
_FILLS |= {aten.new_ones: 1.0}
_FILL_VALUES = {aten.full: 1, aten.full_like: 1, aten.new_full: 2, aten.scalar_tensor: 0}


def bounds(node: object) -> Bounds | None:
    """(least, greatest) value of a tensor or number, up to rounding; None if there may be infinities or NaN."""
    if not isinstance(node, Node):
        is_number = isinstance(node, (int, float)) and math.isfinite(node)
        return (float(node), float(node)) if is_number else None
    if "fa3_bounds" not in node.meta:
        node.meta["fa3_bounds"] = _within(node, _bounds(node))
    return node.meta["fa3_bounds"]


def magnitude(node: Node) -> float:
    """The largest absolute value of a tensor, infinite if it is not known to be finite."""
    found = bounds(node)
    return math.inf if found is None else max(abs(found[0]), abs(found[1]))


def least(node: object) -> float:
    """What a tensor or number is never below, up to rounding, also if it may be +inf; -inf if that is not known."""
    low = _least(node)
    value = node.meta.get("val") if isinstance(node, Node) else None
    if isinstance(value, torch.Tensor) and value.is_floating_point() and 0 < low < torch.finfo(value.dtype).tiny:
        return 0.0  # as in `_within`
    return low


def _least(node: object) -> float:
    if (found := bounds(node)) is not None:
        return found[0]
    if not isinstance(node, Node) or node.op != "call_function":
        return -math.inf
    kind = packet(node)
    if kind in _SELECTIONS or kind in _CASTS:
        return least(node.args[0])
    if kind in _NOT_NEGATIVE or (kind is aten.pow and node.args[1] in (2, 4)):
        return 0.0
    if kind is aten.add and argument(node, 2, "alpha", 1) == 1:
        return least(node.args[0]) + least(node.args[1])
    if kind is aten.mul:
        low, other = map(least, node.args[:2])
        return low * other if low >= 0 and other >= 0 else -math.inf
    if kind in (aten.clamp, aten.clamp_min):
        found, low, high = least(node.args[0]), argument(node, 1, "min"), argument(node, 2, "max")
        found = found if low is None else max(found, least(low))
        return found if high is None else min(found, least(high))
    return -math.inf


def may_have_gradient(node: Node) -> bool:
    """Whether a tensor is computed from floating-point inputs of the graph."""
    seen, stack = {node}, [node]
    while stack:
        current = stack.pop()
        if current.op in ("placeholder", "get_attr"):
            value = current.meta.get("val")
            if not isinstance(value, torch.Tensor) or value.dtype.is_floating_point:
                return True
        stack += (source for source in current.all_input_nodes if source not in seen)
        seen.update(current.all_input_nodes)
    return False


def passes_gradient_on(node: Node) -> bool:
    """Whether a tensor is computed from others that have a gradient."""
    seen, stack = {node}, [node]
    while stack:
        current = stack.pop()
        value = current.meta.get("val")
        if not isinstance(value, torch.Tensor) or not (value.is_floating_point() or value.is_complex()):
            continue
        if current.meta.get(REQUIRES_GRAD):
            return True
        if current.op == "call_function" and (packet(current) is aten.detach or current.meta.get(NO_GRAD)):
            continue
        stack += (source for source in current.all_input_nodes if source not in seen)
        seen.update(current.all_input_nodes)
    return False


def _within(node: Node, found: Bounds | None) -> Bounds | None:
    """The bounds as far as they say more than the dtype; None if the dtype cannot hold them."""
    value = node.meta.get("val")
    if isinstance(value, (torch.SymInt, torch.SymBool, int)):
        return found or (-(2.0**63), 2.0**63)
    if not isinstance(value, torch.Tensor):
        return found
    if value.dtype == torch.bool:
        return 0.0, 1.0
    if not value.dtype.is_floating_point:
        limits = torch.iinfo(value.dtype)
        if found is None or found[0] < limits.min or found[1] > limits.max:  # it wraps around
            return float(limits.min), float(limits.max)
        return found
    about = torch.finfo(value.dtype)
    if found is None or found[0] < -about.max or found[1] > about.max:
        return None
    low, high = found  # what is too small is stored as zero
    return 0.0 if 0 < low < about.tiny else low, 0.0 if -about.tiny < high < 0 else high


def _bounds(node: Node) -> Bounds | None:
    if node.meta.get(LEARNED):
        return -ORDINARY, ORDINARY
    if KNOWN_BOUNDS in node.meta:
        return node.meta[KNOWN_BOUNDS]()
    if node.op != "call_function":
        return None
    if node.target is operator.getitem:
        return bounds(node.args[0])
    kind = packet(node)
    if kind in _SELECTIONS:
        return bounds(node.args[0])
    if is_product(node) or kind in _LAYERS:
        return -ORDINARY, ORDINARY
    if kind in _FILLS:
        return _FILLS[kind], _FILLS[kind]
    if kind in _FILL_VALUES:
        return bounds(node.args[_FILL_VALUES[kind]])
    rule = _RULES.get(kind)
    return rule(node) if rule is not None else None


def _union(parts: list[Bounds | None]) -> Bounds | None:
    if not parts or None in parts:
        return None
    return min(low for low, _ in parts), max(high for _, high in parts)


def _corners(function: Callable[[float, float], float]) -> Callable[[Node], Bounds | None]:
    """The bounds of a function that is monotonic in each of two arguments: among its values at the corners."""

    def rule(node: Node) -> Bounds | None:
        sides = [bounds(x) for x in node.args[:2]]
        if len(sides) < 2 or None in sides:
            return None
        try:
            values = [function(a, b) for a in sides[0] for b in sides[1]]
        except (OverflowError, ZeroDivisionError, ValueError):
            return None
        return (min(values), max(values)) if all(map(math.isfinite, values)) else None

    return rule


def _monotonic(function: Callable[[float], float]) -> Callable[[Node], Bounds | None]:
    def rule(node: Node) -> Bounds | None:
        inside = bounds(node.args[0])
        try:
            values = [function(x) for x in inside or ()]
        except (OverflowError, ZeroDivisionError, ValueError):
            return None
        return (min(values), max(values)) if values else None

    return rule


def _sum(node: Node) -> Bounds | None:
    kind = packet(node)
    a, b, factor = bounds(node.args[0]), bounds(node.args[1]), bounds(argument(node, 2, "alpha", 1))
    if a is None or b is None or factor is None or factor[0] != factor[1]:
        return None
    if kind is aten.rsub:
        a, b = b, a
    scaled = sorted(x * factor[0] * (1 if kind is aten.add else -1) for x in b)
    return a[0] + scaled[0], a[1] + scaled[1]


def _quotient(node: Node) -> Bounds | None:
    divisor = bounds(node.args[1])
    if divisor is None or divisor[0] <= 0 <= divisor[1]:
        return None
    found = _corners(operator.truediv)(node)
    # Rounded down or towards zero it moves by less than one.
    return found if found is None or node.kwargs.get("rounding_mode") is None else (found[0] - 1, found[1] + 1)


def _power(node: Node) -> Bounds | None:
    base = bounds(node.args[0])
    return _corners(operator.pow)(node) if base is not None and base[0] > 0 else None


def _reciprocal(node: Node) -> Bounds | None:
    inside = bounds(node.args[0])
    if inside is None or inside[0] <= 0 <= inside[1]:
        return None
    return 1 / inside[1], 1 / inside[0]


def _activation(node: Node) -> Bounds | None:
    """SiLU and GELU: between -1 and 0 below zero, and no larger than their argument above."""
    inside = bounds(node.args[0])
    return None if inside is None else (min(inside[0], 0.0) and -1.0, max(inside[1], 0.0))


def _absolute(node: Node) -> Bounds | None:
    inside = bounds(node.args[0])
    return None if inside is None else (0.0, max(map(abs, inside)))


def _clamped(node: Node) -> Bounds | None:
    inside, low, high = bounds(node.args[0]), argument(node, 1, "min"), argument(node, 2, "max")
    if inside is None:
        return None
    for limit, choose in ((low, max), (high, min)):
        if limit is not None:
            limits = bounds(limit)
            if limits is None:
                return None
            inside = choose(inside[0], limits[0]), choose(inside[1], limits[1])
    return inside


def _arange(node: Node) -> Bounds | None:
    ends = [bounds(x) for x in node.args[:2]]
    return _union([(0.0, 0.0), *ends] if len(ends) == 1 else ends)


_RULES: dict[object, Callable[[Node], Bounds | None]] = {
    aten._to_copy: lambda node: bounds(node.args[0]),
    aten.to: lambda node: bounds(node.args[0]),
    aten.type_as: lambda node: bounds(node.args[0]),
    aten.arange: _arange,
    aten.add: _sum,
    aten.sub: _sum,
    aten.rsub: _sum,
    aten.mul: _corners(operator.mul),
    aten.div: _quotient,
    aten.pow: _power,
    aten.reciprocal: _reciprocal,
    aten.neg: _monotonic(operator.neg),
    aten.abs: _absolute,
    aten.exp: _monotonic(math.exp),
    aten.exp2: _monotonic(lambda x: 2.0**x),
    aten.log: _monotonic(math.log),
    aten.log1p: _monotonic(math.log1p),
    aten.sqrt: _monotonic(math.sqrt),
    aten.relu: _monotonic(lambda x: max(x, 0.0)),
    aten.sign: lambda node: (-1.0, 1.0),
    aten.tanh: lambda node: bounds(node.args[0]) and (-1.0, 1.0),
    aten.sigmoid: lambda node: bounds(node.args[0]) and (0.0, 1.0),
    aten.silu: _activation,
    aten.gelu: _activation,
    aten.softmax: lambda node: bounds(node.args[0]) and (0.0, 1.0),
    aten.minimum: _corners(min),
    aten.maximum: _corners(max),
    aten.min: lambda node: _corners(min)(node) if len(node.args) == 2 and isinstance(node.args[1], Node) else None,
    aten.max: lambda node: _corners(max)(node) if len(node.args) == 2 and isinstance(node.args[1], Node) else None,
    aten.clamp: _clamped,
    aten.clamp_min: _clamped,
    aten.where: lambda node: _union([bounds(x) for x in node.args[1:3]]) if len(node.args) == 3 else None,
    aten.masked_fill: lambda node: _union([bounds(node.args[0]), bounds(node.args[2])]),
    aten.cat: lambda node: _union([bounds(x) for x in node.args[0]]),
    aten.stack: lambda node: _union([bounds(x) for x in node.args[0]]),
    aten.pad: lambda node: _union([bounds(node.args[0]), bounds(argument(node, 3, "value") or 0)]),
    aten.constant_pad_nd: lambda node: _union([bounds(node.args[0]), bounds(argument(node, 2, "value", 0))]),
}

"""A result that is rounded to float8_e4m3fn next, for a product in 8 bits, with one scale for all of it."""

import dataclasses
import math
import operator

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .layouts import argument, is_layout, packet, tensor, users_of
from .magnitude import bounds

aten = torch.ops.aten
LARGEST = 448.0  # of float8_e4m3fn
_CASTS = (aten._to_copy, aten.to, aten.type_as)


@dataclasses.dataclass(frozen=True)
class QuantisedResult:
    """``node`` is what ``moves``, layout operations, make of ``factor`` times a result, times (divided by, if True)
    every scale, rounded to float8_e4m3fn, larger numbers to the largest.

    ``between`` is every node from the result to ``node``; none has another use.
    """

    node: Node
    moves: tuple[Node, ...]
    factor: float
    scales: tuple[tuple[Node, bool], ...]
    between: tuple[Node, ...]


def read_quantised(result: Node) -> QuantisedResult | None:
    """How ``result`` is rounded to float8_e4m3fn, if that is all that becomes of it."""
    node, factor, low, high = result, 1.0, -math.inf, math.inf
    moves, scales, between = [], [], []
    while len(users := users_of(node)) == 1:
        (user,) = users
        if user.op != "call_function" or user.args[:1] != (node,):
            if packet(user) is not aten.mul or user.args[1:2] != (node,):
                return None
        between.append(user)
        if is_layout(user) and user.target is not operator.getitem:
            if not statically_known_true(tensor(user).numel() == tensor(node).numel()):
                return None  # a part of it, or it is repeated
            moves.append(user)
        elif packet(user) in _CASTS:
            if tensor(user).dtype == torch.float8_e4m3fn:
                clamped = low == -LARGEST and high == LARGEST
                return QuantisedResult(user, tuple(moves), factor, tuple(scales), tuple(between)) if clamped else None
            if not tensor(user).dtype.is_floating_point or tensor(user).dtype.itemsize == 1:
                return None
        elif packet(user) in (aten.clamp, aten.clamp_min, aten.clamp_max, aten.hardtanh):
            names = ("min", "max") if packet(user) is not aten.hardtanh else ("min_val", "max_val")
            if packet(user) is aten.clamp_max:
                least, most = None, argument(user, 1, "max")
            else:
                least, most = argument(user, 1, names[0]), argument(user, 2, names[1])
            ends = (low if least is None else _number(least)), (high if most is None else _number(most))
            if any(map(math.isnan, ends)):
                return None
            low, high = max(low, ends[0]), min(high, ends[1])
        elif packet(user) in (aten.mul, aten.div) and user.kwargs.get("rounding_mode") is None:
            if (low, high) != (-math.inf, math.inf):
                return None
            other, inverse = user.args[1 if user.args[0] is node else 0], packet(user) is aten.div
            number = _number(other)
            if math.isnan(number):
                if not _is_one_number(other) or tensor(user).shape != tensor(node).shape:
                    return None
                scales.append((other, inverse))
            elif number == 0.0 or math.isinf(number):
                return None
            else:
                factor = factor / number if inverse else factor * number
        else:
            return None
        node = user
    return None


def _number(x: object) -> float:
    """The value of a number, or of a tensor that is one and known; NaN for anything else."""
    if isinstance(x, (int, float)):
        return float(x)
    known = bounds(x) if isinstance(x, Node) and _is_one_number(x) else None
    return known[0] if known is not None and known[0] == known[1] else math.nan


def _is_one_number(x: object) -> bool:
    value = x.meta.get("val") if isinstance(x, Node) else None
    if not isinstance(value, torch.Tensor) or not value.dtype.is_floating_point:
        return False
    return all(isinstance(size, int) and size == 1 for size in value.shape)

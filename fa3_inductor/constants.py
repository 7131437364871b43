"""Graph inputs whose values are known when compiling: constants of the graph, and the model's buffers.

A causal mask often lives in a buffer. Its data is read once, recognised exactly or not at all, and what was proved from
it is guarded: the compiled code is used only while the buffer is the same tensor, never written to since. So it is with
what the values of a buffer that a bias is made of are bounded by.
"""

import dataclasses
import functools
import math
from collections.abc import MutableMapping
from typing import Any, Protocol

import sympy
import torch
from torch.fx import Node
from torch.utils.weak import WeakTensorKeyDictionary

from . import tracing
from .capture import Capture
from .patterns.algebra import FALSE, TRUE, Value, choose
from .patterns.indices import Index
from .patterns.magnitude import KNOWN_BOUNDS

# Reading a larger buffer than this while compiling would take longer than it can save.
_LARGEST = 2**31


_BOUNDED = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int32, torch.int64, torch.uint8)
_versions: MutableMapping[torch.Tensor, int] = WeakTensorKeyDictionary()


class Constants:
    """Answers :class:`Algebra`'s question for the value of a graph input."""

    def __init__(self, captured: Capture) -> None:
        self._capture = captured
        self._forms: dict[Node, _Form | None] = {}
        self._guarded: set[Node] = set()
        for node in captured.view.graph.nodes:
            if node.op in ("placeholder", "get_attr") and isinstance(node.meta.get("val"), torch.Tensor):
                node.meta[KNOWN_BOUNDS] = functools.partial(self.bounds, node)

    def value(self, node: Node, index: Index) -> Value | None:
        if node not in self._forms:
            tensor = self._tensor(node)
            self._forms[node] = None if tensor is None else _recognise(tensor)
        form = self._forms[node]
        if form is None:
            return None
        if node.op == "placeholder":
            self._guarded.add(node)
        return form.at(index)

    def bounds(self, node: Node) -> tuple[float, float] | None:
        """The least and greatest value of a graph input; None if they are not known, or not finite."""
        tensor = self._tensor(node)
        if tensor is None or tensor.dtype not in _BOUNDED:
            return None
        # What is written to between two compilations will be again, and have everything compiled each time.
        if _versions.setdefault(tensor, tensor._version) != tensor._version:
            return None
        with tracing.real_tensors():
            low, high = (float(x) for x in tensor.detach().aminmax())
        if not (math.isfinite(low) and math.isfinite(high)):
            return None
        if node.op == "placeholder":
            self._guarded.add(node)
        return low, high

    def install_guards(self) -> None:
        """Make the compiled code depend on the buffers that were read."""
        for node in self._guarded:
            tracing.guard_unchanged(self._capture.inputs[node])

    def _tensor(self, node: Node) -> torch.Tensor | None:
        if node.op == "get_attr":
            tensor = self._capture.view
            for part in node.target.split("."):
                tensor = getattr(tensor, part)
        else:
            source = self._capture.inputs.get(node)
            tensor = None if source is None else tracing.guardable_tensor(source)
        if not isinstance(tensor, torch.Tensor) or type(tensor) not in (torch.Tensor, torch.nn.Buffer):
            return None
        if tensor.is_meta or tensor.is_sparse or tensor.is_complex() or not 0 < tensor.numel() <= _LARGEST:
            return None
        return tensor


class _Form(Protocol):
    def at(self, index: Index) -> Value: ...


@dataclasses.dataclass(frozen=True)
class _Band:
    """``inside`` where low <= column - row <= high in the last two axes, ``outside`` elsewhere."""

    inside: Value
    outside: Value
    low: int | None
    high: int | None

    def at(self, index: Index) -> Value:
        column, row = index[-1], index[-2]
        conditions = []
        if self.low is not None:
            conditions.append(sympy.Ge(column - row - self.low, 0))
        if self.high is not None:
            conditions.append(sympy.Le(column - row - self.high, 0))
        return choose(sympy.And(*conditions), self.inside, self.outside)


@dataclasses.dataclass(frozen=True)
class _Constant:
    value: Value

    def at(self, index: Index) -> Value:
        return self.value


@dataclasses.dataclass(frozen=True)
class _Counting:
    """start + step * position along one axis."""

    axis: int
    start: int
    step: int

    def at(self, index: Index) -> Value:
        return sympy.expand(self.start + self.step * index[self.axis])


def _number(x: Any) -> Value:
    if isinstance(x, bool):
        return TRUE if x else FALSE
    if isinstance(x, int) or (isinstance(x, float) and x.is_integer()):
        return sympy.Integer(int(x))
    return sympy.sympify(x)


def _recognise(tensor: torch.Tensor) -> _Form | None:
    with tracing.real_tensors():
        tensor = tensor.detach()
        if tensor.is_floating_point() and bool(tensor.isnan().any()):
            return None
        first = tensor.flatten()[0]
        if bool((tensor == first).all()):
            return _Constant(_number(first.item()))
        axes = [i for i, size in enumerate(tensor.shape) if size > 1]
        if len(axes) == 1:
            return _counting(tensor, axes[0])
        if axes == [tensor.ndim - 2, tensor.ndim - 1]:
            return _band(tensor.reshape(tensor.shape[-2:]))
    return None


def _counting(tensor: torch.Tensor, axis: int) -> _Form | None:
    if tensor.is_floating_point() or tensor.dtype == torch.bool:
        return None
    line = tensor.flatten().to(torch.int64)
    steps = line.diff()
    if not bool((steps == steps[0]).all()):
        return None
    return _Counting(axis, int(line[0]), int(steps[0]))


def _band(matrix: torch.Tensor) -> _Form | None:
    """Exactly two values, one of them on a band of diagonals and the other everywhere else."""
    rows, columns = matrix.shape
    corner = matrix[0, 0]
    # Whichever of the two values has an unbroken run of diagonals is the inside.
    diagonals = torch.cat([matrix[1:, 0].flip(0), matrix[0]])
    is_corner = diagonals == corner
    other = diagonals[~is_corner]
    if other.numel() == 0 or not bool((other == other[0]).all()):
        return None
    for inside, outside, hit in ((corner, other[0], is_corner), (other[0], corner, ~is_corner)):
        where = hit.nonzero().flatten()
        low, high = int(where[0]), int(where[-1])
        if high - low + 1 != where.numel():
            continue
        difference = torch.arange(columns, device=matrix.device) - torch.arange(rows, device=matrix.device)[:, None]
        offset = rows - 1
        expected = (difference >= low - offset) & (difference <= high - offset)
        if not bool((torch.where(expected, inside, outside) == matrix).all()):
            return None
        return _Band(
            _number(inside.item()),
            _number(outside.item()),
            None if low == 0 else low - offset,
            None if high == diagonals.numel() - 1 else high - offset,
        )
    return None

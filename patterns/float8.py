"""Queries, keys and values that are float8_e4m3fn times a scale, whichever way the graph says so."""

import dataclasses
from collections.abc import Iterator

import sympy
import torch
from torch.fx import Node

from .algebra import Algebra, Opaque
from .indices import Index, broadcast_index, shape_exprs
from .layouts import is_layout, layout_step, packet, rank, tensor
from .operands import Roles, stays
from .spec import Float8, Float8Operand, Operand, Repeat

aten = torch.ops.aten
E4M3 = torch.float8_e4m3fn
_OTHERS = (torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)


@dataclasses.dataclass(frozen=True)
class _Source:
    """``operand = factor * node[index]``, times or divided by each scale at its index."""

    node: Node
    index: Index
    factor: sympy.Expr = sympy.Integer(1)
    scales: tuple[tuple[Node, Index, bool], ...] = ()


def read_float8(
    algebra: Algebra, roles: Roles, q: tuple[Node, Index], k: tuple[Node, Index], v: tuple[Node, Index],
    scale: sympy.Expr,
) -> tuple[Float8 | None, str]:  # fmt: skip
    """The 8-bit tensors that q, k and v are dequantised from, and their scales, which may differ by all but head_dim.

    Returns:
        None where they are not all such tensors; then a sentence says why not, if one of them is.
    """
    axes = {"q": (roles.q, roles.e), "k": (roles.k, roles.e), "v": (roles.k, roles.d)}
    found, why = {}, {}
    for name, start in zip("qkv", (q, k, v)):
        sources = list(_sources(algebra, _Source(*start)))
        if not sources:
            why[name] = f"{name} is {_name(tensor(start[0]).dtype)}"
        elif (dtype := tensor(sources[0].node).dtype) != E4M3:
            why[name] = f"{name} is {_name(dtype)}"
            found[name] = None
        else:
            found[name] = _arranged(roles, sources, *axes[name])
            if found[name] is None:
                why[name] = f"{name}'s scale differs along head_dim, or its axes are of another order"
    if not found:
        return None, ""
    if why:
        return None, "not on the FP8 kernel: " + "; ".join(why.values())
    heads = {"q": sympy.Mul(*[size for _, size in roles.heads])}
    heads["k"] = heads["v"] = roles.heads_of(found["k"].operand)
    for name, x in found.items():
        if roles.heads_of(x.operand) != heads[name] or any(
            roles.heads_of(s) not in (1, heads[name]) for s, _ in x.scales
        ):
            return None, f"not on the FP8 kernel: the heads of {name}, of its scale and of k differ"
    return Float8(**found, scale=scale), ""


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _sources(algebra: Algebra, source: _Source) -> Iterator[_Source]:
    """The 8-bit tensors that one is computed from by casts, layout and scales: the last view of it first."""
    node, index = source.node, source.index
    dtype = tensor(node).dtype
    if dtype == E4M3 or dtype in _OTHERS:
        yield source
    step = layout_step(algebra.space, node, index)
    if step is not None:
        yield from _sources(algebra, dataclasses.replace(source, node=step[0], index=step[1]))
    elif packet(node) in (aten._to_copy, aten.to) and tensor(node.args[0]).dtype.is_floating_point:
        # What an 8-bit number becomes is exact; a wider one was rounded here, which the kernel does without.
        if dtype != E4M3 and dtype not in _OTHERS and stays(node):
            yield from _sources(algebra, dataclasses.replace(source, node=node.args[0]))
    elif packet(node) in (aten.mul, aten.div) and node.kwargs.get("rounding_mode") is None:
        inverse = packet(node) is aten.div
        for data, scale in (node.args[:2],) if inverse else (node.args[:2], node.args[1::-1]):
            if not _is_of_8_bits(data):
                continue
            at = broadcast_index(index, shape_exprs(tensor(data)))
            scaled = _with_scale(algebra, source, scale, index, inverse)
            below = [] if scaled is None else list(_sources(algebra, dataclasses.replace(scaled, node=data, index=at)))
            if below:
                yield from below
                return


def _is_of_8_bits(node: object) -> bool:
    """Whether `_sources` could find anything: it would try both factors of every product."""
    pending, seen = [node], set()
    while pending:
        node = pending.pop()
        if not isinstance(node, Node) or node in seen or not isinstance(node.meta.get("val"), torch.Tensor):
            continue
        seen.add(node)
        if tensor(node).dtype in (E4M3, *_OTHERS):
            return True
        if packet(node) in (aten.mul, aten.div):
            pending += node.args[:2]
        elif is_layout(node) or packet(node) in (aten._to_copy, aten.to):
            pending.append(node.args[0])
    return False


def _with_scale(algebra: Algebra, source: _Source, scale: object, index: Index, inverse: bool) -> _Source | None:
    if isinstance(scale, Node) and isinstance(scale.meta.get("val"), torch.Tensor):
        value = algebra.value(scale, ()) if rank(scale) == 0 else None
        if value is None or not isinstance(value, sympy.Expr) or value.has(Opaque) or not value.is_number:
            if not tensor(scale).dtype.is_floating_point or tensor(scale).dtype.itemsize == 1:
                return None
            at = broadcast_index(index, shape_exprs(tensor(scale)))
            return dataclasses.replace(source, scales=(*source.scales, (scale, at, inverse)))
    else:
        value = algebra.value(scale, ())
    if not isinstance(value, sympy.Expr) or value.has(Opaque) or not value.is_number or value.is_zero:
        return None
    return dataclasses.replace(source, factor=source.factor / value if inverse else source.factor * value)


def _arranged(roles: Roles, sources: list[_Source], row: sympy.Expr, column: sympy.Expr) -> Float8Operand | None:
    """The innermost of them whose axes are those of an attention, if its scales have none of head_dim."""
    for source in reversed(sources):
        operand = roles.whole(source.node, source.index, row, column)
        scales = [(_of_rows(roles, node, index, row, column), inverse) for node, index, inverse in source.scales]
        in_range = 1e-30 < abs(float(source.factor)) < 1e30
        if operand is not None and all(scale is not None for scale, _ in scales) and in_range:
            return Float8Operand(operand, tuple(scales), float(source.factor))
    return None


def _of_rows(roles: Roles, node: Node, index: Index, row: sympy.Expr, column: sympy.Expr) -> Operand | None:
    """A scale as an operand without head_dim; one for each n rows is repeated n times."""
    shape = shape_exprs(tensor(node))
    for axis, (entry, size) in enumerate(zip(index, shape, strict=True)):
        if isinstance(entry, sympy.floor) and row in entry.free_symbols:
            block = sympy.cancel(row / entry.args[0])
            if not block.is_Integer or sympy.expand(block * size - roles.space.size(row)) != 0:
                return None
            per_head = _of_rows(roles, node, (*index[:axis], sympy.Integer(0), *index[axis + 1 :]), row, column)
            if per_head is None or per_head.shape is not None or per_head.groups[2]:
                return None
            return dataclasses.replace(per_head, groups=(*per_head.groups[:2], (axis, Repeat(block)), ()))
    operand = roles.group(node, index, row, column)
    return operand if operand is not None and not operand.groups[3] else None

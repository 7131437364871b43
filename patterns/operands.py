"""Query, key and value: which tensors of the graph they are, and which of their axes is which."""

import dataclasses

import sympy
import torch
from torch.fx import Node

from .algebra import Algebra, Opaque
from .indices import ONE, ZERO, Index, Space, broadcast_index, shape_exprs
from .layouts import LAYOUT_OPS, NO_GRAD, layout_step, packet, rank, tensor, users_of
from .masks import Axes
from .reasons import Reason
from .spec import Operand, Rejected, Repeat

aten = torch.ops.aten

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A tensor that an operand can be taken from: ``operand = factor * node[index]``."""

    node: Node
    index: Index
    factor: sympy.Expr


def peel(algebra: Algebra, node: Node, index: Index, scales: bool = True) -> list[Candidate]:
    """The operand itself, then what it is a view, an exact cast or a multiple of, outwards in."""
    found = [Candidate(node, index, sympy.Integer(1))]
    factor: sympy.Expr = sympy.Integer(1)
    while True:
        step = layout_step(algebra.space, node, index)
        if node.meta.get(NO_GRAD):
            return found
        if step is not None:
            node, index = step
        elif packet(node) in (aten._to_copy, aten.to) and widens(node) and stays(node):
            node = node.args[0]
        elif scales and packet(node) in (aten.mul, aten.div) and _is_scaled(algebra, node):
            tensor_side = next(x for x in node.args[:2] if isinstance(x, Node) and rank(x) > 0)
            number = node.args[1] if tensor_side is node.args[0] else node.args[0]
            value = algebra.value(number, ())
            factor = factor * value if packet(node) is aten.mul else factor / value
            index = broadcast_index(index, shape_exprs(tensor(tensor_side)))
            node = tensor_side
        else:
            return found
        found.append(Candidate(node, index, factor))


def widens(node: Node) -> bool:
    source, target = tensor(node.args[0]).dtype, tensor(node).dtype
    narrow = source in (torch.bfloat16, torch.float16) and target in (torch.float32, source)
    return source == target or narrow


def stays(node: Node) -> bool:
    """Whether a copy is on the device of what it is a copy of."""
    return tensor(node.args[0]).device == tensor(node).device


def _is_scaled(algebra: Algebra, node: Node) -> bool:
    """Whether a mul or div is a tensor times one finite number, in the tensor's own dtype and shape."""
    sides = [
        x for x in node.args[:2] if isinstance(x, Node) and isinstance(x.meta.get("val"), torch.Tensor) and rank(x) > 0
    ]
    if len(sides) != 1 or node.kwargs.get("rounding_mode") is not None:
        return False
    if packet(node) is aten.div and sides[0] is not node.args[0]:
        return False
    number = node.args[1] if sides[0] is node.args[0] else node.args[0]
    value = algebra.value(number, ())
    known = (
        isinstance(value, sympy.Expr) and not value.has(Opaque) and not value.is_zero and value.is_finite is not False
    )
    return known and tensor(sides[0]).dtype == tensor(node).dtype


@dataclasses.dataclass(frozen=True)
class _Digit:
    """An axis at ``position`` that runs over (index // stride) % size of a row or column index."""

    position: int
    stride: sympy.Integer
    size: sympy.Integer


def _digit(entry: sympy.Expr, size: sympy.Expr, position: int) -> _Digit | None:
    """The digit of its one symbol that ``entry`` is, if all of an axis of ``size`` runs over it."""
    stride: sympy.Expr = ONE
    inside, extent = (entry.args[0], entry.args[1]) if isinstance(entry, sympy.Mod) else (entry, size)
    while isinstance(inside, sympy.floor):
        part, inside = inside.args[0].as_coeff_Mul()
        stride = stride / part
    whole = isinstance(inside, sympy.Symbol) and entry != inside
    return (
        _Digit(position, stride, size) if whole and stride.is_Integer and size.is_Integer and extent == size else None
    )


@dataclasses.dataclass(frozen=True)
class Roles:
    """Which index symbol plays which canonical axis."""

    space: Space
    batch: tuple[tuple[str, sympy.Expr], ...]
    heads: tuple[tuple[str, sympy.Expr], ...]
    q: sympy.Expr
    k: sympy.Expr
    d: sympy.Expr  # head dim of the value
    e: sympy.Expr  # contracted head dim of query and key
    head_dim: sympy.Expr
    head_dim_v: sympy.Expr

    @staticmethod
    def of(
        space: Space,
        names: list[str],
        sizes: dict[str, sympy.Expr],
        axes: Axes,
        d_name: str,
        e: sympy.Expr,
        head_dim: sympy.Expr,
        head_dim_v: sympy.Expr,
    ) -> "Roles":
        named = [(n, sizes[n]) for n in names]
        d = space.symbol(d_name, head_dim_v)
        return Roles(space, tuple(named[:1]), tuple(named[1:]), axes.q, axes.k, d, e, head_dim, head_dim_v)

    def group(
        self, node: Node, index: Index, row: sympy.Expr, column: sympy.Expr, repeats: bool = False
    ) -> Operand | None:
        """``node`` read at ``index`` as canonical axes (batch, heads, row, column), whole ones; else None.

        With ``repeats``, axes of the batch and of the heads that it lacks beside others that it has are repeated, and
        so is what it lacks of a row or a column that it has a part of: (position // 5) or (position % 5), say.
        """
        positions: dict[sympy.Expr, int] = {}
        digits: dict[sympy.Expr, list[_Digit]] = {}
        grouped: tuple[int, ...] | None = None
        shape = shape_exprs(tensor(node))
        axes = [part for axis in zip(index, shape, strict=True) for part in self._parts(*axis)]
        places: list[tuple[int, int]] = []
        for position, (entry, size) in enumerate(axes):
            if entry == 0:
                continue
            if entry.is_Integer and len(axes) > len(shape):  # of the heads that are one axis, every second, say
                places.append((position, int(entry)))
                continue
            digit = _digit(entry, size, position) if repeats and entry.free_symbols <= {row, column} else None
            if digit is not None:
                digits.setdefault(*entry.free_symbols, []).append(digit)
                continue
            if entry in positions or not self._is_whole(entry, size):
                return None
            positions[entry] = position
        batch = self._axis(positions, self.batch, repeats)
        heads = self._axis(positions, self.heads, repeats)
        if heads is None and len(self.heads) == 1:
            grouped = self._grouped(positions)
            heads = grouped
        rows, columns = (self._single(positions, x, digits.pop(x, [])) for x in (row, column))
        if batch is None or heads is None or rows is None or columns is None or positions:
            return None
        view = tuple(size for _, size in axes)
        return Operand(node, (batch, heads, rows, columns), None if len(view) == len(shape) else view, tuple(places))

    def whole(self, node: Node, index: Index, row: sympy.Expr, column: sympy.Expr) -> Operand | None:
        """`group`, if ``node`` has the row and the column axis, and is not the same all along one."""
        operand = self.group(node, index, row, column)
        has_both = operand is not None and all(
            group or axis == 0 for group, axis in zip(operand.groups[2:], (row, column), strict=True)
        )
        return operand if has_both else None

    def _parts(self, entry: sympy.Expr, size: sympy.Expr) -> list[tuple[sympy.Expr, sympy.Expr]]:
        """The (index, size) of each batch and head axis that an axis is made of, if of several whole ones.

        Or of one, and of a position among those that an axis of numbers is cut into.
        """
        named = [(self.space.symbol(n, s), s) for n, s in (*self.batch, *self.heads) if s not in (0, 1)]
        for symbol, extent in named:
            step, place = entry.coeff(symbol, 1), entry.coeff(symbol, 0)
            if not (step.is_Integer and place.is_Integer and place >= 0 and entry == step * symbol + place):
                continue
            if 1 < step > place and sympy.expand(step * extent - size) == 0:
                return [(symbol, extent), (place, step)]
            if step == 1 and extent.is_Integer and size.is_Integer and size > extent and size % extent == 0:
                number, rest = divmod(place, extent)
                if rest == 0:
                    return [(number, size / extent), (symbol, extent)]
        for start in range(len(named)):
            linear, count = ZERO, ONE
            for stop in range(start, len(named)):
                symbol, extent = named[stop]
                linear, count = linear * extent + symbol, count * extent
                if stop > start and sympy.expand(linear - entry) == 0 and sympy.expand(count - size) == 0:
                    return named[start : stop + 1]
        return [(entry, size)]

    def _is_whole(self, entry: sympy.Expr, size: sympy.Expr) -> bool:
        """Whether an index runs over all of an axis: a longer one is a slice of it."""
        if isinstance(entry, sympy.Symbol):
            return self.space.size(entry) == size
        bounds = self.space.bounds(entry.args[0]) if isinstance(entry, sympy.floor) else None
        return bounds is not None and sympy.floor(bounds[1]) == size - 1

    def _single(
        self, positions: dict[sympy.Expr, int], symbol: sympy.Expr, digits: "list[_Digit]"
    ) -> tuple[int | Repeat, ...] | None:
        """The axis of a row or column, or those of its digits, the most significant first, and of what is between."""
        if not digits:
            return (positions.pop(symbol),) if symbol != 0 and symbol in positions else ()
        found: list[int | Repeat] = []
        span = self.space.size(symbol)
        for digit in sorted(digits, key=lambda x: -x.stride):
            missing = span / (digit.stride * digit.size)
            if not missing.is_Integer:
                return None
            found += [Repeat(missing)] * (missing != 1) + [digit.position]
            span = digit.stride
        return (*found, Repeat(span)) if span != 1 else tuple(found)

    def _axis(
        self, positions: dict[sympy.Expr, int], axis: tuple[tuple[str, sympy.Expr], ...], repeats: bool
    ) -> tuple[int | Repeat, ...] | None:
        """Positions of the symbols of one canonical axis: all of them, a leading part (grouped), or none."""
        symbols = [self.space.symbol(n, size) for n, size in axis]
        symbols = [s for s in symbols if s != 0]
        present = [s in positions for s in symbols]
        count = sum(present)
        if repeats and 0 < count < len(symbols):
            return tuple(positions.pop(s) if s in positions else Repeat(self.space.size(s)) for s in symbols)
        if any(present[count:]):
            return None
        if count == 0 and symbols and any(e.free_symbols & {s for s in symbols} for e in positions):
            return None
        return tuple(positions.pop(s) for s in symbols[:count])

    def _grouped(self, positions: dict[sympy.Expr, int]) -> tuple[int, ...] | None:
        """``h // group`` as the head index."""
        name, size = self.heads[0]
        h = self.space.symbol(name, size)
        for entry in list(positions):
            if isinstance(entry, sympy.floor) and entry.free_symbols & h.free_symbols:
                group = sympy.cancel(h / entry.args[0])
                if not group.free_symbols & h.free_symbols and group.is_integer:
                    return (positions.pop(entry),)
        return None

    def heads_of(self, operand: Operand) -> sympy.Expr:
        shape = operand.shape or shape_exprs(tensor(operand.node))
        return sympy.Mul(*[i.size if isinstance(i, Repeat) else shape[i] for i in operand.groups[1]])


def choose_operands(
    roles: Roles, q: list[Candidate], k: list[Candidate], v: list[Candidate], out_dtype: torch.dtype, product: Node
) -> tuple[tuple[Operand, Operand, Operand], sympy.Expr]:
    """The innermost tensors that are arranged as one attention's q, k and v and share a dtype that loses nothing."""

    def arranged(candidates: list[Candidate], row: sympy.Expr, column: sympy.Expr) -> list[tuple[Candidate, Operand]]:
        pairs = ((c, roles.whole(c.node, c.index, row, column)) for c in candidates)
        return [(c, o) for c, o in pairs if o is not None]

    qs = [x for x in arranged(q, roles.q, roles.e) if _spans(roles, x[1])]
    ks, vs = arranged(k, roles.k, roles.e), arranged(v, roles.k, roles.d)
    dtypes = [d for d in (torch.float16, torch.bfloat16, torch.float32) if _keeps(d, out_dtype, product)]
    seen = {tensor(c.node).dtype for x in (q, k, v) for c in x[:1]}
    for dtype in dtypes:
        by_dtype = [[x for x in xs if tensor(x[0].node).dtype == dtype] for xs in (qs, ks, vs)]
        if not all(by_dtype):
            continue
        chosen_q = by_dtype[0][-1]
        pairs = [(x, y) for x in reversed(by_dtype[1]) for y in reversed(by_dtype[2])]
        heads = {(x, y): (roles.heads_of(x[1]), roles.heads_of(y[1])) for x, y in pairs}
        same = [pair for pair in pairs if heads[pair][0] == heads[pair][1]]
        of_one = [pair for pair in pairs if ONE in heads[pair] and all(n.is_number for n in heads[pair])]
        for chosen_k, chosen_v in (same or of_one)[:1]:
            count = max(heads[chosen_k, chosen_v])
            chosen = (chosen_q[1], _of_heads(roles, chosen_k[1], count), _of_heads(roles, chosen_v[1], count))
            return chosen, chosen_q[0].factor * chosen_k[0].factor
    if not (qs and ks and vs):
        missing = [n for n, x in (("q", qs), ("k", ks), ("v", vs)) if not x]
        raise Rejected(Reason.LAYOUT, f"the axes of {', '.join(missing)} are not those of an attention")
    if seen - set(_FLOATS) or len(seen) > 1 or not dtypes:
        raise Rejected(Reason.DTYPE, "seen: " + ", ".join(sorted(str(d).removeprefix("torch.") for d in seen)))
    raise Rejected(Reason.LAYOUT, "k and v have different head counts")


def _of_heads(roles: Roles, operand: Operand, count: sympy.Expr) -> Operand:
    """The operand, with its one head in place of every one of ``count``."""
    if roles.heads_of(operand) == count:
        return operand
    batch, _, *rest = operand.groups
    return dataclasses.replace(operand, groups=(batch, (Repeat(count),), *rest))


def _spans(roles: Roles, operand: Operand) -> bool:
    """The query has every head (its batch axis may be broadcast), and not one for a group of them."""
    if len(operand.groups[1]) != len([1 for n, s in roles.heads if s != 1]):
        return False
    return sympy.expand(roles.heads_of(operand) - sympy.Mul(*[s for _, s in roles.heads])) == 0


def _keeps(dtype: torch.dtype, out_dtype: torch.dtype, product: Node) -> bool:
    """Whether computing with operands of ``dtype`` loses nothing that the user's result has."""
    if dtype.itemsize >= out_dtype.itemsize:
        return dtype.itemsize > out_dtype.itemsize or dtype == out_dtype
    return all(_narrowed_to(u, dtype) for u in users_of(product))


def _narrowed_to(user: Node, dtype: torch.dtype) -> bool:
    if packet(user) in (aten._to_copy, aten.to, aten.type_as):
        return tensor(user).dtype == dtype
    if packet(user) in LAYOUT_OPS:
        return bool(users_of(user)) and all(_narrowed_to(u, dtype) for u in users_of(user))
    return False


def side_operand(space: Space, node: Node, index: Index, roles: Roles) -> Operand:
    """A mask or bias as a tensor that broadcasts to [B, H, Sq, Sk]."""
    found = None
    step: tuple[Node, Index] | None = (node, index)
    while step is not None:
        operand = roles.group(*step, roles.q, roles.k, repeats=True)
        if operand is not None and len(operand.groups[1]) in (0, len([1 for _, s in roles.heads if s != 1])):
            if not any(isinstance(e, sympy.floor) and not e.free_symbols <= {roles.q, roles.k} for e in step[1]):
                found = operand
        step = None if step[0].meta.get(NO_GRAD) else layout_step(space, *step)
    if found is None:
        raise Rejected(
            Reason.LAYOUT, f"the axes of '{node.name}', applied to the scores, are not those of an attention"
        )
    return found


def key_operand(node: Node, index: Index, roles: Roles, kv_heads: sympy.Expr) -> Operand:
    """What every key or value is multiplied by, as a tensor that broadcasts to [B, Hkv, Sk, 1]."""
    operand = roles.group(node, index, roles.k, ZERO)
    if operand is None or roles.heads_of(operand) not in (1, kv_heads):
        raise Rejected(
            Reason.WEIGHTS_OP, f"they are multiplied by '{node.name}', which is no number for each query or each key"
        )
    return operand

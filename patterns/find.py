"""Finding attention: anchored at softmax and at scaled_dot_product_attention, walked outwards to q, k and v."""

import dataclasses
import functools
import logging
import operator
from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch.fx import Graph, Node

from .algebra import Algebra, Opaque, is_condition, leaves, to_boolean
from .assigned import sum_up_assignments
from .blocks import join_blocks
from .float8 import read_float8
from .formulas import formula_of_score
from .indices import ONE, ZERO, Index, Space, broadcast_index, shape_exprs, size_expr
from .layouts import LAYOUT_OPS, argument, layout_step, packet, rank, tensor, users_of
from .masks import FULL, Axes, Mask, describe, no_row_is_empty
from .operands import Roles, choose_operands, key_operand, peel, side_operand
from .products import as_product, is_product
from .quantised import read_quantised
from .reasons import Reason
from .respelled import respell
from .scores import Added, Factor, Function, Hidden, NotScores, Scores, read_scores, visible_where
from .spec import AttentionSpec, Empty, LogSumExp, Rejected, Term, TermKind, Weighing, Weighs
from .terms import empty_beside_sink, hides_by_infinity, read_sink, read_terms
from .written import EMPTY_ROWS, Written, put_together

aten = torch.ops.aten
log = logging.getLogger(__name__)

_SOFTMAX = (aten.softmax, aten._softmax, aten._safe_softmax)
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclasses.dataclass(frozen=True)
class Found:
    """An attention that was found: ``spec`` if it can be fused, else ``rejection``.

    ``interior`` are the captured nodes that are its own, result included, and fusing makes no use of; ``leaks`` says
    where others read them. Only other attentions may, and by their scores: of these there is no need then either.
    """

    anchor: Node
    spec: AttentionSpec | None
    rejection: Rejected | None = None
    interior: tuple[Node, ...] = ()
    leaks: tuple["_Leak", ...] = ()


@dataclasses.dataclass(frozen=True)
class _Leak:
    """``node``, a score or a weight, is read by ``user``, which does not belong to the attention."""

    node: Node
    user: Node
    reason: Reason


def find_attention(graph: Graph, algebra: Algebra) -> list[Found]:
    """Every attention in a captured graph, in graph order. A softmax that is no attention is passed over."""
    respell(graph, functools.partial(_is_zero, algebra))
    join_blocks(graph)
    sum_up_assignments(graph, algebra.space)
    put_together(graph)
    while True:
        try:
            found = _read_all(graph, algebra)
        except _Specialised:
            algebra.forget()
        else:
            return _without_leaks(found)


def _read_all(graph: Graph, algebra: Algebra) -> list[Found]:
    found: list[Found] = []
    sums: dict[Node, list[tuple[Node, _Weights]]] = {}  # product -> softmaxes whose weights are added up for it
    for node in graph.nodes:
        if packet(node) is aten.scaled_dot_product_attention:
            found += _guarded(node, lambda node: [_read_sdpa(algebra, node)])
        elif packet(node) in _SOFTMAX:
            for x in _guarded(node, functools.partial(_ways_down, algebra)):
                if isinstance(x, Found):
                    found.append(x)
                elif x.is_sum:
                    sums.setdefault(x.product, []).append((node, x))
                else:
                    found += _guarded(node, functools.partial(_read_weights, algebra, weights=x))
    for ways in sums.values():
        found += _guarded(ways[0][0], lambda _, ways=ways: [_read_sum(algebra, ways)])
    order = {node: position for position, node in enumerate(graph.nodes)}
    return sorted(found, key=lambda x: order[x.anchor])


def _guarded(node: Node, read: Callable[[Node], list]) -> list:
    try:
        return read(node)
    except Rejected as rejection:
        return [Found(node, None, rejection)]
    except _Specialised:
        raise
    except Exception as error:
        log.warning("'%s' was not understood: %s", node.name, error, exc_info=True)
        return [Found(node, None, Rejected(Reason.INTERNAL, f"{type(error).__name__}: {error}"))]


def _without_leaks(found: list[Found]) -> list[Found]:
    """Rejects whose scores something else than the scores of the remaining ones needs.

    (One of these may turn out to have no kernel. The others are right nevertheless, its scores exist then.)
    """
    while True:
        inside = {node for x in found if x.spec is not None for node in x.interior}
        checked = [x if x.spec is None else _checked(x, inside) for x in found]
        if checked == found:
            return found
        found = checked


def _checked(found: Found, inside: set[Node]) -> Found:
    for leak in found.leaks:
        if leak.user not in inside:
            what = "returned" if leak.user.op == "output" else f"used by '{leak.user.name}' ({leak.user.target})"
            return Found(found.anchor, None, Rejected(leak.reason, f"'{leak.node.name}' is {what}"))
    return found


class _Specialised(Exception):
    """A symbolic size was made static, so what was read before is out of date."""


def _static_head_dim(size: int | torch.SymInt) -> sympy.Expr:
    """The head dim, which kernels and scales need as a number: a symbolic one is guarded to be what it is now."""
    expr = size_expr(size)
    if expr.is_number:
        return expr
    known = int(size)
    if size_expr(size).is_number:
        raise _Specialised
    return sympy.Integer(known)  # of several symbols, none of which is settled by that


# --------------------------------------------------------------------------------------------- softmax


@dataclasses.dataclass(frozen=True)
class _Weights:
    """One way from a softmax down to the product with v."""

    product: Node
    operand: int
    nodes: tuple[Node, ...]  # from the softmax to the product's operand
    dropout_p: float
    words: tuple[str, ...]

    @property
    def is_sum(self) -> bool:
        """Whether they are added to other ones on the way."""
        return any(packet(node) in _SUMS for node in self.nodes)


def _walk_down(algebra: Algebra, softmax: Node) -> list[_Weights]:
    """From the softmax through casts, dropout, layout and sums to products. If none follows, it is no attention."""
    keeps_weights = functools.partial(_keeps_weights, algebra)
    others: list[Node] = []
    found: list[_Weights] = []
    pending: list[tuple[Node, ...]] = [(softmax,)]
    while pending:
        *_, node = nodes = pending.pop(0)
        users = users_of(node)
        onward = [u for u in users if _leads_to_product(u, node, keeps_weights)]
        if not onward:
            for u in users:
                if _leads_to_product(u, node, _keeps_shape):
                    what = "a detach or a hook" if packet(u) is aten.detach else str(u.target)
                    raise Rejected(Reason.WEIGHTS_OP, f"'{u.name}' ({what})")
            return []
        others += [u for u in users if u not in onward]
        for user in onward:
            if not is_product(user):
                pending.append((*nodes, user))
                continue
            operands = _product_operands(user)
            if sum(x is node for x in operands) != 1:
                raise Rejected(Reason.LAYOUT, f"'{user.name}' multiplies the weights with themselves")
            found.append(_Weights(user, list(operands).index(node), nodes, *_dropout_and_words(nodes)))
        if len(pending) + len(found) > _MOST_WAYS:
            raise Rejected(Reason.WEIGHTS_USED, f"there are more than {_MOST_WAYS} ways to products")
    if others:
        what = (
            "returned" if any(u.op == "output" for u in others) else f"used by '{others[0].name}' ({others[0].target})"
        )
        raise Rejected(Reason.WEIGHTS_USED, f"they are {what}")
    if len(found) > 1 and any(x.dropout_p for x in found):
        raise Rejected(Reason.WEIGHTS_USED, f"they are used by '{found[1].product.name}' too, dropped out alike")
    return found


_MOST_WAYS = 8


def _dropout_and_words(nodes: tuple[Node, ...]) -> tuple[float, tuple[str, ...]]:
    """The dropout on the way from a softmax, and what to say of it."""
    dropout_p, words = 0.0, []
    for node in nodes:
        if packet(node) in (aten.dropout, aten.native_dropout):
            p, training = node.args[1], argument(node, 2, "train", True)
            if isinstance(p, Node):
                raise Rejected(Reason.WEIGHTS_OP, "the dropout probability is not known when compiling")
            if training and p and dropout_p:
                raise Rejected(Reason.WEIGHTS_OP, "they are dropped out twice")
            if training and p:
                dropout_p = p
                words.append("dropout")
        elif packet(node) is aten.nan_to_num:
            words.append("nan_to_num")
    return dropout_p, tuple(words)


def _product_operands(node: Node) -> tuple[Node, ...]:
    if packet(node) is aten.einsum:
        return tuple(node.args[1])
    return tuple(node.args[1:3] if packet(node) in (aten.baddbmm, aten.addmm) else node.args[:2])


def _leads_to_product(user: Node, source: Node, passes: Callable[[Node], bool], depth: int = 8) -> bool:
    if user.op != "call_function":
        return False
    if is_product(user):
        return any(x is source for x in _product_operands(user))
    return depth > 0 and passes(user) and any(_leads_to_product(u, user, passes, depth - 1) for u in users_of(user))


def _keeps_shape(node: Node) -> bool:
    """Whether a node could still be attention weights, changed in some way."""
    value = node.meta.get("val")
    shapes = [tensor(x).shape for x in node.all_input_nodes if isinstance(x.meta.get("val"), torch.Tensor)]
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.shape in shapes


_WEIGHT_OPS = (aten._to_copy, aten.to, aten.type_as, aten.dropout, aten.slice, aten.select)
_WEIGHT_OPS += (aten.unbind, aten.split, aten.split_with_sizes, aten.chunk, aten.tensor_split)


_WEIGHING = (aten.masked_fill, aten.where, aten.mul, aten.div)
_SUMS = (aten.add, aten.sub)


def _keeps_weights(algebra: Algebra, node: Node) -> bool:
    if packet(node) in (aten._to_copy, aten.to, aten.type_as):
        return tensor(node).dtype.is_floating_point
    if packet(node) is aten.nan_to_num:
        return not argument(node, 1, "nan")
    if packet(node) in _WEIGHING[:2]:
        return _zeroing(algebra, node) is not None
    if packet(node) in _WEIGHING[2:]:
        return node.args[0] is not node.args[1] and node.kwargs.get("rounding_mode") is None
    if packet(node) in _SUMS:
        return argument(node, 2, "alpha", 1) == 1 and all(_is_alike(x, node) for x in node.args[:2])
    return node.target is operator.getitem or packet(node) in _WEIGHT_OPS + LAYOUT_OPS


def _is_alike(x: Any, node: Node) -> bool:
    return isinstance(x, Node) and isinstance(x.meta.get("val"), torch.Tensor) and tensor(x).shape == tensor(node).shape


def _zeroing(algebra: Algebra, node: Node) -> tuple[Node, bool] | None:
    """The condition under which (True), or but under which (False), a node puts zeros in place of what it is given."""
    if packet(node) is aten.masked_fill:
        return (node.args[1], True) if algebra.value(node.args[2], ()) == 0 else None
    if len(node.args) != 3:
        return None
    zeros = [_is_zero(algebra, x) for x in node.args[1:]]
    return (node.args[0], zeros[0]) if any(zeros) else None


def _is_zero(algebra: Algebra, x: Any) -> bool:
    sizes = shape_exprs(tensor(x)) if isinstance(x, Node) and isinstance(x.meta.get("val"), torch.Tensor) else ()
    return algebra.value(x, tuple(algebra.space.symbol(f"z{i}", size) for i, size in enumerate(sizes))) == 0


def _ways_down(algebra: Algebra, softmax: Node) -> list[_Weights]:
    return _walk_down(algebra, softmax) if _has_scores(algebra, softmax) else []


def _read_sum(algebra: Algebra, ways: list[tuple[Node, _Weights]]) -> Found:
    """A product with weights that are sums of softmaxes: the sum of as many attentions."""
    summands = {node for _, weights in ways for node in weights.nodes}
    for node in summands:
        for x in node.args[:2] if packet(node) in _SUMS else ():
            if x not in summands:
                raise Rejected(Reason.WEIGHTS_OP, f"'{node.name}' ({node.target}) adds '{x.name}' to them")
    if any(weights.dropout_p for _, weights in ways):
        raise Rejected(Reason.WEIGHTS_OP, "they are added up, and dropped out alike")
    if any(packet(node) in (aten.masked_fill, aten.where, aten.nan_to_num) for node in summands):
        raise Rejected(Reason.WEIGHTS_OP, "they are added up, and some are replaced")
    parts = [x for softmax, weights in ways for x in _read_weights(algebra, softmax, weights)]
    first, *others = (x.spec for x in parts)
    if any(spec.lse for spec in (first, *others)):
        raise Rejected(Reason.SCORES_USED, "the log-sum-exp of some that are added up")
    spec = dataclasses.replace(first, form=f"{first.form} · sum of {len(parts)}", plus=tuple(others))
    interior = tuple(dict.fromkeys(node for x in parts for node in x.interior))
    leaks = tuple(leak for x in parts for leak in x.leaks if leak.user not in interior)
    return Found(first.anchor, spec, None, interior, leaks)


def _read_weights(algebra: Algebra, softmax: Node, weights: _Weights) -> list[Found]:
    space = algebra.space
    dim = argument(softmax, 1, "dim") % rank(softmax)
    reading = _Reading(algebra, softmax, weights, dim)
    plain = [(f"o{i}",) for i in range(rank(weights.product))]
    first = reading.at(plain, "c")
    splits = _splits(space, first)
    names = reading.name_axes(first, splits)
    final = reading.at(names, "k")
    return [reading.found(final, names)]


def _has_scores(algebra: Algebra, softmax: Node) -> bool:
    """Whether the softmax has a product of two tensors behind it, whatever else is in the way."""
    space = algebra.space
    index = tuple(space.symbol(f"s{i}", s) for i, s in enumerate(shape_exprs(tensor(softmax))))
    try:
        read_scores(algebra, softmax.args[0], index)
    except NotScores as failure:
        return failure.reason is not Reason.NO_PRODUCT
    return True


@dataclasses.dataclass(frozen=True)
class _Zeroed:
    """The weights are overwritten by zero where a condition holds, or where it does not."""

    node: Node
    index: Index
    hides: bool


@dataclasses.dataclass(frozen=True)
class _View:
    """One reading of a site at one choice of index symbols for the result."""

    result_index: Index
    k: sympy.Expr
    at: Index  # of the softmax
    scores: Scores
    q_node: Node
    q_index: Index
    k_node: Node
    k_index: Index
    v_node: Node
    v_index: Index
    query_row: sympy.Expr  # the index of the score axis just before the keys
    column: sympy.Expr  # that of the keys among the scores
    zeroed: tuple["_Zeroed", ...]
    weighed: tuple[Factor, ...]  # what the weights are multiplied by


class _Reading:
    """Reads one softmax site; the names of the result's axes are chosen in a first reading and used in a second."""

    def __init__(self, algebra: Algebra, softmax: Node, weights: _Weights, dim: int) -> None:
        self.algebra = algebra
        self.space = algebra.space
        self.softmax = softmax
        self.weights = weights
        self.dim = dim
        self.sizes: dict[str, sympy.Expr] = {}

    def at(self, names: list[tuple[str, ...]], key_name: str) -> _View:
        """Read the site at a symbolic element of the result whose axis ``i`` runs over the axes ``names[i]``."""
        space, product = self.space, self.weights.product
        shape = shape_exprs(tensor(product))
        index: list[sympy.Expr] = []
        for axis, size in zip(names, shape, strict=True):
            if len(axis) == 1:
                self.sizes[axis[0]] = size
            linear: sympy.Expr = ZERO
            for name in axis:
                linear = linear * self.sizes[name] + space.symbol(name, self.sizes[name])
            index.append(linear)
        pv = as_product(space, product, tuple(index), key_name)
        if pv is None or pv.added is not None or self.algebra.value(pv.alpha, ()) != 1:
            raise Rejected(Reason.LAYOUT, f"'{product.name}' is not a plain product of weights and values")
        sides = [(pv.a, pv.a_index), (pv.b, pv.b_index)]
        node, at = sides[self.weights.operand]
        v_node, v_index = sides[1 - self.weights.operand]
        zeroed, weighed = [], []
        way = [
            x for x in self.weights.nodes if isinstance(x.meta["val"], torch.Tensor)
        ]  # (not what getitem takes apart)
        for source, expected in reversed(list(zip(way, way[1:]))):
            if node is not expected:
                raise Rejected(Reason.LAYOUT, f"'{node.name}' stands between the weights and the values")
            if packet(node) in _SUMS:
                if packet(node) is aten.sub and node.args[1] is source:
                    weighed.append(Factor(-1, (), False))
                if node.args[0] is node.args[1]:
                    raise Rejected(Reason.WEIGHTS_OP, f"'{node.name}' ({node.target})")
                node = source
                continue
            found = _zeroing(self.algebra, node) if packet(node) in (aten.masked_fill, aten.where) else None
            if packet(node) in _WEIGHING and tensor(node).shape != tensor(source).shape:
                raise Rejected(Reason.WEIGHTS_OP, f"'{node.name}' ({node.target})")
            if found is not None:
                zeroed.append(_Zeroed(found[0], broadcast_index(at, shape_exprs(tensor(found[0]))), found[1]))
            elif packet(node) in (aten.mul, aten.div):
                other = node.args[1] if node.args[0] is source else node.args[0]
                is_divisor = packet(node) is aten.div
                if is_divisor and other is node.args[0]:
                    raise Rejected(Reason.WEIGHTS_OP, f"'{node.name}' ({node.target})")
                is_tensor = isinstance(other, Node) and isinstance(other.meta.get("val"), torch.Tensor)
                place = broadcast_index(at, shape_exprs(tensor(other))) if is_tensor else ()
                weighed.append(Factor(other, place, is_divisor))
            step = layout_step(space, node, at)
            node, at = step if step is not None else (source, at)
        k, column = pv.contracted, at[self.dim]
        # Behind a sink, key k is in column k + 1.
        if not (column - k).is_Integer or any(
            k in e.free_symbols for i, e in enumerate(at) if i != self.dim and k != 0
        ):
            what = "the product of its weights sums over another, as one that mixes heads does"
            raise Rejected(Reason.SOFTMAX_DIM, f"'{self.softmax.name}' normalises over axis {self.dim}, {what}")
        try:
            scores = read_scores(self.algebra, self.softmax.args[0], at)
        except NotScores as failure:
            raise Rejected(failure.reason, failure.detail) from None
        qk = scores.product
        a, b = (qk.a, qk.a_index), (qk.b, qk.b_index)
        in_a, in_b = (any(k in e.free_symbols for e in x[1]) for x in (a, b)) if k != 0 else (False, True)
        if in_a == in_b:
            raise Rejected(Reason.LAYOUT, "both or neither operand of the score product run over the keys")
        q, key = (b, a) if in_a else (a, b)
        row = at[self.dim - 1] if self.dim else ZERO
        return _View(tuple(index), k, at, scores, *q, *key, v_node, v_index, row, column, tuple(zeroed), tuple(weighed))

    def name_axes(self, view: _View, splits: dict[sympy.Symbol, sympy.Expr]) -> list[tuple[str, ...]]:
        """Give the axes of the result their roles: "q", "d" and, for the rest in order, "b", "h", "h2", …"""
        space = self.space
        symbols = [next(iter(e.free_symbols), None) for e in view.result_index]

        def used(index: Index) -> set[sympy.Symbol]:
            return {s for e in index for s in space.indices_of(e)}

        in_q, in_k, in_v = used(view.q_index), used(view.k_index), used(view.v_index)
        in_p = in_q | in_k | {s for x in (*view.scores.terms, *view.scores.factors) for s in used(x.index)}
        values = [s for s in symbols if s in in_v and s not in in_p]
        queries = [s for s in symbols if s in in_q and s not in in_k | in_v]
        axis_d = self._only(values, view.result_index, "value")
        # Where keys have no heads, any axis of the queries could be theirs: what a mask pairs with the keys is, then
        # what is of symbolic length, then what the scores have in front of the keys.
        beside = [used(x.index) & set(queries) for x in view.scores.terms if view.k in used(x.index)]
        paired = set().union(*(found for found in beside if len(found) == 1))
        dynamic = {s for s in queries if not space.size(s).is_number}
        for preferred in (paired, dynamic, view.query_row.free_symbols, set(queries[-1:])):
            queries = [s for s in queries if s in preferred] or queries
        axis_q = self._only(queries, view.result_index, "query")
        names: list[tuple[str, ...]] = []
        batch = iter(("b", "h", *(f"h{i}" for i in range(2, 9))))
        for position, symbol in enumerate(symbols):
            if position == axis_d or position == axis_q:
                names.append(("d",) if position == axis_d else ("q",))
            elif symbol is None:
                names.append((next(batch),))
            elif symbol in splits:
                outer, inner = next(batch), next(batch)
                size = space.size(symbol)
                self.sizes[inner] = splits[symbol]
                self.sizes[outer] = sympy.cancel(size / splits[symbol])
                names.append((outer, inner))
            else:
                names.append((next(batch),))
        return names

    def _only(self, symbols: list[sympy.Symbol], index: Index, role: str) -> int | None:
        """The axis of the result that has this role; None where it has no queries, as one step of decoding may have."""
        if len(symbols) > 1:
            raise Rejected(Reason.LAYOUT, f"the result has {len(symbols)} {role} axes")
        if symbols:
            return next(i for i, e in enumerate(index) if symbols[0] in e.free_symbols)
        # An axis of size one has no symbol; matmul and the einsums in use keep (q, d) last.
        default = len(index) - (2 if role == "query" else 1)
        if index[default] == 0:
            return default
        if role == "value":
            raise Rejected(Reason.LAYOUT, "no value axis in the result")
        self.sizes["q"] = ONE
        return None

    def found(self, view: _View, names: list[tuple[str, ...]]) -> Found:
        space, product = self.space, self.weights.product
        seqlen_k = space.size(view.k) if view.k != 0 else ONE
        whole = shape_exprs(tensor(self.softmax))[self.dim]
        if sympy.expand(whole - seqlen_k - int(view.scores.sink is not None)) != 0:
            raise Rejected(
                Reason.SOFTMAX_DIM, f"the softmax runs over {whole} keys, the product with v over {seqlen_k}"
            )
        if any(at != view.column for at in view.scores.along):
            raise Rejected(Reason.SCORE_OP, "a maximum or a sink of the scores is not taken along the keys")
        axes = Axes(space.symbol("q", self.sizes["q"]), view.k, self.sizes["q"], seqlen_k)
        others = [n for axis in names for n in axis if n not in ("q", "d")]
        head_dim = _static_head_dim(_contracted_size(view))
        roles = Roles.of(
            space, others, self.sizes, axes, "d", view.scores.product.contracted, head_dim, self.sizes["d"]
        )
        function, scale, softcap, factors = _function_of(view)
        nodes, score, no_score = view.scores.nodes, None, None
        if function is not None:
            no_score = Rejected(function.failure.reason, function.failure.detail)
            written = formula_of_score(self.algebra, function.node, function.index, function.source, roles)
            if written is None:
                raise no_score
            score, inside = written
            nodes = tuple(dict.fromkeys((*nodes, *inside)))
        q = peel(self.algebra, view.q_node, view.q_index)
        k = peel(self.algebra, view.k_node, view.k_index)
        v = peel(self.algebra, view.v_node, view.v_index, scales=False)
        (q, k, v), factor = choose_operands(roles, q, k, v, tensor(product).dtype, product)
        float8, not_float8 = read_float8(
            self.algebra, roles, (view.q_node, view.q_index), (view.k_node, view.k_index),
            (view.v_node, view.v_index), scale,
        )  # fmt: skip
        scale = scale * factor
        if not (scale.is_number and scale.is_finite) and not scale.free_symbols:
            raise Rejected(Reason.TENSOR_SCALE, f"the scale is {scale}")
        if softcap is not None and not softcap.is_number:
            raise Rejected(Reason.TENSOR_SCALE, f"the soft cap is {softcap}")
        q_factors = [(side_operand(space, x.node, x.index, roles), x.inverse) for x in factors]
        terms, mask, empty = read_terms(self.algebra, view.scores.terms, roles, axes)
        zeroed, v_factors, out_factors = _weighing(self.algebra, view, roles, roles.heads_of(k), empty)
        if v_factors and (float8 is not None or not_float8):
            float8, not_float8 = None, "not on the FP8 kernel: the weights are multiplied by a number for each key"
        empty = _as_written(self.algebra, self.softmax, self.weights, view, len(zeroed), terms, empty)
        shown = None
        if empty is Empty.NAN_SHOWN:
            ((at, kind),) = zeroed
            shown = side_operand(space, at.node, at.index, roles), kind
        sinks = row_sinks = None
        if view.scores.sink is not None:
            sinks = read_sink(self.algebra, view.scores.sink, roles)
            if sinks is None:
                row_sinks = side_operand(space, *view.scores.sink, roles)
            empty = empty_beside_sink(self.algebra, view.scores.terms, empty)
        lse, casts = (), ()
        if view.scores.sink is None and not view.scores.shifted:
            lse, casts = self._log_sum_exps(view, names)
        if lse and empty in (Empty.MEAN, Empty.MEAN_SCORES):
            empty = Empty.AS_WRITTEN  # what hides all of a row is all of its log-sum-exp
        if empty in (Empty.MEAN, Empty.MEAN_SCORES) and self.weights.dropout_p:
            empty = Empty.AS_WRITTEN  # the mean would have to be dropped out as well
        words = [*view.scores.words, "softmax", *self.weights.words, str(packet(product)).partition(".")[2]]
        spec = AttentionSpec(
            anchor=self.softmax,
            result=product,
            result_axes=tuple(names),
            batch=roles.batch,
            heads=roles.heads,
            q=q,
            k=k,
            v=v,
            axes=axes,
            head_dim=head_dim,
            head_dim_v=self.sizes["d"],
            kv_heads=roles.heads_of(k),
            scale=scale,
            mask=mask,
            mask_text=describe(mask, axes, space)
            if not _has_bias(terms)
            else _with_bias(describe(mask, axes, space), terms),
            terms=terms,
            empty=empty,
            dropout_p=self.weights.dropout_p,
            form=" · ".join(words),
            softcap=None if softcap is None else float(softcap),
            score=score,
            no_score=no_score,
            q_factors=tuple(q_factors),
            v_factors=v_factors,
            out_factors=out_factors,
            shown=shown,
            sinks=sinks,
            row_sinks=row_sinks,
            lse=lse,
            quantised=read_quantised(product),
            float8=float8,
            not_float8=not_float8,
        )
        interior = (*nodes, *casts, *(x.node for x in lse), *self.weights.nodes, product)
        leaks = (*_leaks_of(nodes, self.softmax), *_leaks_of_weights(self.weights))
        return Found(self.softmax, spec, None, interior, leaks)

    def _log_sum_exps(
        self, view: _View, names: list[tuple[str, ...]]
    ) -> tuple[tuple[LogSumExp, ...], tuple[Node, ...]]:
        """What takes the log-sum-exp of the scores that the softmax takes, and casts in front of it alone."""
        axes = self._named_axes(view.at, [n for axis in names for n in axis if n != "d"])
        if axes is None:
            return (), ()
        scores, casts = self.softmax.args[0], (aten._to_copy, aten.to)
        while packet(scores) in casts and not any(map(self._is_log_sum_exp, users_of(scores))):
            scores = scores.args[0]
        found, between = [], []
        for user in users_of(scores):
            is_cast = packet(user) in casts and tensor(user).dtype.is_floating_point
            users = users_of(user) if is_cast else [user]
            if users and all(map(self._is_log_sum_exp, users)):
                found += users
                between += [user] * is_cast
        return tuple(
            LogSumExp(x, (*axes[: self.dim], *[("d",)] * argument(x, 2, "keepdim", False), *axes[self.dim + 1 :]))
            for x in found
        ), tuple(between)

    def _is_log_sum_exp(self, node: Node) -> bool:
        return packet(node) is aten.logsumexp and [d % rank(node.args[0]) for d in node.args[1]] == [self.dim]

    def _named_axes(self, at: Index, names: list[str]) -> list[tuple[str, ...]] | None:
        """Over which of the named axes each axis of the softmax but the keys' runs."""
        symbols = {name: self.space.symbol(name, self.sizes[name]) for name in names}
        axes = []
        for entry in (e if i != self.dim else ZERO for i, e in enumerate(at)):
            axis = tuple(name for name in names if symbols[name] in entry.free_symbols)
            linear: sympy.Expr = ZERO
            for name in axis:
                linear = linear * self.sizes[name] + symbols[name]
            if sympy.expand(linear - entry) != 0:
                return None
            axes.append(axis)
        return axes


def _function_of(view: _View) -> tuple[Function | None, sympy.Expr, sympy.Expr | None, tuple[Factor, ...]]:
    """What becomes of the product: a function, its scale, a soft cap, and tensors that scale it."""
    scores = view.scores
    by_key = [x for x in scores.factors if view.k != 0 and any(view.k in entry.free_symbols for entry in x.index)]
    if not by_key:
        return scores.function, scores.scale, scores.softcap, scores.factors
    what = f"'{by_key[0].node.name}', which scales the scores, differs from key to key"
    if scores.linear is None or scores.shaped[2] < len(scores.factors):  # what was added before is scaled as well
        raise Rejected(Reason.TENSOR_SCALE, what)
    *source, scale = scores.linear
    later = sympy.cancel(scores.scale / scores.shaped[3])  # what all was multiplied by after something was added
    if later != 1 and scores.softcap is not None:
        raise Rejected(Reason.TENSOR_SCALE, f"{what}, within a soft cap that is scaled")
    return Function(*scores.shaped[:2], tuple(source), NotScores(Reason.TENSOR_SCALE, what)), scale * later, None, ()


def _weighing(
    algebra: Algebra, view: _View, roles: Roles, kv_heads: sympy.Expr, empty: Empty
) -> tuple[list[tuple[_Zeroed, Weighs]], tuple[Weighing, ...], tuple[Weighing, ...]]:
    """What is done to the weights: zeros where the scores are hidden too; what goes to the values; to the result."""
    zeroed, of_keys, of_queries = [], [], []
    for at in (*view.zeroed, *view.weighed):
        if isinstance(at.node, Node) and isinstance(at.node.meta["val"], torch.Tensor):
            value = algebra.value(at.node, at.index)
            shown = to_boolean(value)
            if isinstance(at, _Zeroed):
                kind, shown = (Weighs.HIDDEN, sympy.Not(shown)) if at.hides else (Weighs.SHOWN, shown)
                is_mask = True
            else:
                kind = Weighs.OVER if at.inverse else Weighs.TIMES
                is_mask = not at.inverse and all(x in (0, 1) or is_condition(x) for x in leaves(value))
            if is_mask and any(isinstance(t, Hidden) and visible_where(algebra, t) == shown for t in view.scores.terms):
                if isinstance(at, _Zeroed) or empty not in (Empty.NAN, Empty.NAN_SCORES, Empty.NAN_SOME):
                    zeroed.append((at, kind))  # (NaN times zero is none.)
                continue
            if isinstance(at, _Zeroed) and empty not in (Empty.IMPOSSIBLE, Empty.MEAN, Empty.MEAN_SCORES):
                raise Rejected(Reason.WEIGHTS_OP, f"they are hidden by '{at.node.name}', which the scores are not")
            if any(view.k in x.free_symbols for x in at.index):
                of_keys.append((key_operand(at.node, at.index, roles, kv_heads), kind))
            else:
                of_queries.append((side_operand(algebra.space, at.node, at.index, roles), kind))
            continue
        value = algebra.value(at.node, ())
        if not (isinstance(value, sympy.Expr) and value.is_number and value.is_finite) or value == 0:
            raise Rejected(Reason.WEIGHTS_OP, f"they are multiplied by {at.node}")
        of_queries.append((float(value), Weighs.OVER if at.inverse else Weighs.TIMES))
    return zeroed, tuple(of_keys), tuple(of_queries)


def _as_written(
    algebra: Algebra, softmax: Node, weights: _Weights, view: _View, zeroed: int, terms: tuple[Term, ...],
    empty: Empty,
) -> Empty:  # fmt: skip
    """What an empty row gives where the softmax is written out, or its weights are replaced by zeros."""
    raw = view.scores.terms
    if empty is Empty.IMPOSSIBLE:
        return empty
    written = softmax.meta.get(EMPTY_ROWS)
    if written is not None and any(t.kind is TermKind.BIAS and t.known and not t.ordinary for t in terms):
        # Softmax sees such scores; exp of them may be 0 in all of a row.
        what = "the softmax is written out, and scores are hidden by a number that they are not lost in"
        raise Rejected(Reason.EMPTY_ROWS, what)
    match written:
        case Written.BY_INFINITY if empty not in (Empty.NAN, Empty.NAN_SCORES, Empty.NAN_SOME):
            raise Rejected(Reason.EMPTY_ROWS, "the softmax is written out, and hides scores by a number")
        case Written.MULTIPLIED if empty not in (Empty.NAN, Empty.NAN_SCORES, Empty.NAN_SOME):
            raise Rejected(
                Reason.EMPTY_ROWS, "the softmax is written out, with masks that are factors beside masks by a number"
            )
        case Written.MULTIPLIED:
            empty = Empty.NAN_SCORES
        case Written.UNCLEAR:
            raise Rejected(
                Reason.EMPTY_ROWS, "the softmax is written out, with a sum that may be zero and a small number"
            )
    if zeroed:
        # Beside it, only what can hide nothing by itself. (Behind -inf, even that has a gradient of NaN.)
        alone = sum(not t.ordinary for t in terms) <= 1 and isinstance(raw[-1], Hidden)
        if not alone and (written is not None or zeroed > 1 or empty not in (Empty.NAN, Empty.NAN_SOME)):
            raise Rejected(Reason.EMPTY_ROWS, "of several masks one hides the weights as well")
        empty = Empty.ZERO if alone else Empty.NAN_SHOWN
    if "nan_to_num" in weights.words:
        if empty in (Empty.NAN_SCORES, Empty.NAN_SHOWN, Empty.NAN_SOME):
            raise Rejected(Reason.EMPTY_ROWS, "weights of NaN become zero, but their gradient stays NaN")
        if empty is Empty.AS_WRITTEN:
            raise Rejected(Reason.EMPTY_ROWS, "only some weights of NaN become zero: not every mask is -inf")
        empty = Empty.ZERO if empty is Empty.NAN else empty
    return empty


def _contracted_size(view: _View) -> Any:
    product = view.scores.product
    node, index = product.a, product.a_index
    for size, entry in zip(tensor(node).shape, index, strict=True):
        if entry == product.contracted and product.contracted != 0:
            return size
    return 1


def _has_bias(terms: tuple[Term, ...]) -> bool:
    return any(t.window is None and t.kind is TermKind.BIAS and not t.known for t in terms)


def _with_bias(text: str, terms: tuple[Term, ...]) -> str:
    return "bias" if text == "full" else f"{text} & bias"


def _splits(space: Space, view: _View) -> dict[sympy.Symbol, sympy.Expr]:
    """Result axes that are really two: index // n or index % n of one was read somewhere."""
    found: dict[sympy.Symbol, sympy.Expr] = {}
    indices = [view.q_index, view.k_index, view.v_index]
    indices += [x.index for x in (*view.scores.terms, *view.scores.factors)]
    for node, index in ((view.q_node, view.q_index), (view.k_node, view.k_index), (view.v_node, view.v_index)):
        step: tuple[Node, Index] | None = (node, index)
        while step is not None:
            indices.append(step[1])
            step = layout_step(space, *step)
    of_terms: list[Index] = []
    for term in view.scores.terms:
        step = (term.node, term.index)
        while step is not None:
            of_terms.append(step[1])
            step = layout_step(space, *step)
    indices += of_terms
    for index in indices:
        for entry in index:
            for part in entry.atoms(sympy.floor, sympy.Mod):
                inner = part.args[0] if isinstance(part, sympy.Mod) else sympy.numer(part.args[0])
                divisor = part.args[1] if isinstance(part, sympy.Mod) else sympy.denom(part.args[0])
                if inner in space.indices_of(inner) and space.size(inner) is not None:
                    size = space.size(inner)
                    whole = sympy.cancel(size / divisor)
                    if sympy.denom(whole) == 1 and inner not in found:
                        found[inner] = divisor
    # A mask that is the same for every n-th (a window of an image) is no matter of groups.
    remainders = {
        s for index in of_terms for entry in index for mod in entry.atoms(sympy.Mod) for s in mod.free_symbols
    }
    return {s: n for s, n in found.items() if s in remainders or not _is_group(view, s)}


def _is_group(view: _View, symbol: sympy.Symbol) -> bool:
    """A head axis that only k and v read by groups stays one axis: that is grouped-query attention."""
    whole_in_q = any(e == symbol for e in view.q_index)
    return whole_in_q and any(e == symbol for e in view.result_index) and len(view.result_index) >= 4


_OF_SHAPE = (aten.zeros_like, aten.ones_like, aten.full_like, aten.new_zeros, aten.new_ones, aten.new_full)


def _reads_no_value(user: Node) -> bool:
    """Whether only the shape and dtype of a tensor matter to an operation on it, or to those on a part of it."""
    if packet(user) in _OF_SHAPE:
        return True
    onward = users_of(user)
    return packet(user) in (aten.slice, aten.select) and bool(onward) and all(map(_reads_no_value, onward))


def _leaks_of(nodes: tuple[Node, ...], softmax: Node) -> tuple[_Leak, ...]:
    """Where others than the chain itself use its scores."""
    chain = {*nodes, softmax}
    return tuple(
        _Leak(node, user, Reason.SCORES_USED)
        for node in nodes
        for user in users_of(node)
        if user not in chain
        and not (packet(user) is aten.type_as and user.args[0] is not node)  # asks for the dtype alone
        and not _reads_no_value(user)
    )


def _leaks_of_weights(weights: _Weights) -> tuple[_Leak, ...]:
    """Where another product uses its weights."""
    way = {*weights.nodes, weights.product}
    return tuple(
        _Leak(node, user, Reason.WEIGHTS_USED) for node in weights.nodes for user in users_of(node) if user not in way
    )


# --------------------------------------------------------------------------------------------- SDPA


def _agree(*sizes: int | torch.SymInt) -> None:
    """Guard that symbolic sizes which the call needs to be equal are so: its shape rule alone does not say it."""
    first, *others = [s for s in sizes if isinstance(s, torch.SymInt) or s != 1] or [1]
    for other in others:
        if size_expr(other) != size_expr(first):
            bool(other == first)


def _read_sdpa(algebra: Algebra, node: Node) -> Found:
    """A call of ``F.scaled_dot_product_attention``, every argument included."""
    space = algebra.space
    q, k, v = node.args[:3]
    attn_mask, dropout_p = argument(node, 3, "attn_mask"), argument(node, 4, "dropout_p", 0.0)
    is_causal, scale = argument(node, 5, "is_causal", False), argument(node, 6, "scale")
    enable_gqa = argument(node, 7, "enable_gqa", False)
    if any(rank(x) < 2 or not 2 <= rank(x) <= 5 for x in (q, k, v)):
        raise Rejected(Reason.LAYOUT, f"q, k and v have {rank(q)}, {rank(k)} and {rank(v)} dimensions")
    shape = shape_exprs(tensor(node))
    _static_head_dim(tensor(q).shape[-1])
    _agree(tensor(k).shape[-2], tensor(v).shape[-2])
    if not enable_gqa and rank(q) == rank(k) == rank(v):
        for sizes in zip(*(tensor(x).shape[:-2] for x in (q, k, v)), strict=True):
            _agree(*sizes)
    seqlen_q, head_dim = shape_exprs(tensor(q))[-2:]
    seqlen_k, head_dim_v = shape_exprs(tensor(v))[-2:]
    names = ["b", "h", "h2"][: len(shape) - 2]
    sizes = dict(zip(names, shape, strict=False))
    batch = tuple(space.symbol(n, sizes[n]) for n in names)
    axes = Axes(space.symbol("q", seqlen_q), space.symbol("k", seqlen_k), seqlen_q, seqlen_k)
    d, e = space.symbol("d", head_dim_v), space.symbol("e", head_dim)
    roles = Roles.of(space, names, sizes, axes, "d", e, head_dim, head_dim_v)

    def at(x: Node, row: sympy.Expr, column: sympy.Expr) -> Index:
        sized = shape_exprs(tensor(x))
        index = list(batch)
        if enable_gqa and len(index) >= 2 and sized[-3] != sizes[names[-1]]:
            group = sympy.cancel(sizes[names[-1]] / sized[-3])
            index[-1] = sympy.floor(index[-1] / group)
        return broadcast_index((*index, row, column), sized)

    peeled = [
        peel(algebra, x, at(x, row, column), scales)
        for x, row, column, scales in ((q, axes.q, e, True), (k, axes.k, e, True), (v, axes.k, d, False))
    ]
    (q_operand, k_operand, v_operand), factor = choose_operands(roles, *peeled, tensor(node).dtype, node)
    base = sympy.Pow(head_dim, sympy.Rational(-1, 2)) if scale is None else algebra.value(scale, ())
    if not isinstance(base, sympy.Expr) or base.has(Opaque):
        raise Rejected(Reason.TENSOR_SCALE, "scale is not a number")
    float8, not_float8 = read_float8(
        algebra, roles, (q, at(q, axes.q, e)), (k, at(k, axes.k, e)), (v, at(v, axes.k, d)), base
    )
    raw: tuple[Added | Hidden, ...] = ()
    if attn_mask is not None:
        index = broadcast_index((*batch, axes.q, axes.k), shape_exprs(tensor(attn_mask)))
        if tensor(attn_mask).dtype == torch.bool:
            raw = (Hidden(attn_mask, index, False, -sympy.oo),)
        else:
            raw = (Added(attn_mask, index, sympy.Integer(1), torch.float32),)
    terms, mask, empty = read_terms(algebra, raw, roles, axes)
    if is_causal:
        mask = Mask(mask.window_left, ZERO, mask.rest)
    # SDPA defines an empty row of a bool or -inf mask as zeros; a finite one is added as it stands.
    empty = Empty.IMPOSSIBLE if empty is Empty.IMPOSSIBLE and no_row_is_empty(mask, axes) else Empty.ZERO
    text = describe(mask, axes, space)
    if empty is not Empty.IMPOSSIBLE and not all(hides_by_infinity(algebra, term) for term in raw):
        # In a row that it hides all of, a finite mask still weighs its keys: no part of it is a window.
        terms = tuple(dataclasses.replace(t, kind=TermKind.BIAS, window=None, formula=None) for t in terms)
        mask = FULL
    form = "scaled_dot_product_attention"
    spec = AttentionSpec(
        anchor=node,
        result=node,
        result_axes=(*((n,) for n in names), ("q",), ("d",)),
        batch=roles.batch,
        heads=roles.heads,
        q=q_operand,
        k=k_operand,
        v=v_operand,
        axes=axes,
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        kv_heads=roles.heads_of(k_operand),
        scale=base * factor,
        mask=mask,
        mask_text=_with_bias(text, terms) if _has_bias(terms) else text,
        terms=terms,
        empty=empty,
        dropout_p=dropout_p,
        form=form,
        is_sdpa=True,
        quantised=read_quantised(node),
        float8=float8,
        not_float8=not_float8,
    )
    return Found(node, spec, None, (node,))

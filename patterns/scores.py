"""The score chain: from the input of a softmax up to the product of query and key, interpreted operation by operation.

Nothing here is a template. Each step moves the symbolic index upwards and notes what the operation did to the scores:
a scale, something added, keys hidden. What is added or hides is only named (node and index); masks.py proves what it
is.
"""

import dataclasses
import itertools
import math
import operator
from typing import Any

import sympy
import torch
from sympy.logic.boolalg import Boolean
from torch.fx import Node

from .algebra import (
    FALSE,
    TRUE,
    Algebra,
    Choice,
    Opaque,
    Value,
    is_condition,
    number,
    round_to,
    to_boolean,
    to_number,
)
from .formulas import OF_SCORES
from .indices import ONE, ZERO, Index, broadcast_index, is_nonnegative, shape_exprs
from .layouts import NO_GRAD, argument, layout_step, packet, rank, tensor
from .products import Product, as_product, is_product
from .reasons import Reason

aten = torch.ops.aten

# A softmax over fp32 gives a key at or below this score a weight of exactly 0, unless the row's own largest score is
# within 104 of it. Published masks start here (BERT's -10000, which bfloat16 rounds to this).
MASK_THRESHOLD = -9984


@dataclasses.dataclass(frozen=True)
class Added:
    """``coefficient * node[index]`` added to the scores; ``dtype`` is the sum's."""

    node: Node
    index: Index
    coefficient: sympy.Expr
    dtype: torch.dtype
    narrowed: torch.dtype | None = None  # what the sum was cast to later, if that has a smaller range; the smallest
    raised: sympy.Expr | None = None  # the hugely negative number that replaced a sum lower than it
    halves: bool = False  # whether half of the gradient of a sum that is that number ends there


@dataclasses.dataclass(frozen=True)
class Hidden:
    """Scores replaced by ``fill`` where ``node[index]`` is ``hides`` (True: masked_fill; False: where)."""

    node: Node
    index: Index
    hides: bool
    fill: sympy.Expr


@dataclasses.dataclass(frozen=True)
class Factor:
    """A tensor that the product is multiplied by, or divided by if ``inverse``."""

    node: Node
    index: Index
    inverse: bool


@dataclasses.dataclass(frozen=True)
class Function:
    """``node[index]`` in place of ``source``, the scaled product; ``failure``: what to say if there is no formula."""

    node: Node
    index: Index
    source: tuple[Node, Index]
    failure: "NotScores"


@dataclasses.dataclass(frozen=True)
class Scores:
    """``scale * product`` with ``terms`` applied in order; ``nodes`` are the chain's interior, softmax side first.

    With a ``softcap``, ``softcap * tanh(scale * product / softcap)`` takes the place of ``scale * product``.
    ``shifted`` says that what a softmax does not see was added (a number, a row's maximum), which a soft cap or a sink
    that comes after it would; ``lowered``, that it was the maximum of rows that masks may have left nothing but -inf
    (NaN then) or very low numbers (ordinary ones then), which a mask that comes after it would see. ``sink`` is one
    more column that was joined to the scores, and ``along`` the index expressions that have to be the keys': where it
    was joined, and where a row's maximum was taken. ``factors`` are tensors that scale the product as well. A
    ``function`` of the product may stand in place of a soft cap and factors.
    ``linear`` is the last place in the chain where there is nothing but the product and ``scale``, ``shaped`` the last
    one before anything is added, with the number of factors there and the scale.
    """

    product: Product
    scale: sympy.Expr
    terms: tuple[Added | Hidden, ...]
    nodes: tuple[Node, ...]
    words: tuple[str, ...]
    softcap: sympy.Expr | None = None
    shifted: bool = False
    lowered: bool = False
    sink: tuple[Node, Index] | sympy.Expr | None = None
    along: tuple[sympy.Expr, ...] = ()
    factors: tuple["Factor", ...] = ()
    function: Function | None = None
    linear: tuple[Node, Index, sympy.Expr] | None = None
    shaped: tuple[Node, Index, int, sympy.Expr] | None = None


class NotScores(Exception):
    """This tensor does not come from a product of query and key; ``reason`` is set where something stood in the way."""

    def __init__(self, reason: Reason = Reason.NO_PRODUCT, detail: str = "") -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


def read_scores(algebra: Algebra, node: Any, index: Index) -> Scores:
    """Interpret the chain that ends in ``node[index]``.

    Raises:
        NotScores: there is no product up this chain, or an operation on the way is not one that keeps it scores.
    """
    key = (node, index)
    if key not in algebra.scores:
        try:
            algebra.scores[key] = _placed(_read(algebra, node, index), node, index)
        except NotScores as failure:
            algebra.scores[key] = failure
    found = algebra.scores[key]
    if isinstance(found, NotScores):
        raise found
    return found


def _placed(scores: Scores, node: Node, index: Index) -> Scores:
    if scores.terms or scores.shifted or scores.sink is not None:
        return scores
    if scores.function is None and scores.softcap is None and not scores.factors:
        scores = dataclasses.replace(scores, linear=(node, index, scores.scale))
    return dataclasses.replace(scores, shaped=(node, index, len(scores.factors), scores.scale))


def _read(algebra: Algebra, node: Any, index: Index) -> Scores:
    if not isinstance(node, Node) or node.op != "call_function":
        raise NotScores
    held = node.meta.get("val")
    if not isinstance(held, torch.Tensor):
        raise NotScores
    if is_product(node):
        return _from_product(algebra, node, index)
    step = layout_step(algebra.space, node, index)
    if step is not None:
        return _extend(read_scores(algebra, *step), node)
    kind = packet(node)
    if kind in (aten._to_copy, aten.to, aten.type_as):
        scores = read_scores(algebra, node.args[0], index)
        if not held.dtype.is_floating_point:
            raise NotScores(Reason.SCORE_OP, f"the scores are cast to {held.dtype}")
        terms = tuple(_rounded(t, held.dtype) for t in scores.terms)
        return _extend(scores, node, "" if held.dtype != torch.float32 else "fp32", terms=terms)
    if kind in (aten.mul, aten.div, aten.neg):
        return _scaled(algebra, node, index)
    if kind in (aten.add, aten.sub, aten.rsub):
        return _added(algebra, node, index)
    if kind in (aten.masked_fill, aten.where) and len(node.args) >= 3:
        return _hidden(algebra, node, index)
    if kind is aten.tanh:
        return _capped(algebra, node, index)
    if kind in (aten.maximum, aten.max, aten.clamp, aten.clamp_min) and len(node.args) == 2:
        return _raised(algebra, node, index)
    if kind in OF_SCORES:
        _, scores = _either(algebra, _operands(algebra, node, index))
        failure = NotScores(Reason.SCORE_OP, f"'{node.name}' ({node.target}) on the scores")
        return _function(node, index, scores, failure)
    if kind is aten.cat:
        return _joined(algebra, node, index)
    if kind in (aten.pad, aten.constant_pad_nd):
        return _padded(algebra, node, index)
    return _not_understood(algebra, node, index)


def _extend(scores: Scores, node: Node, word: str = "", **changes: Any) -> Scores:
    words = scores.words if not word or word in scores.words[-1:] else (*scores.words, word)
    return dataclasses.replace(scores, nodes=(node, *scores.nodes), words=words, **changes)


def _from_product(algebra: Algebra, node: Node, index: Index) -> Scores:
    product = as_product(algebra.space, node, index, "d")
    if product is None:
        raise NotScores(Reason.NO_PRODUCT, f"'{node.name}' is not a product over one shared axis")
    alpha = algebra.value(product.alpha, ())
    if isinstance(alpha, Choice) or not alpha.is_number:
        raise NotScores(Reason.TENSOR_SCALE, f"alpha of '{node.name}'")
    terms: tuple[Added | Hidden, ...] = ()
    if product.added is not None:
        beta = algebra.value(product.beta, ())
        added_index = broadcast_index(index, shape_exprs(tensor(product.added)))
        terms = _split_sum(algebra, product.added, added_index, beta, tensor(node).dtype)
    return Scores(product, alpha, terms, (node,), (str(packet(node)).partition(".")[2],))


def _function(node: Node, index: Index, scores: Scores, failure: NotScores) -> Scores:
    """Scores that became a function of themselves; raises ``failure`` if that cannot be one of the product alone."""
    if scores.linear is None or scores.sink is not None or any(isinstance(t, Hidden) for t in scores.terms):
        raise failure
    *source, scale = scores.linear
    function = Function(node, index, tuple(source), scores.function.failure if scores.function else failure)
    changes = dict(function=function, scale=scale, terms=(), softcap=None, factors=(), shifted=False)
    return _extend(scores, node, str(packet(node)).partition(".")[2], **changes)


def _operands(algebra: Algebra, node: Node, index: Index) -> list[tuple[Any, Index]]:
    return [
        (x, broadcast_index(index, shape_exprs(tensor(x))) if _is_tensor(x) else ())
        for x in node.args[: 1 if packet(node) is aten.neg else 2]
    ]


def _rounded(term: Added | Hidden, dtype: torch.dtype) -> Added | Hidden:
    """A term after the scores were cast: a fill may overflow, and so may a sum."""
    if isinstance(term, Hidden):
        return dataclasses.replace(term, fill=round_to(term.fill, dtype))
    if torch.finfo(dtype).max < torch.finfo(term.narrowed or term.dtype).max:
        return dataclasses.replace(term, narrowed=dtype)
    return term


def _is_tensor(x: Any) -> bool:
    return isinstance(x, Node) and isinstance(x.meta.get("val"), torch.Tensor)


def _either(algebra: Algebra, operands: list[tuple[Any, Index]]) -> tuple[int, Scores]:
    """The operand that holds the scores. Where both could, the first: a sum of two products is one plus a bias."""
    failures = []
    for position, (x, index) in enumerate(operands):
        if not _is_tensor(x):
            continue
        try:
            return position, read_scores(algebra, x, index)
        except NotScores as failure:
            failures.append(failure)
    raise max(failures, key=lambda f: f.reason is not Reason.NO_PRODUCT, default=NotScores())


def _scaled(algebra: Algebra, node: Node, index: Index) -> Scores:
    operands = _operands(algebra, node, index)
    position, scores = _either(algebra, operands)
    if packet(node) is aten.neg:
        factor: Value = sympy.Integer(-1)
    else:
        factor = to_number(algebra.value(*operands[1 - position]))
        is_divided = packet(node) is aten.div
        if is_divided and (position == 1 or node.kwargs.get("rounding_mode") is not None):
            failure = NotScores(Reason.SCORE_OP, f"'{node.name}' divides by the scores")
            return _function(node, index, scores, failure)
        if isinstance(factor, Choice) or algebra.space.indices_of(factor) or factor.has(Opaque):
            _check_no_sink(scores, node)
            if scores.terms or scores.softcap is not None or scores.function is not None:
                failure = NotScores(Reason.TENSOR_SCALE, f"'{node.name}' scales more than a product by a tensor")
                return _function(node, index, scores, failure)
            tensors = (*scores.factors, Factor(*operands[1 - position], is_divided))
            return _extend(scores, node, "scale", factors=tensors)
        if is_divided:
            if factor.is_zero:
                raise NotScores(Reason.SCORE_OP, f"the divisor of '{node.name}' is zero")
            factor = 1 / factor
    _check_no_sink(scores, node)
    if scores.function is not None:
        return _function(node, index, scores, NotScores(Reason.SCORE_OP, f"'{node.name}' scales a function of scores"))
    return _extend(_times(scores, factor, tensor(node).dtype), node, "scale")


def _times(scores: Scores, factor: sympy.Expr, dtype: torch.dtype) -> Scores:
    """Scores that are no function, multiplied by a number."""
    terms = tuple(
        dataclasses.replace(t, coefficient=t.coefficient * factor)
        if isinstance(t, Added)
        else dataclasses.replace(t, fill=round_to(t.fill * factor, dtype))
        for t in scores.terms
    )
    softcap = None if scores.softcap is None else scores.softcap * sympy.Abs(factor)
    return dataclasses.replace(scores, scale=scores.scale * factor, softcap=softcap, terms=terms)


def _capped(algebra: Algebra, node: Node, index: Index) -> Scores:
    """tanh(s): a soft cap of one, which a factor on it makes larger."""
    scores = read_scores(algebra, node.args[0], index)
    _check_no_sink(scores, node)
    if scores.terms or scores.shifted or scores.softcap is not None or scores.function is not None:
        failure = NotScores(Reason.SCORE_OP, f"'{node.name}' caps scores that are more than a scaled product")
        return _function(node, index, scores, failure)
    return _extend(scores, node, "softcap", softcap=ONE)


# No score of a trained model is as low as this, so that raising what is changes masked ones alone.
_BELOW_ANY_SCORE = -1e30


def _raised(algebra: Algebra, node: Node, index: Index) -> Scores:
    """max(s, least): what keeps a mask added to the scores from overflowing to -inf."""
    operands = _operands(algebra, node, index)
    position, scores = _either(algebra, operands)
    least = algebra.value(*operands[1 - position])
    if isinstance(least, Choice) or not least.is_number or not least.is_finite or least > _BELOW_ANY_SCORE:
        what = f"'{node.name}' raises scores to something else than a hugely negative number"
        return _function(node, index, scores, NotScores(Reason.SCORE_OP, what))
    _check_no_sink(scores, node)
    _check_not_lowered(scores, node)
    if any(isinstance(t, Added) and t.raised is not None for t in scores.terms):
        raise NotScores(Reason.SCORE_OP, f"'{node.name}' raises scores that were raised before")
    least = round_to(least, tensor(node).dtype)
    about = dict(raised=least, halves=packet(node) in (aten.maximum, aten.max))
    terms = tuple(
        dataclasses.replace(t, **about) if isinstance(t, Added) else dataclasses.replace(t, fill=max(t.fill, least))
        for t in scores.terms
    )
    return _extend(scores, node, "raised", terms=terms)


def _added(algebra: Algebra, node: Node, index: Index) -> Scores:
    operands = _operands(algebra, node, index)
    position, scores = _either(algebra, operands)
    alpha = algebra.value(argument(node, 2, "alpha", 1), ())
    # add: a + alpha b; sub: a - alpha b; rsub: b - alpha a
    factors = {aten.add: [ONE, alpha], aten.sub: [ONE, -alpha], aten.rsub: [-alpha, ONE]}[packet(node)]
    factor = factors[position]
    if factor != 1:
        if scores.function is not None or isinstance(factor, Choice) or not factor.is_number:
            return _function(node, index, scores, NotScores(Reason.SCORE_OP, f"'{node.name}' subtracts the scores"))
        scores = _times(scores, factor, tensor(node).dtype)
    other, other_index = operands[1 - position]
    maximum = maximum_of(other, operands[position][0]) if factor == 1 and factors[1 - position] == -1 else None
    if maximum is not None:  # a softmax over the same keys does not see it, infinities and NaN included
        nodes, dim = maximum
        scores = dataclasses.replace(scores, nodes=(*nodes, *scores.nodes))
        about = dict(shifted=scores.shifted or scores.sink is None, lowered=scores.lowered or bool(scores.terms))
        return _extend(scores, node, along=(*scores.along, index[dim]), **about)
    _check_no_sink(scores, node)
    terms = _split_sum(algebra, other, other_index, factors[1 - position], tensor(node).dtype)
    if terms:
        _check_not_lowered(scores, node)
    shifted = scores.shifted or not terms
    return _extend(scores, node, "+ mask", terms=scores.terms + terms, shifted=shifted)


def maximum_of(node: Any, source: Node) -> tuple[tuple[Node, ...], int] | None:
    """The nodes that take the largest entry of each row of ``source``, and the dimension that they take it over."""
    if not _is_tensor(node) or node.op != "call_function":
        return None
    if packet(node) is aten.detach:  # what a softmax does not see has no gradient either
        inside = maximum_of(node.args[0], source)
        return None if inside is None else ((node, *inside[0]), inside[1])
    reduction = node
    if node.target is operator.getitem and node.args[1] == 0 and packet(node.args[0]) is aten.max:
        reduction = node.args[0]
    elif packet(node) is not aten.amax:
        return None
    dims, keepdim = argument(reduction, 1, "dim"), argument(reduction, 2, "keepdim", False)
    dims = [dims] if isinstance(dims, int) else list(dims or ())
    if reduction.args[0] is not source or len(dims) != 1 or not keepdim:
        return None
    return tuple(dict.fromkeys((node, reduction))), dims[0] % rank(source)


def _joined(algebra: Algebra, node: Node, index: Index) -> Scores:
    """The scores in a concatenation of scores and one more column, which only takes its share of a softmax."""
    space, dim = algebra.space, argument(node, 1, "dim", 0) % rank(node)
    offset: sympy.Expr = ZERO
    inside, others, failure = None, [], NotScores()
    for x in node.args[0]:
        size = shape_exprs(tensor(x))[dim]
        bounds = space.bounds(index[dim] - offset)
        if bounds and is_nonnegative(bounds[0]) and is_nonnegative(size - 1 - bounds[1]):
            inside = read_scores(algebra, x, (*index[:dim], index[dim] - offset, *index[dim + 1 :]))
        else:
            others.append(x)
            try:
                read_scores(algebra, x, (*index[:dim], space.symbol("joined", size), *index[dim + 1 :]))
            except NotScores as error:
                failure = max(failure, error, key=lambda f: f.reason is not Reason.NO_PRODUCT)
            else:
                failure = NotScores(Reason.SCORE_OP, f"'{node.name}' joins several scores")
        offset += size
    if inside is None:
        raise failure
    if len(others) != 1 or shape_exprs(tensor(others[0]))[dim] != 1:
        raise NotScores(Reason.SCORE_OP, f"'{node.name}' joins scores with more than one column")
    _check_takes_sink(inside, node)
    sink = (others[0], (*index[:dim], ZERO, *index[dim + 1 :]))
    return _extend(inside, node, "sink", sink=sink, along=(*inside.along, index[dim]))


def _padded(algebra: Algebra, node: Node, index: Index) -> Scores:
    """Scores with one more column, of a number: the softmax of "off by one"."""
    inside = read_scores(algebra, node.args[0], index)
    is_constant = packet(node) is aten.constant_pad_nd or argument(node, 2, "mode", "constant") == "constant"
    value = argument(node, 2 if packet(node) is aten.constant_pad_nd else 3, "value") or 0
    is_number = isinstance(value, (int, float)) and math.isfinite(value)
    if list(node.args[1]) != [0, 1] or not is_constant or not is_number:
        raise NotScores(Reason.SCORE_OP, f"'{node.name}' pads scores by more than one column of a number behind them")
    bounds = algebra.space.bounds(index[-1])
    if not bounds or not is_nonnegative(shape_exprs(tensor(node.args[0]))[-1] - 1 - bounds[1]):
        raise NotScores(Reason.SCORE_OP, f"what '{node.name}' pads scores with is read too")
    _check_takes_sink(inside, node)
    return _extend(inside, node, "sink", sink=number(value), along=(*inside.along, index[-1]))


def _check_takes_sink(scores: Scores, node: Node) -> None:
    _check_no_sink(scores, node)
    if scores.shifted:
        raise NotScores(Reason.SCORE_OP, f"'{node.name}' joins a sink to scores that something was added to before")


def _check_no_sink(scores: Scores, node: Node) -> None:
    if scores.sink is not None:
        raise NotScores(Reason.SCORE_OP, f"'{node.name}' changes scores that a sink was joined to")


def _check_not_lowered(scores: Scores, node: Node) -> None:
    if scores.lowered:
        what = f"'{node.name}' masks scores less their maximum, which were masked before"
        raise NotScores(Reason.SCORE_OP, f"{what}: a row that this left no key is NaN by then, or as good as any other")


def _split_sum(
    algebra: Algebra, node: Any, index: Index, coefficient: sympy.Expr, dtype: torch.dtype
) -> tuple[Added, ...]:
    """A sum that is added to the scores, as its summands: each is proved on its own."""
    if not _is_tensor(node):
        value = algebra.value(node, ())
        if not isinstance(value, Choice) and value.is_finite:
            return ()  # a softmax does not see a number added to every score
        raise NotScores(Reason.SCORE_OP, "an infinite number is added to the scores")
    inner, inner_index = node, index
    if node.meta.get(NO_GRAD):
        return (Added(node, index, coefficient, dtype),)
    while packet(inner) in (aten._to_copy, aten.to) or layout_step(algebra.space, inner, inner_index) is not None:
        step = layout_step(algebra.space, inner, inner_index)
        if step is None:
            if tensor(inner).dtype.itemsize < tensor(inner.args[0]).dtype.itemsize:
                break  # rounding of the sum is not the sum of the roundings
            step = inner.args[0], inner_index
        inner, inner_index = step
    # (A sum of bools is an or, and one of integers may wrap around.)
    if not tensor(inner).is_floating_point():
        return (Added(node, index, coefficient, dtype),)
    ends = set().union(*(entry.free_symbols for entry in index[-2:]))
    if any(part.free_symbols & ends for entry in inner_index for part in entry.atoms(sympy.floor, sympy.Mod)):
        return (Added(node, index, coefficient, dtype),)  # by then, queries and keys are rows and columns of an image
    if packet(inner) is aten.add and argument(inner, 2, "alpha", 1) == 1 and all(_is_tensor(x) for x in inner.args[:2]):
        parts = [(x, broadcast_index(inner_index, shape_exprs(tensor(x)))) for x in inner.args[:2]]
        return tuple(t for x, i in parts for t in _split_sum(algebra, x, i, coefficient, dtype))
    return (Added(node, index, coefficient, dtype),)


def _hidden(algebra: Algebra, node: Node, index: Index) -> Scores:
    arguments = [(x, broadcast_index(index, shape_exprs(tensor(x))) if _is_tensor(x) else ()) for x in node.args[:3]]
    if packet(node) is aten.masked_fill:
        kept, condition, fill = arguments
        candidates = [(kept, fill, True)]
    else:
        condition, yes, no = arguments
        candidates = [(yes, no, False), (no, yes, True)]
    failure = NotScores()
    for (x, x_index), (fill_node, fill_index), hides in candidates:
        if not _is_tensor(x):
            continue
        try:
            scores = read_scores(algebra, x, x_index)
        except NotScores as error:
            failure = max(failure, error, key=lambda f: f.reason is not Reason.NO_PRODUCT)
            continue
        _check_no_sink(scores, node)
        _check_not_lowered(scores, node)
        fill = algebra.value(fill_node, fill_index)
        if isinstance(fill, Choice) or is_condition(fill) or not (fill.is_number or fill in (sympy.oo, -sympy.oo)):
            what = f"'{node.name}' writes something other than one number over hidden scores"
            return _function(node, index, scores, NotScores(Reason.FILL_VALUE, what))
        fill = round_to(fill, tensor(node).dtype)
        if not is_low(fill):
            what = f"'{node.name}' writes {float(fill):g}, a mask has at most {MASK_THRESHOLD:g}"
            return _function(node, index, scores, NotScores(Reason.FILL_VALUE, what))
        hidden = Hidden(*condition, hides, fill)
        visible = visible_where(algebra, hidden)
        terms = (_less_hidden(algebra, t, visible) for t in scores.terms)
        return _extend(scores, node, "masked", terms=(*itertools.chain.from_iterable(terms), hidden))
    raise failure


def _less_hidden(algebra: Algebra, term: Added | Hidden, visible: Boolean | None) -> tuple[Added | Hidden, ...]:
    """A term without the number that it adds wherever scores that are not ``visible`` are overwritten later anyway.

    Scores that were masked and are added to those of the next layer, which the same mask hides (RealFormer).
    """
    if isinstance(term, Hidden) or visible is None:
        return (term,)
    node, index = term.node, term.index
    while isinstance(node, Node) and not node.meta.get(NO_GRAD):
        if (step := layout_step(algebra.space, node, index)) is not None:
            node, index = step
            continue
        if packet(node) not in (aten.masked_fill, aten.where) or len(node.args) < 3:
            break
        kept = next((x for x, is_visible in _branches(algebra, node, index) if is_visible == visible), None)
        if kept is None or not _is_tensor(kept[0]) or tensor(kept[0]).dtype != tensor(node).dtype:
            break
        parts = _split_sum(algebra, *kept, term.coefficient, term.dtype)
        about = dict(narrowed=term.narrowed, raised=term.raised, halves=term.halves)
        parts = (_less_hidden(algebra, dataclasses.replace(part, **about), visible) for part in parts)
        return tuple(itertools.chain.from_iterable(parts))
    return (term,)


def _branches(algebra: Algebra, node: Node, index: Index) -> list[tuple[tuple[Any, Index], Boolean | None]]:
    """What a masked_fill or where takes its values from, and where it does."""
    parts = [(x, broadcast_index(index, shape_exprs(tensor(x))) if _is_tensor(x) else ()) for x in node.args[:3]]
    condition = parts.pop(0 if packet(node) is aten.where else 1)
    is_set, is_not = (visible_where(algebra, Hidden(*condition, hides, ZERO)) for hides in (False, True))
    return list(zip(parts, (is_set, is_not) if packet(node) is aten.where else (is_not, is_set)))


def _not_understood(algebra: Algebra, node: Node, index: Index) -> Scores:
    """Say so if there are scores behind an unknown operation; say nothing if there are none."""
    for x in node.all_input_nodes:
        if _is_tensor(x) and tensor(x).shape == tensor(node).shape:
            try:
                read_scores(algebra, x, index)
            except NotScores as failure:
                if failure.reason is Reason.NO_PRODUCT:
                    continue
            what = "a detach or a hook" if packet(node) is aten.detach else str(node.target)
            raise NotScores(Reason.SCORE_OP, f"'{node.name}' ({what}) on the scores")
    raise NotScores


def is_low(fill: sympy.Expr) -> bool:
    """Whether a number is low enough to hide a key; NaN is not."""
    return bool(fill.is_extended_real and fill <= MASK_THRESHOLD)


def visible_where(algebra: Algebra, term: Added | Hidden) -> Boolean | None:
    """The condition under which a key stays visible, if the term is nothing but a mask; else None."""
    value = algebra.value(term.node, term.index)
    if isinstance(term, Hidden):
        condition = to_boolean(value)
        if isinstance(condition, Choice):
            return None
        return sympy.Not(condition) if term.hides else condition
    return _visible(to_number(value), term.coefficient)


def _visible(value: Value, coefficient: sympy.Expr) -> Boolean | None:
    """Where an added value is 0 (visible) rather than at most ``MASK_THRESHOLD`` (hidden)."""
    if isinstance(value, Choice):
        yes, no = _visible(value.yes, coefficient), _visible(value.no, coefficient)
        if yes is None or no is None:
            return None
        return sympy.Or(sympy.And(value.condition, yes), sympy.And(sympy.Not(value.condition), no))
    if value.is_zero:
        return TRUE
    scaled = coefficient * value
    if scaled.is_number and is_low(scaled):
        return FALSE
    return None

"""Masks and biases: each thing added to the scores or written over them as an operand, and what they prove together."""

import math

import sympy
import torch
from sympy.logic.boolalg import Boolean
from torch.fx import Node

from .algebra import Algebra, leaves, round_to, to_number
from .formulas import formula_of_condition, formula_of_value
from .indices import Index
from .layouts import NO_GRAD, layout_step, packet, tensor
from .magnitude import magnitude, may_have_gradient
from .masks import FULL, Axes, Mask, no_row_is_empty, prove
from .operands import Roles, side_operand, widens
from .reasons import Reason
from .scores import MASK_THRESHOLD, Added, Hidden, is_low, visible_where
from .spec import Empty, Formula, Operand, Rejected, Term, TermKind

aten = torch.ops.aten


def swallows_below(dtype: torch.dtype) -> float:
    """Added to a value below this in ``dtype``, a score of usual size (up to 16) is lost in the rounding."""
    return -32.0 / torch.finfo(dtype).eps


def read_terms(
    algebra: Algebra, raw: tuple[Added | Hidden, ...], roles: Roles, axes: Axes
) -> tuple[tuple[Term, ...], Mask, Empty]:
    """The terms as operands, the mask that they prove together, and what an empty row gives."""
    space = algebra.space
    terms: list[Term] = []
    kinds: list[Empty] = []
    conditions = []
    shown = [visible_where(algebra, term) for term in raw]
    least_fill = _least_fill(algebra, raw, shown)
    ordinary = _ordinary(raw, shown, least_fill)
    for position, (raw_term, condition) in enumerate(zip(raw, shown)):
        window = None
        if condition is not None:
            conditions.append(condition)
            proved = prove(space, condition, axes)
            window = proved if proved.is_window else None
            if window == FULL:
                continue
        operand = side_operand(space, raw_term.node, raw_term.index, roles)
        if isinstance(raw_term, Hidden):
            if not is_low(raw_term.fill):
                value = f"{float(raw_term.fill):g} by the time of the softmax"
                raise Rejected(Reason.FILL_VALUE, f"hidden scores are {value}, a mask has at most {MASK_THRESHOLD:g}")
            kind = TermKind.DROP if raw_term.hides else TermKind.KEEP
            # A row of nothing but fills: equal weights for the keys at its top.
            swallows = float(raw_term.fill) / 2 if raw_term.fill.is_finite else None
            formula = _formula_of_mask(algebra, condition, operand, roles, axes)
            terms.append(Term(kind, operand, window, fill=float(raw_term.fill), swallows=swallows, formula=formula))
            kinds.append(Empty.MEAN if raw_term.fill.is_finite else Empty.NAN)
            continue
        if not raw_term.coefficient.is_number:
            raise Rejected(Reason.TENSOR_SCALE, f"what is added to the scores is scaled by {raw_term.coefficient}")
        empty = _added_empty(algebra, raw_term) if condition is not None else Empty.NAN_SCORES
        kind = TermKind.MASK if condition is not None and empty is not None else TermKind.BIAS
        known = condition is not None
        swallows = None if known and empty is None else swallows_below(raw_term.dtype)
        coefficient = float(raw_term.coefficient)
        is_ordinary = position in ordinary
        if kind is TermKind.MASK:
            formula = _formula_of_mask(algebra, condition, operand, roles, axes)
        elif _is_whole(operand):
            formula = formula_of_value(algebra, raw_term.node, raw_term.index, coefficient, roles)
        else:
            formula = None
        about = dict(swallows=swallows, known=known, ordinary=is_ordinary, formula=formula)
        terms.append(Term(kind, operand, window, coefficient, **about))
        if not is_ordinary:
            kinds.append(empty or Empty.NAN_SCORES)
    mask = prove(space, sympy.And(*conditions), axes)
    if mask.nothing_visible:
        raise Rejected(Reason.EMPTY_ROWS, "every key of every query is masked")
    if not kinds or all(t.ordinary or t.window is not None for t in terms) and no_row_is_empty(mask, axes):
        return tuple(terms), mask, Empty.IMPOSSIBLE
    several = set(kinds)
    if len(several) == 1 and (len(kinds) == 1 or kinds[0] not in (Empty.MEAN, Empty.MEAN_SCORES)):
        empty = kinds[0]
    elif len(several) == 1 and len({t.fill for t in terms if not t.ordinary}) == 1 and kinds[0] is Empty.MEAN:
        empty = Empty.MEAN
    else:
        empty = _of_several(several)
    if ordinary and not _leave_empty_rows_alone(raw, ordinary, least_fill, empty):
        empty = _of_several({empty, Empty.NAN_SCORES})
    added = [t for position, t in enumerate(raw) if isinstance(t, Added) and position not in ordinary]
    if _may_overflow(algebra, [term for term in added if term.narrowed is not None]):
        raise Rejected(Reason.EMPTY_ROWS, "a sum of scores and mask is cast to a dtype in which it may overflow")
    raised = [t for t in raw if isinstance(t, Added) and t.raised is not None]
    if raised:
        hidden = {v for t, condition in zip(raw, shown) if t in raised and condition is not None
                  for v in _added_values(algebra, t)}  # fmt: skip
        if empty is not Empty.MEAN_SCORES or any(v < raised[0].raised for v in hidden):
            raise Rejected(
                Reason.EMPTY_ROWS, "masked scores are raised to a number, which a masked row then depends on"
            )
        if raised[0].halves and raised[0].raised in hidden:
            empty = Empty.RAISED
    _check_what_is_added_later(algebra, raw, ordinary)
    if empty is Empty.AS_WRITTEN:
        _check_numbers_beside_fills(algebra, raw, shown, ordinary)
    return tuple(terms), mask, empty


def _of_several(kinds: set[Empty]) -> Empty:
    """What an empty row gives that masks of these kinds hide together."""
    if kinds == {Empty.NAN_SCORES}:
        return Empty.NAN_SCORES
    return Empty.NAN_SOME if kinds <= {Empty.NAN, Empty.NAN_SCORES, Empty.NAN_SOME} else Empty.AS_WRITTEN


def _formula_of_mask(
    algebra: Algebra, condition: Boolean | None, operand: Operand, roles: Roles, axes: Axes
) -> Formula | None:
    """What a mask shows beyond the window that is proved of it."""
    if condition is None or not _is_whole(operand):
        return None
    rest = prove(algebra.space, condition, axes).rest
    return formula_of_condition(algebra, sympy.And(*rest), roles) if rest else None


def _is_whole(operand: Operand) -> bool:
    """Whether a mask or bias is a tensor with queries and keys both: of less, there is little to read."""
    return bool(operand.groups[2] and operand.groups[3])


# Beyond this a bias may be a mask that was not read as one; and the rounding of a row's log-sum-exp, on which gradients
# rely, would show.
_LARGEST_BIAS = 2048.0


def _least_fill(algebra: Algebra, raw: tuple[Added | Hidden, ...], shown: list[Boolean | None]) -> float:
    """How far below zero the masks at least put the score of a hidden key."""
    fills = [
        abs(float(value))
        for term, condition in zip(raw, shown)
        if condition is not None
        for value in ([term.fill] if isinstance(term, Hidden) else _added_values(algebra, term))
    ]
    return min(fills, default=math.inf)


def _ordinary(raw: tuple[Added | Hidden, ...], shown: list[Boolean | None], least_fill: float) -> dict[int, float]:
    """The positions of the biases too small to bring back a key that a mask hides, and how large they are."""
    sizes = {}
    for position, (term, condition) in enumerate(zip(raw, shown)):
        if isinstance(term, Added) and condition is None and term.coefficient.is_number:
            size = abs(float(term.coefficient)) * magnitude(term.node)
            if size <= min(least_fill / 4, _LARGEST_BIAS):
                sizes[position] = size
    return sizes


def _leave_empty_rows_alone(
    raw: tuple[Added | Hidden, ...], ordinary: dict[int, float], least_fill: float, empty: Empty
) -> bool:
    """Whether the ordinary biases have no part in what a row is that the masks hide all of, gradients included."""
    if any(isinstance(term, Hidden) for term in raw[: max(ordinary)]):
        return False
    if empty is not Empty.MEAN_SCORES:
        return True  # what the masks write over the scores is written over the biases
    masks = [position for position, term in enumerate(raw) if position not in ordinary and isinstance(term, Added)]
    # In the rounding of the sum that has both, as the scores are.
    sums = {p: [raw[max(p, mask)].dtype for mask in masks] for p in ordinary}
    are_lost = all(size <= least_fill * torch.finfo(dtype).eps / 4 for p, size in ordinary.items() for dtype in sums[p])
    return are_lost and not any(may_have_gradient(raw[position].node) for position in ordinary)


def _check_what_is_added_later(algebra: Algebra, raw: tuple[Added | Hidden, ...], ordinary: dict[int, float]) -> None:
    """A number that a bias is added to must swallow it, or an empty row is a softmax over the biases.

    A mask that is added to the scores swallows what comes later too, but for sums in a more precise dtype.
    """
    for position, term in enumerate(raw):
        if position in ordinary:
            continue
        added = [t for t in raw[position + 1 :] if isinstance(t, Added)]
        if isinstance(term, Hidden):
            fills = [term.fill]
        else:
            fills = _added_values(algebra, term)
            eps = torch.finfo(term.dtype).eps
            added = [t for t in added if torch.finfo(t.dtype).eps < eps and not _is_mask(algebra, t)]
        for fill in fills if added else ():
            least = min(swallows_below(t.dtype) for t in added)
            if not fill.is_number or (fill.is_finite and float(fill) > least):
                raise Rejected(Reason.EMPTY_ROWS, "something is added to hidden scores that are not low enough for it")


def _check_numbers_beside_fills(
    algebra: Algebra, raw: tuple[Added | Hidden, ...], shown: list[Boolean | None], ordinary: dict[int, float]
) -> None:  # fmt: skip
    """Of a row that masks by numbers hide all of, scores that a number was added to must lie far above those that were
    overwritten, or be lost in it: in one sum for all of the row, they are all there or none is."""
    fills = [float(t.fill) for t in raw if isinstance(t, Hidden) and t.fill.is_finite]
    lowest = 0.0
    for position, (term, condition) in enumerate(zip(raw, shown)):
        if not isinstance(term, Added) or position in ordinary:
            continue
        if condition is None:  # any number; where it counts, it should be one that scores are lost in
            if any(fill > swallows_below(term.dtype) for fill in fills):
                what = f"'{term.node.name}' may add such a number to scores as a mask writes over them ({max(fills):g})"
                raise Rejected(Reason.EMPTY_ROWS, what)
        elif _added_empty(algebra, term) is None:
            lowest += min((float(v) for v in _added_values(algebra, term) if v.is_number and v.is_finite), default=0.0)
    if any(lowest <= fill / 2 for fill in fills):
        what = f"a mask adds numbers of {lowest:g} to scores beside one that writes {max(fills):g} over them"
        raise Rejected(Reason.EMPTY_ROWS, what)


def _is_mask(algebra: Algebra, term: Added) -> bool:
    """Whether a term adds nothing but zeros and what nothing is seen beside."""
    return all(v.is_number and (not v.is_finite or is_low(v)) for v in _added_values(algebra, term))


def hides_by_infinity(algebra: Algebra, term: Added | Hidden) -> bool:
    """Whether all that a term does to the scores is to make some of them -inf."""
    if isinstance(term, Hidden):
        return term.fill == -sympy.oo
    return all(v == -sympy.oo for v in _added_values(algebra, term))


def _added_values(algebra: Algebra, term: Added) -> list[sympy.Expr]:
    """What a mask adds to the scores of hidden keys: multiplied later, it may have become infinite."""
    values = (v * term.coefficient for v in leaves(to_number(algebra.value(term.node, term.index))) if not v.is_zero)
    return [round_to(v, term.dtype) if v.is_number else v for v in values]


_LARGE_SCORE = 1e6


def _may_overflow(algebra: Algebra, terms: list[Added]) -> bool:
    """Whether a cast to a narrower dtype may make infinite what the terms and the scores, which are small, sum up to.

    Not what one tensor holds that had such a dtype before, and what is lost in the rounding beside it; scores are, but
    in float16.
    """
    unknown = 0
    for term in terms:
        about = torch.finfo(term.narrowed)
        values = _added_values(algebra, term)
        if all(v == -sympy.oo or (v.is_number and v.is_finite) for v in values):
            if any(v.is_finite and abs(float(v)) > about.max * about.eps / 4 for v in values):
                return True
            continue
        value = tensor(term.node)
        is_narrow = value.dtype.is_floating_point and torch.finfo(value.dtype).max <= about.max
        if not is_narrow or abs(float(term.coefficient)) > 1 or about.max * about.eps < _LARGE_SCORE:
            return True
        unknown += 1
    return unknown > 1


def _added_empty(algebra: Algebra, term: Added) -> Empty | None:
    """What an added mask makes of an empty row; None for an offset small enough that softmax sees the scores."""
    values = _added_values(algebra, term)
    if all(v == -sympy.oo for v in values):
        return Empty.NAN_SCORES
    if len(set(values)) == 1 and values[0].is_finite and float(values[0]) <= swallows_below(term.dtype):
        return Empty.MEAN_SCORES
    return None


def read_sink(algebra: Algebra, sink: tuple[Node, Index] | sympy.Expr, roles: Roles) -> Operand | float | None:
    """The sinks as a tensor over the heads, or as the one number that they all are; None if they are neither."""
    value = algebra.value(*sink) if isinstance(sink, tuple) else sink
    if isinstance(value, sympy.Expr) and value.is_number and value.is_finite:
        return float(value)
    heads_only = ((), (), ()), len([1 for _, size in roles.heads if size != 1])
    step: tuple[Node, Index] | None = sink
    while step is not None:
        operand = roles.group(*step, roles.q, roles.k)
        if operand is not None:
            batch, heads, rows, columns = operand.groups
            if ((batch, rows, columns), len(heads)) == heads_only:
                if not tensor(step[0]).dtype.is_floating_point:
                    break
                return operand
        node, index = step
        if node.meta.get(NO_GRAD):
            break
        is_wider = packet(node) in (aten._to_copy, aten.to) and widens(node)
        step = (node.args[0], index) if is_wider else layout_step(algebra.space, node, index)
    return None


# What is below this has no weight beside a sink, which is a parameter of usual size.
_BELOW_ANY_SINK = -1e30


def empty_beside_sink(algebra: Algebra, raw: tuple[Added | Hidden, ...], empty: Empty) -> Empty:
    """What a row of nothing but masked keys is beside a sink, which then takes all of the weight: zeros."""
    if empty is Empty.IMPOSSIBLE:
        return empty
    for term in raw:
        if isinstance(term, Hidden):
            hides = [term.fill]
        elif visible_where(algebra, term) is None:
            continue  # a bias: added as it stands
        else:
            values = leaves(to_number(algebra.value(term.node, term.index)))
            hides = [value * term.coefficient for value in values if not value.is_zero]
        if not all(value <= _BELOW_ANY_SINK for value in hides):
            raise Rejected(Reason.EMPTY_ROWS, "masked keys may still have weight beside a sink")
    return Empty.ZERO

"""AttentionSpec: the one description that the matcher writes and the planner reads.

out[b, h, q] = softmax_k(cap(scale * q[b, h, q] . k[b, h // g, k]) + bias[b, h, q, k] where visible) @ v[b, h // g]
with cap(x) = softcap * tanh(x / softcap), or a formula of x, or x itself, and g query heads to a key/value head.
"""

import dataclasses
import enum
import math

import sympy
from torch.fx import Node

from .masks import Axes, Mask
from .quantised import QuantisedResult
from .reasons import Reason


class Rejected(Exception):
    """A site that is not fused; carries the :class:`Reason` and a sentence about what was seen."""

    def __init__(self, reason: Reason, detail: str = "") -> None:
        super().__init__(f"{reason.name}: {detail or reason.sentence}")
        self.reason = reason
        self.detail = detail


@dataclasses.dataclass(frozen=True)
class Repeat:
    """An axis that a tensor does not have, of this size: it is the same all along it."""

    size: sympy.Expr


@dataclasses.dataclass(frozen=True)
class Operand:
    """A tensor of the captured graph, and how its axes become those of the canonical 4-D form.

    ``groups[i]`` lists the axes of ``node`` that, flattened in this order, are canonical axis ``i``; an empty group is
    an axis of size one. Axes of ``node`` in no group have size one or are read at position 0. Where ``node`` has axes
    in one that belong to several canonical ones (batch and heads in [B * H, S, D]), ``shape`` is what it has to be
    viewed as first, and the axes are those of that view. A mask or bias may lack some of the axes of a group.
    ``places`` are the (axis, position) of axes in no group that are read elsewhere.
    """

    node: Node
    groups: tuple[tuple[int | Repeat, ...], ...]
    shape: tuple[sympy.Expr, ...] | None = None
    places: tuple[tuple[int, int], ...] = ()


@dataclasses.dataclass(frozen=True)
class Formula:
    """A mask, a bias or what becomes of a score as `kernels/formulas.py` has it; ``tables`` are its t0, t1, ..., and
    ``bias`` is its b, if it has one: a tensor along queries and keys both."""

    text: str
    tables: tuple[Operand, ...]
    bias: Operand | None = None


class Empty(enum.Enum):
    """What the user's spelling gives a query whose every key is masked, and what its gradient is."""

    IMPOSSIBLE = "proved not to happen"
    ZERO = "zeros, as scaled_dot_product_attention gives"
    NAN = "NaN, as scores overwritten by -inf give; only v's gradient is NaN"
    NAN_SCORES = "NaN, as -inf added to the scores gives; every gradient is NaN"
    NAN_SHOWN = (
        "zeros where the mask that hides weights shows no key; else NaN, as -inf added to all that it shows gives"
    )
    NAN_SOME = "NaN, as -inf both added to the scores and written over them gives; not every gradient is NaN"
    MEAN = "the mean of v over all keys, as scores overwritten by one finite value give"
    MEAN_SCORES = (
        "the mean of v over all keys, as a huge finite value added to the scores gives; q and k still have a gradient"
    )
    RAISED = "as MEAN_SCORES, but half of the gradient ends at the number that the scores are raised to"
    AS_WRITTEN = "masks of several kinds: their sum is added to the scores just as the user's code does"


class TermKind(enum.Enum):
    BIAS = "added to the scores"
    MASK = "added to the scores, 0 where a key is visible and hugely negative where it is hidden"
    KEEP = "True where a key is visible"
    DROP = "True where a key is hidden"


@dataclasses.dataclass(frozen=True)
class Term:
    """One tensor that shapes the scores, in the order in which the user's code applies them.

    ``window`` is set where the term is nothing but a proved window, ``fill`` is what KEEP and DROP write over hidden
    scores. ``swallows`` is the value below which an added one leaves nothing of the score that it is added to, None if
    none is that low. ``known`` is whether its values are known to be 0 or those of a mask, ``ordinary`` whether a
    BIAS is known to hold nothing but numbers that no mask of this attention is moved by. ``formula`` is the bias, or
    where a mask shows what the spec's window leaves visible, if there is a formula for it.
    """

    kind: TermKind
    operand: Operand
    window: Mask | None = None
    coefficient: float = 1.0
    fill: float = -math.inf
    swallows: float | None = None
    known: bool = True
    ordinary: bool = False
    formula: Formula | None = None


@dataclasses.dataclass(frozen=True)
class Float8Operand:
    """A tensor in float8_e4m3fn that an operand is ``factor`` times, and times (divided by, if True) every scale.

    Scales have some of the operand's axes, but not head_dim.
    """

    operand: Operand
    scales: tuple[tuple[Operand, bool], ...]
    factor: float


@dataclasses.dataclass(frozen=True)
class Float8:
    """What q, k and v are dequantised from, where they all are, and the scale of the products of q and k."""

    q: Float8Operand
    k: Float8Operand
    v: Float8Operand
    scale: sympy.Expr


class Weighs(enum.Enum):
    """What is done to the weights, and so to the values or the result."""

    TIMES = "multiplied by a number or a tensor"
    OVER = "divided by it"
    HIDDEN = "zero where it is True"
    SHOWN = "zero where it is False"


Weighing = tuple[Operand | float, Weighs]


@dataclasses.dataclass(frozen=True)
class LogSumExp:
    """A node that is the log-sum-exp of the scores, and its axes as `AttentionSpec.result_axes` has the result's.

    One of size 1 that is the scores' keys is ("d",), any other of size 1 may be ().
    """

    node: Node
    axes: tuple[tuple[str, ...], ...]


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """One attention. Shapes: q [B, Hq, Sq, D], k [B, Hkv, Sk, D], v [B, Hkv, Sk, Dv]; the result is [B, Hq, Sq, Dv].

    B and Hq are each the flattened product of some axes of the captured result: ``batch`` and ``heads`` name them, with
    their sizes. ``result`` is the captured node whose value the attention is, and ``result_axes`` says of each of its
    axes which named ones it runs over ("q" and "d" are the last two canonical axes).
    """

    anchor: Node
    result: Node
    result_axes: tuple[tuple[str, ...], ...]
    batch: tuple[tuple[str, sympy.Expr], ...]
    heads: tuple[tuple[str, sympy.Expr], ...]
    q: Operand
    k: Operand
    v: Operand
    axes: Axes
    head_dim: sympy.Expr
    head_dim_v: sympy.Expr
    kv_heads: sympy.Expr
    scale: float | sympy.Expr
    mask: Mask
    mask_text: str
    terms: tuple[Term, ...]
    empty: Empty
    dropout_p: float
    form: str
    is_sdpa: bool = False
    softcap: float | None = None
    score: Formula | None = None  # in place of a soft cap
    no_score: Rejected | None = None  # what to say of it where nothing computes functions of a score
    q_factors: tuple[tuple[Operand, bool], ...] = ()  # that q is multiplied by, or divided by if True; none has keys
    v_factors: "tuple[Weighing, ...]" = ()  # none has queries
    out_factors: "tuple[Weighing, ...]" = ()  # none has keys
    shown: "Weighing | None" = None  # of Empty.NAN_SHOWN: the mask that hides weights
    float8: Float8 | None = None
    not_float8: str = ""  # why it is None although one of the operands is in 8 bits
    sinks: Operand | float | None = None  # [Hq] or all the same: one more score in every row, which has no value
    row_sinks: Operand | None = None  # likewise, but not the same for all rows of a head; only one of the two
    lse: tuple[LogSumExp, ...] = ()
    quantised: QuantisedResult | None = None
    plus: "tuple[AttentionSpec, ...]" = ()  # whose results are added to this one's, to be the ``result`` of all of them

    @property
    def batch_size(self) -> sympy.Expr:
        return sympy.Mul(*[size for _, size in self.batch])

    @property
    def q_heads(self) -> sympy.Expr:
        return sympy.Mul(*[size for _, size in self.heads])

"""Putting a fused attention into the user's Dynamo graph, in place of the node that the attention's result came from.

Operands are taken from the Dynamo graph where it holds exactly the captured value at that point; what it does not hold
(the inside of an opaque operation, a value since overwritten) is computed again from what it does hold. Everything else
stays the user's own graph, so aliasing, mutation, autocast and no_grad regions are untouched.
"""

import contextlib
import functools
import logging
import math
import operator
import re
from typing import Any, NamedTuple

import sympy
import torch
from torch.fx import Node

from . import config, ops, tracing  # noqa: F401  (registers fa3::attention)
from .capture import UNSEEN, Capture, may_write
from .patterns.indices import size_expr
from .patterns.layouts import NO_GRAD, argument, packet
from .patterns.magnitude import passes_gradient_on
from .patterns.masks import Mask, no_row_is_empty
from .patterns.reasons import Reason
from .patterns.spec import AttentionSpec, Empty, Formula, Operand, Rejected, Repeat, Term, TermKind, Weighing, Weighs
from .plan import Plan, seqlen_offset

aten = torch.ops.aten
log = logging.getLogger(__name__)


class Splicer:
    """Rewrites one graph. Every attention is spliced whole or, when that fails, not at all."""

    def __init__(self, captured: Capture) -> None:
        self.capture = captured
        self.graph = captured.source.graph
        values = (n.meta.get("val") for n in captured.view.graph.find_nodes(op="placeholder"))
        self.mode = tracing.mode_of(values) or contextlib.nullcontext()
        self._rebuilt: dict[Node, dict[Node, Node]] = {}  # Dynamo node -> {captured node: its replacement}
        self._removed: set[Node] = set()
        inputs = (n.meta.get("example_value") for n in captured.source.graph.find_nodes(op="placeholder"))
        wants_gradient = any(isinstance(x, torch.Tensor) and x.requires_grad for x in inputs)
        self.trains = wants_gradient and any(captured.grad_modes.values())

    def splice(
        self, spec: AttentionSpec, plans: tuple[Plan, ...], interior: tuple[Node, ...], is_shared: bool
    ) -> tuple[tuple[str, str, str], bool]:
        """Compute ``spec``, and what is added to it, where its result was computed, each by its plan.

        Returns the formulas of its bias, mask and score, and whether its result is written in 8 bits.

        What is left without a use of the ``interior`` goes, writes in place included, unless it ``is_shared``: others
        may read what was written.

        Raises:
            Rejected: the attention cannot be taken out of the user's graph; the graph is as it was.
        """
        place = self.capture.origin(spec.result)
        if place is None:
            raise Rejected(Reason.OPAQUE, f"'{spec.result.name}' comes from no operation of the graph")
        of_lse = [self._place_of_lse(spec, x.node) for x in spec.lse]
        if spec.is_sdpa and plans[0].target == "sdpa" and not _simplifies(spec):
            return ("", "", ""), False
        if place.kwargs.get("out") is not None:
            raise Rejected(Reason.OPAQUE, f"'{place.name}' writes its result into a tensor of the user's (out=)")
        values = dict(self._rebuilt.get(place, {}))
        emit = _Emitter(self.capture, min((place, *of_lse)), values, self.mode, self.trains)
        if emit.trains:
            self._check_grad_mode(place, interior)
        try:
            formulas = self._rounded(emit, place, spec, plans[0]) if plans[0].rounds else None
            is_rounded = formulas is not None
            if not is_rounded:
                out, lse, formulas = self._computed(emit, spec, plans[0])
                for other, plan in zip(spec.plus, plans[1:], strict=True):
                    out = emit.call(operator.add, out, self._computed(emit, other, plan)[0])
                if emit.trains and self.capture.is_written_after(place, place):
                    # A product does not keep its result for the backward; an attention does.
                    out = emit.call("clone", out)
                values[spec.result] = out
                self._replace(emit, place, spec)
            for x, old in zip(spec.lse, of_lse):
                old.replace_all_uses_with(_restore(emit, lse, spec, x.node, x.axes), propagate_meta=False)
        except Exception:
            emit.undo()
            raise
        self._rebuilt[place] = values
        if not is_shared:
            self._removed.update(n for value in interior for n in self.capture.held_by(value))
        return formulas, is_rounded

    def _rounded(
        self, emit: "_Emitter", place: Node, spec: AttentionSpec, plan: Plan
    ) -> tuple[str, str, str] | None:  # fmt: skip
        """Compute ``spec`` in 8 bits where its result was computed, in place of what rounds it later.

        Returns the formulas of its bias, mask and score, or None, with the graph as it was, if that is not possible.
        """
        found = spec.quantised
        last = self.capture.origin(found.node)
        if last is None or any(self.capture.outputs(n) is not x for n, x in ((place, spec.result), (last, found.node))):
            return None
        values = dict(emit.values)
        try:
            out, _, formulas = _attention(emit, spec, plan, _out_scale(emit, spec))
            out = _restore(emit, out, spec, spec.result, spec.result_axes, fake_value(out).dtype)
            for move in found.moves:
                target = aten.reshape.default if packet(move) in (aten.view, aten._unsafe_view) else move.target
                rest, kwargs = torch.fx.map_arg((move.args[1:], move.kwargs), emit.materialise)
                out = emit.call(target, out, *rest, **kwargs)
            out = _settled(emit, out, found.node.meta["val"].stride())
        except (Rejected, RuntimeError, ValueError) as failure:
            log.info("the result of %s is not written in 8 bits: %s", place.name, failure)
            emit.undo()
            emit.values.clear()
            emit.values.update(values)
            return None
        emit.values[found.node] = out
        last.replace_all_uses_with(out, propagate_meta=False)
        self._removed.update(n for value in (spec.result, *found.between) for n in self.capture.held_by(value))
        return formulas

    def _computed(
        self, emit: "_Emitter", spec: AttentionSpec, plan: Plan
    ) -> tuple[Node, Node | None, tuple[str, str, str]]:
        out, *more = _attention(emit, spec, plan)
        return _restore(emit, _weighed(emit, out, spec.out_factors), spec, spec.result, spec.result_axes), *more

    def _place_of_lse(self, spec: AttentionSpec, lse: Node) -> Node:
        """Where the log-sum-exp of the scores was computed; the attention has to be, by then."""
        origin = self.capture.origin(lse)
        if origin is None or self.capture.outputs(origin) is not lse:
            raise Rejected(Reason.OPAQUE, f"'{lse.name}' is inside of an operation of the graph")
        for x in (spec.q, spec.k, spec.v):
            if self.capture.find(x.node, origin) is None:
                what = f"'{lse.name}' is their log-sum-exp, and is used before there is a '{x.node.name}'"
                raise Rejected(Reason.SCORES_USED, what)
        return origin

    def _check_grad_mode(self, place: Node, interior: tuple[Node, ...]) -> None:
        """The gradient of the fused attention is that of the user's only if all of it is under one grad mode."""
        result = interior[-1].meta.get(NO_GRAD, False)
        for value in interior:
            if value.meta.get(NO_GRAD, False) != result:
                raise Rejected(Reason.GRAD_MODE, f"'{value.name}' and '{place.name}' are in different grad modes")

    def _replace(self, emit: "_Emitter", place: Node, spec: AttentionSpec) -> None:
        """Give every user of ``place`` the values computed from the new attention."""
        outputs = self.capture.outputs(place)
        result = emit.values[spec.result]
        if isinstance(outputs, tuple):
            dead = {r: _dead_code(r) for r in place.users}
            readers = [r for r in place.users if dead[r] is None]
            if not all(r.target is operator.getitem and isinstance(r.args[1], int) for r in readers):
                raise Rejected(Reason.OPAQUE, f"the results of '{place.name}' are used as a whole")
            self._settle_layout(emit, spec)
            replaced = [(r, emit.materialise(outputs[r.args[1]])) for r in readers if outputs[r.args[1]] is not None]
            self._removed.update(n for nodes in dead.values() if nodes is not None for n in nodes)
        elif outputs is None:
            raise Rejected(Reason.OPAQUE, f"what '{place.name}' returns is not understood")
        else:
            if outputs is not spec.result or _depends_on_strides(place, fake_value(result), self.mode):
                self._settle_layout(emit, spec)
            replaced = [(place, emit.materialise(outputs))]
        for old, new in replaced:
            old.replace_all_uses_with(new, propagate_meta=False)
        self._removed.add(place)

    def _settle_layout(self, emit: "_Emitter", spec: AttentionSpec) -> None:
        """Let the result lie in memory as that of the user's code does, on which what follows may depend."""
        emit.values[spec.result] = _settled(emit, emit.values[spec.result], spec.result.meta["val"].stride())

    def finish(self) -> None:
        """Remove what the attentions left without a use. Nothing that writes in place outside them is touched."""
        ancestors = set(self._removed)
        for node in reversed(list(self.graph.nodes)):
            if node not in ancestors or node.users or node.op in ("placeholder", "output"):
                continue
            if node in self._removed or not may_write(node):
                ancestors.update(node.all_input_nodes)
                self.graph.erase_node(node)
        self.graph.lint()
        self.capture.source.recompile()


def _settled(emit: "_Emitter", x: Node, strides: tuple[int, ...]) -> Node:
    """x, or a copy of it, with its axes in the order in memory that such strides have."""
    if fake_value(x).stride() == strides:
        return x
    order = sorted(range(len(strides)), key=lambda axis: -strides[axis])
    back = [order.index(axis) for axis in range(len(strides))]
    dense = emit.call(aten.clone.default, emit.call("permute", x, *order), memory_format=torch.contiguous_format)
    return emit.call("permute", dense, *back)


def _out_scale(emit: "_Emitter", spec: AttentionSpec) -> Node:
    """What the result is multiplied by before it is rounded to 8 bits, float32 [1]."""
    device = spec.q.node.meta["val"].device
    scale = emit.call(torch.full, (1,), spec.quantised.factor, dtype=torch.float32, device=device)
    for factor, inverse in spec.quantised.scales:
        number = emit.call("reshape", emit.call("to", emit.materialise(factor), device, torch.float32), 1)
        scale = emit.call(operator.truediv if inverse else operator.mul, scale, number)
    return scale


def _simplifies(spec: AttentionSpec) -> bool:
    """Whether an SDPA call gains from being written again: its mask tensor is proved to be causal or nothing at all."""
    has_mask = argument(spec.anchor, 3, "attn_mask") is not None
    return has_mask and all(t.window is not None for t in spec.terms) and _is_plain(spec.mask)


def _is_plain(mask: Mask) -> bool:
    return mask.window_left is None and mask.window_right in (None, 0)


def _dead_code(node: Node) -> set[Node] | None:
    """``node`` and everything computed from it, if none of that is of any use; the capture has left it out then."""
    found, pending = set(), [node]
    while pending:
        node = pending.pop()
        if node.op == "output" or may_write(node):
            return None
        if node not in found:
            found.add(node)
            pending += node.users
    return found


class _Emitter:
    """Adds nodes to the Dynamo graph before one place, with fake values, and can take them out again."""

    def __init__(self, captured: Capture, place: Node, values: dict[Node, Node], mode: Any, trains: bool) -> None:
        self.capture = captured
        self.place = place
        self.values = values
        self.mode = mode
        self.added: list[Node] = []
        self.trains = trains

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        graph = self.place.graph
        with graph.inserting_before(self.place):
            if isinstance(target, str):
                node = graph.call_method(target, args, kwargs)
            else:
                node = graph.call_function(target, args, kwargs)
        self.added.append(node)
        node.meta = {k: v for k, v in self.place.meta.items() if k not in ("example_value", _FAKE)}
        fake_args, fake_kwargs = torch.fx.map_arg((args, kwargs), fake_value)
        with self.mode, torch.no_grad():
            function = getattr(fake_args[0], target) if isinstance(target, str) else target
            positional = fake_args[1:] if isinstance(target, str) else fake_args
            node.meta["example_value"] = node.meta[_FAKE] = function(*positional, **fake_kwargs)
        return node

    def undo(self) -> None:
        while self.added:
            self.place.graph.erase_node(self.added.pop())

    def materialise(self, value: Node) -> Node:
        """A node of the Dynamo graph that computes the captured ``value``, at this place."""
        if value in self.values:
            return self.values[value]
        if value._erased:
            raise Rejected(Reason.OPAQUE, f"'{value.name}' leads to nothing and was not captured")
        held = self.capture.find(value, self.place)
        if held is None:
            held = self._compute_again(value)
        elif self.trains and self.capture.is_written_after(held, self.place):
            # It is kept for the backward; the user's code may have kept a copy.
            held = self.call("clone", held)
        held.meta[_FAKE] = value.meta.get("val")
        self.values[value] = held
        return held

    def _compute_again(self, value: Node) -> Node:
        if value.op == "placeholder":
            source = self.capture.inputs.get(value)
            if source is not None and not isinstance(value.meta.get("val"), torch.Tensor):
                return source
            if value in self.capture.wrapped:
                source, path = self.capture.wrapped[value]
                if not self.capture.is_written(source, self.place):
                    return functools.reduce(lambda x, name: self.call(getattr, x, name), path, source)
            raise Rejected(
                Reason.MUTATED, f"'{getattr(source, 'name', value.name)}' is written to before the attention"
            )
        if value.op == "get_attr":
            return self._attribute(value)
        # (detach also stands for what capture hides.)
        if value.op != "call_function" or packet(value) in (aten.detach, getattr(torch.ops.fa3, UNSEEN)):
            raise Rejected(Reason.OPAQUE, f"'{value.name}' cannot be computed again")
        random = (
            isinstance(value.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in value.target.tags
        )
        if random and self.capture.origin(value) is not self.place:
            raise Rejected(Reason.OPAQUE, f"'{value.name}' ({value.target}) is random and cannot be computed again")
        args, kwargs = torch.fx.map_arg((value.args, value.kwargs), self.materialise)
        return self.call(value.target, *args, **kwargs)

    def _attribute(self, value: Node) -> Node:
        source = self.capture.source
        name = f"_fa3_constant_{value.target.replace('.', '_')}"
        tensor = self.capture.view
        for part in value.target.split("."):
            tensor = getattr(tensor, part)
        source.register_buffer(name, tensor, persistent=False)
        with source.graph.inserting_before(self.place):
            node = source.graph.get_attr(name)
        self.added.append(node)
        node.meta["example_value"] = value.meta["val"]
        return node

    def operand(self, operand: Operand) -> Node:
        """The operand in its canonical 4-D form, as a view wherever strides allow."""
        x = self.materialise(operand.node)
        if operand.shape is not None:
            x = self._split_axes(x, operand.node.meta["val"].shape, operand.shape)
        shape = fake_value(x).shape
        if len(shape) == 4 and all(g in ((i,), ()) for i, g in enumerate(operand.groups)):
            if all(g or is_one(shape[i]) for i, g in enumerate(operand.groups)):
                return x
        axes, places = list(range(len(shape))), dict(operand.places)
        members = [a for group in operand.groups for a in group]
        wanted = [a for a in members if not isinstance(a, Repeat)]
        for axis in reversed(range(len(shape))):
            if axis not in wanted:
                x = self.call("select", x, axis, places.get(axis, 0))
                axes.remove(axis)
        order = [axes.index(a) for a in wanted]
        if order != sorted(order):
            x = self.call("permute", x, *order)
        for position, member in enumerate(members):
            if isinstance(member, Repeat):
                if not member.size.is_number:
                    raise Rejected(Reason.LAYOUT, f"'{operand.node.name}' would be repeated a symbolic number of times")
                x = self.call("unsqueeze", x, position)
                sizes = [-1] * len(fake_value(x).shape)
                sizes[position] = int(member.size)
                x = self.call("expand", x, *sizes)
        for position, group in reversed(list(enumerate(operand.groups))):
            start = sum(len(g) for g in operand.groups[:position])
            if not group:
                x = self.call("unsqueeze", x, start)
            elif len(group) > 1:
                x = self.call("flatten", x, start, start + len(group) - 1)
        return x

    def _split_axes(self, x: Node, old: torch.Size, new: tuple[sympy.Expr, ...]) -> Node:
        """A view of x with every axis that became several of ``new`` as these."""
        position = len(new)
        for axis in reversed(range(len(old))):
            size, parts = size_expr(old[axis]), []
            while sympy.expand(sympy.Mul(*parts) - size) != 0 or not parts:
                position -= 1
                parts.insert(0, new[position])
            if len(parts) > 1:
                sizes = [int(part) if part.is_number else -1 for part in parts]
                if sizes.count(-1) > 1:
                    raise Rejected(Reason.LAYOUT, "two symbolic sizes share one axis")
                x = self.call("unflatten", x, axis, tuple(sizes))
        return x

    def size(self, x: Node, dim: int) -> Any:
        size = fake_value(x).shape[dim]
        return size if isinstance(size, int) else self.call("size", x, dim)


# Dynamo's own example values of intermediate nodes belong to a fake mode that is gone when a backend runs, so a node
# that the pass reads or makes carries the value from the capture.
_FAKE = "fa3_fake_value"


def fake_value(node: Any) -> Any:
    return node.meta.get(_FAKE, node.meta.get("example_value")) if isinstance(node, Node) else node


def is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


# --------------------------------------------------------------------------------------------- the attention

_AS_WRITTEN = (Empty.AS_WRITTEN, Empty.RAISED)


def _attention(
    emit: _Emitter, spec: AttentionSpec, plan: Plan, out_scale: Node | None = None
) -> tuple[Node, Node | None, tuple[str, str, str]]:
    """The attention's result as [B, Hq, Sq, Dv], in 8 bits if there is a scale for that, the log-sum-exp of its scores
    as [B, Hq, Sq, 1], if these have a use, and the formulas of its bias, mask and score, "" for none."""
    if plan.empty is Empty.AS_WRITTEN and emit.trains:
        _check_gradients(spec)
    q, k, v = (emit.operand(x) for x in (spec.q, spec.k, spec.v))
    q, k, v = _expand_batch(emit, spec, (q, k, v))
    q = _weighed(emit, q, tuple((x, Weighs.OVER if inverse else Weighs.TIMES) for x, inverse in spec.q_factors))
    v = _weighed(emit, v, spec.v_factors)
    scale = _scale(emit, spec, q)
    if spec.scale.is_negative:  # fused kernels take the largest product for the largest score
        q, scale = emit.call(operator.neg, q), -scale
    exact = plan.empty in (Empty.IMPOSSIBLE, Empty.ZERO)
    biased = any(t.kind is TermKind.BIAS and not t.ordinary for t in spec.terms) or plan.empty in _AS_WRITTEN
    # Where a row is empty, what a bias makes of it depends on every term of the user's sum. (In a call of SDPA, its
    # gradients do: the log-sum-exp of a row that is -1e9 all along has no room for the number of its keys.)
    whole = biased and (not exact or (spec.is_sdpa and emit.trains and config.empty_rows == "exact"))
    has_sinks = spec.sinks is not None or spec.row_sinks is not None
    whole = whole or (biased and emit.trains and has_sinks)  # (nor of one that is 1e9)
    by_window = all(t.window is not None for t in spec.terms)
    texts, row_lse = ("", "", ""), None
    if plan.target == "sdpa":
        by_window = by_window and _is_plain(spec.mask)
        bias = mask = row_seen = absorbed = None
        if not by_window:
            q, bias, mask, row_seen, absorbed, _ = _shape_scores(emit, spec, plan, q, spec.terms, whole)
        if absorbed is not None:
            q, k = _absorbing(emit, spec, q, k, absorbed, plan.empty is Empty.RAISED)
        if bias is not None and mask is not None:
            mask = emit.call(torch.where, mask, bias, -math.inf)
        elif bias is not None:
            mask = bias
        gqa = {"enable_gqa": True} if spec.kv_heads != spec.q_heads else {}
        out = emit.call(
            torch.nn.functional.scaled_dot_product_attention,
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=spec.dropout_p,
            is_causal=mask is None and spec.mask.window_right == 0,
            scale=scale,
            **gqa,
        )
    else:
        as_tensors = spec.terms if whole else tuple(t for t in spec.terms if t.window is None)
        as_tensors, formulas = _formulas(emit, spec.score, as_tensors, fake_value(q).device, whole)
        texts = formulas[:3] or texts
        q, bias, mask, row_seen, absorbed, lift = _shape_scores(emit, spec, plan, q, as_tensors, whole)
        softcap = spec.softcap
        if spec.score is not None and spec.score.bias is not None:
            if bias is not None:
                raise Rejected(spec.no_score.reason, f"{spec.no_score.detail}; a bias beside one inside of that")
            bias = emit.call("detach", emit.operand(spec.score.bias))
        if absorbed is not None:
            formulas, softcap = _absorbing_formulas(emit, spec, formulas, absorbed, plan.empty is Empty.RAISED), None
        left = right = None
        if not whole:
            left = _window_edge(emit, spec, spec.mask.window_left, -1, q, k)
            right = _window_edge(emit, spec, spec.mask.window_right, 1, q, k)
        sinks = None
        if isinstance(spec.sinks, float):
            like = dict(dtype=torch.float32, device=fake_value(q).device)
            sinks = emit.call(torch.full, (emit.size(q, 1),), spec.sinks, **like)
        elif spec.sinks is not None:
            sinks = emit.call("reshape", emit.operand(spec.sinks), -1)
        seed = None
        if spec.dropout_p:  # from torch's own generator; kept for the backward, as any other operand is
            device = fake_value(q).device
            seed = emit.call(torch.randint, 0, 2**63 - 1, (1,), dtype=torch.int64, device=device)
        asked = config.deterministic_backward or torch.are_deterministic_algorithms_enabled()
        in_order = emit.trains and asked
        shaping = (bias, mask, scale, left, right, plan.target)
        if plan.fp8 == "graph":
            dtype = torch.float16 if fake_value(q).dtype == torch.float16 else torch.bfloat16
            operands = _float8_operands(emit, spec)
            shaping = (bias, mask, abs(float(spec.float8.scale)), left, right, plan.target, dtype)
            options = (softcap, sinks, out_scale, *formulas)
            pair = emit.call(torch.ops.fa3.attention_fp8.default, *operands, *shaping, *options)
        elif plan.fp8:
            options = (config.fp8_incoherent_seed, softcap, sinks, in_order, out_scale)
            pair = emit.call(torch.ops.fa3.attention_quantised.default, q, k, v, *shaping, *options, *formulas)
        else:
            options = (softcap, sinks, seed, spec.dropout_p, in_order, out_scale, *formulas)
            pair = emit.call(torch.ops.fa3.attention.default, q, k, v, *shaping, *options)
        out = emit.call(operator.getitem, pair, 0)
        if spec.lse or spec.row_sinks is not None or (not exact and not biased):
            lse = emit.call("unsqueeze", emit.call(operator.getitem, pair, 1), -1)
            row_lse = lse if lift is None else _lifted_back(emit, lse, lift)
            if not exact and not biased:
                row_seen = emit.call(operator.ne, lse, -math.inf)  # NaN has seen something
        if spec.row_sinks is not None:
            dtype = fake_value(out).dtype
            above = emit.call(operator.sub, row_lse, emit.call("float", emit.operand(spec.row_sinks)))
            share = emit.call("sigmoid", above)  # of the keys in the sum of all weights
            out = emit.call("to", emit.call(operator.mul, emit.call("float", out), share), dtype)
    if row_seen is not None and plan.empty not in (Empty.IMPOSSIBLE, Empty.ZERO):
        out = _with_empty_rows(emit, spec, plan, out, (q, k, v), row_seen, scale)
    return out, row_lse, texts


def _weighed(emit: _Emitter, x: Node, factors: tuple[Weighing, ...]) -> Node:
    """x times every factor: in float32, for the gradient of a factor, which sums up much of x."""
    dtype = fake_value(x).dtype
    for factor, kind in factors:
        number = factor if isinstance(factor, float) else emit.operand(factor)
        if kind in (Weighs.HIDDEN, Weighs.SHOWN):
            hidden = number if fake_value(number).dtype == torch.bool else emit.call("bool", number)
            hidden = emit.call(torch.logical_not, hidden) if kind is Weighs.SHOWN else hidden
            x = emit.call("masked_fill", x, hidden, 0.0)
        else:
            x = emit.call(operator.truediv if kind is Weighs.OVER else operator.mul, emit.call("float", x), number)
    return x if fake_value(x).dtype == dtype else emit.call("to", x, dtype)


def _formulas(
    emit: _Emitter, score: Formula | None, terms: tuple[Term, ...], device: torch.device, as_tensors: bool
) -> tuple[tuple[Term, ...], tuple[Any, ...]]:
    """The terms that have to be tensors (all of them if ``as_tensors``), and the operators' last arguments.

    Those are what the other terms are, and what becomes of a score: formulas and tables.
    """
    tables: dict[Operand, Node] = {}
    score_text = ""
    if score is not None:
        tables = _tables(emit, score, device)
        if tables is None or len(tables) > ops.MAX_TABLES:
            what = (
                f"one with {len(score.tables)} tensors in it" if tables else "with tensors that are not there any more"
            )
            raise Rejected(Reason.SCORE_OP, f"a function of the scores, {what}")
        score_text = _renumbered(score.text, [list(tables).index(table) for table in score.tables])
    if as_tensors:
        return terms, ("", "", score_text, *tables.values()) if score_text else ()
    texts: dict[bool, list[str]] = {True: [], False: []}  # of biases, and of masks
    rest = []
    for term in sorted(terms, key=lambda t: t.kind is not TermKind.BIAS):  # their tables come first
        is_bias, formula = term.kind is TermKind.BIAS, term.formula
        learned = is_bias and emit.trains and passes_gradient_on(term.operand.node)
        more = None if formula is None or learned else _tables(emit, formula, device)
        if more is None or len(tables | more) > ops.MAX_TABLES:
            rest.append(term)
            continue
        tables |= {table: node for table, node in more.items() if table not in tables}
        order = list(tables)
        texts[is_bias].append(_renumbered(formula.text, [order.index(table) for table in formula.tables]))
    if not any(texts.values()) and not score_text:
        return terms, ()
    bias = " + ".join(f"({text})" for text in texts[True]) if len(texts[True]) > 1 else "".join(texts[True])
    mask = " & ".join(f"({text})" for text in texts[False]) if len(texts[False]) > 1 else "".join(texts[False])
    return tuple(rest), (bias, mask, score_text, *tables.values())


def _tables(emit: _Emitter, formula: Formula, device: torch.device) -> dict[Operand, Node] | None:
    """The tables of a formula in the graph; None if one is on another device, or is no longer there."""
    if any(table.node.meta["val"].device != device for table in formula.tables):
        return None
    try:
        nodes = {table: emit.operand(table) for table in formula.tables}
    except Rejected:
        return None
    return {t: emit.call("detach", x) if fake_value(x).is_floating_point() else x for t, x in nodes.items()}


def _renumbered(formula: str, numbers: list[int]) -> str:
    return re.sub(r"\bt(\d+)\b", lambda name: f"t{numbers[int(name[1])]}", formula)


def _float8_operands(emit: _Emitter, spec: AttentionSpec) -> list[Node]:
    """q, k and v in 8 bits, and the scale of each as float32 that broadcasts to [B, heads, rows]."""
    parts = [spec.float8.q, spec.float8.k, spec.float8.v]
    tensors = _expand_batch(emit, spec, tuple(emit.operand(x.operand) for x in parts))
    device, scales = fake_value(tensors[0]).device, []
    for x in parts:
        is_q = x is spec.float8.q
        sign = -1 if is_q and spec.float8.scale.is_negative else 1
        scale = emit.call(torch.full, (1, 1, 1, 1), sign * x.factor, dtype=torch.float32, device=device)
        for factor, inverse in (*x.scales, *(spec.q_factors if is_q else ())):
            number = emit.call("to", emit.operand(factor), device, torch.float32)
            scale = emit.call(operator.truediv if inverse else operator.mul, scale, number)
        scales.append(emit.call("select", scale, -1, 0))
    return [*tensors, *scales]


def _expand_batch(emit: _Emitter, spec: AttentionSpec, qkv: tuple[Node, Node, Node]) -> list[Node]:
    """q, k and v with one batch size; a mask may have brought it."""
    if spec.batch_size == 1:
        return list(qkv)
    whole = next((x for x in qkv if not is_one(fake_value(x).shape[0])), None)
    if whole is None and not spec.batch_size.is_number:
        raise Rejected(Reason.LAYOUT, "only the mask has the batch axis, and its size is symbolic")
    size = int(spec.batch_size) if whole is None else emit.size(whole, 0)
    return [emit.call("expand", x, size, -1, -1, -1) if is_one(fake_value(x).shape[0]) else x for x in qkv]


def _scale(emit: _Emitter, spec: AttentionSpec, q: Node) -> Any:
    if spec.scale.is_number:
        return float(spec.scale)
    if sympy.simplify(spec.scale * sympy.sqrt(spec.head_dim)) == 1:
        return emit.call(operator.pow, emit.size(q, 3), -0.5)
    raise Rejected(Reason.TENSOR_SCALE, f"the scale is {spec.scale}")


def _window_edge(emit: _Emitter, spec: AttentionSpec, edge: sympy.Expr | None, slope: int, q: Node, k: Node) -> Any:
    if edge is None:
        return None
    offset = seqlen_offset(spec, edge, slope)
    if offset is None:
        raise Rejected(Reason.LAYOUT, f"the window's edge is {edge}")
    number, relative = offset
    if not relative:
        return number
    sizes = (emit.size(k, 2), emit.size(q, 2))
    difference = emit.call(operator.sub, *sizes[::slope])
    return emit.call(operator.add, difference, number) if number else difference


class _Shaped(NamedTuple):
    """What shapes the scores: one sum, one condition (True: visible), which queries see a key (``row_seen``), of which
    the sum leaves nothing of the scores, though these have a gradient (``absorbed``), and what is missing to a row's
    sums (``lift``)."""

    q: Node
    bias: Node | None
    mask: Node | None
    row_seen: Node | None
    absorbed: Node | None = None
    lift: Node | None = None


def _shape_scores(
    emit: _Emitter, spec: AttentionSpec, plan: Plan, q: Node, terms: tuple[Term, ...], lifts: bool
) -> _Shaped:
    """``terms`` as one sum and one condition; with ``lifts``, rows of very low sums are lifted."""
    bias = mask = None
    as_written = plan.empty in _AS_WRITTEN
    for term in terms:
        x = emit.operand(term.operand)
        if term.kind is TermKind.BIAS or (term.kind is TermKind.MASK and as_written):
            x = x if fake_value(x).is_floating_point() else emit.call("float", x)
            x = x if term.coefficient == 1 else emit.call(operator.mul, x, term.coefficient)
            bias = x if bias is None else emit.call(operator.add, bias, x)
            continue
        if term.kind is TermKind.MASK:
            x = emit.call(operator.eq, x, 0)
        elif fake_value(x).dtype != torch.bool:
            x = emit.call("bool", x)
        if term.kind is TermKind.DROP:
            x = emit.call(torch.logical_not, x)
        if as_written:
            fill = term.fill
            if bias is not None and math.isfinite(fill):  # of float32, it may be infinite in the bias' dtype
                fill = max(fill, torch.finfo(fake_value(bias).dtype).min)
            bias = emit.call(torch.where, x, 0.0 if bias is None else bias, fill)
        else:
            mask = x if mask is None else emit.call(torch.logical_and, mask, x)
    if bias is None or not lifts:
        needs_rows = plan.empty not in (Empty.IMPOSSIBLE, Empty.ZERO)
        seen = emit.call("any", mask, -1, keepdim=True) if mask is not None and needs_rows else None
        return _Shaped(q, None if bias is None else _as_mask_dtype(emit, spec, plan, bias, q), mask, seen)
    masked = emit.call("detach", bias if mask is None else emit.call(torch.where, mask, bias, -math.inf))
    top = emit.call("amax", masked, -1, keepdim=True)
    # A row far from zero (a finite mask over all its keys) loses the scores in the rounding of its log-sum-exp, on
    # which the backward relies. Softmax ignores an offset, so the row is lifted.
    # Beside a sink, it is lowered if it is high, but not so far that the sink would count.
    is_far = emit.call(operator.gt, top if spec.sinks is not None else emit.call("abs", top), _FAR)
    lift = emit.call(torch.where, is_far, top, 0.0)
    swallows, absorbed = [t.swallows for t in spec.terms if t.swallows is not None], None
    if swallows:
        # Farther still and it swallows its scores: equal weights for the keys at its top. Zero queries give the same.
        swallowed = emit.call(operator.lt, top, max(swallows))
        if any(map(_absorbs, terms)):
            high = -max(t.swallows for t in terms if _absorbs(t))
            swallowed = emit.call(torch.logical_or, swallowed, emit.call(operator.gt, top, high))
        swallowed = emit.call(torch.logical_and, swallowed, emit.call("isfinite", top))
        # (What is written over the scores ends their gradient, what is added to them does not.)
        if spec.score is not None or (emit.trains and any(map(_absorbs, terms))):
            absorbed = swallowed
        else:
            q = emit.call("masked_fill", q, swallowed, 0.0)
        below_top = emit.call(torch.logical_and, swallowed, emit.call(operator.lt, masked, top))
        bias = emit.call("masked_fill", bias, below_top, -math.inf)
    row_seen = emit.call(operator.gt, top, -math.inf)
    lift = emit.call("masked_fill", lift, emit.call(torch.logical_not, emit.call("isfinite", top)), 0.0)
    bias = emit.call(operator.sub, bias, lift)
    if spec.sinks is not None:
        bias = emit.call(operator.add, bias, emit.call(torch.where, is_far, _FAR, 0.0))
    return _Shaped(q, _as_mask_dtype(emit, spec, plan, bias, q), mask, row_seen, absorbed, lift)


def _lifted_back(emit: _Emitter, lse: Node, lift: Node) -> Node:
    """The log-sum-exp of rows that were lifted."""
    row_lse = emit.call(operator.add, lse, lift)
    if not emit.trains:
        return row_lse
    # Far from zero it has no room for the number of keys, whose gradients eager then does not divide by it.
    seen = emit.call("masked_fill", lse, emit.call(operator.eq, lse, -math.inf), 0.0)
    room = emit.call(operator.sub, emit.call(operator.add, seen, lift), lift)
    lost = emit.call("detach", emit.call(torch.expm1, emit.call(operator.sub, seen, room)))
    more = emit.call(operator.mul, seen, lost)
    return emit.call(operator.add, row_lse, emit.call(operator.sub, more, emit.call("detach", more)))


def _absorbs(term: Term) -> bool:
    """Whether a term is added to the scores and may leave nothing of them in the sum."""
    return term.kind in (TermKind.BIAS, TermKind.MASK) and term.swallows is not None and not term.ordinary


def _overwrites(term: Term) -> bool:
    return term.kind in (TermKind.KEEP, TermKind.DROP) and math.isfinite(term.fill)


def _check_gradients(spec: AttentionSpec) -> None:
    """Where -inf is written over all of a row, eager has a NaN in no gradient but that of v; here all have it."""
    written = [t for t in spec.terms if t.kind in (TermKind.KEEP, TermKind.DROP) and t.fill == -math.inf]
    window = Mask(spec.mask.window_left, spec.mask.window_right, ())
    if written and not (all(t.window is not None for t in written) and no_row_is_empty(window, spec.axes)):
        what = "masks of several kinds, one of which writes -inf over the scores, in training"
        raise Rejected(Reason.EMPTY_ROWS, f"{what}; config.empty_rows = 'relaxed' accepts zeros there")


_SEVERAL = "masks of several kinds, some added to the scores and some written over them, in training"


def _absorbing(
    emit: _Emitter, spec: AttentionSpec, q: Node, k: Node, absorbed: Node, halved: bool
) -> tuple[Node, Node]:
    """q and k of twice the head_dim, whose products are zero for absorbed queries, with the gradient of the products
    (half of it if ``halved``).

    There q has its own place in the half where k is zero, and k is as it was where q is zero; each zero is a difference
    that hands its gradient on.
    """
    if any(map(_overwrites, spec.terms)):
        raise Rejected(Reason.EMPTY_ROWS, f"{_SEVERAL}; config.empty_rows = 'relaxed' accepts zeros there")
    lost = emit.call(torch.where, absorbed, emit.call("detach", q), 0.0)
    if halved:
        half = emit.call(operator.mul, q, 0.5)
        q = emit.call(torch.where, absorbed, emit.call(operator.add, half, emit.call("detach", half)), q)
    q = emit.call(operator.sub, q, lost)
    q = emit.call(torch.cat, [q, emit.call(operator.mul, lost, 0.5) if halved else lost], -1)
    zero = emit.call(operator.sub, k, emit.call("detach", k))
    return q, emit.call(torch.cat, [k, zero], -1)


def _absorbing_formulas(emit: _Emitter, spec: AttentionSpec, formulas: tuple, absorbed: Node, halved: bool) -> tuple:
    """The operators' last arguments, with scores that are zero for absorbed queries, and have their gradient there, or
    half of it."""
    bias, mask, score, *tables = formulas or ("", "", "")
    if len(tables) >= ops.MAX_TABLES:
        raise Rejected(Reason.SCORE_OP, f"a function of the scores, one with {len(tables)} tensors in it")
    text = score or ("s" if spec.softcap is None else f"{spec.softcap!r} * tanh(s / {spec.softcap!r})")
    added, written = any(map(_absorbs, spec.terms)), [t for t in spec.terms if _overwrites(t)]
    condition = f"t{len(tables)} != 0"
    text = f"where({condition}, 0.5 * ({text}), {text})" if halved and emit.trains else text
    text = f"absorb({condition}, {text})" if added else f"where({condition}, 0.0, {text})"
    for term in written if added and emit.trains else ():
        text = f"where({_hidden(term)}, 0.0, {text})"
    return bias, mask, text, *tables, absorbed


def _hidden(term: Term) -> str:
    """Where a window hides keys, as a formula."""
    left, right = (None, None) if term.window is None else (term.window.window_left, term.window.window_right)
    edges = [(sign, edge) for sign, edge in (("k < q -", left), ("k > q +", right)) if edge is not None]
    if not edges or not all(edge.is_number for _, edge in edges):
        raise Rejected(Reason.EMPTY_ROWS, f"{_SEVERAL}; config.empty_rows = 'relaxed' accepts zeros there")
    return " | ".join(f"({sign} ({int(edge)}))" for sign, edge in edges)


def _as_mask_dtype(emit: _Emitter, spec: AttentionSpec, plan: Plan, bias: Node, q: Node) -> Node:
    """The bias in a dtype that the target takes beside q, if it loses nothing by that."""
    wanted, dtype = fake_value(q).dtype, fake_value(bias).dtype
    on_cpu = fake_value(q).device.type == "cpu"
    if plan.target != "sdpa":  # fa3::attention reads a bias of any dtype
        return bias
    if dtype == wanted or (on_cpu and dtype == torch.float32):
        return bias
    known = all(t.known for t in spec.terms if t.kind is TermKind.BIAS)
    if not known and torch.promote_types(dtype, wanted) != wanted:
        raise Rejected(Reason.DTYPE, f"a {dtype} bias, which the fused kernels would round to {wanted}")
    return emit.call("to", bias, wanted)


_FAR = 1e3


def _with_empty_rows(
    emit: _Emitter, spec: AttentionSpec, plan: Plan, out: Node, qkv: tuple[Node, Node, Node], row_seen: Node, scale: Any
) -> Node:
    """Give queries that see no key what the user's spelling gives them, gradients included."""
    dtype = fake_value(out).dtype
    if plan.empty is Empty.NAN_SHOWN:
        operand, kind = spec.shown
        shows = emit.call("bool", emit.operand(operand))
        shows = emit.call(torch.logical_not, shows) if kind is Weighs.HIDDEN else shows
        hides_all = emit.call(torch.logical_not, emit.call("any", shows, -1, keepdim=True))
        row_seen = emit.call(torch.logical_or, row_seen, hides_all)
    if plan.empty in (Empty.NAN_SCORES, Empty.NAN_SHOWN, *_AS_WRITTEN):
        one = emit.call(torch.ones_like, row_seen, dtype=dtype)
        out = emit.call(operator.mul, out, emit.call(torch.where, row_seen, one, math.nan))
        if not emit.trains:
            return out
    q, k, v = qkv
    if spec.kv_heads != spec.q_heads:
        group = fake_value(q).shape[1] // fake_value(k).shape[1]
        if not isinstance(group, int):
            raise Rejected(Reason.LAYOUT, "keys and values would be repeated for a symbolic number of heads")
        k, v = (emit.call("repeat_interleave", x, group, 1) for x in (k, v))
    mean = emit.call("mean", emit.call("float", v), -2, keepdim=True)
    if emit.trains and plan.empty in (Empty.MEAN_SCORES, Empty.NAN_SCORES, *_AS_WRITTEN):
        mean = emit.call(operator.add, mean, _uniform_gradient(emit, q, k, v, mean, scale))
        if plan.empty is not Empty.MEAN_SCORES:
            for row in _sums_of_learned_biases(emit, spec):  # whose gradients are NaN then
                mean = emit.call(operator.add, mean, emit.call(torch.where, row_seen, 0.0, row))
    if plan.empty in (Empty.NAN, Empty.NAN_SCORES, *_AS_WRITTEN):
        # Row by row, so that gradients stay clear of NaN where no row is empty.
        mean = emit.call(operator.mul, mean, emit.call(torch.where, row_seen, 0.0, math.nan))
    mean = emit.call("to", mean, dtype)
    if plan.empty in (Empty.NAN_SCORES, *_AS_WRITTEN):  # the kernels do not look at keys that nobody sees
        return emit.call(operator.add, out, mean)
    return emit.call(torch.where, row_seen, out, mean)


def _sums_of_learned_biases(emit: _Emitter, spec: AttentionSpec) -> list[Node]:
    learned = [t for t in spec.terms if t.kind is TermKind.BIAS and passes_gradient_on(t.operand.node)]
    return [emit.call("sum", emit.call("float", emit.operand(t.operand)), -1, keepdim=True) for t in learned]


def _uniform_gradient(emit: _Emitter, q: Node, k: Node, v: Node, mean: Node, scale: Any) -> Node:
    """Zero, with the gradient in q and k that a softmax over equal weights has (exact, and linear in the sequence).

    d out_i / d s_ij = (v_j - mean v) / Sk there, so out_i moves as scale * q_i . k_j does, summed over j.
    """
    centred = emit.call(operator.sub, emit.call("float", emit.call("detach", v)), emit.call("detach", mean))
    seqlen_k = emit.size(k, 2)
    outer = emit.call(torch.matmul, emit.call("transpose", emit.call("float", k), -2, -1), centred)
    linear = emit.call(operator.truediv, emit.call(torch.matmul, emit.call("float", q), outer), seqlen_k)
    linear = emit.call(operator.mul, linear, scale)
    return emit.call(operator.sub, linear, emit.call("detach", linear))


# --------------------------------------------------------------------------------------------- the result


def _restore(
    emit: _Emitter, out: Node, spec: AttentionSpec, result: Node, axes: tuple[tuple[str, ...], ...],
    dtype: torch.dtype | None = None,
) -> Node:  # fmt: skip
    """From [B, H, Sq, Dv] to the axes and the dtype, unless another is wanted, of what the user's code has there."""
    names: list[str] = []
    position = 0
    for axis in (spec.batch, spec.heads):
        if len(axis) == 0:
            out = emit.call("select", out, position, 0)
            continue
        if len(axis) > 1:
            sizes = [int(s) if s.is_number else -1 for _, s in axis]
            if sizes.count(-1) > 1:
                raise Rejected(Reason.LAYOUT, "two symbolic sizes share one axis")
            out = emit.call("unflatten", out, position, tuple(sizes))
        names += [n for n, _ in axis]
        position += len(axis)
    names += ["q", "d"]
    wanted = [n for axis in axes for n in axis]
    for name in [n for n in names if n not in wanted]:  # of size 1
        out = emit.call("select", out, names.index(name), 0)
        names.remove(name)
    order = [names.index(n) for n in wanted]
    if order != sorted(order):
        out = emit.call("permute", out, *order)
    for i, axis in reversed(list(enumerate(axes))):
        start = sum(len(a) for a in axes[:i])
        if not axis:
            out = emit.call("unsqueeze", out, start)
        elif len(axis) > 1:
            out = emit.call("flatten", out, start, start + len(axis) - 1)
    expected = dtype or result.meta["val"].dtype
    return out if fake_value(out).dtype == expected else emit.call("to", out, expected)


# Methods that only move axes; after them, ones that make a tensor of their own strides.
_MOVES = ("transpose", "permute", "unsqueeze", "squeeze", "view", "expand", "swapaxes", "movedim", "unflatten")
_SETTLES = ("contiguous", "reshape", "flatten")


def _depends_on_strides(node: Node, value: torch.Tensor, mode: Any) -> bool:
    """Whether anything but a copy sees the strides: a view that needs them, or an operation that passes them on."""
    for user in node.users:
        if user.op != "call_method" or user.args[0] is not node:
            return True
        if user.target in _SETTLES:
            continue
        if user.target not in _MOVES:
            return True
        args, kwargs = torch.fx.map_arg((user.args[1:], user.kwargs), fake_value)
        try:
            with mode, torch.no_grad():
                moved = getattr(value, user.target)(*args, **kwargs)
        except (RuntimeError, ValueError):  # view size is not compatible
            return True
        if _depends_on_strides(user, moved, mode):
            return True
    return False

"""The pass: one Dynamo graph in, the same graph with its attentions fused, and a report of what was done."""

import collections
import dataclasses
import itertools
import logging
import time
import traceback

from torch.fx import GraphModule, Node

from . import config, report, tracing
from .capture import Capture, CaptureError, capture
from .constants import Constants
from .opaque import EXPANSIONS
from .patterns.algebra import Algebra
from .patterns.find import Found, find_attention
from .patterns.indices import Space
from .patterns.layouts import tensor
from .patterns.reasons import Reason
from .patterns.spec import Rejected
from .plan import Plan, cost, plan, shapes
from .report import GraphReport, Site
from .splice import Splicer

log = logging.getLogger(__name__)

_numbers = itertools.count()

# What an attention can be anchored at, by the name that Dynamo gives it. A graph with none of these is not captured.
_ANCHORS = {
    "softmax",
    "special_softmax",
    "softmin",
    "_softmax",
    "_safe_softmax",
    "scaled_dot_product_attention",
    "multi_head_attention_forward",
    *(f.__name__ for f in EXPANSIONS),
}

# Two products around an exponential may be an attention whose softmax is written out.
_EXPONENTIALS = ("exp", "exp_", "exp2", "exp2_", "special_exp2")
_PRODUCTS = ("matmul", "__matmul__", "linalg_matmul", "bmm", "baddbmm", "einsum")


def rewrite_graph(gm: GraphModule) -> GraphReport:
    """Fuse the attentions of a Dynamo graph, in place, and record and return the report.

    Never raises: what cannot be captured, proved or replaced is left as it was, with the reason in the report.
    """
    result = GraphReport(f"graph_{next(_numbers)}")
    before = gm.print_readable(print_output=False) if config.dump_dir else ""
    tracing.link_bodies(gm)
    for module in _graphs(gm):
        if not has_anchor(module):
            continue
        try:
            _rewrite(module, result)
        except Exception:
            result.error = traceback.format_exc()
            log.warning("%s: the pass failed, the graph is left as it was\n%s", result.name, result.error)
    if result.sites or result.error:
        report.record(result)
        if config.dump_dir:
            report.dump(result, before, gm.print_readable(print_output=False))
    return result


def has_anchor(gm: GraphModule) -> bool:
    """Whether a graph could hold an attention at all; costs microseconds a node."""
    names = collections.Counter(map(_target_name, gm.graph.nodes))
    is_written_out = any(names[name] for name in _EXPONENTIALS) and sum(names[name] for name in _PRODUCTS) > 1
    return is_written_out or not _ANCHORS.isdisjoint(names)


def _target_name(node: Node) -> str:
    if node.op == "call_method":
        return node.target
    if node.op != "call_function":
        return ""
    name = getattr(node.target, "__name__", "")
    return name.partition(".")[0]


def _graphs(gm: GraphModule) -> list[GraphModule]:
    """The graph and the bodies of its higher-order operators (checkpointed regions among them), innermost first."""
    return [m for m in reversed(list(gm.modules())) if isinstance(m, GraphModule)]


def _rewrite(gm: GraphModule, result: GraphReport) -> None:
    try:
        captured = capture(gm)
    except CaptureError as error:
        result.error = f"{Reason.CAPTURE.sentence}: {error}"
        log.info("%s: %s", result.name, result.error)
        return
    _add(result, "capture", captured.seconds)
    start = time.perf_counter()
    constants = Constants(captured)
    algebra = Algebra(Space(), constants.value)
    splicer = Splicer(captured)
    spliced = False
    for found in find_attention(captured.view.graph, algebra):
        site = _try(found, captured, splicer)
        if site.status == "fused":
            spliced = True
        result.sites.append(site)
        log.info("%s: %s %s: %s", result.name, site.source, site.form, site.verdict)
    for node, why in captured.unseen.items():
        if _target_name(node) in _ANCHORS:
            result.sites.append(_unseen_site(node, why))
    if spliced:
        constants.install_guards()
        splicer.finish()
    _add(result, "match", time.perf_counter() - start)


def _add(result: GraphReport, phase: str, seconds: float) -> None:
    result.seconds[phase] = result.seconds.get(phase, 0.0) + seconds


def _try(found: Found, captured: Capture, splicer: Splicer) -> Site:
    site = _site(found, captured)
    try:
        if found.rejection is not None:
            raise found.rejection
        allowed = _allowed_backends(captured, found.anchor)
        if not allowed & _FUSED_BACKENDS:
            raise Rejected(Reason.USER_BACKEND)
        chosen = _splice(found, splicer, config.fp8, allowed >= _FUSED_BACKENDS)
    except Rejected as rejection:
        site.status, site.reason, site.detail = "rejected", rejection.reason, rejection.detail
    except Exception as error:
        log.warning("%s was left as it was: %s", site.source, error, exc_info=True)
        site.status, site.reason, site.detail = "rejected", Reason.INTERNAL, f"{type(error).__name__}: {error}"
    else:
        _describe(site, found, chosen)
    return site


def _splice(found: Found, splicer: Splicer, fp8: str, sdpa_is_free: bool) -> Plan:
    """Plans an attention and puts it in place; in 16 bits if what it was dequantised from is no longer there.

    Unless ``sdpa_is_free`` to take any of its backends, it may have none for this attention.
    """
    plans = tuple(
        plan(spec, config.target, config.empty_rows == "relaxed", splicer.trains, fp8)
        for spec in (found.spec, *found.spec.plus)
    )
    if not sdpa_is_free and any(x.target == "sdpa" for x in plans):
        raise Rejected(Reason.USER_BACKEND)
    chosen = plans[0]
    try:
        formulas, is_rounded = splicer.splice(found.spec, plans, found.interior, bool(found.leaks))
    except Rejected as rejection:
        if all(x.fp8 != "graph" for x in plans):
            raise
        chosen = _splice(found, splicer, "off", sdpa_is_free)
        return dataclasses.replace(chosen, why=f"not on the FP8 kernel: {rejection.detail}")
    bias, mask, score = formulas
    read = ", ".join(f"{what} {text}" for what, text in (("bias", bias), ("mask", mask)) if text)
    parts = (f"computed, not read: {read}" if read else "", f"scores become {score}" if score else "")
    parts += ("its result is written in float8_e4m3fn" if is_rounded else "",)
    return dataclasses.replace(chosen, computed="; ".join(filter(None, parts)))


def _site(found: Found, captured: Capture) -> Site:
    source, code = _where(found.anchor)
    origin = captured.origin(found.anchor)
    site = Site("rejected", source=source, code=code, form=str(found.anchor.target), node=origin.name if origin else "")
    spec = found.spec
    if spec is not None:
        q = tensor(spec.q.node)
        site.form, site.mask, site.scale = spec.form, spec.mask_text, f"{spec.scale}"
        site.q_shape, site.k_shape, site.v_shape = shapes(spec)
        site.dtype = str(q.dtype).removeprefix("torch.")
    return site


def _unseen_site(node: Node, why: str) -> Site:
    source, code = _where(node)
    detail = f"not looked into: {why}"
    return Site(
        "rejected",
        source=source,
        code=code,
        form=_target_name(node),
        node=node.name,
        reason=Reason.OPAQUE,
        detail=detail,
    )


def _describe(site: Site, found: Found, chosen: Plan) -> None:
    spec = found.spec
    site.status, site.target, site.kernel, site.detail = "fused", chosen.target, chosen.kernel, chosen.why
    if chosen.computed:
        site.detail = "; ".join(filter(None, (chosen.why, chosen.computed)))
    if chosen.fp8:
        site.dtype = "float8_e4m3fn"
    site.flops, site.score_bytes = cost(spec, tensor(spec.result).dtype.itemsize)


def _where(node: Node) -> tuple[str, str]:
    """(file:line, text) of the user's innermost line that made ``node``."""
    frames = []
    lines = (node.meta.get("stack_trace") or "").splitlines()
    for position, line in enumerate(lines):
        if line.strip().startswith('File "'):
            path, _, rest = line.strip()[6:].partition('", line ')
            code = lines[position + 1].strip() if position + 1 < len(lines) else ""
            frames.append((f"{path}:{rest.partition(',')[0]}", code))
    own = [f for f in frames if "/torch/" not in f[0]]
    return (own or frames or [("", "")])[-1]


_FUSED_BACKENDS = {"CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION"}


def _allowed_backends(captured: Capture, anchor: Node) -> set[str]:
    """Those of SDPA that ``with sdpa_kernel(...)`` of the compiled region leaves to the anchor.

    Dynamo leaves a call that sets the allowed backends where the region is entered, and one that restores them after.
    """
    origin = captured.origin(anchor)
    allowed = _FUSED_BACKENDS
    for node in captured.source.graph.nodes:
        if node is origin:
            break
        if _target_name(node) == "_sdpa_kernel":
            allowed = {str(b.args[0]) if isinstance(b, Node) else getattr(b, "name", b) for b in node.args[0]}
    return allowed

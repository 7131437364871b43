"""From a spec to what runs it: the Hopper kernels, scaled_dot_product_attention, or the plain PyTorch reference."""

import dataclasses
import importlib.util

import sympy
import torch

from .patterns.magnitude import may_have_gradient, passes_gradient_on
from .patterns.reasons import Reason
from .patterns.spec import AttentionSpec, Empty, Operand, Rejected, TermKind, Weighs

Target = str  # "hopper" | "sdpa" | "reference"


@dataclasses.dataclass(frozen=True)
class Plan:
    """``target`` and, for a person, ``kernel``; ``why`` says what kept the Hopper kernel from being chosen."""

    target: Target
    kernel: str
    empty: Empty
    why: str = ""
    fp8: str = ""  # "graph": its operands are 8-bit tensors of the graph; "quantize": they are rounded; "": neither
    rounds: bool = False  # the result may be written in 8 bits, if that is what becomes of it
    computed: str = ""  # what formulas there are, for a person, and whether it is; known when it is in place


def plan(spec: AttentionSpec, requested: str, relaxed_empty_rows: bool, trains: bool, fp8: str = "graph") -> Plan:
    """Choose the target of one attention.

    ``requested`` is ``config.target``, ``trains`` whether gradients are needed, ``fp8`` is ``config.fp8``.

    Raises:
        Rejected: no target computes this attention as the user wrote it.
    """
    tensors = {name: getattr(spec, name).node.meta["val"] for name in ("q", "k", "v")}
    _check(spec, tensors)
    _check_factors(spec, tensors["q"].dtype)
    empty = spec.empty
    if relaxed_empty_rows and empty is not Empty.IMPOSSIBLE:
        empty = Empty.ZERO
    if empty is Empty.NAN_SOME:
        if trains:
            what = "masks that add -inf to the scores beside masks that write it over them, in training"
            raise Rejected(Reason.EMPTY_ROWS, f"{what}; config.empty_rows = 'relaxed' accepts zeros there")
        empty = Empty.NAN_SCORES
    if trains and empty is Empty.NAN_SHOWN:
        what = "of several masks one hides the weights as well, in training"
        raise Rejected(Reason.EMPTY_ROWS, f"{what}; config.empty_rows = 'relaxed' accepts zeros there")
    if trains and empty is Empty.MEAN_SCORES and not (spec.softcap is None and spec.score is None):
        empty = Empty.AS_WRITTEN
    if spec.score is not None:
        _check_score(spec, trains)
    exact = (Empty.IMPOSSIBLE, Empty.AS_WRITTEN) if trains else _EXACT_LSE
    if spec.lse and spec.empty not in exact:
        what = f"'{spec.lse[0].node.name}' is their log-sum-exp, where masks may hide all of a row"
        raise Rejected(Reason.SCORES_USED, what + (", in training" if spec.empty in _EXACT_LSE else ""))
    in_8_bits = not_8_bits = ""
    if requested == "reference" or (requested != "sdpa" and _not_hopper(tensors["q"].device) is None):
        in_8_bits, not_8_bits = _fp8(spec, tensors, empty, fp8, trains)
    if requested == "reference" and spec.dropout_p < 1:
        operator = _FP8_OPERATORS.get(in_8_bits, "fa3::attention")
        return Plan("reference", f"{operator} (PyTorch)", empty, not_8_bits, in_8_bits, _rounds(spec, empty, trains))
    if requested == "reference":
        why = "dropout of everything"
    elif requested == "sdpa":
        why = "asked for by config.target"
    else:
        why = _not_on_hopper(spec, tensors, trains, in_8_bits)
        if why is None:
            name = _kernel_name(spec, tensors["q"].dtype, in_8_bits)
            return Plan("hopper", name, empty, not_8_bits, in_8_bits, _rounds(spec, empty, trains))
        why = "; ".join(filter(None, (why, not_8_bits)))
    if spec.score is not None:
        raise Rejected(spec.no_score.reason, f"{spec.no_score.detail}; no kernel, which would compute it: {why}")
    if spec.lse:
        what = f"'{spec.lse[0].node.name}' is their log-sum-exp, which scaled_dot_product_attention does not give"
        raise Rejected(Reason.SCORES_USED, f"{what}; no kernel: {why}")
    for what, there in (("a soft cap", spec.softcap), ("sinks", spec.sinks), ("sinks", spec.row_sinks)):
        if there is not None:
            raise Rejected(
                Reason.SCORE_OP, f"{what}, which scaled_dot_product_attention does not have; no kernel: {why}"
            )
    return Plan("sdpa", "F.scaled_dot_product_attention", empty, why)


# Where it is the user's in empty rows too; in training, where its gradient is as well.
_EXACT_LSE = (Empty.IMPOSSIBLE, Empty.AS_WRITTEN, Empty.NAN, Empty.NAN_SCORES)

_FP8_OPERATORS = {"graph": "fa3::attention_fp8", "quantize": "fa3::attention_quantised"}


def _fp8(
    spec: AttentionSpec, tensors: dict[str, torch.Tensor], empty: Empty, wanted: str, trains: bool
) -> tuple[str, str]:
    """``Plan.fp8``, and why an attention that could be expected to run in 8 bits does not."""
    asked = wanted == "quantize" or (wanted == "graph" and (spec.float8 is not None or spec.not_float8))
    if not asked:
        return "", ""
    uncertain = empty not in (Empty.IMPOSSIBLE, Empty.ZERO) and any(
        t.kind is TermKind.BIAS and not t.ordinary for t in spec.terms
    )
    if trains and wanted == "graph":
        return "", "not on the FP8 kernel: 8-bit tensors have no gradient there"
    if spec.dropout_p:
        return "", "not on the FP8 kernel: it has no dropout"
    if empty in (Empty.AS_WRITTEN, Empty.RAISED) or uncertain:
        return "", "not on the FP8 kernel: a bias that may hide all of a row"
    if importlib.util.find_spec("triton") is None:
        return "", "not on the FP8 kernel: triton is not installed"
    from .kernels.fp8 import supports

    if spec.float8 is not None and not trains:
        scale = spec.float8.scale
        if not scale.is_number:
            why = f"the scale is {scale}"
        else:
            why = supports(*shapes(spec), scale=abs(float(scale)))
        if why is None:
            return "graph", ""
        if wanted == "graph":
            return "", f"not on the FP8 kernel: {why}"
    elif wanted == "graph":
        return "", spec.not_float8
    if tensors["q"].dtype not in (torch.bfloat16, torch.float16):
        return "", f"not on the FP8 kernel: {str(tensors['q'].dtype).removeprefix('torch.')} is not rounded to 8 bits"
    if spec.axes.seqlen_q == 1:
        return "", "not on the FP8 kernel: to round all keys takes longer than one query's attention"
    why = supports(*shapes(spec), scale=abs(float(spec.scale)) if spec.scale.is_number else 1.0, quantised=True)
    return ("quantize", "") if why is None else ("", f"not on the FP8 kernel: {why}")


def _rounds(spec: AttentionSpec, empty: Empty, trains: bool) -> bool:
    """Whether a kernel can round the result to 8 bits: nothing else is to be done to it, and TMA can write it."""
    if spec.quantised is None or trains or empty not in (Empty.IMPOSSIBLE, Empty.ZERO):
        return False
    if spec.plus or spec.out_factors or spec.row_sinks is not None or spec.lse:
        return False
    return bool(spec.head_dim_v.is_number) and int(spec.head_dim_v) % 16 == 0


def _check(spec: AttentionSpec, tensors: dict[str, torch.Tensor]) -> None:
    devices = {x.device for x in tensors.values()}
    beside = [t.operand for t in spec.terms] + [factor for factor, _ in spec.q_factors]
    beside += [factor for factor, _ in (*spec.v_factors, *spec.out_factors) if isinstance(factor, Operand)]
    beside += () if spec.score is None else spec.score.tables
    beside += () if spec.score is None or spec.score.bias is None else (spec.score.bias,)
    devices |= {x.node.meta["val"].device for x in beside if x.node.meta["val"].ndim}
    if len(devices) > 1:
        raise Rejected(Reason.DEVICE, ", ".join(sorted(map(str, devices))))
    if any(x.is_nested for x in tensors.values()):
        raise Rejected(Reason.NESTED)
    dtypes = {x.dtype for x in tensors.values()}
    if len(dtypes) > 1 or not dtypes <= {torch.float32, torch.bfloat16, torch.float16}:
        raise Rejected(Reason.DTYPE, ", ".join(sorted(str(d).removeprefix("torch.") for d in dtypes)))
    sizes = (spec.batch_size, spec.q_heads, spec.axes.seqlen_q, spec.axes.seqlen_k, spec.head_dim, spec.head_dim_v)
    if any(s == 0 for s in sizes):
        raise Rejected(Reason.EMPTY, "sizes " + ", ".join(map(str, sizes)))


def _check_factors(spec: AttentionSpec, dtype: torch.dtype) -> None:
    """Whether what scales the scores can be taken to the queries, in their dtype, and what scales the weights to v."""
    if dtype == torch.float16 and any(kind in (Weighs.TIMES, Weighs.OVER) for _, kind in spec.v_factors):
        raise Rejected(Reason.WEIGHTS_OP, "a factor for every key, which may be too large for values in float16")
    if dtype == torch.float16 and spec.q_factors:
        name = spec.q_factors[0][0].node.name
        raise Rejected(Reason.TENSOR_SCALE, f"'{name}' scales the scores, and may be too large for queries in float16")


def _check_score(spec: AttentionSpec, trains: bool) -> None:
    """Whether a function of the scores can be computed with all that is beside it."""
    biases = [t.operand.node for t in spec.terms if t.kind is TermKind.BIAS and t.window is None]
    read = (*spec.score.tables, *(() if spec.score.bias is None else (spec.score.bias,)))
    learned = [x.node.name for x in read if passes_gradient_on(x.node)]
    if trains and learned:
        what = f"'{learned[0]}', which it is made of, has a gradient"
    elif trains and any(map(may_have_gradient, biases)):
        what = "a bias beside it has a gradient"
    else:
        return
    raise Rejected(spec.no_score.reason, f"{spec.no_score.detail}; no kernel, which would compute it: {what}")


def _not_on_hopper(spec: AttentionSpec, tensors: dict[str, torch.Tensor], trains: bool, in_8_bits: str) -> str | None:
    q = tensors["q"]
    if (why := _not_hopper(q.device)) is not None:
        return why
    biases = [t.operand.node for t in spec.terms if t.kind is TermKind.BIAS and t.window is None]
    if trains and spec.softcap is not None and any(map(may_have_gradient, biases)):
        return "the gradient of a bias beside a soft cap"
    if spec.softcap is not None and spec.softcap > 1e3:
        return f"a soft cap of {spec.softcap:g}, at which tanh is not precise enough"
    if spec.dropout_p == 1:
        return "dropout of everything"
    for name, edge, slope in (("left", spec.mask.window_left, -1), ("right", spec.mask.window_right, 1)):
        if edge is not None and seqlen_offset(spec, edge, slope) is None:
            return f"a window whose {name} edge is known only as {edge}"
    if in_8_bits:
        return None
    from .kernels.forward import supports

    scale = abs(float(spec.scale)) if spec.scale.is_number else 1.0
    return supports(*shapes(spec), q.dtype, scale=scale)


def _not_hopper(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"{device.type} tensors"
    if torch.cuda.get_device_capability(device) != (9, 0):
        return "the GPU is not sm_90"
    return None


def shapes(spec: AttentionSpec) -> tuple[tuple[int | str, ...], ...]:
    """q, k and v as [B, H, S, D]; a symbolic size is its name."""

    def readable(*sizes: sympy.Expr) -> tuple[int | str, ...]:
        return tuple(int(s) if s.is_number else str(s) for s in sizes)

    b, sk = spec.batch_size, spec.axes.seqlen_k
    return (
        readable(b, spec.q_heads, spec.axes.seqlen_q, spec.head_dim),
        readable(b, spec.kv_heads, sk, spec.head_dim),
        readable(b, spec.kv_heads, sk, spec.head_dim_v),
    )


def seqlen_offset(spec: AttentionSpec, edge: sympy.Expr, slope: int) -> tuple[int, bool] | None:
    """An edge of the window: (n, False) is n, (n, True) slope * (seqlen_k - seqlen_q) + n; None if it is neither."""
    if edge.is_number:
        return int(edge), False
    rest = sympy.expand(edge - slope * (spec.axes.seqlen_k - spec.axes.seqlen_q))
    return (int(rest), True) if rest.is_number else None


def _kernel_name(spec: AttentionSpec, dtype: torch.dtype, in_8_bits: str) -> str:
    mask = spec.mask
    dtype = torch.float8_e4m3fn if in_8_bits else dtype
    words = [str(dtype).removeprefix("torch."), f"d{spec.head_dim}"]
    if spec.head_dim_v != spec.head_dim:
        words[-1] += f"/{spec.head_dim_v}"
    words.append("window" if mask.window_left is not None else "full" if mask.window_right is None else "causal")
    words += (
        ["dropout"] * (spec.dropout_p > 0)
        + ["softcap"] * (spec.softcap is not None)
        + ["function"] * (spec.score is not None)
        + ["sinks"] * (spec.sinks is not None or spec.row_sinks is not None)
    )
    words += sorted({"bias" if t.kind is TermKind.BIAS else "mask" for t in spec.terms if t.window is None})
    function = {"graph": "attention_fp8", "quantize": "attention_quantised"}.get(in_8_bits, "attention_forward")
    return f"{function}[{', '.join(words)}]"


def cost(spec: AttentionSpec, itemsize: int) -> tuple[int | None, int | None]:
    """(forward FLOPs, bytes of scores and weights no longer materialised), None where a size is symbolic."""
    pairs = spec.batch_size * spec.q_heads * spec.axes.seqlen_q * spec.axes.seqlen_k
    if not pairs.is_number:
        return None, None
    visible = pairs
    left, right = spec.mask.window_left, spec.mask.window_right
    if all(w is None or w.is_number for w in (left, right)) and spec.mask.is_window and (left, right) != (None, None):
        visible = (
            spec.batch_size
            * spec.q_heads
            * _visible_pairs(int(spec.axes.seqlen_q), int(spec.axes.seqlen_k), left, right)
        )
    flops = 2 * visible * (spec.head_dim + spec.head_dim_v)
    return int(flops) if flops.is_number else None, int(2 * pairs * itemsize)


def _visible_pairs(seqlen_q: int, seqlen_k: int, left: sympy.Expr | None, right: sympy.Expr | None) -> int:
    total = 0
    for q in range(seqlen_q):
        first = 0 if left is None else max(0, q - int(left))
        last = seqlen_k - 1 if right is None else min(seqlen_k - 1, q + int(right))
        total += max(0, last - first + 1)
    return total

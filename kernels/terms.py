"""What shapes the scores in the kernels beyond a scale and a window, as generated Gluon functions.

A `ScoreProgram` says what there is (a soft cap, tensors that are added or that hide keys, and the axes that each really
has); `functions` writes the device code for it, so that a kernel pays for what it uses and nothing else.
"""

import functools
import linecache
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

ALIGNED = 8


@dataclass(frozen=True)
class ScoreTerm:
    """A tensor applied to the scores: "bias" is added, "mask" hides the keys where it is 0.

    `axes` says along which of (batch, head, query, key) it varies. If `aligned`, keys are neighbours in memory and
    the address and all other strides are multiples of ALIGNED elements, by which they are then counted.
    """

    kind: str
    axes: tuple[bool, bool, bool, bool]
    aligned: bool


@dataclass(frozen=True)
class ScoreProgram:
    """softcap * tanh(scores / softcap) if there is a softcap, then the terms in order."""

    softcap: float | None = None
    terms: tuple[ScoreTerm, ...] = ()

    def without_mask(self) -> "ScoreProgram":
        """The program where the mask hides nothing, on the same operands (the mask is the last)."""
        return ScoreProgram(self.softcap, tuple(term for term in self.terms if term.kind != "mask"))


def program_of(
    bias: Tensor | None, mask: Tensor | None, softcap: float | None, shape: tuple[int, int, int, int]
) -> tuple[ScoreProgram, tuple]:
    """The program for scores of `shape` [B, Hq, Sq, Sk], and the kernel's operands for it, nested as it reads them.

    Args:
        bias, mask: broadcastable to `shape`.

    Raises:
        ValueError: one of them is not.
    """
    terms, operands = [], []
    for kind, tensor in (("bias", bias), ("mask", mask)):
        if tensor is None:
            continue
        whole = broadcast(kind, tensor, shape)
        strides = [0 if size == 1 else stride for size, stride in zip(shape, whole.stride())]
        alignment = ALIGNED * whole.element_size()
        aligned = strides[3] == 1 and not whole.data_ptr() % alignment and not any(s % ALIGNED for s in strides[:3])
        if aligned:
            strides[:3] = (stride // ALIGNED for stride in strides[:3])
        terms.append(ScoreTerm(kind, tuple(stride != 0 for stride in strides), aligned))
        operands.append((whole, *(stride for stride in strides[: 3 if aligned else 4] if stride)))
    return ScoreProgram(softcap, tuple(terms)), tuple(operands)


def broadcast(kind: str, tensor: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    """A new view of `tensor`, expanded to `shape`, uint8 if it is bool. Raises ValueError if it does not broadcast."""
    try:
        whole = tensor.expand(shape)
    except RuntimeError:
        raise ValueError(f"a {kind} of {list(tensor.shape)} does not broadcast to {list(shape)}") from None
    return whole.view(torch.uint8) if tensor.dtype == torch.bool else whole


@functools.cache
def functions(program: ScoreProgram, backward: bool = False) -> tuple:
    """`load`, `apply` and `scaled` for a program, as the kernels use them; (None, None, False) for an empty one.

    load(operands, batch, head, rows, columns, seqlen_q, seqlen_k, BOUNDED) reads what the terms need of one tile: rows
    and columns are indices in the layouts of the scores' axes, and BOUNDED says whether columns may lie past the end.
    apply(s, scale, loaded) makes scores of products of q and k. If scaled, they come out multiplied by scale, which is
    in units of log2(e); else that is left to the softmax, which does it for nothing.
    If backward, scores are [keys, queries], and apply returns two things: with a soft cap, scores and their derivative
    by s * scale; without one, s with the terms, bias times scale, and 1.
    """
    if program == ScoreProgram():
        return None, None, False
    source = _load_source(program, backward) + "\n\n" + _apply_source(program, backward)
    filename = f"<fa3_inductor {program} {backward}>"
    # Triton reads a function's source where inspect finds it.
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    namespace = {"gl": gl, "__name__": __name__}
    exec(compile(source, filename, "exec"), namespace)
    return gluon.jit(namespace["load"]), gluon.jit(namespace["apply"]), _is_scaled(program)


def _is_scaled(program: ScoreProgram) -> bool:
    return program.softcap is not None or any(term.kind == "bias" for term in program.terms)


def _axes(backward: bool) -> tuple[str, str]:
    """How queries and keys of one dimension become those of the scores."""
    return ("[None, :]", "[:, None]") if backward else ("[:, None]", "[None, :]")


def _load_source(program: ScoreProgram, backward: bool) -> str:
    by_query, by_key = _axes(backward)
    lines = ["def load(operands, batch, head, rows, columns, seqlen_q, seqlen_k, BOUNDED: gl.constexpr):"]
    lines += ["    rows = gl.minimum(rows, seqlen_q - 1).to(gl.int64)"]
    for n, term in enumerate(program.terms):
        index = [f"operands[{n}][{sum(term.axes[:i]) + 1}]" for i in range(4)]
        if term.aligned:  # what Triton knows of a kernel's arguments it does not know of a partition's
            index[:3] = [f"({i} * {ALIGNED})" for i in index[:3]]
            lines.append(f"    at = gl.multiple_of(operands[{n}][0], {ALIGNED})")
        else:
            lines.append(f"    at = operands[{n}][0]")
        for axis, name in enumerate(("batch.to(gl.int64)", "head.to(gl.int64)")):
            if term.axes[axis]:
                lines.append(f"    at = at + {name} * {index[axis]}")
        if term.axes[2]:
            suffix = by_query if term.axes[3] else ""
            lines.append(f"    at = at + (rows * {index[2]}){suffix}")
        if not term.axes[3]:
            lines.append(f"    t{n} = gl.load(at)")
            continue
        suffix = by_key if term.axes[2] else ""
        columns = "columns" if term.aligned else f"columns.to(gl.int64) * {index[3]}"
        lines.append(f"    at = at + ({columns}){suffix}")
        lines.append("    if BOUNDED:")
        lines.append(f"        t{n} = gl.load(at, mask=(columns < seqlen_k){suffix}, other=0)")
        lines.append("    else:")
        lines.append(f"        t{n} = gl.load(at)")
    lines.append("    return (" + "".join(f"t{n}, " for n in range(len(program.terms))) + ")")
    return "\n".join(lines)


def _apply_source(program: ScoreProgram, backward: bool) -> str:
    by_query, by_key = _axes(backward)
    log2e = math.log2(math.e)
    lines = ["def apply(s, scale, loaded):"]
    if program.softcap is None and _is_scaled(program) and not backward:
        lines.append("    s = s * scale")
    if program.softcap is not None:
        # tanh(x) = 1 - 2 / (1 + exp(2x)): the hardware's own tanh is off by 5e-4, which a cap of 50 turns into 0.03.
        cap = program.softcap * log2e
        lines.append(f"    e = gl.exp2(s * (scale * {2 / program.softcap!r})) + 1.0")
        lines.append(
            '    r = gl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=r,r", [e], gl.float32, True, 1)'
        )
        lines.append(f"    s = r * {-2 * cap!r} + {cap!r}")
    for n, term in enumerate(program.terms):
        query, key = term.axes[2:]
        suffix = "" if query == key else by_query if query else by_key
        if term.kind == "bias":
            factor = "scale" if backward and program.softcap is None else repr(log2e)
            lines.append(f"    s = s + loaded[{n}].to(gl.float32){suffix} * {factor}")
        else:
            lines.append(f'    s = gl.where((loaded[{n}] != 0){suffix}, s, float("-inf"))')
    if backward:
        lines.append("    return s, " + ("1.0" if program.softcap is None else "r * (4.0 - 4.0 * r)"))
    else:
        lines.append("    return s")
    return "\n".join(lines)

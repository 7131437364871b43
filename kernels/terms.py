"""What shapes the scores in the kernels beyond a scale and a window, as generated Gluon functions.

A `ScoreProgram` says what there is (a soft cap, tensors that are added or that hide keys, and the axes that each really
has, and formulas that do the same); `functions` writes the device code for it, so that a kernel pays for what it uses
and nothing else.
"""

import functools
import linecache
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from fa3_inductor.kernels.formulas import (
    NO_FORMULAS,
    Formulas,
    derivative,
    device_source,
    is_shift,
    names,
    tables_of,
)

ALIGNED = 8
LOG2E = math.log2(math.e)


@dataclass(frozen=True)
class ScoreTerm:
    """A tensor applied to the scores: "bias" is added, "mask" hides the keys where it is 0, "table" is in formulas.

    `axes` says along which of (batch, head, query, key) it varies. If `aligned`, keys are neighbours in memory and
    the address and all other strides are multiples of ALIGNED elements, by which they are then counted. If `shared`,
    the kernel has TMA bring tiles of it to shared memory.
    """

    kind: str
    axes: tuple[bool, bool, bool, bool]
    aligned: bool
    shared: bool = False


@dataclass(frozen=True)
class ScoreProgram:
    """softcap * tanh(scores / softcap) if there is a softcap, or a formula of the scores; then biases and masks.

    Those are tensors and formulas.

    The terms are in the order of the kernel's operands: bias, tables, mask.
    """

    softcap: float | None = None
    terms: tuple[ScoreTerm, ...] = ()
    bias_formula: str = ""
    mask_formula: str = ""
    score_formula: str = ""

    @property
    def is_linear(self) -> bool:
        """Whether a score is the scaled product and what is added to it."""
        return self.softcap is None and not self.score_formula

    def without_mask(self) -> "ScoreProgram":
        """The program where the masks hide nothing, on the same operands."""
        tables = [*tables_of(self.score_formula), *tables_of(self.bias_formula)]
        count = sum(term.kind == "bias" for term in self.terms) + max([-1, *tables]) + 1
        return ScoreProgram(self.softcap, self.terms[:count], self.bias_formula, "", self.score_formula)


def program_of(
    bias: Tensor | None, mask: Tensor | None, softcap: float | None, shape: tuple[int, int, int, int],
    formulas: Formulas = NO_FORMULAS, *, room: int = 0,
) -> tuple[ScoreProgram, tuple]:  # fmt: skip
    """The program for scores of `shape` [B, Hq, Sq, Sk], and the kernel's operands for it, nested as it reads them.

    Args:
        bias, mask: broadcastable to `shape`, as are the tables of `formulas`.
        room: for how many bytes of every score there is room in shared memory: for 2, a bias in 16 bits comes by way of
            it, for 1, a mask, if it is the first operand and TMA can bring it.

    Raises:
        ValueError: one of them is not.
    """
    terms, operands = [], []
    for kind, tensor in (("bias", bias), *(("table", table) for table in formulas.tables), ("mask", mask)):
        if tensor is None:
            continue
        whole = broadcast(kind, tensor, shape)
        strides = [0 if size == 1 else stride for size, stride in zip(shape, whole.stride())]
        alignment = ALIGNED * whole.element_size()
        aligned = strides[3] == 1 and not whole.data_ptr() % alignment and not any(s % ALIGNED for s in strides[:3])
        if aligned:
            strides[:3] = (stride // ALIGNED for stride in strides[:3])
        axes = tuple(stride != 0 for stride in strides)
        size = whole.element_size()
        shared = not terms and aligned and all(axes[2:]) and (kind, size) in (("bias", 2), ("mask", 1)) and size <= room
        shared = shared and not (whole.data_ptr() % 16 or any(s * size % 16 for s in whole.stride()[:3]))
        terms.append(ScoreTerm(kind, axes, aligned, shared))
        operands.append((whole, *(stride for stride in strides[: 3 if aligned else 4] if stride)))
    return ScoreProgram(softcap, tuple(terms), formulas.bias, formulas.mask, formulas.score), tuple(operands)


def has_terms(bias: Tensor | None, mask: Tensor | None, softcap: float | None, formulas: Formulas) -> bool:
    """Whether there is anything beyond a scale and a window for the scores."""
    return bool(formulas.bias or formulas.mask or formulas.score) or any(x is not None for x in (bias, mask, softcap))


def broadcast(kind: str, tensor: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    """A new view of `tensor`, expanded to `shape`, uint8 if it is bool. Raises ValueError if it does not broadcast."""
    try:
        whole = tensor.expand(shape)
    except RuntimeError:
        raise ValueError(f"a {kind} of {list(tensor.shape)} does not broadcast to {list(shape)}") from None
    return whole.view(torch.uint8) if tensor.dtype == torch.bool else whole


@functools.cache
def functions(program: ScoreProgram, backward: bool = False) -> tuple:
    """`load`, `apply` and `unit` for a program, as the kernels use them; (None, None, None) for an empty one.

    load(operands, batch, head, rows, columns, seqlen_q, seqlen_k, BOUNDED) reads what the terms need of one tile: rows
    and columns are indices in the layouts of the scores' axes, and BOUNDED says whether columns may lie past the end.
    apply(s, scale, loaded) makes scores of products of q and k, `scale` being that of the scores times log2(e). What
    comes out is a score in units of log(2) when it is multiplied by `unit`, or, if that is None, by scale; the softmax
    does this for nothing. With a bias or a formula, unit is log2(e): a mask's lowest float32 times log2(e) is -inf.
    If backward, scores are [keys, queries], and apply returns two things: if the program is not linear, scores and
    their derivative by s * scale, 0 where it is not finite; if it is, s with the terms, bias times scale, and 1.
    """
    if program == ScoreProgram():
        return None, None, None
    source = _load_source(program, backward) + "\n\n" + _apply_source(program, backward)
    load, apply = _compiled(source, f"<fa3_inductor {program} {backward}>", gl, "load", "apply")
    return gluon.jit(load), gluon.jit(apply), _unit(program)


@functools.cache
def shown(program: ScoreProgram, backward: bool = False):
    """shown(operands, batch, head, rows, columns, seqlen_q, seqlen_k): where a mask's formula shows keys, for Triton.

    The arguments are those of `load`, and columns may lie past the end. If backward, it is [keys, queries].
    """
    lines = ["def shown(operands, batch, head, rows, columns, seqlen_q, seqlen_k, BOUNDED: gl.constexpr = True):"]
    lines += _reading(program, backward, tables_of(program.mask_formula))
    value = device_source(program.mask_formula, _in_formulas(program, backward, "x{}"))
    source = "\n".join([*lines, f"    return {value}"])
    return triton.jit(*_compiled(source, f"<fa3_inductor {program} {backward} shown>", tl, "shown"))


@gluon.jit
def _hide(s, mask):
    """s, and -inf where the mask is 0. With `where`, triton 3.6 compares before s is there, and packs the bits."""
    return gl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.s16 p, $2, 0; selp.f32 $0, $1, 0fFF800000, p; }", "=f,f,h",
        [s, mask.to(gl.int16)], gl.float32, True, 1,
    )  # fmt: skip


def _compiled(source: str, filename: str, language, *names: str) -> tuple:
    # Triton reads a function's source where inspect finds it.
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    namespace = {"gl": language, "_hide": _hide, "__name__": __name__}
    exec(compile(source, filename, "exec"), namespace)
    return tuple(namespace[name] for name in names)


def _unit(program: ScoreProgram) -> float | None:
    if program.score_formula or program.bias_formula or any(term.kind == "bias" for term in program.terms):
        return LOG2E
    return None if program.softcap is None else 1.0


def _axes(backward: bool) -> tuple[str, str]:
    """How queries and keys of one dimension become those of the scores."""
    return ("[None, :]", "[:, None]") if backward else ("[:, None]", "[None, :]")


def _load_source(program: ScoreProgram, backward: bool) -> str:
    lines = ["def load(operands, batch, head, rows, columns, seqlen_q, seqlen_k, BOUNDED: gl.constexpr):"]
    if backward and program.score_formula:
        lines.append("    inside = rows < seqlen_q")
    lines += _reading(program, backward, range(len(program.terms)))
    loaded = "".join(f"x{n}, " for n in range(len(program.terms)))
    if program.bias_formula or program.mask_formula or program.score_formula:
        loaded += "rows, columns"
    if backward and program.score_formula:
        loaded += ", inside"
    return "\n".join([*lines, f"    return ({loaded})"])


def _reading(program: ScoreProgram, backward: bool, numbers: Iterable[int]) -> list[str]:
    """Lines that read the terms of those numbers, as x0, x1, ..."""
    by_query, by_key = _axes(backward)
    lines = ["    rows = gl.minimum(rows, seqlen_q - 1)"]
    for n in numbers:
        term = program.terms[n]
        if term.shared:
            lines.append(f"    x{n} = operands[{n}][0].load(rows.type.layout.parent)")
            continue
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
            lines.append(f"    at = at + (rows.to(gl.int64) * {index[2]}){suffix}")
        if not term.axes[3]:
            lines.append(f"    x{n} = gl.load(at)")
            continue
        suffix = by_key if term.axes[2] else ""
        columns = "columns" if term.aligned else f"columns.to(gl.int64) * {index[3]}"
        lines.append(f"    at = at + ({columns}){suffix}")
        lines.append("    if BOUNDED:")
        lines.append(f"        x{n} = gl.load(at, mask=(columns < seqlen_k){suffix}, other=0)")
        lines.append("    else:")
        lines.append(f"        x{n} = gl.load(at)")
    return lines


def _along(term: ScoreTerm, backward: bool) -> str:
    """What makes two-dimensional what was read of a term."""
    query, key = term.axes[2:]
    by_query, by_key = _axes(backward)
    return "" if query == key else by_query if query else by_key


def _in_formulas(program: ScoreProgram, backward: bool, loaded: str) -> dict[str, str]:
    """What the names of formulas are in device code. `loaded`, with a number for {}, is what was read of a term."""
    by_query, by_key = _axes(backward)
    tables = [n for n, term in enumerate(program.terms) if term.kind == "table"]
    by_name = {f"t{i}": loaded.format(n) + _along(program.terms[n], backward) for i, n in enumerate(tables)}
    for n, term in _of_kind(program, "bias"):
        by_name["b"] = f"{loaded.format(n)}.to(gl.float32){_along(term, backward)}"
    return by_name | {"q": f"rows{by_query}", "k": f"columns{by_key}", "s": "s"}


def _apply_source(program: ScoreProgram, backward: bool) -> str:
    natural = not backward and _unit(program) == LOG2E
    lines = ["def apply(s, scale, loaded):"]
    if program.is_linear and natural:
        lines.append(f"    s = s * (scale * {1 / LOG2E!r})")
    if program.softcap is not None:
        # tanh(x) = 1 - 2 / (1 + exp(2x)): the hardware's own tanh is off by 5e-4, which a cap of 50 turns into 0.03.
        cap = program.softcap * (1.0 if natural else LOG2E)
        lines.append(f"    e = gl.exp2(s * (scale * {2 / program.softcap!r})) + 1.0")
        lines.append(
            '    r = gl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=r,r", [e], gl.float32, True, 1)'
        )
        lines.append(f"    s = r * {-2 * cap!r} + {cap!r}")
    factor = "" if natural else "scale" if program.is_linear else repr(LOG2E)
    by_name = _in_formulas(program, backward, "loaded[{}]")
    if program.bias_formula or program.mask_formula or program.score_formula:
        lines.append(f"    rows, columns = loaded[{len(program.terms)}], loaded[{len(program.terms) + 1}]")
    if program.score_formula:
        lines.append(f"    s = s * (scale * {1 / LOG2E!r})")
        if backward and not is_shift(program.score_formula):
            slope = derivative(program.score_formula)
            lines.append(f"    slope = s * 0.0 + ({device_source(slope, by_name)})")
            lines.append('    slope = gl.where(gl.abs(slope) < float("inf"), slope, 0.0)')
        lines.append(f"    s = {device_source(program.score_formula, by_name, factor)}")
        if backward:  # whatever becomes of the zeros that are past the end of Q
            inside = f"loaded[{len(program.terms) + 2}]{_axes(backward)[0]}"
            lines.append(f'    s = gl.where({inside}, s, float("-inf"))')
    biases = [f"loaded[{n}].to(gl.float32){_along(t, backward)}" for n, t in _of_kind(program, "bias")]
    if "b" in names(program.score_formula):
        biases = []
    masks = _of_kind(program, "mask")
    conditions = [f"(loaded[{n}] != 0){_along(t, backward)}" for n, t in masks if not all(t.axes[2:])]
    if program.mask_formula:
        conditions.append(device_source(program.mask_formula, by_name))
    lines += [f"    s = s + {bias}" + f" * {factor}" * bool(factor) for bias in biases]
    if program.bias_formula:
        lines.append(f"    s = s + {device_source(program.bias_formula, by_name, factor)}")
    lines += [f"    s = _hide(s, loaded[{n}])" for n, t in masks if all(t.axes[2:])]
    lines += [f'    s = gl.where({condition}, s, float("-inf"))' for condition in conditions]
    if backward:
        slope = "slope" if program.score_formula else "r * (4.0 - 4.0 * r)"
        if program.is_linear or (program.score_formula and is_shift(program.score_formula)):
            slope = "1.0"
        lines.append(f"    return s, {slope}")
    else:
        lines.append("    return s")
    return "\n".join(lines)


def _of_kind(program: ScoreProgram, kind: str) -> list[tuple[int, ScoreTerm]]:
    return [(n, term) for n, term in enumerate(program.terms) if term.kind == kind]

"""Compiles the kernels for Hopper on a machine without a GPU, and reads back what the compiler made of them.

`python -m fa3_inductor.kernels.offline` prints a table of every configuration and exits with 1 if one breaks a rule of
`violations`. Needs triton (whose wheel brings ptxas and nvdisasm) and no CUDA driver.
"""

import argparse
import collections
import contextlib
import dataclasses
import functools
import io
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource, make_backend
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import create_function_from_signature

from fa3_inductor.kernels import sass

HOPPER = GPUTarget("cuda", 90, 32)
SHARED_LIMIT = 232448  # bytes a block may have on sm_90; triton does not check it
# Bytes: what is put by once per row tile costs nothing. In a loop of matrix products (400 instructions and more) a few
# accesses are let pass. Loops that read a mask are there for the tiles at its edges; with triton 3.9 they have up to
# 23, with 3.6 none.
SPILLS = 160, 11  # in loops, 11 with 3.9 for a bias at head_dim 128, 0 with 3.6
SPILLS_WITH_MASK = 448, 24
SPILLS_OF_FP8 = 256, 8
SPILLS_OF_PLAIN = 256, 12  # in loops, only with both edges of a window
SPILLS_OF_BACKWARD = 700, 32  # in loops, 31 with 3.9 where tiles are masked at head_dim 256, 0 with 3.6
SPILLS_IN_ORDER = 900, 100  # at head_dim 64; else up to 664 and 91 with 3.9, 400 and 8 with 3.6
# Of 128 queries, in the backward, and with dropout: 3.6 has up to 792 and 38; 3.9, in a window, 1084 and 126. With
# scales of tokens 3.9 has 912 and 98 where 3.6 has 64 and none, and with formulas at head_dim 256, 440 and 101 where
# 3.6 has 100 and none.
SPILLS_OF_LARGE_TILES = 1100, 130
# Of the scores, in the backward, with their derivatives: of two at once at head_dim 128, 3.6 has 1076 and 153.
SPILLS_OF_FUNCTIONS = 2200, 480
_NVDISASM = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"


@dataclasses.dataclass(frozen=True)
class Report:
    """What became of one kernel: `counts` by opcode up to its first dot, `max_regs` the operands of its USETMAXREG,
    `loop_spills` and `early_writes` as in `sass`."""

    name: str
    registers: int
    spill_bytes: int
    loop_spills: int
    early_writes: list[str]
    shared_bytes: int
    counts: dict[str, int]
    max_regs: list[int]
    warnings: list[str]


def compile_offline(name: str, kernel, args: tuple, options: dict) -> Report:
    """Compiles a Gluon or Triton kernel for sm_90a. `args` are those of a launch, with meta tensors for the tensors.

    Raises:
        RuntimeError: what triton or ptxas said. Some mistakes (a layout that LLVM cannot lower) end the process.
    """
    backend = make_backend(HOPPER)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, parsed = bind(*args, **options)
    parsed, signature, constexprs, attrs = kernel._pack_args(backend, options, bound, specialization, parsed)
    source = (GluonASTSource if kernel.is_gluon() else ASTSource)(kernel, signature, constexprs, attrs)
    with contextlib.redirect_stdout(io.StringIO()):  # on an error of ptxas, triton prints all of the PTX
        compiled = triton.compile(source, target=HOPPER, options=parsed.__dict__)
    with tempfile.TemporaryDirectory() as folder:
        # triton keeps the machine code and throws ptxas' messages away.
        ptx, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        ptx.write_text(compiled.asm["ptx"])
        command = [get_ptxas(HOPPER.arch).path, "-v", "--gpu-name=sm_90a", str(ptx), "-o", str(Path(folder, "again"))]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        cubin.write_bytes(compiled.asm["cubin"])
        text = subprocess.run([_NVDISASM, "-c", cubin], capture_output=True, text=True, check=True).stdout
    messages = [line.strip() for line in log.splitlines() if "warning" in line.lower() or re.search(r"C75\d\d", line)]
    messages += not_descriptors(compiled.asm["ptx"])
    code = sass.parse(text)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    return Report(
        name=name,
        registers=int(re.search(r"Used (\d+) registers", log).group(1)),
        spill_bytes=int(spills.group(1)) + int(spills.group(2)),
        loop_spills=sass.loop_spills(code),
        early_writes=sass.early_writes(code),
        shared_bytes=compiled.metadata.shared,
        counts=dict(collections.Counter(re.split(r"[.\s]", i, maxsplit=1)[0] for i in code.instructions)),
        max_regs=[int(i.split()[-1], 0) for i in code.instructions if i.startswith("USETMAXREG")],
        warnings=messages,
    )


def not_descriptors(ptx: str) -> list[str]:
    """What a kernel's own assembly takes for descriptors, by the number of a parameter, and what is none."""
    descriptors = set(re.findall(r"\.param \.align 64 \.b8 (\w+_param_\d+)\[128\]", ptx))
    taken = re.findall(r"mov\.b64 map, (\w+_param_\d+);", ptx)
    return [f"{name} is no descriptor" for name in sorted(set(taken) - descriptors)]


@dataclasses.dataclass(frozen=True)
class Case:
    """One configuration to compile: what a launch of it would pass, and the registers that its warp groups ask for."""

    kernel: object
    args: tuple
    options: dict
    register_budget: set[int]
    spills: tuple[int, int]  # bytes in all, and accesses in loops of matrix products, that are let pass
    product: str = "HGMMA"  # the instruction of its matrix products
    store: str = "UTMASTG"  # that of its results


def forward_case(
    head_dim: int, head_dim_v: int, window: str, dtype: torch.dtype, seqlen: int = 4096, bias: str = "", mask: str = "",
    softcap: float | None = None, sinks: bool = False, dropout: bool = False, formulas: str = "", split: int = 0,
    rounds: bool = False,
) -> Case:  # fmt: skip
    """The case of the forward kernel that the tile tables give for a problem.

    `window` is "full", "causal" or "window"; `bias` and `mask` name the axes that they have, of "bhqk"; `formulas`
    are of FORMULAS; `split` is into how many parts the keys are, of a few rows; with `rounds`, the result is in 8 bits.
    """
    from fa3_inductor.kernels import forward

    batch, q_heads, kv_heads = 2, 8, 2

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def operand(axes: str, dtype: torch.dtype) -> torch.Tensor | None:
        sizes = dict(b=batch, h=q_heads, q=seqlen, k=seqlen)
        return empty(*(sizes[axis] if axis in axes else 1 for axis in sizes), dtype=dtype) if axes else None

    q, k = (empty(batch, heads, seqlen, head_dim) for heads in (q_heads, kv_heads))
    v, out = (empty(batch, heads, seqlen, head_dim_v) for heads in (kv_heads, q_heads))
    out = out.to(torch.float8_e4m3fn) if rounds else out
    lse = empty(batch, q_heads, seqlen, dtype=torch.float32)
    left, right = WINDOWS[window]
    hidden = operand(mask, torch.bool)
    computed = _formulas(formulas, batch, q_heads, seqlen)
    ranges = _ranges(hidden, computed, (batch, q_heads, seqlen, seqlen))
    in_scores = bool(bias or mask or dropout or formulas or split)
    tile = forward.tile_for(head_dim, head_dim_v, window != "full", seqlen, in_scores)
    part = empty(batch, q_heads, split, seqlen, sum(forward.parts(head_dim_v)), dtype=torch.float32)
    grid, args = forward.launch_arguments(
        q, k, v, out, lse, 0.1, left, right, operand(bias, dtype), hidden, softcap, empty(q_heads) if sinks else None,
        ranges, empty(1, dtype=torch.int64) if dropout else None, 0.1 if dropout else 0.0,
        computed, empty(1, dtype=torch.float32) if rounds else None, tile=tile, sm_count=132,
        split=part if split else None,
    )  # fmt: skip
    budget = {tile.consumer_regs, tile.producer_regs}
    spills = SPILLS if ranges is None else SPILLS_WITH_MASK
    if formulas and head_dim > 128:
        spills = SPILLS_OF_LARGE_TILES
    store = "STG" if split else "UTMASTG"
    return Case(forward.forward_kernel, args, {"num_warps": 4}, budget, spills, store=store)


def plain_case(head_dim: int, window: str, dtype: torch.dtype, sinks: bool = False) -> Case:
    """The case of forward_plain_kernel that its tile table gives for a problem, as for `forward_case`."""
    from fa3_inductor.kernels import forward

    seqlen = 4096
    empty = functools.partial(torch.empty, dtype=dtype, device="meta")
    (q, out), (k, v) = ([empty(2, heads, seqlen, head_dim) for _ in range(2)] for heads in (8, 2))
    tile = forward.PLAIN_TILES[head_dim, window != "full"][1]
    grid, args = forward.plain_arguments(
        q, k, v, out, empty(2, 8, seqlen, dtype=torch.float32), 0.1, *WINDOWS[window], empty(8) if sinks else None,
        tile=tile, sm_count=132,
    )  # fmt: skip
    budget = {tile.consumer_regs, tile.producer_regs}
    return Case(forward.forward_plain_kernel, args, {"num_warps": 4}, budget, SPILLS_OF_PLAIN, store="STG")


# What formulas are compiled with: texts of a bias, a mask and a score, and the axes and dtypes of their tables.
FORMULAS = {
    "alibi": ("real(t0) * (real(k) - real(q))", "", "", (("h", torch.float32),)),
    "documents": ("", "t0 == t1", "", (("bq", torch.int64), ("bk", torch.int64))),
    "chunks": ("", "q // 512 == k // 512", "", ()),
    "everything": ("real(t0) * abs(real(q) - real(k))", "(t1 == t2) | (k < 64)", "", (
        ("h", torch.bfloat16), ("bq", torch.int32), ("bk", torch.int32),
    )),
    "clamp": ("", "", "where(s > 50.0, 50.0, where(s < -50.0, -50.0, s))", ()),
    "capped": ("", "", "50.0 * tanh((s + b) / 50.0)", ()),
    "absorbed": ("", "", "absorb(t0 != 0, s)", (("bq", torch.bool),)),
    "gate": ("", "", "sigmoid(s) * real(t0) + tanh(s * exp(-0.1 * abs(real(q) - real(k))))", (("h", torch.float32),)),
}  # fmt: skip


def _formulas(name: str, batch: int, q_heads: int, seqlen: int):
    from fa3_inductor.kernels.formulas import NO_FORMULAS, Formulas

    if not name:
        return NO_FORMULAS
    bias, mask, score, tables = FORMULAS[name]
    sizes = dict(b=batch, h=q_heads, q=seqlen, k=seqlen)
    shapes = ([sizes[axis] if axis in axes else 1 for axis in sizes] for axes, _ in tables)
    made = tuple(torch.empty(x, dtype=of, device="meta") for x, (_, of) in zip(shapes, tables))
    return Formulas(bias, mask, made, score)


def _ranges(mask: torch.Tensor | None, formulas, shape: tuple[int, ...]) -> torch.Tensor | None:
    from fa3_inductor.kernels.forward import ROWS
    from fa3_inductor.kernels.ranges import mask_axes, ranges_shape
    from fa3_inductor.kernels.terms import broadcast

    if mask is None and not formulas.mask:
        return None
    axes = mask_axes(None if mask is None else broadcast("mask", mask, shape), formulas, shape)
    return torch.empty(ranges_shape(shape, axes, ROWS), dtype=torch.int32, device="meta")


def backward_case(
    head_dim: int, head_dim_v: int, window: str, dtype: torch.dtype, bias: str = "", mask: str = "",
    softcap: float | None = None, bias_grad: bool = False, dropout: bool = False, formulas: str = "",
    deterministic: bool = False,
) -> Case:  # fmt: skip
    """The case of the backward kernel that its tile table gives for a problem, as for `forward_case`."""
    from fa3_inductor.kernels import backward

    batch, q_heads, kv_heads, seqlen = 2, 8, 2, 4096
    empty = functools.partial(torch.empty, dtype=dtype, device="meta")
    q, dout = empty(batch, q_heads, seqlen, head_dim), empty(batch, q_heads, seqlen, head_dim_v)
    k, v = empty(batch, kv_heads, seqlen, head_dim), empty(batch, kv_heads, seqlen, head_dim_v)
    sizes = dict(b=batch, h=q_heads, q=seqlen, k=seqlen)
    added, hidden = (
        empty([sizes[axis] if axis in axes else 1 for axis in sizes], dtype=of) if axes else None
        for axes, of in ((bias, dtype), (mask, torch.bool))
    )
    computed = _formulas(formulas, batch, q_heads, seqlen)
    tile = backward.tile_for(head_dim, head_dim_v, bool(bias or mask or softcap or dropout or formulas))
    work = backward.work_of(q, k, tile, *WINDOWS[window], not (deterministic or dropout), 132)
    dq, dk, dv, rows, sums, counts, dscores, ranges, turns = backward._buffers(
        q, k, v, hidden, computed, tile, work.slots, bias_grad, deterministic
    )
    grid, args = backward.launch_arguments(
        dout, q, k, v, added, hidden, rows[0].clone(), rows[1].clone(), sums, dq, dk, dv, dscores, ranges, counts, 0.1,
        *WINDOWS[window], softcap, empty(1, dtype=torch.int64) if dropout else None, 0.1 if dropout else 0.0,
        computed, turns, tile=tile, work=work,
    )  # fmt: skip
    kernel = backward.backward_wide_kernel if tile.wide else backward.backward_kernel
    spills = SPILLS_IN_ORDER if deterministic else SPILLS_OF_BACKWARD
    if tile.block_m == 128 or dropout:
        spills = SPILLS_OF_LARGE_TILES
    if computed.score:
        spills = SPILLS_OF_FUNCTIONS
    return Case(kernel, args, {"num_warps": 4}, {240, 24}, spills)


def fp8_case(
    head_dim: int, head_dim_v: int, window: str, blocks: bool = False, tokens: bool = False, bias: str = "",
    mask: str = "", softcap: float | None = None, sinks: bool = False, formulas: str = "", turned: bool = True,
    rounds: bool = False,
) -> Case:  # fmt: skip
    """The case of the FP8 kernel that its tile table gives for a problem, as for `forward_case`."""
    from fa3_inductor.kernels import fp8
    from fa3_inductor.kernels.forward import ROWS

    batch, q_heads, kv_heads, seqlen = 2, 8, 2, 4096
    sizes = dict(b=batch, h=q_heads, q=seqlen, k=seqlen)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    eights = functools.partial(empty, dtype=fp8.E4M3)
    added, hidden = (
        empty(*(sizes[axis] if axis in axes else 1 for axis in sizes), dtype=of) if axes else None
        for axes, of in ((bias, torch.bfloat16), (mask, torch.bool))
    )
    tile = fp8.tile_for(head_dim, head_dim_v, tokens or bool(bias or mask or softcap or formulas))
    rows = (q_heads, ROWS), (kv_heads, tile.block_n), (kv_heads, tile.block_n)
    scales = [empty(batch, heads, seqlen // size if blocks else 1) for heads, size in rows]
    computed = _formulas(formulas, batch, q_heads, seqlen)
    ranges = _ranges(hidden, computed, (batch, q_heads, seqlen, seqlen))
    grid, args = fp8.launch_arguments(
        eights(batch, q_heads, seqlen, head_dim), eights(batch, kv_heads, seqlen, head_dim),
        eights(batch, kv_heads, head_dim_v, seqlen) if turned else eights(batch, kv_heads, seqlen, head_dim_v),
        empty(batch, q_heads, seqlen, head_dim_v, dtype=fp8.E4M3 if rounds else torch.bfloat16),
        empty(batch, q_heads, seqlen), scales, 0.1, *WINDOWS[window], added, hidden, softcap,
        empty(q_heads) if sinks else None, ranges,
        tuple(empty(batch, heads, seqlen) for heads, _ in rows) if tokens else (), computed,
        empty(1) if rounds else None, tile=tile, turned=turned, sm_count=132,
    )  # fmt: skip
    budget = {tile.consumer_regs, tile.producer_regs}
    spills = SPILLS_OF_LARGE_TILES if tokens else SPILLS_OF_FP8 if ranges is None else SPILLS_WITH_MASK
    return Case(fp8.fp8_kernel, args, {"num_warps": 4}, budget, spills, product="QGMMA")


WINDOWS = {"full": (None, None), "causal": (None, 0), "window": (511, 0)}


def cases() -> dict[str, functools.partial]:
    """What makes each `Case` that is compiled, by name: every row of the tile tables and every kind of score term."""
    bf16, fp16 = torch.bfloat16, torch.float16
    problems = {
        f"d{d}{f'/{dv}' if dv != d else ''}-{window}": (d, dv, window, bf16)
        for d, dv in ((64, 64), (128, 128), (192, 128), (256, 256))
        for window in ("full", "causal", "window")
    }
    made = {f"forward-{name}": functools.partial(forward_case, *problem) for name, problem in problems.items()}
    for name, problem, more in (
        ("d64-causal-short", (64, 64, "causal", bf16), dict(seqlen=1024)),
        ("d64-full-fp16", (64, 64, "full", fp16), {}),
        ("d16-full", (16, 16, "full", bf16), {}),
        ("d72-full", (72, 72, "full", bf16), {}),
        ("d96-causal", (96, 96, "causal", bf16), {}),
        ("d256/192-causal", (256, 192, "causal", bf16), {}),
        ("d64-bias", (64, 64, "full", bf16), dict(bias="hqk")),
        ("d128-bias-mask", (128, 128, "causal", bf16), dict(bias="hk", mask="bqk")),
        ("d128-bias", (128, 128, "causal", bf16), dict(bias="hqk")),
        ("d64-bias-inside", (64, 64, "full", bf16), dict(bias="bhqk", formulas="capped")),
        ("d256-bias", (256, 256, "full", bf16), dict(bias="bhqk")),
        ("d128-key-mask", (128, 128, "causal", bf16), dict(mask="bk")),
        ("d64-mask", (64, 64, "full", bf16), dict(mask="bqk")),
        ("d128-mask", (128, 128, "full", bf16), dict(mask="qk")),
        ("d256-mask-rounds", (256, 256, "full", fp16), dict(mask="qk", rounds=True)),
        ("d64-softcap", (64, 64, "causal", bf16), dict(softcap=50.0)),
        ("d256-softcap-window", (256, 256, "window", bf16), dict(softcap=50.0)),
        ("d64-sinks-window", (64, 64, "window", bf16), dict(sinks=True)),
        ("d64-dropout", (64, 64, "full", bf16), dict(dropout=True)),
        ("d128-dropout", (128, 128, "causal", bf16), dict(dropout=True)),
        ("d256-dropout-mask", (256, 256, "full", fp16), dict(dropout=True, mask="bk")),
        ("d64-chunks", (64, 64, "causal", bf16), dict(formulas="chunks")),
        ("d128-alibi", (128, 128, "causal", bf16), dict(formulas="alibi")),
        ("d128-documents", (128, 128, "causal", bf16), dict(formulas="documents")),
        ("d256-formulas", (256, 256, "full", bf16), dict(formulas="everything", mask="bk")),
        ("d256-gate", (256, 256, "causal", bf16), dict(formulas="gate")),
        ("d128-parts", (128, 128, "full", bf16), dict(split=8)),
        ("d256-parts-mask", (256, 256, "window", bf16), dict(split=8, mask="bk", softcap=50.0)),
    ):
        made[f"forward-{name}"] = functools.partial(forward_case, *problem, **more)
    for name, problem, more in (
        ("d128-full", (128, "full", bf16), {}),
        ("d128-causal", (128, "causal", bf16), {}),
        ("d128-window-sinks", (128, "window", fp16), dict(sinks=True)),
        ("d256-full", (256, "full", fp16), {}),
        ("d256-causal", (256, "causal", bf16), {}),
        ("d256-window", (256, "window", bf16), {}),
    ):
        made[f"forward-plain-{name}"] = functools.partial(plain_case, *problem, **more)
    for name, problem in problems.items():
        if problem[0] != 192:  # those are the 256's
            made[f"backward-{name}"] = functools.partial(backward_case, *problem)
    for name, problem, more in (
        ("d40/24-full", (40, 24, "full", bf16), {}),
        ("d64-bias-grad", (64, 64, "full", bf16), dict(bias="bhqk", bias_grad=True)),
        ("d128-bias-grad", (128, 128, "causal", bf16), dict(bias="hqk", bias_grad=True)),
        ("d64-bias-mask", (64, 64, "causal", bf16), dict(bias="hk", mask="bqk")),
        ("d128-mask", (128, 128, "full", bf16), dict(mask="bqk")),
        ("d128-softcap-window", (128, 128, "window", bf16), dict(softcap=50.0)),
        ("d64-dropout", (64, 64, "full", bf16), dict(dropout=True)),
        ("d128-dropout", (128, 128, "causal", bf16), dict(dropout=True)),
        ("d256-dropout-mask", (256, 256, "full", fp16), dict(dropout=True, mask="bk")),
        ("d64-alibi", (64, 64, "causal", bf16), dict(formulas="alibi")),
        ("d64-deterministic", (64, 64, "full", bf16), dict(deterministic=True)),
        ("d128-deterministic", (128, 128, "causal", bf16), dict(deterministic=True)),
        ("d128-window-deterministic", (128, 128, "window", bf16), dict(deterministic=True)),
        ("d256-window-deterministic", (256, 256, "window", bf16), dict(deterministic=True)),
        ("d128-documents", (128, 128, "causal", bf16), dict(formulas="documents")),
        ("d256-formulas", (256, 256, "full", bf16), dict(formulas="everything", mask="bk")),
        ("d64-clamp", (64, 64, "full", bf16), dict(formulas="clamp")),
        ("d64-bias-grad-absorbed", (64, 64, "full", bf16), dict(bias="hqk", bias_grad=True, formulas="absorbed")),
        ("d128-gate", (128, 128, "causal", bf16), dict(formulas="gate")),
        ("d64-bias-inside", (64, 64, "full", bf16), dict(bias="bhqk", formulas="capped")),
    ):
        made[f"backward-{name}"] = functools.partial(backward_case, *problem, **more)
    for name, problem, more in (
        ("d64-full", (64, 64, "full"), {}),
        ("d128-causal", (128, 128, "causal"), {}),
        ("d256-full-blocks-rounds", (256, 256, "full"), dict(blocks=True, rounds=True)),
        ("d64-causal-raw", (64, 64, "causal"), dict(turned=False)),
        ("d128-full-raw", (128, 128, "full"), dict(turned=False)),
        ("d256-causal-raw", (256, 256, "causal"), dict(turned=False)),
        ("d256-mask-raw", (256, 160, "full"), dict(mask="bk", turned=False)),
        ("d128-window-blocks", (128, 128, "window"), dict(blocks=True)),
        ("d192/128-causal", (192, 128, "causal"), {}),
        ("d256-full-blocks", (256, 256, "full"), dict(blocks=True)),
        ("d80/40-causal", (80, 40, "causal"), {}),
        ("d128-tokens-blocks", (128, 128, "causal"), dict(tokens=True, blocks=True)),
        ("d256-tokens-blocks", (256, 256, "full"), dict(tokens=True, blocks=True)),
        ("d64-bias-blocks", (64, 64, "full"), dict(bias="hqk", blocks=True)),
        ("d128-mask-sinks", (128, 128, "causal"), dict(mask="bqk", sinks=True)),
        ("d256-softcap-mask", (256, 256, "full"), dict(softcap=50.0, mask="bk")),
        ("d128-alibi-blocks", (128, 128, "causal"), dict(formulas="alibi", blocks=True)),
        ("d128-gate-blocks", (128, 128, "causal"), dict(formulas="gate", blocks=True)),
    ):
        made[f"fp8-{name}"] = functools.partial(fp8_case, *problem, **more)
    return made


def violations(
    report: Report, register_budget: set[int], spills: tuple[int, int] = SPILLS, product: str = "HGMMA",
    store: str = "UTMASTG",
) -> list[str]:  # fmt: skip
    """The rules that every Hopper kernel of this package keeps, as far as this one breaks them."""
    broken = [f"no {opcode}" for opcode in (product, "UTMALDG", store, "USETMAXREG") if opcode not in report.counts]
    if report.spill_bytes > spills[0]:
        broken.append(f"{report.spill_bytes} bytes spilled")
    if report.loop_spills > spills[1]:
        broken.append(f"{report.loop_spills} accesses to spilled registers in a loop of matrix products")
    for instruction in report.early_writes:
        broken.append(f"'{instruction}' writes to an operand of a matrix product in flight (triton-lang/triton#11781)")
    if report.shared_bytes > SHARED_LIMIT:
        broken.append(f"{report.shared_bytes} bytes of shared memory")
    # Beyond the budget, 256 is what the first warp group has before the roles part, and one other number what the rest
    # wait with. Asking for more than there is takes it from the first warp group without a word: then there is another.
    others = set(report.max_regs) - register_budget - {256}
    if not register_budget <= set(report.max_regs) or len(others) > 1:
        broken.append(f"setmaxnreg {sorted(set(report.max_regs))} for a budget of {sorted(register_budget)}")
    return broken + report.warnings


def check(name: str) -> dict:
    """Compiles the case `name` in a process of its own, since a compiler's assertion would end this one.

    Returns:
        the fields of `Report`, and "violations", a list of sentences.
    """
    receiver, sender = _processes.Pipe(duplex=False)
    child = _processes.Process(target=_send, args=(name, sender))
    child.start()
    sender.close()
    try:
        result = receiver.recv()
    except EOFError:
        child.join()
        return {"name": name, "violations": [f"does not compile: exit status {child.exitcode}"]}
    child.join()
    return result


# Forked from one that has imported all of this, which takes as long as a small kernel.
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["__main__", "fa3_inductor.kernels.offline", "fa3_inductor.kernels.backward"])


def _send(name: str, sender) -> None:
    try:
        sender.send(_result(name))
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[-1]
        sender.send({"name": name, "violations": [f"does not compile: {type(error).__name__}: {reason}"]})


def _result(name: str) -> dict:
    case = cases()[name]()
    report = compile_offline(name, case.kernel, case.args, case.options)
    broken = violations(report, case.register_budget, case.spills, case.product, case.store)
    return dataclasses.asdict(report) | {"violations": broken}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=cases(), help="only this one, as JSON")
    name = parser.parse_args().case
    if name:
        print(json.dumps(_result(name)))
        return 0
    failed = 0
    print(f"{'kernel':32} {'regs':>4} {'spill':>5} {'smem':>6} {'GMMA':>5} {'insts':>6}  setmaxnreg")
    with ThreadPoolExecutor(2) as pool:
        for result in pool.map(check, cases()):
            if counts := result.get("counts"):
                products = counts.get("HGMMA", 0) + counts.get("QGMMA", 0)
                print(
                    f"{result['name']:32} {result['registers']:4} {result['spill_bytes']:5} {result['shared_bytes']:6} "
                    f"{products:5} {sum(counts.values()):6}  {sorted(set(result['max_regs']))}"
                )
            for sentence in result["violations"]:
                failed = 1
                print(f"  {result['name']}: {sentence}")
    return failed


if __name__ == "__main__":
    sys.exit(main())

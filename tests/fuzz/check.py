"""One program, compiled with the pass and compared with what it does without."""

import contextlib
import dataclasses
import linecache
import math
import warnings
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fa3_inductor import Reason, Report

from ..forms.harness import Run, error, fuse, run
from .programs import Program


@dataclasses.dataclass(frozen=True)
class Setting:
    target: str
    dtype: torch.dtype
    trains: bool
    dynamic: bool | None


SETTINGS = st.builds(
    Setting,
    target=st.sampled_from(["reference", "reference", "sdpa"]),
    dtype=st.sampled_from([torch.float32] * 8 + [torch.bfloat16] * 2 + [torch.float16]),
    trains=st.booleans(),
    dynamic=st.sampled_from([None] * 9 + [True]),
)


class Wrong(AssertionError):
    """The compiled program does not do what the program does."""


class NotAProgram(Exception):
    """The program does not run without the pass either."""


def load(source: str, wide: bool = False) -> tuple[Callable, list]:
    """The program and its inputs, always the same ones; with ``wide``, what it widens goes to float64."""
    if wide:
        source = source.replace("torch.float32", "torch.float64").replace(".float()", ".double()")
    name = f"<program {hash(source)}>"
    linecache.cache[name] = (len(source), None, source.splitlines(True), name)
    names = {"torch": torch, "F": F, "math": math}
    torch.manual_seed(0)
    exec(compile(source, name, "exec"), names)
    return names["program"], names["inputs"]()


def check(program: Program, setting: Setting) -> Report:
    """Compile, run and compare; the report of the pass.

    Raises:
        NotAProgram: PyTorch cannot run it.
        Wrong: the pass changes what it computes.
    """
    fn, args = load(program.source)
    with _quiet():
        try:
            eager = run(fn, args, setting.dtype, setting.trains)
            exact = run(load(program.source, wide=True)[0], args, torch.float64, setting.trains)
        except Exception as failure:
            raise NotAProgram(f"{type(failure).__name__}: {failure}") from None
        compiled, report = fuse(fn, target=setting.target, dynamic=setting.dynamic)
        try:
            ours = run(compiled, args, setting.dtype, setting.trains)
        except Exception as failure:
            ours = failure
        if internal := _internal(report):
            raise Wrong(internal)
        wrong = difference(ours, eager, exact, setting.dtype)
        if wrong and not _is_torch_to_blame(fn, args, setting, ours, eager, exact):
            raise Wrong(wrong)
    return report


def _internal(report: Report) -> str:
    for graph in report.graphs:
        if graph.error and not graph.error.startswith(Reason.CAPTURE.sentence):
            return f"the pass failed: {graph.error}"
    broken = [s.detail for s in report.sites if s.reason is Reason.INTERNAL]
    return f"INTERNAL: {broken[0]}" if broken else ""


def _is_torch_to_blame(
    fn: Callable, args: list, setting: Setting, ours: Run | Exception, eager: Run, exact: Run
) -> bool:
    """Whether Dynamo alone goes wrong too, or its flash attention does, and ours is what its plain one computes.

    On a CPU that has gradients from a log-sum-exp in which rows that a number hides whole have lost their weights.
    """
    with sdpa_kernel(SDPBackend.MATH):
        plain = run(fn, args, setting.dtype, setting.trains)
    if not difference(ours, plain, exact, setting.dtype):
        return True
    torch._dynamo.reset()
    try:
        plain = run(torch.compile(fn, backend="eager", dynamic=setting.dynamic), args, setting.dtype, setting.trains)
    except Exception:
        return True
    return bool(difference(plain, eager, exact, setting.dtype))


_MUCH = 0.05  # an error of eager's that says it computes something else in this dtype than in float64


def difference(ours: Run | Exception, eager: Run, exact: Run, dtype: torch.dtype) -> str:
    """What is wrong with ``ours``, or "".

    As in ``assert_as_good_as_eager``, no further from float64 than 1.5 times eager. Where float64 says something else
    altogether than eager (a mask's number swallows scores in one dtype, and not in the other), eager is what counts,
    unless ours is less than half as far from float64 (in float16, -1e4 swallows a bias, and only half of the scores).
    """
    if isinstance(ours, Exception):
        return f"raises {type(ours).__name__}: {ours}"
    floor = torch.finfo(dtype).eps * (16 if dtype == torch.float32 else 1 / 8)
    # One tensor of a few numbers in 16 bits is as much a matter of luck.
    few = 1.5 if dtype == torch.float32 else 4
    # Of gradients that cancel out, only rounding is left.
    sizes = [_rms(x[x.isfinite()]) for x in (exact.out, *exact.grads) if x is not None]
    negligible = (64 if dtype == torch.float32 else 8) * torch.finfo(dtype).eps * max(sizes)
    names = ["out", *(f"grad {i}" for i in range(len(eager.grads)))]
    sets = zip(names, (ours.out, *ours.grads), (eager.out, *eager.grads), (exact.out, *exact.grads), strict=True)
    for name, mine, theirs, truth in sets:
        if theirs is None or mine is None:
            given = mine if theirs is None else theirs
            if given is not None and given.any():
                return f"{name}: {'None' if mine is None else 'a gradient'} where eager has the contrary"
            continue
        if mine.shape != theirs.shape or mine.dtype != theirs.dtype:
            return f"{name}: {mine.dtype} {tuple(mine.shape)}, eager's {theirs.dtype} {tuple(theirs.shape)}"
        is_finite = torch.ones_like(theirs, dtype=torch.bool) if truth is None else truth.isfinite()
        # What overflows in this dtype only, as exp of scores that are not less their maximum, may as well not.
        overflown = ~theirs.isfinite() & is_finite
        mine, theirs = mine.where(~overflown, 0.0), theirs.where(~overflown, 0.0)
        if not torch.equal(_kinds(mine), _kinds(theirs)):
            counts = [int(_kinds(x).count_nonzero()) for x in (mine, theirs)]
            return f"{name}: {counts[0]} of {mine.numel()} are NaN or infinite, {counts[1]} of eager's, or others"
        compared = theirs.isfinite() & ~overflown
        mine, theirs = mine[compared], theirs[compared]
        near, far, limit = error(mine, theirs), math.inf, 64 * floor
        if truth is not None and truth[compared].isfinite().all():
            far, own = error(mine, truth[compared]), error(theirs, truth[compared])
            if far <= max(limit, min(few * own + floor, _MUCH), own / 2):
                continue
        if near > max(limit, (few - 1.5) * _MUCH) and _rms(mine.double() - theirs.double()) > negligible:
            return f"{name}: {near:.2g} from eager, {far:.2g} from float64"
    return ""


def _kinds(x: Tensor) -> Tensor:
    """0 where finite, other numbers for NaN and the infinities."""
    return x.isnan() + 2 * x.isposinf() + 3 * x.isneginf()


def _rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item() if x.numel() else 0.0


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield

"""One model through the pass: what was found and fused, and how far the result is from that of the unfused model."""

import collections
import contextlib
import copy
import dataclasses
import math
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils._pytree import tree_map_only

from fa3_inductor import Report, compat, config
from fa3_inductor.rewrite import rewrite_graph

from .registry import Call, Model

compat.prepare_dynamo()

# Relative L2 errors in float32. What fusing changes is the order of some sums; this leaves room for deep models.
OUT_LIMIT, GRAD_LIMIT = 1e-3, 5e-3
# On the Hopper kernels, in bfloat16: how many times eager's own error, and what is added to it.
TIMES_EAGER, BESIDE_EAGER = 1.5, 5e-3
DRAWS = 3


@dataclasses.dataclass(frozen=True)
class Rejection:
    """Why an attention was left as written: the reason's name, what was seen, and the line of the model's code."""

    reason: str
    detail: str
    source: str
    code: str

    def __str__(self) -> str:
        detail = f" ({self.detail})" if self.detail else ""
        return f"{self.reason}{detail} at {'/'.join(self.source.split('/')[-2:])}: {self.code}"


@dataclasses.dataclass
class Result:
    """One model in one mode.

    ``found`` counts the attentions that the report lists, ``masks`` what was proved about those that were fused,
    ``kernels`` where those run, and ``stock`` is how many Inductor's own patterns fuse (None where that was not asked
    for, or failed). The errors are relative to the unfused model, in float32 or, where the target is "hopper", in
    float64; those of the unfused model in bfloat16 are beside them there. NaN where one has a NaN or an infinity in
    other places.

    ``failure`` says why there is nothing to compare: the model, or Dynamo on it, does not run without the pass either,
    or time ran out. ``crash`` is the exception of a model that runs without the pass.
    """

    name: str
    mode: str
    expected: int | None
    to_fuse: int | None
    tolerance: float = 1.0
    found: int = 0
    fused: int = 0
    rejected: Counter[Rejection] = dataclasses.field(default_factory=Counter)
    masks: Counter[str] = dataclasses.field(default_factory=Counter)
    kernels: Counter[str] = dataclasses.field(default_factory=Counter)
    out_error: float = 0.0
    grad_error: float = 0.0
    eager_out_error: float | None = None
    eager_grad_error: float | None = None
    seconds: float = 0.0
    draws: int = 1
    captures: list[str] = dataclasses.field(default_factory=list)
    stock: int | None = None
    failure: str = ""
    crash: str = ""

    @property
    def reasons(self) -> Counter[str]:
        """How often each reason was given."""
        names: Counter[str] = Counter()
        for rejection, times in self.rejected.items():
            names[rejection.reason] += times
        return names

    @property
    def wrong(self) -> bool:
        """Another result than that of the unfused model, or none."""
        if self.crash:
            return True
        pairs = (
            (self.out_error, self.eager_out_error, OUT_LIMIT),
            (self.grad_error, self.eager_grad_error, GRAD_LIMIT),
        )
        for error, eager, limit in pairs:
            limit = limit if eager is None else TIMES_EAGER * eager + BESIDE_EAGER
            if not error <= limit * self.tolerance and not (eager is not None and math.isnan(eager)):
                return True
        return False

    @property
    def bad(self) -> bool:
        """What must not happen to any model."""
        return self.wrong or bool(self.captures)

    @property
    def missed(self) -> int:
        """How many attentions that should have been fused were not."""
        return 0 if self.failure else max(0, (self.to_fuse or 0) - self.fused)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        out = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        out["rejected"] = [{**dataclasses.asdict(why), "times": times} for why, times in self.rejected.items()]
        return {**out, "missed": self.missed, "bad": self.bad}


class TimeOut(BaseException):
    """Not an Exception: the pass turns those into a report, and Dynamo into graph breaks."""


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raises :class:`TimeOut` in the block after ``seconds``; 0 for no limit. Main thread only."""

    def ring(_signal: int, _frame: Any) -> None:
        raise TimeOut

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def run(model: Model, mode: str, *, target: str = "reference", stock: bool = False, seconds: int = 60) -> Result:
    """Runs ``model`` unfused and fused in ``mode`` ("inference" or "training"), and compares.

    Training means gradients of all parameters, with dropout off. ``stock`` also counts what Inductor's own patterns
    would fuse; each of the two parts may take ``seconds``. With "hopper" as the target the model runs on the GPU in
    bfloat16, and is compared with itself in float64; what is wrong there is drawn anew, since another rounding may send
    a token to another expert.
    """
    start = time.perf_counter()
    for seed in range(DRAWS if target == "hopper" else 1):
        result = _run(model, mode, target, stock, seconds, seed)
        result.draws = seed + 1
        torch._dynamo.reset()
        if not result.wrong or result.crash:
            break
    result.seconds = time.perf_counter() - start
    return result


def _run(model: Model, mode: str, target: str, stock: bool, seconds: int, seed: int) -> Result:
    result = Result(model.name, mode, model.attentions, model.to_fuse, model.tolerance)
    stage = "build"
    report = Report()
    try:
        with time_limit(seconds):
            call, eager = prepare(model, mode, "cuda" if target == "hopper" else "cpu", seed), None
            stage = "run"
            if target == "hopper":
                call = cast(call, torch.bfloat16)
                eager, exact = evaluate(call, mode), evaluate_in_more_than_bfloat16(call, mode)
            else:
                exact = evaluate(call, mode)
            stage = "compile"
            ours = evaluate(call, mode, fusing(report, target))
            stage = "compare"
            if not model.random and eager is None:
                result.out_error, result.grad_error = errors(ours, exact)
            elif not model.random:
                result.out_error, result.grad_error = errors(ours, exact, together=True)
                result.eager_out_error, result.eager_grad_error = errors(eager, exact, together=True)
    except TimeOut:
        result.failure = f"{stage}: took more than {seconds} s"
    except Exception as error:
        error = getattr(error, "inner_exception", error)  # Dynamo's own says only that a backend raised
        text = f"{stage}: {type(error).__name__}: {first_line(str(error))}"
        if stage == "compile" and compiles_without_the_pass(call, mode):
            result.crash = text
        else:
            result.failure = text
    describe(result, report)
    if stock and not result.failure:
        with contextlib.suppress(TimeOut, Exception), time_limit(seconds):
            result.stock = stock_attentions(call, mode)
    return result


def first_line(text: str) -> str:
    return text.strip().partition("\n")[0]


def describe(result: Result, report: Report) -> None:
    """Copies what the report says."""
    result.found, result.fused = len(report.sites), len(report.fused)
    result.masks.update(site.mask for site in report.fused)
    result.kernels.update(site.target for site in report.fused)
    for site in report.rejected:
        name = "?" if site.reason is None else site.reason.name
        result.rejected[Rejection(name, site.detail, site.source, site.code)] += 1
    result.captures = [graph.error for graph in report.graphs if graph.error]


def prepare(model: Model, mode: str, device: str, seed: int) -> Call:
    """The model in float32 on ``device``, without dropout, with or without gradients."""
    torch.manual_seed(seed)
    call = model.build()
    call.module.float().eval()
    stir(call.module)
    for parameter in call.module.parameters():
        parameter.requires_grad_(mode == "training" and parameter.is_floating_point())
    arguments = tree_map_only(Tensor, lambda x: x.to(device), (call.args, call.kwargs))
    return Call(call.module.to(device), *arguments)


def cast(call: Call, dtype: torch.dtype) -> Call:
    """A copy in ``dtype``."""
    call = copy.deepcopy(call)

    def convert(x: Tensor) -> Tensor:
        return x.to(dtype) if x.is_floating_point() else x

    return Call(call.module.to(dtype), *tree_map_only(Tensor, convert, (call.args, call.kwargs)))


@torch.no_grad()
def stir(module: nn.Module) -> None:
    """Makes errors visible that a fresh initialisation hides.

    With weights of 0.02 every softmax is uniform whatever its scale; biases and heads of zeros, or a layer scale of
    1e-5, let nothing of an attention through.
    """
    for parameter in module.parameters():
        if parameter.numel() < 2 or not parameter.is_floating_point():
            continue
        if parameter.std() < 1e-6:
            parameter.add_(0.5 * torch.randn_like(parameter))
        elif parameter.ndim > 1:
            inputs = parameter.numel() // parameter.shape[0]
            parameter.mul_(inputs**-0.5 / parameter.std())


@dataclasses.dataclass
class Evaluation:
    """Floating-point outputs, and the gradients of the parameters by name."""

    outputs: list[Tensor]
    grads: dict[str, Tensor | None]


def evaluate(call: Call, mode: str, backend: Any = None) -> Evaluation:
    """One call, and in training one backward from a random gradient; compiled anew if there is a ``backend``."""
    module, outputs = forward(call, mode, backend)
    grads = gradients(module, outputs) if mode == "training" else {}
    return Evaluation([x.detach() for x in outputs], grads)


def evaluate_in_more_than_bfloat16(call: Call, mode: str) -> Evaluation:
    """In float64, or in float32 where something of the model cannot (grouped products on a GPU)."""
    try:
        return evaluate(cast(call, torch.float64), mode)
    except Exception:
        return evaluate(cast(call, torch.float32), mode)


def forward(call: Call, mode: str, backend: Any = None) -> tuple[nn.Module, list[Tensor]]:
    """The module that was called, which is a copy, and what it returned.

    What a call writes to buffers, caches and arguments is not seen by the next.
    """
    torch._dynamo.reset()
    call = copy.deepcopy(call)
    function = call.module if backend is None else torch.compile(call.module, backend=backend)
    torch.manual_seed(1)
    # Where there is a graph break, the layers of a model share code and are compiled one by one.
    with torch.set_grad_enabled(mode == "training"), torch._dynamo.config.patch(recompile_limit=64):
        return call.module, list(tensors(function(*call.args, **call.kwargs)))


def gradients(module: nn.Module, outputs: list[Tensor]) -> dict[str, Tensor | None]:
    generator = torch.Generator().manual_seed(2)
    leaves = {name: x for name, x in module.named_parameters() if x.requires_grad}
    roots = [x for x in outputs if x.requires_grad]
    seeds = [torch.randn(x.shape, generator=generator, dtype=torch.float32).to(x) for x in roots]
    return dict(zip(leaves, torch.autograd.grad(roots, list(leaves.values()), seeds, allow_unused=True)))


def tensors(output: Any) -> Iterator[Tensor]:
    """The floating-point tensors of what a model returns, in order. Caches are not looked into."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, dict):
        yield from tensors(list(output.values()))
    elif isinstance(output, (list, tuple)):
        for part in output:
            yield from tensors(part)


def fusing(report: Report, target: str) -> Callable:
    """A backend that rewrites graphs and then runs them as they are."""

    def backend(gm: torch.fx.GraphModule, _inputs: list[Any]) -> Callable:
        with config.patch(target=target):
            report.graphs.append(rewrite_graph(gm))
        return gm.forward

    return backend


def compiles_without_the_pass(call: Call, mode: str) -> bool:
    try:
        evaluate(call, mode, "eager")
    except Exception:
        return False
    return True


def errors(ours: Evaluation, exact: Evaluation, together: bool = False) -> tuple[float, float]:
    """The largest error of an output, and that of a gradient; or, ``together``, that of all gradients.

    In bfloat16 that of one parameter says little: where weights are all about the same, as in a model that nobody has
    trained, the gradients of q and k are small differences, in which the rounding of the output remains (as in every
    FlashAttention, whose backward takes rowsum(dO * O) for rowsum(P * dP)).
    """
    if len(ours.outputs) != len(exact.outputs):
        return math.nan, math.nan
    out_error = worst(distance(x, y) for x, y in zip(ours.outputs, exact.outputs))
    if together:
        pairs = [(ours.grads[name], x) for name, x in exact.grads.items() if x is not None]
        pairs = [(torch.zeros_like(x) if mine is None else mine, x) for mine, x in pairs]
        flat = [torch.cat([x.flatten() for x in side]) for side in zip(*pairs)]
        return out_error, distance(*flat) if flat else 0.0
    # Some gradients are zero but for rounding, that of a key projection's bias among them: only what would be seen
    # beside the largest counts.
    floor = 1e-4 * max((norm(x) for x in exact.grads.values() if x is not None), default=0.0)
    return out_error, worst(distance(ours.grads[name], x, floor) for name, x in exact.grads.items())


def worst(errors: Iterable[float]) -> float:
    """The largest; NaN if one of them is."""
    found = [0.0, *errors]
    return math.nan if any(map(math.isnan, found)) else max(found)


def norm(x: Tensor) -> float:
    """L2, of what is finite."""
    return x[x.isfinite()].double().norm().item()


def distance(ours: Tensor | None, exact: Tensor | None, floor: float = 0.0) -> float:
    """|ours - exact| / (|exact| + floor) in L2; NaN unless what is not finite is the same on both sides."""
    if ours is None or exact is None:
        there = exact if ours is None else ours
        return 0.0 if there is None else norm(there) / (floor or 1.0)  # no gradient is as good as one of zeros
    if ours.shape != exact.shape:
        return math.nan
    finite = exact.isfinite()
    if not torch.equal(ours[~finite].nan_to_num(0.0), exact[~finite].nan_to_num(0.0)):
        return math.nan
    if not torch.equal(ours.isnan(), exact.isnan()) or not torch.equal(ours.isfinite(), finite):
        return math.nan
    return norm(ours.double() - exact.double()) / (norm(exact) + floor + 1e-30)


def stock_attentions(call: Call, mode: str) -> int:
    """How often Inductor's own attention patterns match in the same call; its graph passes run, and generate nothing.

    This is Inductor's counter: an attention in chunks counts once a chunk, and some of those in training twice.
    """
    from torch._inductor.compile_fx import compile_fx

    def without_code(gm: torch.fx.GraphModule, _inputs: list[Any], **_options: Any) -> Callable:
        def boxed(inputs: list[Any]) -> Any:
            arguments = list(inputs)
            inputs.clear()
            return gm(*arguments)

        boxed._boxed_call = True
        return boxed

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable:
        return compile_fx(gm, inputs, inner_compile=without_code)

    counters.clear()
    caches = {"fx_graph_cache": False, "fx_graph_remote_cache": False}
    with torch._inductor.config.patch(caches), torch._functorch.config.patch(enable_autograd_cache=False):
        forward(call, mode, backend)
    return counters["inductor"]["fuse_attention"]


def totals(results: Iterable[Result]) -> dict[str, int]:
    """Sums over what ran; attentions that nobody has counted are left out of what is expected."""
    sums: dict[str, int] = collections.defaultdict(int)
    for result in results:
        if not result.failure:
            sums["expected"] += result.expected or 0
            sums["found"] += result.found
            sums["fused"] += result.fused
            sums["missed"] += result.missed
            sums["stock"] += result.stock or 0
    return sums

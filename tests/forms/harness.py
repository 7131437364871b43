"""Compiling a function with the pass, and comparing it with the unfused computation in float64."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fa3_inductor import Report, compat, config
from fa3_inductor.rewrite import rewrite_graph

compat.prepare_dynamo()


def fuse(
    fn: Callable, *, target: str = "auto", dynamic: bool | None = None, graphs: list | None = None
) -> tuple[Callable, Report]:
    """``fn`` compiled by the pass alone: graphs are rewritten and then run as they are, without code generation.

    They are added to ``graphs``.
    """
    report = Report()

    def backend(gm: torch.fx.GraphModule, _inputs: list[Any]) -> Callable:
        with config.patch(target=target):
            report.graphs.append(rewrite_graph(gm))
        if graphs is not None:
            graphs.append(gm)
        return gm.forward

    torch._dynamo.reset()
    return torch.compile(fn, backend=backend, dynamic=dynamic), report


@dataclasses.dataclass
class Run:
    out: Tensor
    grads: list[Tensor]


def run(fn: Callable, args: list[Any], dtype: torch.dtype, grads: bool = True, seed: int = 0) -> Run:
    """One forward, and one backward from a random gradient, with the floating arguments in ``dtype``."""

    def prepare(x: Any) -> Any:
        if isinstance(x, Tensor) and x.is_floating_point():
            return x.detach().to(dtype).requires_grad_(grads)
        return x.clone() if isinstance(x, Tensor) else x

    prepared = [prepare(x) for x in args]
    out = fn(*prepared)
    out = out[0] if isinstance(out, tuple) else out
    leaves = [x for x in prepared if isinstance(x, Tensor) and x.requires_grad]
    if not grads:
        return Run(out.detach(), [])
    generator = torch.Generator(device="cpu").manual_seed(seed)
    dout = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out)
    return Run(out.detach(), list(torch.autograd.grad(out, leaves, dout, allow_unused=True)))


def error(x: Tensor | None, exact: Tensor | None) -> float:
    """RMS of the difference over RMS of the exact value; NaN must meet NaN."""
    if x is None or exact is None:
        assert x is exact or not (exact if x is None else x).any()
        return 0.0
    assert x.shape == exact.shape
    missing = exact.isnan()
    assert torch.equal(x.isnan(), missing), "NaN in other places than in the unfused computation"
    x, exact = x.double()[~missing], exact.double()[~missing]
    scale = exact.square().mean().sqrt().clamp_min(1e-30) if exact.numel() else torch.ones(())
    return ((x - exact).square().mean().sqrt() / scale).item() if exact.numel() else 0.0


def assert_as_good_as_eager(ours: Run, eager: Run, exact: Run, dtype: torch.dtype) -> None:
    """Forward and every gradient: no further from float64 than 1.5 times eager's own distance in this dtype."""
    # What another order of the same sums may change: some roundings in fp32, a fraction of one in 16 bits.
    floor = torch.finfo(dtype).eps * (16 if dtype == torch.float32 else 1 / 8)
    pairs = [("out", ours.out, eager.out, exact.out)]
    pairs += [(f"grad {i}", *x) for i, x in enumerate(zip(ours.grads, eager.grads, exact.grads, strict=True))]
    for name, mine, theirs, truth in pairs:
        limit = 1.5 * error(theirs, truth) + floor
        assert error(mine, truth) <= limit, (
            f"{name}: error {error(mine, truth):.3g}, eager's {error(theirs, truth):.3g}"
        )


def assert_fused(
    fn: Callable, args: list[Any], dtype: torch.dtype = torch.float32, *, target: str = "reference",
    grads: bool = True, dynamic: bool | None = None,
) -> None:  # fmt: skip
    """All attentions of ``fn`` are fused, with results and gradients as good as eager's."""
    compiled, report = fuse(fn, target=target, dynamic=dynamic)
    ours = run(compiled, args, dtype, grads)
    assert {s.status for s in report.sites} == {"fused"}, [s.verdict for s in report.sites]
    assert_as_good_as_eager(ours, run(fn, args, dtype, grads), run(fn, args, torch.float64, grads), dtype)

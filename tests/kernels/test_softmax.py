"""The online softmax of the forward kernels, run as plain Python on a CPU."""

import math
import types

import pytest
import torch

pytest.importorskip("triton")

from fa3_inductor.kernels import forward_kernel, fp8_kernel  # noqa: E402

LOG2E = math.log2(math.e)
LOWEST = torch.finfo(torch.float32).min


class Block(torch.Tensor):
    """With what a kernel asks its tensors for."""

    type = types.SimpleNamespace(layout=None)


GL = types.SimpleNamespace(
    maximum=torch.maximum, max=lambda x, axis: x.amax(axis), where=torch.where, exp2=torch.exp2, abs=torch.abs,
    full=lambda shape, value, dtype, layout: torch.full(shape, value).as_subclass(Block), float32=torch.float32,
    constexpr=None,
)  # fmt: skip


def as_python(kernel):
    names = {"gl": GL, "HUGE": forward_kernel.HUGE.value, "SHIFT": fp8_kernel.SHIFT.value, "float": float}
    names["_row_units"] = types.FunctionType(forward_kernel._row_units.fn.__code__, names)
    return types.FunctionType(kernel._softmax.fn.__code__, names)


ROWS = {
    "ordinary": [3.0, -2.0, 0.5, 1.0, 2.5, -30.0],
    "hidden": [-math.inf] * 6,
    "hidden at first": [-math.inf, -math.inf, -math.inf, 1.0, 0.0, -math.inf],
    "lowest": [LOWEST] * 6,
    "lowest but one": [LOWEST, LOWEST, LOWEST, LOWEST, 1.5, LOWEST],
    "lowest of bfloat16": [torch.finfo(torch.bfloat16).min] * 3 + [LOWEST] * 3,
    "lowest and hidden": [LOWEST, -math.inf, LOWEST, -math.inf, -math.inf, LOWEST],
    "largest": [-LOWEST, 0.0, LOWEST, -LOWEST, 1.0, 2.0],
    "about where the unit changes": [-2.1e38, -1.9e38, -2.1e38, -1.9e38, -2.0e38, -math.inf],
}


@pytest.mark.parametrize("unit", [None, 1.0, LOG2E])
@pytest.mark.parametrize("kernel", [forward_kernel, fp8_kernel], ids=lambda module: module.__name__.split(".")[-1])
def test_two_tiles(kernel, unit):
    """Sums over tiles with a running maximum are those of all at once."""
    scores = torch.tensor(list(ROWS.values()))
    if unit is None:  # what the products are; the scale is a third
        scores = scores[:3] * 3
    softmax, scale = as_python(kernel), LOG2E / 3
    m = torch.full(scores.shape[:1], -math.inf).as_subclass(Block)
    total = torch.zeros(scores.shape[:1])
    for tile in scores.split(3, dim=1):
        weights, m, alpha = softmax(tile.as_subclass(Block), m, scale, unit)
        total = total * alpha + weights.sum(1)
    total = total.as_subclass(torch.Tensor) / (256.0 if kernel is fp8_kernel else 1.0)
    exact = scores.double() * ((scale if unit is None else unit) / LOG2E)
    top = exact.amax(1)
    want = (exact - top.where(top > -math.inf, 0.0)[:, None]).exp().sum(1)
    # (Of weights of the lowest number 2^8 is lost in the FP8 kernel's exponent, in those of O as well.)
    lost = (top < -1e38) | (top > 1e38) if kernel is fp8_kernel else torch.zeros_like(top, dtype=torch.bool)
    torch.testing.assert_close(total.where(~lost, total * 256), want.float())

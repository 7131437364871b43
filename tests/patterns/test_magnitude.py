"""The bounds of a tensor's values against the values."""

import math

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from fa3_inductor.patterns.magnitude import LEARNED, ORDINARY, bounds, magnitude, may_have_gradient

INTEGERS = torch.randint(-50, 50, (4, 6), dtype=torch.int32)
BOOLS = torch.rand(4, 6) < 0.5
LEARNT = torch.randn(4, 6)


def traced(function, *inputs, learned=True):
    """The node of function's result, and its value."""
    graph = make_fx(function)(*inputs).graph
    for node in graph.find_nodes(op="placeholder"):
        node.meta[LEARNED] = learned and node.meta["val"].dtype.is_floating_point
    (result,) = graph.find_nodes(op="output")[0].args
    return result, function(*inputs)


def positions():
    return torch.arange(24)


BOUNDED = {
    "arange": lambda: torch.arange(3, 12) - 20,
    "slopes": lambda: torch.pow(0.25, torch.arange(1, 5))[:, None] * positions(),
    "powers of two": lambda: 1.0 / torch.pow(2, torch.arange(1, 5) * 2.0),
    "reciprocal": lambda: torch.reciprocal(torch.arange(1, 5)),
    "distance": lambda: -(positions()[:, None] - positions()).abs() * 0.5,
    "rsub": lambda: 3 - positions(),
    "alpha": lambda: torch.add(positions(), positions(), alpha=-2),
    "quotient": lambda: torch.div(positions() - 5, 7, rounding_mode="floor"),
    "true quotient": lambda: (positions() - 5) / -7,
    "buckets": lambda: torch.log(positions() + 1.0) / math.log(16) * 8,
    "clamped": lambda: (positions() - 12).clamp(-3, 4),
    "clamped below": lambda: (positions() - 12).clamp(min=-3),
    "smaller": lambda: torch.minimum(positions(), torch.full((24,), 7)),
    "larger": lambda: torch.max(positions(), torch.full((24,), 7)),
    "chosen": lambda: torch.where(positions() > 4, 2.0, -3.0),
    "filled": lambda: positions().float().masked_fill(positions() > 4, -9.0),
    "joined": lambda: torch.cat([positions() - 30, positions() + 40]),
    "stacked": lambda: torch.stack([positions() - 30, positions() + 40]),
    "padded": lambda: torch.nn.functional.pad(positions() + 5, (1, 1)),
    "squashed": lambda: torch.sigmoid(positions() - 3.0) * 16 - torch.tanh(positions() / 5),
    "rooted": lambda: torch.sqrt(positions().float()).exp().neg().relu(),
    "activations": lambda: torch.nn.functional.silu(positions() - 9.0) + torch.nn.functional.gelu(9.0 - positions()),
    "subtracted": lambda: torch.subtract(positions(), torch.multiply(positions(), 3)),
    "comparison": lambda: positions() >= 3,
    "moved around": lambda: (positions() - 3).view(4, 6).mT[1:, ::2].flip(0).repeat(2, 1).expand(2, -1, -1),
    "picked": lambda: (positions() - 3)[torch.tensor([1, 5, -1])],
    "cast": lambda: (positions() * 100).to(torch.int8),
    "one": lambda: torch.ones(3) - torch.zeros(3),
}


@pytest.mark.parametrize("name", BOUNDED)
def test_values_lie_between_the_bounds(name):
    node, value = traced(BOUNDED[name])
    low, high = bounds(node)
    rounding = 1e-6 * max(abs(low), abs(high))
    assert low - rounding <= value.min().item() and value.max().item() <= high + rounding
    assert magnitude(node) == max(abs(low), abs(high)) < 1e20


def test_of_inputs():
    for function, limit in (
        (lambda i, b, w: i * 2 + b, 2**32 + 2),
        (lambda i, b, w: b & (i > 3), 1),
        (lambda i, b, w: torch.nn.functional.embedding(i.abs() % 4, w) * 3, 3 * ORDINARY),
        (lambda i, b, w: w @ w.T - w @ w.T, 2 * ORDINARY),
        (lambda i, b, w: torch.where(b, w, w.neg()).unsqueeze(0), ORDINARY),
    ):
        node, value = traced(function, INTEGERS, BOOLS, LEARNT)
        assert value.float().abs().max() <= magnitude(node) <= limit


@pytest.mark.parametrize(
    "function",
    [
        lambda w: w,
        lambda w: w * 2,
        lambda w: torch.where(w > 0, 0.0, -math.inf),
        lambda w: torch.full((3,), -math.inf),
        lambda w: torch.full((3,), torch.finfo(torch.float32).min) * 4,
        lambda w: torch.log(torch.arange(4)),
        lambda w: 1 / (torch.arange(4) - 2),
        lambda w: torch.arange(-2.0, 5.0) ** 0.5,
        lambda w: torch.sqrt(torch.arange(-2.0, 5.0)),
        lambda w: torch.exp(torch.arange(100.0)),
        lambda w: (torch.arange(10) * 10_000).half(),
        lambda w: torch.cumsum(torch.ones(4), 0),
        lambda w: torch.cat([torch.zeros(3), w[0]]),
        lambda w: torch.zeros(3).masked_fill(torch.ones(3).bool(), -math.inf),
    ],
)
def test_unbounded(function):
    node, _ = traced(function, LEARNT, learned=False)
    assert bounds(node) is None and magnitude(node) == math.inf


def test_what_has_a_gradient():
    assert may_have_gradient(traced(lambda i, b, w: i + w, INTEGERS, BOOLS, LEARNT)[0])
    assert not may_have_gradient(traced(lambda i, b, w: (i + b) * 0.5, INTEGERS, BOOLS, LEARNT)[0])

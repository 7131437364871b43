"""Inductor's own attention patterns stay away from graphs that the pass has seen.

Up to torch 2.14 those patterns match more than they prove, and fail in all versions for rows that are masked
completely; each case here is one that some version of them gets wrong or is close to one (pytorch/pytorch issue
numbers where there is one). Whatever our own matcher makes of a case, eager's numbers have to come out.
"""

import pytest
import torch
from torch._dynamo.utils import counters

from fa3_inductor import compat, enabled

INF = float("inf")
S, D = 16, 16


def bhsd(heads=2, head_dim=D):
    return lambda: torch.randn(2, heads, S, head_dim)


def cube():
    return torch.randn(16, 16, 16)


def attend(q, k, v, scale=0.25, dim=-1):
    return torch.softmax(q @ k.transpose(-2, -1) * scale, dim) @ v


def masked(mask, divisor=4.0):
    return lambda q, k, v: torch.softmax(q @ k.transpose(-2, -1) / divisor + mask, -1) @ v


def some_rows_empty():
    mask = torch.zeros(S, S)
    mask[3:5] = -INF
    mask[:, 7] = -INF
    return mask


def permuted_key(q, k, v):
    q, v = q.permute(0, 2, 1, 3), v.permute(0, 2, 1, 3)
    return torch.softmax(q @ k.permute(0, 2, 3, 1) * 0.3, -1) @ v


def five_dims(q, k, v, weight):
    out = torch.softmax(q @ k.transpose(-2, -1) / 4.0, -1) @ v
    return torch.nn.functional.linear(out.reshape(2, 3 * S, 2 * D), weight)


def float64_between(q, k, v):
    return torch.softmax((q @ k.transpose(-2, -1) / 4.0).double(), -1).float() @ v


# name: (function, what makes each of its inputs)
CASES = {
    "softmax over dim -2": (lambda q, k, v: attend(q, k, v, dim=-2), [bhsd()] * 3),
    "softmax over dim 1": (lambda q, k, v: attend(q, k, v, dim=1), [bhsd(heads=S)] * 3),
    "bmm, k.transpose(0, 1)": (lambda q, k, v: torch.softmax(q.bmm(k.transpose(0, 1)), -1).bmm(v), [cube] * 3),
    "bmm, k.permute(1, 2, 0)": (lambda q, k, v: torch.softmax(q.bmm(k.permute(1, 2, 0)), -1).bmm(v), [cube] * 3),
    "key permuted at once, #195320": (permuted_key, [bhsd()] * 3),
    "five dims, view, linear, #195589": (
        five_dims,
        [lambda: torch.randn(2, 3, 2, S, D)] * 3 + [lambda: torch.randn(8, 2 * D)],
    ),
    "0-d tensor scale, #191203": (
        lambda q, k, v, s: torch.softmax(q @ k.transpose(-2, -1) / s, -1) @ v,
        [bhsd()] * 3 + [lambda: torch.tensor(3.0)],
    ),
    "additive -inf, some rows empty": (masked(some_rows_empty()), [bhsd()] * 3),
    "mask of one dim": (masked(torch.linspace(-2, 2, S)), [bhsd()] * 3),
    "own divisor and mask, #174049": (masked(torch.linspace(-2, 2, S * S).view(S, S), 2.5), [bhsd()] * 3),
    "int divisor": (masked(torch.zeros(S, S), 4), [bhsd()] * 3),
    "mask of shape (..., S, 1)": (masked(torch.linspace(-2, 2, S).view(S, 1)), [bhsd()] * 3),
    "mask broadcasts the batch": (
        masked(torch.linspace(-2, 2, 3 * S).view(3, 1, 1, S)),
        [lambda: torch.randn(1, 2, S, D)] * 3,
    ),
    "softmax in float64": (float64_between, [bhsd()] * 3),
    "key not transposed": (lambda q, k, v: torch.softmax(q @ k / 4.0, -1) @ v, [bhsd()] * 3),
    "permute(1, 0, 3, 2)": (lambda q, k, v: torch.softmax(q @ k.permute(1, 0, 3, 2) / 4.0, -1) @ v, [bhsd()] * 3),
    "value of another head size": (attend, [bhsd(), bhsd(), bhsd(head_dim=24)]),
}


def run(function, inputs, train):
    """The output, and for a training run the gradients of all inputs under an uneven output gradient."""
    if not train:
        with torch.no_grad():
            return [function(*inputs)]
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*inputs)
    dout = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    return [out, *torch.autograd.grad(out, inputs, dout)]


@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("name", CASES)
def test_numbers_are_eagers(name, train):
    function, make = CASES[name]
    inputs = [each() for each in make]
    counters.clear()
    compiled = torch.compile(function, backend="fa3_inductor", fullgraph=True)
    for got, want in zip(run(compiled, inputs, train), run(function, inputs, train), strict=True):
        torch.testing.assert_close(got, want, equal_nan=True)
    assert counters["inductor"]["fuse_attention"] == 0


def fused_by_stock(**options):
    """Compiles a form that Inductor fuses by itself, and says whether it did and what came out."""
    torch._dynamo.reset()
    counters.clear()
    inputs = [torch.randn(2, 2, S, D) for _ in range(3)]
    with torch._inductor.config.patch(force_disable_caches=True):
        got = torch.compile(masked(some_rows_empty()), **options)(*inputs)
    return counters["inductor"]["fuse_attention"] > 0, got


def test_stock_patterns_come_back_afterwards():
    """Control for all tests above: without the pass, Inductor does fuse, and zeros stand where eager gives NaN."""
    assert fused_by_stock(backend="inductor")[0]
    fused, got = fused_by_stock(backend="fa3_inductor")
    assert not fused and got.isnan().any()
    with enabled():
        fused, got = fused_by_stock(backend="inductor")
    assert not fused and got.isnan().any()
    fused, got = fused_by_stock(backend="inductor")
    assert fused and not got.isnan().any()


def test_only_attention_patterns_are_silenced():
    from torch._inductor.fx_passes import joint_graph

    assert not fused_by_stock(backend="fa3_inductor")[0]
    entries = {id(e): e for found in joint_graph.patterns.patterns.values() for e in found}.values()
    silenced = [entry for entry in entries if isinstance(entry.extra_check, compat.Unless)]
    others = [entry for entry in entries if not isinstance(entry.extra_check, compat.Unless)]
    assert len(silenced) > 20 and len(others) > 5
    assert not list(compat.stock_attention_entries())


def test_warns_when_the_patterns_are_not_found(monkeypatch, caplog):
    monkeypatch.setattr(compat, "stock_attention_entries", lambda: iter(()))
    monkeypatch.setattr(compat, "_silenced", 0)
    compat._warn_not_silenced.cache_clear()
    compat.silence_stock_attention(lambda: True)
    assert "were not found" in caplog.text

"""Tensors that wrap others, as quantised weights and DTensors do: looked into where that is possible, else around."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing._internal.two_tensor import TwoTensor

from fa3_inductor import Reason, plan

from .harness import fuse

B, H, S, D = 2, 4, 32, 16
WIDTH = H * D
E4M3 = torch.float8_e4m3fn


class Scaled(Tensor):
    """A bfloat16 tensor kept as e4m3 numbers and a scale, as torchao's are: by ``__torch_function__``."""

    @staticmethod
    def __new__(cls, data, scale):
        return Tensor._make_wrapper_subclass(cls, data.shape, dtype=torch.bfloat16, device=data.device)

    def __init__(self, data, scale):
        self.data8, self.scale = data, scale

    def __tensor_flatten__(self):
        return ["data8", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner, context, size, stride):
        return cls(inner["data8"], inner["scale"])

    def dequantize(self):
        return self.data8.to(torch.bfloat16) * self.scale

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is F.linear:
            return F.linear(args[0], args[1].dequantize(), *args[2:], **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].data8, args[0].scale)
        raise NotImplementedError(f"{func} of Scaled")


def scaled(*shape):
    return Scaled(torch.randn(shape).to(E4M3), torch.tensor(0.25, dtype=torch.bfloat16))


def two(*shape):
    return TwoTensor(torch.randn(shape), torch.randn(shape))


class Projected(nn.Module):
    """Queries, keys and values by one product with ``weight``."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=weight.requires_grad)

    def project(self, x):
        return F.linear(x, self.weight)

    def forward(self, x):
        q, k, v = (y.view(*x.shape[:2], H, D).transpose(1, 2) for y in self.project(x).split(WIDTH, -1))
        keep = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        scores = (q @ k.mT * 0.25).masked_fill(~keep, float("-inf"))
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


class OfTwo(Projected):
    """A tensor that knows no function but what dispatches to it, as DTensor; its product is one, and taken apart."""

    def project(self, x):
        return F.linear(x, self.weight).a


def distance(x, exact):
    return ((x.double() - exact.double()).norm() / exact.double().norm()).item()


def same_as_eager(model, *args):
    compiled, report = fuse(model, target="reference")
    with torch.no_grad():
        for x in args:
            assert distance(compiled(x), model(x)) < 0.01
    assert {(s.status, s.mask) for s in report.sites} == {("fused", "causal")}, str(report)


def test_quantised_weights():
    same_as_eager(Projected(scaled(3 * WIDTH, WIDTH)), torch.randn(B, S, WIDTH, dtype=torch.bfloat16))


@pytest.mark.parametrize("lengths", [(S,), (S, S + 8)], ids=["static", "dynamic"])
def test_what_only_dispatches(lengths):
    same_as_eager(OfTwo(two(3 * WIDTH, WIDTH)), *(torch.randn(B, n, WIDTH) for n in lengths))


def test_an_attention_of_wrappers():
    def fn(q, k, v):
        return (q @ k.mT * 0.25).softmax(-1) @ v

    q, k, v = (two(B, H, S, D) for _ in range(3))
    compiled, report = fuse(fn)
    torch.testing.assert_close(compiled(q, k, v).b, fn(q, k, v).b)
    (site,) = report.sites
    assert site.reason is Reason.OPAQUE and "works on TwoTensor" in site.detail and "softmax" in site.code


def dequantised(q, k, v):
    return F.scaled_dot_product_attention(q.dequantize(), k.dequantize(), v.dequantize())


def written_after(q, k, v):
    a, b, c = q.dequantize(), k.dequantize(), v.dequantize()
    k.data8.copy_(q.data8)
    return F.scaled_dot_product_attention(a, b, c)


@pytest.mark.parametrize("fn", [dequantised, written_after])
def test_8_bits(fn, monkeypatch):
    monkeypatch.setattr(plan, "_not_hopper", lambda device: None)
    args = [scaled(B, H, S, D) for _ in range(3)]
    again = [Scaled(x.data8.clone(), x.scale) for x in args]
    with torch.no_grad():
        compiled, report = fuse(fn)
        assert distance(compiled(*args), fn(*again)) < 0.04
    (site,) = report.sites
    assert site.status == "fused"
    assert site.dtype == ("float8_e4m3fn" if fn is dequantised else "bfloat16"), site.detail


def test_tensors_of_torchao(monkeypatch):
    torchao = pytest.importorskip("torchao.quantization")
    monkeypatch.setattr(plan, "_not_hopper", lambda device: None)
    args = [torch.randn(B, H, S, D, dtype=torch.bfloat16) for _ in range(3)]
    args = [torchao.Float8Tensor.from_hp(x, granularity=torchao.PerRow()) for x in args]
    model = nn.Sequential(nn.Linear(WIDTH, 3 * WIDTH, bias=False)).bfloat16()
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    with torch.no_grad():
        compiled, report = fuse(dequantised)
        assert distance(compiled(*args), dequantised(*args)) < 0.04
    assert report.sites[0].dtype == "float8_e4m3fn"
    same_as_eager(Projected(model[0].weight.detach()), torch.randn(B, S, WIDTH, dtype=torch.bfloat16))

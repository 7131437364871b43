"""Attention on float8_e4m3fn tensors as graphs spell it: planned for a Hopper GPU, computed by the specification."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import fa3_inductor
from fa3_inductor import config, plan

from .harness import fuse

E4M3, BF16 = torch.float8_e4m3fn, torch.bfloat16
B, H, HKV, S, D = 2, 4, 2, 64, 32


@pytest.fixture(autouse=True)
def as_on_hopper(monkeypatch):
    monkeypatch.setattr(plan, "_not_hopper", lambda device: None)
    torch.manual_seed(0)


def eight_bits(*shape: int) -> Tensor:
    return torch.randn(shape).to(E4M3)


def qkv(heads: int = H) -> list[Tensor]:
    return [eight_bits(B, H, S, D), eight_bits(B, heads, S, D), eight_bits(B, heads, S, D)]


def scale(*shape: int) -> Tensor:
    return torch.rand(shape) + 0.5


def sdpa(q, k, v, a, b, c):
    q, k, v = ((x.to(BF16) * s).to(BF16) for x, s in ((q, a), (k, b), (v, c)))
    return scaled_dot_product_attention(q, k, v, is_causal=True)


def divided(q, k, v, a, b, c):
    q, k, v = (q.float() / a).to(BF16), k.to(BF16) * b.to(BF16), (v.float() * c).to(BF16)
    return torch.softmax(q @ k.mT * 0.2, -1) @ v


def scaled_afterwards(q, k, v, a, b, c):
    scores = (q.to(BF16) @ k.to(BF16).mT).float() * (a * b * 0.18)
    return (torch.softmax(scores, -1).to(BF16) @ v.to(BF16)) * c


def negative(q, k, v, a, b, c):
    return scaled_dot_product_attention(q.to(BF16) * -0.5, (k.to(BF16) * -b).to(BF16), v.to(BF16), scale=-0.3)


def repeated(q, k, v, a, b, c):
    k, v = ((x.to(BF16) * s.to(BF16)).repeat_interleave(H // HKV, 1) for x, s in ((k, b), (v, c)))
    return scaled_dot_product_attention(q.to(BF16), k, v)


def grouped(q, k, v, a, b, c):
    q, k, v = ((x.to(BF16) * s.to(BF16)) for x, s in ((q, a), (k, b), (v, c)))
    return scaled_dot_product_attention(q, k, v, enable_gqa=True)


def heads_inside(q, k, v, a, b, c):
    q, k, v = ((x.to(torch.float16) * s.half()).transpose(1, 2) for x, s in ((q, a), (k, b), (v, c)))
    return scaled_dot_product_attention(q, k, v)


def by_blocks(q, k, v, a, b, c):
    q, k, v = (
        (x.unflatten(2, (-1, 16)).float() * s[..., None, None]).to(BF16).flatten(2, 3)
        for x, s in ((q, a), (k, b), (v, c))
    )
    return scaled_dot_product_attention(q, k, v, is_causal=True)


def in_float32(q, k, v, a, b, c):
    return scaled_dot_product_attention(q.float() * a, k.float() * b, v.float() * c)


def plain(q, k, v, a, b, c):
    mask = torch.ones(S, S, dtype=torch.bool, device=q.device).tril(3)
    scores = (q.to(BF16) @ k.to(BF16).mT * 0.1).masked_fill(~mask, float("-inf"))
    return scores.softmax(-1) @ v.to(BF16)


FORMS = {  # what is computed, of what
    "a tensor each": lambda: (sdpa, *qkv(), scale(), scale(1), scale(1, 1, 1, 1)),
    "by head": lambda: (sdpa, *qkv(), scale(1, H, 1, 1), scale(H, 1, 1), scale(B, H, 1, 1)),
    "by batch": lambda: (sdpa, *qkv(), scale(B, 1, 1, 1), scale(), scale()),
    "by token": lambda: (sdpa, *qkv(), scale(B, H, S, 1), scale(S, 1), scale(B, 1, S, 1)),
    "values by token": lambda: (sdpa, *qkv(), scale(), scale(1, H, 1, 1), scale(B, H, S, 1)),
    "by block": lambda: (by_blocks, *qkv(), *(scale(B, H, S // 16) for _ in "qkv")),
    "divided": lambda: (divided, *qkv(), scale(), scale(H, 1, 1), scale()),
    "scaled afterwards": lambda: (scaled_afterwards, *qkv(), scale(), scale(), scale()),
    "negative": lambda: (negative, *qkv(), scale(), scale(), scale()),
    "repeated": lambda: (repeated, *qkv(HKV), scale(), scale(B, HKV, 1, 1), scale(1, HKV, 1, 1)),
    "grouped": lambda: (grouped, *qkv(HKV), scale(1, H, 1, 1), scale(B, HKV, 1, 1), scale()),
    "heads inside": lambda: (
        heads_inside, *(x.transpose(1, 2).contiguous() for x in qkv()), scale(), scale(H, 1), scale(1, 1, H, 1),
    ),
    "float32": lambda: (in_float32, *qkv(), scale(), scale(), scale()),
    "no scales": lambda: (plain, *qkv(), scale(), scale(), scale()),
}  # fmt: skip


def exactly(fn, *args):
    """The attention in float32."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "BF16", torch.float32)
        return fn(*(x.float() if x.dtype == torch.bfloat16 else x for x in args)).double()


def distance(x: Tensor, exact: Tensor) -> float:
    return ((x.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("name", FORMS)
def test_graph(name):
    fn, *args = FORMS[name]()
    compiled, report = fuse(fn)
    out = compiled(*args)
    (site,) = report.sites
    assert (site.target, site.dtype) == ("hopper", "float8_e4m3fn"), site.verdict
    assert site.kernel.startswith("attention_fp8[float8_e4m3fn, d32") and out.dtype == fn(*args).dtype
    exact = exactly(fn, *args)
    assert out.shape == exact.shape and distance(out, exact) < 0.04


def with_bf16_queries(q, k, v):
    return scaled_dot_product_attention(q, k.to(BF16) * 0.5, v.to(BF16) * 0.5)


def plainly(q, k, v):
    return scaled_dot_product_attention(q.to(BF16), k.to(BF16), v.to(BF16))


def of_channels(q, k, v):
    return scaled_dot_product_attention(q.to(BF16), k.to(BF16), v.to(BF16) * torch.arange(D, device=q.device).to(BF16))


@pytest.mark.parametrize(
    "fn, first, why",
    [
        (with_bf16_queries, torch.randn(B, H, S, D).bfloat16(), "q is bfloat16"),
        (plainly, torch.randn(B, H, S, D).to(torch.float8_e5m2), "q is float8_e5m2"),
        (of_channels, eight_bits(B, H, S, D), "v's scale differs along head_dim"),
    ],
)
def test_what_stays_in_16_bits(fn, first, why):
    args = [first, *qkv()[1:]]
    compiled, report = fuse(fn)
    out = compiled(*args)
    (site,) = report.sites
    assert site.kernel.startswith("attention_forward[bfloat16") and why in site.detail, site.detail
    assert distance(out, exactly(fn, *args)) < 0.01


def test_head_dims_that_tma_cannot_address():
    args = [x[..., :24].contiguous() for x in qkv()]
    compiled, report = fuse(plainly)
    compiled(*args)
    assert "head_dim 16, 32" in report.sites[0].detail and report.sites[0].dtype == "bfloat16"


def test_a_scale_that_needs_a_gradient():
    args = [*qkv(), *(scale().requires_grad_() for _ in "qkv")]
    compiled, report = fuse(sdpa)
    grads = torch.autograd.grad(compiled(*args).float().sum(), args[3:])
    assert "8-bit tensors have no gradient" in report.sites[0].detail
    for got, want in zip(grads, torch.autograd.grad(sdpa(*args).float().sum(), args[3:])):
        torch.testing.assert_close(got, want, rtol=0.1, atol=1.0)


def written_out(q, k, v):
    scores = (q @ k.mT * 0.2).float()
    return torch.softmax(scores, -1).to(q.dtype) @ v


@pytest.mark.parametrize("seed", [0, 5, None])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_quantize(seed, dtype):
    q, k, v = torch.randn(3, B, H, S, D, dtype=dtype).unbind()
    q[0, 0, 3, 3] = 50.0
    with config.patch(fp8="quantize", fp8_incoherent_seed=seed):
        compiled, report = fuse(written_out)
        out = compiled(q, k, v)
    (site,) = report.sites
    assert site.kernel == "attention_quantised[float8_e4m3fn, d32, full]" and site.dtype == "float8_e4m3fn"
    assert out.dtype == dtype and 1e-3 < distance(out, written_out(q.double(), k.double(), v.double())) < 0.07


def test_quantize_is_for_many_rows_in_16_bits():
    for args, why in (
        (list(torch.randn(3, B, H, S, D).unbind()), "float32 is not rounded to 8 bits"),
        ([torch.randn(B, H, n, D).bfloat16() for n in (1, S, S)], "takes longer than one query's attention"),
    ):
        with config.patch(fp8="quantize"):
            compiled, report = fuse(written_out)
            compiled(*args)
        (site,) = report.sites
        assert site.status == "fused" and site.dtype != "float8_e4m3fn" and why in site.detail, site.detail


@pytest.mark.parametrize("causal", [False, True])
def test_quantize_in_training(causal):
    """Gradients in 16 bits, no further off than the rounding is."""
    torch._dynamo.reset()
    later = torch.ones(S, S).tril() == 0
    fn = lambda q, k, v: written_out(q, k, v)  # noqa: E731
    if causal:
        fn = lambda q, k, v: torch.softmax((q @ k.mT * 0.2).masked_fill(later, -torch.inf), -1) @ v  # noqa: E731
    args = [x.requires_grad_() for x in torch.randn(3, B, H, S, D).bfloat16().unbind()]
    double = [x.detach().double().requires_grad_() for x in args]
    grad = torch.randn(B, H, S, D).bfloat16()
    with config.patch(fp8="quantize"):
        compiled = torch.compile(fn, backend="fa3_inductor", options={"target": "reference"})
        out = compiled(*args)
        grads = torch.autograd.grad(out, args, grad)
    (site,) = fa3_inductor.reports().sites[-1:]
    assert site.kernel == "fa3::attention_quantised (PyTorch)" and site.dtype == "float8_e4m3fn", site.detail
    exact = fn(*double)
    assert 1e-3 < distance(out, exact) < 0.07
    for got, want in zip(grads, torch.autograd.grad(exact, double, grad.double())):
        assert got.dtype == BF16 and 1e-3 < distance(got, want) < 0.12


class Biased(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.bias = torch.nn.Parameter(torch.randn(H, S, S, dtype=BF16))

    def forward(self, q, k, v):
        return torch.softmax((q @ k.mT * 0.2 + self.bias).float(), -1).to(q.dtype) @ v


def test_quantize_of_a_learned_bias():
    model = Biased()
    args = [x.requires_grad_() for x in torch.randn(3, B, H, S, D).bfloat16().unbind()]
    with config.patch(fp8="quantize"):
        compiled, report = fuse(model)
        out = compiled(*args)
    assert report.sites[0].dtype == "float8_e4m3fn", report.sites[0].detail
    grads = torch.autograd.grad(out.square().sum(), [*args, model.bias])
    double = [x.detach().double().requires_grad_() for x in args]
    exact = torch.autograd.grad(model.double()(*double).square().sum(), [*double, model.bias])
    assert all(distance(got, want) < 0.12 for got, want in zip(grads, exact))


def rounds_divided(out, scale):
    out = out.transpose(1, 2).reshape(B, S, H * D)
    return (out.float() / scale).clamp(-448.0, 448.0).to(E4M3)


def rounds_multiplied(out, scale):
    out = out.transpose(1, 2).contiguous().view(B * S, H * D)
    return torch.clamp(out * scale, min=-448, max=448).to(E4M3).view(B, S, -1)


def rounds_in_place(out, scale):
    return (out * 3.0).clamp_(max=448).clamp_(min=-448).to(E4M3)


def rounds_between(out, scale):
    return (2 * out / scale.view(1, 1, 1)).permute(0, 2, 1, 3).clip(-448, 448).flatten(2).to(E4M3)


ROUNDS = [rounds_divided, rounds_multiplied, rounds_in_place, rounds_between]


def causally(q, k, v):
    return scaled_dot_product_attention(q, k, v, is_causal=True)


@pytest.mark.parametrize(
    "attend, fp8, dynamic", [(causally, "off", True), (written_out, "off", False), (written_out, "quantize", True)]
)
@pytest.mark.parametrize("rounds", ROUNDS)
def test_a_result_in_eight_bits(rounds, attend, fp8, dynamic):
    """Rounded once, where the user's code rounds to 16 bits first."""
    q, k, v = torch.randn(3, B, H, S, D, dtype=BF16).unbind()
    args, graphs = (q, k, v, torch.tensor([0.5])), []

    def fn(q, k, v, scale):
        return rounds(attend(q, k, v), scale).float() * 2

    with config.patch(fp8=fp8), torch.no_grad():
        compiled, report = fuse(fn, dynamic=dynamic, graphs=graphs)
        out = compiled(*args)
        expected = fn(*(x.double() for x in (q, k, v)), args[3])
    (site,) = report.sites
    assert "its result is written in float8_e4m3fn" in site.detail, site.detail
    assert out.stride() == expected.stride() and distance(out, expected) < (0.04 if fp8 == "off" else 0.08)
    assert not any("clamp" in str(n.target) or "clip" in str(n.target) for n in graphs[0].graph.nodes)


def not_clamped(out, scale):
    return (out / scale).to(E4M3)


def clamped_closer(out, scale):
    return (out / scale).clamp(-240, 240).to(E4M3)


def clamped_by_a_tensor(out, scale):
    return (out / scale).clamp(-448, 448).clamp(max=scale.view(())).to(E4M3)


def used_twice(out, scale):
    return (out / scale).clamp(-448, 448).to(E4M3).float() + out.sum()


def of_its_largest(out, scale):
    return (out / (out.abs().amax() / 448.0)).clamp(-448, 448).to(E4M3)


def by_row(out, scale):
    return (out / torch.linspace(0.01, 1.0, S)[:, None]).clamp(-448, 448).to(E4M3)


def to_e5m2(out, scale):
    return (out / scale).clamp(-448, 448).to(torch.float8_e5m2)


def a_part(out, scale):
    return (out / scale).clamp(-448, 448)[:, :, 1:].to(E4M3)


def of_later_input(out, scale):
    return (out / torch.sigmoid(scale)).clamp(-448, 448).to(E4M3)


@pytest.mark.parametrize(
    "rounds",
    [not_clamped, clamped_closer, clamped_by_a_tensor, used_twice, of_its_largest, by_row, to_e5m2, a_part],
)
def test_a_result_that_is_rounded_as_written(rounds):
    args = (*torch.randn(3, B, H, S, D, dtype=BF16).unbind(), torch.tensor(0.01))
    fn = lambda q, k, v, scale: rounds(written_out(q, k, v), scale).float()  # noqa: E731
    with torch.no_grad():
        compiled, report = fuse(fn)
        out = compiled(*args)
    (site,) = report.sites
    assert site.status == "fused" and "float8" not in site.detail
    expected = fn(*args)
    assert torch.equal(out.isnan(), expected.isnan()) and distance(out.nan_to_num(), expected.nan_to_num()) < 0.03


@pytest.mark.parametrize("head_dim, why", [(40, "cannot be addressed"), (D, "has a gradient")])
def test_a_result_that_no_kernel_rounds(head_dim, why):
    q, k, v = torch.randn(3, B, H, S, head_dim, dtype=BF16).unbind()
    q.requires_grad_(head_dim == D)
    fn = lambda q, k, v: rounds_in_place(written_out(q, k, v), None).float()  # noqa: E731
    compiled, report = fuse(fn)
    compiled(q, k, v)
    assert report.sites[0].status == "fused" and "float8" not in report.sites[0].detail, why


def test_a_scale_that_comes_later():
    """It is computed again in front of the attention, if it can be."""
    args = (*torch.randn(3, B, H, S, D, dtype=BF16).unbind(), torch.tensor(0.01))
    fn = lambda q, k, v, scale: of_later_input(written_out(q, k, v), scale).float()  # noqa: E731
    with torch.no_grad():
        compiled, report = fuse(fn)
        assert distance(compiled(*args), fn(*args)) < 0.04
    assert "float8_e4m3fn" in report.sites[0].detail


def broadcast_queries(q, k, v):
    return scaled_dot_product_attention(q[:, :, :1].to(BF16).expand(-1, -1, S, -1), k.to(BF16), v.to(BF16))


def queries_of_a_scale(q, k, v):
    scales = torch.linspace(0.5, 1.5, S, dtype=BF16, device=q.device)[:, None]
    return scaled_dot_product_attention(q[:, :, :1].to(BF16) * scales, k.to(BF16), v.to(BF16))


def broadcast_values(q, k, v):
    return scaled_dot_product_attention(q.to(BF16), k.to(BF16), v[..., :1].to(BF16).expand(-1, -1, -1, D))


def written_to(q, k, v):
    q, k, v = q.clone(), k.to(BF16) * 0.5, v.to(BF16)
    queries = q.to(BF16)
    q.copy_(torch.zeros_like(q))
    return scaled_dot_product_attention(queries, k, v)


def huge_factor(q, k, v):
    return scaled_dot_product_attention(q.to(BF16) * 1e35, k.to(BF16) * 1e-35, v.to(BF16))


@pytest.mark.parametrize("fn", [broadcast_queries, queries_of_a_scale, broadcast_values, written_to, huge_factor])
@pytest.mark.parametrize("fp8", ["graph", "off"])
def test_what_is_no_operand(fn, fp8):
    """Never a wrong result, and a reason if it stays in 16 bits."""
    args = qkv()
    with config.patch(fp8=fp8):
        compiled, report = fuse(fn)
        out = compiled(*args)
    exact = exactly(fn, *args)
    (site,) = report.sites
    assert out.shape == exact.shape and distance(out, exact) < 0.04 and site.status == "fused", site.verdict


def test_a_chain_of_products_is_read_once():
    def fn(q, k, v):
        for _ in range(60):
            q = q * q.clamp(-1, 1)
        return scaled_dot_product_attention(q, k, v)

    compiled, report = fuse(fn)
    compiled(*torch.randn(3, B, H, S, D).bfloat16().unbind())
    assert report.sites[0].status == "fused"


def test_values_whose_scales_differ_by_much():
    """Early rows see none of the keys with large scales."""
    q, k, v = qkv()
    long = [x.repeat(1, 1, 8, 1) for x in (q, k, v)]
    scales = torch.full((B, H, 8 * S, 1), 1e-6)
    scales[:, :, -100:] = 1.0
    out, _ = torch.ops.fa3.attention_fp8(
        *long, *(torch.ones(1, 1) for _ in "qk"), scales[..., 0], None, None, 0.2, None, 0, "reference", BF16
    )
    exact, _ = torch.ops.fa3.attention(
        *(x.double() for x in long[:2]), long[2].double() * scales.double(), None, None, 0.2, None, 0, "reference"
    )
    rows = (out - exact).norm(dim=-1) / exact.norm(dim=-1)
    assert rows[:, :, : 3 * 128].mean() < 0.05


def test_off():
    fn, *args = FORMS["by head"]()
    with config.patch(fp8="off"):
        compiled, report = fuse(fn)
        compiled(*args)
    assert report.sites[0].kernel.startswith("attention_forward[bfloat16") and not report.sites[0].detail


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("fp8", ["graph", "quantize"])
def test_through_inductor(fp8, dynamic):
    torch._dynamo.reset()
    args = [*qkv(), scale(), scale(1, H, 1, 1), scale()]
    fn = sdpa
    if fp8 == "quantize":
        fn, args = written_out, list(torch.randn(3, B, H, S, D).bfloat16().unbind())
    with config.patch(fp8=fp8), torch.no_grad():
        compiled = torch.compile(fn, backend="fa3_inductor", dynamic=dynamic, options={"target": "reference"})
        for length in (S, S - 7):
            short = [x[:, :, :length].contiguous() if x.ndim == 4 and x.shape[2] == S else x for x in args]
            out = compiled(*short)
            assert 1e-3 < distance(out, exactly(fn, *short)) < 0.07


def test_on_a_cpu_nothing_is_in_8_bits(monkeypatch):
    monkeypatch.undo()
    fn, *args = FORMS["by head"]()
    with config.patch(fp8="quantize"):
        report = fa3_inductor.explain(fn, *args)
    assert report.sites[0].target == "sdpa" and report.sites[0].dtype == "bfloat16"

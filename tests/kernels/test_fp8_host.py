"""The host side of the FP8 kernel: what it takes, its tiles and its operators. No GPU needed."""

import itertools

import pytest
import torch

pytest.importorskip("triton")

from fa3_inductor import ops  # noqa: E402, F401  (registers the operators)
from fa3_inductor.kernels import fp8, offline  # noqa: E402
from fa3_inductor.kernels.reference import attention_fp8_reference, attention_reference  # noqa: E402

E4M3 = torch.float8_e4m3fn


@pytest.mark.parametrize("head_dim", range(8, 264, 8))
@pytest.mark.parametrize("largest", [128, 256])
def test_parts_hold_a_head_dim(head_dim, largest):
    parts = fp8.parts(head_dim, largest)
    assert sum(parts) >= head_dim and len(parts) <= 2 and all(32 <= n <= largest and n & (n - 1) == 0 for n in parts)
    assert len(parts) == 1 or parts[0] < head_dim  # no part is empty


@pytest.mark.parametrize("head_dim", [16, 64, 80, 128, 192, 256])
def test_tiles(head_dim):
    for with_terms in (False, True):
        tile = fp8.tile_for(head_dim, 8, with_terms)
        assert tile == fp8.tile_for(16, head_dim, with_terms)
        pool = 128 * tile.consumers * tile.consumer_regs + 128 * tile.producer_regs
        assert pool <= 64 * 1024 and tile.block_n % 64 == 0


@pytest.mark.parametrize(
    "q, k, v, quantised, sentence",
    [
        ((1, 4, 9, 64), (1, 2, 9, 64), (1, 2, 9, 24), False, None),
        ((1, 4, 9, 24), (1, 2, 9, 24), (1, 2, 9, 24), True, None),
        ((1, 4, 9, 24), (1, 2, 9, 24), (1, 2, 9, 24), False, "the FP8 kernel has head_dim 16, 32, ... 256, not 24"),
        ((1, 4, 9, 264), (1, 2, 9, 264), (1, 2, 9, 64), True, "the Hopper kernel has head_dim 8, 16, ... 256, not 264"),
        (
            (1, 4, 9, 64),
            (1, 3, 9, 64),
            (1, 3, 9, 64),
            False,
            "3 key and 3 value heads do not divide 4 query heads evenly",
        ),
    ],
)
def test_supports(q, k, v, quantised, sentence):
    assert fp8.supports(q, k, v, quantised=quantised) == sentence


def test_every_case_has_blocks_where_it_says_so():
    for name, make in offline.cases().items():
        if name.startswith("fp8"):
            case = make()
            flags = dict(zip((p.name for p in fp8.fp8_kernel.params), case.args))
            assert flags["BLOCKS"] == ("blocks" in name) and (flags["tokens"] is not None) == ("tokens" in name)


def qkv(b=2, hq=4, hkv=2, sq=20, sk=36, d=16, dv=24):
    torch.manual_seed(0)
    return [torch.randn(b, h, s, n).to(E4M3) for h, s, n in ((hq, sq, d), (hkv, sk, d), (hkv, sk, dv))]


SCALES = {"": (1, 1), "head": (1, -1), "all": (2, -1), "token": (2, -1, 0)}


def scale_of(kind, x):
    sizes = {-1: x.shape[1], 0: x.shape[2]}
    return torch.rand([sizes.get(n, n) for n in SCALES[kind]]) + 0.5


@pytest.mark.parametrize("kinds", itertools.product(SCALES, ("", "token")))
def test_reference_dequantises(kinds):
    q, k, v = qkv()
    scales = [scale_of(kind, x) for kind, x in zip((kinds[0], kinds[1], kinds[0]), (q, k, v))]
    out, lse = attention_fp8_reference(q, k, v, *scales, scale=0.3, window_right=3)
    whole = (x.double() * (s if s.ndim == 3 else s[..., None])[..., None] for x, s in zip((q, k, v), scales))
    exact, exact_lse = attention_reference(*whole, scale=0.3, window_right=3)
    assert out.dtype == torch.bfloat16 and 1e-3 < (out - exact).norm() / exact.norm() < 0.04
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", SCALES)
def test_opcheck_fp8(kind):
    operands = qkv()
    scales = (scale_of(kind, x) for x in operands)
    args = (*operands, *scales, torch.randn(4, 1, 36), None, 0.3, None, 2, "reference", torch.bfloat16)
    # Without the check of the schema, which multiplies the operands.
    parts = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.fa3.attention_fp8.default, args, test_utils=parts)


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_opcheck_quantised(seed, layout):
    operands = [x.to(torch.bfloat16) for x in qkv()]
    if layout == "bshd":
        operands = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in operands]
    args = (*operands, None, torch.rand(20, 36) > 0.3, 0.3, 30, None, "reference", seed, 20.0, torch.randn(4))
    torch.library.opcheck(torch.ops.fa3.attention_quantised.default, args)


def leaves():
    return [x.to(torch.bfloat16).requires_grad_() for x in qkv()]


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("softcap", [None, 20.0])
def test_gradients_are_those_of_the_rounded_values(seed, softcap):
    q, k, v = leaves()
    bias, sinks = torch.randn(4, 20, 36).requires_grad_(softcap is None), torch.randn(4, requires_grad=True)
    inputs = [x for x in (q, k, v, bias, sinks) if x.requires_grad]
    options = (bias, None, 0.3, None, 2, "reference")
    results = torch.ops.fa3.attention_quantised(q, k, v, *options, seed, softcap, sinks)
    rounded = torch.ops.fa3.round_trip(*(x.detach() for x in (q, k, v)), 128, seed, "reference")
    exact = [x.detach().double().requires_grad_(x.requires_grad) for x in (*rounded, bias, sinks)]
    for x in exact[:3]:
        x.requires_grad_()
    of_reference = attention_reference(*exact[:4], scale=0.3, window_right=2, softcap=softcap, sinks=exact[4])
    grads = [torch.randn_like(x) for x in results]
    got = torch.autograd.grad(results, inputs, grads)
    want = torch.autograd.grad(of_reference, [x for x in exact if x.requires_grad], [g.double() for g in grads])
    for a, b, x in zip(got, want, inputs):
        assert a.dtype == x.dtype and (a - b).norm() / b.norm() < 0.06
    for x, y in zip((q, k, v), rounded):
        assert 1e-3 < (x.double() - y).norm() / x.double().norm() < 0.04


@pytest.mark.parametrize("seed", [None, 3])
def test_opcheck_of_gradients(seed):
    args = (*leaves(), torch.randn(4, 20, 36).requires_grad_(), None, 0.3, 30, None, "reference", seed, None)
    torch.library.opcheck(torch.ops.fa3.attention_quantised.default, (*args, torch.randn(4).requires_grad_(), True))
    torch.library.opcheck(torch.ops.fa3.round_trip.default, (*(x.detach() for x in leaves()), 64, seed, "reference"))


def test_a_result_in_eight_bits():
    q, k, v = (x.to(torch.bfloat16) for x in qkv())
    one, scale = torch.ones(1, 1), torch.tensor(200.0)
    common = (None, None, 0.3, None, 2, "reference")
    for operator, args in (
        (torch.ops.fa3.attention, (q, k, v, *common, None, None, None, 0.0, False, scale)),
        (torch.ops.fa3.attention_quantised, (q, k, v, *common, None, None, None, False, scale)),
        (torch.ops.fa3.attention_fp8, (*qkv(), one, one, one, *common, torch.bfloat16, None, None, scale)),
    ):
        torch.library.opcheck(operator.default, args, test_utils="test_faketensor")
        out, _ = operator(*args)
        exact, _ = attention_reference(*(x.double() for x in (q, k, v)), scale=0.3, window_right=2)
        exact = (exact * 200.0).clamp(-448, 448)
        assert out.dtype == E4M3 and (out.double() - exact).norm() < 0.08 * exact.norm()
        assert (out.double().abs() == 448).any()
    with pytest.raises(NotImplementedError, match="a result in float8_e4m3fn has no gradient"):
        torch.ops.fa3.attention(q.requires_grad_(), k, v, *common, None, None, None, 0.0, False, scale)
    with pytest.raises(ValueError, match=r"out_scale is one float32, not torch.float32 \[2\]"):
        torch.ops.fa3.attention(
            *(x.to("meta") for x in (q, k, v)), *common, None, None, None, 0.0, False, torch.ones(2, device="meta")
        )


def test_there_is_no_gradient_of_eight_bits():
    one = torch.ones(1, 1).requires_grad_()
    out, _ = torch.ops.fa3.attention_fp8(
        *qkv(), one, one, one, None, None, 0.3, None, None, "reference", torch.bfloat16
    )
    with pytest.raises(NotImplementedError, match="attention of FP8 tensors has no gradient"):
        out.sum().backward()

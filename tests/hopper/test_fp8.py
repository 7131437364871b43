"""The FP8 kernel and the rounding in front of it on a Hopper GPU, against float64 and the specification."""

import math
import random

import pytest
import torch

from fa3_inductor import ops  # noqa: F401  (registers the operators)
from fa3_inductor.kernels import output_like
from fa3_inductor.kernels.formulas import NO_FORMULAS
from fa3_inductor.kernels.reference import (
    attention_fp8_reference,
    attention_quantised_reference,
    attention_reference,
    round_trip_reference,
    rounded_to_e4m3,
)

if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
    pytest.skip("needs a Hopper GPU", allow_module_level=True)

from fa3_inductor.kernels import fp8, launch
from fa3_inductor.kernels.fp8 import attention_fp8, attention_quantised, tile_for

from .problems import HEAD_DIMS, MASKS, SIZES, S, check_rounded, drawn_options, drawn_sizes, lies_like, make

E4M3 = torch.float8_e4m3fn


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """What the kernels are to write is NaN before."""
    real = torch.empty, torch.empty_strided

    def nan(x):
        return x.view(torch.uint8).fill_(0x7F).view(x.dtype) if x.dtype == E4M3 else x.fill_(math.nan)

    def poisoned(function):
        return lambda *a, **k: nan(x) if (x := function(*a, **k)).is_floating_point() and x.is_cuda else x

    monkeypatch.setattr(torch, "empty", poisoned(real[0]))
    monkeypatch.setattr(torch, "empty_strided", poisoned(real[1]))


def error(got, exact):
    """Of the norm; both are NaN in the same places."""
    assert got.shape == exact.shape and torch.equal(got.isnan(), exact.isnan())
    got, exact = got.double().nan_to_num(0.0), exact.double().nan_to_num(0.0)
    return ((got - exact).norm() / exact.norm().clamp_min(1e-12)).item()


def drawn(seed, again):
    """A random problem: q, k, v in BF16 or FP16 and the options of attention_quantised."""
    pick = random.Random(seed)
    b, (hq, hkv), sq, sk, edge = drawn_sizes(seed, again)
    d = pick.choice([64, 64, 128, 128, 256, 256, 16, 40, 72, 80, 96, 160, 192])
    dv, dtype = pick.choice([d, d, pick.choice(HEAD_DIMS)]), pick.choice([torch.bfloat16, torch.float16])
    q = make(pick.choice(["bhsd", "bshd", "packed", "padded", "misaligned", "strided"]), b, hq, sq, d, dtype)
    k, v = (make(pick.choice(["bhsd", "bshd", "packed", "expanded"]), b, hkv, sk, n, dtype) for n in (d, dv))
    options = drawn_options(pick, b, hq, sq, sk, edge, dtype)
    options["scale"] = pick.choice([d**-0.5, 0.02])
    return (q, k, v), options


def as_good(out, reference, exact):
    """The kernel rounds its weights at another maximum than the specification does, so its error is another number."""
    ours, theirs = error(out, exact), error(reference, exact)
    assert ours <= 1.3 * theirs + 4e-3, (ours, theirs)


@pytest.mark.parametrize("seed", range(120))
def test_of_float8_operands(seed, monkeypatch):
    monkeypatch.setattr(fp8, "_calls", {})
    if seed % 2:  # V is transposed in front of the kernel, as it is for more rows than are tested
        monkeypatch.setattr(fp8, "ROWS_OF_A_RAW_V", 0)
    for again in SIZES:
        (q, k, v), options = drawn(seed, again)
        if q.shape[3] % 16 == 0:
            check_float8_operands(seed, q, k, v, options)


def check_float8_operands(seed, q, k, v, options):
    pick = random.Random(seed)
    q, k, v = (x.to(E4M3) for x in (q, k, v))
    b = q.shape[0]
    shapes = lambda x: [(1, 1), (b, x.shape[1]), (1, x.shape[1]), (b, 1)]  # noqa: E731
    if seed % 3 == 0:  # scales of single tokens
        shapes = lambda x: [(1, 1), (b, x.shape[1], 1), (b, x.shape[1], x.shape[2]), (1, 1, x.shape[2])]  # noqa: E731
    scales = [torch.rand(pick.choice(shapes(x)), device="cuda") * 2 + 0.1 for x in (q, k, v)]
    scales[pick.randrange(3)].mul_(pick.choice([1, -1]))
    dtype = pick.choice([torch.bfloat16, torch.float16])
    out, lse = attention_fp8(q, k, v, *scales, **options, out_dtype=dtype)
    by_row = [s if s.ndim == 3 else s[..., None] for s in scales]
    double = [x.double() * s.double()[..., None] for x, s in zip((q, k, v), by_row)]
    of_double = {n: x.double() if torch.is_tensor(x) and x.is_floating_point() else x for n, x in options.items()}
    exact, exact_lse = attention_reference(*double, **of_double)
    reference, _ = attention_fp8_reference(q, k, v, *scales, **options, out_dtype=dtype)
    assert out.dtype == dtype and lies_like(out, output_like(q, v.shape[3])) and lse.is_contiguous()
    as_good(out, reference, exact)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-3, atol=5e-3)


@pytest.mark.parametrize("seed", range(120))
def test_of_rounded_operands(seed):
    for again in SIZES:
        check_rounded_operands(seed, *drawn(seed + 1000, again))


def check_rounded_operands(seed, qkv, options):
    q, k, v = qkv
    signs = random.Random(seed).choice([None, 0, 7])
    out, lse = attention_quantised(q, k, v, **options, seed=signs)
    blocks = fp8.blocks(q, v, signs, any(n in options for n in ("bias", "mask", "softcap", "formulas")))
    reference, expected_lse = attention_quantised_reference(q, k, v, **options, **blocks)
    of_double = {n: x.double() if torch.is_tensor(x) and x.is_floating_point() else x for n, x in options.items()}
    exact, _ = attention_reference(*(x.double() for x in (q, k, v)), **of_double)
    assert out.dtype == q.dtype and lies_like(out, output_like(q, v.shape[3])) and lse.is_contiguous()
    as_good(out, reference, exact)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-3, atol=2e-2)  # a rounded score may go either way


@pytest.mark.parametrize("seed", range(40))
def test_results_in_eight_bits(seed):
    for again in SIZES:
        (q, k, v), options = drawn(seed + 3000, again)
        if v.shape[3] % 16 or q.shape[3] % 16:
            continue
        scale = torch.tensor([random.Random(seed).choice([3.0, -40.0, 500.0])], device="cuda")
        if seed % 2:
            function, operands = attention_quantised, (q, k, v)
        else:
            one = torch.ones(1, 1, device="cuda")
            function, operands = attention_fp8, (*(x.to(E4M3) for x in (q, k, v)), one, one, one)
        unrounded = function(*operands, **options)
        exact = unrounded[0].double()  # (how far that is from exact is another test's)
        check_rounded(*function(*operands, **options, out_scale=scale), unrounded, scale, exact)


@pytest.mark.parametrize("seed", range(60))
def test_gradients_of_rounded_operands(seed):
    """They are those of the rounded values."""
    for again in SIZES:
        check_gradients(seed, *drawn(seed + 2000, again))


def check_gradients(seed, qkv, options):
    signs = random.Random(seed).choice([None, 0, 7])
    leaves = [x.detach().requires_grad_() for x in qkv]
    with_terms = any(n in options for n in ("bias", "mask", "softcap", "formulas"))
    keys = tile_for(qkv[0].shape[3], qkv[2].shape[3], with_terms).block_n
    matrix = None if signs is None else fp8.matrix_of(qkv[0], signs)
    rounded = torch.ops.fa3.round_trip(*qkv, keys, signs, "hopper")
    for x, y, n, by in zip(qkv, rounded, (64, keys, keys), (matrix, matrix, None)):
        assert lies_like(y, output_like(x, x.shape[3])) and y.dtype == x.dtype
        # A number that lies between two of e4m3 may go to either, as the last bits of quotients and sums are.
        assert error(y, round_trip_reference(x, n, by)) < 5e-3
    double = [x.double().requires_grad_() for x in rounded]
    formulas = options.get("formulas", NO_FORMULAS)
    out, lse = torch.ops.fa3.attention_quantised(
        *leaves, options.get("bias"), options.get("mask"), options["scale"], options["window_left"],
        options["window_right"], "hopper", signs, options.get("softcap"), options.get("sinks"), seed % 2 == 1, None,
        formulas.bias, formulas.mask, formulas.score, *formulas.tables,
    )  # fmt: skip
    of_double = {n: x.double() if torch.is_tensor(x) and x.is_floating_point() else x for n, x in options.items()}
    exact, _ = attention_reference(*double, **of_double)
    dout = torch.randn_like(out)
    got, want = torch.autograd.grad(out, leaves, dout), torch.autograd.grad(exact, double, dout.double())
    size = max(x.norm().item() for x in want) + 1e-6
    for a, b, x in zip(got, want, qkv):
        assert a.dtype == x.dtype and (a.double() - b).norm().item() < 0.06 * b.norm().item() + 2e-3 * size


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("name", MASKS)
def test_masks_that_leave_tiles_out(name, head_dim):
    torch.manual_seed(0)
    q = torch.randn(4, 4, S, head_dim, device="cuda").to(E4M3)
    k, v = (torch.randn(4, 2, S, head_dim, device="cuda").to(E4M3) for _ in "kv")
    one = torch.ones(1, 1, device="cuda")
    mask = MASKS[name].cuda()
    mask = mask.view((1,) * (4 - mask.ndim) + mask.shape)
    options = dict(mask=mask, scale=head_dim**-0.5, window_right=0)
    out, lse = attention_fp8(q, k, v, one, one, one, **options)
    exact, exact_lse = attention_reference(*(x.double() for x in (q, k, v)), **options)
    as_good(out, attention_fp8_reference(q, k, v, one, one, one, **options)[0], exact)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-3, atol=5e-3)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_error_does_not_grow_with_the_keys(head_dim):
    """Values of one sign: a tensor core that adds them all up by itself is 15 % off at 8192 keys, 66 % at 131072."""
    one = torch.ones(1, 1, device="cuda")
    for keys in (1024, 8192, 131072):
        q, k = torch.randn(1, 1, 128, head_dim, device="cuda"), torch.randn(1, 1, keys, head_dim, device="cuda")
        q, k, v = (x.to(E4M3) for x in (q, k, torch.rand_like(k) + 0.5))
        out, _ = attention_fp8(q, k, v, one, one, one, scale=head_dim**-0.5)
        exact, _ = attention_reference(*(x.double() for x in (q, k, v)), scale=head_dim**-0.5)
        assert error(out, exact) < 5e-3


@pytest.mark.parametrize("function", ["bfloat16", "fp8"])
def test_a_needle_among_131072_keys(function):
    from fa3_inductor.kernels.forward import attention_forward

    torch.manual_seed(0)
    keys, needle = 131072, 77777
    k, v = (torch.randn(1, 1, keys, 128, device="cuda", dtype=torch.bfloat16) for _ in "kv")
    q = (k[:, :, needle : needle + 1] * 2.0).expand(1, 1, 64, 128).contiguous()
    out, _ = (attention_forward if function == "bfloat16" else attention_quantised)(q, k, v, scale=128**-0.5)
    found = torch.nn.functional.cosine_similarity(out[0, 0].float(), v[0, 0, needle].float(), dim=-1)
    assert (found > 0.99).all()


def outliers(*shape):
    """The paper's distribution: N(0, 1) + N(0, 100) * Bernoulli(0.001)."""
    x = torch.randn(shape, device="cuda", dtype=torch.float64)
    return x + 10 * torch.randn_like(x) * (torch.rand_like(x) < 0.001)


def test_accuracy_of_the_paper():
    """Table 3 of FlashAttention-3 has an RMSE of 9.1e-3 for FP8."""
    torch.manual_seed(0)
    exact_inputs = [outliers(2, 16, 4096, 128) for _ in "qkv"]
    q, k, v = (x.bfloat16() for x in exact_inputs)
    exact, _ = attention_reference(*(x[:, :2].double() for x in (q, k, v)), scale=128**-0.5)
    out, _ = attention_quantised(q, k, v, scale=128**-0.5)
    assert (out[:, :2].double() - exact).square().mean().sqrt().item() <= 9.1e-3


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_thousand_times_the_same(head_dim):
    q, k, v = (torch.randn(2, 4, 1500, head_dim, device="cuda", dtype=torch.bfloat16) for _ in "qkv")
    first, _ = attention_quantised(q, k, v, scale=0.1, window_right=0)
    for _ in range(1000):
        assert torch.equal(attention_quantised(q, k, v, scale=0.1, window_right=0)[0], first)


@pytest.mark.parametrize("where", "qkv")
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_infinities(where, value):
    operands = dict(zip("qkv", torch.randn(3, 1, 2, 300, 64, device="cuda", dtype=torch.bfloat16)))
    operands[where][0, 1, 70, 3] = value
    out, _ = attention_quantised(**operands, scale=0.125, window_right=0)
    clean, _ = attention_quantised(**{n: x.nan_to_num(0.0, 0.0, 0.0) for n, x in operands.items()}, scale=0.125)
    assert not out[0, 0].isnan().any()
    row = out[0, 1].isnan().any(-1)
    if where == "q":
        assert row.nonzero().flatten().tolist() == [70]
    else:  # a hidden value has a weight of zero, and zero times NaN is NaN, as in eager code
        assert row[70:].all() and (where == "v" or not row[:70].any())
    assert not clean.isnan().any()


def test_scales_of_values_that_differ_by_much():
    """Early rows see none of the keys with large scales."""
    q, k, v = (torch.randn(1, 2, 1000, 64, device="cuda").to(E4M3) for _ in "qkv")
    one, scales = torch.ones(1, 1, device="cuda"), torch.full((1, 2, 1000), 1e-6, device="cuda")
    scales[..., -100:] = 1.0
    out, _ = attention_fp8(q, k, v, one, one, scales, scale=0.125, window_right=0)
    exact, _ = attention_reference(q.double(), k.double(), v.double() * scales[..., None], scale=0.125, window_right=0)
    assert error(out[:, :, :700], exact[:, :, :700]) < 0.05 and error(out[:, :, 950:], exact[:, :, 950:]) < 0.05


def test_zeros_outliers_and_tiny_numbers():
    q, k, v = torch.randn(3, 1, 2, 300, 64, device="cuda", dtype=torch.bfloat16)
    q[:, 0], k[:, :, :150], v[:, :, 100:290] = 0, 0, 0
    v[:, :, 5, 5], v[:, 1, 295] = 1e30, 1e-38
    exact, _ = attention_reference(q.double(), k.double(), v.double(), scale=0.125)
    assert error(attention_quantised(q, k, v, scale=0.125)[0], exact) < 0.05
    out, lse = attention_quantised(q * 0, k * 0, v * 0, scale=0.125)
    assert (out == 0).all() and torch.allclose(lse, torch.full_like(lse, math.log(300)))


def test_scales_of_zero_and_nan():
    q, k, v = (torch.randn(1, 2, 300, 64, device="cuda").to(E4M3) for _ in "qkv")
    one = torch.ones(1, 1, device="cuda")
    out, _ = attention_fp8(q, k, v, one * 0, one, one, scale=0.125, window_right=0)
    exact, _ = attention_reference(q.double() * 0, k.double(), v.double(), scale=0.125, window_right=0)
    assert error(out, exact) < 0.05
    assert attention_fp8(q, k, v, one * math.nan, one, one, scale=0.125)[0].isnan().all()
    assert attention_fp8(q, k, v, one, one, one * math.nan, scale=0.125)[0].isnan().all()


def test_rounding_is_that_of_the_specification():
    torch.manual_seed(0)
    for d, dv in ((64, 64), (128, 128), (256, 256), (80, 48)):
        q, k, v = (make("bshd", 2, 3, 700, n, torch.bfloat16) for n in (d, d, dv))
        tile = tile_for(d, dv)
        q8, k8, v8, *scales = fp8._buffers(q, k, v, tile, 0)
        for x, to, of, n in ((q, q8, scales[0], 64), (k, k8, scales[1], tile.block_n)):
            grid, args, options = fp8.rows_arguments(x, to, of, None, n)
            run = launch.prepare(fp8.rows_kernel, grid, args, (x, to, of), options)
            run(torch.cuda.current_stream().cuda_stream, *(t.data_ptr() for t in (x, to, of)))
            expected, expected_scales = rounded_to_e4m3(x, n)
            torch.testing.assert_close(of, expected_scales)
            got, expected = (t.float()[..., : x.shape[3]] for t in (to, expected))
            # A quotient that lies between two numbers of e4m3 may go to either, as the division's last bit is.
            assert ((got - expected).abs() <= expected.abs() / 8).all() and (got != expected).float().mean() < 1e-3


def test_bad_input():
    q, k, v = (torch.randn(1, 2, 64, 64, device="cuda").to(E4M3) for _ in "qkv")
    one = torch.ones(1, 1, device="cuda")
    with pytest.raises(ValueError, match="q, k and v are torch.float8_e4m3fn"):
        attention_fp8(q.to(torch.float8_e5m2), k, v, one, one, one, scale=0.1)
    with pytest.raises(ValueError, match=r"q_scale \[3, 1\] does not broadcast to \[1, 2, 64\]"):
        attention_fp8(q, k, v, torch.ones(3, 1, device="cuda"), one, one, scale=0.1)
    with pytest.raises(ValueError, match="k_scale is float32 on cuda:0, not torch.float64"):
        attention_fp8(q, k, v, one, one.double(), one, scale=0.1)
    with pytest.raises(ValueError, match="head_dim 16, 32"):
        attention_fp8(*(x[..., :24] for x in (q, k, v)), one, one, one, scale=0.1)
    with pytest.raises(ValueError, match="do not fit together"):
        attention_fp8(q, k, v[:, :, :3], one, one, one, scale=0.1)

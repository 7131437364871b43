"""The forward kernel on a Hopper GPU, against float64."""

import concurrent.futures
import math

import pytest
import torch

from fa3_inductor.kernels import output_like
from fa3_inductor.kernels.reference import attention_backward_reference, attention_reference

if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
    pytest.skip("needs a Hopper GPU", allow_module_level=True)

from fa3_inductor.kernels import forward, launch
from fa3_inductor.kernels.backward import attention_backward
from fa3_inductor.kernels.formulas import Formulas
from fa3_inductor.kernels.forward import attention_forward

from .problems import MASKS, SIZES, S, assert_as_good, check_rounded, drawn, drawn_plain, eager, exactly, lies_like


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """What is not written to is NaN."""

    def poisoning(real):
        def make(*args, **like):
            made = real(*args, **like)
            if made.dtype == torch.float8_e4m3fn:
                made.view(torch.uint8).fill_(0x7F)
            elif made.is_floating_point():
                made.fill_(math.nan)
            return made

        return make

    for name in ("new_empty", "new_empty_strided"):
        monkeypatch.setattr(torch.Tensor, name, poisoning(getattr(torch.Tensor, name)))


@pytest.fixture
def plain(monkeypatch):
    """What forward_plain_kernel can compute it does, however short. The list has a kernel for every preparation."""
    prepared = []

    def tile(head_dim, head_dim_v, window, seqlen_q, seqlen_k):
        return forward.PLAIN_TILES[sum(forward.parts(head_dim)), window != (None, None)][1]

    def prepare(kernel, *args):
        prepared.append(kernel)
        return real(kernel, *args)

    real = launch.prepare
    monkeypatch.setattr(launch, "prepare", prepare)
    monkeypatch.setattr(forward, "plain_tile_for", tile)
    monkeypatch.setattr(forward, "parts_of_keys", lambda *sizes: 1)
    monkeypatch.setattr(forward, "_calls", {})
    return prepared


@pytest.mark.parametrize("seed", range(120))
def test_matches_float64(seed):
    for again in SIZES:
        check(*drawn(seed, again))


@pytest.mark.parametrize("seed", range(2000, 2060))
def test_plain_matches_float64(seed, plain):
    for again in SIZES:
        check(*drawn_plain(seed, again))
    assert plain and set(plain) == {forward.forward_plain_kernel}


@pytest.mark.parametrize("seed", range(1000, 1060))
def test_few_queries(seed):
    """Keys are split, and query heads that share them are taken together."""
    for again in SIZES:
        check(*drawn(seed, again, few=True))


@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize("seed", range(3000, 3040))
def test_results_in_eight_bits(seed, few):
    for again in SIZES:
        (q, k, v), options = drawn(seed, again, few)
        if v.shape[3] % 16 == 0:
            scale = torch.tensor((3.0, -40.0, 500.0)[seed % 3], device="cuda")
            unrounded = attention_forward(q, k, v, **options)
            exact = unrounded[0].double()  # (how far that is from exact is another test's)
            check_rounded(*attention_forward(q, k, v, **options, out_scale=scale), unrounded, scale, exact)


@pytest.mark.parametrize("heads", [(4, 4), (8, 2)], ids=str)
def test_parts_without_keys(heads):
    """A mask or window shows fewer tiles than there are parts, or none."""
    q = torch.randn(1, heads[0], 1, 128, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(1, heads[1], 8192, 128, device="cuda", dtype=torch.bfloat16) for _ in "kv")
    for visible in (0, 1, 128, 129, 400, 8000):
        for options in (
            dict(window_right=visible - 1),
            dict(mask=torch.arange(8192, device="cuda") < visible),
            dict(formulas=Formulas("", "k < t0", (torch.tensor([[[[visible]]]], device="cuda"),))),
            dict(formulas=Formulas("", "8192 - k <= t0", (torch.tensor([[[[visible]]]], device="cuda"),))),
        ):
            check((q, k, v), dict(window_left=None, window_right=None, scale=0.1) | options)


@pytest.mark.parametrize("how", ["bias", "float32 bias", "formula of the bias", "formula of the score"])
@pytest.mark.parametrize("heads, sq, sk", [((8, 2), 1, 1000), ((4, 1), 24, 24), ((4, 1), 24, 9000), ((4, 4), 300, 300)])
def test_rows_at_the_lowest_number(heads, sq, sk, how):
    """Masks that are added: where every key is hidden, a row is the mean of all values, also of parts of them."""
    q = torch.randn(2, heads[0], sq, 128, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(2, heads[1], sk, 128, device="cuda", dtype=torch.bfloat16) for _ in "kv")
    options = dict(window_left=None, window_right=None, scale=0.1)
    lowest = torch.finfo(torch.float32 if how == "float32 bias" else torch.bfloat16).min
    if "formula" in how:
        other = "s" if "score" in how else "0.0"
        text = f"where((q % 3 == 0) | (k < 10), {lowest!r}, {other})"
        options["formulas"] = Formulas(score=text) if "score" in how else Formulas(text)
    else:
        rows, columns = torch.arange(sq, device="cuda")[:, None], torch.arange(sk, device="cuda")
        bias = torch.zeros(sq, sk, device="cuda", dtype=torch.float32 if how == "float32 bias" else torch.bfloat16)
        options["bias"] = bias.masked_fill((rows % 3 == 0) | (columns < 10), lowest)
    check((q, k, v), options)


def check(qkv, options):
    q, k, v = qkv
    out, lse = attention_forward(q, k, v, **options)
    in_double, dropout = exactly(options)
    dropout = dropout((*q.shape[:3], k.shape[2]))
    exact, exact_lse = attention_reference(*(x.double() for x in (q, k, v)), **in_double, **dropout)
    assert lies_like(out, output_like(q, v.shape[3])) and lse.is_contiguous()
    left, right = options.pop("window_left"), options.pop("window_right")
    assert_as_good(out, eager(q, k, v, right=right, left=left, **options), exact)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("right", [None, 0, 300, -300, -2000], ids=str)
def test_writes_all_of_the_output_and_nothing_else(head_dim, right):
    q, k, v = (torch.randn(2, 2, 1000, head_dim, device="cuda", dtype=torch.bfloat16) for _ in "qkv")
    wide = torch.full((2, 2, 1192, head_dim), 7.0, device="cuda", dtype=torch.bfloat16)
    out, lse = wide[:, :, :1000], torch.full((2, 2, 1000), math.nan, device="cuda")
    out.fill_(math.nan)
    launched(q, k, v, out, lse, right)
    expected, expected_lse = attention_forward(q, k, v, scale=0.1, window_right=right)
    assert torch.equal(out, expected) and torch.equal(lse, expected_lse)
    assert not out.isnan().any() and (wide[:, :, 1000:] == 7.0).all()


def launched(q, k, v, out, lse, right, sm_count=None):
    """Runs the kernel on outputs of ours."""
    grid, args = forward.launch_arguments(q, k, v, out, lse, 0.1, None, right, sm_count=sm_count)
    tensors = [x for x in (q, k, v, out, lse, args[forward._ORDER]) if x is not None]
    run = launch.prepare(forward.forward_kernel, grid, args, tuple(tensors), {"num_warps": 4})
    run(torch.cuda.current_stream().cuda_stream, *(x.data_ptr() for x in tensors))


def launched_plain(q, k, v, out, lse, right, sm_count=None):
    tile = forward.PLAIN_TILES[q.shape[3], right is not None][1]
    grid, args = forward.plain_arguments(q, k, v, out, lse, 0.1, None, right, tile=tile, sm_count=sm_count)
    tensors = [x for x in (q, k, v, out, lse, args[forward._PLAIN_ORDER]) if x is not None]
    run = launch.prepare(forward.forward_plain_kernel, grid, args, tuple(tensors), {"num_warps": 4}, forward.CLUSTER)
    run(torch.cuda.current_stream().cuda_stream, *(x.data_ptr() for x in tensors))


@pytest.mark.parametrize("head_dim", [128, 256])
@pytest.mark.parametrize("right", [None, 0, 300, -300, -2000], ids=str)
def test_plain_writes_all_of_the_output_and_nothing_else(head_dim, right):
    q, k, v = (torch.randn(2, 2, 1000, head_dim, device="cuda", dtype=torch.bfloat16) for _ in "qkv")
    wide = torch.full((2, 2, 1192, head_dim), 7.0, device="cuda", dtype=torch.bfloat16)
    out, lse = wide[:, :, :1000], torch.full((2, 2, 1000), math.nan, device="cuda")
    out.fill_(math.nan)
    launched_plain(q, k, v, out, lse, right)
    exact, exact_lse = attention_reference(*(x.double() for x in (q, k, v)), scale=0.1, window_right=right)
    assert_as_good(out, eager(q, k, v, 0.1, right), exact)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-4)
    assert not out.isnan().any() and (wide[:, :, 1000:] == 7.0).all()


@pytest.mark.parametrize(
    "heads, seqlen, head_dim, run",
    [
        (74, 1300, 64, launched),
        (7, 700, 128, launched),
        (21, 10000, 64, launched),
        (3, 2000, 256, launched),
        (37, 1300, 128, launched_plain),
        (11, 10000, 128, launched_plain),
        (9, 2000, 256, launched_plain),
    ],
)
@pytest.mark.parametrize("right", [None, 0])
@pytest.mark.parametrize("sm_count", [132, 5])
def test_every_tile_of_many(heads, seqlen, head_dim, run, right, sm_count):
    q, k, v = (torch.randn(1, heads, seqlen, head_dim, device="cuda", dtype=torch.bfloat16) for _ in "qkv")
    out, lse = torch.full_like(q, math.nan), torch.full((1, heads, seqlen), math.nan, device="cuda")
    run(q, k, v, out, lse, right, sm_count)
    for part in torch.arange(heads).split(4):  # float64 scores of a few heads at a time
        part_of = [x[:, part] for x in (q, k, v)]
        exact, exact_lse = attention_reference(*(x.double() for x in part_of), scale=0.1, window_right=right)
        assert_as_good(out[:, part], eager(*part_of, 0.1, right), exact)
        torch.testing.assert_close(lse[:, part].double(), exact_lse, rtol=1e-5, atol=1e-4)


def test_rows_that_see_no_key():
    q, k, v = (torch.randn(1, 2, 300, 64, device="cuda", dtype=torch.float16) for _ in "qkv")
    out, lse = attention_forward(q, k, v, scale=0.1, window_right=-77)
    assert (out[:, :, :77] == 0).all() and (lse[:, :, :77] == -math.inf).all()
    assert lse[:, :, 77:].isfinite().all()


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("right", [None, 0])
@pytest.mark.parametrize("operand", ["q", "k", "v"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_bad_numbers_go_where_they_go_in_eager(head_dim, right, operand, value):
    torch.manual_seed(0)
    xs = {n: torch.randn(1, 2, 400, head_dim, device="cuda", dtype=torch.bfloat16) for n in "qkv"}
    position = 399 if operand == "v" and right == 0 else 150  # 0 * inf: what a causal mask hides differs by tile
    xs[operand][0, 1, position, 5] = value
    out, lse = attention_forward(*xs.values(), scale=0.1, window_right=right)
    exact, exact_lse = attention_reference(*(x.double() for x in xs.values()), scale=0.1, window_right=right)
    if operand == "v" and right == 0:
        out, exact = out[:, :, 384:], exact[:, :, 384:]
        out, exact = (torch.cat([x[:, :1].flatten(), x[:, 1, -1].flatten()]) for x in (out, exact))
    assert exact.isfinite().logical_not().any()
    assert torch.equal(out.isnan(), exact.isnan()) and torch.equal(out.isinf(), exact.isinf())
    assert torch.equal(lse.isnan(), exact_lse.isnan())


@pytest.mark.parametrize("head_dim", [128, 256])
@pytest.mark.parametrize("right", [None, 0])
@pytest.mark.parametrize("operand", ["q", "k", "v"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_bad_numbers_in_the_plain_kernel(plain, head_dim, right, operand, value):
    test_bad_numbers_go_where_they_go_in_eager(head_dim, right, operand, value)
    assert plain == [forward.forward_plain_kernel]


@pytest.mark.parametrize("head_dim", [128, 256])
def test_plain_repeats_bit_for_bit(plain, head_dim):
    for left, right in ((None, None), (None, 0), (400, 0)):
        test_repeats_bit_for_bit(head_dim, left, right, False)
    assert plain == [forward.forward_plain_kernel] * 3


@pytest.mark.parametrize("head_dim", [64, 128])
def test_scores_of_minus_infinity_hide_a_tile_only(head_dim):
    """Every key of the last tiles scores -inf: rows must recover once finite scores come."""
    q, k, v = (torch.randn(1, 1, 512, head_dim, device="cuda", dtype=torch.bfloat16) for _ in "qkv")
    q[..., 0], k[..., 0] = 1.0, 0.0
    k[:, :, 200:, 0] = -math.inf
    out, lse = attention_forward(q, k, v, scale=0.1)
    expected, expected_lse = attention_forward(q, k[:, :, :200], v[:, :, :200], scale=0.1)
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(lse, expected_lse)


@pytest.mark.parametrize("head_dim", [64, 128, 96, 256])
@pytest.mark.parametrize("left, right, masked", [(None, None, False), (None, 0, False), (400, 0, True)])
def test_repeats_bit_for_bit(head_dim, left, right, masked):
    q, k, v = (torch.randn(3, 8, 1500, head_dim, device="cuda", dtype=torch.bfloat16) for _ in "qkv")
    options = dict(scale=0.1, window_left=left, window_right=right)
    if masked:
        options["mask"] = torch.rand(3, 1, 1500, 1500, device="cuda") > 0.2
    first = attention_forward(q, k, v, **options)
    for _ in range(1000):
        again = attention_forward(q, k, v, **options)
        assert torch.equal(again[0], first[0]) and torch.equal(again[1], first[1])


REFUSED = {
    "head_dim 8, 16, ... 256, not 20": lambda q: dict(q=q[..., :20], k=q[..., :20]),
    "head_dim 8, 16, ... 256, not 28": lambda q: {n: q[..., :28].contiguous() for n in "qkv"},
    "do not fit together": lambda q: dict(v=q.half()),
    "bias is floating point": lambda q: dict(bias=torch.ones(64, 64, device="cuda", dtype=torch.int64)),
    "mask is bool": lambda q: dict(mask=torch.ones(64, 64, device="cuda")),
    "does not broadcast": lambda q: dict(mask=torch.ones(3, 64, 64, device="cuda", dtype=torch.bool)),
    "sinks are a contiguous .2.": lambda q: dict(sinks=torch.zeros(3, device="cuda")),
    "softcap is a positive number": lambda q: dict(softcap=0.0),
    "positive scale": lambda q: dict(scale=-1.0),
    "the operands are on cpu, cuda:0": lambda q: dict(sinks=torch.zeros(2)),
}


@pytest.mark.parametrize("words", REFUSED)
def test_refuses_what_it_cannot_do(words):
    q = torch.randn(1, 2, 64, 96, device="cuda", dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=words):
        attention_forward(**(dict(q=q, k=q, v=q, scale=0.1) | REFUSED[words](q)))


def test_other_addresses_and_streams():
    """A problem is prepared once and then only told where its tensors are."""
    forward._calls.clear()
    for _ in range(3):
        q, k, v = (torch.randn(2, 2, 300, 64, device="cuda", dtype=torch.bfloat16) for _ in "qkv")
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            out, _ = attention_forward(q, k, v, scale=0.1, window_right=0)
        torch.cuda.current_stream().wait_stream(stream)
        exact, _ = attention_reference(*(x.double() for x in (q, k, v)), scale=0.1, window_right=0)
        assert_as_good(out, eager(q, k, v, 0.1, 0), exact)
    assert len(forward._calls) == 1


def test_one_tensor_for_all_first():
    """What was prepared for q = k = v serves three tensors as well."""
    forward._calls.clear()
    q, k, v = (torch.randn(2, 2, 300, 64, device="cuda", dtype=torch.bfloat16) for _ in "qkv")
    attention_forward(q, q, q, scale=0.1)
    out, _ = attention_forward(q, k, v, scale=0.1)
    assert len(forward._calls) == 1
    exact, _ = attention_reference(*(x.double() for x in (q, k, v)), scale=0.1)
    assert_as_good(out, eager(q, k, v, 0.1, None), exact)


def test_in_a_thread_and_in_a_cuda_graph():
    q, k, v = (torch.randn(2, 40, 1000, 64, device="cuda", dtype=torch.bfloat16) for _ in "qkv")
    expected, _ = attention_forward(q, k, v, scale=0.1, window_right=0)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for out, _ in pool.map(lambda _: attention_forward(q, k, v, scale=0.1, window_right=0), range(100)):
            assert torch.equal(out, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = attention_forward(q, k, v, scale=0.1, window_right=0)
    out.fill_(math.nan)
    q.copy_(torch.randn_like(q))
    graph.replay()
    assert torch.equal(out, attention_forward(q, k, v, scale=0.1, window_right=0)[0])


@pytest.mark.parametrize("right", [None, 0])
def test_long_sequences_take_the_plain_kernel(monkeypatch, right):
    """By the tables; in a CUDA graph, with other addresses, and with neighbours that are no clusters."""
    prepared, real = [], launch.prepare
    monkeypatch.setattr(launch, "prepare", lambda kernel, *args: prepared.append(kernel) or real(kernel, *args))
    monkeypatch.setattr(forward, "_calls", {})
    q, k, v = (torch.randn(1, 8, 8200, 128, device="cuda", dtype=torch.bfloat16) for _ in "qkv")
    expected, _ = attention_forward(q, k, v, scale=0.1, window_right=right)
    assert prepared == [forward.forward_plain_kernel]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        short, _ = attention_forward(*(x[:, :, :300] for x in (q, k, v)), scale=0.1, window_right=right)
        out, _ = attention_forward(q, k, v, scale=0.1, window_right=right)
        again, _ = attention_forward(q.clone(), k.clone(), v.clone(), scale=0.1, window_right=right)
    for _ in range(3):
        graph.replay()
        assert torch.equal(out, expected) and torch.equal(again, expected)
    exact, _ = attention_reference(*(x[:, :1].double() for x in (q, k, v)), scale=0.1, window_right=right)
    assert_as_good(out[:, :1], eager(*(x[:, :1] for x in (q, k, v)), 0.1, right), exact)


def test_first_seen_in_a_cuda_graph():
    """What a problem needs for good is not in the graph's memory, and outlives the memory of what was prepared."""
    q, k, v = (torch.randn(3, 41, 1200, 64, device="cuda", dtype=torch.bfloat16) for _ in "qkv")
    attention_forward(*(x[:, :, :1100] for x in (q, k, v)), scale=0.1, window_right=0)
    forward._calls.clear()
    forward._orders.clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = attention_forward(q, k, v, scale=0.1, window_right=0)
    assert len(forward._orders) == 1
    forward._calls.clear()
    for _ in range(2):
        out.fill_(math.nan), lse.fill_(math.nan)
        q.copy_(torch.randn_like(q))
        graph.replay()
        assert all(map(torch.equal, (out, lse), attention_forward(q, k, v, scale=0.1, window_right=0)))


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("options", [{}, {"window_right": 0}, {"window_left": 200, "softcap": 5.0}], ids=str)
@pytest.mark.parametrize("name", MASKS)
def test_masks_that_leave_tiles_out(name, options, head_dim):
    torch.manual_seed(0)
    mask = MASKS[name].cuda()
    q = torch.randn(4, 4, S, head_dim, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(4, 2, S, head_dim, device="cuda", dtype=torch.bfloat16) for _ in "kv")
    options = options | dict(scale=0.1, mask=mask)
    out, lse = attention_forward(q, k, v, **options)
    exact, exact_lse = attention_reference(*(x.double() for x in (q, k, v)), **options)
    left, right = options.pop("window_left", None), options.pop("window_right", None)
    assert_as_good(out, eager(q, k, v, right=right, left=left, **options), exact)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-4)
    # With other strides TMA brings the mask.
    options["mask"] = torch.nn.functional.pad(mask.expand(*mask.shape[:-1], S), (0, -S % 16))[..., :S]
    again, _ = attention_forward(q, k, v, window_left=left, window_right=right, **options)
    assert torch.equal(out, again)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(2, 4, 300, 304), (1, 1, 300, 304), (1, 4, 1, 304)])
def test_a_bias_inside_the_score(head_dim, dtype, shape):
    """The cap is over the product and the bias; the backward's derivative has it in it too."""
    torch.manual_seed(0)
    q, dout = (torch.randn(2, 4, 300, head_dim, device="cuda", dtype=torch.bfloat16) for _ in "qd")
    k, v = (torch.randn(2, 2, 304, head_dim, device="cuda", dtype=torch.bfloat16) for _ in "kv")
    bias, formulas = torch.randn(shape, device="cuda", dtype=dtype), Formulas(score="3.0 * tanh((s + b) / 3.0)")
    options = dict(scale=0.1, window_right=50, formulas=formulas)
    out, lse = attention_forward(q, k, v, bias, **options)
    exact = attention_reference(*(x.double() for x in (q, k, v, bias)), **options)
    assert (out.double() - exact[0]).norm() < 4e-3 * exact[0].norm() and (lse.double() - exact[1]).abs().max() < 1e-3
    grads = attention_backward(dout, q, k, v, bias, None, out, lse, **options)[:3]
    double = (x.double() for x in (dout, q, k, v, bias))
    for got, want in zip(grads, attention_backward_reference(*double, None, *exact, **options)):
        assert (got.double() - want).norm() < 1e-2 * want.norm()

"""Masks and biases that the kernels compute: which formula the code's own operations become, and what comes out."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask

from fa3_inductor import Reason, config

from .harness import assert_as_good_as_eager, fuse, run

B, H, S, D = 2, 4, 48, 16


def positions(x):
    i = torch.arange(x.shape[-2], device=x.device)
    return i[:, None], i[None, :]


def attend(q, k, v, bias=None, visible=None):
    scores = q @ k.mT * D**-0.5
    scores = scores if bias is None else scores + bias
    scores = scores if visible is None else scores.masked_fill(~visible, -math.inf)
    return scores.softmax(-1).to(v.dtype) @ v


class Alibi(nn.Module):
    def __init__(self, spelling):
        super().__init__()
        self.register_buffer("slopes", torch.tensor([0.5, 0.25, 0.125, 0.0625]))
        self.spelling = spelling

    def forward(self, q, k, v):
        i, j = positions(q)
        slopes = {
            "powers": lambda: torch.pow(0.5, torch.arange(1, H + 1)),
            "list": lambda: torch.tensor([0.5, 0.25, 0.125, 0.0625]),
        }.get(self.spelling, lambda: self.slopes)()
        slopes = slopes[:, None, None]
        bias = {
            "symmetric": lambda: -slopes * (i - j).abs(),
            "float positions": lambda: slopes * (j.float() - i.float()),
            "divided": lambda: (j - i) / (1 / slopes),
            "subtracted": lambda: 0.0 - slopes * (i - j),
            "bfloat16": lambda: slopes.bfloat16() * (j - i),
        }.get(self.spelling, lambda: slopes * (j - i))()
        return attend(q, k, v, bias.to(q.dtype) if self.spelling == "narrowed" else bias, j <= i)


ALIBI = "real(t0) * (real(k) - real(q))"


@pytest.mark.parametrize("spelling, formula", [
    ("buffer", ALIBI),
    ("powers", ALIBI),
    ("list", ALIBI),
    ("narrowed", ALIBI),
    ("bfloat16", ALIBI),
    ("float positions", ALIBI),
    ("symmetric", "real(t0) * abs(real(q) - real(k))"),
    ("divided", "(real(k) - real(q)) / real(t0)"),
    ("subtracted", "0.0 - (real(t0) * (real(q) - real(k)))"),
])  # fmt: skip
def test_alibi(spelling, formula):
    model = Alibi(spelling)
    same_as_eager(model, qkv(), bias=formula, mask="causal & bias")


def qkv():
    return list(torch.randn(3, B, H, S, D).unbind())


def documents(dtype=torch.int64):
    return torch.randint(0, 3, (B, S)).sort().values.to(dtype)


def same_as_eager(fn, args, bias="", mask_formula="", mask=None, dtypes=(torch.float32, torch.bfloat16)):
    """Forward and gradients are eager's, and the formulas are these; an int in place of one says how many tables."""
    for dtype in dtypes:
        compiled, report = fuse(fn, target="reference")
        ours, eager, exact = (run(f, args, d) for f, d in ((compiled, dtype), (fn, dtype), (fn, torch.float64)))
        assert_as_good_as_eager(ours, eager, exact, dtype)
        (site,) = report.sites
        assert site.status == "fused", site.verdict
        found = site.detail.partition("computed, not read: ")[2]
        wanted = ", ".join(f"{kind} {text}" for kind, text in (("bias", bias), ("mask", mask_formula)) if text)
        assert found == wanted
        if mask is not None:
            assert site.mask == mask


def by_sdpa(q, k, v, visible):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible)


def causal_documents(q, k, v, document):
    i, j = positions(q)
    return by_sdpa(q, k, v, (document[:, None, :, None] == document[:, None, None, :]) & (j <= i))


def chunks(q, k, v):
    i, j = positions(q)
    return attend(q, k, v, visible=(i // 16 == j // 16) & (j <= i))


def prefixes(q, k, v, lengths):
    i, j = positions(q)
    return attend(q, k, v, visible=(j <= i) | (j < lengths[:, None, None, None]))


def causal_and_padding(q, k, v, keep):
    i, j = positions(q)
    low = torch.where((j <= i) & keep[:, None, None, :], 0.0, torch.finfo(torch.float32).min)
    return attend(q, k, v, bias=low.to(q.dtype))


def dilated(q, k, v):
    i, j = positions(q)
    return attend(q, k, v, visible=(i % 3 == j % 3) & (j <= i))


def by_position_ids(q, k, v, ids):
    """Packed sequences by their position ids alone: a document begins where they start again."""
    starts = torch.cumsum((torch.diff(ids, prepend=ids[:, :1] - 1, dim=1) != 1).to(torch.int32), 1)
    i, j = positions(q)
    return by_sdpa(q, k, v, (j <= i) & (starts[:, None, :, None] == starts[:, None, None, :]))


def by_vmap(q, k, v, document, keep):
    """As transformers builds masks: a function of four indices, vmapped."""

    def visible(b, h, i, j):
        return (j <= i) & (document[b, i] == document[b, j]) & keep[b, j]

    for dims in ((None, None, None, 0), (None, None, 0, None), (None, 0, None, None), (0, None, None, None)):
        visible = torch.vmap(visible, in_dims=dims)
    b, h, i, j = (torch.arange(n, device=q.device) for n in (q.shape[0], 1, q.shape[2], k.shape[2]))
    return by_sdpa(q, k, v, visible(b, h, i, j))


def two_conditions(q, k, v, document):
    i, j = positions(q)
    far = (i - j).abs() > 7
    same = document[:, None, :, None] == document[:, None, None, :]
    return attend(q, k, v, visible=(far | same) & (j <= i))


@pytest.mark.parametrize("fn, args, formula, mask", [
    (causal_documents, lambda: [documents()], "t0 == t1", None),
    (causal_documents, lambda: [documents(torch.int32)], "t0 == t1", None),
    (causal_documents, lambda: [documents(torch.uint8)], "t0 == t1", None),
    (chunks, lambda: [], "(k // 16) == (q // 16)", "causal & mask[k, q]"),
    (prefixes, lambda: [torch.tensor([10, 33])], "(k <= q) | (k < t0)", None),
    (causal_and_padding, lambda: [torch.arange(S) < torch.tensor([[S], [S - 9]])], "t0 != 0", None),
    (dilated, lambda: [], "(k % 3) == (q % 3)", None),
    (by_position_ids, lambda: [torch.cat([torch.arange(20), torch.arange(28)]).expand(B, S)], "t0 == t1", None),
    (by_vmap, lambda: [documents(), torch.rand(B, S) > 0.2], "(t0 != 0) & (t1 == t2)", None),
])  # fmt: skip
def test_masks(fn, args, formula, mask):
    same_as_eager(fn, [*qkv(), *args()], mask_formula=formula, mask=mask)


def test_conditions_of_conditions():
    formula = "(t0 == t1) | ((k <= q) & (k < (q - 7))) | ((k > q) & (k > (7 + q)))"
    same_as_eager(two_conditions, [*qkv(), documents()], mask_formula=formula)


def test_masks_of_transformers():
    masks = pytest.importorskip("transformers.masking_utils")

    def fn(q, k, v, keep, document, use_vmap):
        visible = masks.sdpa_mask(
            batch_size=B, q_length=S, kv_length=S, attention_mask=keep, allow_is_causal_skip=False, use_vmap=use_vmap,
            mask_function=masks.and_masks(masks.causal_mask_function, masks.packed_sequence_mask_function(document)),
        )  # fmt: skip
        return by_sdpa(q, k, v, visible)

    for use_vmap in (False, True):
        args = [*qkv(), torch.rand(B, S) > 0.2, documents(), use_vmap]
        same_as_eager(fn, args, mask_formula="(t0 != 0) & (t1 == t2)")


def vector(q, k, v, table):
    """What is vmapped has an axis of its own."""
    i, j = positions(q)
    bias = torch.vmap(lambda row: row * (j - i)[0, 1])(table)
    return attend(q, k, v, bias=bias[:, None, None], visible=j <= i)


def cumulative(q, k, v, table):
    i, j = positions(q)
    bias = torch.vmap(lambda x: x.softmax(0))(table[:, 0])
    return attend(q, k, v, bias=bias[:, None, None, None] * (j - i), visible=j <= i)


def of_the_result(q, k, v, table):
    """Only a vmapped function has use of the attention."""
    i, j = positions(q)
    return torch.vmap(lambda x: x.cumsum(0))(attend(q, k, v, visible=j <= i).flatten(0, 2))


def own_attention(q, k, v, table):
    i, j = positions(q)
    inside = torch.vmap(lambda q, k, v: (q @ k.mT).softmax(-1) @ v)(q, k, v)
    return attend(inside, k, v, visible=j <= i) * torch.vmap(lambda x: x.softmax(0))(table)[:, None, :, None]


def block_mask(q, k, v, table):
    """FlexAttention's, which fills a tensor of its own in a vmapped function; the attention beside it is fused."""
    i, j = positions(q)
    blocks = create_block_mask(lambda b, h, i, j: i >= j, B, H, S, S, device="cpu")
    return attend(q, k, v, visible=j <= i) * (1 + table.sum() * blocks.kv_num_blocks.sum())


@pytest.mark.parametrize("fn", [vector, cumulative, of_the_result, own_attention, block_mask])
@pytest.mark.parametrize("grads", [False, True])
def test_other_functions_are_not_looked_into(fn, grads):
    """But what is around them is. (In training, a bias of which nothing is known stays beside a mask by -inf.)"""
    args = [*qkv(), torch.rand(B, S)]
    compiled, report = fuse(fn, target="reference")
    theirs, ours = run(fn, args, torch.float32, grads), run(compiled, args, torch.float32, grads)
    torch.testing.assert_close([ours.out, *ours.grads], [theirs.out, *theirs.grads], atol=1e-4, rtol=1e-4)
    *inside, site = sorted(report.sites, key=lambda s: s.reason is not Reason.OPAQUE)
    assert len(inside) == (fn in (cumulative, own_attention)) + (fn is own_attention)  # a softmax each
    stays = grads and fn in (vector, cumulative)
    assert site.status == ("rejected" if stays else "fused") and (stays or "causal" in site.mask), site.verdict


def test_what_may_be_a_view_is_not_passed_by():
    """A write to it would be one to what the vmapped function was given."""

    def fn(q, k, v):
        q = q * 1.0
        scores = q @ k.mT
        torch.vmap(lambda x: x.transpose(0, 1))(q).mul_(3.0)
        return scores.softmax(-1) @ v

    args = qkv()
    compiled, report = fuse(fn, target="reference")
    torch.testing.assert_close(compiled(*args), fn(*args))
    assert not report.sites and "may write to a tensor that is not looked into" in report.graphs[0].error


# ------------------------------------------------------------------------------------------- no formula


def learned_slopes(q, k, v, slopes):
    i, j = positions(q)
    return attend(q, k, v, bias=torch.tanh(slopes)[:, None, None] * (j - i))


def test_a_bias_with_a_gradient_is_a_tensor():
    same_as_eager(learned_slopes, [*qkv(), torch.rand(H)])


def wraps_around(q, k, v, document):
    """In bytes, 1 - 2 is 255."""
    i, j = positions(q)
    different = document[:, None, :, None] - document[:, None, None, :]
    return by_sdpa(q, k, v, (different < 128) & (j <= i))


def rounded_before_it_is_compared(q, k, v, times):
    i, j = positions(q)
    distance = times[:, None, :, None] - times[:, None, None, :]
    return by_sdpa(q, k, v, (distance.abs() < 0.5) | (i == j))


def cut_off(q, k, v, times):
    i, j = positions(q)
    same = (times[:, None, :, None] + times[:, None, None, :]).to(torch.int32) % 2 == 0
    return by_sdpa(q, k, v, same | (i == j))


def whole_tensor(q, k, v, visible):
    i, j = positions(q)
    return by_sdpa(q, k, v, visible & (j <= i) | (i == j))


def signs(q, k, v, document):
    """Bytes with a sign and without compare as numbers."""
    i, j = positions(q)
    signed = (document.to(torch.int8) - 1)[:, None, :, None]
    return by_sdpa(q, k, v, (signed < document[:, None, None, :]) & (j <= i) | (i == j))


def many_tables(q, k, v, *documents):
    i, j = positions(q)
    visible = j <= i
    for document in documents:
        visible = visible & (document[:, None, :, None] >= document[:, None, None, :])
    return by_sdpa(q, k, v, visible | (i == j))


def products_of_positions(q, k, v):
    i, j = positions(q)
    return by_sdpa(q, k, v, (torch.minimum(i, j) * 1_000_000 <= 30_000_000) | (i == j))


def wider_numbers(q, k, v, limit):
    i, j = (x.int() for x in positions(q))
    return by_sdpa(q, k, v, ((i - j) < limit) | (i == j))


def not_numbers(q, k, v, x):
    i, j = positions(q)
    return by_sdpa(q, k, v, (torch.minimum(x[:, None, :, None], x[:, None, None, :]) < 0.5) | (i == j))


def halves(q, k, v, x):
    i, j = positions(q)
    difference = x[:, None, :, None] - x[:, None, None, :]
    return by_sdpa(q, k, v, (torch.div(difference, 2, rounding_mode="floor") == 0) | (i == j))


def large_products(q, k, v):
    i, j = positions(q)
    return by_sdpa(q, k, v, ((i * j) % 5 != 1) | (i == j))


def times_apart(q, k, v, times):
    """The difference of large integers, which float32 cannot tell from each other."""
    return attend(q, k, v, bias=torch.exp(-(times[:, None, :, None] - times[:, None, None, :]).float().abs()))


def test_differences_of_integers_are_exact():
    times = torch.randint(0, 5, (B, S)).sort().values + 1_700_000_000
    same_as_eager(times_apart, [*qkv(), times], bias="exp(-abs(real(t0 - t1)))")


@pytest.mark.parametrize("fn", [
    lambda q, k, v, w: attend(q, k, v, visible=(positions(q)[0] - positions(q)[1]).abs()
                              <= w[:, None].expand(2, 2).reshape(4)[:, None, None]),
    lambda q, k, v, w: attend(q, k, v, visible=(positions(q)[0] - positions(q)[1]).abs()
                              <= w.repeat_interleave(2, dim=0)[:, None, None]),
])  # fmt: skip
def test_a_table_of_groups_of_heads(fn):
    args = [*qkv(), torch.tensor([3, 20])]
    compiled, report = fuse(fn, target="reference")
    torch.testing.assert_close(compiled(*args), fn(*args))
    assert report.sites[0].status == "fused"


def numbers_of_several_dtypes(q, k, v, document):
    n = torch.tensor(100)

    def visible(b, i, j):
        return (document[b, i] * n <= document[b, j] * n) & (j <= i)

    for dims in ((None, None, 0), (None, 0, None), (0, None, None)):
        visible = torch.vmap(visible, in_dims=dims)
    return by_sdpa(q, k, v, visible(*(torch.arange(size) for size in (B, S, S)))[:, None])


def random_numbers(q, k, v):
    def visible(i, j):
        return (j <= i) & ((torch.rand(()) > 0.4) | (i == j))

    visible = torch.vmap(visible, in_dims=(None, 0), randomness="different")
    visible = torch.vmap(visible, in_dims=(0, None), randomness="different")
    return by_sdpa(q, k, v, visible(torch.arange(S), torch.arange(S)))


@pytest.mark.parametrize("fn, args", [
    (numbers_of_several_dtypes, lambda: [torch.randint(0, 9, (B, S), dtype=torch.uint8)]),
    (random_numbers, lambda: []),
])  # fmt: skip
def test_vmapped_functions_that_are_left_alone(fn, args):
    args = [*qkv(), *args()]
    compiled, _ = fuse(fn, target="reference")
    torch.manual_seed(0)
    ours = compiled(*args)
    if fn is random_numbers:  # other ones than in eager, but the first query sees the first key alone
        torch.testing.assert_close(ours[:, :, 0], args[2][:, :, 0])
        return
    torch.testing.assert_close(ours, fn(*args))


class Annealed(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("slopes", torch.rand(H))

    def forward(self, q, k, v):
        i, j = positions(q)
        return attend(q, k, v, bias=self.slopes[:, None, None] * (j - i), visible=j <= i)


def test_a_buffer_that_is_written_to_each_time_has_no_bounds():
    model = Annealed()
    compiled, report = fuse(model, target="reference")
    for _ in range(5):
        args = qkv()
        torch.testing.assert_close(compiled(*args), model(*args))
        model.slopes.mul_(0.9)
    assert len(report.graphs) == 2


def test_a_table_that_is_written_to_is_read_before():
    def fn(q, k, v, document):
        visible = document[:, None, :, None] == document[:, None, None, :]
        document.zero_()
        return by_sdpa(q, k, v, visible)

    args = [*qkv(), documents()]
    compiled, report = fuse(fn, target="reference")
    torch.testing.assert_close(compiled(*args[:3], args[3].clone()), fn(*args[:3], args[3].clone()))
    assert report.sites[0].status == "fused" and not report.sites[0].detail


def test_a_table_that_a_vmapped_function_writes_to_is_read_before():
    def fn(q, k, v, document):
        visible = document[:, None, :, None] == document[:, None, None, :]

        def later(i):
            document.zero_()
            return i + 1

        seen = torch.vmap(later)(torch.arange(3))
        return by_sdpa(q, k, v, visible) * seen.sum()

    args = [*qkv(), documents()]
    compiled, report = fuse(fn, target="reference")
    torch.testing.assert_close(compiled(*args[:3], args[3].clone()), fn(*args[:3], args[3].clone()))
    assert report.sites[0].status == "fused" and not report.sites[0].detail


@pytest.mark.parametrize("bias", ["integers", "two bytes"])
def test_biases_of_other_dtypes(bias):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("numbers", torch.arange(H).to(torch.uint16))

        def forward(self, q, k, v, whole):
            i, j = positions(q)
            return attend(q, k, v, bias=whole if bias == "integers" else self.numbers.float()[:, None, None] * (j - i))

    args, model = [*qkv(), torch.randint(-5, 5, (S, S))], Model()
    compiled, report = fuse(model, target="reference")
    torch.testing.assert_close(compiled(*args), model(*args))
    assert report.sites[0].status == "fused"


def test_a_complex_parameter_keeps_its_gradient():
    z = torch.randn(H, dtype=torch.complex64, requires_grad=True)

    def fn(q, k, v, z):
        i, j = positions(q)
        return attend(q, k, v, bias=torch.view_as_real(z)[:, 0][:, None, None] * (j - i))

    args = [*qkv(), z]
    with config.patch(empty_rows="relaxed"):
        compiled, report = fuse(fn, target="reference")
        ours, theirs = (torch.autograd.grad(f(*args).sum(), z)[0] for f in (compiled, fn))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("fn, args", [
    (wraps_around, lambda: [documents(torch.uint8)]),
    (rounded_before_it_is_compared, lambda: [torch.rand(B, S)]),
    (cut_off, lambda: [torch.rand(B, S)]),
    (whole_tensor, lambda: [torch.rand(S, S) > 0.5]),
    (signs, lambda: [documents(torch.uint8)]),
    (many_tables, lambda: [documents(), documents(), documents()]),
    (large_products, lambda: []),
    (products_of_positions, lambda: []),
    (wider_numbers, lambda: [torch.tensor(2**63 - 1)]),
    (not_numbers, lambda: [torch.where(torch.rand(B, S) > 0.2, torch.rand(B, S), math.nan)]),
    (halves, lambda: [torch.randint(0, 9, (B, S))]),
])  # fmt: skip
def test_what_is_no_formula_is_read(fn, args):
    same_as_eager(fn, [*qkv(), *args()])


def test_a_bias_of_one_dimension_is_read():
    def fn(q, k, v):
        return attend(q, k, v, bias=torch.arange(S, device=q.device) / S)

    same_as_eager(fn, qkv())


def test_a_mask_whose_size_is_symbolic():
    compiled, report = fuse(chunks, target="reference", dynamic=True)
    for size in (32, 40):
        q, k, v = torch.randn(3, B, H, size, D).unbind()
        torch.testing.assert_close(compiled(q, k, v), chunks(q, k, v))
    assert [site.detail for site in report.sites] == ["computed, not read: mask (k // 16) == (q // 16)"]


def test_rows_without_a_key():
    """What the mask hides all of is NaN, as in the user's code."""

    def fn(q, k, v, keep):
        i, j = positions(q)
        return attend(q, k, v, visible=(j <= i) & keep[:, None, None, :])

    keep = torch.ones(B, S, dtype=torch.bool)
    keep[1, :5] = False
    same_as_eager(fn, [*qkv(), keep], mask_formula="t0 != 0")


def test_several_attentions_share_a_mask():
    def fn(q, k, v, document):
        i, j = positions(q)
        visible = (document[:, None, :, None] == document[:, None, None, :]) & (j <= i)
        return by_sdpa(by_sdpa(q, k, v, visible), k, v, visible)

    args = [*qkv(), documents()]
    compiled, report = fuse(fn, target="reference")
    torch.testing.assert_close(compiled(*args), fn(*args))
    assert [site.detail for site in report.sites] == ["computed, not read: mask t0 == t1"] * 2


def test_the_mask_itself_is_no_longer_made():
    compiled, report = None, []

    def backend(gm, inputs):
        from fa3_inductor import config
        from fa3_inductor.rewrite import rewrite_graph

        with config.patch(target="reference"):
            rewrite_graph(gm)
        from torch._dynamo.backends.common import aot_autograd

        def compiler(graph, inputs):
            report.extend(n.meta["val"] for n in graph.graph.nodes if isinstance(n.meta.get("val"), torch.Tensor))
            return graph.forward

        return aot_autograd(fw_compiler=compiler)(gm, inputs)

    torch._dynamo.reset()
    compiled = torch.compile(causal_documents, backend=backend)
    with torch.no_grad():
        compiled(*qkv(), documents())
    assert report and not [x.shape for x in report if x.shape[-2:] == (S, S)]

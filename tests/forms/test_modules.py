"""PyTorch's own attention modules, and what surrounds an attention in a model: contexts, writes, views, transforms."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from fa3_inductor import Reason

from .harness import assert_as_good_as_eager, fuse, run

INF = float("-inf")
E, HEADS, L, N = 32, 4, 9, 2
B, H, S, D = 2, 4, 11, 16
PADDING = torch.arange(L)[None] >= torch.tensor([[L], [6]])
CAUSAL = torch.ones(L, L, dtype=torch.bool).triu(1)
CAUSAL_FLOAT = torch.zeros(L, L).masked_fill(CAUSAL, INF)
TARGETS = pytest.mark.parametrize("target", ["sdpa", "reference"])


def tensors(out):
    return [out] if isinstance(out, torch.Tensor) else [t for x in out if x is not None for t in tensors(x)]


def compare(model, args, kwargs, train, target="auto"):
    """The sites found, after comparing results and, in training, the gradient of every parameter."""
    model.train(train)
    with torch.set_grad_enabled(train):
        compiled, report = fuse(model, target=target)
        ours, eager = tensors(compiled(*args, **kwargs)), tensors(model(*args, **kwargs))
    torch.testing.assert_close(ours, eager, atol=2e-5, rtol=1e-4, equal_nan=True)
    if train:
        grads = [torch.autograd.grad(x[0].square().sum(), list(model.parameters())) for x in (ours, eager)]
        torch.testing.assert_close(*grads, atol=2e-4, rtol=1e-3, equal_nan=True)
    return report.sites


TRAIN = pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
MASKS = {
    "none": {},
    "padding": {"key_padding_mask": PADDING},
    "bool": {"attn_mask": CAUSAL},
    "float": {"attn_mask": CAUSAL_FLOAT},
    "is_causal": {"attn_mask": CAUSAL_FLOAT, "is_causal": True},
    "both": {"attn_mask": CAUSAL, "key_padding_mask": PADDING},
}


@TARGETS
@TRAIN
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("masks", MASKS)
def test_multihead_attention(masks, batch_first, train, target):
    x = torch.randn(N, L, E) if batch_first else torch.randn(L, N, E)
    mha = nn.MultiheadAttention(E, HEADS, batch_first=batch_first)
    sites = compare(mha, (x, x, x), {"need_weights": False, **MASKS[masks]}, train, target)
    assert [s.status for s in sites] == ["fused"]
    if masks == "is_causal":
        assert sites[0].mask == "causal"


@TRAIN
@pytest.mark.parametrize("masks", ["none", "padding", "both"])
def test_weights_that_are_returned(masks, train):
    x = torch.randn(N, L, E)
    mha = nn.MultiheadAttention(E, HEADS, batch_first=True)
    sites = compare(mha, (x, x, x), {"need_weights": True, **MASKS[masks]}, train)
    assert [s.reason for s in sites] == [Reason.WEIGHTS_USED]


class Dropped(nn.Module):
    """Asks for the weights, as is the default, and throws them away."""

    def __init__(self, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(E, HEADS, batch_first=True, **options)

    def forward(self, q, k, v, **masks):
        return self.attention(q, k, v, **masks)[0]


@TRAIN
@pytest.mark.parametrize("masks", ["none", "bool", "float", "is_causal"])
def test_weights_that_are_dropped(masks, train):
    x = torch.randn(N, L, E)
    assert [s.status for s in compare(Dropped(), (x, x, x), MASKS[masks], train)] == ["fused"]


@TRAIN
@pytest.mark.parametrize("options", [{"kdim": 8, "vdim": 12}, {"add_zero_attn": True}, {"add_bias_kv": True}], ids=str)
def test_options_of_multihead_attention(options, train):
    k, v = (torch.randn(N, L, options.get(n, E)) for n in ("kdim", "vdim"))
    sites = compare(Dropped(**options), (torch.randn(N, L, E), k, v), {"attn_mask": CAUSAL}, train)
    assert len(sites) == 1
    assert "add_bias_kv" in options or sites[0].status == "fused"


@TRAIN
def test_cross_attention_and_no_batch(train):
    x, y = torch.randn(N, L, E), torch.randn(N, 5, E)
    assert [s.status for s in compare(Dropped(), (x, y, y), {}, train)] == ["fused"]
    assert [s.status for s in compare(Dropped(), (x[0], y[0], y[0]), {}, train)] == ["fused"]


LAYER_MASKS = {
    "none": {},
    "padding": {"src_key_padding_mask": PADDING},
    "causal": {"src_mask": CAUSAL_FLOAT, "is_causal": True},
    "mask": {"src_mask": CAUSAL},
    "both": {"src_mask": CAUSAL, "src_key_padding_mask": PADDING},
}


@TRAIN
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("masks", LAYER_MASKS)
def test_encoder_layer(masks, activation, norm_first, train):
    options = {"dropout": 0.0, "batch_first": True, "norm_first": norm_first, "activation": activation}
    layer = nn.TransformerEncoderLayer(E, HEADS, 48, **options)
    sites = compare(layer, (torch.randn(N, L, E),), LAYER_MASKS[masks], train)
    assert [s.status for s in sites] == ["fused"]


def test_the_native_fast_path_is_opened():
    layer = nn.TransformerEncoderLayer(E, HEADS, 48, batch_first=True).eval()
    with torch.no_grad():
        compiled, report = fuse(layer)
        x = torch.randn(N, L, E)
        torch.testing.assert_close(compiled(x), layer(x), atol=2e-5, rtol=1e-4)
    (site,) = report.sites
    assert (site.status, site.mask) == ("fused", "full") and "softmax" in site.form


@TRAIN
def test_encoder_and_decoder(train):
    options = {"dropout": 0.0, "batch_first": True}
    x, y = torch.randn(N, L, E), torch.randn(N, 6, E)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(E, HEADS, 48, **options), 2, enable_nested_tensor=False)
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(E, HEADS, 48, **options), 2)
    assert [s.status for s in compare(encoder, (x,), {"src_key_padding_mask": PADDING}, train)] == ["fused"] * 2
    sites = compare(decoder, (x, y), {"tgt_mask": CAUSAL_FLOAT, "tgt_is_causal": True}, train)
    assert [(s.status, s.mask) for s in sites] == [("fused", "causal"), ("fused", "full")] * 2


@pytest.mark.parametrize("mask, train", [(CAUSAL, False), (CAUSAL_FLOAT, True)], ids=["bool", "float"])
def test_masks_that_torch_looks_at(mask, train):
    """Whether they are causal, if nobody says so; and of two types, it warns."""
    model = nn.Transformer(E, HEADS, 1, 2, 48, dropout=0.0, batch_first=True)
    x, y = torch.randn(N, 6, E), torch.randn(N, L, E)
    masks = {"tgt_mask": mask, "tgt_key_padding_mask": PADDING}
    assert [s.status for s in compare(model, (x, y), masks, train)] == ["fused"] * 5
    made_inside = lambda x, y: model(x, y, tgt_mask=nn.Transformer.generate_square_subsequent_mask(L))  # noqa: E731
    compiled, report = fuse(made_inside)
    torch.testing.assert_close(compiled(x, y), made_inside(x, y), atol=2e-5, rtol=1e-4)
    assert [s.mask for s in report.sites] == ["full", "causal", "full", "causal", "full"]


class Block(nn.Module):
    """nanoGPT's attention: packed projection, tril buffer, .view after the product."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(E, 3 * E), nn.Linear(E, E)
        self.register_buffer("bias", torch.tril(torch.ones(L * 2, L * 2)).view(1, 1, L * 2, L * 2))

    def forward(self, x):
        b, t, c = x.size()
        q, k, v = (y.view(b, t, HEADS, c // HEADS).transpose(1, 2) for y in self.qkv(x).split(c, dim=2))
        att = (q @ k.transpose(-2, -1)) * (1.0 / k.size(-1) ** 0.5)
        att = F.softmax(att.masked_fill(self.bias[:, :, :t, :t] == 0, INF), dim=-1)
        return self.proj((att @ v).transpose(1, 2).contiguous().view(b, t, c))


@TRAIN
def test_a_block_like_nanogpts(train):
    assert [(s.status, s.mask) for s in compare(Block(), (torch.randn(N, L, E),), {}, train)] == [("fused", "causal")]


# ------------------------------------------------------------------------------------------- around an attention


def qkv():
    return [torch.randn(B, H, S, D) for _ in range(3)]


def attend(q, k, v):
    return (q @ k.mT * 0.25).softmax(-1) @ v


def check(fn, args=None, target="auto", grads=True):
    """The sites found, after comparing with eager and float64; arguments that are written to are compared too."""
    args = qkv() if args is None else args
    compiled, report = fuse(fn, target=target)
    runs, after = [], []
    for f, dtype in ((compiled, torch.float32), (fn, torch.float32), (fn, torch.float64)):
        copies = [a.clone().to(dtype) if a.is_floating_point() else a.clone() for a in args]
        runs.append(run(f, copies, dtype, grads))
        after.append(copies)
    assert_as_good_as_eager(*runs, torch.float32)
    torch.testing.assert_close(after[0], after[1])
    return [s for s in report.sites if s.reason is not Reason.DTYPE]


def key_written_between(q, k, v):
    k = k.clone()
    s = q @ k.mT * 0.25
    k.zero_()
    return s.softmax(-1) @ v


def alias_written_between(q, k, v):
    k = k.clone()
    flat = k.view(-1)
    s = q @ k.mT * 0.25
    flat.zero_()
    return s.softmax(-1) @ v


def alias_written_before(q, k, v):
    k = k.clone()
    k.view(-1)[5:99] = 1.0
    return attend(q, k, v)


def query_written_between(q, k, v):
    q = q.clone()
    s = q @ k.mT * 0.25
    q.add_(1)
    return s.softmax(-1) @ v + q


def scores_written_through_an_alias(q, k, v):
    s = q @ k.mT
    s.view(B * H, S, S).mul_(0.25)
    return s.softmax(-1) @ v


def mask_written_after_use(q, k, v):
    keep = torch.ones(S, S, dtype=torch.bool).tril()
    s = (q @ k.mT * 0.25).masked_fill(~keep, INF)
    keep[0] = True
    return s.softmax(-1) @ v


def mask_written_before_use(q, k, v):
    keep = torch.ones(S, S, dtype=torch.bool).tril()
    row = keep[2]
    row[7] = True
    return (q @ k.mT * 0.25).masked_fill(~keep, INF).softmax(-1) @ v


def result_written_to(q, k, v):
    out = attend(q, k, v)
    out.view(-1)[:5] = 0
    out += q
    return out


def result_copied_into(q, k, v):
    out = torch.zeros_like(q)
    out[:] = attend(q, k, v)
    return out


WRITES = [key_written_between, alias_written_between, alias_written_before, query_written_between]
WRITES += [scores_written_through_an_alias, mask_written_after_use, mask_written_before_use]
WRITES += [result_written_to, result_copied_into]


@TARGETS
@pytest.mark.parametrize("fn", WRITES)
def test_writes_in_place(fn, target):
    sites = check(fn, target=target, grads=False)
    assert [s.status for s in sites] == ["fused"]
    assert (sites[0].mask == "causal") == (fn is mask_written_after_use)


def value_written_later(q, k, v):
    v = v * 1
    out = torch.softmax(q @ k.mT * 0.25, -1) @ v.clone()
    v.add_(1)
    return out + v


def result_written_through_a_view(q, k, v):
    out = attend(q, k, v)
    out.transpose(1, 2).add_(1)
    return out


def result_relu(q, k, v):
    return F.relu(attend(q, k, v), inplace=True)


def result_scaled_in_place(q, k, v):
    out = attend(q, k, v)
    out *= 2
    return out


@TARGETS
@pytest.mark.parametrize(
    "fn",
    [result_written_to, value_written_later, result_written_through_a_view, result_relu, result_scaled_in_place],
)
def test_what_the_backward_needs_is_written_to(fn, target):
    """A product does not keep its result, nor what was copied before it."""
    assert [s.status for s in check(fn, target=target)] == ["fused"]


def scores_row_written(q, k, v):
    s = q @ k.mT * 0.25
    s[:, :, 0] = 0.0
    return s.softmax(-1) @ v


def weights_row_written(q, k, v):
    p = (q @ k.mT * 0.25).softmax(-1)
    p[:, :, 0] = 0.0
    return p @ v


@pytest.mark.parametrize("fn,reason", [(scores_row_written, Reason.SCORE_OP), (weights_row_written, Reason.WEIGHTS_OP)])
def test_writes_into_scores_and_weights(fn, reason):
    assert [s.reason for s in check(fn, grads=False)] == [reason]


def input_written_between(q, k, v):
    s = q @ k.mT * 0.25
    k.mul_(2)
    return s.softmax(-1) @ v


def input_written_after(q, k, v):
    out = attend(q, k, v)
    v.zero_()
    return out


@TARGETS
@pytest.mark.parametrize("fn", [input_written_between, input_written_after])
def test_writes_to_graph_inputs(fn, target):
    args = qkv()
    ours, eager = ([x.clone() for x in args] for _ in range(2))
    torch.testing.assert_close(fuse(fn, target=target)[0](*ours), fn(*eager), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(ours, eager)


@TARGETS
def test_two_attentions_share_a_mask(target):
    def fn(q, k, v):
        keep = torch.ones(S, S, dtype=torch.bool).tril()
        one = lambda q: (q @ k.mT * 0.25).masked_fill(~keep, INF).softmax(-1) @ v  # noqa: E731
        return one(one(q)) + attend(q, k, v) + attend(q, k, v)

    sites = check(fn, target=target)
    assert [(s.status, s.mask) for s in sites] == [("fused", "causal")] * 2 + [("fused", "full")] * 2


@TARGETS
def test_checkpoint(target):
    def fn(q, k, v):
        return checkpoint(attend, q, k, v, use_reentrant=False)

    assert [s.status for s in check(fn, target=target)] == ["fused"]


@TARGETS
def test_cond(target):
    def fn(q, k, v):
        return torch.cond(q.sum() > 0, attend, lambda q, k, v: (q @ k.mT).softmax(-1) @ v, (q, k, v))

    assert [s.status for s in check(fn, target=target)] == ["fused"] * 2


def test_the_users_choice_of_backend_holds_where_it_was_made():
    def fn(q, k, v):
        with sdpa_kernel(SDPBackend.MATH):
            chosen = F.scaled_dot_product_attention(q, k, v)
        return chosen + attend(q, k, v)

    assert [s.reason for s in check(fn)] == [Reason.USER_BACKEND, None]


@pytest.mark.parametrize("allowed", [[SDPBackend.FLASH_ATTENTION], [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]])
def test_a_choice_of_fused_backends_is_one_for_a_kernel(allowed):
    """SDPA would have to have one of these for what it is called with in place of the user's code."""

    def fn(q, k, v):
        with sdpa_kernel(allowed):
            return attend(q, k, v)

    assert [s.reason for s in check(fn, target="sdpa")] == [Reason.USER_BACKEND]
    assert [s.status for s in check(fn, target="reference")] == ["fused"]


def test_a_warning_comes_behind_the_graph():
    def fn(q, k, v):
        scores = q @ k.mT * 0.25
        warnings.warn("in the middle of an attention", stacklevel=2)
        return scores.softmax(-1) @ v

    compiled, report = fuse(fn)
    args = qkv()
    for _ in range(2):
        with pytest.warns(UserWarning, match="in the middle of an attention"):
            torch.testing.assert_close(compiled(*args), attend(*args))
    assert [s.status for s in report.sites] == ["fused"] and len(report.graphs) == 1


@TARGETS
def test_no_grad_around_a_whole_attention(target):
    def fn(q, k, v):
        with torch.no_grad():
            out = attend(q, k, v)
        return out + v

    compiled, report = fuse(fn, target=target)
    leaves = [x.requires_grad_() for x in qkv()]
    grads = [torch.autograd.grad(f(*leaves).sum(), leaves, allow_unused=True) for f in (compiled, fn)]
    assert [g is None for g in grads[0]] == [g is None for g in grads[1]] == [True, True, False]
    assert [s.status for s in report.sites] == ["fused"]


@pytest.mark.parametrize("where", ["scores", "weights"])
def test_a_graph_break_inside(where):
    def fn(q, k, v):
        x = q @ k.mT * 0.25
        x = x.softmax(-1) if where == "weights" else x
        torch._dynamo.graph_break()
        return (x if where == "weights" else x.softmax(-1)) @ v

    assert check(fn) == []


@TARGETS
def test_hooks_on_operands_and_result_still_run(target):
    def fn(q, k, v):
        scaled = q * 0.25
        if scaled.requires_grad:
            scaled.register_hook(lambda g: g * 3)
        out = (scaled @ k.mT).softmax(-1) @ v
        if out.requires_grad:
            out.register_hook(lambda g: g * 5)
        return out

    assert [s.status for s in check(fn, target=target)] == ["fused"]


def test_hook_on_weights():
    def fn(q, k, v):
        p = (q @ k.mT * 0.25).softmax(-1)
        if p.requires_grad:
            p.register_hook(lambda g: g * 3)
        return p @ v

    assert [s.status for s in check(fn)] == ["rejected"]


@TARGETS
@pytest.mark.parametrize("which", ["q", "k", "v", "scaled q"])
def test_detached_operands_get_no_gradient(which, target):
    def fn(q, k, v):
        q = (q * 0.25).detach() if which == "scaled q" else q.detach() * 0.25 if which == "q" else q * 0.25
        k = k.transpose(1, 2).detach().transpose(1, 2) if which == "k" else k
        v = v.detach() if which == "v" else v
        return (q @ k.mT).softmax(-1) @ v + 0 * (q + k + v)

    compiled, report = fuse(fn, target=target)
    leaves = [x.requires_grad_() for x in qkv()]
    grads = [torch.autograd.grad(f(*leaves).sum(), leaves, allow_unused=True) for f in (compiled, fn)]
    assert [g is None for g in grads[0]] == [g is None for g in grads[1]]
    assert [s.status for s in report.sites] == ["fused"]


@TARGETS
def test_a_custom_function_around_a_whole_attention(target):
    class Own(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v):
            return attend(q, k, v)

        @staticmethod
        def backward(ctx, g):
            return g * 2, g * 3, g * 4

    leaves = [x.requires_grad_() for x in qkv()]
    fn = Own.apply
    compiled, _ = fuse(lambda q, k, v: fn(q, k, v), target=target)
    torch.testing.assert_close(*(torch.autograd.grad(f(*leaves).sum(), leaves) for f in (compiled, fn)))


@pytest.mark.parametrize("transposed", [True, False])
def test_strides_of_a_returned_product(transposed):
    q = torch.randn(B, S, H, D).transpose(1, 2) if transposed else torch.randn(B, H, S, D)
    out = fuse(lambda q: attend(q, q, q))[0](q)
    assert out.stride() == attend(q, q, q).stride()
    out.view(B, -1)


@TARGETS
def test_dropout(target):
    p = 0.25
    n = 64
    q, k, v = torch.randn(1, 1, 4096, 4), torch.randn(1, 1, n, 4), torch.ones(1, 1, n, 4)
    fn = lambda q, k, v: F.dropout((q @ k.mT * 0.0).softmax(-1), p) @ v  # noqa: E731
    compiled, report = fuse(fn, target=target)
    out = compiled(q, k, v)
    assert abs(out.mean() - 1) < 0.02 and abs(out.std() - (p / (1 - p) / n) ** 0.5) < 0.01
    assert [s.status for s in report.sites] == ["fused"] and "dropout" in report.sites[0].form

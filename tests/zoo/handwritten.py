"""Attention as it is written in repositories and papers, a small module each; nothing but PyTorch is needed.

q, k and v come as [B, H, S, D] unless a form has a layout of its own.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fa3_inductor import Reason

from .registry import Call, call, register

BATCH, SEQLEN, WIDTH, HEADS, HEAD_DIM = 2, 24, 64, 4, 16
INF = float("-inf")


FORMS: list[str] = []


def form(name: str, *arguments: Callable[[], Tensor], attentions: int = 1, **options: Any) -> Callable:
    """Adds the decorated module to the zoo: called with x: [B, S, WIDTH] and with what ``arguments`` make."""

    def add(cls: type[nn.Module]) -> type[nn.Module]:
        FORMS.append(f"handwritten/{name}")

        @register(FORMS[-1], attentions, **options)
        def build() -> Call:
            return call(cls(), torch.randn(BATCH, SEQLEN, WIDTH), *(make() for make in arguments))

        return cls

    return add


def split_heads(x: Tensor, heads: int = HEADS) -> Tensor:
    """[B, S, H * D] -> [B, H, S, D]"""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """[B, H, S, D] -> [B, S, H * D]"""
    return x.transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """Projections on both sides; what is in between is the subclass's ``attend``."""

    kv_heads = HEADS
    value_dim = HEAD_DIM

    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(WIDTH, HEADS * HEAD_DIM)
        self.to_k = nn.Linear(WIDTH, self.kv_heads * HEAD_DIM)
        self.to_v = nn.Linear(WIDTH, self.kv_heads * self.value_dim)
        self.out = nn.Linear(HEADS * self.value_dim, WIDTH)

    def forward(self, x: Tensor, *rest: Tensor) -> Tensor:
        q, k, v = self.to_q(x), self.to_k(x), self.to_v(x)
        attended = self.attend(split_heads(q), split_heads(k, self.kv_heads), split_heads(v, self.kv_heads), *rest)
        return self.out(merge_heads(attended))


def positions(x: Tensor) -> tuple[Tensor, Tensor]:
    """Of queries, as a column, and of keys, as a row, where ``x`` is."""
    i = torch.arange(SEQLEN, device=x.device)
    return i[:, None], i[None, :]


# ------------------------------------------------------------------------------------------- layouts and products


@form("nanogpt")
class NanoGPT(nn.Module):
    """A packed projection, and a tril buffer that is cut to the length."""

    def __init__(self) -> None:
        super().__init__()
        self.c_attn = nn.Linear(WIDTH, 3 * WIDTH)
        self.c_proj = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("bias", torch.tril(torch.ones(64, 64)).view(1, 1, 64, 64))

    def forward(self, x):
        b, t, c = x.size()
        q, k, v = self.c_attn(x).split(c, dim=2)
        k = k.view(b, t, HEADS, c // HEADS).transpose(1, 2)
        q = q.view(b, t, HEADS, c // HEADS).transpose(1, 2)
        v = v.view(b, t, HEADS, c // HEADS).transpose(1, 2)
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(self.bias[:, :, :t, :t] == 0, INF)
        y = F.softmax(att, dim=-1) @ v
        return self.c_proj(y.transpose(1, 2).contiguous().view(b, t, c))


@form("einsum-odd-letters")
class EinsumOddLetters(Attention):
    """Heads third, and in the output before the queries; the letters say nothing."""

    def forward(self, x):
        q, k, v = (f(x).view(BATCH, SEQLEN, HEADS, HEAD_DIM) for f in (self.to_q, self.to_k, self.to_v))
        weights = torch.einsum("xnhz,xmhz->xhnm", q, k).div(math.sqrt(HEAD_DIM)).softmax(-1)
        return self.out(torch.einsum("xhnm,xmhz->xnhz", weights, v).flatten(2))


@form("grouped-five-dimensions")
class GroupedFiveDimensions(Attention):
    """A dimension for the groups, which keys and values lack."""

    kv_heads = 2

    def attend(self, q, k, v):
        q = q.unflatten(1, (2, 2))
        scores = torch.einsum("bghqd,bgkd->bghqk", q, k) * HEAD_DIM**-0.5
        return torch.einsum("bghqk,bgkd->bghqd", scores.softmax(dim=-1), v).flatten(1, 2)


@form("multi-query")
class MultiQuery(Attention):
    """Keys and values have no dimension for heads at all (PaLM)."""

    kv_heads = 1

    def attend(self, q, k, v):
        scores = torch.einsum("bhid,bjd->bhij", q * HEAD_DIM**-0.5, k.squeeze(1))
        later = torch.ones(SEQLEN, SEQLEN, dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(later, -torch.finfo(scores.dtype).max)
        return torch.einsum("bhij,bjd->bhid", scores.softmax(dim=-1), v.squeeze(1))


@form("sequence-first")
class SequenceFirst(Attention):
    """Megatron: [S, B, H, D], a buffer that baddbmm does not read, and causal by masked_fill."""

    def forward(self, x):
        x = x.transpose(0, 1)
        q, k, v = (f(x).view(SEQLEN, BATCH * HEADS, HEAD_DIM) for f in (self.to_q, self.to_k, self.to_v))
        empty = q.new_empty(BATCH * HEADS, SEQLEN, SEQLEN)
        scores = torch.baddbmm(
            empty, q.transpose(0, 1), k.transpose(0, 1).transpose(1, 2), beta=0.0, alpha=HEAD_DIM**-0.5
        )
        later = q.new_ones(1, 1, SEQLEN, SEQLEN).tril() < 0.5
        scores = scores.view(BATCH, HEADS, SEQLEN, SEQLEN).masked_fill(later, -10000.0)
        weights = scores.softmax(dim=-1).view(BATCH * HEADS, SEQLEN, SEQLEN)
        attended = torch.bmm(weights, v.transpose(0, 1)).view(BATCH, HEADS, SEQLEN, HEAD_DIM)
        return self.out(attended.permute(2, 0, 1, 3).reshape(SEQLEN, BATCH, WIDTH)).transpose(0, 1)


@form("baddbmm-alpha-beta")
class BaddbmmAlphaBeta(Attention):
    """The bias and the products, each with a factor (BLOOM)."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(HEADS, SEQLEN, SEQLEN))

    def attend(self, q, k, v):
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        bias = self.bias.repeat(BATCH, 1, 1)
        scores = torch.baddbmm(bias, q, k.transpose(1, 2), beta=0.5, alpha=1 / math.sqrt(HEAD_DIM))
        return torch.bmm(scores.softmax(-1), v).unflatten(0, (BATCH, HEADS))


class CrossAttention(nn.Module):
    """Queries from x: [B, S, WIDTH], keys and values of different sizes from context: [B, C, 48]."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(WIDTH, HEADS * 8, bias=False)
        self.to_kv = nn.Linear(48, HEADS * (8 + 24), bias=False)
        self.out = nn.Linear(HEADS * 24, WIDTH)

    def forward(self, x, context):
        k, v = split_heads(self.to_kv(context)).split([8, 24], dim=-1)
        weights = (split_heads(self.to_q(x)) @ k.mT / math.sqrt(8)).softmax(dim=-1)
        return self.out(merge_heads(weights @ v))


form("cross-other-value-size", lambda: torch.randn(BATCH, 13, 48))(CrossAttention)


@form("query-is-a-parameter")
class Pooling(Attention):
    """One learned query for every batch entry (attention pooling)."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, 1, WIDTH))

    def forward(self, x):
        q = split_heads(self.to_q(self.query.expand(BATCH, -1, -1)))
        weights = F.softmax(q @ split_heads(self.to_k(x)).transpose(-1, -2) / HEAD_DIM**0.5, dim=-1)
        return self.out(merge_heads(weights @ split_heads(self.to_v(x))))


@form("learned-keys")
class LearnedKeys(Attention):
    """Prefix tuning: keys and values that are parameters, before those of the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = nn.Parameter(torch.randn(2, HEADS, 4, HEAD_DIM))

    def attend(self, q, k, v):
        k, v = (torch.cat([m.expand(BATCH, -1, -1, -1), x], dim=2) for m, x in zip(self.memory, (k, v)))
        later = torch.ones(SEQLEN, SEQLEN, dtype=torch.bool, device=q.device).triu(1)
        scores = (q @ k.mT * HEAD_DIM**-0.5).masked_fill(F.pad(later, (4, 0)), INF)
        return scores.softmax(-1) @ v


# ------------------------------------------------------------------------------------------- scale


@form("scaled-before-the-product")
class ScaledBefore(Attention):
    """Whisper, and the attention of latent diffusion: each side by the fourth root."""

    def attend(self, q, k, v):
        scale = HEAD_DIM**-0.25
        scores = (q * scale) @ (k * scale).transpose(-1, -2)
        return F.softmax(scores.float(), dim=-1).to(q.dtype) @ v


@form("normalised-queries-and-keys")
class NormalisedQueriesAndKeys(Attention):
    """RMS norms with weights, as in Qwen 3, before the usual scale."""

    def __init__(self) -> None:
        super().__init__()
        self.q_norm, self.k_norm = nn.RMSNorm(HEAD_DIM), nn.RMSNorm(HEAD_DIM)

    def attend(self, q, k, v):
        return (self.q_norm(q) @ self.k_norm(k).mT * HEAD_DIM**-0.5).softmax(-1) @ v


@form("cosine-clamped-temperature")
class Cosine(Attention):
    """Swin V2: a learned temperature for each head. The scale is a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.full((HEADS, 1, 1), math.log(10.0)))

    def attend(self, q, k, v):
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        temperature = torch.clamp(self.logit_scale, max=math.log(1 / 0.01)).exp()
        return (scores * temperature).softmax(dim=-1) @ v


@form("cosine-temperature-in-the-query")
class CosineInTheQuery(Cosine):
    """The same attention, with the temperature where it is cheaper."""

    def attend(self, q, k, v):
        temperature = torch.clamp(self.logit_scale, max=math.log(1 / 0.01)).exp()
        return ((F.normalize(q, dim=-1) * temperature) @ F.normalize(k, dim=-1).mT).softmax(dim=-1) @ v


# ------------------------------------------------------------------------------------------- the softmax


@form("softmax-in-three-steps")
class SoftmaxInThreeSteps(Attention):
    """exp, sum and division, with the maximum taken off first. There is no softmax in the graph."""

    def attend(self, q, k, v):
        scores = q @ k.mT * HEAD_DIM**-0.5
        weights = (scores - scores.amax(dim=-1, keepdim=True)).exp()
        return (weights / weights.sum(dim=-1, keepdim=True)) @ v


@form("softmax-one")
class SoftmaxOne(Attention):
    """One more in the denominator, so that a head may attend to nothing."""

    def attend(self, q, k, v):
        scores = q @ k.mT * HEAD_DIM**-0.5
        peak = scores.amax(dim=-1, keepdim=True).clamp_min(0.0)
        weights = (scores - peak).exp()
        return (weights / (weights.sum(dim=-1, keepdim=True) + (-peak).exp())) @ v


@form("softmax-one-padded")
class SoftmaxOnePadded(Attention):
    """The same by way of a score of zero, whose weight is dropped: a sink that is a constant."""

    def attend(self, q, k, v):
        scores = F.pad(q @ k.mT * HEAD_DIM**-0.5, (0, 1))
        return scores.softmax(dim=-1)[..., :-1] @ v


@form("sinks")
class Sinks(Attention):
    """gpt-oss: one more score a head, which is learned."""

    kv_heads = 2

    def __init__(self) -> None:
        super().__init__()
        self.sinks = nn.Parameter(torch.randn(HEADS))

    def attend(self, q, k, v):
        k, v = (x.repeat_interleave(2, dim=1) for x in (k, v))
        scores = (q @ k.mT * HEAD_DIM**-0.5).masked_fill(
            torch.ones(SEQLEN, SEQLEN, dtype=torch.bool, device=q.device).triu(1), INF
        )
        sinks = self.sinks.reshape(1, -1, 1, 1).expand(BATCH, -1, SEQLEN, 1)
        return F.softmax(torch.cat([scores, sinks], dim=-1), dim=-1)[..., :-1] @ v


@form("soft-cap")
class SoftCap(Attention):
    """Gemma 2."""

    def attend(self, q, k, v):
        scores = torch.tanh(q @ k.mT * HEAD_DIM**-0.5 / 50.0) * 50.0
        return (
            scores.masked_fill(torch.ones(SEQLEN, SEQLEN, dtype=torch.bool, device=q.device).triu(1), INF).softmax(-1)
            @ v
        )


def lengths() -> Tensor:
    """True at what is to be seen; the second sequence is shorter."""
    return torch.arange(SEQLEN) < torch.tensor([[SEQLEN], [15]])


def lengths_one_empty() -> Tensor:
    return torch.arange(SEQLEN) < torch.tensor([[SEQLEN], [0]])


@form("nan-to-num", lengths_one_empty)
class NanToNum(Attention):
    """Queries that see nothing get zeros, by way of NaN."""

    def attend(self, q, k, v, keep):
        scores = (q @ k.mT * HEAD_DIM**-0.5).masked_fill(~keep[:, None, None], INF)
        return torch.nan_to_num(scores.softmax(dim=-1), nan=0.0) @ v


@form("masked-before-and-after", lengths_one_empty)
class MaskedBeforeAndAfter(Attention):
    """ESPnet: hidden keys get a low score and then a weight of zero, so that empty rows are zeros."""

    def attend(self, q, k, v, keep):
        hidden = keep[:, None, None].eq(0)
        scores = (q @ k.mT / math.sqrt(HEAD_DIM)).masked_fill(hidden, torch.finfo(q.dtype).min)
        return torch.softmax(scores, dim=-1).masked_fill(hidden, 0.0) @ v


@form("head-mask", lambda: torch.tensor([1.0, 0.0, 1.0, 0.5]))
class HeadMask(Attention):
    """The weights of each head times a number: [H]."""

    def attend(self, q, k, v, mask):
        return ((q @ k.mT * HEAD_DIM**-0.5).softmax(dim=-1) * mask[None, :, None, None]) @ v


@form("dropout", random=True)
class Dropout(Attention):
    """Of the weights, and always on: both modes of the zoo are without the model's dropout."""

    def attend(self, q, k, v):
        scores = (q @ k.mT * HEAD_DIM**-0.5).masked_fill(
            torch.ones(SEQLEN, SEQLEN, dtype=torch.bool, device=q.device).triu(1), INF
        )
        return F.dropout(scores.softmax(dim=-1), p=0.1, training=True) @ v


# ------------------------------------------------------------------------------------------- masks


def masked(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    return (q @ k.mT * HEAD_DIM**-0.5).masked_fill(~keep, INF).softmax(dim=-1) @ v


@form("sliding-window")
class SlidingWindow(Attention):
    def attend(self, q, k, v):
        i, j = positions(q)
        return masked(q, k, v, (j <= i) & (j > i - 8))


@form("prefix-lm")
class PrefixLM(Attention):
    """Everyone sees the first eight positions; the rest is causal."""

    def attend(self, q, k, v):
        i, j = positions(q)
        return masked(q, k, v, (j <= i) | (j < 8))


@form("chunks")
class Chunks(Attention):
    """Llama 4: causal within chunks of eight."""

    def attend(self, q, k, v):
        i, j = positions(q)
        return masked(q, k, v, (i // 8 == j // 8) & (j <= i))


@form("documents", lambda: torch.randint(0, 3, (BATCH, SEQLEN)).sort(dim=1).values)
class Documents(Attention):
    """Several documents in a row, told apart by their numbers: [B, S]."""

    def attend(self, q, k, v, document):
        same = document[:, None, :, None] == document[:, None, None, :]
        i, j = positions(q)
        bias = q.new_zeros(BATCH, 1, SEQLEN, SEQLEN).masked_fill(~(same & (j <= i)), torch.finfo(q.dtype).min)
        return (q @ k.mT * HEAD_DIM**-0.5 + bias).softmax(dim=-1) @ v


@form("image-then-text", lengths)
class ImageThenText(Attention):
    """PaliGemma: eight image tokens that see each other, causal text, and padding; added as a bias."""

    def attend(self, q, k, v, keep):
        i, j = positions(q)
        seen = ((j <= i) | ((i < 8) & (j < 8)))[None, None] & keep[:, None, None]
        bias = (1.0 - seen.to(q.dtype)) * torch.finfo(q.dtype).min
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


# ------------------------------------------------------------------------------------------- biases


@form("alibi")
class ALiBi(Attention):
    """A slope for each head, over a causal mask."""

    def attend(self, q, k, v):
        i, j = positions(q)
        slopes = 2.0 ** -(8.0 / HEADS * torch.arange(1, HEADS + 1, device=q.device, dtype=q.dtype))
        bias = slopes[:, None, None] * (j - i)
        scores = q @ k.mT / math.sqrt(HEAD_DIM) + bias
        return scores.masked_fill(j > i, INF).softmax(dim=-1) @ v


@form("t5-buckets")
class T5Buckets(Attention):
    """A learned bias for each bucket of distances, and no scale."""

    def __init__(self) -> None:
        super().__init__()
        self.relative_attention_bias = nn.Embedding(16, HEADS)

    def bucket(self, distance: Tensor) -> Tensor:
        sign = (distance > 0).long() * 8
        distance = distance.abs()
        far = 4 + (torch.log(distance.float() / 4) / math.log(32 / 4) * 4).long()
        return sign + torch.where(distance < 4, distance, far.clamp(max=7))

    def attend(self, q, k, v):
        i, j = positions(q)
        bias = self.relative_attention_bias(self.bucket(j - i)).permute(2, 0, 1).unsqueeze(0)
        scores = torch.matmul(q, k.transpose(3, 2))
        scores += bias
        return F.softmax(scores.float(), dim=-1).type_as(scores) @ v


@form("swin-shifted-windows")
class SwinShiftedWindows(nn.Module):
    """An 8x8 image in windows of 4x4, moved by two; a bias from a table, and a mask for windows that wrap around."""

    side, window, shift = 8, 4, 2

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)
        self.table = nn.Parameter(torch.randn((2 * self.window - 1) ** 2, HEADS))
        grid = torch.stack(torch.meshgrid(torch.arange(self.window), torch.arange(self.window), indexing="ij"))
        apart = grid.flatten(1)[:, :, None] - grid.flatten(1)[:, None, :] + self.window - 1
        self.register_buffer("index", apart[0] * (2 * self.window - 1) + apart[1])
        region = torch.zeros(1, self.side, self.side, 1)
        for row, rows in enumerate((slice(0, -4), slice(-4, -2), slice(-2, None))):
            for column, columns in enumerate((slice(0, -4), slice(-4, -2), slice(-2, None))):
                region[:, rows, columns] = 3 * row + column
        region = self.windows(region).squeeze(-1)
        self.register_buffer("mask", (region[:, None] != region[:, :, None]) * -100.0)

    def windows(self, x: Tensor) -> Tensor:
        """[B, side, side, C] -> [B * windows, window^2, C]"""
        b, h, w, c = x.shape
        x = x.view(b, h // self.window, self.window, w // self.window, self.window, c)
        return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, self.window**2, c)

    def image(self, x: Tensor) -> Tensor:
        """The way back."""
        count = self.side // self.window
        x = x.view(-1, count, count, self.window, self.window, WIDTH)
        return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, self.side, self.side, WIDTH)

    def forward(self, x):
        x = F.pad(x, (0, 0, 0, self.side**2 - SEQLEN)).view(BATCH, self.side, self.side, WIDTH)
        x = self.windows(torch.roll(x, (-self.shift, -self.shift), dims=(1, 2)))
        count, n, c = x.shape
        q, k, v = self.qkv(x).reshape(count, n, 3, HEADS, c // HEADS).permute(2, 0, 3, 1, 4).unbind(0)
        scores = q * (c // HEADS) ** -0.5 @ k.transpose(-2, -1)
        scores = scores + self.table[self.index.view(-1)].view(n, n, -1).permute(2, 0, 1).unsqueeze(0)
        scores = scores.view(BATCH, -1, HEADS, n, n) + self.mask[None, :, None]
        attended = scores.view(-1, HEADS, n, n).softmax(-1) @ v
        x = self.image(self.proj(attended.transpose(1, 2).reshape(count, n, c)))
        return torch.roll(x, (self.shift, self.shift), dims=(1, 2))


@form("relative-shift")
class RelativeShift(Attention):
    """Transformer-XL: a second product, with the encoded distances, shifted into place by a pad and a view."""

    def __init__(self) -> None:
        super().__init__()
        self.to_r = nn.Linear(WIDTH, HEADS * HEAD_DIM, bias=False)
        self.u = nn.Parameter(torch.randn(HEADS, 1, HEAD_DIM))
        self.w = nn.Parameter(torch.randn(HEADS, 1, HEAD_DIM))
        self.register_buffer("distances", torch.randn(1, SEQLEN, WIDTH))

    def attend(self, q, k, v):
        content = (q + self.u) @ k.mT
        position = (q + self.w) @ split_heads(self.to_r(self.distances)).mT
        position = F.pad(position, (1, 0)).view(BATCH, HEADS, SEQLEN + 1, SEQLEN)[:, :, 1:].reshape_as(content)
        return ((content + position) / math.sqrt(HEAD_DIM)).softmax(dim=-1) @ v


# ------------------------------------------------------------------------------------------- several axes at once


ROWS = 2  # of an alignment, or windows


@form("tied-rows")
class TiedRows(Attention):
    """MSA Transformer: the rows of an alignment share their weights, so a score is summed over rows too."""

    def attend(self, q, k, v):
        q, k, v = (x.unflatten(0, (-1, ROWS)) for x in (q, k, v))
        scores = torch.einsum("brhid,brhjd->bhij", q, k) * (ROWS * HEAD_DIM) ** -0.5
        return torch.einsum("bhij,brhjd->brhid", scores.softmax(dim=-1), v).flatten(0, 1)


@form("window-tokens")
class WindowTokens(Attention):
    """SepViT: the tokens of a window are the values of its one key."""

    def attend(self, q, k, v):
        q, k, v = (x.unflatten(2, (-1, ROWS)) for x in (q, k, v))
        weights = (q.mean(3) @ k.mean(3).mT * HEAD_DIM**-0.5).softmax(dim=-1)
        return torch.einsum("bhij,bhjwd->bhiwd", weights, v).flatten(2, 3)


@form("points", attentions=2)
class Points(Attention):
    """Invariant point attention (AlphaFold 2): weights of values and of points of three numbers."""

    def attend(self, q, k, v):
        weights = (q @ k.mT * HEAD_DIM**-0.5).softmax(dim=-1)
        points = torch.einsum("bhij,bhjpc->bhipc", weights, v[..., :12].unflatten(-1, (4, 3)))
        return weights @ v + F.pad(points.flatten(-2), (0, HEAD_DIM - 12))


@form("text-and-row")
class TextAndRow(Attention):
    """DALL-E's axial attention: a row of the image sees itself and the text, with a product for each of the two."""

    def attend(self, q, k, v):
        text_k, text_v = (x[:, :, :8] for x in (k, v))
        q, k, v = (x[:, :, 8:].unflatten(2, (-1, 8)) for x in (q, k, v))
        text = torch.einsum("bhxid,bhjd->bhxij", q, text_k)
        row = torch.einsum("bhxid,bhxjd->bhxij", q, k)
        weights = (torch.cat((text, row), dim=-1) * HEAD_DIM**-0.5).softmax(dim=-1)
        out = torch.einsum("bhxij,bhjd->bhxid", weights[..., :8], text_v)
        out = out + torch.einsum("bhxij,bhxjd->bhxid", weights[..., 8:], v)
        return torch.cat((text_v, out.flatten(2, 3)), dim=2)


# ------------------------------------------------------------------------------------------- caches


@form("cache-decode", lambda: torch.arange(9, 10), trains=False)
class CacheDecode(Attention):
    """One more token, written into the cache at its position: [1]; what lies after it is hidden."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("keys", torch.randn(BATCH, HEADS, 32, HEAD_DIM))
        self.register_buffer("values", torch.randn(BATCH, HEADS, 32, HEAD_DIM))

    def forward(self, x, position):
        x = x[:, :1]
        k = self.keys.index_copy_(2, position, split_heads(self.to_k(x)))
        v = self.values.index_copy_(2, position, split_heads(self.to_v(x)))
        keep = torch.arange(32, device=x.device) <= position[:, None]
        scores = (split_heads(self.to_q(x)) @ k.mT * HEAD_DIM**-0.5).masked_fill(~keep, INF)
        return self.out(merge_heads(scores.softmax(dim=-1) @ v))


# ------------------------------------------------------------------------------------------- to be left alone


@form("talking-heads", fused=0)
class TalkingHeads(Attention):
    """Scores of different heads are mixed before the softmax, and weights after it."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(HEADS, HEADS), nn.Linear(HEADS, HEADS)

    def attend(self, q, k, v):
        scores = self.before((q @ k.mT * HEAD_DIM**-0.5).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        weights = self.after(scores.softmax(dim=-1).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return weights @ v


@form("weights-returned", fused=0, reason=Reason.WEIGHTS_USED)
class WeightsReturned(Attention):
    def forward(self, x):
        q, k, v = (split_heads(f(x)) for f in (self.to_q, self.to_k, self.to_v))
        weights = (q @ k.mT * HEAD_DIM**-0.5).softmax(dim=-1)
        return self.out(merge_heads(weights @ v)), weights


@form("linear-attention", attentions=0)
class LinearAttention(Attention):
    """A softmax of the queries and one of the keys, and none of their product."""

    def attend(self, q, k, v):
        return q.softmax(dim=-1) @ (k.softmax(dim=-2).mT @ v)

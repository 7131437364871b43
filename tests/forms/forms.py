"""Attention as people write it: one function per spelling, for any device and dtype.

q, k and v come as [B, H, S, D] unless the entry says otherwise; sizes are small and odd where the form allows.
"""

import dataclasses
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fa3_inductor import Reason

INF = float("-inf")


@dataclasses.dataclass(frozen=True)
class Form:
    """``mask`` is what has to be proved of a form that has to be fused; ``reason`` why another has to be left alone.

    ``grads``: whether it is fused in 16-bit training too; ``float16``: whether in that dtype.
    """

    name: str
    fn: Callable
    args: Callable[[], list]
    mask: str | None = None
    reason: Reason | None = None
    grads: bool = True
    float16: bool = True


FORMS: list[Form] = []

# Small for the CPU; tests/hopper sets head_dim and lengths that the kernels have.
B, H, S, D = 2, 4, 23, 16


def qkv(kv_heads: int = H, seqlen_q: int | None = None) -> list[Tensor]:
    return [torch.randn(B, H, seqlen_q or S, D), *(torch.randn(B, kv_heads, S, D) for _ in range(2))]


def form(mask: str | None = None, reason: Reason | None = None, args: Callable = qkv, **where: bool) -> Callable:
    def register(fn: Callable) -> Callable:
        FORMS.append(Form(fn.__name__, fn, args, mask, reason, **where))
        return fn

    return register


def wide(q: Tensor) -> torch.dtype:
    return torch.promote_types(q.dtype, torch.float32)


# ------------------------------------------------------------------------------------------- scale and product


@form("full")
def div_scale(q, k, v):
    return torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(q.size(-1)), dim=-1) @ v


@form("full")
def mul_scale(q, k, v):
    return F.softmax(torch.matmul(q, k.transpose(2, 3)) * q.size(-1) ** -0.5, dim=-1).matmul(v)


@form("causal")
def operators_by_their_other_names(q, k, v):
    scores = torch.divide(torch.linalg.matmul(q, k.mT), q.size(-1) ** 0.5)
    positions = torch.arange(k.size(-2), device=q.device)
    hidden = torch.greater(torch.subtract(positions, positions[: q.size(-2), None]), 0)
    return torch.linalg.matmul(torch.special.softmax(scores.masked_fill(hidden, INF), -1), v)


@form("causal")
def mask_by_its_other_names(q, k, v):
    positions = torch.arange(k.size(-2), device=q.device)
    visible = torch.less_equal(positions, torch.negative(torch.negative(positions[: q.size(-2), None])))
    offset = torch.multiply(torch.subtract(1.0, visible.to(q.dtype)), -3e4)
    scores = torch.true_divide(torch.concatenate([q, q], -1) @ torch.concat([k, k], -1).mT, 8.0)
    return F.softmax(torch.add(scores, offset), -1) @ v


@form("full", args=lambda: [*qkv(), torch.tensor(0.3)], grads=False, float16=False)
def tensor_scale(q, k, v, scale):
    return torch.softmax(q @ k.mT * scale, -1) @ v


@form("causal", args=lambda: [*qkv(), torch.rand(H, 1, 1) + 0.5], grads=False, float16=False)
def temperature_of_each_head(q, k, v, temperature):
    hidden = torch.ones(q.size(-2), k.size(-2), device=q.device).tril() == 0
    cosines = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT
    return torch.softmax((cosines / temperature * 4.0).masked_fill(hidden, INF), -1) @ v


@form("full", args=lambda: [*qkv(), torch.rand(S, 1) + 0.5], grads=False, float16=False)
def temperature_of_each_query(q, k, v, temperature):
    return torch.softmax(torch.einsum("bhqd,bhkd->bhqk", q, k) / 4 * temperature, -1) @ v


@form("full")
def q_scaled_before(q, k, v):
    return F.softmax((q * 0.25) @ k.mT, -1) @ v


@form("full")
def q_divided_before(q, k, v):
    return F.softmax((q / 4.0) @ k.mT, -1) @ v


@form("full")
def both_scaled_before(q, k, v):
    return F.softmax((q * 16**-0.25) @ (k * 16**-0.25).mT, -1) @ v


@form("full")
def no_scale(q, k, v):
    return torch.softmax(q @ k.mT, -1) @ v


@form("full")
def scale_from_a_constant_tensor(q, k, v):
    s = q @ k.mT
    return (s / torch.full([], q.size(-1) ** 0.5, dtype=s.dtype, device=s.device)).softmax(-1) @ v


@form("full")
def wide_softmax(q, k, v):
    return F.softmax(q @ k.mT * 0.25, dim=-1, dtype=wide(q)).to(q.dtype) @ v


@form("full")
def cast_around_softmax(q, k, v):
    return F.softmax((q @ k.mT * 0.25).to(wide(q)), dim=-1).type_as(q) @ v


@form("full")
def wide_scores(q, k, v):
    s = q.to(wide(q)) @ k.to(wide(q)).mT
    return (F.softmax(s * 0.25, -1).to(v.dtype) @ v).to(q.dtype)


@form("full")
def einsum_heads_first(q, k, v):
    p = torch.einsum("bhid,bhjd->bhij", q, k).mul(0.25).softmax(dim=-1)
    return torch.einsum("bhij,bhjd->bhid", p, v)


def bshd() -> list[Tensor]:
    return [torch.randn(B, S, H, D) for _ in range(3)]


@form("full", args=bshd)
def einsum_sequence_first(q, k, v):
    p = torch.einsum("bqhd,bkhd->bhqk", q, k).mul(0.25).softmax(dim=-1)
    return torch.einsum("bhqk,bkhd->bqhd", p, v)


@form("full", args=bshd)
def einsum_ellipsis(q, k, v):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return torch.einsum("...qk,...kd->...qd", torch.einsum("...qd,...kd->...qk", q, k).softmax(-1), v)


@form("full")
def bmm(q, k, v):
    q, k, v = (x.reshape(-1, x.shape[2], x.shape[3]) for x in (q, k, v))
    out = torch.bmm(torch.softmax(torch.bmm(q, k.transpose(1, 2)) * 0.25, -1), v)
    return out.view(B, H, -1, out.shape[-1]).transpose(1, 2).reshape(B, -1, H * out.shape[-1])


@form("bias", args=lambda: [*qkv(), torch.randn(B, 1, 1, S)])
def baddbmm(q, k, v, bias):
    flat = [x.reshape(B * H, x.shape[2], x.shape[3]) for x in (q, k, v)]
    bias = bias.expand(B, H, q.shape[2], k.shape[2]).reshape(B * H, q.shape[2], k.shape[2])
    p = torch.baddbmm(bias, flat[0], flat[1].transpose(1, 2), beta=1.0, alpha=0.25).softmax(-1)
    return torch.bmm(p, flat[2])


@form("full")
def baddbmm_of_nothing(q, k, v):
    flat = [x.reshape(B * H, x.shape[2], x.shape[3]) for x in (q, k, v)]
    empty = torch.empty(B * H, q.shape[2], k.shape[2], dtype=q.dtype, device=q.device)
    p = torch.baddbmm(empty, flat[0], flat[1].transpose(1, 2), beta=0, alpha=0.25).softmax(-1)
    return torch.bmm(p, flat[2])


@form("full", args=lambda: [torch.randn(S, D) for _ in range(3)])
def one_head(q, k, v):
    return torch.softmax(q @ k.T / 4, -1) @ v


@form("full", args=lambda: [torch.randn(B, S, D) for _ in range(3)])
def one_head_batched(q, k, v):
    return torch.softmax(q @ k.transpose(1, 2) / 4, -1) @ v


@form("full", args=lambda: [torch.randn(2, 3, 2, 5, D) for _ in range(3)])
def five_dimensions(q, k, v):
    return torch.softmax(q @ k.mT / 4, -1) @ v


@form("full", args=lambda: [torch.randn(B, S, 3 * H * D)])
def packed_qkv(x):
    q, k, v = x.view(x.shape[0], x.shape[1], 3, H, -1).permute(2, 0, 3, 1, 4).unbind(0)
    return (torch.softmax(q @ k.mT * 0.25, -1) @ v).transpose(1, 2).reshape(x.shape[0], x.shape[1], -1)


@form("full", args=lambda: [torch.randn(B, S, 3 * H * D)])
def chunked_qkv(x):
    q, k, v = (t.unflatten(-1, (H, -1)).transpose(1, 2) for t in x.chunk(3, dim=-1))
    out = torch.softmax(q @ k.transpose(-1, -2) * 0.25, -1) @ v
    return out.transpose(1, 2).flatten(2)


@form("full", args=lambda: [*qkv(seqlen_q=5)])
def cross(q, k, v):
    return torch.softmax(q @ k.mT / 4, -1) @ v


@form("full", args=lambda: [*qkv(seqlen_q=1)])
def decode(q, k, v):
    return torch.softmax(q @ k.mT / 4, -1) @ v


# ------------------------------------------------------------------------------------------- grouped queries

gqa = lambda: qkv(kv_heads=2)  # noqa: E731


@form("full", args=gqa)
def gqa_expand(q, k, v):
    def repeat_kv(x):
        b, h, s, d = x.shape
        return x[:, :, None].expand(b, h, 2, s, d).reshape(b, h * 2, s, d)

    return torch.softmax(q @ repeat_kv(k).transpose(2, 3) * 0.25, -1, dtype=wide(q)).to(q.dtype) @ repeat_kv(v)


@form("full", args=gqa)
def gqa_repeat_interleave(q, k, v):
    return torch.softmax(q @ k.repeat_interleave(2, 1).mT * 0.25, -1) @ v.repeat_interleave(2, dim=1)


@form("full", args=gqa)
def gqa_five_dimensions(q, k, v):
    q = q.unflatten(1, (2, 2))
    return (torch.softmax(q @ k[:, :, None].mT * 0.25, -1) @ v[:, :, None]).flatten(1, 2)


@form("full", args=gqa)
def gqa_einsum(q, k, v):
    q = q.unflatten(1, (2, 2))
    p = torch.einsum("bkgqd,bksd->bkgqs", q, k).mul(0.25).softmax(-1)
    return torch.einsum("bkgqs,bksd->bkgqd", p, v).flatten(1, 2)


@form("full", args=lambda: qkv(kv_heads=1))
def mqa_broadcast(q, k, v):
    return torch.softmax(q @ k.mT * 0.25, -1) @ v


@form("full", args=gqa)
def gqa_tiled(q, k, v):
    # Heads in the order 0 1 0 1: not the grouping that kernels have, so k and v are taken as they are repeated.
    return torch.softmax(q @ k.repeat(1, 2, 1, 1).mT * 0.25, -1) @ v.repeat(1, 2, 1, 1)


# ------------------------------------------------------------------------------------------- causal


def hide(q, k, hidden, value=INF):
    return (q @ k.mT * 0.25).masked_fill(hidden, value)


@form("causal")
def causal_tril_equals_zero(q, k, v):
    n = q.shape[-2]
    return torch.softmax(hide(q, k, torch.tril(torch.ones(n, n, device=q.device)) == 0), -1) @ v


@form("causal")
def causal_triu_added(q, k, v):
    n = q.shape[-2]
    return (
        torch.softmax(
            q @ k.mT * 0.25 + torch.triu(torch.full((n, n), INF, device=q.device, dtype=q.dtype), diagonal=1), -1
        )
        @ v
    )


@form("causal")
def causal_arange_where_min(q, k, v):
    i = torch.arange(q.shape[-2], device=q.device)
    s = q @ k.mT * 0.25
    return torch.softmax(torch.where(i[:, None] >= i[None, :], s, torch.finfo(s.dtype).min), -1) @ v


@form("causal", args=bshd)
def causal_in_place(q, k, v):
    s = torch.einsum("bqhd,bkhd->bhqk", q, k)
    s /= 4.0
    s.masked_fill_(torch.ones(s.shape[-2:], dtype=torch.bool, device=q.device).triu_(1), -6e4)
    return torch.einsum("bhqk,bkhd->bqhd", s.softmax(-1, dtype=wide(q)).to(q.dtype), v)


@form("causal")
def causal_logical_not(q, k, v):
    n = q.shape[-2]
    keep = torch.ones(1, 1, n, n, dtype=torch.bool, device=q.device).tril()
    return torch.softmax(hide(q, k, ~keep, torch.finfo(q.dtype).min), -1) @ v


@form("causal")
def causal_one_minus_mask_times_min(q, k, v):
    n = q.shape[-2]
    keep = torch.tril(torch.ones(n, n, device=q.device, dtype=q.dtype))
    return torch.softmax(q @ k.mT * 0.25 + (1.0 - keep) * torch.finfo(q.dtype).min, -1) @ v


@form("causal (bottom-right)", args=lambda: qkv(seqlen_q=7))
def causal_bottom_right(q, k, v):
    n, m = q.shape[-2], k.shape[-2]
    hidden = torch.ones(n, m, dtype=torch.bool, device=q.device).triu(m - n + 1)
    return torch.softmax(hide(q, k, hidden), -1) @ v


@form("causal", args=lambda: qkv(seqlen_q=7))
def causal_top_left_of_a_longer_key(q, k, v):
    i, j = torch.arange(q.shape[-2], device=q.device), torch.arange(k.shape[-2], device=q.device)
    return torch.softmax(hide(q, k, j[None] > i[:, None]), -1) @ v


@form("causal (shifted by 3)")
def causal_shifted(q, k, v):
    i = torch.arange(q.shape[-2], device=q.device)
    return torch.softmax(hide(q, k, i[None] > i[:, None] + 3), -1) @ v


@form("sliding window (left 4, right 0)")
def sliding_window(q, k, v):
    i = torch.arange(q.shape[-2], device=q.device)
    return torch.softmax(hide(q, k, (i[None] > i[:, None]) | (i[:, None] - i[None] >= 5)), -1) @ v


@form("full")
def mask_of_nothing(q, k, v):
    n = q.shape[-2]
    return torch.softmax(hide(q, k, torch.zeros(n, n, dtype=torch.bool, device=q.device)), -1) @ v


@form("causal")
def index_built_mask(q, k, v):
    n = q.shape[-2]
    i = torch.arange(n, device=q.device)
    positions = torch.arange(n, device=q.device).unsqueeze(0)
    hidden = positions[:, i[None, :]] > positions[:, i[:, None]]
    return torch.softmax(hide(q, k, hidden), -1) @ v


@form("mask[k, q]")
def causal_but_for_one_entry(q, k, v):
    n = q.shape[-2]
    hidden = torch.ones(n, n, dtype=torch.bool, device=q.device).triu(1)
    hidden[2, 7] = False
    return torch.softmax(hide(q, k, hidden), -1) @ v


@form("mask[k, q]", args=lambda: [*qkv(), torch.ones(S, S, dtype=torch.bool).triu(1)])
def causal_only_by_its_values(q, k, v, hidden):
    return torch.softmax(hide(q, k, hidden), -1) @ v


@form("causal")
def causal_assigned_where_a_mask_is(q, k, v):
    s = q @ k.mT * 0.25
    s[:, :, torch.ones(s.shape[-2:], dtype=torch.bool, device=q.device).triu(1)] = INF
    return torch.softmax(s, -1) @ v


@form("causal")
def causal_assigned_where_an_expanded_mask_is(q, k, v):
    s = q @ k.mT * 0.25
    s[torch.ones(s.shape[-2:], dtype=torch.bool, device=q.device).triu(1).expand_as(s)] = torch.finfo(s.dtype).min
    return torch.softmax(s, -1) @ v


@form("causal")
def causal_by_softmin(q, k, v):
    return F.softmin(-hide(q, k, torch.ones(S, S, dtype=torch.bool, device=q.device).triu(1)), -1) @ v


# ------------------------------------------------------------------------------------------- padding and bias

lengths = lambda: [*qkv(), torch.arange(S)[None] < torch.tensor([[S], [5]])]  # noqa: E731
one_empty = lambda: [*qkv(), torch.arange(S)[None] < torch.tensor([[S], [0]])]  # noqa: E731


@form("key padding[b, k]", args=lengths)
def padding_filled(q, k, v, keep):
    return torch.softmax(hide(q, k, ~keep[:, None, None]), -1) @ v


@form("key padding[b, k]", args=one_empty)
def padding_filled_nothing_left(q, k, v, keep):
    return torch.softmax(hide(q, k, ~keep[:, None, None]), -1) @ v


@form("key padding[b, k]", args=one_empty)
def padding_filled_finite_nothing_left(q, k, v, keep):
    return torch.softmax(hide(q, k, ~keep[:, None, None], torch.finfo(q.dtype).min), -1) @ v


@form("key padding[b, k]", args=one_empty)
def padding_added_minimum_nothing_left(q, k, v, keep):
    mask = torch.where(keep[:, None, None], 0.0, torch.finfo(torch.float32).min)
    return torch.softmax((q @ k.mT * 0.25).to(wide(q)) + mask, -1).to(q.dtype) @ v


@form("key padding[b, k]", args=one_empty)
def padding_added_infinity_nothing_left(q, k, v, keep):
    return torch.softmax((q @ k.mT * 0.25).to(wide(q)) + torch.where(keep[:, None, None], 0.0, INF), -1).to(q.dtype) @ v


@form("key padding[b, k]", args=one_empty)
def padding_added_bert_nothing_left(q, k, v, keep):
    mask = (1.0 - keep[:, None, None].to(wide(q))) * -10000.0
    return torch.softmax((q @ k.mT * 0.25).to(wide(q)) + mask, -1).to(q.dtype) @ v


@form("key padding[b, k]", args=one_empty)
def padding_assigned_nothing_left(q, k, v, keep):
    s = q @ k.mT * 0.25
    s[~keep[:, None, None].expand_as(s)] = INF
    return torch.softmax(s, -1) @ v


@form("key padding[k]", args=lambda: [*qkv(), torch.arange(S) < S - 5])
def padding_of_all_assigned(q, k, v, keep):
    s = q @ k.mT * 0.25
    s[..., ~keep] = INF
    return torch.softmax(s, -1) @ v


@form("causal & key padding[b, k]", args=lengths)
def causal_and_padding(q, k, v, keep):
    n = q.shape[-2]
    causal = torch.ones(n, n, dtype=torch.bool, device=q.device).tril()
    return torch.softmax(hide(q, k, ~(causal & keep[:, None, None])), -1) @ v


@form("causal & key padding[b, k]", args=one_empty, grads=False)
def causal_filled_then_padding_added(q, k, v, keep):
    # Two kinds of mask: rows that both empty hold a mixture, which only the user's own sum describes.
    n = q.shape[-2]
    low = torch.finfo(q.dtype).min
    s = hide(q, k, torch.ones(n, n, dtype=torch.bool, device=q.device).triu(1), low)
    return torch.softmax(s + torch.zeros_like(keep, dtype=q.dtype).masked_fill(~keep, low)[:, None, None], -1) @ v


@form("bias", args=lambda: [*qkv(), torch.randn(1, H, S, S)])
def bias_added(q, k, v, bias):
    return torch.softmax(q @ k.mT * 0.25 + bias, -1) @ v


@form("bias", args=lambda: [*qkv(), torch.randn(H, S, S)])
def bias_added_first(q, k, v, bias):
    return torch.softmax(bias + q @ k.mT * 0.25, -1) @ v


@form("bias", args=lambda: [*qkv(), torch.randn(H, S, S)])
def bias_scaled_with_the_scores(q, k, v, bias):
    return torch.softmax((q @ k.mT + bias) / 4, -1) @ v


@form("bias", args=lambda: [*qkv(), torch.randn(S)])
def bias_of_one_dimension(q, k, v, bias):
    return torch.softmax(q @ k.mT * 0.25 + bias, -1) @ v


@form("bias", args=lambda: [*qkv(), (torch.arange(S) >= torch.tensor([[S], [0]])).float()[:, None, None]], grads=False)
def bias_that_swallows_rows(q, k, v, bias):
    return torch.softmax(q @ k.mT * 0.25 + bias * torch.finfo(q.dtype).min, -1) @ v


@form("causal & bias", args=lambda: [*qkv(), torch.randn(1, H, S, S)])
def bias_and_causal(q, k, v, bias):
    n = q.shape[-2]
    causal = torch.triu(torch.full((n, n), INF, device=q.device, dtype=q.dtype), 1)
    return torch.softmax(q @ k.mT * 0.25 + (bias + causal), -1) @ v


@form("bias", args=lambda: [*qkv(), torch.where(torch.rand(B, 1, S, S) > 0.5, 0.0, INF)])
def bias_that_empties_rows(q, k, v, bias):
    bias = torch.cat([torch.full_like(bias[:, :, :2], INF), bias[:, :, 2:]], 2)
    return torch.softmax(q @ k.mT * 0.25 + bias, -1) @ v


@form("key padding[b, k]", args=lambda: [*qkv(), torch.arange(S)[None] < torch.tensor([[S], [5]])])
def bmm_with_a_four_dimensional_mask(q, k, v, keep):
    flat = [x.reshape(B * H, x.shape[2], x.shape[3]) for x in (q, k, v)]
    s = torch.bmm(flat[0], flat[1].transpose(1, 2)).view(B, H, q.shape[2], k.shape[2])
    s = s.masked_fill(~keep[:, None, None], INF).view(B * H, q.shape[2], k.shape[2])
    return torch.bmm(s.softmax(-1), flat[2]).view(B, H, q.shape[2], -1)


# ------------------------------------------------------------------------------------------- the call


@form("full")
def sdpa(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


@form("causal")
def sdpa_causal_scaled(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3)


@form("causal")
def sdpa_causal_mask(q, k, v):
    n = q.shape[-2]
    return F.scaled_dot_product_attention(q, k, v, torch.ones(n, n, dtype=torch.bool, device=q.device).tril())


@form("mask[b, k, q]", args=lambda: [*qkv(), torch.rand(B, 1, S, S) > 0.3])
def sdpa_bool_mask(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@form("bias", args=lambda: [*qkv(), torch.randn(B, H, S, S)])
def sdpa_float_mask(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.detach())


@form("key padding[b, k]", args=one_empty)
def sdpa_empty_rows(q, k, v, keep):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keep[:, None, None])


@form("causal", args=gqa)
def sdpa_grouped(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


@form("full", args=gqa)
def sdpa_repeated(q, k, v):
    return F.scaled_dot_product_attention(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))


@form("full", args=lambda: [torch.randn(B, S, D) for _ in range(3)])
def sdpa_three_dimensions(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


# ------------------------------------------------------------------------------------------- parts of the scores


def part_bias():
    return [*qkv(), torch.randn(H, S, S)]


@form("causal", args=lambda: [torch.randn(B, S, H, D), *(torch.randn(B, S, D) for _ in range(2))])
def heads_behind_queries_of_shared_keys(q, k, v):
    """Multi-query attention: without the mask, either axis could be the queries'."""
    scores = torch.einsum("bshd,btd->bsht", q, k) * 0.25
    scores = scores + q.new_full((S, S), INF).triu_(1).unsqueeze(1)
    return torch.einsum("bsht,btd->bshd", scores.softmax(-1), v)


@form(reason=Reason.EMPTY_ROWS, args=lambda: [*qkv(), torch.arange(S) < torch.tensor([[S], [0]])])
def zeros_for_nan_behind_masks_of_two_kinds(q, k, v, keep):
    scores = (q @ k.mT * 0.25).masked_fill(q.new_ones(S, S).tril() == 0, torch.finfo(q.dtype).min)
    return scores.masked_fill(~keep[:, None, None], INF).softmax(-1).nan_to_num(0.0) @ v


@form("full", args=lambda: [torch.randn(B, H, D), *(torch.randn(B, S, H, D) for _ in range(2))])
def one_query_without_an_axis(q, k, v):
    """A step of decoding."""
    return torch.einsum("bhk,bkhd->bhd", (torch.einsum("bhd,bkhd->bhk", q, k) * 0.25).softmax(-1), v)


@form("full", args=lambda: [torch.randn(B, 1, H, D), *(torch.randn(B, S, H, D) for _ in range(2))])
def one_query_in_front_of_heads(q, k, v):
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * 0.25
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)


# ------------------------------------------------------------------------------------------- behind the softmax


@form("causal")
def zeros_for_nan_by_where(q, k, v):
    """TransformerLens's."""
    weights = (q @ k.mT * 0.25).masked_fill(q.new_ones(S, S).tril() == 0, INF).softmax(-1)
    return torch.where(torch.isnan(weights), torch.zeros_like(weights), weights) @ v


def key_padding():
    return [*qkv(), torch.arange(S) < torch.tensor([[S], [S - 6]])]


@form("causal & key padding[b, k]", args=one_empty)
def zeros_for_nan_assigned(q, k, v, keep):
    hidden = ~(keep[:, None, None] & torch.ones(S, S, dtype=torch.bool, device=q.device).tril())
    weights = hide(q, k, hidden).softmax(-1).clone()
    weights[weights.isnan()] = 0
    return weights @ v


@form("key padding[b, k]", args=one_empty)
def zeros_assigned_where_weights_are_not_themselves(q, k, v, keep):
    weights = hide(q, k, ~keep[:, None, None]).softmax(-1).clone()
    weights[weights != weights] = 0
    return weights @ v


@form("key padding[b, k]", args=key_padding)
def weights_assigned_where_hidden(q, k, v, keep):
    weights = hide(q, k, ~keep[:, None, None], torch.finfo(q.dtype).min).softmax(-1).clone()
    weights[~keep[:, None, None].expand_as(weights)] = 0
    return weights @ v


@form("key padding[b, k]", args=key_padding)
def weights_times_the_mask(q, k, v, keep):
    keep = keep[:, None, None]
    return ((q @ k.mT * 0.25).masked_fill(~keep, INF).softmax(-1) * keep.to(q.dtype)) @ v


@form("key padding[b, k]", args=lambda: [*qkv(), torch.arange(S) < torch.tensor([[S], [0]])])
def weights_of_nothing_times_the_mask(q, k, v, keep):
    """NaN times zero is NaN."""
    keep = keep[:, None, None]
    return ((q @ k.mT * 0.25).masked_fill(~keep, INF).softmax(-1) * keep.to(q.dtype)) @ v


@form("key padding[b, k]", args=key_padding)
def weights_hidden_by_where(q, k, v, keep):
    """ESPnet's conformer."""
    hidden = ~keep[:, None, None]
    weights = (q @ k.mT * 0.25).masked_fill(hidden, torch.finfo(q.dtype).min).softmax(-1)
    return torch.where(hidden, 0.0, weights) @ v


@form("full", args=key_padding)
def weights_hidden_that_scores_are_not(q, k, v, keep):
    """Keys take weight from others, and have none."""
    return (q @ k.mT * 0.25).softmax(-1).masked_fill(~keep[:, None, None], 0.0) @ v


@form("full", args=key_padding)
def queries_without_a_result(q, k, v, keep):
    """OpenFlamingo's text in front of the first image."""
    return (q @ k.mT * 0.25).softmax(-1).masked_fill(~keep[:, None, :, None], 0.0) @ v


@form("full", args=lambda: [*qkv(), torch.tensor([1, 0, 3, 2])])
def head_mask(q, k, v, of_heads):
    return ((q @ k.mT * 0.25).softmax(-1) * of_heads.view(1, -1, 1, 1).to(q.dtype)) @ v


@form("full", args=lambda: [*qkv(), torch.rand(B, S) + 0.5])
def weights_over_a_number_of_each_query(q, k, v, of_queries):
    return ((q @ k.mT * 0.25).softmax(-1) / of_queries[:, None, :, None]) @ v


@form("full", args=lambda: [*qkv(), torch.rand(H, S)], float16=False)
def weights_times_a_number_of_each_key(q, k, v, of_keys):
    return (0.5 * (q @ k.mT * 0.25).softmax(-1) * of_keys[:, None]) @ v


@form(reason=Reason.WEIGHTS_OP, args=lambda: [*qkv(), torch.rand(S, S)])
def weights_times_a_number_of_each(q, k, v, of_both):
    return ((q @ k.mT * 0.25).softmax(-1) * of_both) @ v


@form(reason=Reason.WEIGHTS_OP)
def squared_weights(q, k, v):
    weights = (q @ k.mT * 0.25).softmax(-1)
    return (weights * weights) @ v


@form(reason=Reason.WEIGHTS_OP, args=key_padding)
def weights_hidden_beside_nan(q, k, v, keep):
    """Where a row is empty, its NaN is hidden from some keys."""
    weights = (q @ k.mT * 0.25 + torch.where(keep, 0.0, INF)[:, None, None]).softmax(-1)
    return weights.masked_fill(torch.arange(S, device=q.device) > 9, 0.0) @ v


@form("full")
def values_of_one_head(q, k, v):
    return (q @ k.mT * 0.25).softmax(-1) @ v[:, :1]


def image_tables():
    return [torch.randn(4, 4, D) / 8, torch.randn(5, 5, D) / 8]


@form("bias", args=lambda: [*(torch.randn(B, 20, D) for _ in range(3)), *image_tables()])
def positions_of_an_image(q, k, v, of_rows, of_columns):
    """Every query's own, of the row and of the column of a key (ViTDet, SAM)."""
    image = q.unflatten(1, (4, 5))
    rows, columns = torch.einsum("byxc,ykc->byxk", image, of_rows), torch.einsum("byxc,xkc->byxk", image, of_columns)
    scores = (q * 0.25 @ k.mT).view(-1, 4, 5, 4, 5) + rows[..., None] + columns[..., None, :]
    return scores.view(-1, 20, 20).softmax(-1) @ v


@form("bias", args=lambda: [*(torch.randn(B, 24, D) for _ in range(3)), torch.randn(B, 24, 2, 4)])
def bias_of_digits(q, k, v, bias):
    """What is the same for some bits of a position."""
    scores = (q @ k.mT * 0.25).view(-1, 24, 2, 3, 4) + bias[:, :, :, None, :]
    return scores.view(-1, 24, 24).softmax(-1) @ v


@form("bias", args=lambda: [*(torch.randn(B, 24, D) for _ in range(3)), torch.randint(0, 3, (3, 6))])
def bias_of_digits_of_both(q, k, v, bias):
    scores = (q @ k.mT * 0.25).view(-1, 2, 3, 4, 6, 4) + bias.to(q.dtype)[:, None, :, None]
    return scores.view(-1, 24, 24).softmax(-1) @ v


@form("bias", args=part_bias)
def bias_of_all_but_the_first(q, k, v, bias):
    """A relative position, which the class token has not (MViT)."""
    scores = q @ k.mT * 0.25
    scores[:, :, 1:, 1:] += bias[:, 1:, 1:]
    return torch.softmax(scores, -1) @ v


@form("bias", args=part_bias)
def bias_of_the_first_keys(q, k, v, bias):
    scores = q @ k.mT * 0.25
    scores[..., :5] += bias[..., :5]
    return torch.softmax(scores, -1) @ v


@form("bias", args=part_bias)
def bias_assigned_back(q, k, v, bias):
    scores = q @ k.mT * 0.25
    scores[:, :, 0:, 0:] = scores[:, :, 0:, 0:] + bias
    return torch.softmax(scores, -1) @ v


@form("bias", args=lambda: [*qkv(), torch.randn(H, S - 1, 2), torch.randn(H, S - 1, S // 2)])
def biases_of_rows_and_columns(q, k, v, of_rows, of_columns):
    """What every query adds to a row and to a column of an image of two rows, behind a class token (MViT)."""
    n = q.shape[2] // 2
    scores = q @ k.mT * 0.25
    inner = scores[:, :, 1:, 1:].view(*q.shape[:2], 2, n, 2, n)
    summed = inner + of_rows.view(-1, 2, n, 2, 1) + of_columns.view(-1, 2, n, 1, n)
    scores[:, :, 1:, 1:] = summed.view(*q.shape[:2], 2 * n, 2 * n)
    return torch.softmax(scores, -1) @ v


@form(reason=Reason.SCORE_OP, args=part_bias)
def part_that_is_moved(q, k, v, bias):
    scores = q @ k.mT * 0.25
    scores[..., 1:] = scores[..., :-1] + bias[..., 1:]
    return torch.softmax(scores, -1) @ v


@form(reason=Reason.SCORE_OP, args=part_bias)
def every_other_key(q, k, v, bias):
    scores = q @ k.mT * 0.25
    scores[..., ::2] += bias[..., ::2]
    return torch.softmax(scores, -1) @ v


@form(reason=Reason.SCORE_OP, args=part_bias)
def part_of_other_numbers(q, k, v, bias):
    scores = q @ k.mT * 0.25
    scores[..., 1:] = bias[..., 1:]
    return torch.softmax(scores, -1) @ v


# ------------------------------------------------------------------------------------------- to be left alone


@form(reason=Reason.SOFTMAX_DIM)
def softmax_over_queries(q, k, v):
    return torch.softmax(q @ k.mT * 0.25, -2) @ v


@form(reason=Reason.SOFTMAX_DIM)
def softmax_over_heads(q, k, v):
    return torch.softmax(q @ k.mT * 0.25, 1) @ v


@form(reason=Reason.WEIGHTS_USED)
def weights_returned(q, k, v):
    p = torch.softmax(q @ k.mT * 0.25, -1)
    return p @ v, p


@form(reason=Reason.SCORES_USED)
def scores_returned(q, k, v):
    s = q @ k.mT * 0.25
    return s.softmax(-1) @ v, s


@form(reason=Reason.SCORE_OP)
def hook_on_scores(q, k, v):
    s = q @ k.mT * 0.25
    if s.requires_grad:
        s.register_hook(lambda g: g * 2)
    return s.softmax(-1) @ v


class DoubledGradient(torch.autograd.Function):
    """The identity, with twice the gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g * 2


@form(reason=Reason.SCORE_OP)
def scores_with_a_gradient_of_their_own(q, k, v):
    return DoubledGradient.apply(q @ k.mT * 0.25).softmax(-1) @ v


@form("full")
def operands_with_a_gradient_of_their_own(q, k, v):
    q, k, v = DoubledGradient.apply(q), DoubledGradient.apply(k), DoubledGradient.apply(v)
    return torch.softmax(q @ k.mT * 0.25, -1) @ v


@form(reason=Reason.GRAD_MODE)
def scores_without_gradient(q, k, v):
    with torch.no_grad():
        s = q @ k.mT * 0.25
    return s.softmax(-1) @ v


@form(reason=Reason.SCORE_OP)
def detached_scores(q, k, v):
    return (q @ k.mT * 0.25).detach().softmax(-1) @ v


@form(
    "causal & key padding[b, k]",
    args=lambda: [torch.randn(S, B, H * D) for _ in "qkv"] + [torch.arange(S) >= torch.tensor([[S - 4], [S]])],
)
def heads_in_the_batch(q, k, v, padding):
    """PyTorch's own nn.MultiheadAttention, with the weights asked for."""
    q, k, v = (x.view(S, B * H, D).transpose(0, 1) for x in (q, k, v))
    padding = padding.view(B, 1, 1, S).expand(-1, H, -1, -1)
    hidden = torch.zeros(B, H, 1, S, dtype=q.dtype, device=q.device).masked_fill(padding, INF).reshape(B * H, 1, S)
    later = torch.ones(S, S, dtype=torch.bool, device=q.device).triu(1)
    mask = hidden + torch.zeros(S, S, dtype=q.dtype, device=q.device).masked_fill(later, INF)
    out = torch.bmm(torch.baddbmm(mask, q * 0.25, k.transpose(1, 2)).softmax(-1), v)
    return out.transpose(0, 1).reshape(S, B, H * D)


@form("bias", args=lambda: [*torch.randn(3, 2 * B, H, S, D).unbind(), torch.randn(H, S, S), torch.rand(2, S, S) > 0.3])
def shifted_windows(q, k, v, bias, together):
    """Swin: a bias for each head, and a mask for each window, of which the batch is made."""
    scores = q @ k.mT * 0.25 + bias[None]
    apart = torch.zeros(2, S, S, dtype=q.dtype, device=q.device).masked_fill(~together, -100.0)
    scores = scores.view(B, 2, H, S, S) + apart[None, :, None]
    return scores.view(2 * B, H, S, S).softmax(-1) @ v


@form("full")
def negative_scale(q, k, v):
    return (q @ k.mT / -4).softmax(-1) @ v


@form("bias")
def squared_distances(q, k, v):
    """|q - k|^2, multiplied out, as in attention by distance of features."""
    distances = q.square().sum(-1)[..., None] + k.square().sum(-1)[..., None, :] - 2 * (q @ k.mT)
    return (-distances * 0.25).softmax(-1) @ v


@form("bias")
def subtracted_scores(q, k, v):
    return torch.sub(k.sum(-1)[..., None, :], q @ k.mT, alpha=-0.25).softmax(-1) @ v


@form("full")
def number_less_scores(q, k, v):
    return (3.0 - q @ k.mT * 0.25).softmax(-1) @ v


# (The scores are infinite where they were hidden, and eager has NaN there.)
@form(reason=Reason.FILL_VALUE, args=lambda: [*qkv(), torch.rand(S, S) > 0.7])
def hidden_scores_subtracted(q, k, v, hidden):
    return (k.sum(-1)[..., None, :] - (q @ k.mT).masked_fill(hidden, float("-inf"))).softmax(-1) @ v


# SDPA has no soft cap: test_softcap.py has those that a kernel or the reference runs.
@form(reason=Reason.SCORE_OP)
def softcap(q, k, v):
    return (torch.tanh(q @ k.mT * 0.25 / 30) * 30).softmax(-1) @ v


@form(reason=Reason.SCORE_OP)
def capped_bias(q, k, v):
    return (torch.tanh((q @ k.mT * 0.25 + k.sum(-1)[:, :, None]) / 5) * 5).softmax(-1) @ v


@form(reason=Reason.SCORE_OP)
def capped_twice(q, k, v):
    return torch.tanh(torch.tanh(q @ k.mT * 0.25) * 2).softmax(-1) @ v


@form(reason=Reason.SCORE_OP)
def cap_of_a_shift(q, k, v):
    return (torch.tanh(q @ k.mT * 0.25 + 1) * 5).softmax(-1) @ v


@form(reason=Reason.TENSOR_SCALE, args=lambda: [*qkv(), torch.rand(S)])
def tensor_scale_along_the_keys(q, k, v, scale):
    return torch.softmax(q @ k.mT * scale, -1) @ v


@form(reason=Reason.FILL_VALUE, args=lengths)
def small_fill(q, k, v, keep):
    return torch.softmax(hide(q, k, ~keep[:, None, None], -10.0), -1) @ v


@form(reason=Reason.DTYPE)
def double_softmax(q, k, v):
    return torch.softmax((q.double() @ k.double().mT) * 0.25, -1) @ v.double()

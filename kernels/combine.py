"""Puts attention over parts of the keys together, as a Triton kernel.

A row of O over all keys is the sum of its parts, each times exp of its own largest score less the largest of all, over
the sum of exp(scores) (Flash-Decoding: Dao et al., 2023, https://crfm.stanford.edu/2023/10/12/flashdecoding.html).
"""

import triton
import triton.language as tl
from torch import Tensor

from fa3_inductor.kernels.schedule import MAX_PARTS

CHUNK = 16  # parts that are read at a time


@triton.jit(do_not_specialize=["sink_head", "sink_row", "heads", "seqlen", "parts", "head_dim_v"])
def combine_kernel(
    part_ptr, sums_ptr, out_ptr, lse_ptr, sinks_ptr, out_scale_ptr, out_batch, out_head, out_row, sink_head, sink_row,
    heads, seqlen, parts, head_dim_v,
    PARTS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One program for each row. There are at most PARTS parts, and COLUMNS is head_dim_v rounded up."""
    row = tl.program_id(0) % seqlen
    flat = tl.program_id(0) // seqlen
    batch, head = flat // heads, flat % heads
    first = flat.to(tl.int64) * parts
    part = tl.arange(0, PARTS)
    tops = tl.load(sums_ptr + (first + part) * 2 * seqlen + row, mask=part < parts, other=float("-inf"))
    sums = tl.load(sums_ptr + (first + part) * 2 * seqlen + seqlen + row, mask=part < parts, other=0.0)
    top = tl.max(tops, 0)
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + head * sink_head + row * sink_row).to(tl.float32)
        top = tl.maximum(top, sink)
    top = tl.where(top == float("-inf"), 0.0, top)  # -inf - -inf is NaN
    total = tl.sum(tl.exp(tops - top) * sums, 0)
    if sinks_ptr is not None:
        total += tl.exp(sink - top)
    column = tl.arange(0, COLUMNS)
    out = tl.zeros([COLUMNS], tl.float32)
    start = 0
    while start < parts:
        several = start + tl.arange(0, CHUNK)
        places = (first + several) * seqlen + row
        own = tl.load(sums_ptr + (first + several) * 2 * seqlen + row, mask=several < parts, other=float("-inf"))
        share = tl.exp(own - top)
        inside = (several < parts)[:, None] & (column < head_dim_v)[None, :]
        x = tl.load(part_ptr + places[:, None] * WIDTH + column[None, :], mask=inside, other=0.0)
        out += tl.sum(x * share[:, None], 0)
        start += CHUNK
    out = out / tl.where(total == 0.0, 1.0, total)
    if out_scale_ptr is not None:
        out *= tl.load(out_scale_ptr)
    to = out_ptr + batch.to(tl.int64) * out_batch + head.to(tl.int64) * out_head + row.to(tl.int64) * out_row + column
    tl.store(to, out.to(out_ptr.dtype.element_ty), mask=column < head_dim_v)
    tl.store(lse_ptr + flat.to(tl.int64) * seqlen + row, top + tl.log(total))


def combine_arguments(
    part: Tensor, sums: Tensor, out: Tensor, lse: Tensor, sinks: Tensor | None, out_scale: Tensor | None, group: int
) -> tuple[tuple[int, int, int], tuple]:
    """The grid and the arguments of the kernel.

    Args:
        part: float32, contiguous, [B, H, parts, S, Dv or more], and sums, [B, H, parts, 2, S]: of each part of the
            keys the sum of exp(score - top) * v, and top, the largest score, and the sum of exp(score - top): 0, -inf
            and 0 where it has no key that the row sees.
        out: [B, H, S, Dv], Dv contiguous, lse: [B, H, S] contiguous: their results.
        out_scale: float32, one number that out is multiplied by.
        sinks: [H], or [H * group] with group = S: a logit of each row that has no value. None: there is none.
    """
    batch, heads, parts, seqlen, width = part.shape
    head_dim_v = out.shape[3]
    return (batch * heads * seqlen, 1, 1), (
        part, sums, out, lse, sinks, out_scale, *out.stride()[:3], group, int(group > 1), heads, seqlen, parts,
        head_dim_v, MAX_PARTS, width, triton.next_power_of_2(head_dim_v), CHUNK,
    )  # fmt: skip

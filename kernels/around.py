"""What runs before and after the backward kernel, as Triton kernels: the rows' statistics, and dQ's rounding.

FlashAttention-3 has such passes too (Shah et al., 2024, arXiv:2407.08608, appendix B.1): else every block of the
backward kernel would have to read all of O, and dQ is a sum over blocks that is not there before the last of them.
"""

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 32  # rows of a program


@triton.jit
def statistics_kernel(
    out_ptr, dout_ptr, lse_ptr, dlse_ptr, scaled_ptr, delta_ptr, sums_ptr, counts_ptr, out_batch, out_head, out_row,
    out_unit, dout_batch, dout_head, dout_row, lse_batch, lse_head, lse_row, dlse_batch, dlse_head, dlse_row, lse_scale,
    heads, seqlen, padded, head_dim_v, sums_heads, sums_rows, head_dim, n_counts,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program for each block of ROWS rows, with those that only pad the sequence.

    Zeroes dQ's sums, and what the backward kernel counts with, too.
    """
    tl.store(counts_ptr + tl.program_id(0), 0, mask=tl.program_id(0) < n_counts)
    flat = tl.program_id(0) // (padded // ROWS)
    row = tl.program_id(0) % (padded // ROWS) * ROWS + tl.arange(0, ROWS)
    batch, head = (flat // heads).to(tl.int64), (flat % heads).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    there = row < seqlen
    inside = there[:, None] & (column < head_dim_v)[None, :]
    places = row.to(tl.int64)[:, None]
    out = tl.load(
        out_ptr + batch * out_batch + head * out_head + places * out_row + column[None, :] * out_unit,
        mask=inside,
        other=0,
    )
    dout = tl.load(
        dout_ptr + batch * dout_batch + head * dout_head + places * dout_row + column[None, :],
        mask=inside, other=0,
    )  # fmt: skip
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    lse = tl.load(lse_ptr + batch * lse_batch + head * lse_head + row.to(tl.int64) * lse_row, mask=there, other=0)
    if dlse_ptr is not None:
        dlse_at = dlse_ptr + batch * dlse_batch + head * dlse_head + row.to(tl.int64) * dlse_row
        dlse = tl.load(dlse_at, mask=there, other=0)
        delta -= tl.where(lse == float("-inf"), 0.0, dlse)
    # exp2(score - inf) = 0: rows that see no key, and those past the end.
    scaled = lse * lse_scale
    scaled = tl.where(there & (scaled != float("-inf")), scaled, float("inf"))
    at = flat.to(tl.int64) * padded + row
    tl.store(scaled_ptr + at, scaled)
    tl.store(delta_ptr + at, delta)
    if flat < sums_heads:
        zero = tl.zeros([ROWS, COLUMNS], tl.float32)
        to = sums_ptr + (flat.to(tl.int64) * sums_rows + row)[:, None] * head_dim + column[None, :]
        tl.store(to, zero, mask=(row < sums_rows)[:, None] & (column < head_dim)[None, :])


def statistics_arguments(
    out: Tensor, dout: Tensor, lse: Tensor, dlse: Tensor | None, scaled: Tensor, delta: Tensor, sums: Tensor,
    counts: Tensor, lse_scale: float,
) -> tuple[tuple[int, int, int], tuple]:  # fmt: skip
    """The grid and the arguments of the kernel.

    Args:
        out, dout: [B, Hq, Sq, Dv], dout's Dv contiguous; lse: [B, Hq, Sq] float32, natural logarithms; dlse: its
            gradient, if it has one.
        scaled, delta: float32, contiguous, [B, Hq, Sq padded to a multiple of BLOCK]: lse times lse_scale, +inf where a
            row sees nothing or is not there, and the sum of dO * O, less dlse where a row sees something.
        sums: float32, contiguous, [B * Hq at most, Sq or Sq padded, any width], and counts: int32, no more than there
            are programs: are set to 0.
    """
    batch, heads, seqlen, head_dim_v = out.shape
    padded = scaled.shape[2]
    sums_heads, sums_rows, head_dim = sums.shape
    columns = triton.next_power_of_2(max(head_dim, head_dim_v))
    return (batch * heads * (padded // BLOCK), 1, 1), (
        out, dout, lse, dlse, scaled, delta, sums, counts, *out.stride(), *dout.stride()[:3], *lse.stride(),
        *((0, 0, 0) if dlse is None else dlse.stride()), lse_scale, heads, seqlen, padded, head_dim_v, sums_heads,
        sums_rows, head_dim, counts.numel(), BLOCK, columns,
    )  # fmt: skip


@triton.jit
def finish_kernel(
    sums_ptr, dq_ptr, dq_batch, dq_head, dq_row, scale, heads, seqlen, sums_rows, blocks, head_dim,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program for each block of ROWS rows."""
    flat = tl.program_id(0) // blocks
    row = (tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    batch, head = (flat // heads).to(tl.int64), (flat % heads).to(tl.int64)
    column = tl.arange(0, COLUMNS)[None, :]
    inside = (row < seqlen) & (column < head_dim)
    x = tl.load(sums_ptr + (flat.to(tl.int64) * sums_rows + row) * WIDTH + column, mask=inside, other=0)
    to = dq_ptr + batch * dq_batch + head * dq_head + row * dq_row + column
    tl.store(to, (x * scale).to(dq_ptr.dtype.element_ty), mask=inside)


def finish_arguments(sums: Tensor, dq: Tensor, scale: float) -> tuple[tuple[int, int, int], tuple]:
    """The grid and the arguments of the kernel that makes dq of its sums.

    Args:
        sums: float32, contiguous, [B * Hq, Sq or more, D or more]; dq: [B, Hq, Sq, D], D contiguous.
    """
    batch, heads, seqlen, head_dim = dq.shape
    blocks, columns = triton.cdiv(seqlen, BLOCK), triton.next_power_of_2(head_dim)
    return (batch * heads * blocks, 1, 1), (
        sums, dq, *dq.stride()[:3], scale, heads, seqlen, sums.shape[1], blocks, head_dim, sums.shape[2], BLOCK,
        columns,
    )  # fmt: skip

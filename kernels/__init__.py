"""Attention kernels: the specification (`reference`) and the Hopper kernels. Needs no triton."""

import torch


def output_like(q: torch.Tensor, head_dim_v: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    """An uninitialised output of attention for queries `q`, and the one rule for how it lies in memory.

    Args:
        q: [B, H, S, D], any strides.
        head_dim_v: the last dimension of the result.
        dtype: of the result, if it is not q's.

    Returns:
        [B, H, S, head_dim_v] on q's device, dense. Heads lie inside sequence positions ([B, S, H, D] memory,
        what a transposed projection has) if they do in q, that is if q.stride(1) < q.stride(2); else it is contiguous.

    Real kernels and fake kernels both call this: Inductor asserts that the strides which the fake promised are the real
    ones. Only the order of two strides matters, so an operand that was copied in the same order changes nothing.
    """
    batch, heads, seqlen, _ = q.shape
    if q.stride(1) < q.stride(2):
        return q.new_empty((batch, seqlen, heads, head_dim_v), dtype=dtype).transpose(1, 2)
    return q.new_empty((batch, heads, seqlen, head_dim_v), dtype=dtype)

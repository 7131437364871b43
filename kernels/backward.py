"""Attention backward on Hopper (sm_90a), BF16 and FP16: tile tables, what the kernel takes, and its launch.

`backward_kernel.py` is the device code and `reference.py` the specification.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from fa3_inductor.kernels import launch, output_like
from fa3_inductor.kernels.backward_kernel import backward_kernel
from fa3_inductor.kernels.forward import addressable, multiprocessors, shared_layout
from fa3_inductor.kernels.forward_kernel import ROWS as ROWS_OF_A_CONSUMER
from fa3_inductor.kernels.statistics import statistics_arguments, statistics_kernel

ROWS = ROWS_OF_A_CONSUMER.value
_LOG2E = math.log2(math.e)


@dataclass(frozen=True)
class Tile:
    """How one configuration of the backward kernel cuts up the work."""

    block_m: int  # query rows per tile
    width: int  # columns of q, k, v and dO in shared memory
    split: bool = False  # consumers have the same 64 keys and half of the columns each, else 64 keys each
    stages: int = 2  # Q tiles in shared memory
    do_stages: int = 2

    @property
    def keys(self) -> int:
        return ROWS if self.split else 2 * ROWS


# (largest head_dim of q, k and v, tile): the first that is large enough.
TILES = (
    (64, Tile(128, 64)),
    (128, Tile(64, 128)),
    (256, Tile(64, 256, split=True)),
)


def tile_for(head_dim: int, head_dim_v: int) -> Tile:
    return next(tile for largest, tile in TILES if max(head_dim, head_dim_v) <= largest)


def attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, scale: float,
    window_left: int | None = None, window_right: int | None = None,
):  # fmt: skip
    q, k, v, dout = (addressable(x) for x in (q, k, v, dout))
    dq, dk, dv = (output_like(x, x.shape[3]) for x in (q, k, v))
    tile = tile_for(q.shape[3], v.shape[3])
    batch, q_heads, seqlen_q, head_dim = q.shape
    padded = -(-seqlen_q // 128) * 128
    lse2, delta = q.new_empty(2, batch, q_heads, padded, dtype=torch.float32)
    sums = q.new_empty(batch, q_heads, seqlen_q, tile.width if tile.split else head_dim, dtype=torch.float32)
    grid, args = statistics_arguments(out, dout, lse, lse2, delta, sums, 1 / scale)
    statistics_kernel[grid](*args)
    grid, args = launch_arguments(dout, q, k, v, lse2, delta, sums, dk, dv, scale, window_left, window_right, tile=tile)
    backward_kernel[grid](*args, num_warps=4)
    torch.mul(sums[..., :head_dim], scale, out=dq)
    return dq, dk, dv


def launch_arguments(
    dout, q, k, v, lse2, delta, sums, dk, dv, scale, window_left=None, window_right=None, *, tile=None, sms=None
):
    batch, q_heads, seqlen_q, head_dim = q.shape
    kv_heads, seqlen_k, head_dim_v = v.shape[1:]
    tile = tile or tile_for(head_dim, head_dim_v)
    has_left = window_left is not None and window_left < seqlen_q - 1
    has_right = window_right is not None and window_right < seqlen_k - 1
    left = max(window_left, -seqlen_k) if has_left else 0
    right = max(window_right, -seqlen_q) if has_right else 0
    n_tiles, heads = -(-seqlen_k // tile.keys), batch * kv_heads
    section = 1
    if has_right or has_left:
        section = max(1, min(heads, 2 * (sms or multiprocessors(q.device)) // n_tiles))
    kv_width = tile.width // 2 if tile.split else tile.width
    dq_columns = tile.width if tile.block_m == 128 else tile.width // 2
    dq_desc = None if tile.split else _descriptor(sums, ROWS, dq_columns)
    return (heads * n_tiles, 1, 1), (
        _descriptor(q, tile.block_m, tile.width), _descriptor(dout, tile.block_m, tile.width),
        _descriptor(k, ROWS, kv_width), _descriptor(v, ROWS, kv_width),
        _flat(lse2, tile.block_m), _flat(delta, tile.block_m), dq_desc, sums if tile.split else None,
        _descriptor(dk, ROWS, kv_width), _descriptor(dv, ROWS, kv_width),
        n_tiles, kv_heads, heads, section, q_heads // kv_heads, lse2.shape[2], seqlen_q, seqlen_k, left, right,
        scale * _LOG2E, scale, has_left, has_right, tile.split, tile.stages, tile.do_stages,
    )  # fmt: skip


def _descriptor(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    batch, heads, seqlen, head_dim = x.shape
    by_batch, by_head, by_row, _ = x.stride()
    strides = [
        by_batch if batch > 1 else head_dim, by_head if heads > 1 else head_dim, by_row if seqlen > 1 else head_dim, 1
    ]  # fmt: skip
    return TensorDescriptor(x, [batch, heads, seqlen, head_dim], strides, [1, 1, rows, columns], shared_layout(rows, columns, x.dtype))


def _flat(x: Tensor, size: int) -> TensorDescriptor:
    return TensorDescriptor(x, [x.numel()], [1], [size], gl.NVMMASharedLayout(0, 32, 1))

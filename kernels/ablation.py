"""The forward kernel of head_dim 128 without warp specialisation, to measure what that is worth: `bench ablation`.

FlashAttention-3's paper has this row in its table (Shah et al., 2024, arXiv:2407.08608, table 2). The products, the
softmax and their overlap are those of `forward_kernel.py`; but both warp groups run one program, which brings the
tiles in as well. No mask, and a whole number of tiles.
"""

import math

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from fa3_inductor.kernels.compat import tma_load, tma_store
from fa3_inductor.kernels.forward import descriptors
from fa3_inductor.kernels.forward_kernel import (
    K_EMPTY,
    V_EMPTY,
    _barriers,
    _pack,
    _rescale,
    _ring,
    _row_sums,
    _softmax,
    _sync,
    _tile,
    _unpack,
)

BLOCK = 128  # of queries, and of keys
STAGES = gl.constexpr(2)


@gluon.jit
def _bring(desc, batch, head, row, full, smem, slot):
    mbarrier.expect(full.index(slot), desc.block_type.nbytes)
    tma_load(desc, [batch, head, row, 0], full.index(slot), smem.index(slot))


@gluon.jit(do_not_specialize=["m_tiles", "q_heads", "group", "n_tiles"])
def unspecialised_kernel(q_desc, k_desc, v_desc, o_desc, m_tiles, q_heads, group, n_tiles, scale):
    BLOCK_M: gl.constexpr = q_desc.block_type.shape[2]
    BLOCK_N: gl.constexpr = k_desc.block_type.shape[2]
    D: gl.constexpr = q_desc.block_type.shape[3]
    dtype: gl.constexpr = q_desc.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, BLOCK_N, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    q_smem = _ring((q_desc,), 1)[0]
    k_smem = _ring((k_desc,), STAGES)[0]
    v_smem = _ring((v_desc,), STAGES)[0]
    q_full = _barriers(1)
    k_full = _barriers(STAGES)
    v_full = _barriers(STAGES)
    fence_async_shared()
    flat = gl.program_id(0) // m_tiles
    row0 = gl.program_id(0) % m_tiles * BLOCK_M
    batch = flat // q_heads
    head = flat % q_heads
    kv_head = head // group
    _bring(q_desc, batch, head, row0, q_full, q_smem, 0)
    for i in gl.static_range(STAGES):
        if i < n_tiles:
            _bring(k_desc, batch, kv_head, i * BLOCK_N, k_full, k_smem, i)
            _bring(v_desc, batch, kv_head, i * BLOCK_N, v_full, v_smem, i)
    q = _tile(q_smem, 0)
    zero = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, s_layout)
    o = gl.zeros([BLOCK_M, D], gl.float32, o_layout)
    mbarrier.wait(q_full.index(0), 0)
    mbarrier.wait(k_full.index(0), 0)
    s = warpgroup_mma(q, _tile(k_smem, 0).permute((1, 0)), zero, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, [s])
    m_i = gl.full([BLOCK_M], float("-inf"), gl.float32, gl.SliceLayout(1, s_layout))
    weights, m_i, alpha = _softmax(s, m_i, scale, None)
    l_i = _row_sums(weights)
    packed = _pack(weights, dtype)
    for i in range(1, n_tiles):
        last = (i - 1) % STAGES
        _sync(K_EMPTY, 256)  # all warps are through with the last tile's keys
        if i + 1 < n_tiles:
            _bring(k_desc, batch, kv_head, (i + 1) * BLOCK_N, k_full, k_smem, last)
        mbarrier.wait(k_full.index(i % STAGES), (i // STAGES) & 1)
        s = warpgroup_mma(q, _tile(k_smem, i % STAGES).permute((1, 0)), zero, use_acc=False, is_async=True)
        mbarrier.wait(v_full.index(last), ((i - 1) // STAGES) & 1)
        p = _unpack(packed, dtype, p_layout)
        o = warpgroup_mma(p, _tile(v_smem, last), o, is_async=True)
        s = warpgroup_mma_wait(1, [s])
        weights, m_i, alpha = _softmax(s, m_i, scale, None)
        l_i = _rescale(l_i, alpha) + _row_sums(weights)
        o, p = warpgroup_mma_wait(0, [o, p])
        _sync(V_EMPTY, 256)
        if i + 1 < n_tiles:
            _bring(v_desc, batch, kv_head, (i + 1) * BLOCK_N, v_full, v_smem, last)
        packed = _pack(weights, dtype)
        o = _rescale(o, alpha)
    last = (n_tiles - 1) % STAGES
    mbarrier.wait(v_full.index(last), ((n_tiles - 1) // STAGES) & 1)
    p = _unpack(packed, dtype, p_layout)
    o = warpgroup_mma(p, _tile(v_smem, last), o, is_async=True)
    total = gl.convert_layout(gl.sum(l_i, 1), gl.SliceLayout(1, s_layout), assert_trivial=True)
    o, p = warpgroup_mma_wait(0, [o, p])
    q.store(_rescale(o, 1 / total).to(dtype))
    fence_async_shared()
    tma_store(o_desc, [batch, head, row0, 0], q_smem.index(0))
    tma.store_wait(0)


def attention_unspecialised(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """softmax(scale * q @ k^T) @ v. q: [B, Hq, S, 128]; k, v: [B, Hkv, S, 128]; S a multiple of 128, all as TMA has it.

    Raises:
        ValueError: for other shapes.
    """
    if not (q.shape[3] == v.shape[3] == BLOCK and q.shape[2] % BLOCK == k.shape[2] % BLOCK == 0):
        raise ValueError(f"head_dim 128, and a multiple of 128 positions, not {list(q.shape)} and {list(v.shape)}")
    out = torch.empty_like(q)
    tiles = q.shape[2] // BLOCK
    first = (descriptors(x, BLOCK, (BLOCK,))[0] for x in (q, k, v, out))
    unspecialised_kernel[(q.shape[0] * q.shape[1] * tiles, 1, 1)](
        *first, tiles, q.shape[1], q.shape[1] // k.shape[1], k.shape[2] // BLOCK, scale * math.log2(math.e), num_warps=8
    )
    return out

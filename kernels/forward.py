"""Attention forward on Hopper (sm_90a), BF16 and FP16: softmax(scale * q @ k^T) @ v and the log-sum-exp of every row.

One producer warp brings Q, K and V in by TMA; two or three consumer warp groups own 64 query rows each. A consumer
issues Q @ K[j]^T and P[j-1] @ V[j-1] together and does the softmax of tile j while the second runs. Keys are walked
from the last tile to the first, so that the tiles which need a mask come first and the rest of the loop has none.
The algorithm is FlashAttention-3's (Shah et al., 2024, arXiv:2407.08608); the specification is `kernels/reference.py`.
"""

import functools
import math
from dataclasses import dataclass

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
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from fa3_inductor.kernels import output_like
from fa3_inductor.kernels.compat import tma_load, tma_store

ROWS = 64  # query rows of one consumer: the M of a wgmma


@dataclass(frozen=True)
class Tile:
    """How one kernel configuration cuts up the work."""

    block_n: int  # keys per tile
    consumers: int  # warp groups of ROWS query rows each
    stages: int  # K tiles, and V tiles, in shared memory
    consumer_regs: int  # per thread, by setmaxnreg; the pool is 64K registers per SM
    producer_regs: int
    ping_pong: bool  # consumers take turns to issue their matrix products
    persistent: bool  # one CTA per SM, which loops over tiles, rather than one CTA per tile


# By (head_dim, causal). Measured on an H200 with 16384 tokens of width 2048: at D 64, full, 4096, three consumers in
# turns give 494 TFLOP/s, without turns 461, and two consumers 433. At D 128, full, turns give 558 against 517 at 1024
# and 634 against 642 at 16384; with a causal mask they change nothing.
TILES = {
    (64, False): Tile(128, 3, 2, 160, 32, ping_pong=True, persistent=True),
    (64, True): Tile(128, 3, 2, 160, 32, ping_pong=True, persistent=True),
    (128, False): Tile(128, 2, 2, 240, 24, ping_pong=True, persistent=True),
    (128, True): Tile(128, 2, 2, 240, 24, ping_pong=False, persistent=True),
}
# Up to SHORT query rows the diagonal cuts off too much of a tile of 192: 311 against 266 TFLOP/s at 1024.
SHORT = 1024
SHORT_TILES = {(64, True): Tile(128, 2, 2, 240, 24, ping_pong=False, persistent=True)}


@gluon.jit
def _steps(tiles, paired):
    """How many tiles `_locate` has for this CTA."""
    unit = 1 + paired
    return unit * ((tiles // unit - 1 - gl.program_id(0)) // gl.num_programs(0) + 1)


@gluon.jit
def _locate(step, m_tiles, heads, section, paired, CAUSAL: gl.constexpr):
    """The row tile, and the head counted over all batches, of this CTA's tile number `step`.

    Without a mask: the row tiles of a head are neighbours in time, so that its keys and values stay in the L2 cache.
    Causal, the tiles of `section` heads belong together, and are in the order of their length. If `paired`, the longest
    and the shortest make a pair, then the next longest and the next shortest: every CTA's share is the same. If not,
    the longest go first: right for one tile per CTA, where the hardware hands out tiles as SMs come free.
    """
    number = step * gl.num_programs(0) + gl.program_id(0)
    if CAUSAL:
        if paired:
            number = step // 2 * gl.num_programs(0) + gl.program_id(0)
            pairs = section * m_tiles // 2
            first = number // pairs * section
            width = section
            place = number % pairs
            if step % 2 == 0:
                place = 2 * pairs - 1 - place
        else:
            first = number // (section * m_tiles) * section
            width = gl.minimum(section, heads - first)
            place = width * m_tiles - 1 - (number - first * m_tiles)
        m_tile = place // width
        head = first + place % width
    else:
        m_tile = number % m_tiles
        head = number // m_tiles
    return m_tile, head


@gluon.jit
def _kv_tiles(row0, seqlen_q, seqlen_k, shift, ROWS: gl.constexpr, BLOCK_N: gl.constexpr, CAUSAL: gl.constexpr):
    """How many KV tiles the rows row0 ... row0 + ROWS - 1 see; one, whatever it holds, if they see none."""
    keys = seqlen_k
    if CAUSAL:
        keys = gl.minimum(keys, gl.maximum(gl.minimum(row0 + ROWS, seqlen_q) + shift, 1))
    return (gl.where(row0 < seqlen_q, keys, 1) + BLOCK_N - 1) // BLOCK_N


@gluon.jit
def _load_kv(desc, batch, head, row, it, full, empty, smem, STAGES: gl.constexpr):
    """Brings one tile into slot it % STAGES of a ring, once its consumers have let go of it."""
    stage = it % STAGES
    mbarrier.wait(empty.index(stage), ((it // STAGES) & 1) ^ 1)
    mbarrier.expect(full.index(stage), desc.block_type.nbytes)
    tma_load(desc, [batch, head, row, 0], full.index(stage), smem.index(stage))


@gluon.jit
def _produce(args, BLOCK_N: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr):
    """The producer warp. Values lag keys by one tile, as their use does."""
    q_desc, k_desc, v_desc, q_smem, k_smem, v_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty = args[:12]
    tiles, m_tiles, heads, q_heads, group, section, paired, seqlen_q, seqlen_k, shift = args[12:]
    ROWS: gl.constexpr = q_desc.block_type.shape[2]
    TILE_M: gl.constexpr = CONSUMERS * ROWS
    it = 0
    for step in range(_steps(tiles, paired)):
        m_tile, flat = _locate(step, m_tiles, heads, section, paired, CAUSAL)
        batch = flat // q_heads
        head = flat % q_heads
        kv_head = head // group
        n_tiles = _kv_tiles(m_tile * TILE_M, seqlen_q, seqlen_k, shift, TILE_M, BLOCK_N, CAUSAL)
        last = (n_tiles - 1) * BLOCK_N
        _load_kv(k_desc, batch, kv_head, last, it, k_full, k_empty, k_smem, STAGES)
        for wg in gl.static_range(CONSUMERS):
            mbarrier.wait(q_empty.index(wg), (step & 1) ^ 1)
            mbarrier.expect(q_full.index(wg), q_desc.block_type.nbytes)
            tma_load(q_desc, [batch, head, (m_tile * CONSUMERS + wg) * ROWS, 0], q_full.index(wg), q_smem.index(wg))
        for j in range(1, n_tiles):
            row = last - j * BLOCK_N
            _load_kv(k_desc, batch, kv_head, row, it + j, k_full, k_empty, k_smem, STAGES)
            _load_kv(v_desc, batch, kv_head, row + BLOCK_N, it + j - 1, v_full, v_empty, v_smem, STAGES)
        it += n_tiles
        _load_kv(v_desc, batch, kv_head, 0, it - 1, v_full, v_empty, v_smem, STAGES)


@gluon.jit
def _skip(it, full, empty, STAGES: gl.constexpr):
    """Lets go of a tile of a ring unread. Not before it is full: the barrier would take that for the tile before it."""
    mbarrier.wait(full.index(it % STAGES), (it // STAGES) & 1)
    mbarrier.arrive(empty.index(it % STAGES), count=1)


@gluon.jit
def _row_sums(p):
    """[M, N] -> [M, 4]: sums over the columns a thread holds. A row's four threads are added up at the very end."""
    quads = p.reshape([p.shape[0], p.shape[1] // 8, 4, 2])
    return gl.sum(gl.sum(quads, 3), 1)


@gluon.jit
def _softmax(s, m_i, scale):
    """exp2 of the scaled scores less their running maximum, that maximum, and the factor for what was summed so far."""
    m_new = gl.maximum(m_i, gl.max(s, 1))
    # A row that has seen no key yet: exp2(-inf - 0) = 0 instead of exp2(-inf + inf) = NaN.
    m_scaled = gl.where(m_new == float("-inf"), 0.0, m_new) * scale
    return gl.exp2(s * scale - m_scaled[:, None]), m_new, gl.exp2(m_i * scale - m_scaled)


@gluon.jit
def _pack(x, dtype: gl.constexpr):
    """float32 [M, N] -> int32 [M, N // 2], two 16-bit numbers in each.

    Weights cross the loop's back edge in this form: LLVM takes 16-bit loop-carried values apart and repacks them.
    """
    low, high = gl.split(x.reshape([x.shape[0], x.shape[1] // 2, 2]))
    if dtype == gl.bfloat16:
        return gl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [low, high], gl.int32, True, 1)
    else:
        return gl.inline_asm_elementwise("cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [low, high], gl.int32, True, 1)


@gluon.jit
def _unpack(x, dtype: gl.constexpr, layout: gl.constexpr):
    """The inverse of `_pack`, as a matrix product's left operand."""
    low, high = gl.inline_asm_elementwise("mov.b32 {$0, $1}, $2;", "=h,=h,r", [x], (gl.int16, gl.int16), True, 1)
    p = gl.join(low, high).reshape([x.shape[0], x.shape[1] * 2]).to(dtype, bitcast=True)
    return gl.convert_layout(p, layout, assert_trivial=True)


@gluon.jit
def _kv_loop(
    o, packed, l_i, m_i, it, first, last, limit, scale, q, k_smem, v_smem, k_full, k_empty, v_full, v_empty, turn,
    WG: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr, PING_PONG: gl.constexpr, MASKED: gl.constexpr,
    s_layout: gl.constexpr, o_layout: gl.constexpr,
):  # fmt: skip
    """KV tiles last - 1 down to first. Enters and leaves with the last tile's weights not yet multiplied by V."""
    BLOCK_N: gl.constexpr = s_layout.instr_shape[1]
    D: gl.constexpr = o.shape[1]
    zero = gl.zeros([o.shape[0], BLOCK_N], gl.float32, s_layout)
    for i in range(first, last):
        stage = it % STAGES
        v_stage = (it - 1) % STAGES
        mbarrier.wait(k_full.index(stage), (it // STAGES) & 1)
        if PING_PONG:
            mbarrier.wait(turn.index(WG), it & 1)
        k = k_smem.index(stage).reshape([BLOCK_N, D])
        s = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)
        mbarrier.wait(v_full.index(v_stage), ((it - 1) // STAGES) & 1)
        p = _unpack(packed, q.dtype, gl.DotOperandLayout(0, o_layout, 2))
        o = warpgroup_mma(p, v_smem.index(v_stage).reshape([BLOCK_N, D]), o, is_async=True)
        if PING_PONG:
            mbarrier.arrive(turn.index((WG + 1) % CONSUMERS), count=1)
        s = warpgroup_mma_wait(1, [s])
        mbarrier.arrive(k_empty.index(stage), count=1)
        if MASKED:
            s = _mask(s, limit - (last - 1 - (i - first)) * BLOCK_N, s_layout)
        weights, m_i, alpha = _softmax(s, m_i, scale)
        l_i = _rescale(l_i, alpha) + _row_sums(weights)
        o, p = warpgroup_mma_wait(0, [o, p])
        mbarrier.arrive(v_empty.index(v_stage), count=1)
        packed = _pack(weights, q.dtype)
        o = _rescale(o, alpha)
        it += 1
    return o, packed, l_i, m_i, it


@gluon.jit
def _mask(s, limit, s_layout: gl.constexpr):
    """-inf in each row of s from column `limit` on.

    A thread holds columns 8j + 2c + e of a row, c being its own number among four: split up so, each comparison is of
    one register with a constant, and nothing has to be worked out per column.
    """
    quads = s.reshape([s.shape[0], s.shape[1] // 8, 4, 2])
    layout: gl.constexpr = quads.type.layout
    j = gl.arange(0, s.shape[1] // 8, gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, layout))))
    c = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, layout))))
    e = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, layout))))
    rows_layout: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, layout)))
    limit = gl.convert_layout(limit, rows_layout, assert_trivial=True)
    own = limit[:, None, None, None] - 2 * c[None, None, :, None]
    visible = 8 * j[None, :, None, None] + e[None, None, None, :] < own
    return gl.convert_layout(gl.where(visible, quads, float("-inf")).reshape(s.shape), s_layout, assert_trivial=True)


@gluon.jit
def _rescale(x, factor):
    """Multiplies each row of x by its factor."""
    layout: gl.constexpr = gl.SliceLayout(1, x.type.layout)
    return x * gl.convert_layout(factor, layout, assert_trivial=True)[:, None]


@gluon.jit
def _consume(
    args, WG: gl.constexpr, BLOCK_N: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
    PING_PONG: gl.constexpr,
):  # fmt: skip
    """Consumer warp group number WG: its ROWS rows of every tile."""
    o_desc, lse_ptr, q_smem, o_smem, k_smem, v_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty, turn = args[:13]
    tiles, m_tiles, heads, q_heads, section, paired, seqlen_q, seqlen_k, shift, scale = args[13:]
    ROWS: gl.constexpr = o_desc.block_type.shape[2]
    D: gl.constexpr = o_desc.block_type.shape[3]
    dtype: gl.constexpr = o_desc.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    rows_layout: gl.constexpr = gl.SliceLayout(1, s_layout)
    TILE_M: gl.constexpr = CONSUMERS * ROWS
    q = q_smem.index(WG).reshape([ROWS, D])
    zero = gl.zeros([ROWS, BLOCK_N], gl.float32, s_layout)
    it = 0
    for step in range(_steps(tiles, paired)):
        m_tile, flat = _locate(step, m_tiles, heads, section, paired, CAUSAL)
        row0 = m_tile * TILE_M + WG * ROWS
        rows = row0 + gl.arange(0, ROWS, rows_layout)
        limit = gl.full([ROWS], 0, gl.int32, rows_layout) + seqlen_k
        if CAUSAL:
            limit = gl.minimum(limit, rows + (shift + 1))

        # KV tiles that only the other consumers' rows see.
        n_tiles = _kv_tiles(row0, seqlen_q, seqlen_k, shift, ROWS, BLOCK_N, CAUSAL)
        for _ in range(n_tiles, _kv_tiles(m_tile * TILE_M, seqlen_q, seqlen_k, shift, TILE_M, BLOCK_N, CAUSAL)):
            if PING_PONG:
                mbarrier.wait(turn.index(WG), it & 1)
                mbarrier.arrive(turn.index((WG + 1) % CONSUMERS), count=1)
            _skip(it, k_full, k_empty, STAGES)
            _skip(it, v_full, v_empty, STAGES)
            it += 1

        # The last KV tile, alone: no weights to multiply by V yet. It is the only one that can reach past the end of K.
        stage = it % STAGES
        mbarrier.wait(q_full.index(WG), step & 1)
        mbarrier.wait(k_full.index(stage), (it // STAGES) & 1)
        if PING_PONG:
            mbarrier.wait(turn.index(WG), it & 1)
        k = k_smem.index(stage).reshape([BLOCK_N, D])
        s = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)
        if PING_PONG:
            mbarrier.arrive(turn.index((WG + 1) % CONSUMERS), count=1)
        s = warpgroup_mma_wait(0, [s])
        mbarrier.arrive(k_empty.index(stage), count=1)
        s = _mask(s, limit - (n_tiles - 1) * BLOCK_N, s_layout)
        m_i = gl.full([ROWS], float("-inf"), gl.float32, rows_layout)
        weights, m_i, alpha = _softmax(s, m_i, scale)
        l_i = _row_sums(weights)
        packed = _pack(weights, dtype)
        o = gl.zeros([ROWS, D], gl.float32, o_layout)
        it += 1

        unmasked = n_tiles - 1
        if CAUSAL:
            unmasked = gl.minimum(unmasked, gl.maximum(gl.minimum(row0 + shift + 1, seqlen_k), 0) // BLOCK_N)
            o, packed, l_i, m_i, it = _kv_loop(
                o, packed, l_i, m_i, it, unmasked, n_tiles - 1, limit, scale,
                q, k_smem, v_smem, k_full, k_empty, v_full, v_empty, turn,
                WG, CONSUMERS, STAGES, PING_PONG, True, s_layout, o_layout,
            )  # fmt: skip
        o, packed, l_i, m_i, it = _kv_loop(
            o, packed, l_i, m_i, it, 0, unmasked, limit, scale,
            q, k_smem, v_smem, k_full, k_empty, v_full, v_empty, turn,
            WG, CONSUMERS, STAGES, PING_PONG, False, s_layout, o_layout,
        )  # fmt: skip
        mbarrier.arrive(q_empty.index(WG), count=1)

        v_stage = (it - 1) % STAGES
        mbarrier.wait(v_full.index(v_stage), ((it - 1) // STAGES) & 1)
        p = _unpack(packed, dtype, gl.DotOperandLayout(0, o_layout, 2))
        o = warpgroup_mma(p, v_smem.index(v_stage).reshape([BLOCK_N, D]), o, is_async=True)
        total = gl.convert_layout(gl.sum(l_i, 1), rows_layout, assert_trivial=True)
        lse = (m_i * scale + gl.log2(total)) * 0.6931471805599453
        gl.store(lse_ptr + flat.to(gl.int64) * seqlen_q + rows, lse, mask=rows < seqlen_q)
        o, p = warpgroup_mma_wait(0, [o, p])
        mbarrier.arrive(v_empty.index(v_stage), count=1)
        o = _rescale(o, 1.0 / gl.where(total == 0.0, 1.0, total))
        tma.store_wait(0)
        out = o_smem.index(WG)
        out.reshape([ROWS, D]).store(o.to(dtype))
        fence_async_shared()
        tma_store(o_desc, [flat // q_heads, flat % q_heads, row0, 0], out)
    tma.store_wait(0)


@gluon.jit
def _ring(STAGES: gl.constexpr, READERS: gl.constexpr):
    """The full and the empty barriers of a ring of STAGES buffers."""
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=READERS)
    return full, empty


@gluon.jit(
    do_not_specialize=[
        "tiles",
        "m_tiles",
        "heads",
        "q_heads",
        "group",
        "section",
        "paired",
        "seqlen_q",
        "seqlen_k",
        "shift",
    ]
)
def _forward(
    q_desc, k_desc, v_desc, o_desc, lse_ptr,
    tiles, m_tiles, heads, q_heads, group, section, paired, seqlen_q, seqlen_k, shift, scale,
    CAUSAL: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr, PING_PONG: gl.constexpr,
    CONSUMER_REGS: gl.constexpr, PRODUCER_REGS: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = q_desc.dtype
    BLOCK_N: gl.constexpr = k_desc.block_type.shape[2]
    q_smem = gl.allocate_shared_memory(dtype, [CONSUMERS] + q_desc.block_type.shape, q_desc.layout)
    o_smem = gl.allocate_shared_memory(dtype, [CONSUMERS] + q_desc.block_type.shape, q_desc.layout)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES] + k_desc.block_type.shape, k_desc.layout)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES] + v_desc.block_type.shape, v_desc.layout)
    q_full, q_empty = _ring(CONSUMERS, 1)
    k_full, k_empty = _ring(STAGES, CONSUMERS)
    v_full, v_empty = _ring(STAGES, CONSUMERS)
    turn = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(CONSUMERS):
        mbarrier.init(turn.index(i), count=1)
    fence_async_shared()
    if PING_PONG:
        mbarrier.arrive(turn.index(0), count=1)

    produce = (
        q_desc, k_desc, v_desc, q_smem, k_smem, v_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty,
        tiles, m_tiles, heads, q_heads, group, section, paired, seqlen_q, seqlen_k, shift,
    )  # fmt: skip
    consume = (
        o_desc, lse_ptr, q_smem, o_smem, k_smem, v_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty, turn,
        tiles, m_tiles, heads, q_heads, section, paired, seqlen_q, seqlen_k, shift, scale,
    )  # fmt: skip
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (_consume, (consume, 0, BLOCK_N, CONSUMERS, STAGES, CAUSAL, PING_PONG)),
                (_consume, (consume, 1, BLOCK_N, CONSUMERS, STAGES, CAUSAL, PING_PONG)),
                (_produce, (produce, BLOCK_N, CONSUMERS, STAGES, CAUSAL)),
            ],
            [4, 1],
            [CONSUMER_REGS, PRODUCER_REGS],
        )
    else:
        gl.warp_specialize(
            [
                (_consume, (consume, 0, BLOCK_N, CONSUMERS, STAGES, CAUSAL, PING_PONG)),
                (_consume, (consume, 1, BLOCK_N, CONSUMERS, STAGES, CAUSAL, PING_PONG)),
                (_consume, (consume, 2, BLOCK_N, CONSUMERS, STAGES, CAUSAL, PING_PONG)),
                (_produce, (produce, BLOCK_N, CONSUMERS, STAGES, CAUSAL)),
            ],
            [4, 4, 1],
            [CONSUMER_REGS, CONSUMER_REGS, PRODUCER_REGS],
        )


_LOG2E = math.log2(math.e)
_GLUON_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
_SECTION_BYTES = 32 << 20  # of the keys and values of a section of heads: to stay in an L2 cache of 50 MB
_compiled: dict = {}


def supports(q_shape, k_shape, v_shape, dtype, window_left=None, window_right=None, *, scale=1.0) -> str | None:
    """None if `attention_forward` computes this attention, else a sentence that says why not.

    Args:
        q_shape, k_shape, v_shape: [B, Hq, Sq, D], [B, Hkv, Sk, D], [B, Hkv, Sk, D]; SymInts are welcome, and no
            sequence length or batch size is looked at. Nor is window_right: any will do.
    """
    if dtype not in _GLUON_DTYPES:
        return f"the Hopper kernel computes in bfloat16 and float16, not in {dtype}"
    if not len(q_shape) == len(k_shape) == len(v_shape) == 4:
        return "the Hopper kernel takes [batch, heads, seqlen, head_dim]"
    head_dims = sorted({head_dim for head_dim, _ in TILES})
    if q_shape[3] not in head_dims:
        return f"the Hopper kernel has head_dim {' and '.join(map(str, head_dims))}, not {q_shape[3]}"
    if k_shape[3] != q_shape[3] or v_shape[3] != q_shape[3]:
        return f"the Hopper kernel has one head_dim for q, k and v, not {q_shape[3]}, {k_shape[3]} and {v_shape[3]}"
    if k_shape[1] != v_shape[1] or q_shape[1] % k_shape[1] != 0:
        return f"{k_shape[1]} key and {v_shape[1]} value heads do not divide {q_shape[1]} query heads evenly"
    if window_left is not None:
        return "the Hopper kernel has no left edge to its window"
    if not (isinstance(scale, (int, float)) and 0 < scale < math.inf):
        return f"the Hopper kernel needs a positive scale that is known at compile time, not {scale}"
    return None


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, window_right: int | None = None
) -> tuple[Tensor, Tensor]:
    """softmax(scale * q @ k^T) @ v on a Hopper GPU.

    Args:
        q: [B, Hq, Sq, D], BF16 or FP16, D 64 or 128, on CUDA.
        k, v: [B, Hkv, Sk, D], Hkv dividing Hq.
        scale: positive.
        window_right: query i sees the keys j <= i + window_right (None: all). 0 is causal from the top left,
            Sk - Sq from the bottom right.

    Returns:
        out [B, Hq, Sq, D] as `output_like(q, D)`, and lse [B, Hq, Sq] float32, contiguous: the natural log of the sum
        of exp(scores). A row that sees no key has out = 0, lse = -inf.

    Strides are free. An operand whose head_dim is not contiguous, whose other strides or whose address are no multiples
    of 16 bytes, or which is expanded, is copied first.

    Raises:
        ValueError: with the sentence of `supports`, or if the operands do not fit together.
    """
    if problem := supports(q.shape, k.shape, v.shape, q.dtype, None, window_right, scale=scale):
        raise ValueError(f"attention_forward: {problem}")
    if q.shape[0] != k.shape[0] or k.shape != v.shape or not q.dtype == k.dtype == v.dtype:
        shapes = ", ".join(f"{name} {list(x.shape)} {x.dtype}" for name, x in zip("qkv", (q, k, v)))
        raise ValueError(f"attention_forward: the operands do not fit together: {shapes}")
    out = output_like(q, q.shape[3])
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    if out.numel():
        with torch.cuda.device(q.device):
            launch(*launch_arguments(q, k, v, out, lse, scale, window_right))
    return out, lse


def launch(grid: tuple[int, int, int], args: tuple) -> None:
    """Runs the kernel on what `launch_arguments` returned, on the current device and stream."""
    # Triton's own look-up of a compiled kernel inspects every argument on every call.
    k_desc = args[1]
    key = (torch.cuda.current_device(), k_desc.base.dtype, k_desc.block_shape[2], k_desc.block_shape[3], *args[16:])
    if kernel := _compiled.get(key):
        kernel[grid](*args)
    else:
        _compiled[key] = _forward[grid](*args, num_warps=4)


def launch_arguments(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, window_right: int | None,
    tile: Tile | None = None, sm_count: int | None = None,
) -> tuple[tuple[int, int, int], tuple]:  # fmt: skip
    """The grid and the arguments of the kernel; `tile` and `sm_count` in place of the table's and the device's."""
    batch, q_heads, seqlen_q, head_dim = q.shape
    kv_heads, seqlen_k = k.shape[1:3]
    causal = window_right is not None and window_right < seqlen_k - 1
    tile = tile or tile_for(head_dim, causal, seqlen_q)
    heads = batch * q_heads
    m_tiles = -(-seqlen_q // (tile.consumers * ROWS))
    ctas = heads * m_tiles
    section, paired = 1, False
    if tile.persistent:
        sm_count = sm_count or _sm_count(q.device)
        if causal:
            # An odd number of tiles is paired over two heads. One tile per CTA instead of pairs, if there is an odd one
            # out or more than a tenth of the SMs' time would be idle in the last round.
            section = 1 + m_tiles % 2
            pairs = ctas // 2
            paired = heads % section == 0 and pairs > 0.9 * (pairs + -pairs % sm_count)
            ctas = min(pairs, sm_count) if paired else ctas
        else:
            ctas = min(ctas, sm_count)
    if causal and not paired:
        sections = -(-batch * kv_heads * 2 * seqlen_k * head_dim * k.element_size() // _SECTION_BYTES)
        section = -(-heads // sections)
    shift = max(window_right, -seqlen_q) if causal else 0
    return (ctas, 1, 1), (
        _descriptor(addressable(q), ROWS), _descriptor(addressable(k), tile.block_n),
        _descriptor(addressable(v), tile.block_n), _descriptor(out, ROWS), lse,
        heads * m_tiles, m_tiles, heads, q_heads, q_heads // kv_heads, section, int(paired), seqlen_q, seqlen_k, shift,
        scale * _LOG2E, causal, tile.consumers, tile.stages, tile.ping_pong, tile.consumer_regs, tile.producer_regs,
    )  # fmt: skip


def tile_for(head_dim: int, causal: bool, seqlen_q: int) -> Tile:
    """The table's configuration for a problem."""
    if seqlen_q <= SHORT and (head_dim, causal) in SHORT_TILES:
        return SHORT_TILES[head_dim, causal]
    return TILES[head_dim, causal]


def addressable(x: Tensor) -> Tensor:
    """x: [B, H, S, D], or a contiguous copy if TMA cannot address x."""
    batch, heads, seqlen, _ = x.shape
    by_batch, by_head, by_row, unit = x.stride()
    mask = 16 // x.element_size() - 1
    if (
        unit == 1
        and not x.data_ptr() & 15
        and (batch == 1 or (by_batch and not by_batch & mask))
        and (heads == 1 or (by_head and not by_head & mask))
        and (seqlen == 1 or (by_row and not by_row & mask))
    ):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _descriptor(x: Tensor, rows: int) -> TensorDescriptor:
    """A TMA descriptor of x: [B, H, S, D], in blocks of `rows` rows."""
    batch, heads, seqlen, head_dim = x.shape
    by_batch, by_head, by_row, _ = x.stride()
    # The stride of a dimension of size 1 may be anything in torch, but not in a descriptor.
    strides = [
        by_batch if batch > 1 else head_dim, by_head if heads > 1 else head_dim, by_row if seqlen > 1 else head_dim, 1
    ]  # fmt: skip
    layout = _shared_layout(rows, head_dim, x.dtype)
    return TensorDescriptor(x, [batch, heads, seqlen, head_dim], strides, [1, 1, rows, head_dim], layout)


@functools.cache
def _shared_layout(rows: int, head_dim: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for([1, 1, rows, head_dim], _GLUON_DTYPES[dtype])


@functools.cache
def _sm_count(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count

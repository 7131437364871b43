"""Attention forward on Hopper with nothing on its scores but a window, BF16 and FP16: the device code.

What `forward_kernel.py` says of warp groups, of their overlap and of the order of the keys holds here. Two things of
FlashAttention-3 come on top, and one for them (Shah et al., 2024, arXiv:2407.08608;
https://github.com/Dao-AILab/flash-attention, hopper/):

- Clusters of two CTAs, with neighbouring row tiles: each brings half of every KV tile to both. Alone, CTAs ask more of
  the L2 cache than it can give, 5 TB/s. At head_dim 128 and 16384 positions on an H200, 642 -> 677 TFLOP/s.
- KV tiles as long as registers allow: what a tile costs beside its products is spread over more keys. Gluon's tensors
  have powers of two. So Q @ K^T is one wgmma of any length by inline assembly, whose result comes in pieces of 16
  columns; they are put together to parts of powers of two (160 = 128 + 32), and the rest is Gluon on tuples of parts.
  Alone, 64 -> 80 keys are worth 684 -> 696 at head_dim 256, and 128 -> 160 are worth 631 -> 664 at 128.
- O goes to memory past shared memory, so that the next Q comes while the last products run. At head_dim 256, 603 -> 614
  at 1024 positions and 676 -> 698 at 4096.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from fa3_inductor.kernels.cluster import (
    CLUSTER,
    COLUMNS,
    GROUP,
    _address,
    _bring_box,
    _meet,
    _release,
    _write_addresses,
)
from fa3_inductor.kernels.compat import reinterpret, thread_barrier
from fa3_inductor.kernels.forward_kernel import (
    ROWS,
    TURN,
    _arrive,
    _finish_rows,
    _mask_tile,
    _natural,
    _number,
    _pack,
    _rescale,
    _row_sums,
    _steps,
    _sync,
    _tile,
    _tile_range,
    _unpack,
)

# What Gluon has no view of (Q, K and barriers) lies in groups of 8 rows of 128 bytes, of which swizzled tiles are made.
ZERO = gl.constexpr(512)  # where among the barriers there is a zero


@gluon.constexpr_function
def _groups(rows: int, columns: int) -> int:
    return rows // 8 * (columns // 64)


@gluon.constexpr_function
def _places(block_n: int, head_dim: int, consumers: int, stages: int):
    """The groups at which the K ring and the barriers start; Q is in front of them."""
    k = consumers * _groups(64, head_dim)
    return k, k + stages * _groups(block_n, head_dim)


@gluon.constexpr_function
def _first_row(descs, part: int) -> int:
    return sum(desc.type.block_type.shape[2] for desc in descs[:part])


@gluon.constexpr_function
def _accumulator(columns: int):
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 16])


@gluon.jit
def _bring(
    DESCRIPTOR: gl.constexpr, descs, batch, head, row, at, bar, STRIDES: gl.constexpr, D: gl.constexpr,
    SHARE: gl.constexpr,
):  # fmt: skip
    """Brings one of SHARE of the columns of some rows, this CTA's, to as many CTAs.

    For each part of the rows, `at` is where it goes and STRIDES how many bytes there are from 64 columns to the next.
    """
    rank = gl.program_id(0) % SHARE
    for i in gl.static_range(len(descs)):
        for step in gl.static_range(D // COLUMNS // SHARE):
            which = step * SHARE + rank
            _bring_box(
                "forward_plain_kernel", DESCRIPTOR + i, SHARE, at[i] + which * STRIDES[i], bar, which * COLUMNS,
                row + _first_row(descs, i), head, batch,
            )  # fmt: skip


@gluon.constexpr_function
def _strides_of_k(descs):
    return (_first_row(descs, len(descs)) * 128,) * len(descs)


@gluon.constexpr_function
def _strides_of_v(descs):
    return tuple(desc.type.block_type.shape[2] * 128 for desc in descs)


@gluon.jit
def _bring_k(descs, batch, head, row, it, ring, bars, bars_at, D: gl.constexpr, STAGES: gl.constexpr):
    """Brings a tile of keys into slot it % STAGES, once all consumers have let go of it: 64 columns in one piece."""
    BYTES: gl.constexpr = _first_row(descs, len(descs)) * D * 2
    slot = it % STAGES
    mbarrier.wait(bars.index(2 * STAGES + slot), ((it // STAGES) & 1) ^ 1)
    mbarrier.expect(bars.index(slot), BYTES)
    at = ()
    for i in gl.static_range(len(descs)):
        at = at + (ring + slot * BYTES + _first_row(descs, i) * 128,)
    _bring(1, descs, batch, head, row, at, bars_at + slot * 8, _strides_of_k(descs), D, CLUSTER)


@gluon.jit
def _bring_v(descs, batch, head, row, it, rings, bars, bars_at, DV: gl.constexpr, STAGES: gl.constexpr):
    """Likewise of values: each part in one piece."""
    slot = it % STAGES
    mbarrier.wait(bars.index(3 * STAGES + slot), ((it // STAGES) & 1) ^ 1)
    mbarrier.expect(bars.index(STAGES + slot), _first_row(descs, len(descs)) * DV * 2)
    at = ()
    for i in gl.static_range(len(descs)):
        at = at + (rings[i] + slot * (descs[i].block_type.shape[2] * DV * 2),)
    bar = bars_at + (STAGES + slot) * 8
    _bring(1 + len(descs), descs, batch, head, row, at, bar, _strides_of_v(descs), DV, CLUSTER)


@gluon.jit
def _located(number, work, COUNT: gl.constexpr):
    """Of a cluster's tile of COUNT rows the first row, its number among all heads', its batch and its head."""
    m_tiles, q_heads = work[2:4]
    flat = number // m_tiles
    return number % m_tiles * COUNT, flat, flat // q_heads, flat % q_heads


@gluon.jit
def _produce(
    args, D: gl.constexpr, DV: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr, LEFT: gl.constexpr,
    RIGHT: gl.constexpr,
):  # fmt: skip
    """The producer warp. Values lag keys by one tile, as their use does."""
    q_desc, k_descs, v_descs, q_at, k_ring, v_rings, bars, bars_at, work, window = args
    group = work[4]
    BLOCK_N: gl.constexpr = _first_row(k_descs, len(k_descs))
    COUNT: gl.constexpr = CLUSTER * CONSUMERS * ROWS
    _meet()
    it = 0
    steps = _steps(work, CLUSTER)
    number = _number(0, work, CLUSTER)
    for step in range(steps):
        tile_row, flat, batch, head = _located(number, work, COUNT)
        number = _number(gl.minimum(step + 1, steps - 1), work, CLUSTER)  # of the next one, in time
        kv_head = head // group
        first, stop = _tile_range(tile_row, tile_row, window, COUNT, BLOCK_N, LEFT, RIGHT)[2:]
        row = (stop - 1) * BLOCK_N
        _bring_k(k_descs, batch, kv_head, row, it, k_ring, bars, bars_at, D, STAGES)
        for wg in gl.static_range(CONSUMERS):
            mbarrier.wait(bars.index(4 * STAGES + CONSUMERS + wg), (step & 1) ^ 1)
            mbarrier.expect(bars.index(4 * STAGES + wg), ROWS * D * 2)
            q_row = tile_row + (gl.program_id(0) % CLUSTER * CONSUMERS + wg) * ROWS
            bar = bars_at + (4 * STAGES + wg) * 8
            _bring(0, (q_desc,), batch, head, q_row, (q_at + wg * (ROWS * D * 2),), bar, (ROWS * 128,), D, 1)
        for _ in range(first, stop - 1):
            it += 1
            row -= BLOCK_N
            _bring_k(k_descs, batch, kv_head, row, it, k_ring, bars, bars_at, D, STAGES)
            _bring_v(v_descs, batch, kv_head, row + BLOCK_N, it - 1, v_rings, bars, bars_at, DV, STAGES)
        _bring_v(v_descs, batch, kv_head, row, it, v_rings, bars, bars_at, DV, STAGES)
        it += 1
    _meet()


@gluon.constexpr_function
def _product_asm(kind: str, columns: int, head_dim: int) -> str:
    """Q [64, head_dim] @ K [columns, head_dim]^T, from both addresses as wgmma's descriptors have them."""
    registers = columns // 2
    into = ", ".join(f"${i}" for i in range(registers))
    lines = [
        "{",
        ".reg .b64 a, b;",
        ".reg .b32 x, y, h;",
        ".reg .pred p;",
        "setp.ne.b32 p, 0, 0;",
        "mov.u32 h, 0x40000040;",  # swizzled by 128 bytes; 1024 bytes from 8 rows to the next
        "wgmma.fence.sync.aligned;",
    ]
    for step in range(head_dim // 16):
        which, within = divmod(step, 4)
        # In units of 16 bytes.
        lines += [
            f"add.u32 x, ${registers}, {which * 64 * 8 + within * 2};",
            f"add.u32 y, ${registers + 8}, {which * columns * 8 + within * 2};",
            "mov.b64 a, {x, h};",
            "mov.b64 b, {y, h};",
            f"wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.{kind}.{kind} {{{into}}}, a, b, p, 1, 1, 0, 0;",
        ]
        if step == 0:
            lines.append("setp.eq.b32 p, 0, 0;")
    return "\n".join([*lines, "wgmma.commit_group.sync.aligned;", "}"])


@gluon.constexpr_function
def _product_constraints(columns: int) -> str:
    return ",".join(["=f"] * (columns // 2) + ["r"] * 16)


@gluon.constexpr_function
def _product_types(columns: int):
    return (gl.float32,) * (columns // 16)


@gluon.jit
def _issue_scores(q_at, k_at, dtype: gl.constexpr, BLOCK_N: gl.constexpr, D: gl.constexpr):
    """Issues Q @ K^T; the result comes in pieces of 16 columns."""
    KIND: gl.constexpr = "bf16" if dtype == gl.bfloat16 else "f16"
    zero = gl.full([ROWS, 16], 0, gl.int32, _accumulator(16))
    return gl.inline_asm_elementwise(
        _product_asm(KIND, BLOCK_N, D), _product_constraints(BLOCK_N), [zero + q_at, zero + k_at],
        _product_types(BLOCK_N), False, 8,
    )  # fmt: skip


@gluon.jit
def _joined(pieces, FIRST: gl.constexpr, WIDTH: gl.constexpr):
    """WIDTH columns of pieces from FIRST on as one matrix, without moving a register."""
    if WIDTH == 16:
        return pieces[FIRST]
    else:
        left = _joined(pieces, FIRST, WIDTH // 2)
        right = _joined(pieces, FIRST + WIDTH // 32, WIDTH // 2)
        both = gl.join(left, right).permute((0, 2, 1)).reshape([ROWS, WIDTH])
        return gl.convert_layout(both, _accumulator(WIDTH), assert_trivial=True)


@gluon.jit
def _wait_scores(pieces, PENDING: gl.constexpr, descs):
    """Waits for the scores, and puts the pieces together to parts as long as V's."""
    deps = []
    for i in gl.static_range(len(pieces)):
        deps = deps + [pieces[i]]
    pieces = warpgroup_mma_wait(PENDING, deps)
    s = ()
    for i in gl.static_range(len(descs)):
        s = s + (_joined(pieces, _first_row(descs, i) // 16, descs[i].block_type.shape[2]),)
    return s


@gluon.jit
def _mask_parts(s, row0, column0, window, descs, LEFT: gl.constexpr, RIGHT: gl.constexpr):
    masked = ()
    for i in gl.static_range(len(s)):
        column = column0 + _first_row(descs, i)
        own = _mask_tile(s[i], row0, column, window, LEFT, RIGHT, _accumulator(descs[i].block_type.shape[2]))
        masked = masked + (own,)
    return masked


@gluon.jit
def _row_max(s):
    """[M, N] -> [M, 4]: over the columns a thread holds."""
    quads = s.reshape([s.shape[0], s.shape[1] // 8, 4, 2])
    return gl.max(gl.max(quads, 3), 1)


@gluon.jit
def _new_max(s, m_i):
    """The running maximum of the rows."""
    top = _row_max(s[0])
    for i in gl.static_range(1, len(s)):
        top = gl.maximum(top, gl.convert_layout(_row_max(s[i]), top.type.layout, assert_trivial=True))
    return gl.maximum(m_i, gl.convert_layout(gl.max(top, 1), m_i.type.layout, assert_trivial=True))


@gluon.jit
def _weights(s, m_i, m_new, scale):
    """exp2 of the scaled scores less their maximum, the factor for what was summed so far, and sums as `_row_sums`."""
    m_scaled = gl.where(m_new == float("-inf"), 0.0, m_new) * scale
    weights = ()
    for i in gl.static_range(len(s)):
        own = gl.convert_layout(m_scaled, gl.SliceLayout(1, s[i].type.layout), assert_trivial=True)
        weights = weights + (gl.exp2(s[i] * scale - own[:, None]),)
    sums = _row_sums(weights[0])
    for i in gl.static_range(1, len(s)):
        sums += gl.convert_layout(_row_sums(weights[i]), sums.type.layout, assert_trivial=True)
    return weights, gl.exp2(m_i * scale - m_scaled), sums


@gluon.jit
def _pack_parts(weights, dtype: gl.constexpr):
    packed = ()
    for i in gl.static_range(len(weights)):
        packed = packed + (_pack(weights[i], dtype),)
    return packed


@gluon.jit
def _accumulate_parts(packed, v_smem, slot, o, dtype: gl.constexpr):
    """Issues O += P @ V, part by part. Returns the weights too, which have to live until it is done."""
    DV: gl.constexpr = o.shape[1]
    layout: gl.constexpr = gl.DotOperandLayout(0, _accumulator(DV), 2)
    p = ()
    for i in gl.static_range(len(packed)):
        own = _unpack(packed[i], dtype, layout)
        o = warpgroup_mma(own, _tile(v_smem[i], slot), o, is_async=True)
        p = p + (own,)
    return o, p


@gluon.jit
def _zero_from_memory(at):
    """0.0. ptxas moves arithmetic over waits; what depends on this stays behind those that are in front of it."""
    return gl.inline_asm_elementwise("ld.volatile.shared.b32 $0, [$1];", "=f,r", [at], gl.float32, False, 1)


@gluon.jit
def _wait_output(o, p):
    deps = [o]
    for i in gl.static_range(len(p)):
        deps = deps + [p[i]]
    return warpgroup_mma_wait(0, deps)[0]


@gluon.constexpr_function
def _exchange_and_store_asm() -> str:
    """Of each of two rows four words of a thread, 8 columns apart; four neighbours make 16 bytes of them each."""
    lines = [
        "{",
        ".reg .pred odd, high, p;",
        ".reg .b32 lane, s, r, x<8>;",
        "mov.u32 lane, %laneid;",
        "and.b32 s, lane, 1;",
        "setp.ne.u32 odd, s, 0;",
        "and.b32 s, lane, 2;",
        "setp.ne.u32 high, s, 0;",
        *(f"mov.b32 x{i}, ${8 + i};" for i in range(8)),
    ]
    for row in (0, 1):
        for lane, is_upper, pairs in ((1, "odd", ((0, 1), (2, 3))), (2, "high", ((0, 2), (1, 3)))):
            for i, j in pairs:
                i, j = f"x{2 * i + row}", f"x{2 * j + row}"
                lines += [
                    f"selp.b32 s, {i}, {j}, {is_upper};",
                    f"shfl.sync.bfly.b32 r, s, {lane}, 31, 0xffffffff;",
                    f"selp.b32 {i}, r, {i}, {is_upper};",
                    f"selp.b32 {j}, {j}, r, {is_upper};",
                ]
        words = ", ".join(f"x{2 * i + row}" for i in range(4))
        lines += [f"setp.ne.b32 p, ${24 + row}, 0;", f"@p st.global.v4.b32 [${16 + row}], {{{words}}};"]
    return "\n".join([*lines, *(f"mov.u32 ${i}, 0;" for i in range(8)), "}"])


@gluon.constexpr_function
def _exchange_and_store_constraints() -> str:
    return ",".join(["=r"] * 8 + ["r"] * 8 + ["l"] * 8 + ["r"] * 8)


@gluon.jit
def _store(o, out, batch, head, row0, seqlen_q, dtype: gl.constexpr):
    """Writes O, 16 bytes a thread at a time."""
    ptr, by_batch, by_head, by_row, head_dim_v = out
    packed = _pack(o, dtype)
    layout: gl.constexpr = packed.type.layout
    rows = row0 + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    word = gl.arange(0, packed.shape[1], gl.SliceLayout(0, layout))
    column = 2 * (word + 3 * (word & 3))  # of the first of four words, after the exchange
    ptr += batch.to(gl.int64) * by_batch + head.to(gl.int64) * by_head
    at = ptr + ((rows.to(gl.int64) * by_row)[:, None] + column[None, :])
    inside = (rows < seqlen_q)[:, None] & (column < head_dim_v)[None, :]
    gl.inline_asm_elementwise(
        _exchange_and_store_asm(), _exchange_and_store_constraints(), [packed, at, inside.to(gl.int32)], gl.int32,
        False, 8,
    )  # fmt: skip


@gluon.jit
def _kv_loop(
    o, packed, l_i, m_i, it, tile, stop, row0, scale, descs, shared, window,
    WG: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr, PING_PONG: gl.constexpr, OVERLAP: gl.constexpr,
    MASKED: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr, D: gl.constexpr, dtype: gl.constexpr,
):  # fmt: skip
    """KV tiles tile - 1 down to stop. Enters and leaves with the last tile's weights not yet multiplied by V."""
    q_at, k_at, v_smem, bars, bars_at = shared
    BLOCK_N: gl.constexpr = _first_row(descs, len(descs))
    for i in range(stop, tile):
        slot = it % STAGES
        v_slot = (it - 1) % STAGES
        mbarrier.wait(bars.index(slot), (it // STAGES) & 1)
        if PING_PONG:
            _sync(TURN + WG, 256)
        pieces = _issue_scores(q_at, k_at + slot * (BLOCK_N * D * 2 // 16), dtype, BLOCK_N, D)
        mbarrier.wait(bars.index(STAGES + v_slot), ((it - 1) // STAGES) & 1)
        o, p = _accumulate_parts(packed, v_smem, v_slot, o, dtype)
        if PING_PONG:
            _arrive(TURN + (WG + 1) % CONSUMERS, 256)
        s = _wait_scores(pieces, len(descs), descs)
        _release(bars_at + (2 * STAGES + slot) * 8)
        if MASKED:
            s = _mask_parts(s, row0, (tile - 1 - (i - stop)) * BLOCK_N, window, descs, LEFT, RIGHT)
        m_new = _new_max(s, m_i)
        if OVERLAP:
            weights, alpha, sums = _weights(s, m_i, m_new, scale)
            o = _wait_output(o, p)
        else:
            o = _wait_output(o, p)
            weights, alpha, sums = _weights(s, m_i, m_new + _zero_from_memory(bars_at + ZERO), scale)
        _release(bars_at + (3 * STAGES + v_slot) * 8)
        m_i = m_new
        l_i = _rescale(l_i, alpha) + sums
        packed = _pack_parts(weights, dtype)
        o = _rescale(o, alpha)
        it += 1
    return o, packed, l_i, m_i, it


@gluon.jit
def _skip(
    it, count, bars, bars_at, WG: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr, PING_PONG: gl.constexpr
):
    """Lets go of `count` KV tiles that only others' rows see, each not before it is there."""
    for _ in range(count):
        slot = it % STAGES
        if PING_PONG:
            _sync(TURN + WG, 256)
            _arrive(TURN + (WG + 1) % CONSUMERS, 256)
        mbarrier.wait(bars.index(slot), (it // STAGES) & 1)
        _release(bars_at + (2 * STAGES + slot) * 8)
        mbarrier.wait(bars.index(STAGES + slot), (it // STAGES) & 1)
        _release(bars_at + (3 * STAGES + slot) * 8)
        it += 1
    return it


@gluon.jit
def _consume(
    args, WG: gl.constexpr, D: gl.constexpr, DV: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr,
    LEFT: gl.constexpr, RIGHT: gl.constexpr, PING_PONG: gl.constexpr, OVERLAP: gl.constexpr, SINKS: gl.constexpr,
):  # fmt: skip
    """Consumer warp group number WG: its ROWS rows of every tile."""
    q_desc, descs, out, lse_ptr, sinks_ptr, q_at, k_ring, v_smem, bars, bars_at, work, window, scale = args
    seqlen_q, seqlen_k, left, right = window
    dtype: gl.constexpr = q_desc.dtype
    rows_layout: gl.constexpr = gl.SliceLayout(1, _accumulator(descs[0].block_type.shape[2]))
    BLOCK_N: gl.constexpr = _first_row(descs, len(descs))
    COUNT: gl.constexpr = CLUSTER * CONSUMERS * ROWS
    # As wgmma's descriptors have them, in units of 16 bytes; bit 16 is a stride that swizzled tiles do not have.
    q_at = (q_at + WG * (ROWS * D * 2)) // 16 | 0x10000
    k_at = k_ring // 16 | 0x10000
    shared = (q_at, k_at, v_smem, bars, bars_at)
    _meet()
    if PING_PONG and WG == CONSUMERS - 1:
        _arrive(TURN, 256)
    it = 0
    steps = _steps(work, CLUSTER)
    number = _number(0, work, CLUSTER)
    for step in range(steps):
        tile_row, flat, batch, head = _located(number, work, COUNT)
        number = _number(gl.minimum(step + 1, steps - 1), work, CLUSTER)  # of the next one, in time
        row0 = tile_row + (gl.program_id(0) % CLUSTER * CONSUMERS + WG) * ROWS
        first, stop, tile_first, tile_stop = _tile_range(tile_row, row0, window, COUNT, BLOCK_N, LEFT, RIGHT)
        it = _skip(it, tile_stop - stop, bars, bars_at, WG, CONSUMERS, STAGES, PING_PONG)

        # The last KV tile, alone: no weights to multiply by V yet. It is the only one that can reach past the end of K.
        slot = it % STAGES
        mbarrier.wait(bars.index(4 * STAGES + WG), step & 1)
        mbarrier.wait(bars.index(slot), (it // STAGES) & 1)
        if PING_PONG:
            _sync(TURN + WG, 256)
        pieces = _issue_scores(q_at, k_at + slot * (BLOCK_N * D * 2 // 16), dtype, BLOCK_N, D)
        if PING_PONG:
            _arrive(TURN + (WG + 1) % CONSUMERS, 256)
        s = _wait_scores(pieces, 0, descs)
        _release(bars_at + (2 * STAGES + slot) * 8)
        s = _mask_parts(s, row0, (stop - 1) * BLOCK_N, window, descs, LEFT, RIGHT)
        m_i = gl.full([ROWS], float("-inf"), gl.float32, rows_layout)
        m_new = _new_max(s, m_i)
        weights, alpha, l_i = _weights(s, m_i, m_new, scale)
        m_i = m_new
        packed = _pack_parts(weights, dtype)
        o = gl.zeros([ROWS, DV], gl.float32, _accumulator(DV))
        it += 1

        # Downwards from the last but one: tiles at an edge, tiles in which nothing is hidden, tiles at the other edge.
        tile = stop - 1
        open_stop = tile
        if RIGHT:
            open_stop = gl.minimum(open_stop, gl.maximum(gl.minimum(row0 + right + 1, seqlen_k), 0) // BLOCK_N)
            open_stop = gl.maximum(open_stop, first)
            o, packed, l_i, m_i, it = _kv_loop(
                o, packed, l_i, m_i, it, tile, open_stop, row0, scale, descs, shared, window,
                WG, CONSUMERS, STAGES, PING_PONG, OVERLAP, True, LEFT, RIGHT, D, dtype,
            )  # fmt: skip
        open_first = first
        if LEFT:
            low = gl.maximum(gl.minimum(row0 + ROWS, seqlen_q) - 1 - left, 0)
            open_first = gl.minimum(gl.maximum(open_first, (low + BLOCK_N - 1) // BLOCK_N), open_stop)
        o, packed, l_i, m_i, it = _kv_loop(
            o, packed, l_i, m_i, it, open_stop, open_first, row0, scale, descs, shared, window,
            WG, CONSUMERS, STAGES, PING_PONG, OVERLAP, False, LEFT, RIGHT, D, dtype,
        )  # fmt: skip
        if LEFT:
            o, packed, l_i, m_i, it = _kv_loop(
                o, packed, l_i, m_i, it, open_first, first, row0, scale, descs, shared, window,
                WG, CONSUMERS, STAGES, PING_PONG, OVERLAP, True, LEFT, RIGHT, D, dtype,
            )  # fmt: skip
        mbarrier.arrive(bars.index(4 * STAGES + CONSUMERS + WG), count=1)

        v_slot = (it - 1) % STAGES
        mbarrier.wait(bars.index(STAGES + v_slot), ((it - 1) // STAGES) & 1)
        o, p = _accumulate_parts(packed, v_smem, v_slot, o, dtype)
        factor = _finish_rows(
            l_i, _natural(m_i, scale, None), sinks_ptr, lse_ptr, head, flat, row0, seqlen_q, SINKS, rows_layout
        )
        o = _wait_output(o, p)
        _release(bars_at + (3 * STAGES + v_slot) * 8)
        it = _skip(it, first - tile_first, bars, bars_at, WG, CONSUMERS, STAGES, PING_PONG)
        _store(_rescale(o, factor), out, batch, head, row0, seqlen_q, dtype)
    _meet()


@gluon.jit
def _idle():
    """A warp group has four warps, the producer's too, and all of them have to meet."""
    _meet()
    _meet()


@gluon.jit
def _v_ring(desc, STAGES: gl.constexpr, DV: gl.constexpr):
    return gl.allocate_shared_memory(desc.dtype, [STAGES, 1, 1, desc.block_type.shape[2], DV], desc.layout)


@gluon.jit
def _parts(first, second, third):
    if second is None:
        return (first,)
    elif third is None:
        return (first, second)
    else:
        return (first, second, third)


@gluon.jit(
    do_not_specialize=["tiles", "m_tiles", "q_heads", "group", "seqlen_q", "seqlen_k", "left", "right"],
    do_not_specialize_on_alignment=["sinks_ptr"],
)  # fmt: skip
def forward_plain_kernel(
    q_desc, k_desc, k_desc2, k_desc3, v_desc, v_desc2, v_desc3, out, lse_ptr, order_ptr, sinks_ptr,
    tiles, m_tiles, q_heads, group, seqlen_q, seqlen_k, left, right, scale,
    LEFT: gl.constexpr, RIGHT: gl.constexpr, D: gl.constexpr, DV: gl.constexpr, CONSUMERS: gl.constexpr,
    STAGES: gl.constexpr, PING_PONG: gl.constexpr, OVERLAP: gl.constexpr, CONSUMER_REGS: gl.constexpr,
    PRODUCER_REGS: gl.constexpr,
):  # fmt: skip
    """The descriptors come first: `_bring` counts parameters.

    Their blocks have 64 columns, those of K and V part of a tile's rows. D and DV are powers of two that hold the
    head_dims. `out` is O, its strides and its head_dim. A cluster has row tiles of CLUSTER * CONSUMERS * ROWS rows.
    """
    k_descs = _parts(k_desc, k_desc2, k_desc3)
    v_descs = _parts(v_desc, v_desc2, v_desc3)
    BLOCK_N: gl.constexpr = _first_row(k_descs, len(k_descs))
    PLACES: gl.constexpr = _places(BLOCK_N, D, CONSUMERS, STAGES)
    smem = gl.allocate_shared_memory(q_desc.dtype, [PLACES[1] + 1, 1, 1, 8, COLUMNS], q_desc.layout)
    v_smem = ()
    for i in gl.static_range(len(v_descs)):
        v_smem = v_smem + (_v_ring(v_descs[i], STAGES, DV),)
    _write_addresses(PLACES[1] + STAGES * _groups(BLOCK_N, DV))
    q_at = _address(smem)
    v_rings = ()
    for i in gl.static_range(len(v_descs)):
        v_rings = v_rings + (_address(v_smem[i]),)
    thread_barrier()
    k_ring = q_at + PLACES[0] * GROUP
    bars_at = q_at + PLACES[1] * GROUP
    # When a tile of K is there, and one of V, STAGES each; when all warps of the cluster's consumers have let go of it;
    # when Q is there, and when it may go, CONSUMERS each.
    bars = reinterpret(smem.index(PLACES[1]), gl.int64, [16, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2 * STAGES):
        mbarrier.init(bars.index(i), count=1)
        mbarrier.init(bars.index(2 * STAGES + i), count=CLUSTER * CONSUMERS * 4)
    for i in gl.static_range(CONSUMERS):
        mbarrier.init(bars.index(4 * STAGES + i), count=1)
        mbarrier.init(bars.index(4 * STAGES + CONSUMERS + i), count=1)
    gl.inline_asm_elementwise("st.shared.b32 [$1], 0; mov.u32 $0, 0;", "=r,r", [bars_at + ZERO], gl.int32, False, 1)
    fence_async_shared()
    gl.inline_asm_elementwise("fence.mbarrier_init.release.cluster; mov.u32 $0, 0;", "=r", [], gl.int32, False, 1)

    work = (order_ptr, tiles, m_tiles, q_heads, group)
    window = (seqlen_q, seqlen_k, left, right)
    produce = (q_desc, k_descs, v_descs, q_at, k_ring, v_rings, bars, bars_at, work, window)
    consume = (q_desc, v_descs, out, lse_ptr, sinks_ptr, q_at, k_ring, v_smem, bars, bars_at, work, window, scale)
    SINKS: gl.constexpr = sinks_ptr is not None
    gl.warp_specialize(
        [
            (_consume, (consume, 0, D, DV, CONSUMERS, STAGES, LEFT, RIGHT, PING_PONG, OVERLAP, SINKS)),
            (_consume, (consume, 1, D, DV, CONSUMERS, STAGES, LEFT, RIGHT, PING_PONG, OVERLAP, SINKS)),
            (_produce, (produce, D, DV, CONSUMERS, STAGES, LEFT, RIGHT)),
            (_idle, ()),
            (_idle, ()),
        ],
        [4, 1, 1, 2],
        [CONSUMER_REGS, PRODUCER_REGS, PRODUCER_REGS, PRODUCER_REGS],
    )

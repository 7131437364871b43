"""Attention forward on Hopper (sm_90a) with q, k and v in float8_e4m3fn: the device code. `fp8.py` is its host side.

As in `forward_kernel.py` one producer warp brings tiles in and two or three consumer warp groups own 64 query rows
each. A consumer does a tile's products and its softmax one after the other; what overlaps them is the other consumers.
Each P @ V goes into an accumulator of its own and is added to O in float32, for the tensor core adds 8-bit products up
with some 14 bits: the error does not grow with the number of keys, and the addition costs what rescaling O does anyway.

8-bit operands have to lie along the dimension that is summed over, so V is wanted transposed, [Dv, keys], and inside
each 16 keys in the order in which a thread holds weights: then these are an operand as they are. It comes so
(`quantise.py`), or two warps beside the producer turn it, tile by tile. Weights are multiplied by 2^8, which makes the
most of e4m3's range; FlashAttention-3 does so too, and turns V inside its kernel (Shah et al., 2024, arXiv:2407.08608,
section 3.3, and its source).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from fa3_inductor.kernels.cluster import _address, _kilobytes, _write_addresses
from fa3_inductor.kernels.compat import reinterpret, thread_barrier, tma_load, tma_store
from fa3_inductor.kernels.forward_kernel import (
    K_EMPTY,
    LN2,
    ROWS,
    V_EMPTY,
    _arrive,
    _at,
    _barriers,
    _finish_rows,
    _full_end,
    _kv_range,
    _load_kv,
    _load_terms,
    _mask_tile,
    _natural,
    _number,
    _parts,
    _produce,
    _rescale,
    _rescale_parts,
    _ring,
    _row_sums,
    _row_units,
    _score,
    _steps,
    _sync,
)

TRANSPOSERS = gl.constexpr(64)  # threads
RAW_EMPTY = gl.constexpr(12)  # and 13, hardware barriers: they have read a tile of V as it comes
SHIFT = gl.constexpr(8.0)  # weights are at most 2^SHIFT; e4m3 ends at 448


@gluon.constexpr_function
def _swizzle(at: str, width: int) -> str:
    """Of a place in a tile of rows of `width` bytes, the one in shared memory."""
    return f"shr.u32 x, {at}, 3; and.b32 x, x, {width - 16}; xor.b32 {at}, {at}, x;"


@gluon.constexpr_function
def _transpose_asm(keys: int, columns: int) -> str:
    """V [keys, columns] -> [columns, keys], bytes; the warps have half of the keys each.

    A step takes 16 keys of 32 columns. ldmatrix exchanges pairs of columns with pairs of keys, whose bytes remain to be
    put in order: a thread has keys 2j, 2j + 1, 2j + 8 and 2j + 9 of two columns then, in V's order neighbours. Half of
    the threads store the second column first: a matrix of stmatrix has columns 0, 2, 4, 6, 9, 11, 13, 15 or the others,
    which lie in different banks.
    """
    lines = [
        "{",
        ".reg .pred lower;",
        ".reg .b32 lane, half, row, from, to, first, second, x, a<8>, b<8>;",
        "and.b32 lane, $1, 31;",
        "shr.u32 half, $1, 5;",
        # Where the lane's row of ldmatrix begins: of keys 0 to 7, 8 to 15, and the same of the next 16 columns.
        f"and.b32 row, lane, 15; mad.lo.u32 row, half, {keys // 2}, row;",
        f"shr.u32 x, lane, 4; shl.b32 x, x, 4; mad.lo.u32 from, row, {columns}, x;",
        f"{_swizzle('from', columns)} add.u32 from, from, $2;",
        # And that of stmatrix.
        "shr.u32 row, lane, 3; shr.u32 x, lane, 2; xor.b32 row, row, x; and.b32 row, row, 1;",
        "and.b32 x, lane, 7; mad.lo.u32 row, x, 2, row;",
        "shr.u32 x, lane, 4; mad.lo.u32 row, x, 16, row;",
        f"mul.lo.u32 to, row, {keys}; mad.lo.u32 to, half, {keys // 2}, to;",
        f"{_swizzle('to', keys)} add.u32 to, to, $3;",
        "setp.lt.u32 lower, lane, 16;",
        "selp.b32 first, 0x6420, 0x7531, lower;",
        "selp.b32 second, 0x7531, 0x6420, lower;",
    ]
    for column in range(0, columns, 32):
        for key in range(0, keys // 2, 32):
            for i in (0, 1):
                a = ", ".join(f"a{4 * i + j}" for j in range(4))
                at = f"x + {(key + 16 * i) * columns}"
                lines += [
                    f"xor.b32 x, from, {column};",
                    f"ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {{{a}}}, [{at}];",
                ]
            for i in (0, 1):
                a0, a1, a2, a3 = (f"a{4 * i + j}" for j in range(4))
                b = [f"b{4 * i + j}" for j in range(4)]
                lines += [
                    f"prmt.b32 {b[0]}, {a0}, {a1}, first; prmt.b32 {b[1]}, {a0}, {a1}, second;",
                    f"prmt.b32 {b[2]}, {a2}, {a3}, first; prmt.b32 {b[3]}, {a2}, {a3}, second;",
                    f"xor.b32 x, to, {key + 16 * i};",
                    f"stmatrix.sync.aligned.m8n8.x4.shared.b16 [x + {column * keys}], {{{', '.join(b)}}};",
                ]
    return "\n".join([*lines, "mov.u32 $0, 0;", "}"])


@gluon.jit
def _load_turned_values(descs, batch, head, row, it, full, smem, CONSUMERS: gl.constexpr):
    """Brings one tile of a V that is transposed."""
    SLOTS: gl.constexpr = smem[0].shape[0]
    slot = it % SLOTS
    if it >= SLOTS:
        _sync(V_EMPTY + slot, 128 * CONSUMERS + 32)
    bar = full.index(slot)
    mbarrier.expect(bar, _bytes(descs))
    for i in gl.static_range(len(descs)):
        tma_load(descs[i], [batch, head, i * descs[0].block_type.shape[2], row], bar, smem[i].index(slot))


@gluon.constexpr_function
def _bytes(descs) -> int:
    return sum(desc.type.block_type.nbytes for desc in descs)


@gluon.jit
def _load_raw_values(descs, batch, head, row, it, full, smem, CONSUMERS: gl.constexpr):
    """Brings one tile for those who transpose it."""
    _load_kv(descs, batch, head, row, it, full, smem, RAW_EMPTY, TRANSPOSERS + 32, smem[0].shape[0])


@gluon.jit
def _used(count):
    """count. What is carried over a loop and nothing but an inner loop's end comes from, triton 3.6 throws away."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [count], gl.int32, False, 1)


@gluon.jit
def _transpose(
    args, TURNED: gl.constexpr, BLOCK_N: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr,
    LEFT: gl.constexpr, RIGHT: gl.constexpr,
):  # fmt: skip
    """The warps that transpose V, unless it comes so."""
    v_descs, raw_at, v_at, raw_full, v_full, work, window, ranges = args
    m_tiles, q_heads = work[2:4]
    RAW_STAGES: gl.constexpr = raw_full.shape[0]
    thread = gl.arange(0, TRANSPOSERS, gl.BlockedLayout([1], [32], [2], [0]))
    it = 0
    steps = 0 if TURNED else _steps(work)
    number = 0 if TURNED else _number(0, work)
    for step in range(steps):
        m_tile = number % m_tiles
        flat = number // m_tiles
        number = _number(gl.minimum(step + 1, steps - 1), work)
        place = (flat // q_heads, flat % q_heads, m_tile * (CONSUMERS * ROWS))
        _, _, first, stop, _ = _kv_range(
            place, 0, work, window, ranges, 0, CONSUMERS, BLOCK_N, LEFT, RIGHT
        )  # fmt: skip
        for _ in range(_used(stop - first)):
            slot = it % STAGES
            raw_slot = it % RAW_STAGES
            mbarrier.wait(raw_full.index(raw_slot), (it // RAW_STAGES) & 1)
            if it >= STAGES:
                _sync(V_EMPTY + slot, 128 * CONSUMERS + TRANSPOSERS)
            for i in gl.static_range(len(raw_at)):
                gl.inline_asm_elementwise(
                    _transpose_asm(BLOCK_N, v_descs[i].block_type.shape[3]), "=r,r,r,r",
                    [
                        thread, raw_at[i] + raw_slot * v_descs[i].block_type.nbytes,
                        v_at[i] + slot * v_descs[i].block_type.nbytes,
                    ],
                    gl.int32, False, 1,
                )  # fmt: skip
            fence_async_shared()
            mbarrier.arrive(v_full.index(slot), count=1)
            _arrive(RAW_EMPTY + raw_slot, TRANSPOSERS + 32)
            it += 1


@gluon.jit
def _skip(it, count, k_full, v_full, FILLERS: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr):
    """Lets go of `count` KV tiles that only the other consumers' rows see, each not before it is there."""
    for _ in range(count):
        mbarrier.wait(k_full.index(it % STAGES), (it // STAGES) & 1)
        _arrive(K_EMPTY + it % STAGES, 128 * CONSUMERS + 32)
        mbarrier.wait(v_full.index(it % STAGES), (it // STAGES) & 1)
        _arrive(V_EMPTY + it % STAGES, 128 * CONSUMERS + FILLERS)
        it += 1
    return it


@gluon.jit
def _scales_of(scales, batch, head):
    """Where the scales of a head's blocks begin."""
    ptr, by_batch, by_head = scales
    return ptr + (batch.to(gl.int64) * by_batch + head * by_head)


@gluon.jit
def _reciprocal(x):
    return gl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=r,r", [x], gl.float32, True, 1)


@gluon.jit
def _softmax(s, m_i, scale, UNIT: gl.constexpr):
    """2^SHIFT times exp2 of the scaled scores less their running maximum, that maximum, and the factor for O so far."""
    m_new = gl.maximum(m_i, gl.max(s, 1) * (scale if UNIT is None else 1.0))
    # A row that has seen no key yet: exp2(-inf - 0) = 0 instead of exp2(-inf + inf) = NaN.
    base = gl.where(m_new == float("-inf"), 0.0, m_new)
    if UNIT is None:  # the scale differs from tile to tile, so the maximum is in units of log(2)
        return gl.exp2(s * scale - (base - SHIFT)[:, None]), m_new, gl.exp2(m_i - base)
    else:
        unit = _row_units(base, UNIT)
        return gl.exp2(s * unit[:, None] - (base * unit - SHIFT)[:, None]), m_new, gl.exp2(m_i * unit - base * unit)


@gluon.jit
def _operand(weights, layout: gl.constexpr):
    """float32 [M, N] -> e4m3, keys in V's order, as a matrix product's left operand.

    A thread holds columns 8j + 2c + e and is to hold 16h + 4c + 2i + e (j = 2h + i): its own, in another order.
    """
    p = weights.reshape([weights.shape[0], weights.shape[1] // 16, 2, 4, 2])
    p = gl.permute(p, (0, 1, 3, 2, 4)).reshape(weights.shape)
    p = gl.inline_asm_elementwise(
        """{ .reg .b16 low, high;
        cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;
        cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
        mov.b32 $0, {low, high}; }""",
        "=r,r,r,r,r", [p], gl.int8, True, 4,
    )  # fmt: skip
    return gl.convert_layout(p.to(gl.float8e4nv, bitcast=True), layout, assert_trivial=True)


@gluon.jit
def _add_product(o, factor, p, v, MORE: gl.constexpr):
    """o * factor + p @ v^T, v: [Dv, N]; MORE: another such product follows."""
    layout: gl.constexpr = o.type.layout
    p = gl.convert_layout(p, gl.DotOperandLayout(0, layout, 4), assert_trivial=True)
    zero = gl.zeros(o.shape, gl.float32, layout)
    pv = warpgroup_mma(p, v.permute((1, 0)), zero, use_acc=False, is_async=True)
    pv = warpgroup_mma_wait(0, [pv])
    o = _rescale(o, factor) + pv
    if MORE:
        # Waiting for nothing keeps the sum in front of the next product: else the registers of both are needed at once,
        # of which 3.6 KB spilled at 256 columns.
        o = warpgroup_mma_wait(0, [o])
    return o


@gluon.jit
def _kv_loop(
    o, l_i, m_i, now, it, tile, stop, place, scale, k_scales, v_scales, flip, tokens, q, k_smem, v_smem, k_full, v_full,
    operands, window,
    FILLERS: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr, MASKED: gl.constexpr, LEFT: gl.constexpr,
    RIGHT: gl.constexpr, LOAD: gl.constexpr, APPLY: gl.constexpr, UNIT: gl.constexpr, BLOCKS: gl.constexpr,
    s_layout: gl.constexpr, p_layout: gl.constexpr,
):  # fmt: skip
    """KV tiles tile - 1 down to stop.

    FILLERS threads fill V's ring. `now` holds the scales of K and V of the first, and of V of the one before. `tokens`,
    if there are any, holds the scales of the rows, and where those of the keys and of the values begin.
    """
    BLOCK_N: gl.constexpr = s_layout.instr_shape[1]
    zero = gl.zeros([ROWS, BLOCK_N], gl.float32, s_layout)
    for i in range(stop, tile):
        slot = it % STAGES
        phase = (it // STAGES) & 1
        at = tile - 1 - (i - stop)
        mbarrier.wait(k_full.index(slot), phase)
        s = _score(q, _at(k_smem, slot), zero)
        tile_scale = scale
        ratio = 1.0
        if BLOCKS:  # the next tile's are read in time
            k_scale, v_scale, v_before = now
            below = gl.maximum(at - 1, 0)
            now = (gl.load(k_scales + below), gl.load(v_scales + below), v_scale)
            tile_scale = scale * k_scale
            ratio = v_before * _reciprocal(v_scale)
        if APPLY is not None:
            terms = _load_terms(LOAD, operands, (), 0, place, at * BLOCK_N, window, s_layout, MASKED)
        s = warpgroup_mma_wait(0, [s])
        _arrive(K_EMPTY + slot, 128 * CONSUMERS + 32)
        if tokens is not None:
            of_q, k_ptr, v_ptr = tokens
            columns = at * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(0, s_layout))
            of_k = gl.load(k_ptr + columns, mask=columns < window[1], other=1.0)
            s = s * of_q[:, None] * of_k[None, :]
        elif not BLOCKS:
            if flip:
                s = 0.0 - s
        if APPLY is not None:
            s = APPLY(s, tile_scale, terms)
        if MASKED:
            s = _mask_tile(s, place[2], at * BLOCK_N, window, LEFT, RIGHT, s_layout)
        weights, m_i, alpha = _softmax(s, m_i, tile_scale, UNIT)
        l_i = _rescale(l_i, alpha) + _row_sums(weights)
        if tokens is not None:
            of_v = gl.load(v_ptr + columns, mask=columns < window[1], other=1.0)  # (only now, for the registers)
            weights = weights * of_v[None, :]
        p = _operand(weights, p_layout)
        if BLOCKS:
            alpha *= ratio  # O is in units of the tile's scale
        mbarrier.wait(v_full.index(slot), phase)
        v = _at(v_smem, slot)
        if len(o) == 1:
            o = (_add_product(o[0], alpha, p, v[0], False),)
        else:
            o = (_add_product(o[0], alpha, p, v[0], True), _add_product(o[1], alpha, p, v[1], False))
        _arrive(V_EMPTY + slot, 128 * CONSUMERS + FILLERS)
        it += 1
    return o, l_i, m_i, now, it


@gluon.jit
def _store(descs, o, smem, WG: gl.constexpr, CONSUMERS: gl.constexpr, batch, head, row):
    """Sends the parts of O off by TMA; one after the other, if there is shared memory for one only."""
    SLOTS: gl.constexpr = smem.shape[0] // CONSUMERS
    for i in gl.static_range(len(o)):
        own = smem.index(WG * SLOTS + i % SLOTS)
        own = reinterpret(own, descs[i].dtype, descs[i].block_type.shape, descs[i].layout)
        if i % SLOTS == 0:
            tma.store_wait(0)
        own.reshape([ROWS, o[i].shape[1]]).store(o[i].to(descs[i].dtype))
        fence_async_shared()
        tma_store(descs[i], [batch, head, row, i * descs[0].block_type.shape[3]], own)


@gluon.jit
def _transposed_ring(desc, STAGES: gl.constexpr):
    """Shared memory for STAGES tiles of one part of V, transposed."""
    shape: gl.constexpr = [1, 1, desc.block_type.shape[3], desc.block_type.shape[2]]
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for(shape, desc.dtype)
    return gl.allocate_shared_memory(desc.dtype, [STAGES] + shape, layout)


@gluon.jit
def _consume(
    args, WG: gl.constexpr, FILLERS: gl.constexpr, BLOCK_N: gl.constexpr, CONSUMERS: gl.constexpr,
    STAGES: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr, SINKS: gl.constexpr, LOAD: gl.constexpr,
    APPLY: gl.constexpr, OPEN_LOAD: gl.constexpr, OPEN_APPLY: gl.constexpr, UNIT: gl.constexpr,
    BLOCKS: gl.constexpr,
):  # fmt: skip
    """Consumer warp group number WG: its ROWS rows of every tile."""
    o_descs, lse_ptr, sinks_ptr, operands, q_smem, o_smem, k_smem, v_smem, q_full, q_empty, k_full, v_full = args[:12]
    work, window, ranges, scale, q_scales, q_by_block, k_scales, v_scales, of_tokens, out_scale_ptr = args[12:]
    m_tiles, q_heads, group = work[2:5]
    seqlen_q, seqlen_k, left, right = window
    DV: gl.constexpr = o_descs[0].block_type.shape[3]
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 32])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV, 32])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 4)
    rows_layout: gl.constexpr = gl.SliceLayout(1, s_layout)
    q = _at(q_smem, WG)
    it = 0
    steps = _steps(work)
    number = _number(0, work)
    for step in range(steps):
        m_tile = number % m_tiles
        flat = number // m_tiles
        number = _number(gl.minimum(step + 1, steps - 1), work)  # of the next one, in time
        batch = flat // q_heads
        head = flat % q_heads
        row0 = (m_tile * CONSUMERS + WG) * ROWS
        place = (batch, head, row0)
        first, stop, tile_first, tile_stop, _ = _kv_range(
            place, 0, work, window, ranges, WG, CONSUMERS, BLOCK_N, LEFT, RIGHT
        )  # fmt: skip
        it = _skip(it, tile_stop - stop, k_full, v_full, FILLERS, CONSUMERS, STAGES)

        block = gl.minimum(row0, seqlen_q - 1) // ROWS
        tile_scale = scale * gl.load(_scales_of(q_scales, batch, head) + block * q_by_block)
        of_k = _scales_of(k_scales, batch, head // group)
        of_v = _scales_of(v_scales, batch, head // group)
        flip = False
        if BLOCKS:
            v_scale = gl.load(of_v + (stop - 1))
            now = (gl.load(of_k + (stop - 1)), v_scale, v_scale)
        else:
            v_scale = gl.load(of_v)
            now = (v_scale, v_scale, v_scale)
            tile_scale *= gl.load(of_k)
            flip = tile_scale < 0.0
            tile_scale = gl.maximum(tile_scale, -tile_scale)
            tile_scale = gl.where(tile_scale == 0.0, 1e-30, tile_scale)  # -inf * 0 is NaN
        tokens = None
        if of_tokens is not None:
            q_ptr, k_ptr, v_ptr = of_tokens
            rows = gl.minimum(row0 + gl.arange(0, ROWS, rows_layout), seqlen_q - 1)
            kv_row = (flat // group).to(gl.int64) * seqlen_k
            tokens = (gl.load(q_ptr + flat.to(gl.int64) * seqlen_q + rows), k_ptr + kv_row, v_ptr + kv_row)
        m_i = gl.full([ROWS], float("-inf"), gl.float32, rows_layout)
        l_i = _row_sums(gl.zeros([ROWS, BLOCK_N], gl.float32, s_layout))
        if len(o_descs) == 1:
            o = (gl.zeros([ROWS, DV], gl.float32, o_layout),)
        else:
            DV2: gl.constexpr = o_descs[1].block_type.shape[3]
            o2_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV2, 32])
            o = (gl.zeros([ROWS, DV], gl.float32, o_layout), gl.zeros([ROWS, DV2], gl.float32, o2_layout))
        mbarrier.wait(q_full.index(WG), step & 1)

        # Downwards from the last: tiles at an edge, tiles in which nothing is hidden, tiles at the other edge.
        open_stop = gl.minimum(stop, seqlen_k // BLOCK_N)
        if RIGHT:
            open_stop = gl.minimum(open_stop, gl.maximum(gl.minimum(row0 + right + 1, seqlen_k), 0) // BLOCK_N)
        if ranges is not None:
            open_stop = gl.minimum(open_stop, _full_end(place, window, ranges, 3))
        open_stop = gl.maximum(open_stop, first)
        o, l_i, m_i, now, it = _kv_loop(
            o, l_i, m_i, now, it, stop, open_stop, place, tile_scale, of_k, of_v, flip, tokens,
            q, k_smem, v_smem, k_full, v_full, operands, window,
            FILLERS, CONSUMERS, STAGES, True, LEFT, RIGHT, LOAD, APPLY, UNIT, BLOCKS, s_layout, p_layout,
        )  # fmt: skip
        open_first = first
        if LEFT:
            low = gl.maximum(gl.minimum(row0 + ROWS, seqlen_q) - 1 - left, 0)
            open_first = gl.maximum(open_first, (low + BLOCK_N - 1) // BLOCK_N)
        if ranges is not None:
            open_first = gl.maximum(open_first, _full_end(place, window, ranges, 2))
        if LEFT or ranges is not None:
            open_first = gl.minimum(open_first, open_stop)
        o, l_i, m_i, now, it = _kv_loop(
            o, l_i, m_i, now, it, open_stop, open_first, place, tile_scale, of_k, of_v, flip, tokens,
            q, k_smem, v_smem, k_full, v_full, operands, window,
            FILLERS, CONSUMERS, STAGES, False, LEFT, RIGHT, OPEN_LOAD, OPEN_APPLY, UNIT, BLOCKS, s_layout, p_layout,
        )  # fmt: skip
        if LEFT or ranges is not None:
            o, l_i, m_i, now, it = _kv_loop(
                o, l_i, m_i, now, it, open_first, first, place, tile_scale, of_k, of_v, flip, tokens,
                q, k_smem, v_smem, k_full, v_full, operands, window,
                FILLERS, CONSUMERS, STAGES, True, LEFT, RIGHT, LOAD, APPLY, UNIT, BLOCKS, s_layout, p_layout,
            )  # fmt: skip
        mbarrier.arrive(q_empty.index(WG), count=1)
        it = _skip(it, first - tile_first, k_full, v_full, FILLERS, CONSUMERS, STAGES)

        top = _natural(m_i, 1.0, UNIT) - SHIFT * LN2
        factor = _finish_rows(l_i, top, sinks_ptr, lse_ptr, head, flat, row0, seqlen_q, SINKS, rows_layout)
        factor *= now[2]
        if out_scale_ptr is not None:
            factor *= gl.load(out_scale_ptr)
        o = _rescale_parts(o, factor)
        _store(o_descs, o, o_smem, WG, CONSUMERS, batch, head, row0)
    tma.store_wait(0)


@gluon.jit(
    do_not_specialize=["tiles", "m_tiles", "q_heads", "group", "seqlen_q", "seqlen_k", "left", "right", "q_by_block"],
    do_not_specialize_on_alignment=["sinks_ptr", "out_scale_ptr"],
)  # fmt: skip
def fp8_kernel(
    q_desc, q_desc2, k_desc, k_desc2, v_desc, v_desc2, o_desc, o_desc2, lse_ptr, order_ptr, sinks_ptr, ranges, operands,
    q_scales, q_by_block, k_scales, v_scales, tokens, out_scale_ptr, tiles, m_tiles, q_heads, group, seqlen_q, seqlen_k,
    left, right, scale,
    LEFT: gl.constexpr, RIGHT: gl.constexpr, LOAD: gl.constexpr, APPLY: gl.constexpr, OPEN_LOAD: gl.constexpr,
    OPEN_APPLY: gl.constexpr, UNIT: gl.constexpr, BLOCKS: gl.constexpr, CONSUMERS: gl.constexpr,
    STAGES: gl.constexpr, RAW_STAGES: gl.constexpr, CONSUMER_REGS: gl.constexpr, PRODUCER_REGS: gl.constexpr,
):  # fmt: skip
    """V is transposed, if RAW_STAGES is 0; else the kernel has so many tiles of it that it has not transposed yet."""
    BLOCK_N: gl.constexpr = k_desc.block_type.shape[2]
    TURNED: gl.constexpr = RAW_STAGES == 0
    FILLERS: gl.constexpr = 32 if TURNED else TRANSPOSERS.value
    LOAD_VALUES: gl.constexpr = _load_turned_values if TURNED else _load_raw_values
    q_descs = _parts(q_desc, q_desc2)
    k_descs = _parts(k_desc, k_desc2)
    v_descs = _parts(v_desc, v_desc2)
    o_descs = _parts(o_desc, o_desc2)
    q_smem = _ring(q_descs, CONSUMERS)
    k_smem = _ring(k_descs, STAGES)
    raw_at = ()
    v_at = ()
    if TURNED:
        o_smem = _ring((o_desc,), CONSUMERS * len(o_descs))[0]
        raw_smem = _ring(v_descs, STAGES)
        v_smem = raw_smem
    else:
        o_smem = _ring((o_desc,), CONSUMERS)[0]
        raw_smem = _ring(v_descs, RAW_STAGES)
        v_smem = ()
        for i in gl.static_range(len(v_descs)):
            v_smem = v_smem + (_transposed_ring(v_descs[i], STAGES),)
        _write_addresses(_kilobytes(q_smem + k_smem + raw_smem + v_smem + (o_smem,)))
        for i in gl.static_range(len(v_descs)):
            raw_at = raw_at + (_address(raw_smem[i]),)
            v_at = v_at + (_address(v_smem[i]),)
        thread_barrier()
    q_full = _barriers(CONSUMERS)
    q_empty = _barriers(CONSUMERS)
    k_full = _barriers(STAGES)
    v_full = _barriers(STAGES)
    raw_full = v_full
    if not TURNED:
        raw_full = _barriers(RAW_STAGES)
    fence_async_shared()

    work = (order_ptr, tiles, m_tiles, q_heads, group, None, 1)
    window = (seqlen_q, seqlen_k, left, right)
    produce = (
        q_descs, k_descs, v_descs, q_smem, k_smem, raw_smem, q_full, q_empty, k_full, raw_full, work, window, ranges,
        (),
    )  # fmt: skip
    consume = (
        o_descs, lse_ptr, sinks_ptr, operands, q_smem, o_smem, k_smem, v_smem, q_full, q_empty, k_full, v_full,
        work, window, ranges, scale, q_scales, q_by_block, k_scales, v_scales, tokens, out_scale_ptr,
    )  # fmt: skip
    SINKS: gl.constexpr = sinks_ptr is not None
    transpose = (v_descs, raw_at, v_at, raw_full, v_full, work, window, ranges)
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (_consume, (
                    consume, 0, FILLERS, BLOCK_N, CONSUMERS, STAGES, LEFT, RIGHT, SINKS, LOAD, APPLY, OPEN_LOAD,
                    OPEN_APPLY, UNIT, BLOCKS,
                )),
                (_consume, (
                    consume, 1, FILLERS, BLOCK_N, CONSUMERS, STAGES, LEFT, RIGHT, SINKS, LOAD, APPLY, OPEN_LOAD,
                    OPEN_APPLY, UNIT, BLOCKS,
                )),
                (_produce, (produce, LOAD_VALUES, BLOCK_N, CONSUMERS, STAGES, LEFT, RIGHT)),
                (_transpose, (transpose, TURNED, BLOCK_N, CONSUMERS, STAGES, LEFT, RIGHT)),
            ],
            [4, 1, 2],
            [CONSUMER_REGS, PRODUCER_REGS, PRODUCER_REGS],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_consume, (
                    consume, 0, FILLERS, BLOCK_N, CONSUMERS, STAGES, LEFT, RIGHT, SINKS, LOAD, APPLY, OPEN_LOAD,
                    OPEN_APPLY, UNIT, BLOCKS,
                )),
                (_consume, (
                    consume, 1, FILLERS, BLOCK_N, CONSUMERS, STAGES, LEFT, RIGHT, SINKS, LOAD, APPLY, OPEN_LOAD,
                    OPEN_APPLY, UNIT, BLOCKS,
                )),
                (_consume, (
                    consume, 2, FILLERS, BLOCK_N, CONSUMERS, STAGES, LEFT, RIGHT, SINKS, LOAD, APPLY, OPEN_LOAD,
                    OPEN_APPLY, UNIT, BLOCKS,
                )),
                (_produce, (produce, LOAD_VALUES, BLOCK_N, CONSUMERS, STAGES, LEFT, RIGHT)),
                (_transpose, (transpose, TURNED, BLOCK_N, CONSUMERS, STAGES, LEFT, RIGHT)),
            ],
            [4, 4, 1, 2],
            [CONSUMER_REGS, CONSUMER_REGS, PRODUCER_REGS, PRODUCER_REGS],
        )  # fmt: skip

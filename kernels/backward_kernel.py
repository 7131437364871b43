"""Attention backward on Hopper (sm_90a), BF16 and FP16, for a head_dim up to 128: the device code.

`backward.py` is its host side; a larger head_dim has `backward_wide_kernel.py`.

A CTA takes one tile of keys after another and walks the query tiles that see it, those of every query head of the
group. One producer warp brings K, V, Q, dO and the rows' statistics in by TMA. Both consumer warp groups compute the
scores the other way round, as K @ Q^T, so that P^T and dS^T are in registers what dV += P^T @ dO and dK += dS^T @ Q
have on their left; only dS goes through shared memory, for dQ = dS @ K, which is added up in float32 in global memory.
The algorithm is FlashAttention-3's (Shah et al., 2024, arXiv:2407.08608, appendix B.1), the specification
`reference.py`.

Consumers share the work by keys, 64 each.
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

from fa3_inductor.kernels.compat import reinterpret, tma_add, tma_load, tma_store
from fa3_inductor.kernels.dropout import kept, key_of_head
from fa3_inductor.kernels.forward_kernel import ROWS, _arrive, _barriers, _mask, _ring, _sync, _tile
from fa3_inductor.kernels.sums import HEADS, WARPS, _count_up, _round, _wait_for_slot
from fa3_inductor.kernels.sums import STAGES as SUMS_STAGES

CONSUMERS = gl.constexpr(2)
THREADS = gl.constexpr(128 * 2 + 32)  # of consumers and producer

# Hardware barriers, as in the forward kernel.
ADDED = gl.constexpr(6)  # consumer 1 has added all of a tile to dQ
FINISHED = gl.constexpr(7)  # both consumers have read each other's dS
Q_EMPTY = gl.constexpr(8)  # and 9: one per stage
DO_EMPTY = gl.constexpr(10)  # and 11
EXCHANGE = gl.constexpr(12)  # to 15: a consumer's dS is there, of an even tile (12 and 13) and of an odd one


# Tiles of keys are numbered. The producer asks for the next one when it has brought what the last needs, and tells the
# consumers where that is by way of two slots in shared memory: batch, kv head, first key, and the first row of dQ's
# sums. It asks for the one after that only when the consumers are through with the keys of the last, and so have read
# where this is.
PLACE = gl.constexpr(4)  # numbers of a slot


@gluon.jit
def _count(work):
    """How many tiles of keys there are."""
    return work[0] * work[2]


@gluon.jit
def _hand_on(place, place_smem, place_full, step):
    """Tells the consumers where tile of keys number `step` of this CTA is; a negative batch is the end."""
    slot = step % 2
    zero = gl.full([1], 0, gl.int32, gl.BlockedLayout([1], [32], [1], [0]))
    for i in gl.static_range(PLACE):
        place_smem.index(slot * PLACE + i).store(zero + place[i])
    mbarrier.arrive(place_full.index(slot), count=1)


@gluon.jit
def _read(place_smem, step, WHICH: gl.constexpr):
    """A number that was handed on and is there."""
    return gl.max(place_smem.index(step % 2 * PLACE + WHICH).load(gl.BlockedLayout([1], [32], [4], [0])), 0)


@gluon.jit
def _is_there(place_smem, place_full, step):
    """Waits to be told of a tile of keys; whether there is one."""
    mbarrier.wait(place_full.index(step % 2), (step // 2) & 1)
    return _read(place_smem, step, 0) >= 0


@gluon.jit
def _place(number, work, KEYS: gl.constexpr):
    """Batch, kv head and first key of a tile. Heads go in sections, within one all first tiles come first.

    Or all last ones, for sums in order: those who wait for another's are started after it.
    """
    n_tiles, kv_heads, heads, section, turns_ptr = work
    before = number // (section * n_tiles) * section
    width = gl.minimum(section, heads - before)
    rest = number - before * n_tiles
    flat = before + rest % width
    tile = rest // width
    if turns_ptr is not None:
        tile = n_tiles - 1 - tile
    return flat // kv_heads, flat % kv_heads, tile * KEYS


@gluon.jit
def _whole_place(number, work, ring, group, padded_q, KEYS: gl.constexpr):
    """What the producer hands on."""
    batch, kv_head, key0 = _place(number, work, KEYS)
    flat = batch * work[1] + kv_head
    if ring[0] is not None:
        flat = flat % ring[0]
    return batch, kv_head, key0, flat * group * padded_q


@gluon.jit
def _own_place(step, work, place_smem, group, padded_q, KEYS: gl.constexpr, PERSISTENT: gl.constexpr):
    """The same, of a consumer's tile. To be worked out again when it is needed again, for the registers."""
    if PERSISTENT:
        return (
            _read(place_smem, step, 0), _read(place_smem, step, 1), _read(place_smem, step, 2),
            _read(place_smem, step, 3),
        )  # fmt: skip
    else:
        return _whole_place(_opaque(gl.program_id(0)), work, (None,), group, padded_q, KEYS)


@gluon.jit
def _query_ranges(
    batch, head, key0, window, ranges, KEYS: gl.constexpr, BLOCK_M: gl.constexpr, LEFT: gl.constexpr,
    RIGHT: gl.constexpr,
):  # fmt: skip
    """The query tiles first ... stop - 1 that see any of the keys from key0 on, and open_first ... open_stop - 1 among
    them, in which nothing is hidden."""
    seqlen_q, seqlen_k, left, right = window
    first = 0
    open_first = 0
    if RIGHT:
        first = gl.maximum(key0 - right, 0) // BLOCK_M
        open_first = (gl.maximum(key0 + KEYS - 1 - right, 0) + BLOCK_M - 1) // BLOCK_M
    rows = seqlen_q
    if LEFT:
        rows = gl.minimum(rows, gl.maximum(gl.minimum(key0 + KEYS, seqlen_k) + left, 0))
    stop = (rows + BLOCK_M - 1) // BLOCK_M
    open_stop = stop
    if LEFT:
        open_stop = gl.maximum(key0 + left + 1, 0) // BLOCK_M
    if ranges is not None:
        ptr, by_batch, by_head, by_block = ranges
        at = ptr + (batch.to(gl.int64) * by_batch + head * by_head + key0 // KEYS * by_block) * 4
        first = gl.maximum(first, gl.load(at))
        stop = gl.minimum(stop, gl.load(at + 1))
        open_first = gl.maximum(open_first, gl.load(at + 2))
        open_stop = gl.minimum(open_stop, gl.load(at + 3))
    stop = gl.maximum(stop, first)
    if key0 + KEYS > seqlen_k:
        open_first = stop
    open_first = gl.minimum(gl.maximum(open_first, first), stop)
    open_stop = gl.minimum(gl.maximum(open_stop, open_first), stop)
    return first, open_first, open_stop, stop


# The order of dQ's sums. Each is over the tiles of keys that see its queries; of these every consumer adds its part.
# With `turns`, counts of how many did, they add one after the other: [heads of all batches, query tiles, 2 consumers],
# after one that nobody reads, each in the first of four integers, for TMA. The last keys come first: under a causal
# mask, their turn comes with the first queries that they see, so that nobody has to wait.


@gluon.jit
def _turn_of(
    flat, tile, key0, window, WHO: gl.constexpr, KEYS: gl.constexpr, BLOCK_M: gl.constexpr, RIGHT: gl.constexpr
):  # fmt: skip
    """Which count is that of a query tile, and what it is when it is the turn of the keys from key0 on."""
    seqlen_q, seqlen_k, left, right = window
    turn = (flat * ((seqlen_q + BLOCK_M - 1) // BLOCK_M) + tile) * 2 + WHO + 1
    last = (seqlen_k - 1) // KEYS
    if RIGHT:
        last = gl.minimum(last, (tile * BLOCK_M + BLOCK_M - 1 + right) // KEYS)
    return turn, last - key0 // KEYS


@gluon.jit
def _peek(turns_ptr, turn):
    """A count, for `_take_turn`: read early, it takes no time."""
    return gl.inline_asm_elementwise(
        "ld.relaxed.gpu.global.b32 $0, [$1];", "=r,l", [turns_ptr + turn * 4], gl.int32, False, 1
    )


@gluon.jit
def _one(turns_desc):
    """What a count is counted up by."""
    smem = gl.allocate_shared_memory(gl.int32, [4], turns_desc.layout)
    smem.store(gl.where(gl.arange(0, 4, gl.BlockedLayout([1], [32], [4], [0])) == 0, 1, 0))
    return smem


@gluon.jit
def _take_turn(turns_ptr, turn, number, count):
    """Waits until it is the turn of this number; `count` is what the count was before."""
    gl.inline_asm_elementwise(
        """{
        .reg .pred waits;
        .reg .b32 count;
        mov.b32 count, $3;
        bra TEST;
        AGAIN:
        ld.relaxed.gpu.global.b32 count, [$1];
        TEST:
        setp.ne.s32 waits, count, $2;
        @waits bra AGAIN;
        fence.proxy.async.global;
        mov.u32 $0, 0;
        }""",
        "=r,l,r,r", [turns_ptr + turn * 4, number, count], gl.int32, False, 1,
    )  # fmt: skip


@gluon.jit
def _pass_on(turns_desc, one_smem, turn, is_taken):
    """Counts up, if is_taken, once what this group had TMA add before has been added.

    (`tma.store_wait` waits for less: until shared memory has been read.) By TMA as well: with a `red` or `st` in its
    place ptxas spills 1 KB. (And to a place of its own if not: an H200 takes -4 for an illegal instruction.)
    """
    gl.inline_asm_elementwise("cp.async.bulk.wait_group 0; mov.u32 $0, $1;", "=r,r", [turn], gl.int32, False, 1)
    tma_add(turns_desc, [gl.where(is_taken, turn * 4, 0)], one_smem)


@gluon.jit
def _load_keys(k_desc, v_desc, place, k_smem, v_smem, full, empty, step):
    """Brings the tile of keys, 64 rows of K and V at a time, once the consumers have let go of the last."""
    batch, kv_head, key0 = place
    TILES: gl.constexpr = k_smem.shape[0]
    for i in gl.static_range(CONSUMERS):
        mbarrier.wait(empty.index(i), (step & 1) ^ 1)
    for i in gl.static_range(TILES):
        row = key0 + i * ROWS
        mbarrier.expect(full.index(i), k_desc.block_type.nbytes)
        tma_load(k_desc, [batch, kv_head, row, 0], full.index(i), k_smem.index(i))
        mbarrier.expect(full.index(TILES + i), v_desc.block_type.nbytes)
        tma_load(v_desc, [batch, kv_head, row, 0], full.index(TILES + i), v_smem.index(i))


@gluon.jit
def _load_queries(
    desc, row_desc, place, at, it, full, smem, row_smem, EMPTY: gl.constexpr, STAGES: gl.constexpr
):  # fmt: skip
    """Brings a tile of Q or dO and a statistic of its rows into slot it % STAGES, once that is free."""
    batch, head, row = place
    slot = it % STAGES
    if it >= STAGES:
        _sync(EMPTY + slot, THREADS)
    bar = full.index(slot)
    mbarrier.expect(bar, desc.block_type.nbytes + row_desc.block_type.nbytes)
    tma_load(desc, [batch, head, row, 0], bar, smem.index(slot))
    tma_load(row_desc, [at + row], bar, row_smem.index(slot))


@gluon.jit
def _produce(
    args, BLOCK_M: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr, DO_STAGES: gl.constexpr,
    LEFT: gl.constexpr, RIGHT: gl.constexpr, PERSISTENT: gl.constexpr,
):  # fmt: skip
    """The producer warp."""
    q_desc, do_desc, k_desc, v_desc, lse_desc, delta_desc, smem, bars, work, window, ranges, group, padded_q = args[:13]
    counts_ptr, ring, place_smem = args[13:]
    q_smem, do_smem, k_smem, v_smem, lse_smem, delta_smem = smem
    q_full, do_full, kv_full, kv_empty, place_full = bars
    it = 0
    step = 0
    q_heads = work[1] * group
    number = gl.program_id(0)
    if PERSISTENT:
        number = gl.atomic_add(counts_ptr, 1, sem="relaxed")
    while number < _count(work):
        batch, kv_head, key0, sums_row = _whole_place(number, work, ring, group, padded_q, KEYS)
        if PERSISTENT:
            _hand_on((batch, kv_head, key0, sums_row), place_smem, place_full, step)
        _wait_for_slot(ring, batch * work[1] + kv_head)
        keys = (k_desc, v_desc, (batch, kv_head, key0), k_smem, v_smem, kv_full, kv_empty, step)
        missing = True  # the keys: from the second tile on, the first queries have a place before they do
        if not PERSISTENT:
            _load_keys(*keys)
        for head in range(kv_head * group, (kv_head + 1) * group):
            at = (batch * q_heads + head) * padded_q
            first, _, _, stop = _query_ranges(batch, head, key0, window, ranges, KEYS, BLOCK_M, LEFT, RIGHT)
            for tile in range(first, stop):
                place = (batch, head, tile * BLOCK_M)
                _load_queries(q_desc, lse_desc, place, at, it, q_full, q_smem, lse_smem, Q_EMPTY, STAGES)
                if PERSISTENT:
                    if missing:
                        _load_keys(*keys)
                    missing = False
                _load_queries(do_desc, delta_desc, place, at, it, do_full, do_smem, delta_smem, DO_EMPTY, DO_STAGES)
                it += 1
        if PERSISTENT:
            if missing:
                _load_keys(*keys)
            number = gl.atomic_add(counts_ptr, 1, sem="relaxed")
            step += 1
        else:
            number = _count(work)
    if PERSISTENT:
        _hand_on((-1, 0, 0, 0), place_smem, place_full, step)


@gluon.jit
def _opaque(x):
    """x, as a value that LLVM knows nothing of. What is worked out from it in a loop stays in the loop.

    Descriptors of fixed tiles would be worked out before it, one by one, and spilled. (With dQ's operands treated the
    same there is nothing spilled at all, but at head_dim 128, 4096 positions, 476 TFLOP/s in place of 565 on an H100.)
    """
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], gl.int32, False, 1)


@gluon.jit
def _half(smem, WHICH: gl.constexpr):
    HALF: gl.constexpr = smem.shape[1] // 2
    return smem.slice(WHICH * HALF, HALF, 1)


@gluon.jit
def _minus(columns, zero):
    """-columns in every row, in registers of its own: for what LLVM copies after a fence, ptxas waits (C7517)."""
    x = zero + columns[None, :]
    return gl.inline_asm_elementwise("neg.f32 $0, $1;", "=r,r", [x], gl.float32, False, 1)


@gluon.jit
def _mask_tile(s, keys, row0, window, LEFT: gl.constexpr, RIGHT: gl.constexpr, s_layout: gl.constexpr):
    """-inf where a key is past the end, or the window hides it from the query: [keys, queries from row0 on]."""
    seqlen_q, seqlen_k, left, right = window
    low = keys - row0
    if RIGHT:
        low = low - right
    high = low * 0 + s.shape[1]
    if LEFT:
        high = keys + (left + 1 - row0)
    return _mask(s, low, gl.where(keys < seqlen_k, high, 0), RIGHT, s_layout)


@gluon.jit
def _dq_operands(ds_smem, k_smem, side, OF: gl.constexpr, WG: gl.constexpr, BLOCK_M: gl.constexpr):
    """dS^T and K of consumer OF's keys: as much of them as consumer WG's part of dQ needs."""
    ds = _tile(ds_smem[OF], side)
    k = _tile(k_smem, OF)
    if BLOCK_M == 128:
        return _half(ds, WG), k
    else:
        return ds, _half(k, WG)


@gluon.jit
def _query_loop(
    dk, dv, it, head_first, first, stop, place, scale, grad_scale, smem, bars, window, dq_desc, ds_desc, turns,
    operands, random,
    WG: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr, DO_STAGES: gl.constexpr, MASKED: gl.constexpr,
    LEFT: gl.constexpr, RIGHT: gl.constexpr, LOAD: gl.constexpr, APPLY: gl.constexpr, CAPPED: gl.constexpr,
    DROPOUT: gl.constexpr, s_layout: gl.constexpr,
):  # fmt: skip
    """Query tiles first to stop - 1, those of a head beginning at head_first."""
    q_smem, do_smem, k_smem, v_smem, ds_smem, dq_smem, lse_smem, delta_smem = smem
    q_full, do_full = bars
    batch, head, head_row, key0 = place
    seqlen_q, seqlen_k, left, right = window
    dtype: gl.constexpr = k_smem.dtype
    D: gl.constexpr = k_smem.shape[4]
    DQ_ROWS: gl.constexpr = 64
    DQ_COLUMNS: gl.constexpr = D if BLOCK_M == 128 else D // 2
    dq_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DQ_COLUMNS, 16])
    dv_operand: gl.constexpr = gl.DotOperandLayout(0, dv.type.layout, 2)
    dk_operand: gl.constexpr = gl.DotOperandLayout(0, dk.type.layout, 2)
    columns_layout: gl.constexpr = gl.SliceLayout(0, s_layout)
    zero = gl.zeros([ROWS, BLOCK_M], gl.float32, s_layout)
    keys = key0 + gl.arange(0, ROWS, gl.SliceLayout(1, s_layout))
    dq_zero = gl.zeros([DQ_ROWS, DQ_COLUMNS], gl.float32, dq_layout)
    for tile in range(first, stop):
        row0 = tile * BLOCK_M
        slot = it % STAGES
        do_slot = it % DO_STAGES
        q = _tile(q_smem, slot)
        do = _tile(do_smem, do_slot)
        if turns[0] is not None:
            turns_ptr, turns_desc, one_smem, flat, tile_key0, KEYS = turns
            turn, _ = _turn_of(flat, tile, tile_key0, window, WG, KEYS, BLOCK_M, RIGHT)
            count = _peek(turns_ptr, turn)
        mbarrier.wait(q_full.index(slot), (it // STAGES) & 1)
        mbarrier.wait(do_full.index(do_slot), (it // DO_STAGES) & 1)
        # Both start from what is to be added and subtracted, which then takes no registers while these are short.
        dp = zero
        if not DROPOUT:
            dp = _minus(delta_smem.index(do_slot).load(columns_layout), zero)
        s = zero
        queries = row0 + gl.arange(0, BLOCK_M, columns_layout)
        if not CAPPED:
            s = _minus(lse_smem.index(slot).load(columns_layout), zero)
            if APPLY is not None:
                terms = LOAD(operands, batch, head, queries, keys, seqlen_q, seqlen_k, MASKED)
                s = APPLY(s, 1.0 / grad_scale, terms)[0]
        s = warpgroup_mma(_tile(k_smem, _opaque(WG)), q.permute((1, 0)), s, is_async=True)
        dp = warpgroup_mma(_tile(v_smem, _opaque(WG)), do.permute((1, 0)), dp, is_async=True)
        if APPLY is None and not DROPOUT:
            s = warpgroup_mma_wait(1, [s])
        else:  # short of registers
            s, dp = warpgroup_mma_wait(0, [s, dp])
        # Without a causal mask, those who wait are many: at head_dim 128, full, 1024 / 4096 / 16384 positions, an H200
        # has 384/473/538 TFLOP/s with the turn passed on here, and 365/458/532 with that after dQ; causal, 292/443/510
        # and 306/461/530.
        if turns[0] is not None and not RIGHT:
            _pass_on(turns_desc, one_smem, turn - 2, tile > head_first)
        if CAPPED:
            terms = LOAD(operands, batch, head, queries, keys, seqlen_q, seqlen_k, MASKED)
            s, slope = APPLY(s, scale, terms)
            if not DROPOUT:  # at once, for the registers
                dp = dp * slope
        if MASKED:
            s = _mask_tile(s, keys, row0, window, LEFT, RIGHT, s_layout)
        if CAPPED:
            p = gl.exp2(s - lse_smem.index(slot).load(columns_layout)[None, :])
        else:
            p = gl.exp2(s * scale)
        if APPLY is None and not DROPOUT:
            dp = warpgroup_mma_wait(0, [dp])
        if DROPOUT:
            keep = kept(keys, queries, random[:3], True, s_layout)
            dp = gl.where(keep, dp * random[3], 0.0) - delta_smem.index(do_slot).load(columns_layout)[None, :]
            dscores = p * dp
            p = gl.where(keep, p, 0.0)
        else:
            dscores = p * dp
        if CAPPED and DROPOUT:
            dscores = dscores * slope
        p16 = gl.convert_layout(p.to(dtype), dv_operand, assert_trivial=True)
        ds16 = dscores.to(dtype)
        side = it % 2
        _tile(ds_smem[WG], side).store(ds16)
        fence_async_shared()
        exchange = EXCHANGE + side * CONSUMERS
        _arrive(exchange + WG, 256)
        dv = warpgroup_mma(p16, do, dv, is_async=True)
        # What needs nothing of the other consumer first: its dS may not be there yet. With one barrier for both before
        # dQ, and dK last, an H100 had 452 TFLOP/s in place of 491 (head_dim 64, 4096 positions, full).
        ds, k = _dq_operands(ds_smem, k_smem, side, WG, WG, BLOCK_M)
        dq = warpgroup_mma(ds.permute((1, 0)), k, dq_zero, use_acc=False, is_async=True)
        ds16 = gl.convert_layout(ds16, dk_operand, assert_trivial=True)
        dk = warpgroup_mma(ds16, q, dk, is_async=True)
        _sync(exchange + (1 - WG), 256)
        ds, k = _dq_operands(ds_smem, k_smem, side, 1 - WG, WG, BLOCK_M)
        dq = warpgroup_mma(ds.permute((1, 0)), k, dq, is_async=True)
        dv, p16 = warpgroup_mma_wait(3, [dv, p16])
        _arrive(DO_EMPTY + do_slot, THREADS)
        if ds_desc is not None:
            tma_store(ds_desc, [batch, head, key0, row0], ds_smem[WG].index(side))
        dk, ds16 = warpgroup_mma_wait(1, [dk, ds16])
        _arrive(Q_EMPTY + slot, THREADS)
        dq = warpgroup_mma_wait(0, [dq])
        if turns[0] is not None:
            # (Worked out again, for the registers.)
            turn, number = _turn_of(flat, _opaque(tile), tile_key0, window, WG, KEYS, BLOCK_M, RIGHT)
            if RIGHT:
                _pass_on(turns_desc, one_smem, turn - 2, tile > head_first)
        tma.store_wait(0)
        dq_smem.index(WG).store(dq)
        fence_async_shared()
        if turns[0] is not None:
            _take_turn(turns_ptr, turn, number, count)
        if BLOCK_M == 128:
            tma_add(dq_desc, [head_row + row0 + WG * DQ_ROWS, 0], dq_smem.index(WG))
        else:
            tma_add(dq_desc, [head_row + row0, WG * DQ_COLUMNS], dq_smem.index(WG))
        it += 1
    return dk, dv, it


@gluon.jit
def _work_on(
    step, it, args, WG: gl.constexpr, BLOCK_M: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr,
    DO_STAGES: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr, LOAD: gl.constexpr, APPLY: gl.constexpr,
    OPEN_LOAD: gl.constexpr, OPEN_APPLY: gl.constexpr, CAPPED: gl.constexpr, DROPOUT: gl.constexpr,
    PERSISTENT: gl.constexpr,
):  # fmt: skip
    """Tile of keys number `step` of this CTA, of consumer warp group number WG."""
    dq_desc, ds_desc, dk_desc, dv_desc, operands, smem, bars, work, window, ranges, group = args[:11]
    scale, grad_scale, dropout, turns_ptr, turns_desc, one_smem, place_smem, padded_q = args[11:]
    seed_ptr, threshold, keep_scale = dropout
    ds_smem, dq_smem = smem[4:6]
    q_full, do_full, kv_full, kv_empty, place_full = bars
    seqlen_q, seqlen_k, left, right = window
    dtype: gl.constexpr = dk_desc.dtype
    D: gl.constexpr = dk_desc.block_type.shape[3]
    DV: gl.constexpr = dv_desc.block_type.shape[3]
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    dk_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    dv_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV, 16])
    loop_bars = (q_full, do_full)
    batch, kv_head, tile_key0, sums_row = _own_place(step, work, place_smem, group, padded_q, KEYS, PERSISTENT)
    key0 = tile_key0 + WG * ROWS
    dk = gl.zeros([ROWS, D], gl.float32, dk_layout)
    dv = gl.zeros([ROWS, DV], gl.float32, dv_layout)
    for i in gl.static_range(2 * CONSUMERS):
        mbarrier.wait(kv_full.index(i), step & 1)
    for head in range(kv_head * group, (kv_head + 1) * group):
        flat = batch * (work[1] * group) + head
        place = (batch, head, sums_row, key0)
        sums_row += padded_q
        random = (0, 0, 0, 0.0)
        if DROPOUT:
            key, salt = key_of_head(seed_ptr, flat)
            random = (key, salt, threshold, keep_scale)
        turns = (turns_ptr, turns_desc, one_smem, flat, tile_key0, KEYS)
        first, open_first, open_stop, stop = _query_ranges(
            batch, head, tile_key0, window, ranges, KEYS, BLOCK_M, LEFT, RIGHT
        )
        # Upwards from the first: tiles at an edge, tiles in which nothing is hidden, tiles at the other edge.
        dk, dv, it = _query_loop(
            dk, dv, it, first, first, open_first, place, scale, grad_scale, smem, loop_bars, window,
            dq_desc, ds_desc, turns, operands, random,
            WG, BLOCK_M, STAGES, DO_STAGES, True, LEFT, RIGHT, LOAD, APPLY, CAPPED, DROPOUT, s_layout,
        )  # fmt: skip
        dk, dv, it = _query_loop(
            dk, dv, it, first, open_first, open_stop, place, scale, grad_scale, smem, loop_bars, window,
            dq_desc, ds_desc, turns, operands, random,
            WG, BLOCK_M, STAGES, DO_STAGES, False, LEFT, RIGHT, OPEN_LOAD, OPEN_APPLY, CAPPED, DROPOUT, s_layout,
        )  # fmt: skip
        if LEFT or ranges is not None:
            dk, dv, it = _query_loop(
                dk, dv, it, first, open_stop, stop, place, scale, grad_scale, smem, loop_bars, window,
                dq_desc, ds_desc, turns, operands, random,
                WG, BLOCK_M, STAGES, DO_STAGES, True, LEFT, RIGHT, LOAD, APPLY, CAPPED, DROPOUT, s_layout,
            )  # fmt: skip
        if turns_ptr is not None:
            turn, _ = _turn_of(turns[3], stop - 1, tile_key0, window, WG, KEYS, BLOCK_M, RIGHT)
            _pass_on(turns_desc, one_smem, turn, stop > first)

    # Out by way of dQ's shared memory and, once the other consumer has read it too, of dS's.
    batch, kv_head, tile_key0, _ = _own_place(step, work, place_smem, group, padded_q, KEYS, PERSISTENT)
    flat = batch * work[1] + kv_head
    if PERSISTENT:
        mbarrier.arrive(kv_empty.index(WG), count=1)
    key0 = tile_key0 + WG * ROWS
    tma.store_wait(0)
    dk_smem = reinterpret(dq_smem.index(WG), dk_desc.dtype, dk_desc.block_type.shape, dk_desc.layout)
    dk_smem.reshape([ROWS, D]).store((dk * grad_scale).to(dtype))
    fence_async_shared()
    tma_store(dk_desc, [batch, kv_head, key0, 0], dk_smem)
    _sync(FINISHED, 256)
    if DROPOUT:
        dv = dv * keep_scale
    dv_smem = reinterpret(ds_smem[WG], dv_desc.dtype, dv_desc.block_type.shape, dv_desc.layout)
    dv_smem.reshape([ROWS, DV]).store(dv.to(dtype))
    fence_async_shared()
    tma_store(dv_desc, [batch, kv_head, key0, 0], dv_smem)
    return it, flat


@gluon.jit
def _added(ring, head, WG: gl.constexpr):
    """Counts a tile of keys that both consumers have added to a kv head's dQ, once that is in memory.

    (All but what was stored last, dK and dV. `tma.store_wait` waits for less: until shared memory has been read.)
    """
    gl.inline_asm_elementwise("cp.async.bulk.wait_group 2; mov.u32 $0, 0;", "=r", [], gl.int32, False, 1)
    if WG == 0:
        _sync(ADDED, 256)
        _count_up(ring[2] + HEADS + head, 4)
    else:
        _arrive(ADDED, 256)


@gluon.jit
def _consume(
    args, queue, WG: gl.constexpr, BLOCK_M: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr,
    DO_STAGES: gl.constexpr,
    LEFT: gl.constexpr, RIGHT: gl.constexpr, LOAD: gl.constexpr, APPLY: gl.constexpr,
    OPEN_LOAD: gl.constexpr, OPEN_APPLY: gl.constexpr, CAPPED: gl.constexpr, DROPOUT: gl.constexpr,
    PERSISTENT: gl.constexpr,
):  # fmt: skip
    """Consumer warp group number WG."""
    place_smem, place_full, ring = queue
    it = 0
    step = 0
    if PERSISTENT:
        while _is_there(place_smem, place_full, step):
            it, head = _work_on(
                step, it, args, WG, BLOCK_M, KEYS, STAGES, DO_STAGES, LEFT, RIGHT, LOAD, APPLY, OPEN_LOAD,
                OPEN_APPLY, CAPPED, DROPOUT, PERSISTENT,
            )  # fmt: skip
            step += 1
            if ring[0] is not None:
                _added(ring, head, WG)
            tma.store_wait(0)
    else:
        _work_on(
            step, it, args, WG, BLOCK_M, KEYS, STAGES, DO_STAGES, LEFT, RIGHT, LOAD, APPLY, OPEN_LOAD,
            OPEN_APPLY, CAPPED, DROPOUT, PERSISTENT,
        )  # fmt: skip
        tma.store_wait(0)


@gluon.jit(
    do_not_specialize=[
        "n_tiles", "kv_heads", "heads", "section", "group", "padded_q", "seqlen_q", "seqlen_k", "left", "right",
        "threshold", "slots", "columns", "dq_batch", "dq_head", "dq_row",
    ],
    do_not_specialize_on_alignment=["seed_ptr"],
)  # fmt: skip
def backward_kernel(
    q_desc, do_desc, k_desc, v_desc, lse_desc, delta_desc, dq_desc, ds_desc, dk_desc, dv_desc, ranges, operands,
    n_tiles, kv_heads, heads, section, group, padded_q, seqlen_q, seqlen_k, left, right, scale, grad_scale,
    seed_ptr, threshold, keep_scale, turns_ptr, turns_desc, counts_ptr, slots, boxes_desc, sums_ptr,
    columns, dq_ptr, dq_batch, dq_head, dq_row,
    LEFT: gl.constexpr, RIGHT: gl.constexpr, LOAD: gl.constexpr, APPLY: gl.constexpr, OPEN_LOAD: gl.constexpr,
    OPEN_APPLY: gl.constexpr, CAPPED: gl.constexpr, PERSISTENT: gl.constexpr, STAGES: gl.constexpr,
    DO_STAGES: gl.constexpr,
):  # fmt: skip
    BLOCK_M: gl.constexpr = q_desc.block_type.shape[2]
    KEYS: gl.constexpr = 2 * ROWS
    dtype: gl.constexpr = q_desc.dtype
    q_smem = _ring((q_desc,), STAGES)[0]
    do_smem = _ring((do_desc,), DO_STAGES)[0]
    k_smem = _ring((k_desc,), CONSUMERS)[0]
    v_smem = _ring((v_desc,), CONSUMERS)[0]
    ds_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([1, 1, ROWS, BLOCK_M], dtype)
    ds_smem = (
        gl.allocate_shared_memory(dtype, [2, 1, 1, ROWS, BLOCK_M], ds_layout),
        gl.allocate_shared_memory(dtype, [2, 1, 1, ROWS, BLOCK_M], ds_layout),
    )
    dq_smem = gl.allocate_shared_memory(gl.float32, [CONSUMERS] + dq_desc.block_type.shape, dq_desc.layout)
    lse_smem = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], lse_desc.layout)
    delta_smem = gl.allocate_shared_memory(gl.float32, [DO_STAGES, BLOCK_M], lse_desc.layout)
    q_full = _barriers(STAGES)
    do_full = _barriers(DO_STAGES)
    kv_full = _barriers(2 * CONSUMERS)
    kv_empty = _barriers(CONSUMERS)
    place_full = _barriers(2)
    place_smem = gl.allocate_shared_memory(gl.int32, [2 * PLACE, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    one_smem = lse_smem  # (of no use)
    if turns_ptr is not None:
        one_smem = _one(turns_desc)
    WIDTH: gl.constexpr = k_desc.block_type.shape[3]
    ring = (slots,)
    sums_smem = dq_smem  # (of no use)
    sums_there = place_full
    if slots is not None:
        ring = (
            slots, boxes_desc, counts_ptr, sums_ptr, columns, dq_ptr, dq_batch, dq_head, dq_row, heads, n_tiles,
            kv_heads, group, padded_q, seqlen_q, grad_scale,
        )  # fmt: skip
        sums_smem = gl.allocate_shared_memory(
            gl.float32, [SUMS_STAGES] + boxes_desc.block_type.shape, boxes_desc.layout
        )
        sums_there = _barriers(SUMS_STAGES)
    fence_async_shared()

    work = (n_tiles, kv_heads, heads, section, turns_ptr)
    window = (seqlen_q, seqlen_k, left, right)
    bars = (q_full, do_full, kv_full, kv_empty, place_full)
    produce = (
        q_desc, do_desc, k_desc, v_desc, lse_desc, delta_desc,
        (q_smem, do_smem, k_smem, v_smem, lse_smem, delta_smem), bars, work, window, ranges, group, padded_q,
        counts_ptr, ring, place_smem,
    )  # fmt: skip
    consume = (
        dq_desc, ds_desc, dk_desc, dv_desc, operands,
        (q_smem, do_smem, k_smem, v_smem, ds_smem, dq_smem, lse_smem, delta_smem), bars, work, window, ranges, group,
        scale, grad_scale, (seed_ptr, threshold, keep_scale), turns_ptr, turns_desc, one_smem, place_smem,
        padded_q,
    )  # fmt: skip
    queue = (place_smem, place_full, ring)
    DROPOUT: gl.constexpr = seed_ptr is not None
    gl.warp_specialize(
        [
            (_consume, (
                consume, queue, 0, BLOCK_M, KEYS, STAGES, DO_STAGES, LEFT, RIGHT, LOAD, APPLY, OPEN_LOAD, OPEN_APPLY,
                CAPPED, DROPOUT, PERSISTENT,
            )),
            (_consume, (
                consume, queue, 1, BLOCK_M, KEYS, STAGES, DO_STAGES, LEFT, RIGHT, LOAD, APPLY, OPEN_LOAD, OPEN_APPLY,
                CAPPED, DROPOUT, PERSISTENT,
            )),
            (_produce, (produce, BLOCK_M, KEYS, STAGES, DO_STAGES, LEFT, RIGHT, PERSISTENT)),
            (_round, (ring, sums_smem, sums_there, WIDTH)),
        ],
        [4, 1, WARPS],
        [240, 24, 24],
    )  # fmt: skip

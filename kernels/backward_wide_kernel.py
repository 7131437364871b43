"""Attention backward on Hopper (sm_90a) for a head_dim above 128: the device code. `backward.py` is its host side.

dK and dV of 64 keys are 128 registers per thread each, so one warp group cannot have both. As in `backward_kernel.py` a
CTA has one tile of keys (64 of them) and walks the query tiles that see it, but its two consumers have different roles
and nothing is computed twice. For query tile i

    consumer 0, weights    S^T = K @ Q^T, P^T = exp2(S^T), hands P^T to consumer 1, dV += P^T @ dO
    consumer 1, scores     dP^T = V @ dO^T, dS^T = P^T * dP^T, hands dS^T to both, dK += dS^T @ Q

and each has its columns of dQ = dS @ K, which lags by one tile:

    consumer 0                                        consumer 1
    issue S(i)                                        issue dP(i)
    wait for dS(i - 1), issue 1st part of dQ(i - 1)   issue 1st part of dQ(i - 1)
    S(i) is there: let go of Q(i) *                   dP(i) is there: let go of dO(i) *
    P(i), to shared memory, tell consumer 1           wait for P(i); dS(i), to shared memory, tell consumer 0
    issue dV += P(i) dO(i)                            issue dK += dS(i) Q(i)
    issue 2nd part of dQ(i - 1)                       issue 2nd part of dQ(i - 1)
    1st part of dQ(i - 1) to TMA, to be added         1st part of dQ(i - 1) to TMA
    dV is there: let go of dO(i) *                    dK is there: let go of Q(i) *
    2nd part of dQ(i - 1) to TMA                      2nd part of dQ(i - 1) to TMA

(* the producer waits for both.) So consumer 0 has S(i) under way before it needs dS(i - 1), and both have products in
flight during their arithmetic and their additions to dQ. The two hand-overs alternate strictly, P(0), dS(0), P(1),
dS(1), ..., and no buffer needs a barrier of its own to be free:

    P, one buffer      P(i) is written after dS(i - 1) was waited for, which was written after P(i - 1) was read.
    dS, two buffers    dS(i) is written after P(i) was waited for, which was written after consumer 0's dQ(i - 2), and
                       by then all of consumer 1 have come that far as well.

Both copies of P are in the layout of the same instruction, so thread t of consumer 1 reads what thread t of consumer 0
wrote, in float32, 16 bytes at a time and without bank conflicts.

Of 256 columns in shared memory, 192 may be in use. Then those of each product are two parts, of 128 and of 64, and
consumer 1 has two parts of dQ, consumer 0 one.
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

from fa3_inductor.kernels.backward_kernel import (
    CONSUMERS,
    DO_EMPTY,
    PLACE,
    Q_EMPTY,
    THREADS,
    _is_there,
    _mask_tile,
    _one,
    _opaque,
    _own_place,
    _pass_on,
    _peek,
    _produce,
    _query_ranges,
    _take_turn,
    _turn_of,
)
from fa3_inductor.kernels.compat import tma_add, tma_store
from fa3_inductor.kernels.dropout import kept, key_of_head
from fa3_inductor.kernels.forward_kernel import ROWS, _accumulate, _arrive, _barriers, _ring, _sync, _tile

WEIGHTS = gl.constexpr(0)  # the consumers
SCORES = gl.constexpr(1)

# Hardware barriers, beyond those of the ring buffers.
P_THERE = gl.constexpr(12)
DS_THERE = gl.constexpr(13)
TOGETHER = gl.constexpr(14)  # consumer 1 by itself

PIECE = gl.constexpr(64)  # columns of dQ of one matrix product


@gluon.constexpr_function
def _first_column(role):
    """Where a consumer's columns of dQ begin."""
    return 0 if role == 1 else 128


@gluon.constexpr_function
def _own_columns(role, columns):
    """How many there are."""
    return 128 if role == 1 else columns - 128


@gluon.jit
def _change_turns(turns, taken, turn, number, count):
    """Passes on the turn that was taken, if one was, and takes another, if it is one; all warps of a consumer do."""
    turns_ptr, turns_desc, one_smem = turns
    _pass_on(turns_desc, one_smem, taken, taken >= 0)
    if turn >= 0:
        _take_turn(turns_ptr, turn, number, count)


@gluon.jit
def _pieces(x):
    """The columns of x, PIECE at a time."""
    if x.shape[1] == PIECE:
        return (x,)
    else:
        low, high = gl.split(x.reshape([ROWS, 2, PIECE]).permute((0, 2, 1)))
        layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PIECE, 16])
        return (
            gl.convert_layout(low, layout, assert_trivial=True), gl.convert_layout(high, layout, assert_trivial=True)
        )  # fmt: skip


@gluon.jit
def _add(dq_desc, smem, row0, column0: gl.constexpr, x):
    """Has TMA add x to dQ from row0 and column0 on, if there is such a row: not if it is negative.

    The shared memory for it is that of a second tile of dO. Additions from registers, 16 bytes a thread, fill the load
    and store units' queue, and warps wait: at head_dim 256, 4096 positions, an H200 had 392 TFLOP/s, and two others 422
    and 432 with TMA.
    """
    pieces = _pieces(x)
    for i in gl.static_range(len(pieces)):
        tma.store_wait(0)
        smem.store(pieces[i])
        fence_async_shared()
        if row0 >= 0:
            tma_add(dq_desc, [row0, column0 + i * PIECE], smem)


@gluon.jit
def _cut(tile, COLUMNS: gl.constexpr):
    """The first COLUMNS of a tile: all, or in two parts."""
    if COLUMNS == tile.shape[1]:
        return (tile,)
    else:
        return (tile.slice(0, 128, 1), tile.slice(128, COLUMNS - 128, 1))


@gluon.jit
def _product(a, b, x, COLUMNS: gl.constexpr):
    """Issues x + A @ B^T over the first COLUMNS of both."""
    a_parts = _cut(a, COLUMNS)
    b_parts = _cut(b, COLUMNS)
    x = warpgroup_mma(a_parts[0], b_parts[0].permute((1, 0)), x, is_async=True)
    if len(a_parts) == 2:
        x = warpgroup_mma(a_parts[1], b_parts[1].permute((1, 0)), x, is_async=True)
    return x


@gluon.jit
def _wait(OUTSTANDING: gl.constexpr, acc, x16):
    """Waits for the products that all parts of acc come from; x16 is their left operand."""
    if len(acc) == 1:
        acc0, x16 = warpgroup_mma_wait(OUTSTANDING, [acc[0], x16])
        return (acc0,)
    else:
        acc0, acc1, x16 = warpgroup_mma_wait(OUTSTANDING, [acc[0], acc[1], x16])
        return (acc0, acc1)


@gluon.jit
def _zeros(COLUMNS: gl.constexpr):
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    return gl.zeros([ROWS, COLUMNS], gl.float32, layout)


@gluon.jit
def _dq(ds, k, COLUMN: gl.constexpr, zero):
    """Issues dS @ K for as many columns as zero has."""
    return warpgroup_mma(ds, k.slice(COLUMN, zero.shape[1], 1), zero, use_acc=False, is_async=True)


@gluon.jit
def _query_loop(
    acc, it, last_row, turn, number, taken, first, stop, place, scale, grad_scale, smem, bars, window, dq_desc, ds_desc,
    turns, operands, random,
    ROLE: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr, DO_STAGES: gl.constexpr, MASKED: gl.constexpr,
    LEFT: gl.constexpr, RIGHT: gl.constexpr, LOAD: gl.constexpr, APPLY: gl.constexpr, CAPPED: gl.constexpr,
    COLUMNS: gl.constexpr, COLUMNS_V: gl.constexpr, LATE: gl.constexpr, DROPOUT: gl.constexpr,
    s_layout: gl.constexpr,
):  # fmt: skip
    """Query tiles first to stop - 1. `last_row` is where the dQ begins that is still to be done, negative for none;
    `turn` its count and `number` what that is to be, `taken` the count of the turn that was taken and not passed on.

    LATE: all columns of dQ follow the second large product, for the registers; else half of them come before it.
    """
    q_smem, do_smem, k_smem, v_smem, p_smem, ds_smem, dq_smem, lse_smem, delta_smem = smem
    dq_smem = dq_smem.index(ROLE)
    q_full, do_full = bars
    batch, head, flat, head_row, key0 = place
    seqlen_q, seqlen_k, left, right = window
    dtype: gl.constexpr = k_smem.dtype
    COLUMN: gl.constexpr = _first_column(ROLE)
    OWN: gl.constexpr = _own_columns(ROLE, COLUMNS)
    operand: gl.constexpr = gl.DotOperandLayout(0, acc[0].type.layout, 2)
    columns_layout: gl.constexpr = gl.SliceLayout(0, s_layout)
    zero = gl.zeros([ROWS, BLOCK_M], gl.float32, s_layout)
    dq_zero = _zeros(OWN if LATE else PIECE)
    for tile in range(first, stop):
        row0 = _opaque(tile * BLOCK_M)
        k = _tile(k_smem, _opaque(0))
        v = _tile(v_smem, _opaque(0))
        keys = _opaque(key0) + gl.arange(0, ROWS, gl.SliceLayout(1, s_layout))
        if turns[0] is not None:
            count = _peek(turns[0], gl.maximum(turn, 0))
        slot = it % STAGES
        do_slot = it % DO_STAGES
        q = _tile(q_smem, slot)
        do = _tile(do_smem, _opaque(do_slot))
        queries = row0 + gl.arange(0, BLOCK_M, columns_layout)
        last_ds = _tile(ds_smem, (it + 1) % 2).permute((1, 0))
        # A product starts from what is to be added and subtracted, which then takes no registers while these are short.
        if ROLE == WEIGHTS:
            mbarrier.wait(q_full.index(slot), (it // STAGES) & 1)
            lse = lse_smem.index(slot).load(columns_layout)
            x = zero
            if not CAPPED:
                x = zero - lse[None, :]
                if APPLY is not None:
                    terms = LOAD(operands, batch, head, queries, keys, seqlen_q, seqlen_k, MASKED)
                    x = APPLY(x, 1.0 / grad_scale, terms)[0]
            x = _product(k, q, x, COLUMNS)
            _sync(DS_THERE, 256)
        else:
            mbarrier.wait(do_full.index(do_slot), (it // DO_STAGES) & 1)
            delta = delta_smem.index(do_slot).load(columns_layout)
            if DROPOUT:
                x = _product(v, do, zero, COLUMNS_V)
            else:
                x = _product(v, do, zero - delta[None, :], COLUMNS_V)
        if LATE:
            x = warpgroup_mma_wait(0, [x])
        else:
            dq = _dq(last_ds, k, COLUMN, dq_zero)
            x = warpgroup_mma_wait(1, [x])
        if ROLE == WEIGHTS:
            _arrive(Q_EMPTY + slot, THREADS)
            slope = 1.0
            if CAPPED:
                terms = LOAD(operands, batch, head, queries, keys, seqlen_q, seqlen_k, MASKED)
                x, slope = APPLY(x, scale, terms)
            if MASKED:
                x = _mask_tile(x, keys, row0, window, LEFT, RIGHT, s_layout)
            if CAPPED:
                x = gl.exp2(x - lse[None, :])
                p_smem.store(x * slope)
            else:
                x = gl.exp2(x * scale)
                p_smem.store(x)
            _arrive(P_THERE, 256)
            if DROPOUT:
                x = gl.where(kept(keys, queries, random[:3], True, s_layout), x, 0.0)
            x16 = x.to(dtype)
            mbarrier.wait(do_full.index(do_slot), (it // DO_STAGES) & 1)
        else:
            if DROPOUT:
                x = gl.where(kept(keys, queries, random[:3], True, s_layout), x * random[3], 0.0) - delta[None, :]
            _arrive(DO_EMPTY + do_slot, THREADS)
            _sync(P_THERE, 256)
            x16 = (p_smem.load(s_layout) * x).to(dtype)
            _tile(ds_smem, it % 2).store(x16)
            fence_async_shared()
            _arrive(DS_THERE, 256)
            _sync(TOGETHER, 128)
            if ds_desc is not None:
                tma_store(ds_desc, [batch, head, key0, row0], ds_smem.index(it % 2))
            mbarrier.wait(q_full.index(slot), (it // STAGES) & 1)
        x16 = gl.convert_layout(x16, operand, assert_trivial=True)
        if ROLE == WEIGHTS:
            acc = _accumulate(x16, _cut(do, COLUMNS_V), acc)
        else:
            acc = _accumulate(x16, _cut(q, COLUMNS), acc)
        if turns[0] is not None:
            _change_turns(turns, taken, turn, number, count)
            taken = turn
        if LATE:
            dq = _dq(last_ds, k, COLUMN, dq_zero)
            acc = _wait(1, acc, x16)
        elif OWN == 2 * PIECE:
            dq2 = _dq(last_ds, k, COLUMN + PIECE, dq_zero)
            dq = warpgroup_mma_wait(len(acc) + 1, [dq])
            _add(dq_desc, dq_smem, last_row, COLUMN, dq)
            acc = _wait(1, acc, x16)
        else:
            dq = warpgroup_mma_wait(len(acc), [dq])
            _add(dq_desc, dq_smem, last_row, COLUMN, dq)
            acc = _wait(0, acc, x16)
        if ROLE == WEIGHTS:
            _arrive(DO_EMPTY + do_slot, THREADS)
        else:
            _arrive(Q_EMPTY + slot, THREADS)
        if LATE:
            dq = warpgroup_mma_wait(0, [dq])
            _add(dq_desc, dq_smem, last_row, COLUMN, dq)
        elif OWN == 2 * PIECE:
            dq2 = warpgroup_mma_wait(0, [dq2])
            _add(dq_desc, dq_smem, last_row, COLUMN + PIECE, dq2)
        last_row = head_row + row0
        if turns[0] is not None:
            turn, number = _turn_of(flat, tile, key0, window, ROLE, ROWS, BLOCK_M, RIGHT)
        it += 1
    return acc, it, last_row, turn, number, taken


@gluon.jit
def _work_on(
    step, it, args, ROLE: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr,
    DO_STAGES: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr, LOAD: gl.constexpr, APPLY: gl.constexpr,
    OPEN_LOAD: gl.constexpr, OPEN_APPLY: gl.constexpr, CAPPED: gl.constexpr, COLUMNS: gl.constexpr,
    COLUMNS_V: gl.constexpr, LATE: gl.constexpr, DROPOUT: gl.constexpr, PERSISTENT: gl.constexpr,
):  # fmt: skip
    """Tile of keys number `step` of this CTA, of the consumer of that role."""
    dq_desc, ds_desc, out_desc, operands, smem, bars, work, window, ranges, group, padded_q = args[:11]
    scale, grad_scale, seed_ptr, threshold, keep_scale, turns, place_smem = args[11:]
    q_smem, do_smem, k_smem, v_smem, p_smem, ds_smem, dq_smem, lse_smem, delta_smem = smem
    q_full, do_full, kv_full, kv_empty, place_full = bars
    seqlen_q, seqlen_k, left, right = window
    dtype: gl.constexpr = out_desc.dtype
    COLUMN: gl.constexpr = _first_column(ROLE)
    OWN: gl.constexpr = _own_columns(ROLE, COLUMNS)
    OUT_COLUMNS: gl.constexpr = COLUMNS_V if ROLE == WEIGHTS else COLUMNS
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    loop_bars = (q_full, do_full)
    batch, kv_head, key0, sums_row = _own_place(step, work, place_smem, group, padded_q, ROWS, PERSISTENT)
    if OUT_COLUMNS == 192:
        acc = (_zeros(128), _zeros(64))
    else:
        acc = (_zeros(OUT_COLUMNS),)

    # Before the first tile there is the dQ of none: of what happens to be in the buffer, and added to no rows.
    last_row = -1
    turn = -1
    number = 0
    taken = -1
    if ROLE == SCORES:
        _arrive(DS_THERE, 256)
    mbarrier.wait(kv_full.index(0), step & 1)
    mbarrier.wait(kv_full.index(1), step & 1)
    for head in range(kv_head * group, (kv_head + 1) * group):
        flat = batch * (work[1] * group) + head
        place = (batch, head, flat, sums_row, key0)
        sums_row += padded_q
        random = (0, 0, 0, 0.0)
        if DROPOUT:
            key, salt = key_of_head(seed_ptr, flat)
            random = (key, salt, threshold, keep_scale)
        first, open_first, open_stop, stop = _query_ranges(
            batch, head, key0, window, ranges, ROWS, BLOCK_M, LEFT, RIGHT
        )
        # Upwards from the first: tiles at an edge, tiles in which nothing is hidden, tiles at the other edge.
        acc, it, last_row, turn, number, taken = _query_loop(
            acc, it, last_row, turn, number, taken, first, open_first, place, scale, grad_scale, smem, loop_bars,
            window, dq_desc, ds_desc, turns, operands, random, ROLE, BLOCK_M, STAGES, DO_STAGES, True, LEFT, RIGHT,
            LOAD, APPLY, CAPPED, COLUMNS, COLUMNS_V, LATE, DROPOUT, s_layout,
        )  # fmt: skip
        acc, it, last_row, turn, number, taken = _query_loop(
            acc, it, last_row, turn, number, taken, open_first, open_stop, place, scale, grad_scale, smem,
            loop_bars, window, dq_desc, ds_desc, turns, operands, random, ROLE, BLOCK_M, STAGES, DO_STAGES, False,
            LEFT, RIGHT, OPEN_LOAD, OPEN_APPLY, CAPPED, COLUMNS, COLUMNS_V, LATE, DROPOUT, s_layout,
        )  # fmt: skip
        if LEFT or ranges is not None:
            acc, it, last_row, turn, number, taken = _query_loop(
                acc, it, last_row, turn, number, taken, open_stop, stop, place, scale, grad_scale, smem, loop_bars,
                window, dq_desc, ds_desc, turns, operands, random, ROLE, BLOCK_M, STAGES, DO_STAGES, True, LEFT,
                RIGHT, LOAD, APPLY, CAPPED, COLUMNS, COLUMNS_V, LATE, DROPOUT, s_layout,
            )  # fmt: skip

    if ROLE == WEIGHTS:
        _sync(DS_THERE, 256)
    dq_zero = _zeros(OWN)
    dq = _dq(_tile(ds_smem, (it + 1) % 2).permute((1, 0)), _tile(k_smem, 0), COLUMN, dq_zero)
    dq = warpgroup_mma_wait(0, [dq])
    if ROLE == WEIGHTS:
        _arrive(P_THERE, 256)
    if turns[0] is not None:
        _change_turns(turns, taken, turn, number, -1)
    _add(dq_desc, dq_smem.index(ROLE), last_row, COLUMN, dq)
    if turns[0] is not None:
        _change_turns(turns, turn, -1, 0, -1)

    batch, kv_head, key0, _ = _own_place(step, work, place_smem, group, padded_q, ROWS, PERSISTENT)
    # Out by way of memory of the same shape that nobody reads any more: V's after the last dS, K's after all of dQ.
    if ROLE == WEIGHTS:
        factor = keep_scale if DROPOUT else 1.0
        out_smem = v_smem
    else:
        factor = grad_scale
        out_smem = k_smem
        _sync(P_THERE, 256)
    out = _cut(_tile(out_smem, 0), OUT_COLUMNS)
    out[0].store((acc[0] * factor).to(dtype))
    if len(acc) == 2:
        out[1].store((acc[1] * factor).to(dtype))
    fence_async_shared()
    tma_store(out_desc, [batch, kv_head, key0, 0], out_smem.index(0))
    tma.store_wait(0)
    mbarrier.arrive(kv_empty.index(ROLE), count=1)
    return it


@gluon.jit
def _consume(
    args, queue, ROLE: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr, DO_STAGES: gl.constexpr,
    LEFT: gl.constexpr, RIGHT: gl.constexpr, LOAD: gl.constexpr, APPLY: gl.constexpr, OPEN_LOAD: gl.constexpr,
    OPEN_APPLY: gl.constexpr, CAPPED: gl.constexpr, COLUMNS: gl.constexpr, COLUMNS_V: gl.constexpr,
    LATE: gl.constexpr, DROPOUT: gl.constexpr, PERSISTENT: gl.constexpr,
):  # fmt: skip
    """The consumer of that role."""
    place_smem, place_full = queue
    it = 0
    step = 0
    if PERSISTENT:
        while _is_there(place_smem, place_full, step):
            it = _work_on(
                step, it, args, ROLE, BLOCK_M, STAGES, DO_STAGES, LEFT, RIGHT, LOAD, APPLY, OPEN_LOAD,
                OPEN_APPLY, CAPPED, COLUMNS, COLUMNS_V, LATE, DROPOUT, PERSISTENT,
            )  # fmt: skip
            step += 1
    else:
        _work_on(
            step, it, args, ROLE, BLOCK_M, STAGES, DO_STAGES, LEFT, RIGHT, LOAD, APPLY, OPEN_LOAD,
            OPEN_APPLY, CAPPED, COLUMNS, COLUMNS_V, LATE, DROPOUT, PERSISTENT,
        )  # fmt: skip


@gluon.jit(
    do_not_specialize=[
        "n_tiles", "kv_heads", "heads", "section", "group", "padded_q", "seqlen_q", "seqlen_k", "left", "right",
        "threshold",
    ],
    do_not_specialize_on_alignment=["seed_ptr"],
)  # fmt: skip
def backward_wide_kernel(
    q_desc, do_desc, k_desc, v_desc, lse_desc, delta_desc, dq_desc, ds_desc, dk_desc, dv_desc, ranges, operands,
    n_tiles, kv_heads, heads, section, group, padded_q, seqlen_q, seqlen_k, left, right, scale, grad_scale,
    seed_ptr, threshold, keep_scale, turns_ptr, turns_desc, counts_ptr,
    LEFT: gl.constexpr, RIGHT: gl.constexpr, LOAD: gl.constexpr, APPLY: gl.constexpr, OPEN_LOAD: gl.constexpr,
    OPEN_APPLY: gl.constexpr, CAPPED: gl.constexpr, PERSISTENT: gl.constexpr, STAGES: gl.constexpr,
    DO_STAGES: gl.constexpr, COLUMNS: gl.constexpr, COLUMNS_V: gl.constexpr, LATE: gl.constexpr,
):  # fmt: skip
    BLOCK_M: gl.constexpr = q_desc.block_type.shape[2]
    dtype: gl.constexpr = q_desc.dtype
    q_smem = _ring((q_desc,), STAGES)[0]
    do_smem = _ring((do_desc,), DO_STAGES)[0]
    k_smem = _ring((k_desc,), 1)[0]
    v_smem = _ring((v_desc,), 1)[0]
    # Four numbers of a thread are neighbours, [0 or 8, 0 or 1], then come those of the other threads.
    p_layout: gl.constexpr = gl.SharedLinearLayout(
        [[0, 1], [8, 0], [0, 2], [0, 4], [1, 0], [2, 0], [4, 0], [16, 0], [32, 0], [0, 8], [0, 16], [0, 32]]
    )
    p_smem = gl.allocate_shared_memory(gl.float32, [ROWS, BLOCK_M], p_layout)
    ds_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([1, 1, ROWS, BLOCK_M], dtype)
    ds_smem = gl.allocate_shared_memory(dtype, [2, 1, 1, ROWS, BLOCK_M], ds_layout)
    dq_smem = gl.allocate_shared_memory(gl.float32, [CONSUMERS] + dq_desc.block_type.shape, dq_desc.layout)
    lse_smem = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], lse_desc.layout)
    delta_smem = gl.allocate_shared_memory(gl.float32, [DO_STAGES, BLOCK_M], lse_desc.layout)
    q_full = _barriers(STAGES)
    do_full = _barriers(DO_STAGES)
    kv_full = _barriers(2)
    kv_empty = _barriers(2)
    place_full = _barriers(2)
    place_smem = gl.allocate_shared_memory(gl.int32, [2 * PLACE, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    one_smem = lse_smem  # (of no use)
    if turns_ptr is not None:
        one_smem = _one(turns_desc)
    turns = (turns_ptr, turns_desc, one_smem)
    fence_async_shared()

    DROPOUT: gl.constexpr = seed_ptr is not None
    work = (n_tiles, kv_heads, heads, section, turns_ptr)
    window = (seqlen_q, seqlen_k, left, right)
    bars = (q_full, do_full, kv_full, kv_empty, place_full)
    produce = (
        q_desc, do_desc, k_desc, v_desc, lse_desc, delta_desc,
        (q_smem, do_smem, k_smem, v_smem, lse_smem, delta_smem), bars, work, window, ranges, group, padded_q,
        counts_ptr, (None,), place_smem,
    )  # fmt: skip
    smem = (q_smem, do_smem, k_smem, v_smem, p_smem, ds_smem, dq_smem, lse_smem, delta_smem)
    weights = (
        dq_desc, ds_desc, dv_desc, operands, smem, bars, work, window, ranges, group, padded_q, scale, grad_scale,
        seed_ptr, threshold, keep_scale, turns, place_smem,
    )  # fmt: skip
    scores = (
        dq_desc, ds_desc, dk_desc, operands, smem, bars, work, window, ranges, group, padded_q, scale, grad_scale,
        seed_ptr, threshold, keep_scale, turns, place_smem,
    )  # fmt: skip
    queue = (place_smem, place_full)
    gl.warp_specialize(
        [
            (_consume, (
                weights, queue, WEIGHTS, BLOCK_M, STAGES, DO_STAGES, LEFT, RIGHT, LOAD, APPLY, OPEN_LOAD, OPEN_APPLY,
                CAPPED, COLUMNS, COLUMNS_V, LATE, DROPOUT, PERSISTENT,
            )),
            (_consume, (
                scores, queue, SCORES, BLOCK_M, STAGES, DO_STAGES, LEFT, RIGHT, LOAD, APPLY, OPEN_LOAD, OPEN_APPLY,
                CAPPED, COLUMNS, COLUMNS_V, LATE, DROPOUT, PERSISTENT,
            )),
            (_produce, (produce, BLOCK_M, ROWS, STAGES, DO_STAGES, LEFT, RIGHT, PERSISTENT)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip

"""Attention forward on Hopper (sm_90a), BF16 and FP16: the device code. `forward.py` is its host side.

One producer warp brings Q, K and V in by TMA; two or three consumer warp groups own 64 query rows each. A consumer
issues Q @ K[j]^T and P[j-1] @ V[j-1] together and does the softmax of tile j while the second runs. Keys are walked
from the last visible tile to the first: the tiles at the edges of the window are masked, those between are not.
The algorithm is FlashAttention-3's (Shah et al., 2024, arXiv:2407.08608); the specification is `reference.py`.

A head_dim is cut into one or two parts of a power of two (192 = 128 + 64), each with a descriptor and shared memory of
its own, so operands are tuples of parts. What is missing to a part (72 = 64 + 8 of 16) TMA fills with zeros.
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

from fa3_inductor.kernels.compat import tma_load, tma_store
from fa3_inductor.kernels.dropout import kept, key_of_head

ROWS = gl.constexpr(64)  # query rows of one consumer: the M of a wgmma
LOG2E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)
HUGE = gl.constexpr(2e38)  # less than the largest float32 over LOG2E

# Hardware barriers, of which Triton uses the lower ones. Every warp arrives for itself: an mbarrier's arrival makes all
# warps of a group wait for each other first, twice per KV tile. On an H100 that is worth 597 -> 671 TFLOP/s at D 128
# full and 589 -> 658 causal, 16384 positions.
K_EMPTY = gl.constexpr(8)  # and 9: one per stage
V_EMPTY = gl.constexpr(10)  # and 11
TURN = gl.constexpr(12)  # to 14: one per consumer


@gluon.jit
def _arrive(barrier, THREADS: gl.constexpr):
    """Counts this warp in at a hardware barrier for THREADS threads and goes on."""
    gl.inline_asm_elementwise("bar.arrive $1, $2; mov.u32 $0, 0;", "=r,r,n", [barrier, THREADS], gl.int32, False, 1)


@gluon.jit
def _sync(barrier, THREADS: gl.constexpr):
    """Waits until THREADS threads, this warp's among them, are counted in."""
    gl.inline_asm_elementwise("bar.sync $1, $2; mov.u32 $0, 0;", "=r,r,n", [barrier, THREADS], gl.int32, False, 1)


@gluon.jit
def _steps(work, CLUSTER: gl.constexpr = 1):
    """How many tiles this CTA has, or its cluster."""
    order_ptr, tiles = work[:2]
    if order_ptr is None:
        steps = (tiles - 1 - gl.program_id(0) // CLUSTER) // (gl.num_programs(0) // CLUSTER) + 1
    else:
        steps = gl.load(order_ptr + gl.program_id(0) // CLUSTER)
    return steps


@gluon.jit
def _number(step, work, CLUSTER: gl.constexpr = 1):
    """Of the tiles, number `step`. Without a list, the row tiles of a head follow each other: its keys stay in L2."""
    order_ptr = work[0]
    if order_ptr is None:
        number = step * (gl.num_programs(0) // CLUSTER) + gl.program_id(0) // CLUSTER
    else:
        number = gl.load(order_ptr + (step + 1) * (gl.num_programs(0) // CLUSTER) + gl.program_id(0) // CLUSTER)
    return number


@gluon.jit
def _place(number, work):
    """Of a tile its number among the heads' row tiles, and which part of the keys it has: all of them are part 0."""
    part_ptr, parts = work[5:]
    if part_ptr is None:
        return number, 0
    else:
        return number // parts, number % parts


@gluon.jit
def _window_range(row0, window, COUNT: gl.constexpr, BLOCK_N: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr):
    """The KV tiles first ... stop - 1 that rows row0 ... row0 + COUNT - 1 see; one, whatever it holds, if none."""
    seqlen_q, seqlen_k, left, right = window
    keys = seqlen_k
    if RIGHT:
        keys = gl.minimum(keys, gl.maximum(gl.minimum(row0 + COUNT, seqlen_q) + right, 1))
    stop = (keys + BLOCK_N - 1) // BLOCK_N
    first = 0
    if LEFT:
        first = gl.minimum(gl.maximum(row0 - left, 0) // BLOCK_N, stop - 1)
    return first, stop


@gluon.jit
def _tile_range(
    tile_row, row0, window, COUNT: gl.constexpr, BLOCK_N: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr
):
    """The KV tiles of the ROWS rows from row0 on, and those of the COUNT rows from tile_row on that they are among."""
    tile_first, tile_stop = _window_range(tile_row, window, COUNT, BLOCK_N, LEFT, RIGHT)
    first, stop = _window_range(row0, window, ROWS, BLOCK_N, LEFT, RIGHT)
    if row0 >= window[0]:
        first = tile_first
        stop = tile_first + 1
    return first, stop, tile_first, tile_stop


@gluon.jit
def _kv_range(
    place, part, work, window, ranges, WG: gl.constexpr, CONSUMERS: gl.constexpr, BLOCK_N: gl.constexpr,
    LEFT: gl.constexpr, RIGHT: gl.constexpr,
):  # fmt: skip
    """The KV tiles of consumer WG, whose rows begin at place[2], those that any consumer has, and the end of the keys.

    The first two are ranges; a consumer whose rows see nothing has the first of the others' tiles. If the keys are
    split, they are those of a part. A part without keys has one tile, and the keys end at 0.
    """
    seqlen_k = window[1]
    part_ptr, parts = work[5:]
    batch, head, row0 = place
    tile_row = row0 - WG * ROWS
    if ranges is None:
        first, stop, tile_first, tile_stop = _tile_range(tile_row, row0, window, CONSUMERS * ROWS, BLOCK_N, LEFT, RIGHT)
    else:
        ptr, by_batch, by_head, by_block = ranges
        ptr += (batch.to(gl.int64) * by_batch + head * by_head) * 4
        first = 0
        stop = 0
        tile_first = (window[1] + BLOCK_N - 1) // BLOCK_N
        tile_stop = 0
        for wg in gl.static_range(CONSUMERS):
            row = tile_row + wg * ROWS
            if row < window[0]:
                at = ptr + (row // ROWS * by_block) * 4
                its_first, its_stop = _window_range(row, window, ROWS, BLOCK_N, LEFT, RIGHT)
                its_first = gl.maximum(its_first, gl.load(at))
                its_stop = gl.minimum(its_stop, gl.load(at + 1))
                if its_first < its_stop:
                    tile_first = gl.minimum(tile_first, its_first)
                    tile_stop = gl.maximum(tile_stop, its_stop)
                    if wg == WG:
                        first = its_first
                        stop = its_stop
        if tile_stop == 0:
            tile_first = 0
            tile_stop = 1
        if stop == 0:
            first = tile_first
            stop = tile_first + 1
    if part_ptr is not None:
        count = tile_stop - tile_first
        part_first = tile_first + count * part // parts
        part_stop = tile_first + count * (part + 1) // parts
        seqlen_k = gl.where(part_first == part_stop, 0, seqlen_k)
        tile_first = gl.minimum(part_first, tile_stop - 1)
        tile_stop = gl.maximum(part_stop, tile_first + 1)
        first = gl.maximum(first, tile_first)
        stop = gl.minimum(stop, tile_stop)
        if first >= stop:
            first = tile_first
            stop = tile_first + 1
    return first, stop, tile_first, tile_stop, seqlen_k


@gluon.jit
def _full_end(place, window, ranges, WHICH: gl.constexpr):
    """Of the KV tiles in which the mask hides nothing from a consumer's rows, the first (2) or the one after (3)."""
    batch, head, row0 = place
    ptr, by_batch, by_head, by_block = ranges
    block = gl.minimum(row0, window[0] - 1) // ROWS * by_block
    return gl.load(ptr + (batch.to(gl.int64) * by_batch + head * by_head + block) * 4 + WHICH)


@gluon.jit
def _tile(smem, slot):
    """One slot of one part's ring as [rows, columns]."""
    tile = smem.index(slot)
    return tile.reshape([tile.shape[2], tile.shape[3]])


@gluon.jit
def _at(smem, slot):
    """One slot of a ring, all of its parts."""
    if len(smem) == 1:
        return (_tile(smem[0], slot),)
    else:
        return (_tile(smem[0], slot), _tile(smem[1], slot))


@gluon.jit
def _load(descs, batch, head, row, bar, smem, slot, MORE: gl.constexpr = 0):
    """Brings one tile of an operand, all of its parts, into a slot of a ring. The barrier waits for MORE bytes, too."""
    if len(descs) == 1:
        mbarrier.expect(bar, descs[0].block_type.nbytes + MORE)
    else:
        mbarrier.expect(bar, descs[0].block_type.nbytes + descs[1].block_type.nbytes + MORE)
    tma_load(descs[0], [batch, head, row, 0], bar, smem[0].index(slot))
    if len(descs) == 2:
        tma_load(descs[1], [batch, head, row, descs[0].block_type.shape[3]], bar, smem[1].index(slot))


@gluon.jit
def _load_kv(
    descs, batch, head, row, it, full, smem, EMPTY: gl.constexpr, THREADS: gl.constexpr, STAGES: gl.constexpr
):  # fmt: skip
    """Brings one tile into slot it % STAGES of a ring, once its consumers have let go of it."""
    slot = it % STAGES
    if it >= STAGES:
        _sync(EMPTY + slot, THREADS)
    _load(descs, batch, head, row, full.index(slot), smem, slot)


@gluon.jit
def _load_keys(
    descs, term, place, kv_head, row, unneeded, it, full, smem, THREADS: gl.constexpr, CONSUMERS: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Brings one tile of keys, and with it that of a bias or a mask for each consumer's queries, if that comes by TMA.

    Read from global memory by the consumers themselves, a few bytes of each of eight rows at a time, it costs more. On
    an H200, bias [h, q, k], full, TFLOP/s at 1024 and 8192 positions: head_dim 64, 198 -> 303 and 210 -> 294; 128,
    353 -> 421 and 363 -> 462; 256, 418 -> 465 and 460 -> 542. A random mask [q, k]: 64, 243 -> 285 and 248 -> 333; 128,
    339 -> 431 and 371 -> 472; 256, 449 -> 546 and 471 -> 573.
    """
    batch, head, row0 = place
    if len(term) == 0:
        _load_kv(descs, batch, kv_head, row, it, full, smem, K_EMPTY, THREADS, STAGES)
    else:
        desc, term_smem, by_batch, by_head = term
        BLOCK_N: gl.constexpr = desc.block_type.shape[3]
        slot = it % STAGES
        if it >= STAGES:
            _sync(K_EMPTY + slot, THREADS)
        bar = full.index(slot)
        tile = row // BLOCK_N
        if (tile >= unneeded[0]) & (tile < unneeded[1]):
            _load(descs, batch, kv_head, row, bar, smem, slot)
        else:
            _load(descs, batch, kv_head, row, bar, smem, slot, CONSUMERS * desc.block_type.nbytes)
            for wg in gl.static_range(CONSUMERS):
                at = [batch * by_batch, head * by_head, row0 + wg * ROWS, row]
                tma_load(desc, at, bar, term_smem.index(slot * CONSUMERS + wg))


@gluon.jit
def _unneeded(
    place, stop, window, ranges, term, CONSUMERS: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr
):  # fmt: skip
    """The KV tiles first ... stop - 1 for which no consumer looks at a mask: it hides nothing, nor does a window."""
    low = 0
    high = 0
    if len(term) > 0:
        if ranges is not None and term[0].dtype == gl.uint8 and not (LEFT or RIGHT):
            ptr, by_batch, by_head, by_block = ranges
            batch, head, row0 = place
            ptr += (batch.to(gl.int64) * by_batch + head * by_head) * 4
            high = stop - 1  # with the last tile each begins, and looks at the mask
            for wg in gl.static_range(CONSUMERS):
                at = ptr + gl.minimum(row0 + wg * ROWS, window[0] - 1) // ROWS * by_block * 4
                low = gl.maximum(low, gl.load(at + 2))
                high = gl.minimum(high, gl.minimum(gl.load(at + 1) - 1, gl.load(at + 3)))
    return low, high


@gluon.jit
def _load_values(descs, batch, head, row, it, full, smem, CONSUMERS: gl.constexpr):
    _load_kv(descs, batch, head, row, it, full, smem, V_EMPTY, 128 * CONSUMERS + 32, smem[0].shape[0])


@gluon.jit
def _produce(
    args, LOAD_VALUES: gl.constexpr, BLOCK_N: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr,
    LEFT: gl.constexpr, RIGHT: gl.constexpr,
):  # fmt: skip
    """The producer warp. Values lag keys by one tile, as their use does."""
    q_descs, k_descs, v_descs, q_smem, k_smem, v_smem, q_full, q_empty, k_full, v_full = args[:10]
    work, window, ranges, term = args[10:]
    m_tiles, q_heads, group = work[2:5]
    THREADS: gl.constexpr = 128 * CONSUMERS + 32
    it = 0
    steps = _steps(work)
    number = _number(0, work)
    for step in range(steps):
        row_tile, part = _place(number, work)
        m_tile = row_tile % m_tiles
        flat = row_tile // m_tiles
        number = _number(gl.minimum(step + 1, steps - 1), work)  # of the next one, in time
        batch = flat // q_heads
        head = flat % q_heads
        kv_head = head // group
        place = (batch, head, m_tile * (CONSUMERS * ROWS))
        _, _, first, stop, _ = _kv_range(
            place, part, work, window, ranges, 0, CONSUMERS, BLOCK_N, LEFT, RIGHT
        )  # fmt: skip
        unneeded = _unneeded(place, stop, window, ranges, term, CONSUMERS, LEFT, RIGHT)
        row = (stop - 1) * BLOCK_N
        _load_keys(
            k_descs, term, place, kv_head, row, unneeded, it, k_full, k_smem, THREADS, CONSUMERS, STAGES
        )  # fmt: skip
        for wg in gl.static_range(CONSUMERS):
            mbarrier.wait(q_empty.index(wg), (step & 1) ^ 1)
            _load(q_descs, batch, head, (m_tile * CONSUMERS + wg) * ROWS, q_full.index(wg), q_smem, wg)
        for _ in range(first, stop - 1):
            it += 1
            row -= BLOCK_N
            _load_keys(
                k_descs, term, place, kv_head, row, unneeded, it, k_full, k_smem, THREADS, CONSUMERS, STAGES
            )  # fmt: skip
            LOAD_VALUES(v_descs, batch, kv_head, row + BLOCK_N, it - 1, v_full, v_smem, CONSUMERS)
        LOAD_VALUES(v_descs, batch, kv_head, row, it, v_full, v_smem, CONSUMERS)
        it += 1


@gluon.jit
def _row_sums(p):
    """[M, N] -> [M, 4]: sums over the columns a thread holds. A row's four threads are added up at the very end."""
    quads = p.reshape([p.shape[0], p.shape[1] // 8, 4, 2])
    return gl.sum(gl.sum(quads, 3), 1)


@gluon.jit
def _softmax(s, m_i, scale, UNIT: gl.constexpr):
    """exp2 of the scaled scores less their running maximum, that maximum, and the factor for what was summed so far."""
    m_new = gl.maximum(m_i, gl.max(s, 1))
    # A row that has seen no key yet: exp2(-inf - 0) = 0 instead of exp2(-inf + inf) = NaN.
    finite = gl.where(m_new == float("-inf"), 0.0, m_new)
    if UNIT is None:
        return gl.exp2(s * scale - (finite * scale)[:, None]), m_new, gl.exp2(m_i * scale - finite * scale)
    else:
        unit = _row_units(finite, UNIT)
        return gl.exp2(s * unit[:, None] - (finite * unit)[:, None]), m_new, gl.exp2(m_i * unit - finite * unit)


@gluon.jit
def _row_units(m, UNIT: gl.constexpr):
    """UNIT, and 1 for rows whose maximum m is about the lowest number there is: a mask that is added hides all keys.

    Times log2(e) that would be -inf; and beside such a number others are the same or far away, whatever the unit.
    """
    ones = gl.full(m.shape, 1.0, gl.float32, m.type.layout)
    return gl.where(gl.abs(m) > HUGE, ones, ones * UNIT)


@gluon.jit
def _natural(m_i, scale, UNIT: gl.constexpr):
    """The running maximum of `_softmax` in units of 1."""
    if UNIT is None:
        return m_i * (scale * LN2)
    else:
        return m_i * (UNIT * LN2)


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
def _rescale(x, factor):
    """Multiplies each row of x by its factor."""
    layout: gl.constexpr = gl.SliceLayout(1, x.type.layout)
    return x * gl.convert_layout(factor, layout, assert_trivial=True)[:, None]


@gluon.jit
def _rescale_parts(o, factor):
    if len(o) == 1:
        return (_rescale(o[0], factor),)
    else:
        return (_rescale(o[0], factor), _rescale(o[1], factor))


@gluon.jit
def _score(q, k, zero):
    """Issues Q @ K^T over all parts of the head dim."""
    s = warpgroup_mma(q[0], k[0].permute((1, 0)), zero, use_acc=False, is_async=True)
    if len(q) == 2:
        s = warpgroup_mma(q[1], k[1].permute((1, 0)), s, is_async=True)
    return s


@gluon.jit
def _accumulate(p, v, o):
    """Issues O += P @ V for each part of O."""
    if len(o) == 1:
        return (warpgroup_mma(p, v[0], o[0], is_async=True),)
    else:
        layout: gl.constexpr = gl.DotOperandLayout(0, o[1].type.layout, 2)
        p2 = gl.convert_layout(p, layout, assert_trivial=True)
        return (warpgroup_mma(p, v[0], o[0], is_async=True), warpgroup_mma(p2, v[1], o[1], is_async=True))


@gluon.jit
def _wait(o, p):
    """Waits for every matrix product, and keeps their left operand alive until then."""
    if len(o) == 1:
        o0, p = warpgroup_mma_wait(0, [o[0], p])
        return (o0,)
    else:
        o0, o1, p = warpgroup_mma_wait(0, [o[0], o[1], p])
        return (o0, o1)


@gluon.jit
def _mask(s, low, high, LEFT: gl.constexpr, s_layout: gl.constexpr):
    """-inf in each row of s from column `high` on, and if LEFT before column `low`.

    A thread holds columns 8j + 2c + e of a row, c being its own number among four: split up so, each comparison is of
    one register with a constant, and nothing has to be worked out per column.
    """
    quads = s.reshape([s.shape[0], s.shape[1] // 8, 4, 2])
    layout: gl.constexpr = quads.type.layout
    j = gl.arange(0, s.shape[1] // 8, gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, layout))))
    c = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, layout))))
    e = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, layout))))
    rows_layout: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, layout)))
    column = 8 * j[None, :, None, None] + e[None, None, None, :]
    own = 2 * c[None, None, :, None]
    high = gl.convert_layout(high, rows_layout, assert_trivial=True)
    visible = column < high[:, None, None, None] - own
    if LEFT:
        low = gl.convert_layout(low, rows_layout, assert_trivial=True)
        visible = visible & (column >= low[:, None, None, None] - own)
    return gl.convert_layout(gl.where(visible, quads, float("-inf")).reshape(s.shape), s_layout, assert_trivial=True)


@gluon.jit
def _mask_tile(
    s, row0, column0, window, LEFT: gl.constexpr, RIGHT: gl.constexpr, s_layout: gl.constexpr
):  # fmt: skip
    """-inf where the query row0 + i of a tile does not see the key column0 + j."""
    seqlen_q, seqlen_k, left, right = window
    rows = row0 + gl.arange(0, ROWS, gl.SliceLayout(1, s_layout))
    high = gl.full([ROWS], 0, gl.int32, gl.SliceLayout(1, s_layout)) + seqlen_k
    if RIGHT:
        high = gl.minimum(high, rows + (right + 1))
    return _mask(s, rows - (left + column0), high - column0, LEFT, s_layout)


@gluon.jit
def _drop(weights, row0, column0, random, s_layout: gl.constexpr):
    """0 in place of the weights that are not kept."""
    rows = row0 + gl.arange(0, ROWS, gl.SliceLayout(1, s_layout))
    columns = column0 + gl.arange(0, s_layout.instr_shape[1], gl.SliceLayout(0, s_layout))
    return gl.where(kept(rows, columns, random, False, s_layout), weights, 0.0)


@gluon.jit
def _load_terms(
    LOAD: gl.constexpr, operands, term_smem, slot, place, column0, window, s_layout: gl.constexpr,
    BOUNDED: gl.constexpr,
):  # fmt: skip
    """What the score program reads from memory for one tile: the first term from `slot` of shared memory, if there."""
    batch, head, row0 = place
    if len(term_smem) == 1:
        operands = ((_tile(term_smem[0], slot),),) + operands[1:]
    rows = row0 + gl.arange(0, ROWS, gl.SliceLayout(1, s_layout))
    columns = column0 + gl.arange(0, s_layout.instr_shape[1], gl.SliceLayout(0, s_layout))
    return LOAD(operands, batch, head, rows, columns, window[0], window[1], BOUNDED)


@gluon.jit
def _kv_loop(
    o, packed, l_i, m_i, it, tile, stop, place, scale, q, k_smem, v_smem, k_full, v_full, operands, term_smem, window,
    random,
    WG: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr, PING_PONG: gl.constexpr, OVERLAP: gl.constexpr,
    MASKED: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr, LOAD: gl.constexpr, APPLY: gl.constexpr,
    UNIT: gl.constexpr, DROPOUT: gl.constexpr, s_layout: gl.constexpr, p_layout: gl.constexpr,
):  # fmt: skip
    """KV tiles tile - 1 down to stop. Enters and leaves with the last tile's weights not yet multiplied by V."""
    BLOCK_N: gl.constexpr = s_layout.instr_shape[1]
    THREADS: gl.constexpr = 128 * CONSUMERS + 32
    PV_GROUPS: gl.constexpr = len(o)
    zero = gl.zeros([ROWS, BLOCK_N], gl.float32, s_layout)
    dtype: gl.constexpr = q[0].dtype
    for i in range(stop, tile):
        slot = it % STAGES
        v_slot = (it - 1) % STAGES
        column0 = (tile - 1 - (i - stop)) * BLOCK_N
        mbarrier.wait(k_full.index(slot), (it // STAGES) & 1)
        if PING_PONG:
            _sync(TURN + WG, 256)
        s = _score(q, _at(k_smem, slot), zero)
        mbarrier.wait(v_full.index(v_slot), ((it - 1) // STAGES) & 1)
        p = _unpack(packed, dtype, p_layout)
        o = _accumulate(p, _at(v_smem, v_slot), o)
        if PING_PONG:
            _arrive(TURN + (WG + 1) % CONSUMERS, 256)
        if APPLY is not None:
            terms = _load_terms(
                LOAD, operands, term_smem, slot * CONSUMERS + WG, place, column0, window, s_layout, False
            )
        s = warpgroup_mma_wait(PV_GROUPS if OVERLAP else 0, [s])
        _arrive(K_EMPTY + slot, THREADS)
        if APPLY is not None:
            s = APPLY(s, scale, terms)
        if MASKED and (LEFT or RIGHT):
            s = _mask_tile(s, place[2], column0, window, LEFT, RIGHT, s_layout)
        weights, m_i, alpha = _softmax(s, m_i, scale, UNIT)
        l_i = _rescale(l_i, alpha) + _row_sums(weights)
        if DROPOUT:
            weights = _drop(weights, place[2], column0, random, s_layout)
        o = _wait(o, p)
        _arrive(V_EMPTY + v_slot, THREADS)
        packed = _pack(weights, dtype)
        o = _rescale_parts(o, alpha)
        it += 1
    return o, packed, l_i, m_i, it


@gluon.jit
def _skip(
    it, count, k_full, v_full, WG: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr, PING_PONG: gl.constexpr
):
    """Lets go of `count` KV tiles that only the other consumers' rows see, each not before it is there."""
    THREADS: gl.constexpr = 128 * CONSUMERS + 32
    for _ in range(count):
        if PING_PONG:
            _sync(TURN + WG, 256)
            _arrive(TURN + (WG + 1) % CONSUMERS, 256)
        mbarrier.wait(k_full.index(it % STAGES), (it // STAGES) & 1)
        _arrive(K_EMPTY + it % STAGES, THREADS)
        mbarrier.wait(v_full.index(it % STAGES), (it // STAGES) & 1)
        _arrive(V_EMPTY + it % STAGES, THREADS)
        it += 1
    return it


@gluon.jit
def _finish_rows(
    l_i, top, sinks_ptr, lse_ptr, head, flat, row0, seqlen_q, SINKS: gl.constexpr, rows_layout: gl.constexpr
):  # fmt: skip
    """Stores the rows' log-sum-exp, `top` being their maximum. Returns what O is to be scaled by."""
    total = gl.convert_layout(gl.sum(l_i, 1), rows_layout, assert_trivial=True)
    factor = gl.full([ROWS], 1.0, gl.float32, rows_layout)
    if SINKS:
        sink = gl.load(sinks_ptr + head).to(gl.float32)
        peak = gl.maximum(top, sink)
        peak = gl.where(peak == float("-inf"), 0.0, peak)
        factor = gl.exp2((top - peak) * LOG2E)
        total = total * factor + gl.exp2((sink - peak) * LOG2E)
        top = peak
    lse = top + gl.log2(total) * LN2
    rows = row0 + gl.arange(0, ROWS, rows_layout)
    gl.store(lse_ptr + flat.to(gl.int64) * seqlen_q + rows, lse, mask=rows < seqlen_q)
    return factor / gl.where(total == 0.0, 1.0, total)


@gluon.jit
def _store_sums(l_i, top, ptr, flat, row0, seqlen_q, rows_layout: gl.constexpr):
    """Stores the rows' maximum and their sum apart: beside a mask's huge number the sum's logarithm would be lost.

    Returns what O is to be scaled by.
    """
    total = gl.convert_layout(gl.sum(l_i, 1), rows_layout, assert_trivial=True)
    rows = row0 + gl.arange(0, ROWS, rows_layout)
    ptr += flat.to(gl.int64) * 2 * seqlen_q
    gl.store(ptr + rows, top, mask=rows < seqlen_q)
    gl.store(ptr + seqlen_q + rows, total, mask=rows < seqlen_q)
    return gl.full([ROWS], 1.0, gl.float32, rows_layout)


@gluon.jit
def _store(descs, o, smem, slot, batch, head, row):
    """Sends the parts of O off by TMA, by way of shared memory."""
    o_smem = _at(smem, slot)
    dtype: gl.constexpr = descs[0].dtype
    o_smem[0].store(o[0].to(dtype))
    if len(o) == 2:
        o_smem[1].store(o[1].to(dtype))
    fence_async_shared()
    tma_store(descs[0], [batch, head, row, 0], smem[0].index(slot))
    if len(o) == 2:
        tma_store(descs[1], [batch, head, row, descs[0].block_type.shape[3]], smem[1].index(slot))


@gluon.jit
def _store_part(ptr, o, row, row0, column0, seqlen_q, WIDTH: gl.constexpr):
    """Stores one part of O's head_dim in float32, among rows of WIDTH of which the head's first is number `row`."""
    layout: gl.constexpr = o.type.layout
    rows = row0 + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    columns = column0 + gl.arange(0, o.shape[1], gl.SliceLayout(0, layout))
    gl.store(ptr + (row + rows)[:, None] * WIDTH + columns[None, :], o, mask=(rows < seqlen_q)[:, None])


@gluon.jit
def _store_parts(ptr, o, flat, row0, seqlen_q):
    row = flat.to(gl.int64) * seqlen_q
    DV: gl.constexpr = o[0].shape[1]
    if len(o) == 1:
        _store_part(ptr, o[0], row, row0, 0, seqlen_q, DV)
    else:
        WIDTH: gl.constexpr = DV + o[1].shape[1]
        _store_part(ptr, o[0], row, row0, 0, seqlen_q, WIDTH)
        _store_part(ptr, o[1], row, row0, DV, seqlen_q, WIDTH)


@gluon.jit
def _consume(
    args, WG: gl.constexpr, BLOCK_N: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr,
    LEFT: gl.constexpr, RIGHT: gl.constexpr, PING_PONG: gl.constexpr, OVERLAP: gl.constexpr, SHARED_O: gl.constexpr,
    SINKS: gl.constexpr, LOAD: gl.constexpr, APPLY: gl.constexpr, OPEN_LOAD: gl.constexpr, OPEN_APPLY: gl.constexpr,
    UNIT: gl.constexpr, DROPOUT: gl.constexpr,
):  # fmt: skip
    """Consumer warp group number WG: its ROWS rows of every tile."""
    o_descs, lse_ptr, sinks_ptr, operands, q_smem, o_smem, k_smem, v_smem, q_full, q_empty, k_full, v_full = args[:12]
    work, window, ranges, scale, seed_ptr, threshold, keep_scale, term_smem, out_scale_ptr = args[12:]
    m_tiles, q_heads, group, part_ptr, parts = work[2:]
    seqlen_q, seqlen_k, left, right = window
    DV: gl.constexpr = o_descs[0].block_type.shape[3]
    dtype: gl.constexpr = q_smem[0].dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    rows_layout: gl.constexpr = gl.SliceLayout(1, s_layout)
    THREADS: gl.constexpr = 128 * CONSUMERS + 32
    q = _at(q_smem, WG)
    zero = gl.zeros([ROWS, BLOCK_N], gl.float32, s_layout)
    if PING_PONG and WG == CONSUMERS - 1:
        _arrive(TURN, 256)
    it = 0
    steps = _steps(work)
    number = _number(0, work)
    for step in range(steps):
        row_tile, part = _place(number, work)
        m_tile = row_tile % m_tiles
        flat = row_tile // m_tiles
        number = _number(gl.minimum(step + 1, steps - 1), work)  # of the next one, in time
        batch = flat // q_heads
        head = flat % q_heads
        row0 = (m_tile * CONSUMERS + WG) * ROWS
        place = (batch, head, row0)
        random = (0, 0, 0)
        if DROPOUT:
            key, salt = key_of_head(seed_ptr, flat)
            random = (key, salt, threshold)
        first, stop, tile_first, tile_stop, keys = _kv_range(
            place, part, work, window, ranges, WG, CONSUMERS, BLOCK_N, LEFT, RIGHT
        )
        it = _skip(it, tile_stop - stop, k_full, v_full, WG, CONSUMERS, STAGES, PING_PONG)

        # The last KV tile, alone: no weights to multiply by V yet. It is the only one that can reach past the end of K.
        slot = it % STAGES
        column0 = (stop - 1) * BLOCK_N
        mbarrier.wait(q_full.index(WG), step & 1)
        mbarrier.wait(k_full.index(slot), (it // STAGES) & 1)
        if PING_PONG:
            _sync(TURN + WG, 256)
        s = _score(q, _at(k_smem, slot), zero)
        if PING_PONG:
            _arrive(TURN + (WG + 1) % CONSUMERS, 256)
        if APPLY is not None:
            terms = _load_terms(
                LOAD, operands, term_smem, slot * CONSUMERS + WG, place, column0, (seqlen_q, keys), s_layout, True
            )
        s = warpgroup_mma_wait(0, [s])
        _arrive(K_EMPTY + slot, THREADS)
        if APPLY is not None:
            s = APPLY(s, scale, terms)
        s = _mask_tile(s, row0, column0, (seqlen_q, keys, left, right), LEFT, RIGHT, s_layout)
        m_i = gl.full([ROWS], float("-inf"), gl.float32, rows_layout)
        weights, m_i, alpha = _softmax(s, m_i, scale, UNIT)
        l_i = _row_sums(weights)
        if DROPOUT:
            weights = _drop(weights, row0, column0, random, s_layout)
        packed = _pack(weights, dtype)
        if len(o_descs) == 1:
            o = (gl.zeros([ROWS, DV], gl.float32, o_layout),)
        else:
            DV2: gl.constexpr = o_descs[1].block_type.shape[3]
            o2_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV2, 16])
            o = (gl.zeros([ROWS, DV], gl.float32, o_layout), gl.zeros([ROWS, DV2], gl.float32, o2_layout))
        it += 1

        # Downwards from the last but one: tiles at an edge, tiles in which nothing is hidden, tiles at the other edge.
        tile = stop - 1
        open_stop = tile
        if RIGHT:
            open_stop = gl.minimum(open_stop, gl.maximum(gl.minimum(row0 + right + 1, seqlen_k), 0) // BLOCK_N)
        if ranges is not None:
            open_stop = gl.minimum(open_stop, _full_end(place, window, ranges, 3))
        if RIGHT or ranges is not None:
            open_stop = gl.maximum(open_stop, first)
            o, packed, l_i, m_i, it = _kv_loop(
                o, packed, l_i, m_i, it, tile, open_stop, place, scale,
                q, k_smem, v_smem, k_full, v_full, operands, term_smem, window, random,
                WG, CONSUMERS, STAGES, PING_PONG, OVERLAP, True, LEFT, RIGHT, LOAD, APPLY, UNIT, DROPOUT,
                s_layout, p_layout,
            )  # fmt: skip
        open_first = first
        if LEFT:
            low = gl.maximum(gl.minimum(row0 + ROWS, seqlen_q) - 1 - left, 0)
            open_first = gl.maximum(open_first, (low + BLOCK_N - 1) // BLOCK_N)
        if ranges is not None:  # (read only now, for the registers)
            open_first = gl.maximum(open_first, _full_end(place, window, ranges, 2))
        if LEFT or ranges is not None:
            open_first = gl.minimum(open_first, open_stop)
        o, packed, l_i, m_i, it = _kv_loop(
            o, packed, l_i, m_i, it, open_stop, open_first, place, scale,
            q, k_smem, v_smem, k_full, v_full, operands, term_smem, window, random,
            WG, CONSUMERS, STAGES, PING_PONG, OVERLAP, False, LEFT, RIGHT, OPEN_LOAD, OPEN_APPLY, UNIT,
            DROPOUT, s_layout, p_layout,
        )  # fmt: skip
        if LEFT or ranges is not None:
            o, packed, l_i, m_i, it = _kv_loop(
                o, packed, l_i, m_i, it, open_first, first, place, scale,
                q, k_smem, v_smem, k_full, v_full, operands, term_smem, window, random,
                WG, CONSUMERS, STAGES, PING_PONG, OVERLAP, True, LEFT, RIGHT, LOAD, APPLY, UNIT, DROPOUT,
                s_layout, p_layout,
            )  # fmt: skip
        if part_ptr is not None or not SHARED_O:
            mbarrier.arrive(q_empty.index(WG), count=1)

        v_slot = (it - 1) % STAGES
        mbarrier.wait(v_full.index(v_slot), ((it - 1) // STAGES) & 1)
        p = _unpack(packed, dtype, p_layout)
        o = _accumulate(p, _at(v_smem, v_slot), o)
        top = _natural(m_i, scale, UNIT)
        if part_ptr is not None:
            flat = flat * parts + part
            factor = _store_sums(l_i, top, lse_ptr, flat, row0, seqlen_q, rows_layout)
        else:
            factor = _finish_rows(l_i, top, sinks_ptr, lse_ptr, head, flat, row0, seqlen_q, SINKS, rows_layout)
        o = _wait(o, p)
        _arrive(V_EMPTY + v_slot, THREADS)
        it = _skip(it, first - tile_first, k_full, v_full, WG, CONSUMERS, STAGES, PING_PONG)
        if DROPOUT:
            factor = factor * keep_scale
        if out_scale_ptr is not None and part_ptr is None:
            factor = factor * gl.load(out_scale_ptr)
        o = _rescale_parts(o, factor)
        if part_ptr is not None:
            _store_parts(part_ptr, o, flat, row0, seqlen_q)
        elif SHARED_O:
            _store(o_descs, o, q_smem, WG, batch, head, row0)
            tma.store_wait(0)
            mbarrier.arrive(q_empty.index(WG), count=1)
        else:
            tma.store_wait(0)
            _store(o_descs, o, o_smem, WG, batch, head, row0)
    tma.store_wait(0)


@gluon.jit
def _ring(descs, SLOTS: gl.constexpr):
    """Shared memory for SLOTS tiles of each part."""
    first = gl.allocate_shared_memory(descs[0].dtype, [SLOTS] + descs[0].block_type.shape, descs[0].layout)
    if len(descs) == 1:
        return (first,)
    else:
        second = gl.allocate_shared_memory(descs[1].dtype, [SLOTS] + descs[1].block_type.shape, descs[1].layout)
        return (first, second)


@gluon.jit
def _barriers(COUNT: gl.constexpr):
    bars = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(bars.index(i), count=1)
    return bars


@gluon.jit
def _parts(first, second):
    if second is None:
        return (first,)
    else:
        return (first, second)


@gluon.jit(
    do_not_specialize=[
        "parts", "tiles", "m_tiles", "q_heads", "group", "seqlen_q", "seqlen_k", "left", "right", "threshold",
    ],
    do_not_specialize_on_alignment=["sinks_ptr", "seed_ptr", "out_scale_ptr"],
)  # fmt: skip
def forward_kernel(
    q_desc, q_desc2, k_desc, k_desc2, v_desc, v_desc2, o_desc, o_desc2, lse_ptr, order_ptr, sinks_ptr, ranges, operands,
    term_desc, term_batch, term_head, part_ptr, parts, tiles, m_tiles, q_heads, group, seqlen_q, seqlen_k, left, right,
    scale, seed_ptr, threshold, keep_scale, out_scale_ptr,
    LEFT: gl.constexpr, RIGHT: gl.constexpr, LOAD: gl.constexpr, APPLY: gl.constexpr, OPEN_LOAD: gl.constexpr,
    OPEN_APPLY: gl.constexpr, UNIT: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr,
    PING_PONG: gl.constexpr, OVERLAP: gl.constexpr, SHARED_O: gl.constexpr, CONSUMER_REGS: gl.constexpr,
    PRODUCER_REGS: gl.constexpr,
):  # fmt: skip
    """With part_ptr, the keys are split into parts, and each part of O goes there, float32 [B * H, parts, Sq, Dv].

    Dv is that of o_desc's block and o_desc2's; lse is [B * H, parts, Sq] then, and o_desc is not written to.
    With term_desc, the first operand comes by it; term_batch and term_head say whether it differs from one to the next.
    """
    BLOCK_N: gl.constexpr = k_desc.block_type.shape[2]
    q_descs = _parts(q_desc, q_desc2)
    k_descs = _parts(k_desc, k_desc2)
    v_descs = _parts(v_desc, v_desc2)
    o_descs = _parts(o_desc, o_desc2)
    q_smem = _ring(q_descs, CONSUMERS)
    k_smem = _ring(k_descs, STAGES)
    v_smem = _ring(v_descs, STAGES)
    o_smem = q_smem
    if part_ptr is None and not SHARED_O:
        o_smem = _ring(o_descs, CONSUMERS)
    q_full = _barriers(CONSUMERS)
    q_empty = _barriers(CONSUMERS)
    k_full = _barriers(STAGES)
    v_full = _barriers(STAGES)
    term_smem = ()
    term = ()
    if term_desc is not None:
        term_smem = _ring((term_desc,), STAGES * CONSUMERS)
        term = (term_desc, term_smem[0], term_batch, term_head)
    fence_async_shared()

    work = (order_ptr, tiles, m_tiles, q_heads, group, part_ptr, parts)
    window = (seqlen_q, seqlen_k, left, right)
    produce = (
        q_descs, k_descs, v_descs, q_smem, k_smem, v_smem, q_full, q_empty, k_full, v_full, work, window, ranges, term
    )  # fmt: skip
    consume = (
        o_descs, lse_ptr, sinks_ptr, operands, q_smem, o_smem, k_smem, v_smem, q_full, q_empty, k_full, v_full,
        work, window, ranges, scale, seed_ptr, threshold, keep_scale, term_smem, out_scale_ptr,
    )  # fmt: skip
    DROPOUT: gl.constexpr = seed_ptr is not None
    SINKS: gl.constexpr = sinks_ptr is not None
    LOAD_VALUES: gl.constexpr = _load_values
    # Spelled out: triton 3.9 adds no tuples that hold None.
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (_consume, (
                    consume, 0, BLOCK_N, CONSUMERS, STAGES, LEFT, RIGHT, PING_PONG, OVERLAP, SHARED_O, SINKS,
                    LOAD, APPLY, OPEN_LOAD, OPEN_APPLY, UNIT, DROPOUT,
                )),
                (_consume, (
                    consume, 1, BLOCK_N, CONSUMERS, STAGES, LEFT, RIGHT, PING_PONG, OVERLAP, SHARED_O, SINKS,
                    LOAD, APPLY, OPEN_LOAD, OPEN_APPLY, UNIT, DROPOUT,
                )),
                (_produce, (produce, LOAD_VALUES, BLOCK_N, 2, STAGES, LEFT, RIGHT)),
            ],
            [4, 1],
            [CONSUMER_REGS, PRODUCER_REGS],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_consume, (
                    consume, 0, BLOCK_N, CONSUMERS, STAGES, LEFT, RIGHT, PING_PONG, OVERLAP, SHARED_O, SINKS,
                    LOAD, APPLY, OPEN_LOAD, OPEN_APPLY, UNIT, DROPOUT,
                )),
                (_consume, (
                    consume, 1, BLOCK_N, CONSUMERS, STAGES, LEFT, RIGHT, PING_PONG, OVERLAP, SHARED_O, SINKS,
                    LOAD, APPLY, OPEN_LOAD, OPEN_APPLY, UNIT, DROPOUT,
                )),
                (_consume, (
                    consume, 2, BLOCK_N, CONSUMERS, STAGES, LEFT, RIGHT, PING_PONG, OVERLAP, SHARED_O, SINKS,
                    LOAD, APPLY, OPEN_LOAD, OPEN_APPLY, UNIT, DROPOUT,
                )),
                (_produce, (produce, LOAD_VALUES, BLOCK_N, 3, STAGES, LEFT, RIGHT)),
            ],
            [4, 4, 1],
            [CONSUMER_REGS, CONSUMER_REGS, PRODUCER_REGS],
        )  # fmt: skip

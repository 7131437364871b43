"""Attention forward on Hopper without a mask, with KV tiles whose length is no power of two: the device code.

FlashAttention-3 takes 176 keys at a time at head_dim 128 and 80 at 256, as many as registers hold (Shah et al., 2024,
arXiv:2407.08608; https://github.com/Dao-AILab/flash-attention, hopper/tile_size.h): what a tile costs beside its
products is spread over more of them. Gluon's tensors and its matrix products have powers of two. Here Q @ K^T is one
wgmma of any length, by inline assembly, whose result comes as tensors of 16 columns, and they are put together to
parts of powers of two (176 = 128 + 32 + 16); the rest is plain Gluon on tuples of parts, and what `forward_kernel.py`
says of warp groups and of overlap holds.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from fa3_inductor.kernels.compat import reinterpret, tma_load
from fa3_inductor.kernels.forward_kernel import (
    ROWS,
    TURN,
    _arrive,
    _barriers,
    _finish_rows,
    _mask,
    _pack,
    _rescale,
    _row_sums,
    _sync,
    _unpack,
)

# Shared memory is dealt out by groups of 8 rows of 128 bytes, of which a swizzled tile is made: 1 KB.
GROUP = gl.constexpr(8)
COLUMNS = gl.constexpr(64)


@gluon.constexpr_function
def _product_asm(bits: str, columns: int, head_dim: int) -> str:
    """Q [64, head_dim] @ K [columns, head_dim]^T, from the addresses of both, as wgmma descriptors have them."""
    registers = columns // 2
    into = ", ".join(f"${i}" for i in range(registers))
    lines = [
        "{",
        ".reg .b64 a, b;",
        ".reg .b32 x, y, h;",
        ".reg .pred p;",
        "setp.ne.b32 p, 0, 0;",
        "mov.u32 h, 0x40000040;",  # swizzled by 128 bytes; 1024 from one group of rows to the next
        "wgmma.fence.sync.aligned;",
    ]
    for step in range(head_dim // 16):
        half, within = divmod(step, 4)
        # In units of 16 bytes.
        lines += [
            f"add.u32 x, ${registers}, {half * 64 * 8 + within * 2};",
            f"add.u32 y, ${registers + 8}, {half * columns * 8 + within * 2};",
            "mov.b64 a, {x, h};",
            "mov.b64 b, {y, h};",
            f"wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.{bits}.{bits} {{{into}}}, a, b, p, 1, 1, 0, 0;",
        ]
        if step == 0:
            lines.append("setp.eq.b32 p, 0, 0;")
    return "\n".join([*lines, "wgmma.commit_group.sync.aligned;", "}"])


@gluon.constexpr_function
def _product_constraints(columns: int) -> str:
    return ",".join(["=f"] * (columns // 2) + ["r"] * 16)


@gluon.constexpr_function
def _product_types(columns: int):
    return tuple(gl.float32 for _ in range(columns // 16))


@gluon.constexpr_function
def _bits(dtype) -> str:
    return "bf16" if dtype == gl.bfloat16 else "f16"


@gluon.constexpr_function
def _accumulator(columns: int):
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 16])


@gluon.jit
def _own_address(smem):
    """The address of shared memory, 1024-aligned, which Gluon does not tell.

    Every kilobyte is written its own address to, and what the memory then holds is read.
    """
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    at = gl.arange(0, 128, layout) * 1024
    gl.inline_asm_elementwise(
        "{ .reg .b32 a; mov.u32 a, global_smem; add.u32 a, a, $1; st.shared.b32 [a], a; mov.u32 $0, 0; }",
        "=r,r", [at], gl.int32, False, 1,
    )  # fmt: skip
    gl.thread_barrier()
    word = reinterpret(smem.index(0), gl.int32, [1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    address = gl.max(word.load(layout), 0)
    gl.thread_barrier()
    return address


@gluon.jit
def _view(smem, group, NUMBER: gl.constexpr, WIDTH: gl.constexpr):
    """The shared memory from a group on as NUMBER rows of WIDTH columns."""
    return reinterpret(smem.index(group), smem.dtype, [1, 1, NUMBER, WIDTH], smem.layout)


@gluon.jit
def _matrix(tile):
    return tile.reshape([tile.shape[2], tile.shape[3]])


@gluon.jit
def _meet():
    """Waits for all warps of both CTAs of the cluster."""
    gl.inline_asm_elementwise(
        "barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned; mov.u32 $0, 0;", "=r", [],
        gl.int32, False, 1,
    )  # fmt: skip


@gluon.jit
def _release(at):
    """Counts this warp in at the mbarrier of that address of both CTAs."""
    gl.inline_asm_elementwise(
        """{
        .reg .pred p;
        .reg .b32 lane, remote;
        mov.u32 lane, %laneid;
        setp.lt.u32 p, lane, 2;
        @p mapa.shared::cluster.u32 remote, $1, lane;
        @p mbarrier.arrive.shared::cluster.b64 _, [remote];
        mov.u32 $0, 0;
        }""",
        "=r,r", [at], gl.int32, False, 1,
    )  # fmt: skip


@gluon.constexpr_function
def _multicast_asm(descriptor: int) -> str:
    return f"""{{
    .reg .pred p;
    .reg .b16 both;
    .reg .b64 map;
    elect.sync _|p, 0xffffffff;
    mov.u16 both, 3;
    mov.b64 map, forward_plain_kernel_param_{descriptor * 9};
    cvta.param.u64 map, map;
    @p cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster
        [$1], [map, {{$3, $4, $5, $6}}], [$2], both;
    mov.u32 $0, 0;
    }}"""


@gluon.jit
def _multicast(DESCRIPTOR: gl.constexpr, at, bar, column, row, head, batch):
    """Brings a block into the same shared memory of both CTAs."""
    gl.inline_asm_elementwise(
        _multicast_asm(DESCRIPTOR), "=r,r,r,r,r,r,r", [at, bar, column, row, head, batch], gl.int32, False, 1
    )


@gluon.constexpr_function
def _first_row(descs, part: int) -> int:
    return sum(desc.type.block_type.shape[2] for desc in descs[:part])


@gluon.constexpr_function
def _groups(rows: int, columns: int) -> int:
    return rows // 8 * (columns // 64)


@gluon.jit
def _load_half(
    DESCRIPTOR: gl.constexpr, descs, batch, head, row, rank, at, bar, BLOCK_N: gl.constexpr, D: gl.constexpr,
    WHOLE: gl.constexpr,
):  # fmt: skip
    """Brings this CTA's half of the columns of BLOCK_N rows to both CTAs.

    If WHOLE, each 64 columns lie in one piece; else those of each part, the parts one after the other.
    """
    for i in gl.static_range(len(descs)):
        for pair in gl.static_range(D // COLUMNS // 2):
            half = 2 * pair + rank
            if WHOLE:
                to = at + (half * BLOCK_N + _first_row(descs, i)) * 128
            else:
                to = at + (_first_row(descs, i) * (D // COLUMNS) + half * descs[i].block_type.shape[2]) * 128
            _multicast(DESCRIPTOR + i, to, bar, half * COLUMNS, row + _first_row(descs, i), head, batch)


@gluon.jit
def _produce(
    args, BLOCK_N: gl.constexpr, D: gl.constexpr, DV: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr
):
    """The producer warp. Values lag keys by one tile, as their use does."""
    q_desc, k_descs, v_descs, smem, address, q_full, q_empty, bars, work = args
    pairs, pairs_of_head, q_heads, group, seqlen_k = work
    Q_GROUPS: gl.constexpr = _groups(ROWS, D)
    K_GROUPS: gl.constexpr = _groups(BLOCK_N, D)
    V_GROUPS: gl.constexpr = _groups(BLOCK_N, DV)
    K_FIRST: gl.constexpr = CONSUMERS * Q_GROUPS
    V_FIRST: gl.constexpr = K_FIRST + STAGES * K_GROUPS
    BARS: gl.constexpr = V_FIRST + STAGES * V_GROUPS
    PARTS: gl.constexpr = len(k_descs)
    rank = gl.program_id(0) % 2
    _meet()
    it = 0
    step = 0
    n_tiles = (seqlen_k + BLOCK_N - 1) // BLOCK_N
    for number in range(gl.program_id(0) // 2, pairs, gl.num_programs(0) // 2):
        m_tile = number % pairs_of_head * 2 + rank
        flat = number // pairs_of_head
        batch = flat // q_heads
        head = flat % q_heads
        kv_head = head // group
        row = (n_tiles - 1) * BLOCK_N
        for j in range(n_tiles + 1):
            if j < n_tiles:
                slot = it % STAGES
                mbarrier.wait(bars.index(2 * STAGES + slot), ((it // STAGES) & 1) ^ 1)
                mbarrier.expect(bars.index(slot), BLOCK_N * D * 2)
                _load_half(
                    1, k_descs, batch, kv_head, row, rank, address + (K_FIRST + slot * K_GROUPS) * 1024,
                    address + BARS * 1024 + slot * 8, BLOCK_N, D, True,
                )  # fmt: skip
            if j == 0:
                for wg in gl.static_range(CONSUMERS):
                    mbarrier.wait(q_empty.index(wg), (step & 1) ^ 1)
                    mbarrier.expect(q_full.index(wg), q_desc.block_type.nbytes)
                    tma_load(
                        q_desc, [batch, head, (m_tile * CONSUMERS + wg) * ROWS, 0], q_full.index(wg),
                        _view(smem, wg * Q_GROUPS, ROWS, D),
                    )  # fmt: skip
            else:
                v_it = it - 1
                v_slot = v_it % STAGES
                mbarrier.wait(bars.index(3 * STAGES + v_slot), ((v_it // STAGES) & 1) ^ 1)
                mbarrier.expect(bars.index(STAGES + v_slot), BLOCK_N * DV * 2)
                _load_half(
                    1 + PARTS, v_descs, batch, kv_head, row + BLOCK_N, rank,
                    address + (V_FIRST + v_slot * V_GROUPS) * 1024, address + BARS * 1024 + (STAGES + v_slot) * 8,
                    BLOCK_N, DV, False,
                )  # fmt: skip
            if j < n_tiles:
                it += 1
                row -= BLOCK_N
        step += 1
    _meet()


@gluon.jit
def _side_by_side(a, b):
    """Two matrices as one, without moving a register."""
    both = gl.join(a, b).permute((0, 2, 1)).reshape([a.shape[0], 2 * a.shape[1]])
    return gl.convert_layout(both, _accumulator(2 * a.shape[1]), assert_trivial=True)


@gluon.jit
def _joined(pieces, FIRST: gl.constexpr, COLUMNS_: gl.constexpr):
    """The 16-column pieces from FIRST on as one matrix."""
    if COLUMNS_ == 16:
        return pieces[FIRST]
    else:
        left = _joined(pieces, FIRST, COLUMNS_ // 2)
        right = _joined(pieces, FIRST + COLUMNS_ // 32, COLUMNS_ // 2)
        return _side_by_side(left, right)


@gluon.jit
def _issue_scores(q_at, k_at, dtype: gl.constexpr, BLOCK_N: gl.constexpr, D: gl.constexpr):
    """Issues Q @ K^T; the result comes in pieces of 16 columns."""
    layout: gl.constexpr = _accumulator(16)
    return gl.inline_asm_elementwise(
        _product_asm(_bits(dtype), BLOCK_N, D), _product_constraints(BLOCK_N),
        [gl.full([ROWS, 16], 0, gl.int32, layout) + q_at, gl.full([ROWS, 16], 0, gl.int32, layout) + k_at],
        _product_types(BLOCK_N), False, 8,
    )  # fmt: skip


@gluon.jit
def _wait_scores(pieces, PENDING: gl.constexpr, descs):
    """Waits for the scores, and puts the pieces together to the parts that the weights have."""
    deps = []
    for i in gl.static_range(len(pieces)):
        deps = deps + [pieces[i]]
    pieces = warpgroup_mma_wait(PENDING, deps)
    s = ()
    for i in gl.static_range(len(descs)):
        s = s + (_joined(pieces, _first_row(descs, i) // 16, descs[i].block_type.shape[2]),)
    return s


@gluon.jit
def _mask_end(s, stop):
    """-inf from column `stop` on."""
    layout: gl.constexpr = s.type.layout
    high = gl.full([ROWS], 0, gl.int32, gl.SliceLayout(1, layout)) + stop
    return _mask(s, high, high, False, layout)


@gluon.jit
def _row_max(s):
    """[M, N] -> [M, 4]: over the columns a thread holds."""
    quads = s.reshape([s.shape[0], s.shape[1] // 8, 4, 2])
    return gl.max(gl.max(quads, 3), 1)


@gluon.jit
def _softmax_parts(s, m_i, scale, rows_layout: gl.constexpr):
    """As `_softmax`, of parts; and the sums of the weights, as `_row_sums` has them."""
    top = _row_max(s[0])
    for i in gl.static_range(1, len(s)):
        top = gl.maximum(top, gl.convert_layout(_row_max(s[i]), top.type.layout, assert_trivial=True))
    m_new = gl.maximum(m_i, gl.convert_layout(gl.max(top, 1), rows_layout, assert_trivial=True))
    m_scaled = gl.where(m_new == float("-inf"), 0.0, m_new) * scale
    alpha = gl.exp2(m_i * scale - m_scaled)
    weights = ()
    for i in gl.static_range(len(s)):
        own = gl.convert_layout(m_scaled, gl.SliceLayout(1, s[i].type.layout), assert_trivial=True)
        weights = weights + (gl.exp2(s[i] * scale - own[:, None]),)
    sums = _row_sums(weights[0])
    for i in gl.static_range(1, len(s)):
        sums += gl.convert_layout(_row_sums(weights[i]), sums.type.layout, assert_trivial=True)
    return weights, m_new, alpha, sums


@gluon.jit
def _pack_parts(weights, dtype: gl.constexpr):
    packed = ()
    for i in gl.static_range(len(weights)):
        packed = packed + (_pack(weights[i], dtype),)
    return packed


@gluon.jit
def _accumulate_parts(packed, smem, group, descs, o, dtype: gl.constexpr, layout: gl.constexpr, GROUPS: gl.constexpr):
    """Issues O += P @ V, part for part. Returns the weights too, which have to live until it is done."""
    p = ()
    for i in gl.static_range(len(packed)):
        own = _unpack(packed[i], dtype, layout)
        o = warpgroup_mma(own, _matrix(_view(smem, group, descs[i].block_type.shape[2], GROUPS * COLUMNS)), o, is_async=True)
        group += descs[i].block_type.shape[2] // GROUP * GROUPS
        p = p + (own,)
    return o, p


@gluon.jit
def _wait_output(o, p):
    deps = [o]
    for i in gl.static_range(len(p)):
        deps = deps + [p[i]]
    return warpgroup_mma_wait(0, deps)[0]


@gluon.constexpr_function
def _exchange_and_store_asm() -> str:
    """Of each of two rows four words, 8 columns apart, of a thread; four neighbours make 16 bytes of them each."""
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


@gluon.jit
def _store(o, out, batch, head, row0, seqlen_q, dtype: gl.constexpr):
    """Writes O past shared memory, which is the next tile's already."""
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
        _exchange_and_store_asm(), "=r,=r,=r,=r,=r,=r,=r,=r,r,r,r,r,r,r,r,r,l,l,l,l,l,l,l,l,r,r,r,r,r,r,r,r",
        [packed, at, inside.to(gl.int32)], gl.int32, False, 8,
    )  # fmt: skip


@gluon.jit
def _consume(
    args, WG: gl.constexpr, BLOCK_N: gl.constexpr, D: gl.constexpr, DV: gl.constexpr, CONSUMERS: gl.constexpr,
    STAGES: gl.constexpr, PING_PONG: gl.constexpr, SINKS: gl.constexpr,
):  # fmt: skip
    """Consumer warp group number WG: its ROWS rows of every tile."""
    q_desc, v_descs, out, lse_ptr, sinks_ptr, smem, address, q_full, q_empty, bars, work, scale, seqlen_q = args
    pairs, pairs_of_head, q_heads, group, seqlen_k = work
    dtype: gl.constexpr = q_desc.dtype
    rows_layout: gl.constexpr = gl.SliceLayout(1, _accumulator(v_descs[0].block_type.shape[2]))
    o_layout: gl.constexpr = _accumulator(DV)
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    PARTS: gl.constexpr = len(v_descs)
    Q_GROUPS: gl.constexpr = _groups(ROWS, D)
    K_GROUPS: gl.constexpr = _groups(BLOCK_N, D)
    V_GROUPS: gl.constexpr = _groups(BLOCK_N, DV)
    K_FIRST: gl.constexpr = CONSUMERS * Q_GROUPS
    V_FIRST: gl.constexpr = K_FIRST + STAGES * K_GROUPS
    BARS: gl.constexpr = V_FIRST + STAGES * V_GROUPS
    empty = address + BARS * 1024 + 2 * STAGES * 8
    _meet()
    # As wgmma's descriptors have them, in units of 16 bytes; bit 16 is a stride that swizzled tiles do not have.
    base = (address >> 4) | 0x10000
    q_at = base + WG * Q_GROUPS * 64
    k_base = base + K_FIRST * 64
    if PING_PONG and WG == CONSUMERS - 1:
        _arrive(TURN, 256)
    it = 0
    step = 0
    n_tiles = (seqlen_k + BLOCK_N - 1) // BLOCK_N
    for number in range(gl.program_id(0) // 2, pairs, gl.num_programs(0) // 2):
        m_tile = number % pairs_of_head * 2 + gl.program_id(0) % 2
        flat = number // pairs_of_head
        batch = flat // q_heads
        head = flat % q_heads
        row0 = (m_tile * CONSUMERS + WG) * ROWS

        # The last KV tile, alone: no weights to multiply by V yet. It is the only one that can reach past the end of K.
        slot = it % STAGES
        mbarrier.wait(q_full.index(WG), step & 1)
        mbarrier.wait(bars.index(slot), (it // STAGES) & 1)
        if PING_PONG:
            _sync(TURN + WG, 256)
        pieces = _issue_scores(q_at, k_base + slot * (K_GROUPS * 64), dtype, BLOCK_N, D)
        if PING_PONG:
            _arrive(TURN + (WG + 1) % CONSUMERS, 256)
        s = _wait_scores(pieces, 0, v_descs)
        _release(empty + slot * 8)
        masked = ()
        left = seqlen_k - (n_tiles - 1) * BLOCK_N
        for i in gl.static_range(PARTS):
            masked = masked + (_mask_end(s[i], left),)
            left -= s[i].shape[1]
        m_i = gl.full([ROWS], float("-inf"), gl.float32, rows_layout)
        weights, m_i, alpha, l_i = _softmax_parts(masked, m_i, scale, rows_layout)
        packed = _pack_parts(weights, dtype)
        o = gl.zeros([ROWS, DV], gl.float32, o_layout)
        it += 1

        for _ in range(n_tiles - 1):
            slot = it % STAGES
            v_slot = (it - 1) % STAGES
            mbarrier.wait(bars.index(slot), (it // STAGES) & 1)
            if PING_PONG:
                _sync(TURN + WG, 256)
            pieces = _issue_scores(q_at, k_base + slot * (K_GROUPS * 64), dtype, BLOCK_N, D)
            mbarrier.wait(bars.index(STAGES + v_slot), ((it - 1) // STAGES) & 1)
            o, p = _accumulate_parts(
                packed, smem, V_FIRST + v_slot * V_GROUPS, v_descs, o, dtype, p_layout, DV // COLUMNS
            )
            if PING_PONG:
                _arrive(TURN + (WG + 1) % CONSUMERS, 256)
            s = _wait_scores(pieces, PARTS, v_descs)
            _release(empty + slot * 8)
            weights, m_i, alpha, sums = _softmax_parts(s, m_i, scale, rows_layout)
            l_i = _rescale(l_i, alpha) + sums
            o = _wait_output(o, p)
            _release(empty + (STAGES + v_slot) * 8)
            packed = _pack_parts(weights, dtype)
            o = _rescale(o, alpha)
            it += 1
        mbarrier.arrive(q_empty.index(WG), count=1)

        v_slot = (it - 1) % STAGES
        mbarrier.wait(bars.index(STAGES + v_slot), ((it - 1) // STAGES) & 1)
        o, p = _accumulate_parts(packed, smem, V_FIRST + v_slot * V_GROUPS, v_descs, o, dtype, p_layout, DV // COLUMNS)
        factor = _finish_rows(l_i, m_i * scale, sinks_ptr, lse_ptr, head, flat, row0, seqlen_q, SINKS, rows_layout)
        o = _wait_output(o, p)
        _release(empty + (STAGES + v_slot) * 8)
        o = _rescale(o, factor)
        _store(o, out, batch, head, row0, seqlen_q, dtype)
        step += 1
    _meet()


@gluon.jit
def _idle():
    """The producer's warp group has four warps, and all of them have to meet."""
    _meet()
    _meet()


@gluon.jit
def _two_or_three(first, second, third):
    if third is None:
        return (first, second)
    else:
        return (first, second, third)


@gluon.jit(
    do_not_specialize=["pairs", "pairs_of_head", "q_heads", "group", "seqlen_q", "seqlen_k"],
    do_not_specialize_on_alignment=["sinks_ptr"],
)  # fmt: skip
def forward_plain_kernel(
    q_desc, k_desc, k_desc2, k_desc3, v_desc, v_desc2, v_desc3, out, lse_ptr, sinks_ptr,
    pairs, pairs_of_head, q_heads, group, seqlen_q, seqlen_k, scale,
    DV: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr, PING_PONG: gl.constexpr, CONSUMER_REGS: gl.constexpr,
    PRODUCER_REGS: gl.constexpr,
):  # fmt: skip
    D: gl.constexpr = q_desc.block_type.shape[3]
    k_descs = _two_or_three(k_desc, k_desc2, k_desc3)
    v_descs = _two_or_three(v_desc, v_desc2, v_desc3)
    BLOCK_N: gl.constexpr = _first_row(v_descs, len(v_descs))
    BARS: gl.constexpr = CONSUMERS * _groups(ROWS, D) + STAGES * (_groups(BLOCK_N, D) + _groups(BLOCK_N, DV))
    smem = gl.allocate_shared_memory(q_desc.dtype, [BARS + 1, 1, 1, GROUP, COLUMNS], q_desc.layout)
    address = _own_address(smem)
    q_full = _barriers(CONSUMERS)
    q_empty = _barriers(CONSUMERS)
    # Of K and of V, when a tile is there: STAGES each; and when the consumers of both CTAs have let go of it.
    bars = reinterpret(smem.index(BARS), gl.int64, [4 * STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2 * STAGES):
        mbarrier.init(bars.index(i), count=1)
        mbarrier.init(bars.index(2 * STAGES + i), count=2 * CONSUMERS * 4)
    fence_async_shared()
    gl.inline_asm_elementwise("fence.mbarrier_init.release.cluster; mov.u32 $0, 0;", "=r", [], gl.int32, False, 1)

    work = (pairs, pairs_of_head, q_heads, group, seqlen_k)
    produce = (q_desc, k_descs, v_descs, smem, address, q_full, q_empty, bars, work)
    consume = (
        q_desc, v_descs, out, lse_ptr, sinks_ptr, smem, address, q_full, q_empty, bars, work, scale, seqlen_q,
    )  # fmt: skip
    SINKS: gl.constexpr = sinks_ptr is not None
    gl.warp_specialize(
        [
            (_consume, (consume, 0, BLOCK_N, D, DV, CONSUMERS, STAGES, PING_PONG, SINKS)),
            (_consume, (consume, 1, BLOCK_N, D, DV, CONSUMERS, STAGES, PING_PONG, SINKS)),
            (_produce, (produce, BLOCK_N, D, DV, CONSUMERS, STAGES)),
            (_idle, ()),
            (_idle, ()),
        ],
        [4, 1, 1, 2],
        [CONSUMER_REGS, PRODUCER_REGS, PRODUCER_REGS, PRODUCER_REGS],
    )

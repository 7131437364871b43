"""dQ's sums inside the backward kernel: a few heads' memory that all heads take in turn, and warps that round it.

Every tile of keys adds its part of dQ in float32, so dQ is there when the last tile of its keys' head is done. For
FlashAttention-3 (Shah et al., 2024, arXiv:2407.08608, appendix B.1) that is when the kernel ends: sums of all heads are
zeroed by one kernel and rounded by another. Here two warps of every CTA round what is complete, put zeros in its place
and give the memory to a later head. It is small enough to stay in the L2 cache: the pass over device memory that rounds
is gone, and the one that zeroes is as short as this.

Nobody waits for a CTA that may not be running yet: tiles of keys and pieces of dQ are handed out in order, to those who
ask, and whoever waits does so for what was handed out before. `counts`, int32, zero at first, are

    [0]                       tiles of keys handed out
    [1]                       pieces of dQ handed out
    [2 + head]                tiles of keys that are added up, for each kv head of all batches
    [2 + heads + head]        pieces of dQ rounded
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from fa3_inductor.kernels.compat import reinterpret, thread_barrier, tma_load

WARPS = gl.constexpr(2)  # that round
BOX = (128, 32)  # rows and columns of a piece that come by TMA at once: a row is as long as the swizzle's period
STAGES = gl.constexpr(2)  # boxes in shared memory
HEADS = gl.constexpr(2)  # where the counts of heads begin
_ROWS = gl.constexpr(8)  # of a box that are in registers at a time: the other period of the swizzle


def slots_of(heads: int, n_tiles: int, section: int, ctas: int) -> int:
    """How many kv heads' sums there are: enough for those that are worked on and those that wait to be rounded.

    On an H200, at 512 positions, causal, CTAs wait with too few (head_dim 64, 51 for sections of 16 in place of 133 for
    66: 155 TFLOP/s, 199), and with four times as many the L2 cache is too small (head_dim 128: 206, 221).

    heads: of all batches; n_tiles: of a head's keys; section: as `backward_kernel._place` has it.
    """
    return min(heads, max(2 * section, -(-5 * ctas // (2 * n_tiles))) + 1)


def count_size(heads: int) -> int:
    """How many counts there are."""
    return 2 + 2 * heads


# What the parts of the kernel are told is `ring`: how many slots there are, the sums as TMA has them in boxes, counts,
# the sums and how many eights of columns they have, dq and its strides in eights, the kv heads of all batches, the
# tiles of keys of each, kv heads, query heads of each, rows of a head's sums, seqlen_q, scale. With (None,), nothing is
# rounded.


@gluon.jit
def _wait_for(count_ptr, number, pause, N_WARPS: gl.constexpr):
    """Waits until a count is `number` or more, and for what was written before that; `pause`: ns between two looks.

    One warp looks, and not too often: all counts are in one part of the L2 cache, which has dQ to add up as well. (At
    head_dim 64, 4096 positions, full, an H200 had 0.99 times the speed of two passes over device memory with two warps
    that look every 500 ns, and 1.06 so.)
    """
    thread = gl.arange(0, 32 * N_WARPS, gl.BlockedLayout([1], [32], [N_WARPS], [0]))
    gl.inline_asm_elementwise(
        """{
        .reg .pred looks, waits;
        .reg .b32 count;
        setp.lt.u32 looks, $1, 32;
        @!looks bra DONE;
        AGAIN:
        ld.relaxed.gpu.global.b32 count, [$2];
        setp.lt.s32 waits, count, $3;
        @waits nanosleep.u32 $4;
        @waits bra AGAIN;
        fence.acq_rel.gpu;
        fence.proxy.async.global;
        DONE:
        mov.u32 $0, 0;
        }""",
        "=r,r,l,r,r", [thread, count_ptr, number, pause], gl.int32, False, 1,
    )  # fmt: skip
    if N_WARPS > 1:
        thread_barrier()


@gluon.jit
def _count_up(count_ptr, N_WARPS: gl.constexpr):
    """Counts one up, after what these warps and those they waited for have written."""
    thread = gl.arange(0, 32 * N_WARPS, gl.BlockedLayout([1], [32], [N_WARPS], [0]))
    gl.inline_asm_elementwise(
        """{
        .reg .pred p;
        setp.eq.u32 p, $1, 0;
        @p red.release.gpu.global.add.u32 [$2], 1;
        mov.u32 $0, 0;
        }""",
        "=r,r,l", [thread, count_ptr], gl.int32, False, 1,
    )  # fmt: skip


@gluon.jit
def _pieces(group, seqlen_q, desc):
    """How many pieces the dQ of one kv head's queries has."""
    ROWS: gl.constexpr = desc.block_type.shape[0]
    return group * ((seqlen_q + ROWS - 1) // ROWS)


@gluon.jit
def _wait_for_slot(ring, head):
    """Waits until nobody needs the memory any more that a kv head's sums go to."""
    if ring[0] is not None:
        slots, sums_desc, counts_ptr = ring[:3]
        heads, group, seqlen_q = ring[9], ring[12], ring[14]
        if head >= slots:
            pieces = _pieces(group, seqlen_q, sums_desc)
            _wait_for(counts_ptr + HEADS + heads + head - slots, pieces, 500, 1)


@gluon.jit
def _round(ring, smem, there, WIDTH: gl.constexpr):
    """The warps that round: dq = scale * sums, and zeros instead of these."""
    if ring[0] is not None:
        slots, sums_desc, counts_ptr, sums_ptr, columns, dq_ptr, dq_batch, dq_head, dq_row = ring[:9]
        heads, n_tiles, kv_heads, group, padded_q, seqlen_q, scale = ring[9:]
        columns, dq_batch, dq_head, dq_row = columns * 8, dq_batch * 8, dq_head * 8, dq_row * 8
        ROWS: gl.constexpr = sums_desc.block_type.shape[0]
        COLUMNS: gl.constexpr = sums_desc.block_type.shape[1]
        PARTS: gl.constexpr = WIDTH // COLUMNS
        layout: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [WARPS, 1], [1, 0])
        rows = gl.arange(0, _ROWS, gl.SliceLayout(1, layout))[:, None]
        in_part = gl.arange(0, COLUMNS, gl.SliceLayout(0, layout))[None, :]
        zero = gl.zeros([_ROWS, COLUMNS], gl.float32, layout)
        pieces = _pieces(group, seqlen_q, sums_desc)
        blocks = pieces // group
        it = 0
        piece = gl.atomic_add(counts_ptr + 1, 1, sem="relaxed")
        while piece < heads * pieces:
            flat = piece // pieces
            member = piece % pieces // blocks
            row0 = piece % blocks * ROWS
            place = (flat % slots * group + member) * padded_q + row0
            to_ptr = dq_ptr + (flat // kv_heads).to(gl.int64) * dq_batch
            to_ptr += (flat % kv_heads * group + member).to(gl.int64) * dq_head + row0.to(gl.int64) * dq_row
            from_ptr = sums_ptr + place.to(gl.int64) * columns
            # (That is 2 % of the time that a tile of keys takes.)
            _wait_for(counts_ptr + HEADS + flat, n_tiles, seqlen_q // 4, WARPS)
            for ahead in range(PARTS + 1):
                if ahead < PARTS:
                    bar = there.index((it + ahead) % STAGES)
                    mbarrier.expect(bar, sums_desc.block_type.nbytes)
                    tma_load(sums_desc, [place, ahead * COLUMNS], bar, smem.index((it + ahead) % STAGES))
                if ahead > 0:
                    box = ahead - 1
                    slot = (it + box) % STAGES
                    column = box * COLUMNS + in_part
                    some = reinterpret(smem.index(slot), gl.float32, [ROWS // _ROWS, _ROWS, COLUMNS], sums_desc.layout)
                    mbarrier.wait(there.index(slot), (it + box) // STAGES & 1)
                    for i in range(ROWS // _ROWS):
                        x = some.index(i).load(layout)
                        at = i * _ROWS + rows
                        gl.store(
                            to_ptr + (at.to(gl.int64) * dq_row + column), (x * scale).to(dq_ptr.dtype.element_ty),
                            mask=(at < seqlen_q - row0) & (column < columns),
                        )  # fmt: skip
                        gl.store(from_ptr + (at * columns + column), zero, mask=column < columns)
                    thread_barrier()
            it += PARTS
            piece = gl.atomic_add(counts_ptr + 1, 1, sem="relaxed")
            thread_barrier()
            _count_up(counts_ptr + HEADS + heads + flat, WARPS)

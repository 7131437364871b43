"""In which KV tiles a mask leaves anything to do, and in which of them it hides nothing.

The forward kernel skips the tiles before and behind the ones that a block of query rows sees, and does not read the
mask where it hides nothing. The backward does the same with queries and keys exchanged, and hands over the mask's
transpose. So padding, documents packed into one sequence, chunks and prefixes cost what they show.
For that the mask is read once more than it would be anyway: a byte for 4 * head_dim operations of every head. A formula
is computed once more.
"""

import triton
import triton.language as tl
from torch import Tensor

from fa3_inductor.kernels.formulas import NO_FORMULAS, Formulas, names, tables_of
from fa3_inductor.kernels.terms import program_of, shown

COLUMNS = 4  # first tile, stop tile, first full tile, stop full tile


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def ranges_kernel(
    mask_ptr, operands, ranges_ptr, by_batch, by_head, by_query, by_key, heads, blocks, seqlen_q, seqlen_k,
    SHOWN: tl.constexpr, BY_KEY: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program for each block of ROWS query rows; TILES tiles of BLOCK_N keys at a time."""
    number = tl.program_id(0)
    flat = number // blocks
    batch, head = flat // heads, flat % heads
    rows = tl.minimum((number % blocks) * ROWS + tl.arange(0, ROWS), seqlen_q - 1)
    if mask_ptr is not None:
        at = mask_ptr + batch.to(tl.int64) * by_batch + head.to(tl.int64) * by_head + rows.to(tl.int64) * by_query
    count = tl.cdiv(seqlen_k, BLOCK_N)
    first, stop = count, 0
    longest, full_stop, last_gap = 0, 0, -1  # runs of tiles of which every row sees every key
    start = 0
    while start < count:
        tiles = start + tl.arange(0, TILES)
        columns = start * BLOCK_N + tl.arange(0, TILES * BLOCK_N)
        if mask_ptr is None:
            visible = tl.broadcast_to((columns < seqlen_k)[None, :], [ROWS, TILES * BLOCK_N]).to(tl.int8)
        else:
            places = at[:, None] + columns.to(tl.int64)[None, :] * by_key
            visible = tl.load(places, mask=(columns < seqlen_k)[None, :], other=0)
        if SHOWN is not None:
            if BY_KEY:
                shown = SHOWN(operands, batch, head, columns, rows, seqlen_k, seqlen_q)
            else:
                shown = SHOWN(operands, batch, head, rows, columns, seqlen_q, seqlen_k)
            visible = tl.where(shown, visible, 0)
        some = tl.max(tl.reshape(tl.max(visible, 0), [TILES, BLOCK_N]), 1) != 0
        every = tl.min(tl.reshape(tl.min(visible, 0), [TILES, BLOCK_N]), 1) != 0
        first = tl.minimum(first, tl.min(tl.where(some, tiles, count), 0))
        stop = tl.maximum(stop, tl.max(tl.where(some, tiles + 1, 0), 0))
        gaps = tl.maximum(tl.associative_scan(tl.where(every, -1, tiles), 0, _larger), last_gap)
        lengths = tiles - gaps
        best = tl.max(lengths, 0)
        full_stop = tl.where(best > longest, tl.max(tl.where(lengths == best, tiles + 1, 0), 0), full_stop)
        longest = tl.maximum(longest, best)
        last_gap = tl.max(gaps, 0)
        start += TILES
    to = ranges_ptr + number.to(tl.int64) * 4
    tl.store(to, tl.minimum(first, stop))
    tl.store(to + 1, stop)
    tl.store(to + 2, full_stop - longest)
    tl.store(to + 3, full_stop)


def mask_axes(
    mask: Tensor | None, formulas: Formulas, shape: tuple[int, ...]
) -> tuple[bool, bool, bool, bool]:  # fmt: skip
    """Along which axes of [B, Hq, Sq, Sk] it varies what a mask of that shape and the formula show."""
    tables = [formulas.tables[n].expand(shape) for n in tables_of(formulas.mask)]
    read = (*tables, *(() if mask is None else (mask,)))
    axes = [size > 1 and any(x.stride(axis) != 0 for x in read) for axis, size in enumerate(shape)]
    used = names(formulas.mask)
    return axes[0], axes[1], axes[2] or "q" in used, axes[3] or "k" in used


def ranges_shape(shape: tuple[int, ...], axes: tuple[bool, ...], rows: int) -> tuple[int, int, int, int]:
    """The shape [B or 1, H or 1, blocks of `rows` query rows or 1, COLUMNS] of the ranges of a mask of `shape`.

    Args:
        axes: along which it varies.
    """
    batch, heads, seqlen_q = (size if varies else 1 for size, varies in zip(shape[:3], axes))
    return batch, heads, -(-seqlen_q // rows), COLUMNS


def ranges_arguments(
    mask: Tensor | None, ranges: Tensor, rows: int, block_n: int, shape: tuple[int, ...], by_row: bool,
    formulas: Formulas = NO_FORMULAS, by_key: bool = False,
) -> tuple[tuple[int, int, int], tuple]:  # fmt: skip
    """The grid and the arguments of the kernel.

    Args:
        mask: [B, Hq, Sq, Sk], uint8, 0 where a key is hidden; of an expanded axis, one element is read.
        ranges: int32, contiguous, of `ranges_shape`: the KV tiles first ... stop - 1 hold all keys that any of the rows
            sees; of full_first ... full_stop - 1, the longest such run, every row sees every key. All 0 for none.
        shape: [B, Hq, Sq, Sk]; by_row: whether what is shown varies from query to query.
        formulas: of the scores; that of the mask hides keys as well.
        by_key: queries and keys are exchanged, in `mask` and `shape`.
    """
    batch, heads, blocks, _ = ranges.shape
    strides = (0,) * 4 if mask is None else mask.stride()
    function, operands = None, ()
    if formulas.mask:
        scores = (*shape[:2], shape[3], shape[2]) if by_key else shape
        program, operands = program_of(None, None, None, scores, formulas)
        function = shown(program, by_key)
    if not by_row:
        rows, keys = 1, 2048 if shape[3] <= 8192 else 16384
    else:  # as much at once as is loaded 16 bytes at a time, for the memory to be busy
        is_aligned = strides[3] == 1 and not any(stride % 16 for stride in strides[:3])
        is_aligned = is_aligned and not formulas.mask and not mask.data_ptr() % 16
        keys = (1024 if is_aligned else 256) * 64 // rows
    return (batch * heads * blocks, 1, 1), (
        mask, operands, ranges, *strides, heads, blocks, *shape[2:], function, by_key, rows, keys // block_n, block_n,
    )  # fmt: skip

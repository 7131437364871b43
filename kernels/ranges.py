"""In which KV tiles a mask leaves anything to do, and in which of them it hides nothing.

The forward kernel skips the tiles before and behind the ones that a block of query rows sees, and does not read the
mask where it hides nothing. The backward does the same with queries and keys exchanged, and hands over the mask's
transpose. So padding, documents packed into one sequence, chunks and prefixes cost what they show.
For that the mask is read once more than it would be anyway: a byte for 4 * head_dim operations of every head.
"""

import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 4  # first tile, stop tile, first full tile, stop full tile


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def ranges_kernel(
    mask_ptr, ranges_ptr, by_batch, by_head, by_query, by_key, heads, blocks, seqlen_q, seqlen_k,
    ROWS: tl.constexpr, TILES: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program for each block of ROWS query rows; TILES tiles of BLOCK_N keys at a time."""
    number = tl.program_id(0)
    flat = number // blocks
    rows = tl.minimum((number % blocks) * ROWS + tl.arange(0, ROWS), seqlen_q - 1).to(tl.int64)
    at = mask_ptr + (flat // heads).to(tl.int64) * by_batch + (flat % heads).to(tl.int64) * by_head + rows * by_query
    count = tl.cdiv(seqlen_k, BLOCK_N)
    first, stop = count, 0
    longest, full_stop, last_gap = 0, 0, -1  # runs of tiles of which every row sees every key
    start = 0
    while start < count:
        tiles = start + tl.arange(0, TILES)
        columns = start * BLOCK_N + tl.arange(0, TILES * BLOCK_N)
        places = at[:, None] + columns.to(tl.int64)[None, :] * by_key
        visible = tl.load(places, mask=(columns < seqlen_k)[None, :], other=0)
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


def ranges_shape(mask: Tensor, rows: int) -> tuple[int, int, int, int]:
    """The shape [B or 1, H or 1, blocks of `rows` query rows or 1, COLUMNS] of the ranges of a mask [B, H, Sq, Sk]."""
    batch, heads, seqlen_q, _ = (1 if stride == 0 else size for size, stride in zip(mask.shape, mask.stride()))
    return batch, heads, -(-seqlen_q // rows), COLUMNS


def ranges_arguments(mask: Tensor, ranges: Tensor, rows: int, block_n: int) -> tuple[tuple[int, int, int], tuple]:
    """The grid and the arguments of the kernel.

    Args:
        mask: [B, Hq, Sq, Sk], uint8, 0 where a key is hidden; of an expanded axis, one element is read.
        ranges: int32, contiguous, of `ranges_shape`: the KV tiles first ... stop - 1 hold all keys that any of the rows
            sees; of full_first ... full_stop - 1, the longest such run, every row sees every key. All 0 for none.
    """
    batch, heads, blocks, _ = ranges.shape
    seqlen_q, seqlen_k = mask.shape[2:]
    *others, by_key = mask.stride()
    if not others[2]:
        rows, keys = 1, 2048
    else:  # as much at once as is loaded 16 bytes at a time, for the memory to be busy
        is_aligned = by_key == 1 and not any(stride % 16 for stride in others) and not mask.data_ptr() % 16
        keys = (1024 if is_aligned else 256) * 64 // rows
    return (batch * heads * blocks, 1, 1), (
        mask, ranges, *others, by_key, heads, blocks, seqlen_q, seqlen_k, rows, keys // block_n, block_n,
    )  # fmt: skip

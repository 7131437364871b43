"""From BF16/FP16 to float8_e4m3fn as the FP8 kernel wants it: block scales, incoherent processing, V transposed.

A block of rows (64 queries, or as many keys as a KV tile has) shares a scale, its largest number divided by 448. For
incoherent processing q and k are multiplied by one random orthogonal matrix, signs times a Hadamard matrix, which
spreads an outlier over the whole head_dim and changes no score (Shah et al., 2024, arXiv:2407.08608, section 3.3).
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from fa3_inductor.kernels import launch

LARGEST = 448.0  # of e4m3
SMALLEST_SCALE = 2.0**-60  # but for a block of zeros, which has 1: the ratio of two should be a finite number
_LARGEST, _SMALLEST_SCALE = tl.constexpr(LARGEST), tl.constexpr(SMALLEST_SCALE)
_MATRIX = 128  # rows of the largest Hadamard matrix that is multiplied with


@triton.jit
def _finite(x):
    """x in float32 with NaN in place of infinities, which e4m3 does not have."""
    x = x.to(tl.float32)
    return tl.where(tl.abs(x) == float("inf"), float("nan"), x)


@triton.jit
def _scale_of(x):
    """The scale of a block."""
    largest = tl.max(tl.max(tl.where(x == x, tl.abs(x), 0.0), 1), 0)
    return tl.where(largest == 0.0, 1.0, tl.maximum(largest / _LARGEST, _SMALLEST_SCALE))


@triton.jit
def _rows_of(x_ptr, batch, head, row, x_batch, x_head, x_row, column, seqlen, head_dim):
    inside = (row < seqlen) & (column < head_dim)[None, :]
    at = x_ptr + batch * x_batch + head * x_head + row * x_row + column[None, :]
    return tl.load(at, mask=inside, other=0)


@triton.jit
def rows_kernel(
    x_ptr, to_ptr, scales_ptr, matrix_ptr, x_batch, x_head, x_row, heads, seqlen, blocks, total, head_dim, width,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INCOHERENT: tl.constexpr, HALVES: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """A program takes STEPS blocks of ROWS rows in turn: x [B, H, S, D] -> to [B, H, S, width], scales [B, H, blocks].

    With HALVES, a row is twice COLUMNS wide: the Hadamard matrix of that size is made of those of its half.
    """
    column = tl.arange(0, COLUMNS)
    if INCOHERENT:
        at = matrix_ptr + tl.arange(0, COLUMNS)[:, None] * COLUMNS + column[None, :]
        matrix = tl.load(at)
        if HALVES:
            matrix2 = tl.load(at + COLUMNS * COLUMNS)
    for step in range(STEPS):
        number = tl.program_id(0) * STEPS + step
        flat = number // blocks
        row = number % blocks * ROWS + tl.arange(0, ROWS)
        row = tl.where(number < total, row, seqlen).to(tl.int64)[:, None]  # past the last block there is nothing
        batch, head = (flat // heads).to(tl.int64), (flat % heads).to(tl.int64)
        x = _rows_of(x_ptr, batch, head, row, x_batch, x_head, x_row, column, seqlen, head_dim)
        to = to_ptr + (flat.to(tl.int64) * seqlen + row) * width + column[None, :]
        store = (row < seqlen) & (column < width)[None, :]
        if HALVES:
            x2 = _rows_of(x_ptr, batch, head, row, x_batch, x_head, x_row, COLUMNS + column, seqlen, head_dim)
            left, right = tl.dot(x, matrix), tl.dot(x2, matrix2)
            y, y2 = _finite(left + right), _finite(left - right)
            scale = tl.maximum(_scale_of(y), _scale_of(y2))
            tl.store(to + COLUMNS, (y2 / scale).to(tl.float8e4nv), mask=store)
        else:
            if INCOHERENT:
                y = _finite(tl.dot(x, matrix))
            else:
                y = _finite(x)
            scale = _scale_of(y)
        tl.store(to, (y / scale).to(tl.float8e4nv), mask=store)
        tl.store(scales_ptr + number, scale, mask=number < total)


@triton.jit
def _rounded(y, scale, dtype: tl.constexpr):
    """What e4m3 makes of y / scale, as 16-bit numbers, which hold all of it."""
    return (y / scale).to(tl.float8e4nv).to(tl.float32).to(dtype)


@triton.jit
def round_trip_kernel(
    x_ptr, to_ptr, matrix_ptr, x_batch, x_head, x_row, to_batch, to_head, to_row, heads, seqlen, blocks, head_dim,
    factor,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INCOHERENT: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """One program for each block of ROWS rows: what `rows_kernel` makes of x, times the scales and turned back."""
    flat = tl.program_id(0) // blocks
    row = (tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    batch, head = (flat // heads).to(tl.int64), (flat % heads).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    x = _rows_of(x_ptr, batch, head, row, x_batch, x_head, x_row, column, seqlen, head_dim)
    to = to_ptr + batch * to_batch + head * to_head + row * to_row + column[None, :]
    inside = (row < seqlen) & (column < head_dim)[None, :]
    if INCOHERENT:
        at = matrix_ptr + tl.arange(0, COLUMNS)[:, None] * COLUMNS + column[None, :]
        matrix = tl.load(at)
    if HALVES:
        x2 = _rows_of(x_ptr, batch, head, row, x_batch, x_head, x_row, COLUMNS + column, seqlen, head_dim)
        matrix2 = tl.load(at + COLUMNS * COLUMNS)
        left, right = tl.dot(x, matrix), tl.dot(x2, matrix2)
        y, y2 = _finite(left + right), _finite(left - right)
        scale = tl.maximum(_scale_of(y), _scale_of(y2))
        y, y2 = _rounded(y, scale, dtype), _rounded(y2, scale, dtype)
        z = tl.dot(y, tl.trans(matrix)) + tl.dot(y2, tl.trans(matrix))
        z2 = tl.dot(y, tl.trans(matrix2)) - tl.dot(y2, tl.trans(matrix2))
        inside2 = (row < seqlen) & (COLUMNS + column < head_dim)[None, :]
        tl.store(to + COLUMNS, (z2 * (scale * factor)).to(dtype), mask=inside2)
    elif INCOHERENT:
        y = _finite(tl.dot(x, matrix))
        scale = _scale_of(y)
        z = tl.dot(_rounded(y, scale, dtype), tl.trans(matrix))
    else:
        y = _finite(x)
        scale = _scale_of(y)
        z = _rounded(y, scale, dtype).to(tl.float32)
    tl.store(to, (z * (scale * factor)).to(dtype), mask=inside)


@triton.jit
def values_kernel(
    v_ptr, to_ptr, scales_ptr, v_batch, v_head, v_row, heads, seqlen, padded, blocks, head_dim,
    KEYS: tl.constexpr, COLUMNS: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """One program for each block of KEYS keys: v [B, H, S, D] -> to [B, H, D, padded S], scales [B, H, blocks].

    `to` has the keys of each 16 in the order 0 1 8 9 2 3 10 11 4 5 12 13 6 7 14 15. Unless SCALED, v is e4m3 already.
    """
    flat = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    batch, head = (flat // heads).to(tl.int64), (flat % heads).to(tl.int64)
    place = tl.arange(0, KEYS)
    key = (place & -16) + (place & 1) + ((place >> 2) & 3) * 2 + ((place >> 1) & 1) * 8
    key = (block * KEYS + key).to(tl.int64)[:, None]
    column = tl.arange(0, COLUMNS)
    inside = (key < seqlen) & (column < head_dim)[None, :]
    x = tl.load(v_ptr + batch * v_batch + head * v_head + key * v_row + column[None, :], mask=inside, other=0)
    if SCALED:
        y = _finite(x)
        scale = _scale_of(y)
        tl.store(scales_ptr + tl.program_id(0), scale)
        x = (y / scale).to(tl.float8e4nv)
    place = block * KEYS + place
    to = to_ptr + (flat.to(tl.int64) * head_dim + column)[:, None] * padded + place[None, :]
    tl.store(to, tl.trans(x), mask=(column < head_dim)[:, None] & (place < padded)[None, :])


def rows_arguments(
    x: Tensor, to: Tensor, scales: Tensor, matrix: Tensor | launch.DeviceInts | None, rows: int
) -> tuple[tuple[int, int, int], tuple, dict]:
    """The grid, the arguments and the options of the kernel.

    Args:
        x: BF16 or FP16 [B, H, S, D], D contiguous; to: e4m3, contiguous, [B, H, S, D or the matrix's columns].
        scales: float32, contiguous, [B, H, blocks of `rows` rows].
        matrix: of `orthogonal`, or None.
    """
    batch, heads, seqlen, head_dim = x.shape
    width, blocks = to.shape[3], scales.shape[2]
    total = batch * heads * blocks
    halves = matrix is not None and width > _MATRIX
    columns = width // 2 if halves else max(16, triton.next_power_of_2(width))
    # A program keeps the matrix, if there is work for all multiprocessors. Measured on an H200, 16384 tokens of width
    # 2048, us with these warps and stages and with twice the warps and one stage: head_dim 128, 128 rows, 43 and 78;
    # head_dim 256, 64 rows, 47 and 83.
    steps = 8 if matrix is not None and total >= 8 * 132 else 1
    if halves:
        options = {"num_warps": 4, "num_stages": 1} if rows <= 64 else {"num_warps": 8, "num_stages": 2}
    else:
        options = {"num_warps": 4, "num_stages": 3 if rows * width <= 64 * 128 else 2}
    return (triton.cdiv(total, steps), 1, 1), (
        x, to, scales, matrix, *x.stride()[:3], heads, seqlen, blocks, total, head_dim, width, rows, columns,
        matrix is not None, halves, steps,
    ), options  # fmt: skip


def round_trip_arguments(
    x: Tensor, to: Tensor, matrix: Tensor | launch.DeviceInts | None, rows: int
) -> tuple[tuple[int, int, int], tuple, dict]:
    """The grid, the arguments and the options of the kernel.

    Args:
        x, to: BF16 or FP16 [B, H, S, D], D contiguous.
        matrix: of `orthogonal`, or None; rows: that share a scale.
    """
    batch, heads, seqlen, head_dim = x.shape
    width = matrix_columns(head_dim)
    halves = matrix is not None and width > _MATRIX
    columns, blocks = width // 2 if halves else width, triton.cdiv(seqlen, rows)
    return (batch * heads * blocks, 1, 1), (
        x, to, matrix, *x.stride()[:3], *to.stride()[:3], heads, seqlen, blocks, head_dim,
        1.0 if matrix is None else 1.0 / width, rows, columns, matrix is not None, halves,
    ), {"num_warps": 8 if rows * columns > 64 * 128 else 4}  # fmt: skip


def values_arguments(
    v: Tensor, to: Tensor, scales: Tensor | None, keys: int
) -> tuple[tuple[int, int, int], tuple, dict]:
    """The grid, the arguments and the options of the kernel.

    Args:
        v: [B, H, S, D], D contiguous, BF16 or FP16, or e4m3 if scales is None; to: e4m3, contiguous, [B, H, D, padded].
        scales: float32, contiguous, [B, H, blocks of `keys` keys]; without them `keys` has no meaning.
    """
    batch, heads, seqlen, head_dim = v.shape
    if scales is None:  # nothing is computed, and Triton has no 8-bit zero to fill a tile with
        v, to, keys = v.view(torch.uint8), to.view(torch.uint8), 64
    blocks = triton.cdiv(seqlen, keys)
    columns = triton.next_power_of_2(head_dim)
    return (batch * heads * blocks, 1, 1), (
        v, to, scales, *v.stride()[:3], heads, seqlen, to.shape[3], blocks, head_dim, keys, columns, scales is not None,
    ), {"num_warps": 8 if keys * columns > 128 * 128 else 4}  # fmt: skip


def matrix_columns(head_dim: int) -> int:
    """The size of the orthogonal matrix for a head_dim: a power of two, 16 at least."""
    return max(16, triton.next_power_of_2(head_dim))


@functools.cache
def orthogonal(size: int, dtype: torch.dtype, device: int, seed: int) -> launch.DeviceInts:
    """`signed_hadamard` on a GPU, for good, as 16-bit numbers.

    Raises:
        RuntimeError: if there is no memory, or with the CUDA driver's name for what is wrong.
    """
    numbers = signed_hadamard(size, seed).to(dtype).contiguous().view(torch.int32)
    memory = launch.upload(numbers.flatten().tolist(), device)
    if memory is None:
        raise RuntimeError("no memory left on the GPU for a matrix of 64 KB")
    return launch.DeviceInts(memory.address, dtype)


def signed_hadamard(size: int, seed: int) -> Tensor:
    """Random signs times a Hadamard matrix, float32, not divided by sqrt(size); size is a power of two.

    Returns:
        [1, size, size]; above 128, of the two halves of its rows, [2, size / 2, size / 2] a and b: the whole is
        [[a, a], [b, -b]].
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    signs = torch.randint(0, 2, (size,), generator=generator, device="cpu") * 2.0 - 1.0
    matrix, columns = torch.ones(1, 1, device="cpu"), min(size, _MATRIX)
    while len(matrix) < columns:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return signs.view(-1, columns, 1) * matrix

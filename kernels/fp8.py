"""Attention forward on Hopper (sm_90a) with float8_e4m3fn operands: tile tables, what the kernel takes, and its launch.

`fp8_kernel.py` is the device code, `quantise.py` makes its operands, and `reference.py` is the specification.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime import driver

from fa3_inductor.kernels import forward, launch, output_like
from fa3_inductor.kernels.formulas import NO_FORMULAS, Formulas
from fa3_inductor.kernels.forward import ROWS, addressable, is_addressable, key_of, shared_layout
from fa3_inductor.kernels.fp8_kernel import fp8_kernel
from fa3_inductor.kernels.quantise import (
    matrix_columns,
    orthogonal,
    round_trip_arguments,
    round_trip_kernel,
    rows_arguments,
    rows_kernel,
    signed_hadamard,
    values_arguments,
    values_kernel,
)
from fa3_inductor.kernels.reference import by_tile
from fa3_inductor.kernels.terms import has_terms

_LOG2E = math.log2(math.e)
E4M3 = torch.float8_e4m3fn
STAGES = 2  # K tiles, and V tiles, in shared memory
MULTIPLE = 16  # of keys, to which the transposed V is padded: the alignment of its rows
# Up to how many query rows that share keys the kernel transposes V itself, once for every row tile. In front of it that
# takes 18 us for 32 MB. On an H200, beside FlashAttention-3, full, at 512 / 4096 / 16384 positions: head_dim 128,
# 0.95/0.98/1.00 in front and 0.99/0.97/0.96 inside; head_dim 64, 1.03/0.94/0.94 and 1.07/0.92/0.88.
ROWS_OF_A_RAW_V = 2048


@dataclass(frozen=True)
class Tile:
    """How one configuration of the FP8 kernel cuts up the work."""

    block_n: int  # keys per tile, and per block of K and V that shares a scale
    consumers: int  # warp groups of ROWS query rows each
    consumer_regs: int
    producer_regs: int
    raw_stages: int = 2  # V tiles in shared memory that the kernel has not transposed yet, if it does


# (largest head_dim of q, k and v, tile, tile with terms on the scores or scales of tokens): the first that is large
# enough. At head_dim 128, full, two consumers with tiles of 256 keys have 0.93 of FlashAttention-3's speed at 16384
# positions, three with 128 have 1.02 (H200). Turns, as the 16-bit kernel takes them, change nothing.
TILES = (
    (64, Tile(128, 3, 160, 32), Tile(128, 2, 240, 24)),
    (128, Tile(128, 3, 160, 32), Tile(128, 2, 240, 24)),
    (256, Tile(128, 2, 240, 24, raw_stages=1), Tile(64, 2, 240, 24)),
)


def tile_for(head_dim: int, head_dim_v: int, with_terms: bool = False) -> Tile:
    """The table's configuration for a problem."""
    _, plain, with_them = next(row for row in TILES if max(head_dim, head_dim_v) <= row[0])
    return with_them if with_terms else plain


def parts(head_dim: int, largest: int = 256) -> tuple[int, ...]:
    """The powers of two, 32 at least and two at most, that a head_dim is cut into; their sum may be larger."""
    first = min(largest, max(32, 1 << (head_dim.bit_length() - 1)))
    rest = head_dim - first
    if rest <= 0:
        return (first,)
    second = max(32, 1 << (rest - 1).bit_length())
    return (first, second) if second < first or first == largest else (2 * first,)


# P @ V has registers of its own beside O's: those of 128 columns.
LARGEST_OF_V = 128


def supports(q_shape, k_shape, v_shape, *, scale=1.0, quantised: bool = False) -> str | None:
    """None if `attention_fp8` computes this attention (`attention_quantised`, if quantised), else why not.

    Args:
        q_shape, k_shape, v_shape: as for `forward.supports`.
    """
    if problem := forward.supports(q_shape, k_shape, v_shape, torch.bfloat16, scale=scale):
        return problem
    if not quantised and q_shape[3] % 16:
        return f"the FP8 kernel has head_dim 16, 32, ... {forward.MAX_HEAD_DIM}, not {q_shape[3]}"
    return None


def attention_fp8(
    q: Tensor, k: Tensor, v: Tensor, q_scale: Tensor, k_scale: Tensor, v_scale: Tensor, bias: Tensor | None = None,
    mask: Tensor | None = None, *, scale: float, window_left: int | None = None, window_right: int | None = None,
    softcap: float | None = None, sinks: Tensor | None = None, out_dtype: torch.dtype = torch.bfloat16,
    formulas: Formulas = NO_FORMULAS, out_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`attention_forward` of q * q_scale, k * k_scale and v * v_scale, on a Hopper GPU.

    Args:
        q: [B, Hq, Sq, D], float8_e4m3fn, D a multiple of 16 up to 256, on CUDA.
        k: [B, Hkv, Sk, D]; v: [B, Hkv, Sk, Dv], Dv a multiple of 8 up to 256.
        q_scale: float32, broadcastable to [B, Hq], or to [B, Hq, Sq]; k_scale, v_scale: to [B, Hkv], or [B, Hkv, Sk].
            Scales of single tokens take time.
        out_dtype: BF16 or FP16; nothing if there is an out_scale.

    The others are those of `attention_forward`. Products are summed up in float32, weights rounded to e4m3. For many
    queries, v is transposed first, which takes as long as reading and writing it.

    Raises:
        ValueError: with the sentence of `supports`, or if the operands do not fit together.

    Returns:
        out [B, Hq, Sq, Dv] of out_dtype, as `output_like` has it, and lse as `attention_forward`.
    """
    if q.get_device() != torch.cuda.current_device():
        with torch.cuda.device(q.device):
            return attention_fp8(
                q, k, v, q_scale, k_scale, v_scale, bias, mask, scale=scale, window_left=window_left,
                window_right=window_right, softcap=softcap, sinks=sinks, out_dtype=out_dtype, formulas=formulas,
                out_scale=out_scale,
            )  # fmt: skip
    if not all(x.dtype == E4M3 for x in (q, k, v)):
        raise ValueError(f"attention_fp8: q, k and v are {E4M3}, not {q.dtype}, {k.dtype} and {v.dtype}")
    if not all(map(is_addressable, (q, k, v))):
        q, k, v = map(addressable, (q, k, v))
    scales = {"q": q_scale, "k": k_scale, "v": v_scale}
    by_token = any(x.ndim == 3 and x.shape[2] > 1 for x in scales.values())
    for (name, x), operand in zip(scales.items(), (q, k, v)):
        if x.dtype != torch.float32 or x.device != q.device:
            raise ValueError(f"attention_fp8: {name}_scale is float32 on {q.device}, not {x.dtype} on {x.device}")
        shape = operand.shape[:3] if by_token else (*operand.shape[:2], 1)
        try:
            scales[name] = (x if x.ndim == 3 else x.unsqueeze(-1)).expand(shape)
        except RuntimeError:
            wanted = list(operand.shape[:3])
            raise ValueError(f"attention_fp8: {name}_scale {list(x.shape)} does not broadcast to {wanted}") from None
    scales, tokens = list(scales.values()), ()
    if by_token:
        # The values' scales, of one in each tile of keys at most, keep weights in e4m3's range; what is left is the
        # scale of the tile.
        keys = tile_for(q.shape[3], v.shape[3], True).block_n
        largest = by_tile(scales[2], keys)
        of_tile = largest.repeat_interleave(keys, 2)[:, :, : k.shape[2]]
        tokens = tuple(x.contiguous() for x in (scales[0], scales[1], scales[2] / of_tile))
        rows = -(-q.shape[2] // ROWS)
        scales = [largest.new_ones((*q.shape[:2], rows)), torch.ones_like(largest), largest]
    options = dict(
        scale=scale, window_left=window_left, window_right=window_right, softcap=softcap, sinks=sinks, bias=bias,
        mask=mask, formulas=formulas, out_scale=out_scale,
    )  # fmt: skip
    call = _call(q, k, v, scales, tokens, out_dtype, None, **options)
    values = v
    if call.values is not None:
        values = _transposed_like(v)
        call.values(driver.active.get_current_stream(call.device), v.data_ptr(), values.data_ptr())
    return _run(call, (q, k, values, *scales, *tokens), bias, mask, sinks, formulas, out_scale)


def attention_quantised(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, mask: Tensor | None = None, *, scale: float,
    window_left: int | None = None, window_right: int | None = None, softcap: float | None = None,
    sinks: Tensor | None = None, seed: int | None = 0, formulas: Formulas = NO_FORMULAS,
    out_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`attention_forward` with q, k and v rounded to float8_e4m3fn first, on a Hopper GPU.

    Args:
        q, k, v: as for `attention_forward`; its other arguments too.
        seed: of the random signs of incoherent processing, by which q and k are multiplied with one orthogonal matrix;
            None leaves it out.

    Each 64 queries of a head, and as many keys as the kernel's tile has (64 to 256), share a scale; each of v too. An
    infinity counts as NaN. Tiles of v whose largest numbers differ by a factor of 2^100 are beyond what it can add up.

    Raises:
        ValueError: with the sentence of `supports`, or if the operands do not fit together.

    Returns:
        out [B, Hq, Sq, Dv] of q's dtype, as `output_like` has it, and lse as `attention_forward`.
    """
    if q.get_device() != torch.cuda.current_device():
        with torch.cuda.device(q.device):
            return attention_quantised(
                q, k, v, bias, mask, scale=scale, window_left=window_left, window_right=window_right, softcap=softcap,
                sinks=sinks, seed=seed, formulas=formulas, out_scale=out_scale,
            )  # fmt: skip
    if not all(x.stride(3) == 1 for x in (q, k, v)):
        q, k, v = map(addressable, (q, k, v))
    options = dict(
        scale=scale, window_left=window_left, window_right=window_right, softcap=softcap, sinks=sinks, bias=bias,
        mask=mask, formulas=formulas, out_scale=out_scale,
    )  # fmt: skip
    call = _call(q, k, v, None, (), q.dtype, seed, **options)
    buffers = _buffers(q, k, v, call.tile, 0 if seed is None else matrix_columns(q.shape[3]))
    if call.launch is not None:
        q8, k8, v8, q_scales, k_scales, v_scales = (x.data_ptr() for x in buffers)
        stream = driver.active.get_current_stream(call.device)
        call.rows[0](stream, q.data_ptr(), q8, q_scales, *call.matrix)
        call.rows[1](stream, k.data_ptr(), k8, k_scales, *call.matrix)
        call.values(stream, v.data_ptr(), v8, v_scales)
    return _run(call, buffers, bias, mask, sinks, formulas, out_scale)


def round_trip(x: Tensor, rows: int, seed: int | None) -> Tensor:
    """What `attention_quantised` leaves of q or k, on a Hopper GPU, or, with seed None, of v: rounded, and turned back.

    Args:
        x: [B, H, S, D], BF16 or FP16; rows: how many of them share a scale.

    Returns:
        x's dtype and shape, as `output_like` has it.
    """
    if x.get_device() != torch.cuda.current_device():
        with torch.cuda.device(x.device):
            return round_trip(x, rows, seed)
    x = x if x.stride(3) == 1 else addressable(x)
    to = output_like(x, x.shape[3])
    if to.numel():
        key = key_of(x), rows, seed
        call = _round_trips.get(key)
        if call is None:
            matrix = None if seed is None else orthogonal(matrix_columns(x.shape[3]), x.dtype, x.get_device(), seed)
            grid, args, options = round_trip_arguments(x.detach(), to, matrix, rows)
            tensors = (args[0], to, *(() if matrix is None else (matrix,)))
            prepared = launch.prepare(round_trip_kernel, grid, args, tensors, options)
            if len(_round_trips) >= _MAX_CALLS:
                _round_trips.clear()
            call = _round_trips[key] = prepared, () if matrix is None else (matrix.data_ptr(),)
        call[0](driver.active.get_current_stream(x.get_device()), x.data_ptr(), to.data_ptr(), *call[1])
    return to


_round_trips: dict = {}


class _Call(NamedTuple):
    """One problem with everything settled but the addresses; like the forward's, it holds no tensor."""

    launch: launch.Launch | None  # None: there is nothing to compute
    rows: tuple[launch.Launch, ...]  # of q and k, if they are to be rounded
    matrix: tuple[int, ...]  # the address of their orthogonal matrix, if there is one
    values: launch.Launch | None  # of v, if the kernel does not transpose it
    find_ranges: launch.Launch | None
    ranges_shape: tuple[int, ...]
    order: tuple[int, ...]  # the address of the list of tiles, if there is one
    tile: Tile
    device: int
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


_calls: dict = {}
_MAX_CALLS = 4096


def _call(q, k, v, scales, tokens, out_dtype, seed, *, bias, mask, sinks, formulas, out_scale, **options) -> _Call:
    """What is settled for such a problem; `scales` is None if q, k and v are to be rounded."""
    beside = tuple(None if x is None else key_of(x) for x in (bias, mask, sinks, out_scale, *(scales or ()), *tokens))
    key = (*map(key_of, (q, k, v)), beside, out_dtype, seed, formulas.key(), *options.values())
    call = _calls.get(key)
    if call is None:
        options |= dict(bias=bias, mask=mask, sinks=sinks, formulas=formulas, out_scale=out_scale)
        call = _prepare(q, k, v, scales, tokens, out_dtype, seed, **options)
        if len(_calls) >= _MAX_CALLS:
            _calls.clear()
        _calls[key] = call
    return call


def _prepare(
    q, k, v, scales, tokens, out_dtype, seed, *, bias, mask, sinks, scale, window_left, window_right, softcap,
    formulas, out_scale,
) -> _Call:  # fmt: skip
    if problem := supports(q.shape, k.shape, v.shape, scale=abs(scale), quantised=scales is None):
        raise ValueError(problem)
    if q.shape[0] != k.shape[0] or k.shape[:3] != v.shape[:3]:
        shapes = ", ".join(f"{name} {list(x.shape)}" for name, x in zip("qkv", (q, k, v)))
        raise ValueError(f"the operands do not fit together: {shapes}")
    if out_dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"the FP8 kernel's result is bfloat16 or float16, not {out_dtype}")
    forward.check_terms(q, k, v, bias, mask, softcap, sinks, formulas)
    q, k, v = (x.detach() for x in (q, k, v))  # tensors of our own: they may be one now and not at the next call
    forward.check_out_scale(out_scale, q, v)
    out_dtype = out_dtype if out_scale is None else E4M3
    out = output_like(q, v.shape[3], out_dtype)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    tile = tile_for(q.shape[3], v.shape[3], bool(tokens) or has_terms(bias, mask, softcap, formulas))
    settled = tile, q.get_device(), out.shape, out.stride(), out_dtype
    if not out.numel():
        return _Call(None, (), (), None, None, (), (), *settled)
    rows, matrix, address = (), None, ()
    if scales is None:
        columns = 0
        if seed is not None:
            columns = matrix_columns(q.shape[3])
            matrix = orthogonal(columns, q.dtype, q.get_device(), seed)
            address = (matrix.data_ptr(),)
            scale /= columns
        q8, k8, values, *scales = _buffers(q, k, v, tile, columns)
        for x, to, of, size in ((q, q8, scales[0], ROWS), (k, k8, scales[1], tile.block_n)):
            grid, args, options = rows_arguments(x, to, of, matrix, size)
            tensors = (x, to, of, *(() if matrix is None else (matrix,)))
            rows += (launch.prepare(rows_kernel, grid, args, tensors, options),)
        q, k = q8, k8
    elif q.shape[2] * (q.shape[1] // k.shape[1]) > ROWS_OF_A_RAW_V:
        values = _transposed_like(v)
    else:
        values = None
    to_values = None
    if values is not None:
        of_v = scales[2] if rows else None
        grid, args, options = values_arguments(v, values, of_v, tile.block_n)
        to_values = launch.prepare(
            values_kernel, grid, args, tuple(x for x in (args[0], args[1], of_v) if x is not None), options
        )
        v = values
    find_ranges = ranges = None
    if mask is not None or formulas.mask:
        find_ranges, ranges = forward.prepare_ranges(q, k, mask, formulas, tile.block_n)
    grid, args = launch_arguments(
        q, k, v, out, lse, scales, scale, window_left, window_right, bias, mask, softcap, sinks, ranges, tokens,
        formulas, out_scale, tile=tile, turned=values is not None,
    )  # fmt: skip
    order = args[forward._ORDER]
    terms = (*(operand for operand, *_ in args[forward._OPERANDS]), sinks, out_scale)
    tensors = tuple(x for x in (q, k, v, *scales, *tokens, out, lse, *terms, order, ranges) if x is not None)
    main = launch.prepare(fp8_kernel, grid, args, tensors, {"num_warps": 4})
    order = () if order is None else (order.data_ptr(),)
    shape = () if ranges is None else ranges.shape
    return _Call(main, rows, address, to_values, find_ranges, shape, order, *settled)


def blocks(q: Tensor, v: Tensor, seed: int | None, with_terms: bool) -> dict:
    """How `attention_quantised` rounds, as `reference.attention_quantised_reference` is told of it."""
    keys = tile_for(q.shape[3], v.shape[3], with_terms).block_n
    return dict(rows=ROWS, keys=keys, matrix=None if seed is None else matrix_of(q, seed))


def matrix_of(q: Tensor, seed: int) -> Tensor:
    """What `attention_quantised` multiplies q and k by: sqrt(size) times an orthogonal matrix, float32 [size, size]."""
    matrix, *second = signed_hadamard(matrix_columns(q.shape[3]), seed).to(q.device)
    if second:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([second[0], -second[0]], 1)])
    return matrix


def _transposed_like(v: Tensor) -> Tensor:
    """Room for v: [B, Hkv, Sk, Dv] as [B, Hkv, Dv, padded Sk]."""
    batch, heads, seqlen, head_dim = v.shape
    padded = -(-seqlen // MULTIPLE) * MULTIPLE
    return torch.empty((batch, heads, head_dim, padded), dtype=E4M3, device=v.device)


def _buffers(q: Tensor, k: Tensor, v: Tensor, tile: Tile, columns: int) -> tuple[Tensor, ...]:
    """Room for q, k and v in e4m3, `columns` wide if that is not 0, and for the scales of their blocks."""
    width = columns or -(-q.shape[3] // 16) * 16
    rounded = (torch.empty((*x.shape[:3], width), dtype=E4M3, device=q.device) for x in (q, k))
    blocks = (
        torch.empty((*x.shape[:2], -(-x.shape[2] // size)), dtype=torch.float32, device=q.device)
        for x, size in ((q, ROWS), (k, tile.block_n), (v, tile.block_n))
    )
    return *rounded, _transposed_like(v), *blocks


def launch_arguments(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scales: list[Tensor], scale: float,
    window_left: int | None = None, window_right: int | None = None, bias: Tensor | None = None,
    mask: Tensor | None = None, softcap: float | None = None, sinks: Tensor | None = None,
    ranges: Tensor | None = None, tokens: tuple[Tensor, ...] = (), formulas: Formulas = NO_FORMULAS,
    out_scale: Tensor | None = None, *, tile: Tile, turned: bool, sm_count: int | None = None,
) -> tuple[tuple[int, int, int], tuple]:  # fmt: skip
    """The grid and the arguments of the kernel.

    Args:
        v: [B, Hkv, Sk, Dv]; if turned, [B, Hkv, Dv, padded Sk] of the values kernel.
        scales: float32, of q [B, Hq, blocks of ROWS], of k and v [B, Hkv, blocks of the tile's block_n]; or one block.
        tokens: more scales, float32, contiguous, of q [B, Hq, Sq], of k and v [B, Hkv, Sk], v's 1 at most; or none.
    """
    batch, q_heads, seqlen_q, head_dim = q.shape
    kv_heads, seqlen_k = k.shape[1:3]
    head_dim_v = v.shape[2 if turned else 3]
    left, right = forward.clipped(window_left, window_right, seqlen_q, seqlen_k)
    functions, ranges, operands, _ = forward.score_arguments(
        bias, mask, softcap, (batch, q_heads, seqlen_q, seqlen_k), ranges, formulas
    )
    ctas, m_tiles, order = forward.schedule(
        batch * q_heads, seqlen_q, seqlen_k, left, right, tile.consumers * ROWS, tile.block_n, sm_count, q.device
    )
    q_scale, k_scale, v_scale = ((x, *x.stride()[:2]) for x in scales)
    has_blocks = any(x.shape[2] > 1 for x in scales)
    q_by_block = 1 if has_blocks else 0
    widths, widths_v = parts(head_dim), parts(head_dim_v, LARGEST_OF_V)
    descriptors_v = _transposed_descriptors if turned else forward.descriptors
    return (ctas, 1, 1), (
        *forward.descriptors(q, ROWS, widths), *forward.descriptors(k, tile.block_n, widths),
        *descriptors_v(v, tile.block_n, widths_v), *forward.descriptors(out, ROWS, widths_v),
        lse, order, sinks, ranges, operands, q_scale, q_by_block, k_scale, v_scale, tokens or None, out_scale,
        batch * q_heads * m_tiles, m_tiles, q_heads, q_heads // kv_heads, seqlen_q, seqlen_k, left or 0, right or 0,
        scale * _LOG2E, left is not None, right is not None, *functions, has_blocks,
        tile.consumers, STAGES, 0 if turned else tile.raw_stages, tile.consumer_regs, tile.producer_regs,
    )  # fmt: skip


def _transposed_descriptors(v: Tensor, keys: int, widths: tuple[int, ...]):
    first, *second = (
        TensorDescriptor(v, list(v.shape), [*v.stride()[:3], 1], [1, 1, width, keys], shared_layout(width, keys, E4M3))
        for width in widths
    )
    return first, second[0] if second else None


def _run(
    call: _Call, operands: tuple[Tensor, ...], bias, mask, sinks, formulas: Formulas, out_scale
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention of q, k and the transposed v with their scales, all of them `operands`."""
    q = operands[0]
    out = torch.empty_strided(call.shape, call.stride, dtype=call.dtype, device=q.device)
    lse = torch.empty(call.shape[:3], dtype=torch.float32, device=q.device)
    if call.launch is not None:
        stream = driver.active.get_current_stream(call.device)
        terms = [x.data_ptr() for x in (bias, *formulas.tables, mask, sinks, out_scale) if x is not None]
        ranges = ()
        if call.find_ranges is not None:
            found = torch.empty(call.ranges_shape, dtype=torch.int32, device=q.device)
            ranges = (found.data_ptr(),)
            call.find_ranges(stream, *forward.mask_addresses(mask, formulas), *ranges)
        addresses = (x.data_ptr() for x in (*operands, out, lse))
        call.launch(stream, *addresses, *terms, *call.order, *ranges)
    return out, lse

"""Attention forward on Hopper (sm_90a), BF16 and FP16: tile tables, what the kernel takes, and its launch.

`forward_kernel.py` and `forward_plain_kernel.py` are the device code and `reference.py` the specification.
"""

import functools
import math
import threading
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime import driver

from fa3_inductor.kernels import cluster, launch, output_like
from fa3_inductor.kernels.combine import combine_arguments, combine_kernel
from fa3_inductor.kernels.dropout import keep_scale, threshold
from fa3_inductor.kernels.formulas import NO_FORMULAS, Formulas, of_first_query
from fa3_inductor.kernels.formulas import check as check_formulas
from fa3_inductor.kernels.forward_kernel import ROWS as ROWS_OF_A_CONSUMER
from fa3_inductor.kernels.forward_kernel import forward_kernel
from fa3_inductor.kernels.forward_plain_kernel import forward_plain_kernel
from fa3_inductor.kernels.ranges import mask_axes, ranges_arguments, ranges_kernel, ranges_shape
from fa3_inductor.kernels.schedule import longest_first, parts_of_keys
from fa3_inductor.kernels.terms import broadcast, functions, has_terms, program_of


@dataclass(frozen=True)
class Tile:
    """How one kernel configuration cuts up the work."""

    block_n: int  # keys per tile
    consumers: int  # warp groups of ROWS query rows each
    consumer_regs: int  # per thread, by setmaxnreg; the pool is 64K registers per SM
    producer_regs: int
    ping_pong: bool = False  # consumers take turns to issue their matrix products
    overlap: bool = True  # a consumer's softmax runs beside its own product with V (False only to measure that)
    shared_o: bool = False  # O leaves by way of Q's shared memory if its parts are alike; the next Q waits for that


ROWS = ROWS_OF_A_CONSUMER.value
CLUSTER = cluster.CLUSTER.value
STAGES = 2  # K tiles, and V tiles, in shared memory
SHARED_BYTES = 226 << 10  # of shared memory that a CTA has for tiles; the rest of 227 KB is for barriers
MAX_HEAD_DIM = 256

# Rows are (largest head_dim, largest head_dim_v, full, windowed): the first that is large enough. Measured on an H100
# with 16384 tokens of width 2048, TFLOP/s with and without turns at 1024 / 4096 / 16384: D 64 full, three consumers,
# 411/483/527 and 378/461/510; D 128 full 566/621/670 and 532/626/671, causal 423/581/654 and 396/565/658; D 256 full
# 562/667/684 and 579/641/713, causal 434/589/655 and 445/595/679.
TILES = (
    (64, 64, Tile(128, 3, 160, 32, ping_pong=True), Tile(128, 3, 160, 32, ping_pong=True)),
    (128, 128, Tile(128, 2, 240, 24, ping_pong=True), Tile(128, 2, 240, 24, ping_pong=True)),
    (192, 128, Tile(128, 2, 240, 24, shared_o=True), Tile(128, 2, 240, 24, shared_o=True)),
    (256, 256, Tile(64, 2, 240, 24, shared_o=True), Tile(64, 2, 240, 24, shared_o=True)),
)
# Up to SHORT query rows, tiles of 192 jut out too far below the last row and above the diagonal. On an H100, TFLOP/s at
# 512 / 1024 / 2048, full 383/417/445 against 322/399/462, causal 253/336/392 against 240/315/422.
SHORT = 1024
SHORT_TILE = Tile(128, 2, 240, 24, ping_pong=True)
# With terms on the scores: their values need registers.
TERM_TILES = (
    (64, 64, Tile(128, 2, 240, 24)),
    (128, 128, Tile(128, 2, 240, 24)),
    (256, 256, Tile(64, 2, 240, 24, shared_o=True)),
)
# Those of forward_plain_kernel, by head_dim as `parts` has it and whether there is a window, with how many keys a row
# tile has to see on average for that kernel to be the faster one. On an H200, TFLOP/s of it and of forward_kernel at
# 4096 / 8192 / 16384 positions: D 128 full 633/649/666 and 630/644/640, causal 588/637/665 and 594/615/637; D 256 full,
# at 1024 / 4096 / 16384, 605/701/717 and 588/649/670, causal, at 2048 / 8192 / 16384, 545/697/709 and 553/635/663.
# Without overlap, only the maximum of the scores runs beside the product with V: 708 -> 737 at 256 and 16384, 667 ->
# 652 at 128.
PLAIN_TILES = {
    (128, False): (3072, Tile(160, 2, 240, 24, ping_pong=True)),
    (128, True): (3072, Tile(128, 2, 240, 24, ping_pong=True)),
    (256, False): (1024, Tile(80, 2, 240, 24, ping_pong=True, overlap=False)),
    (256, True): (1536, Tile(80, 2, 240, 24, ping_pong=True, overlap=False)),
}


def plain_tile_for(
    head_dim: int, head_dim_v: int, window: tuple[int | None, int | None], seqlen_q: int, seqlen_k: int
) -> Tile | None:
    """The configuration of forward_plain_kernel for a problem with nothing but a window on its scores, if it is faster.

    window: of `clipped`.
    """
    width, *rest = parts(head_dim)
    row = PLAIN_TILES.get((width, window != (None, None)))
    if rest or parts(head_dim_v) != (width,) or row is None:
        return None
    least, tile = row
    count = CLUSTER * tile.consumers * ROWS
    lengths = kv_tiles(seqlen_q, seqlen_k, *window, count, tile.block_n)
    enough = sum(lengths) * tile.block_n >= least * len(lengths)
    return tile if enough and -seqlen_q % count <= seqlen_q // 24 else None


def tile_for(head_dim: int, head_dim_v: int, windowed: bool, seqlen_q: int, with_terms: bool = False) -> Tile:
    """The tables' configuration for a problem."""
    if with_terms:
        return next(tile for d, dv, tile in TERM_TILES if head_dim <= d and head_dim_v <= dv)
    if seqlen_q <= SHORT and max(head_dim, head_dim_v) <= 64:
        return SHORT_TILE
    d, dv, full, cut = next(row for row in TILES if head_dim <= row[0] and head_dim_v <= row[1])
    return cut if windowed else full


def parts(head_dim: int) -> tuple[int, ...]:
    """The powers of two, 16 at least and two at most, that a head_dim is cut into; their sum may be larger."""
    first = max(16, 1 << (head_dim.bit_length() - 1))
    rest = head_dim - first
    if rest <= 0:
        return (first,)
    second = max(16, 1 << (rest - 1).bit_length())
    return (first, second) if second < first else (2 * first,)


_LOG2E = math.log2(math.e)
GLUON_DTYPES = {
    torch.bfloat16: gl.bfloat16,
    torch.float16: gl.float16,
    torch.float32: gl.float32,
    torch.float8_e4m3fn: gl.float8e4nv,
    torch.uint8: gl.uint8,
}


def supports(q_shape, k_shape, v_shape, dtype, *, scale=1.0) -> str | None:
    """None if `attention_forward` computes this attention, else a sentence that says why not.

    Args:
        q_shape, k_shape, v_shape: [B, Hq, Sq, D], [B, Hkv, Sk, D], [B, Hkv, Sk, Dv]; SymInts are welcome, and no
            sequence length or batch size is looked at.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return f"the Hopper kernel computes in bfloat16 and float16, not in {dtype}"
    if not len(q_shape) == len(k_shape) == len(v_shape) == 4:
        return "the Hopper kernel takes [batch, heads, seqlen, head_dim]"
    for size in (q_shape[3], v_shape[3]):
        if not 0 < size <= MAX_HEAD_DIM or size % 8:
            return f"the Hopper kernel has head_dim 8, 16, ... {MAX_HEAD_DIM}, not {size}"
    if k_shape[3] != q_shape[3]:
        return f"the Hopper kernel has one head_dim for q and k, not {q_shape[3]} and {k_shape[3]}"
    heads = (q_shape[1], k_shape[1], v_shape[1])  # symbolic ones are checked when the kernel is called
    if all(isinstance(n, int) for n in heads) and (k_shape[1] != v_shape[1] or q_shape[1] % k_shape[1] != 0):
        return f"{k_shape[1]} key and {v_shape[1]} value heads do not divide {q_shape[1]} query heads evenly"
    if not (isinstance(scale, (int, float)) and 0 < scale < math.inf):
        return f"the Hopper kernel needs a positive scale that is known at compile time, not {scale}"
    return None


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, mask: Tensor | None = None, *,
    scale: float, window_left: int | None = None, window_right: int | None = None, softcap: float | None = None,
    sinks: Tensor | None = None, seed: Tensor | None = None, dropout_p: float = 0.0, formulas: Formulas = NO_FORMULAS,
    out_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """softmax(cap(scale * q @ k^T) + bias) @ v over the visible keys, on a Hopper GPU.

    Args:
        q: [B, Hq, Sq, D], BF16 or FP16, D a multiple of 8 up to 256, on CUDA.
        k: [B, Hkv, Sk, D], Hkv dividing Hq; v: [B, Hkv, Sk, Dv], Dv a multiple of 8 up to 256.
        bias: floating point, broadcastable to [B, Hq, Sq, Sk], added to the scaled scores.
        mask: bool, broadcastable to [B, Hq, Sq, Sk], True where a query may attend. It is read once before the kernel
            starts, to find the KV tiles that no query of a block sees (they are skipped) and those that all of it see.
        scale: positive.
        window_left, window_right: query i sees the keys i - window_left <= j <= i + window_right (None: unbounded),
            both counted from the top left. window_right 0 is causal, Sk - Sq is causal from the bottom right.
        softcap: scores become softcap * tanh(scores / softcap) (Gemma Team, 2024, arXiv:2408.00118, section 2).
        sinks: [Hq], a logit of every head that takes weight and has no value (gpt-oss).
        seed: int64 [1], for dropout with probability dropout_p: the weights that `dropout.kept_weights` says are kept,
            scaled up. None: no dropout.
        formulas: a bias and a mask that are computed, beside those that are read, and what becomes of the scaled
            scores, in place of a soft cap.
        out_scale: float32, one number: out comes multiplied by it and in float8_e4m3fn, 448 for what is larger. Then Dv
            is a multiple of 16.

    Returns:
        out [B, Hq, Sq, Dv] as `output_like(q, Dv)`, and lse [B, Hq, Sq] float32, contiguous: the natural log of the sum
        of exp(scores), the sink's included. A row that sees no key has out = 0, and lse = -inf or the sink.

    Strides are free. An operand whose head_dim is not contiguous, whose other strides or whose address are no multiples
    of 16 bytes, or which is expanded, is copied first.

    Raises:
        ValueError: with the sentence of `supports`, or if the operands do not fit together.
    """
    key = (
        q.shape, k.shape, v.shape, q.stride(), k.stride(), v.stride(), q.dtype, k.dtype, v.dtype, q.get_device(),
        k.get_device(), v.get_device(), scale, window_left, window_right, softcap,
        None if bias is None else key_of(bias), None if mask is None else key_of(mask),
        None if sinks is None else key_of(sinks), None if seed is None else (key_of(seed), dropout_p),
        formulas is NO_FORMULAS or formulas.key(), None if out_scale is None else key_of(out_scale),
    )  # fmt: skip
    q_at, k_at, v_at = q.data_ptr(), k.data_ptr(), v.data_ptr()
    call = _calls.get(key)
    if call is None or (q_at | k_at | v_at) & 15 or call.device != torch.cuda.current_device():
        options = dict(
            bias=bias, mask=mask, scale=scale, window_left=window_left, window_right=window_right, softcap=softcap,
            sinks=sinks, seed=seed, dropout_p=dropout_p, formulas=formulas, out_scale=out_scale,
        )  # fmt: skip
        with torch.cuda.device(q.device):
            check(q, k, v, scale)
            if not all(map(is_addressable, (q, k, v))):
                return attention_forward(*map(addressable, (q, k, v)), **options)
            if call is None:
                if len(_calls) >= _MAX_CALLS:
                    _calls.clear()
                _calls[key] = _prepare(q, k, v, **options)
            return attention_forward(q, k, v, **options)
    # This takes half as long as torch.empty (on a CPU), which has more arguments to read.
    out = q.new_empty_strided(call.out_shape, call.out_stride, dtype=call.out_dtype)
    lse = q.new_empty_strided(call.lse_shape, call.lse_stride, dtype=torch.float32)
    if call.launch is not None:
        out_at, lse_at = out.data_ptr(), lse.data_ptr()
        terms = split = ()
        if call.combine is not None:
            room = q.new_empty(call.part_size + call.lse_size, dtype=torch.float32)
            split, lse_at = (room.data_ptr(),), room.data_ptr() + 4 * call.part_size
        if call.has_operands:
            beside = (sinks, seed, out_scale) if call.combine is None else (seed,)
            terms = [x.data_ptr() for x in (bias, *formulas.tables, mask, *beside) if x is not None]
        stream = driver.active.get_current_stream(call.device)
        ranges = ()
        if call.find_ranges is not None:
            found = q.new_empty(call.ranges_shape, dtype=torch.int32)
            ranges = (found.data_ptr(),)
            call.find_ranges(stream, *mask_addresses(mask, formulas), *ranges)
        call.launch(stream, q_at, k_at, v_at, out_at, lse_at, *terms, *call.order, *ranges, *split)
        if call.combine is not None:
            at = [x.data_ptr() for x in (sinks, out_scale) if x is not None]
            call.combine(stream, *split, lse_at, out_at, lse.data_ptr(), *at)
    return out, lse


def mask_addresses(mask: Tensor | None, formulas: Formulas) -> list[int]:
    """Of what the search for a mask's ranges reads."""
    tables = formulas.tables if formulas.mask else ()
    return [x.data_ptr() for x in (mask, *tables) if x is not None]


def key_of(x: Tensor) -> tuple:
    """What the preparation of a launch depends on in a tensor."""
    return x.shape, x.stride(), x.dtype, x.get_device(), x.data_ptr() & 15


def check(q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
    """Raises ValueError if the kernels do not take these operands."""
    if problem := supports(q.shape, k.shape, v.shape, q.dtype, scale=scale):
        raise ValueError(problem)
    if q.shape[0] != k.shape[0] or k.shape[:3] != v.shape[:3] or not q.dtype == k.dtype == v.dtype:
        shapes = ", ".join(f"{name} {list(x.shape)} {x.dtype}" for name, x in zip("qkv", (q, k, v)))
        raise ValueError(f"the operands do not fit together: {shapes}")


def check_terms(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, softcap: float | None,
    sinks: Tensor | None, formulas: Formulas = NO_FORMULAS,
) -> None:  # fmt: skip
    """Raises ValueError if there are no keys, or for what shapes the scores in a form that no kernel takes."""
    if not k.shape[2]:
        raise ValueError("there are no keys")
    if bias is not None and not bias.is_floating_point():
        raise ValueError(f"bias is floating point, not {bias.dtype}")
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(f"mask is bool, not {mask.dtype}")
    if sinks is not None and not (sinks.shape == q.shape[1:2] and sinks.is_floating_point() and sinks.is_contiguous()):
        raise ValueError(f"sinks are a contiguous [{q.shape[1]}] of floating point")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap is a positive number, not {softcap}")
    if softcap is not None and formulas.score:
        raise ValueError("a soft cap beside a formula of the scores")
    check_formulas(formulas, (*q.shape[:3], k.shape[2]), bias)
    devices = {x.device for x in (q, k, v, bias, mask, sinks, *formulas.tables) if x is not None}
    if len(devices) > 1:
        raise ValueError(f"the operands are on {', '.join(sorted(map(str, devices)))}")


_calls: dict = {}
_ORDER, _OPERANDS = 9, 12  # which arguments of the kernel they are
_PLAIN_ORDER = 9  # of forward_plain_kernel
_MAX_CALLS = 4096  # by shapes and strides: what a server with ever new lengths may hold on to


class _Call(NamedTuple):
    """One problem (shapes, strides, dtypes, scale, window, ...) with everything settled but the addresses.

    It holds no tensor: `_calls` may outlive a CUDA graph's pool of memory, which a tensor made now may be in.
    """

    launch: launch.Launch | None  # None: there is nothing to compute
    combine: launch.Launch | None  # puts the parts together, if the keys are split
    part_size: int  # elements of what the parts of O take, and of those of lse
    lse_size: int
    find_ranges: launch.Launch | None  # of the mask
    ranges_shape: tuple[int, ...]
    order: tuple[int, ...]  # the address of the list of tiles, if there is one
    has_operands: bool  # whether it takes the addresses of bias, tables, mask, sinks, seed or out_scale
    device: int
    out_shape: torch.Size
    out_stride: tuple[int, ...]
    out_dtype: torch.dtype
    lse_shape: torch.Size
    lse_stride: tuple[int, ...]


def _prepare(
    q, k, v, *, bias, mask, scale, window_left, window_right, softcap, sinks, seed, dropout_p, formulas,
    out_scale,
) -> _Call:  # fmt: skip
    """Checks what `check` has not, and compiles the kernel. Raises ValueError as `attention_forward` says."""
    check_terms(q, k, v, bias, mask, softcap, sinks, formulas)
    if seed is not None and ((seed.dtype, seed.shape) != (torch.int64, (1,)) or seed.device != q.device):
        raise ValueError(f"the seed of dropout is an int64 [1] on {q.device}")
    # Tensors of our own: q, k and v may be one tensor now and three at the next call.
    q, k, v = (x.detach() for x in (q, k, v))
    check_out_scale(out_scale, q, v)
    out = output_like(q, v.shape[3], q.dtype if out_scale is None else torch.float8_e4m3fn)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    has_operands = any(x is not None for x in (bias, *formulas.tables, mask, sinks, seed, out_scale))
    settled = has_operands, q.get_device(), out.shape, out.stride(), out.dtype, lse.shape, lse.stride()
    if not out.numel():
        return _Call(None, None, 0, 0, None, (), (), *settled)
    window = clipped(window_left, window_right, q.shape[2], k.shape[2])
    group = 1
    if q.shape[2] == 1 and q.shape[1] > k.shape[1] and window == (None, None) and seed is None:
        group = q.shape[1] // k.shape[1]
        q, out, bias, mask, formulas = packed(q, out, bias, mask, formulas, k.shape)
    in_scores = has_terms(bias, mask, None, formulas) or seed is not None  # a soft cap alone needs few registers
    # Up to ROWS rows are one consumer's, which has nobody to take turns with.
    tile = tile_for(q.shape[3], v.shape[3], window != (None, None), q.shape[2], in_scores or q.shape[2] <= ROWS)
    lengths = kv_tiles(q.shape[2], k.shape[2], *window, tile.consumers * ROWS, tile.block_n)
    count = parts_of_keys(lengths, q.shape[0] * q.shape[1], q.shape[2], multiprocessors(q.device))
    if count == group == 1 and not in_scores and softcap is None and out_scale is None:
        if plain := plain_tile_for(q.shape[3], v.shape[3], window, q.shape[2], k.shape[2]):
            grid, args = plain_arguments(q, k, v, out, lse, scale, *window, sinks, tile=plain)
            tensors = tuple(x for x in (q, k, v, out, lse, sinks, args[_PLAIN_ORDER]) if x is not None)
            prepared = launch.prepare(forward_plain_kernel, grid, args, tensors, {"num_warps": 4}, CLUSTER)
            order = () if args[_PLAIN_ORDER] is None else (args[_PLAIN_ORDER].data_ptr(),)
            return _Call(prepared, None, 0, 0, None, (), order, *settled)
    split = combine = find_ranges = ranges = None
    lse_of_kernel, of_rows, sizes = lse, (sinks, out_scale), (0, 0)
    if count > 1 or (group > 1 and sinks is not None):
        split = q.new_empty((*q.shape[:2], count, q.shape[2], sum(parts(v.shape[3]))), dtype=torch.float32)
        lse_of_kernel = q.new_empty((*split.shape[:3], 2, q.shape[2]), dtype=torch.float32)
        of_rows = (None, None)
        sizes = split.numel(), lse_of_kernel.numel()
        grid, args = combine_arguments(split, lse_of_kernel, out, lse, sinks, out_scale, group)
        tensors = tuple(x for x in (split, lse_of_kernel, out, lse, sinks, out_scale) if x is not None)
        combine = launch.prepare(combine_kernel, grid, args, tensors, {"num_warps": 4})
    if mask is not None or formulas.mask:
        find_ranges, ranges = prepare_ranges(q, k, mask, formulas, tile.block_n)
    grid, args = launch_arguments(
        q, k, v, out, lse_of_kernel, scale, *window, bias, mask, softcap, of_rows[0], ranges, seed, dropout_p,
        formulas, of_rows[1], tile=tile, split=split,
    )  # fmt: skip
    terms = (*(operand for operand, *_ in args[_OPERANDS]), of_rows[0], seed, of_rows[1])
    tensors = (q, k, v, out, lse_of_kernel, *terms, args[_ORDER], ranges, split)
    tensors = tuple(x for x in tensors if x is not None)
    prepared = launch.prepare(forward_kernel, grid, args, tensors, {"num_warps": 4})
    order = () if args[_ORDER] is None else (args[_ORDER].data_ptr(),)
    shape = () if ranges is None else ranges.shape
    return _Call(prepared, combine, *sizes, find_ranges, shape, order, *settled)


def check_out_scale(out_scale: Tensor | None, q: Tensor, v: Tensor) -> None:
    """Raises ValueError if the result cannot be float8_e4m3fn, of that scale."""
    if out_scale is None:
        return
    if (out_scale.dtype, out_scale.numel(), out_scale.device) != (torch.float32, 1, q.device):
        raise ValueError(f"out_scale is one float32 on {q.device}, not {out_scale.numel()} {out_scale.dtype}")
    if v.shape[3] % 16:
        raise ValueError(f"a result in float8_e4m3fn has head_dim 16, 32, ... {MAX_HEAD_DIM}, not {v.shape[3]}")


def packed(
    q: Tensor, out: Tensor, bias: Tensor | None, mask: Tensor | None, formulas: Formulas, kv_shape: tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Formulas]:
    """Views for which the query heads that share keys are the queries of one head, so that keys are read once for all.

    Args:
        q, out: [B, Hq, 1, D], come back as [B, Hkv, Hq // Hkv, D]; likewise the others, which broadcast to
            [B, Hq, 1, Sk].
        kv_shape: [B, Hkv, Sk, D].
    """
    shape = (*q.shape[:3], kv_shape[2])

    def rows(x: Tensor) -> Tensor:
        return x.unflatten(1, (kv_shape[1], -1)).squeeze(3)

    bias = None if bias is None else rows(broadcast("bias", bias, shape))
    mask = None if mask is None else rows(broadcast("mask", mask, shape))
    tables = tuple(rows(broadcast("table", x, shape)) for x in formulas.tables)
    bias_text, mask_text, score_text = map(of_first_query, (formulas.bias, formulas.mask, formulas.score))
    return rows(q), rows(out), bias, mask, Formulas(bias_text, mask_text, tables, score_text)


def prepare_ranges(
    q: Tensor, k: Tensor, mask: Tensor | None, formulas: Formulas, block_n: int
) -> tuple[launch.Launch, Tensor]:
    """What finds the ranges of a mask for blocks of ROWS rows and KV tiles of block_n keys, and room for them."""
    shape = (*q.shape[:3], k.shape[2])
    whole = None if mask is None else broadcast("mask", mask, shape)
    axes = mask_axes(whole, formulas, shape)
    ranges = torch.empty(ranges_shape(shape, axes, ROWS), dtype=torch.int32, device=q.device)
    grid, args = ranges_arguments(whole, ranges, ROWS, block_n, shape, axes[2], formulas)
    return launch.prepare(ranges_kernel, grid, args, ranges_tensors(args), {"num_warps": 16}), ranges


def ranges_tensors(args: tuple) -> tuple[Tensor, ...]:
    """The tensors among the arguments of the ranges kernel, in the order of `mask_addresses`, and the ranges."""
    mask, operands, ranges = args[:3]
    return tuple(x for x in (mask, *(operand for operand, *_ in operands), ranges) if x is not None)


def launch_arguments(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, window_left: int | None = None,
    window_right: int | None = None, bias: Tensor | None = None, mask: Tensor | None = None,
    softcap: float | None = None, sinks: Tensor | None = None, ranges: Tensor | None = None,
    seed: Tensor | None = None, dropout_p: float = 0.0, formulas: Formulas = NO_FORMULAS,
    out_scale: Tensor | None = None, *, tile: Tile | None = None, sm_count: int | None = None,
    split: Tensor | None = None,
) -> tuple[tuple[int, int, int], tuple]:  # fmt: skip
    """The grid and the arguments of the kernel.

    Args:
        ranges: of the mask, for blocks of ROWS rows and the tile's block_n; None has every tile looked at.
        tile, sm_count: in place of the tables' and the device's.
        split: of `combine_arguments`, where the parts of O go; lse is its `sums` then.
    """
    batch, q_heads, seqlen_q, head_dim = q.shape
    kv_heads, seqlen_k, head_dim_v = v.shape[1:]
    left, right = clipped(window_left, window_right, seqlen_q, seqlen_k)
    windowed = left is not None or right is not None
    with_terms = has_terms(bias, mask, None, formulas) or seed is not None  # a soft cap alone needs few registers
    tile = tile or tile_for(head_dim, head_dim_v, windowed, seqlen_q, with_terms)
    is_alike = parts(head_dim)[: len(parts(head_dim_v))] == parts(head_dim_v) and out.dtype == q.dtype
    score_functions, ranges, operands, is_shared = score_arguments(
        bias, mask, softcap, (batch, q_heads, seqlen_q, seqlen_k), ranges, formulas,
        _room_for_term(tile, head_dim, head_dim_v, is_alike or split is not None),
    )  # fmt: skip
    ctas, m_tiles, order = schedule(
        batch * q_heads, seqlen_q, seqlen_k, left, right, tile.consumers * ROWS, tile.block_n, sm_count, q.device
    )
    tiles = batch * q_heads * m_tiles
    if split is not None:
        tiles *= split.shape[2]
        ctas, order = min(tiles, sm_count or multiprocessors(q.device)), None
    shared_o = (tile.shared_o or is_shared) and is_alike
    of_term = _term_tiles(operands[0][0], tile.block_n) if is_shared else (None, 0, 0)
    return (ctas, 1, 1), (
        *descriptors(q, ROWS, parts(head_dim)), *descriptors(k, tile.block_n, parts(head_dim)),
        *descriptors(v, tile.block_n, parts(head_dim_v)), *descriptors(out, ROWS, parts(head_dim_v)),
        lse, order, sinks, ranges, operands, *of_term, split, 1 if split is None else split.shape[2],
        tiles, m_tiles, q_heads, q_heads // kv_heads, seqlen_q, seqlen_k, left or 0, right or 0,
        scale * _LOG2E, seed, threshold(dropout_p), keep_scale(dropout_p), out_scale,
        left is not None, right is not None, *score_functions,
        tile.consumers, STAGES, tile.ping_pong, tile.overlap, shared_o, tile.consumer_regs, tile.producer_regs,
    )  # fmt: skip


def _room_for_term(tile: Tile, head_dim: int, head_dim_v: int, shares_o: bool) -> int:
    """How many bytes of every score fit into shared memory, with as many stages as K's."""
    width, width_v, rows = sum(parts(head_dim)), sum(parts(head_dim_v)), tile.consumers * ROWS
    rest = SHARED_BYTES - 2 * rows * (width + (0 if shares_o else width_v))
    return (rest - 2 * STAGES * tile.block_n * (width + width_v)) // (rows * STAGES * tile.block_n)


def _term_tiles(whole: Tensor, keys: int) -> tuple[TensorDescriptor, int, int]:
    """A TMA descriptor of an expanded bias or mask, in blocks of ROWS rows and `keys` keys; has it batch, and head?"""
    own = whole[tuple(slice(0, 1) if by == 0 else slice(None) for by in whole.stride())]
    desc = TensorDescriptor(
        whole, list(own.shape), tma_strides(own), [1, 1, ROWS, keys], shared_layout(ROWS, keys, own.dtype)
    )
    return desc, int(whole.stride(0) != 0), int(whole.stride(1) != 0)


def plain_arguments(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, window_left: int | None = None,
    window_right: int | None = None, sinks: Tensor | None = None, *, tile: Tile, sm_count: int | None = None,
) -> tuple[tuple[int, int, int], tuple]:  # fmt: skip
    """The grid and the arguments of forward_plain_kernel, of a power of two for a head_dim, as `launch_arguments`."""
    batch, q_heads, seqlen_q, head_dim = q.shape
    kv_heads, seqlen_k, head_dim_v = v.shape[1:]
    left, right = clipped(window_left, window_right, seqlen_q, seqlen_k)
    clusters = (sm_count or multiprocessors(q.device)) // CLUSTER
    clusters, m_tiles, order = schedule(
        batch * q_heads, seqlen_q, seqlen_k, left, right, CLUSTER * tile.consumers * ROWS, tile.block_n, clusters,
        q.device,
    )  # fmt: skip
    of_k, of_v = (
        [descriptors(x, 1 << bit, (64,))[0] for bit in reversed(range(8)) if tile.block_n >> bit & 1] for x in (k, v)
    )
    unused = [None] * (3 - len(of_k))
    return (clusters * CLUSTER, 1, 1), (
        descriptors(q, ROWS, (64,))[0], *of_k, *unused, *of_v, *unused, (out, *out.stride()[:3], head_dim_v),
        lse, order, sinks, batch * q_heads * m_tiles, m_tiles, q_heads, q_heads // kv_heads, seqlen_q, seqlen_k,
        left or 0, right or 0, scale * _LOG2E, left is not None, right is not None,
        *parts(head_dim), *parts(head_dim_v), tile.consumers, STAGES, tile.ping_pong, tile.overlap,
        tile.consumer_regs, tile.producer_regs,
    )  # fmt: skip


def clipped(
    window_left: int | None, window_right: int | None, seqlen_q: int, seqlen_k: int
) -> tuple[int | None, int | None]:
    """The window as kernels take it: no further than the scores go, None where it hides nothing."""
    left = right = None
    if window_left is not None and window_left < seqlen_q - 1:
        left = max(window_left, -seqlen_k)
    if window_right is not None and window_right < seqlen_k - 1:
        right = max(window_right, -seqlen_q)
    if left is not None and right is not None and left + right < 0:
        right = -seqlen_q  # nothing is visible, so that every consumer has the same one tile, all of it masked
    return left, right


def score_arguments(
    bias: Tensor | None, mask: Tensor | None, softcap: float | None, shape: tuple[int, ...], ranges: Tensor | None,
    formulas: Formulas, room: int = 0,
) -> tuple[tuple, tuple | None, tuple, bool]:  # fmt: skip
    """What kernels take for scores of `shape`: LOAD to UNIT, the ranges with their strides, and the operands.

    And whether the first of them is to come by way of shared memory, of which there is `room`.
    """
    program, operands = program_of(bias, mask, softcap, shape, formulas, room=room)
    load, apply, unit = open_load, open_apply, _ = functions(program)
    if ranges is not None:
        steps = (0 if size == 1 else by // ranges.shape[3] for size, by in zip(ranges.shape[:3], ranges.stride()))
        ranges = ranges, *steps
        open_load, open_apply, _ = functions(program.without_mask())
    return (load, apply, open_load, open_apply, unit), ranges, operands, any(term.shared for term in program.terms)


def schedule(
    heads: int, seqlen_q: int, seqlen_k: int, left: int | None, right: int | None, tile_m: int, block_n: int,
    sm_count: int | None, device: torch.device,
) -> tuple[int, int, Tensor | launch.DeviceInts | None]:  # fmt: skip
    """How many CTAs there are, how many tiles of tile_m rows a head has, and the list of tiles, if they need one."""
    m_tiles = -(-seqlen_q // tile_m)
    ctas = min(heads * m_tiles, sm_count or multiprocessors(device))
    order = None
    if (left is not None or right is not None) and ctas < heads * m_tiles:
        # Two rounds of tiles, and at least four of each head in a round, for keys and values to be in the L2 cache
        # yet. Causal, on an H100, TFLOP/s with sections of 32 MB of keys and values and with these: D 128, S 512, 276
        # and 324; S 1024, 404 and 453; S 4096, 564 and 609.
        section = max(1, min(ctas // 4, 2 * ctas // m_tiles))
        order = _order(kv_tiles(seqlen_q, seqlen_k, left, right, tile_m, block_n), heads, section, ctas, device)
    return ctas, m_tiles, order


def kv_tiles(seqlen_q: int, seqlen_k: int, left: int | None, right: int | None, tile_m: int, block_n: int) -> list[int]:
    """How many KV tiles each row tile has, as the kernel's `_window_range` counts them."""
    lengths = []
    for row in range(0, seqlen_q, tile_m):
        keys = seqlen_k if right is None else min(seqlen_k, max(min(row + tile_m, seqlen_q) + right, 1))
        stop = -(-keys // block_n)
        lengths.append(stop - (0 if left is None else min(max(row - left, 0) // block_n, stop - 1)))
    return lengths


def _order(lengths: list[int], heads: int, section: int, ctas: int, device: torch.device):
    """The list of `longest_first` on the device, or None.

    There is none if the tiles are all of one length, or if there are too many lists already: they are for ever. Without
    one the kernel's order is the one for tiles of one length.
    """
    if len(set(lengths)) == 1:
        return None
    key = (*lengths, heads, section, ctas, device)
    with _orders_lock:
        if key not in _orders:
            if sum(size for _, size in _orders.values()) > _MAX_ORDERS:
                return None
            values = longest_first(lengths, heads, section, ctas)
            if device.type != "cuda":  # to compile where there is no GPU
                return torch.tensor(values, dtype=torch.int32, device=device)
            _orders[key] = launch.upload(values, device.index), len(values)
        return _orders[key][0]


_orders: dict = {}  # the lists on devices, and how many elements they have
_orders_lock = threading.Lock()
_MAX_ORDERS = 16 << 20  # elements of all lists together, 4 bytes each


def is_addressable(x: Tensor) -> bool:
    """Whether TMA can address x: [B, H, S, D] as it lies."""
    batch, heads, seqlen, _ = x.shape
    by_batch, by_head, by_row, unit = x.stride()
    mask = 16 // x.element_size() - 1
    return (
        unit == 1
        and not x.data_ptr() & 15
        and (batch == 1 or bool(by_batch and not by_batch & mask))
        and (heads == 1 or bool(by_head and not by_head & mask))
        and (seqlen == 1 or bool(by_row and not by_row & mask))
    )


def addressable(x: Tensor) -> Tensor:
    """x: [B, H, S, D], or a copy, in the order of `output_like`, if TMA cannot address x."""
    return x if is_addressable(x) else output_like(x, _row_of_units(x))[..., : x.shape[3]].copy_(x)


def descriptors(x: Tensor, rows: int, widths: tuple[int, ...]) -> tuple[TensorDescriptor, TensorDescriptor | None]:
    """TMA descriptors of x: [B, H, S, D] for the one or two parts of D, in blocks of `rows` rows."""
    strides = tma_strides(x)
    first, *second = (
        TensorDescriptor(x, list(x.shape), strides, [1, 1, rows, width], shared_layout(rows, width, x.dtype))
        for width in widths
    )
    return first, second[0] if second else None


def tma_strides(x: Tensor) -> list[int]:
    """x's strides, but for dimensions of size 1, where torch allows any and a descriptor does not."""
    return [*(by if size > 1 else _row_of_units(x) for size, by in zip(x.shape[:3], x.stride())), 1]


def _row_of_units(x: Tensor) -> int:
    """The least number of elements, all of a row's among them, that is a multiple of 16 bytes."""
    unit = 16 // x.element_size()
    return -(-x.shape[3] // unit) * unit


@functools.cache
def shared_layout(rows: int, width: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for([1, 1, rows, width], GLUON_DTYPES[dtype])


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count

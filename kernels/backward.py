"""Attention backward on Hopper (sm_90a), BF16 and FP16: tile tables, what the kernel takes, and its launch.

`backward_kernel.py` and, for a head_dim above 128, `backward_wide_kernel.py` are the device code, `reference.py` the
specification.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime import driver

from fa3_inductor.kernels import launch, output_like
from fa3_inductor.kernels.around import finish_arguments, finish_kernel, statistics_arguments, statistics_kernel
from fa3_inductor.kernels.backward_kernel import backward_kernel
from fa3_inductor.kernels.backward_wide_kernel import backward_wide_kernel
from fa3_inductor.kernels.dropout import keep_scale, threshold
from fa3_inductor.kernels.formulas import NO_FORMULAS, Formulas, is_shift
from fa3_inductor.kernels.forward import (
    ROWS,
    addressable,
    check,
    is_addressable,
    key_of,
    mask_addresses,
    multiprocessors,
    ranges_tensors,
    shared_layout,
    tma_strides,
)
from fa3_inductor.kernels.ranges import mask_axes, ranges_arguments, ranges_kernel, ranges_shape
from fa3_inductor.kernels.sums import BOX, count_size, slots_of
from fa3_inductor.kernels.terms import broadcast, functions, has_terms, program_of

_LOG2E = math.log2(math.e)


@dataclass(frozen=True)
class Tile:
    """How one configuration of the backward kernel cuts up the work."""

    block_m: int  # query rows per tile
    width: int  # columns of q, k, v and dO in shared memory
    wide: bool = False  # of the wide kernel: 64 keys, and the consumers have different roles
    stages: int = 2  # Q tiles in shared memory
    do_stages: int = 2

    @property
    def dq_columns(self) -> int:
        """How many columns of dQ a consumer has TMA add at once."""
        return 64 if self.wide or self.block_m == 128 else self.width // 2

    @property
    def keys(self) -> int:
        return ROWS if self.wide else 2 * ROWS


# (largest head_dim of q, k and v, tile, tile with terms on the scores): the first that is large enough.
TILES = (
    (64, Tile(128, 64), Tile(64, 64)),
    (128, Tile(64, 128), Tile(64, 128)),
    (256, Tile(64, 256, wide=True, do_stages=1), Tile(64, 256, wide=True, do_stages=1)),
)
MULTIPLE = 128  # of query rows, to which the rows' statistics are padded: all tiles' block_m divide it


def tile_for(head_dim: int, head_dim_v: int, with_terms: bool = False) -> Tile:
    """The table's configuration for a problem."""
    _, plain, with_them = next(row for row in TILES if max(head_dim, head_dim_v) <= row[0])
    return with_them if with_terms else plain


def attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, out: Tensor, lse: Tensor,
    *, scale: float, window_left: int | None = None, window_right: int | None = None, softcap: float | None = None,
    bias_grad: bool = False, seed: Tensor | None = None, dropout_p: float = 0.0, formulas: Formulas = NO_FORMULAS,
    deterministic: bool = False, dlse: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Gradients of what `attention_forward` returns, on a Hopper GPU.

    Args:
        dout: [B, Hq, Sq, Dv], of q's dtype; out and lse: what `attention_forward` returned, lse with the sink in it if
            there was one.
        bias_grad: whether bias has a gradient. Then a 16-bit number is stored for every score.
        deterministic: sum up dq in one order, so that equal arguments give equal bits. Then no tile that a mask hides
            is skipped.
        dlse: float32 [B, Hq, Sq], if lse has a gradient.

    The others are those of `attention_forward`, and what it says of them holds here.

    Operands are copied as the forward's are, dout too.

    Raises:
        ValueError: with the sentence of `supports`, if the operands do not fit together, or for the gradient of a bias
            beside a soft cap or a formula of the scores whose derivative is not 1.

    Returns:
        dq, dk and dv, each as `output_like` has it, and the gradient of bias, contiguous, or None. Sums over keys are
        in float32, in no fixed order unless `deterministic`, so that dq may differ in its last bit from call to call.
    """
    if bias_grad and (softcap is not None or (formulas.score and not is_shift(formulas.score))):
        raise ValueError("attention_backward: there is no gradient of a bias beside a soft cap or a formula of scores")
    key = (
        *map(key_of, (dout, q, k, v, out, lse)), scale, window_left, window_right, softcap, bias_grad,
        None if bias is None else key_of(bias), None if mask is None else key_of(mask),
        None if seed is None else (key_of(seed), dropout_p), formulas.key(), deterministic,
        None if dlse is None else key_of(dlse),
    )  # fmt: skip
    call = _calls.get(key)
    if call is None or call.device != torch.cuda.current_device():
        options = dict(
            scale=scale, window_left=window_left, window_right=window_right, softcap=softcap, bias_grad=bias_grad,
            seed=seed, dropout_p=dropout_p, formulas=formulas, deterministic=deterministic, dlse=dlse,
        )  # fmt: skip
        with torch.cuda.device(q.device):
            check(q, k, v, scale)
            if not (dout.shape == out.shape == (*q.shape[:3], v.shape[3]) and lse.shape == q.shape[:3]):
                raise ValueError(f"dout {list(dout.shape)}, out {list(out.shape)}, lse {list(lse.shape)} do not fit")
            if not (dout.dtype == out.dtype == q.dtype and lse.dtype == torch.float32):
                raise ValueError(f"dout and out are {q.dtype}, lse float32, not {dout.dtype}, {out.dtype}, {lse.dtype}")
            if dlse is not None and (dlse.shape, dlse.dtype) != (lse.shape, lse.dtype):
                raise ValueError(f"dlse is float32 {list(lse.shape)}, not {dlse.dtype} {list(dlse.shape)}")
            if not all(map(is_addressable, (dout, q, k, v))):
                dout, q, k, v = map(addressable, (dout, q, k, v))
                return attention_backward(dout, q, k, v, bias, mask, out, lse, **options)
            if call is None:
                if len(_calls) >= _MAX_CALLS:
                    _calls.clear()
                _calls[key] = _prepare(dout, q, k, v, bias, mask, out, lse, **options)
            return attention_backward(dout, q, k, v, bias, mask, out, lse, **options)
    dq, dk, dv, rows, sums, counts, dscores, ranges, turns = _buffers(
        q, k, v, mask, formulas, call.tile, call.slots, bias_grad, deterministic
    )
    if call.launch is None:
        for x in (dq, dk, dv):
            x.zero_()
    else:
        stream = driver.active.get_current_stream(call.device)
        at = rows.data_ptr()
        statistics = at, at + 4 * rows[0].numel()
        counted = sums.data_ptr(), counts.data_ptr()
        rest = (x.data_ptr() for x in (out, dout, lse, *(() if dlse is None else (dlse,))))
        call.find_statistics(stream, *rest, *statistics, *counted)
        if call.find_ranges is not None:
            call.find_ranges(stream, *mask_addresses(mask, formulas), ranges.data_ptr())
        more = (dscores, ranges, bias, *formulas.tables, mask, seed, turns, counts)
        more = (x.data_ptr() for x in more if x is not None)
        addresses = (x.data_ptr() for x in (dout, q, k, v))
        results = (x.data_ptr() for x in (sums, dq, dk, dv))
        call.launch(stream, *addresses, *statistics, *results, *more)
        if call.finish is not None:
            call.finish(stream, sums.data_ptr(), dq.data_ptr())
    if not bias_grad:
        return dq, dk, dv, None
    dbias = dscores[..., : q.shape[2]].mT
    sizes = (1,) * (4 - bias.ndim) + bias.shape
    where = [axis for axis in range(4) if sizes[axis] != dbias.shape[axis]]
    dbias = dbias.sum(where, keepdim=True, dtype=torch.float32) if where else dbias
    return dq, dk, dv, dbias.reshape(bias.shape).to(bias.dtype).contiguous()


_calls: dict = {}
_MAX_CALLS = 4096


class _Call(NamedTuple):
    """One problem with everything settled but the addresses; like the forward's, it holds no tensor."""

    launch: launch.Launch | None  # None: there is nothing to compute
    find_statistics: launch.Launch | None
    find_ranges: launch.Launch | None  # of the mask
    finish: launch.Launch | None  # None: the kernel rounds dQ itself
    tile: Tile
    slots: int | None  # kv heads whose sums there are then
    device: int


def _buffers(q, k, v, mask, formulas, tile, slots, bias_grad, deterministic) -> tuple:
    """dq, dk, dv, and what kernels need in between: two statistics of each row, dQ in float32, counts, dS, ranges,
    turns."""
    batch, q_heads, seqlen_q, head_dim = q.shape
    padded = -(-seqlen_q // MULTIPLE) * MULTIPLE
    dq, dk, dv = (output_like(x, x.shape[3]) for x in (q, k, v))
    rows = q.new_empty((2, batch, q_heads, padded), dtype=torch.float32)
    counts = q.new_empty(1 if slots is None else count_size(batch * k.shape[1]), dtype=torch.int32)
    columns = max(_columns(head_dim), 192) if tile.wide else head_dim
    heads = batch * q_heads if slots is None else slots * (q_heads // k.shape[1])
    sums = q.new_empty((heads, padded, columns), dtype=torch.float32)
    dscores = q.new_zeros((batch, q_heads, k.shape[2], padded)) if bias_grad else None
    ranges = None
    if (mask is not None or formulas.mask) and not deterministic:
        shape, _, axes = _by_key(q, k, mask, formulas)
        ranges = q.new_empty(ranges_shape(shape, axes, tile.keys), dtype=torch.int32)
    turns = None
    if deterministic:
        turns = q.new_zeros(4 * (batch * q_heads * -(-seqlen_q // tile.block_m) * 2 + 1), dtype=torch.int32)
    return dq, dk, dv, rows, sums, counts, dscores, ranges, turns


def _by_key(q, k, mask, formulas) -> tuple:
    """For the search for the query tiles of keys: the scores' shape, the mask, and its axes, as [..., Sk, Sq]."""
    shape = (*q.shape[:3], k.shape[2])
    whole = None if mask is None else broadcast("mask", mask, shape)
    batch, heads, rows, columns = mask_axes(whole, formulas, shape)
    exchanged = (*shape[:2], shape[3], shape[2])
    return exchanged, None if whole is None else whole.mT, (batch, heads, columns, rows)


def _prepare(
    dout, q, k, v, bias, mask, out, lse, *, scale, window_left, window_right, softcap, bias_grad, seed, dropout_p,
    formulas, deterministic, dlse,
) -> _Call:  # fmt: skip
    # Tensors of our own: two of them may be one now and not at the next call.
    dout, q, k, v, out, lse = (x.detach() for x in (dout, q, k, v, out, lse))
    tile = tile_for(q.shape[3], v.shape[3], has_terms(bias, mask, softcap, formulas) or seed is not None)
    work = work_of(q, k, tile, window_left, window_right, not deterministic and seed is None, multiprocessors(q.device))
    dq, dk, dv, rows, sums, counts, dscores, ranges, turns = _buffers(
        q, k, v, mask, formulas, tile, work.slots, bias_grad, deterministic
    )
    if not (dq.numel() and dk.numel()):
        return _Call(None, None, None, None, tile, work.slots, q.get_device())
    lse2, delta = rows
    lse_scale = _LOG2E if _is_capped(softcap, formulas) else 1 / scale
    dlse = None if dlse is None else dlse.detach()
    grid, args = statistics_arguments(out, dout, lse, dlse, lse2, delta, sums, counts, lse_scale)
    tensors = tuple(x for x in (out, dout, lse, dlse, lse2, delta, sums, counts) if x is not None)
    find_statistics = launch.prepare(statistics_kernel, grid, args, tensors, {"num_warps": 4})
    find_ranges = None
    if ranges is not None:
        shape, whole, axes = _by_key(q, k, mask, formulas)
        grid, args = ranges_arguments(whole, ranges, tile.keys, tile.block_m, shape, axes[2], formulas, by_key=True)
        find_ranges = launch.prepare(ranges_kernel, grid, args, ranges_tensors(args), {"num_warps": 16})
    grid, args = launch_arguments(
        dout, q, k, v, bias, mask, lse2, delta, sums, dq, dk, dv, dscores, ranges, counts, scale, window_left,
        window_right, softcap, seed, dropout_p, formulas, turns, tile=tile, work=work,
    )  # fmt: skip
    kernel = backward_wide_kernel if tile.wide else backward_kernel
    operands = (operand for operand, *_ in args[_OPERANDS])
    tensors = (dout, q, k, v, lse2, delta, sums, dq, dk, dv, dscores, ranges, *operands, seed, turns, counts)
    main = launch.prepare(kernel, grid, args, tuple(x for x in tensors if x is not None), {"num_warps": 4})
    finish = None
    if work.slots is None:
        grid, args = finish_arguments(sums, dq, scale)
        finish = launch.prepare(finish_kernel, grid, args, (sums, dq), {"num_warps": 4})
    return _Call(main, find_statistics, find_ranges, finish, tile, work.slots, q.get_device())


class Work(NamedTuple):
    """The tiles of keys, and who takes them."""

    n_tiles: int  # of a kv head
    heads: int  # kv heads of all batches
    section: int  # heads whose tiles are taken together
    persistent: bool  # whether a CTA takes one tile after another
    ctas: int
    slots: int | None  # kv heads whose dQ is being added up at a time; None: all, and another kernel rounds


def work_of(
    q: Tensor, k: Tensor, tile: Tile, window_left: int | None, window_right: int | None, may_stay: bool, sm_count: int
) -> Work:
    """How the tiles of a problem are taken.

    Args:
        may_stay: whether CTAs may take tile after tile, and bring the next one's queries while they finish the last. On
            an H200, over 30 points of the benchmark, that is 0.948 of FlashAttention-3 in place of 0.921. Not in order:
            there, a tile is better taken when it is begun, since others wait for it (head_dim 64, causal, 16384
            positions: 462 TFLOP/s, 422 if CTAs stay). Nor with dropout, for the registers (head_dim 128, 4096
            positions, on an H200: 2.98 ms, 3.31 if so).
    """
    batch, q_heads, seqlen_q, head_dim = q.shape
    kv_heads, seqlen_k = k.shape[1:3]
    n_tiles, heads = -(-seqlen_k // tile.keys), batch * kv_heads
    ctas = min(heads * n_tiles, sm_count) if may_stay else heads * n_tiles
    rounds = may_stay and not tile.wide
    section = 1
    if n_tiles and any(_edges(seqlen_q, seqlen_k, window_left, window_right)[:2]):
        # The longest first, and heads enough at a time for two rounds.
        section = max(1, min(heads, 2 * sm_count // n_tiles))
        if rounds:  # dQ of two sections is to stay in the L2 cache
            head_bytes = 4 * head_dim * seqlen_q * q_heads // kv_heads
            section = max(1, min(section, SECTION_BYTES // max(1, head_bytes)))
    slots = slots_of(heads, n_tiles, section, ctas) if rounds and ctas else None
    return Work(n_tiles, heads, section, may_stay, ctas, slots)


# On an H200, at head_dim 128, causal, 512 positions: 231 TFLOP/s; 220 with twice as much.
SECTION_BYTES = 9 << 20


def _edges(seqlen_q: int, seqlen_k: int, left: int | None, right: int | None) -> tuple[bool, bool, int, int]:
    """Whether a window has a left and a right edge, and where they are."""
    has_left = left is not None and left < seqlen_q - 1
    has_right = right is not None and right < seqlen_k - 1
    return has_left, has_right, max(left, -seqlen_k) if has_left else 0, max(right, -seqlen_q) if has_right else 0


_OPERANDS = 11  # which argument of the kernels they are


def launch_arguments(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, lse: Tensor, delta: Tensor,
    sums: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, dscores: Tensor | None, ranges: Tensor | None,
    counts: Tensor, scale: float, window_left: int | None = None, window_right: int | None = None,
    softcap: float | None = None, seed: Tensor | None = None, dropout_p: float = 0.0,
    formulas: Formulas = NO_FORMULAS, turns: Tensor | None = None, *, tile: Tile, work: Work,
) -> tuple[tuple[int, int, int], tuple]:  # fmt: skip
    """The grid and the arguments of the kernel.

    Args:
        lse, delta: of the statistics kernel; sums: dQ's accumulator, as `_buffers` has it, 0.
        dscores: 16-bit [B, Hq, Sk, padded Sq], to be filled with dS^T.
        counts: int32, 0: those of `sums`, or the first of them.
        ranges: of the mask's transpose, for blocks of the tile's keys and query tiles of its block_m.
        turns: the counts of dQ's sums, int32, 0, for these to be in order; with them there are no ranges.
    """
    batch, q_heads, seqlen_q, _ = q.shape
    kv_heads, seqlen_k = v.shape[1:3]
    has_left, has_right, left, right = _edges(seqlen_q, seqlen_k, window_left, window_right)
    program, operands = program_of(bias, mask, softcap, (batch, q_heads, seqlen_q, seqlen_k), formulas)
    load, apply, _ = open_load, open_apply, _ = functions(program, backward=True)
    if ranges is not None:
        steps = (0 if size == 1 else by // ranges.shape[3] for size, by in zip(ranges.shape[:3], ranges.stride()))
        ranges = ranges, *steps
        open_load, open_apply, _ = functions(program.without_mask(), backward=True)
    width, width_v = tile.width, tile.width
    rounding, options = (), (tile.stages, tile.do_stages)
    if tile.wide:
        columns, columns_v = sums.shape[2], _columns(v.shape[3])
        width_v = 128 if columns_v == 128 else width
        options += columns, columns_v, _is_capped(softcap, formulas)
    else:
        rounding = (None,) * 8
        if work.slots is not None:
            # (Strides in eights, for the compiler to know that they are multiples of that.)
            strides = (by // 8 for by in dq.stride()[:3])
            rounding = work.slots, _rows(sums, BOX), sums, sums.shape[2] // 8, dq, *strides
    return (work.ctas, 1, 1), (
        _descriptor(q, tile.block_m, width), _descriptor(dout, tile.block_m, width_v), _descriptor(k, ROWS, width),
        _descriptor(v, ROWS, width_v), _flat(lse, tile.block_m), _flat(delta, tile.block_m),
        _rows(sums, (ROWS, tile.dq_columns)), None if dscores is None else _descriptor(dscores, ROWS, tile.block_m),
        _descriptor(dk, ROWS, width), _descriptor(dv, ROWS, width_v), ranges, operands,
        work.n_tiles, kv_heads, work.heads, work.section, q_heads // kv_heads, lse.shape[2], seqlen_q, seqlen_k,
        left, right, scale * _LOG2E, scale, seed, threshold(dropout_p), keep_scale(dropout_p), turns,
        None if turns is None else _flat(turns, 4), counts, *rounding,
        has_left, has_right, load, apply, open_load, open_apply, _is_capped(softcap, formulas), work.persistent,
        *options,
    )  # fmt: skip


def _is_capped(softcap: float | None, formulas: Formulas) -> bool:
    """Whether scores are more than the scaled product and what is added to it."""
    return softcap is not None or bool(formulas.score)


def _columns(head_dim: int) -> int:
    """How many columns of its tiles the wide kernel multiplies."""
    return max(128, -(-head_dim // 64) * 64)


def _descriptor(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """A TMA descriptor of x: [B, H, S, D] in blocks of [rows, columns]."""
    return TensorDescriptor(
        x, list(x.shape), tma_strides(x), [1, 1, rows, columns], shared_layout(rows, columns, x.dtype)
    )


def _rows(x: Tensor, block: tuple[int, int]) -> TensorDescriptor:
    """A TMA descriptor of a contiguous float32 tensor's last dimension, in blocks."""
    layout = gl.NVMMASharedLayout.get_default_for(list(block), gl.float32)
    return TensorDescriptor(x, [x.numel() // x.shape[-1], x.shape[-1]], [x.shape[-1], 1], list(block), layout)


def _flat(x: Tensor, size: int) -> TensorDescriptor:
    """A TMA descriptor of a contiguous tensor as one row, in blocks of `size`."""
    return TensorDescriptor(x, [x.numel()], [1], [size], gl.NVMMASharedLayout(0, 32, 1))

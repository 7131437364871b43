"""Which attention weights dropout keeps: one rule for the forward, the backward and the specification.

A weight's fate hangs on a seed and on its place (batch and head, query, key), by a counter-based generator: Philox 2x32
(Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011; their library Random123 says that they know of no
statistical flaws from 6 rounds on). One call of it makes 64 bits, 16 for each weight of the queries q and q + 8 and the
keys k and k + 8: a thread holds all four of them, whether scores are [queries, keys] or [keys, queries].
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

LEVELS = 1 << 16  # probabilities are multiples of 1 / LEVELS
_ROUNDS = gl.constexpr(7)
_MULTIPLIER = gl.constexpr(0xD256D193)
_WEYL = gl.constexpr(0x9E3779B9)
_HEAD = gl.constexpr(0x85EBCA6B)  # makes a key of a seed and the number of a head


def threshold(dropout_p: float) -> int:
    """Weights whose 16 bits are below this are dropped. Raises ValueError unless 0 <= dropout_p < 1."""
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p is a probability below 1, not {dropout_p}")
    return min(round(dropout_p * LEVELS), LEVELS - 1)


def keep_scale(dropout_p: float) -> float:
    """What the weights that are kept are multiplied by."""
    return LEVELS / (LEVELS - threshold(dropout_p))


def kept_weights(seed: Tensor, dropout_p: float, shape: tuple[int, int, int, int]) -> Tensor:
    """The specification: bool [B, Hq, Sq, Sk], True where a weight is kept. seed: int64 [1]."""
    batch, heads, seqlen_q, seqlen_k = shape
    word = 0xFFFFFFFF
    flat = torch.arange(batch * heads, device=seed.device).view(batch, heads, 1, 1)
    q = torch.arange(seqlen_q, device=seed.device).view(-1, 1)
    k = torch.arange(seqlen_k, device=seed.device)
    key = (seed + flat * _HEAD.value) & word
    first = q // 16 * 8 + q % 8
    second = (k // 16 * 8 + k % 8) ^ ((seed >> 32) & word)
    first, second = (x.expand(shape) for x in (first, second))
    for _ in range(_ROUNDS.value):
        product = first * _MULTIPLIER.value
        first, second = ((product >> 32) & word) ^ key ^ second, product & word
        key = (key + _WEYL.value) & word
    bits = torch.where(q // 8 % 2 == 0, first, second) >> (k // 8 % 2 * 16) & 0xFFFF
    return bits >= threshold(dropout_p)


@gluon.jit
def _of_group(x):
    """[64, N] -> [4, 8, N / 16, 8]: of rows r and r + 8 and columns c and c + 8, the first."""
    x = x.reshape([4, 2, 8, x.shape[1] // 16, 2, 8]).permute((0, 2, 3, 5, 1, 4))
    return gl.split(gl.split(x)[0])[0]


@gluon.jit
def kept(rows, columns, random, BACKWARD: gl.constexpr, layout: gl.constexpr):
    """bool [64, N] in `layout`, a matrix product's: which of a tile's weights are kept.

    Args:
        rows, columns: of the tile's axes, queries and keys, or if BACKWARD keys and queries.
        random: (key, salt, threshold), as `key_of_head` has the first two.
    """
    key, salt, limit = random
    rows = rows // 16 * 8 + rows % 8
    columns = columns // 16 * 8 + columns % 8
    if BACKWARD:
        rows = rows ^ salt
    else:
        columns = columns ^ salt
    by_row = _of_group(rows[:, None] + (columns * 0)[None, :]).to(gl.uint32)
    by_column = _of_group((rows * 0)[:, None] + columns[None, :]).to(gl.uint32)
    if BACKWARD:
        first = by_column
        second = by_row
    else:
        first = by_row
        second = by_column
    key = key.to(gl.uint32)
    for _ in gl.static_range(_ROUNDS):
        low = first * _MULTIPLIER
        first = gl.umulhi(first, gl.full_like(first, _MULTIPLIER)) ^ key ^ second
        second = low
        key = key + _WEYL
    first = gl.join(first & 0xFFFF, first >> 16)
    second = gl.join(second & 0xFFFF, second >> 16)
    bits = gl.join(first, second)  # [4, 8, N / 16, 8, half by key, half by query]
    if BACKWARD:
        bits = bits.permute((0, 4, 1, 2, 5, 3))
    else:
        bits = bits.permute((0, 5, 1, 2, 4, 3))
    bits = gl.convert_layout(bits.reshape([64, columns.shape[0]]), layout, assert_trivial=True)
    return bits.to(gl.int32) >= limit


@gluon.jit
def key_of_head(seed_ptr, flat):
    """What `kept` needs of a seed, int64, and the number of a head, counted over batches."""
    seed = gl.load(seed_ptr)
    return (seed + flat.to(gl.int64) * _HEAD).to(gl.int32), (seed >> 32).to(gl.int32)

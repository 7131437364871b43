"""The host side of the backward kernel, and its work distribution run as plain Python. No GPU needed."""

import collections
import functools
import itertools
import random
import types

import pytest
import torch

from tests.gluon import as_python

pytest.importorskip("triton")

from fa3_inductor.kernels import backward, backward_kernel  # noqa: E402
from fa3_inductor.kernels.formulas import NO_FORMULAS  # noqa: E402


@pytest.mark.parametrize("left", [None, -5, 0, 3, 100, 1000], ids=str)
@pytest.mark.parametrize("right", [None, -70, -1, 0, 5, 300], ids=str)
@pytest.mark.parametrize("seqlens", [(1, 1), (300, 300), (300, 77), (64, 1000), (513, 512)], ids=str)
def test_ranges_of_query_tiles(seqlens, left, right):
    """Every visible pair is in a tile of its keys, and in an open tile there is nothing else."""
    seqlen_q, seqlen_k = seqlens
    keys, block_m = 128, 64
    query_ranges = as_python(backward_kernel._query_ranges)
    window = (seqlen_q, seqlen_k, left or 0, right or 0)
    for key0 in range(0, seqlen_k, keys):
        has = left is not None, right is not None
        first, open_first, open_stop, stop = query_ranges(0, 0, key0, window, None, keys, block_m, *has)
        assert 0 <= first <= open_first <= open_stop <= stop
        visible = torch.zeros(-(-seqlen_q // block_m) * block_m, keys, dtype=torch.bool)
        for i, j in itertools.product(range(seqlen_q), range(key0, min(key0 + keys, seqlen_k))):
            visible[i, j - key0] = (left is None or j >= i - left) and (right is None or j <= i + right)
        for tile, rows in enumerate(visible.split(block_m)):
            assert first <= tile < stop or not rows.any()
            if open_first <= tile < open_stop:  # rows past the end have no weights in any case
                assert rows[: seqlen_q - tile * block_m].all()


@pytest.mark.parametrize("left", [None, -5, 3, 1000], ids=str)
@pytest.mark.parametrize("right", [None, -70, 0, 300], ids=str)
@pytest.mark.parametrize("seqlens", [(1, 1), (300, 77), (64, 1000), (513, 512)], ids=str)
@pytest.mark.parametrize("keys, block_m", [(128, 64), (128, 128), (64, 64)])
def test_turns_are_taken_one_after_the_other(left, right, seqlens, keys, block_m):
    """Or a block would wait for ever."""
    query_ranges, turn_of = as_python(backward_kernel._query_ranges), as_python(backward_kernel._turn_of)
    window, has = (*seqlens, left or 0, right or 0), (left is not None, right is not None)
    counts = {}
    for key0 in reversed(range(0, seqlens[1], keys)):
        first, _, _, stop = query_ranges(0, 0, key0, window, None, keys, block_m, *has)
        for tile in range(first, stop):
            turn, number = turn_of(3, tile, key0, window, 1, keys, block_m, has[1])
            assert turn == (3 * -(-seqlens[0] // block_m) + tile) * 2 + 2
            assert counts.setdefault(turn, 0) == number
            counts[turn] += 1


@pytest.mark.parametrize("n_tiles, kv_heads, batch, section", [(4, 3, 2, 1), (4, 3, 2, 4), (1, 5, 1, 2), (7, 2, 3, 6)])
def test_every_tile_has_one_block(n_tiles, kv_heads, batch, section):
    work, count = (n_tiles, kv_heads, batch * kv_heads, section), n_tiles * batch * kv_heads
    places, in_order = (
        [as_python(backward_kernel._place)(number, (*work, turns), 128) for number in range(count)]
        for turns in (None, "there")
    )
    assert sorted(places) == sorted(itertools.product(range(batch), range(kv_heads), range(0, 128 * n_tiles, 128)))
    assert sorted(in_order) == sorted(places)
    for head in {place[:2] for place in places}:  # who waits for another's turn is started after it
        keys = [place[2] for place in in_order if place[:2] == head]
        assert keys == sorted(keys, reverse=True)
    first = [key0 for _, _, key0 in places[: section * n_tiles]]
    assert first == sorted(first)  # causal: the longest first


def test_every_tile_divides_what_statistics_are_padded_to():
    for _, *tiles in backward.TILES:
        for tile in tiles:
            assert backward.MULTIPLE % tile.block_m == 0


def test_a_bias_beside_a_soft_cap_has_no_gradient():
    x = torch.zeros(1, 1, 8, 8)
    with pytest.raises(ValueError, match="beside a soft cap"):
        backward.attention_backward(x, x, x, x, x, None, x, x, scale=1.0, softcap=1.0, bias_grad=True)


def arguments(head_dim, heads, seqlen, **options):
    """The grid and the arguments of a launch, and the tensors of which a call replaces the addresses."""
    q, k, v, dout = (torch.empty(1, heads, seqlen, head_dim, device="meta", dtype=torch.bfloat16) for _ in range(4))
    tile = backward.tile_for(head_dim, head_dim)
    in_order, dropout = options.get("in_order", False), options.get("dropout", False)
    work = backward.work_of(q, k, tile, None, None, not (in_order or dropout), 132)
    buffers = backward._buffers(q, k, v, None, NO_FORMULAS, tile, work.slots, False, in_order)
    dq, dk, dv, rows, sums, counts, _, _, turns = buffers
    lse, delta = rows[0].clone(), rows[1].clone()
    seed = torch.empty(1, device="meta", dtype=torch.int64) if dropout else None
    grid, args = backward.launch_arguments(
        dout, q, k, v, None, None, lse, delta, sums, dq, dk, dv, None, None, counts, 0.1, seed=seed,
        dropout_p=0.1 if dropout else 0.0, turns=turns, tile=tile, work=work,
    )  # fmt: skip
    return grid, args, [q, k, v, dout, lse, delta, sums, dq, dk, dv, counts]


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_descriptors_are_of_the_tensors_themselves(head_dim):
    """A call replaces addresses by whose they are: of a view, nobody would replace it."""
    _, args, tensors = arguments(head_dim, 4, 1000)
    bases = [arg.base for arg in args if hasattr(arg, "base")]
    assert len(bases) >= 8
    assert all(any(base is x for x in tensors) for base in bases)


def comes_to_an_end(work, slots, n_pieces, running):
    """Whether CTAs that take tiles of keys and pieces of dQ, and wait for each other, do so whatever their speed.

    Each works on a tile while its producer has another one's number already, and its rounding warps have one piece.
    """
    place = functools.partial(as_python(backward_kernel._place), work=(work.n_tiles, 1, *work[1:3], None), KEYS=128)
    tiles = collections.deque(place(number)[0] for number in range(work.n_tiles * work.heads))
    pieces = collections.deque(head for head in range(work.heads) for _ in range(n_pieces))
    added, rounded = collections.Counter(), collections.Counter()
    rng = random.Random(0)
    ctas = [types.SimpleNamespace(now=None, then=None, piece=None) for _ in range(running)]

    def steps(cta):
        """What it can do now."""
        if cta.then is None and tiles:
            yield lambda: setattr(cta, "then", tiles.popleft())
        if cta.now is None and cta.then is not None and (cta.then < slots or rounded[cta.then - slots] == n_pieces):
            yield lambda: (setattr(cta, "now", cta.then), setattr(cta, "then", None))
        if cta.now is not None:
            yield lambda: (added.update([cta.now]), setattr(cta, "now", None))
        if cta.piece is None and pieces:
            yield lambda: setattr(cta, "piece", pieces.popleft())
        if cta.piece is not None and added[cta.piece] == work.n_tiles:
            yield lambda: (rounded.update([cta.piece]), setattr(cta, "piece", None))

    is_stuck = False
    while not is_stuck:
        is_stuck = True
        for cta in rng.sample(ctas, len(ctas)):
            if can := list(steps(cta)):
                rng.choice(can)()
                is_stuck = False
    return all(rounded[head] == n_pieces for head in range(work.heads))


# (batch, query heads, kv heads, seqlen_q, seqlen_k, causal)
@pytest.mark.parametrize("problem", [
    (32, 16, 16, 512, 512, True), (32, 16, 16, 512, 512, False), (1, 16, 16, 16384, 16384, True),
    (1, 32, 8, 8192, 8192, False), (3, 5, 5, 100, 3000, True), (200, 2, 1, 300, 77, False), (1, 1, 1, 1, 1, False),
    (1, 64, 64, 130, 17000, True),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("running", [1, 2, 131, 132])
def test_nobody_waits_for_ever(problem, running):
    """Not even if fewer CTAs run at a time than the GPU has room for."""
    batch, q_heads, kv_heads, seqlen_q, seqlen_k, causal = problem
    q, k = torch.empty(batch, q_heads, seqlen_q, 128), torch.empty(batch, kv_heads, seqlen_k, 128)
    work = backward.work_of(q, k, backward.tile_for(128, 128), None, 0 if causal else None, True, 132)
    n_pieces = -(-seqlen_q // 128) * (q_heads // kv_heads)
    assert comes_to_an_end(work, work.slots, n_pieces, min(running, work.ctas))
    if work.section > 2 and running <= 2:  # as it would with fewer slots
        assert not comes_to_an_end(work, work.section - running, n_pieces, running)


@pytest.mark.parametrize("head_dim, keys", [(64, 128), (128, 128), (256, 64)])
def test_how_many_ctas_there_are(head_dim, keys):
    tiles = -(-5000 // keys)
    assert arguments(head_dim, 1, 5000)[0] == (tiles, 1, 1)
    assert arguments(head_dim, 16, 5000)[0] == (132, 1, 1)
    assert arguments(head_dim, 16, 5000, in_order=True)[0] == (16 * tiles, 1, 1)
    assert arguments(head_dim, 16, 5000, dropout=True)[0] == (16 * tiles, 1, 1)

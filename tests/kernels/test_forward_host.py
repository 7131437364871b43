"""The host side of the forward kernel, and its work distribution run as plain Python. No GPU needed."""

import itertools

import pytest
import torch

from tests.gluon import as_python

pytest.importorskip("triton")

from fa3_inductor.kernels import forward, forward_kernel, offline, schedule  # noqa: E402
from fa3_inductor.kernels.formulas import Formulas  # noqa: E402
from fa3_inductor.kernels.reference import attention_reference  # noqa: E402


@pytest.mark.parametrize("left", [None, -5, 0, 3, 100, 1000], ids=str)
@pytest.mark.parametrize("right", [None, -70, -1, 0, 5, 300], ids=str)
@pytest.mark.parametrize("seqlens", [(1, 1), (300, 300), (300, 77), (64, 1000), (513, 512)], ids=str)
def test_host_and_kernel_count_the_same_tiles(seqlens, left, right):
    seqlen_q, seqlen_k = seqlens
    tile_m, block_n = 128, 64
    kv_range = as_python(forward_kernel._window_range)
    window = (seqlen_q, seqlen_k, left or 0, right or 0)
    ranges = [
        kv_range(row, window, tile_m, block_n, left is not None, right is not None)
        for row in range(0, seqlen_q, tile_m)
    ]
    lengths = forward.kv_tiles(seqlen_q, seqlen_k, left, right, tile_m, block_n)
    assert [stop - first for first, stop in ranges] == lengths
    for row, (first, stop) in zip(range(0, seqlen_q, tile_m), ranges):
        seen = [
            j
            for i, j in itertools.product(range(row, min(row + tile_m, seqlen_q)), range(seqlen_k))
            if (left is None or j >= i - left) and (right is None or j <= i + right)
        ]
        assert 0 <= first < stop <= -(-seqlen_k // block_n)
        assert not seen or (first == min(seen) // block_n and stop == max(seen) // block_n + 1)


@pytest.mark.parametrize("head_dim, seqlen_q, seqlen_k", [(64, 1000, 700), (128, 300, 300), (256, 130, 2000)])
def test_consumers_count_no_more_tiles_than_the_producer_brings(head_dim, seqlen_q, seqlen_k):
    """A consumer skips the tiles of its CTA that its rows do not see, and there must be none that others lack."""
    kv_range = as_python(forward_kernel._window_range)
    edges = [None, -seqlen_k - 5, -300, -70, -1, 0, 1, 63, 64, 200, seqlen_q - 2, 5000]
    for window_left, window_right in itertools.product(edges, repeat=2):
        q = torch.empty(1, 2, seqlen_q, head_dim, device="meta", dtype=torch.bfloat16)
        k = torch.empty(1, 2, seqlen_k, head_dim, device="meta", dtype=torch.bfloat16)
        lse = torch.empty(1, 2, seqlen_q, device="meta")
        _, args = forward.launch_arguments(q, k, k, q, lse, 1.0, window_left, window_right, sm_count=132)
        window, (has_left, has_right) = args[22:26], args[30:32]
        assert window[:2] == (seqlen_q, seqlen_k)
        tile = forward.tile_for(head_dim, head_dim, has_left or has_right, seqlen_q)
        rows = 64 * tile.consumers
        for row in range(0, seqlen_q, rows):
            first, stop = kv_range(row, window, rows, tile.block_n, has_left, has_right)
            for consumer in range(row, min(row + rows, seqlen_q), 64):
                own_first, own_stop = kv_range(consumer, window, 64, tile.block_n, has_left, has_right)
                assert first <= own_first < own_stop <= stop, (window_left, window_right, consumer)


def shares_of(order, ctas):
    return [[order[ctas * (step + 1) + cta] for step in range(order[cta])] for cta in range(ctas)]


# Row tiles of 128 or 192, heads over all batches, heads to a section: 16384 tokens of width 2048, causal.
@pytest.mark.parametrize("head_dim, consumers", [(64, 3), (64, 2), (128, 2), (256, 2)])
@pytest.mark.parametrize("seqlen", [512, 1024, 4096, 16384])
def test_shares_are_equal_and_whole(head_dim, consumers, seqlen):
    heads, block_n = 16384 // seqlen * 2048 // head_dim, 64 if head_dim == 256 else 128
    lengths = forward.kv_tiles(seqlen, seqlen, None, 0, 64 * consumers, block_n)
    section = -(-heads // 4)
    shares = shares_of(schedule.longest_first(lengths, heads, section, 132), 132)
    assert sorted(n for share in shares for n in share) == list(range(heads * len(lengths)))
    loads = [sum(lengths[n % len(lengths)] + schedule.OVERHEAD for n in share) for share in shares]
    assert sum(loads) / 132 > 0.96 * max(loads)


def test_the_longest_go_first_and_sections_stay_together():
    shares = shares_of(schedule.longest_first([1, 2, 3, 4], 8, 4, 4), 4)
    assert [n % 4 for share in shares for n in share[:1]] == [3, 3, 3, 3]
    for share in shares:
        sections = [n // 4 // 4 for n in share]
        assert sections == sorted(sections) and set(sections) == {0, 1}


def test_very_many_tiles_are_dealt_out_in_bundles():
    lengths = list(range(1, 33))
    shares = shares_of(schedule.longest_first(lengths, 4096, 256, 8), 8)
    assert sorted(n for share in shares for n in share) == list(range(4096 * 32))
    loads = [sum(lengths[n % 32] for n in share) for share in shares]
    assert max(loads) < 1.01 * min(loads)


def arguments(batch, q_heads, seqlen, head_dim, left=None, right=None, **options):
    q = torch.empty(batch, q_heads, seqlen, head_dim, device="meta", dtype=torch.bfloat16)
    lse = torch.empty(batch, q_heads, seqlen, device="meta")
    return forward.launch_arguments(q, q, q, q, lse, 1.0, left, right, sm_count=132, **options)


@pytest.mark.parametrize(
    "head_dim, head_dim_v, kind, shares",
    [
        (64, 64, "ordinary", True), (128, 128, "ordinary", True), (256, 256, "ordinary", True),
        (64, 64, "of one batch and head", True), (64, 64, "float32", False), (64, 64, "odd rows", False),
        (64, 64, "of keys", False), (96, 128, "ordinary", False), (160, 256, "ordinary", False),
    ],
)  # fmt: skip
def test_which_biases_come_by_way_of_shared_memory(head_dim, head_dim_v, kind, shares):
    q, v = (torch.empty(2, 4, 1000, d, device="meta", dtype=torch.bfloat16) for d in (head_dim, head_dim_v))
    bias = torch.empty(2, 4, 1000, 1000, device="meta", dtype=torch.float32 if kind == "float32" else torch.bfloat16)
    if kind == "odd rows":
        bias = torch.empty(2, 4, 1000, 1003, device="meta", dtype=torch.bfloat16)[..., :1000]
    bias = {"of one batch and head": bias[:1, :1], "of keys": bias[:, :, :1]}.get(kind, bias)
    lse = torch.empty(2, 4, 1000, device="meta")
    _, args = forward.launch_arguments(q, q, v, torch.empty_like(v), lse, 1.0, bias=bias, sm_count=132)
    descriptor, by_batch, by_head = args[forward._OPERANDS + 1 :][:3]
    assert (descriptor is not None) == shares
    if shares:
        own = list(bias.shape)
        assert (descriptor.shape, [by_batch, by_head]) == (own, [int(size > 1) for size in own[:2]])


def test_a_list_only_where_tiles_differ():
    for options, listed in (
        (dict(), False),
        (dict(right=0), True),
        (dict(left=300, right=0), True),
        (dict(right=3995), False),  # every row tile sees the last KV tile
        (dict(right=10_000), False),  # sees everything
    ):
        _, args = arguments(4, 16, 4000, 128, **options)
        assert (args[forward._ORDER] is not None) == listed, options
    _, args = arguments(1, 2, 4000, 128, right=0)  # a CTA for each tile
    assert args[forward._ORDER] is None


def test_lists_are_shared_and_bounded(monkeypatch):
    uploads = []
    monkeypatch.setattr(
        forward.launch, "upload", lambda values, device: uploads.append((values, device)) or len(uploads)
    )
    monkeypatch.setattr(forward, "_orders", {})
    gpu = torch.device("cuda", 3)
    lengths = forward.kv_tiles(1000, 1000, None, 0, 128, 128)
    assert forward._order([8] * 8, 64, 64, 132, gpu) is None
    for _ in range(2):
        assert forward._order(lengths, 64, 64, 132, gpu) == 1
        assert forward._order(forward.kv_tiles(1001, 1001, None, 0, 128, 128), 64, 64, 132, gpu) == 1
        assert forward._order(lengths, 64, 64, 100, gpu) == 2
    assert uploads == [(schedule.longest_first(lengths, 64, 64, ctas), 3) for ctas in (132, 100)]
    monkeypatch.setattr(forward, "_MAX_ORDERS", 1000)
    assert forward._order(lengths, 64, 64, 99, gpu) is None
    assert forward._order(lengths, 64, 64, 100, gpu) == 2


@pytest.mark.parametrize("head_dim", range(8, 257, 8))
def test_parts(head_dim):
    parts = forward.parts(head_dim)
    assert len(parts) <= 2 and all(part >= 16 and part & (part - 1) == 0 for part in parts)
    assert sorted(parts, reverse=True) == list(parts) and len(set(parts)) == len(parts)
    assert head_dim <= sum(parts) < max(1.29 * head_dim, head_dim + 16)


@pytest.mark.parametrize("block_n", [80, 128, 160])
@pytest.mark.parametrize("seqlen_q, seqlen_k", [(1000, 700), (300, 300), (130, 2000)])
def test_clusters_have_the_tiles_that_their_consumers_count(block_n, seqlen_q, seqlen_k):
    """What a consumer has and what it skips is what both producers bring, and the rows past the end have one tile."""
    tile_range = as_python(
        forward_kernel._tile_range, _window_range=as_python(forward_kernel._window_range), ROWS=forward.ROWS
    )
    rows = 2 * forward.CLUSTER * forward.ROWS
    for window_left, window_right in itertools.product([None, -300, -1, 0, 63, 200, 5000], repeat=2):
        left, right = forward.clipped(window_left, window_right, seqlen_q, seqlen_k)
        window, edges = (seqlen_q, seqlen_k, left or 0, right or 0), (left is not None, right is not None)
        lengths = forward.kv_tiles(seqlen_q, seqlen_k, left, right, rows, block_n)
        for length, tile_row in zip(lengths, range(0, seqlen_q, rows), strict=True):
            brought = tile_range(tile_row, tile_row, window, rows, block_n, *edges)[2:]
            assert brought[1] - brought[0] == length
            for row in range(tile_row, tile_row + rows, forward.ROWS):
                first, stop, *tile = tile_range(tile_row, row, window, rows, block_n, *edges)
                assert tuple(tile) == brought and brought[0] <= first < stop <= brought[1], (window, row)
                assert row < seqlen_q or (first, stop) == (brought[0], brought[0] + 1)


PLAIN = {  # head_dims, window and lengths: the keys of a tile, or None
    (128, 128, None, None, 4096, 4096): 160,
    (120, 104, None, None, 4096, 4096): 160,
    (128, 128, None, None, 2048, 2048): None,
    (128, 128, None, None, 4000, 4096): 160,
    (128, 128, None, None, 1400, 4096): None,  # six tiles of 256 rows are 9 hundredths more than there are
    (128, 128, None, 0, 4096, 4096): None,
    (128, 128, None, 0, 8192, 8192): 128,
    (128, 128, 1024, 0, 16384, 16384): None,
    (128, 128, 6000, 0, 16384, 16384): 128,
    (256, 256, None, None, 1024, 1024): 80,
    (256, 256, None, 0, 4096, 4096): 80,
    (256, 256, None, None, 1024, 900): None,
    (256, 128, None, None, 4096, 4096): None,
    (64, 64, None, None, 16384, 16384): None,
    (192, 128, None, None, 16384, 16384): None,
    (96, 96, None, None, 16384, 16384): None,
}


@pytest.mark.parametrize("problem", PLAIN, ids=str)
def test_which_problems_the_plain_kernel_gets(problem):
    head_dim, head_dim_v, left, right, seqlen_q, seqlen_k = problem
    window = forward.clipped(left, right, seqlen_q, seqlen_k)
    tile = forward.plain_tile_for(head_dim, head_dim_v, window, seqlen_q, seqlen_k)
    assert (tile and tile.block_n) == PLAIN[problem]


@pytest.mark.parametrize("width, windowed", forward.PLAIN_TILES)
def test_arguments_of_the_plain_kernel(width, windowed):
    """Descriptors come first, those of K and of V cut a tile in the same parts, and there is room for all."""
    tile = forward.PLAIN_TILES[width, windowed][1]
    q, k = (torch.empty(3, heads, 1000, width, device="meta", dtype=torch.float16) for heads in (6, 2))
    out = torch.empty(3, 1000, 6, width, device="meta", dtype=torch.float16).transpose(1, 2)
    lse, right = torch.empty(3, 6, 1000, device="meta"), 0 if windowed else None
    grid, args = forward.plain_arguments(q, k, k, out, lse, 0.1, None, right, tile=tile, sm_count=25)
    assert grid == (24, 1, 1)
    q_desc, *of_k_and_v = args[:7]
    of_k, of_v = ([desc.block_shape[2] for desc in half if desc] for half in (of_k_and_v[:3], of_k_and_v[3:]))
    assert of_k == of_v == sorted(of_k, reverse=True) and sum(of_k) == tile.block_n
    assert all(desc.block_shape[3] == 64 and desc.base is x for desc, x in zip(of_k_and_v, (k,) * 6) if desc)
    assert args[7] == (out, 6000 * width, width, 6 * width, width) and args[8] is lse
    assert (args[forward._PLAIN_ORDER] is not None) == windowed
    shared = 2 * (2 * forward.ROWS * width + forward.STAGES * tile.block_n * 2 * width)
    assert shared + 2048 <= offline.SHARED_LIMIT


@pytest.mark.parametrize("with_terms", [False, True])
@pytest.mark.parametrize("windowed", [False, True])
@pytest.mark.parametrize("seqlen", [512, 4096])
def test_every_head_dim_fits_into_shared_memory(windowed, seqlen, with_terms):
    for head_dim, head_dim_v in itertools.product(range(8, 257, 8), repeat=2):
        tile = forward.tile_for(head_dim, head_dim_v, windowed, seqlen, with_terms)
        width, width_v = sum(forward.parts(head_dim)), sum(forward.parts(head_dim_v))
        shared = tile.shared_o and forward.parts(head_dim)[: len(forward.parts(head_dim_v))] == forward.parts(
            head_dim_v
        )
        rows = 64 * tile.consumers
        size = 2 * (rows * (width + (0 if shared else width_v)) + forward.STAGES * tile.block_n * (width + width_v))
        assert size + 1024 <= offline.SHARED_LIMIT, (head_dim, head_dim_v)


SHAPE = (2, 8, 100, 64)


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(dtype=torch.float32), "bfloat16 and float16, not in torch.float32"),
        (dict(q_shape=SHAPE[1:]), "[batch, heads, seqlen, head_dim]"),
        (dict(q_shape=(2, 8, 100, 20)), "head_dim 8, 16, ... 256, not 20"),
        (dict(v_shape=(2, 8, 100, 264)), "head_dim 8, 16, ... 256, not 264"),
        (dict(k_shape=(2, 8, 100, 128)), "one head_dim for q and k"),
        (dict(q_shape=(2, 9, 100, 64)), "do not divide 9 query heads"),
        (dict(scale=-1.0), "positive scale"),
        (dict(scale=0.0), "positive scale"),
    ],
)
def test_supports_says_why_not(change, words):
    arguments = dict(q_shape=SHAPE, k_shape=SHAPE, v_shape=SHAPE, dtype=torch.float16) | change
    assert words in forward.supports(**arguments)


def test_supports_asks_nothing_of_lengths():
    """Symbolic lengths and batch sizes must come out of it without a guard."""
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

    env = ShapeEnv()
    free, fixed = DimDynamic.DYNAMIC, DimDynamic.STATIC
    dynamic = StatelessSymbolicContext([free, fixed, free, fixed])
    real = torch.empty(2, 8, 100, 64), torch.empty(2, 2, 300, 64)
    with torch._subclasses.FakeTensorMode(shape_env=env) as mode:
        q, k = (mode.from_tensor(x, symbolic_context=dynamic) for x in real)
        assert isinstance(q.shape[2], torch.SymInt)
        guards = len(env.guards)
        assert forward.supports(q.shape, k.shape, k.shape, torch.bfloat16) is None
    assert len(env.guards) == guards


def empty(*shape):
    return torch.empty(shape, dtype=torch.bfloat16)


LAYOUTS = {  # what it is, and whether TMA can address it as it lies
    "contiguous": (lambda: empty(2, 8, 100, 96), True),
    "transposed": (lambda: empty(2, 100, 8, 64).transpose(1, 2), True),
    "packed": (lambda: empty(2, 100, 3, 8, 64)[:, :, 1].transpose(1, 2), True),
    "odd strides of single things": (lambda: empty(64).as_strided((1, 1, 1, 64), (3, 5, 7, 1)), True),
    "rows of 65": (lambda: empty(2, 8, 100, 65)[..., :64], False),
    "address": (lambda: empty(2 * 8 * 100 * 64 + 1)[1:].view(2, 8, 100, 64), False),
    "expanded": (lambda: empty(2, 1, 100, 64).expand(2, 8, 100, 64), False),
    "columns apart": (lambda: empty(2, 8, 64, 100).mT, False),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_copies_only_what_tma_cannot_address(name):
    make, addressable = LAYOUTS[name]
    x = make()
    got = forward.addressable(x)
    assert (got is x) == addressable
    assert got.shape == x.shape and got.stride(3) == 1 and got.data_ptr() % 16 == 0
    forward.descriptors(got, 64, forward.parts(got.shape[3]))  # asserts what TMA asks for


@pytest.mark.parametrize("heads", [1, 3, 8, 40, 132, 1000])
@pytest.mark.parametrize("lengths", [[1], [2], [9], [512], [4000], [3] * 7, list(range(1, 9))], ids=str)
def test_keys_are_split_where_sms_would_idle(lengths, heads):
    parts = schedule.parts_of_keys(lengths, heads, len(lengths), 132)
    tiles = heads * len(lengths)
    assert 1 <= parts <= min(max(lengths), schedule.MAX_PARTS)
    if tiles >= 132:
        assert parts == 1 or tiles % 132
    if tiles == 1 and max(lengths) >= 512:
        assert parts > 50
    if max(lengths) <= 3:
        assert parts == 1
    assert schedule.parts_of_keys(lengths, heads, 100_000, 132) == 1 or max(lengths) > 370


@pytest.mark.parametrize("q_heads, kv_heads", [(8, 2), (5, 1)])
@pytest.mark.parametrize("axes", ["", "b", "h", "k", "bh", "hk", "bhk"])
def test_heads_that_share_keys_as_rows(q_heads, kv_heads, axes):
    """The packed problem is the same one, terms included, in the same memory."""
    batch, seqlen_k = 2, 50
    sizes = dict(b=batch, h=q_heads, q=1, k=seqlen_k)
    shape = [size if axis in axes else 1 for axis, size in sizes.items()]
    q = torch.randn(batch, 1, q_heads, 16, dtype=torch.float64).transpose(1, 2)
    k, v = (torch.randn(batch, kv_heads, seqlen_k, 16, dtype=torch.float64) for _ in "kv")
    bias, mask = torch.randn(shape, dtype=torch.float64), torch.rand(shape) > 0.3
    tables = torch.randn(shape), torch.randint(0, 60, [*shape[:3], 1])
    formulas = Formulas("real(t0) * (real(k) - real(q))", "(k <= t1) & (q == 0)", tables, "tanh(s + real(q))")
    wanted, wanted_lse = attention_reference(q, k, v, bias, mask, scale=0.3, formulas=formulas)
    out = torch.empty_like(q)
    rows, out_rows, bias, mask, formulas = forward.packed(q, out, bias, mask, formulas, k.shape)
    assert rows.shape == (batch, kv_heads, q_heads // kv_heads, 16)
    assert rows.data_ptr() == q.data_ptr() and out_rows.data_ptr() == out.data_ptr()
    got, lse = attention_reference(rows, k, v, bias, mask.bool(), scale=0.3, formulas=formulas)
    torch.testing.assert_close(got, wanted.reshape(got.shape))
    torch.testing.assert_close(lse, wanted_lse.reshape(lse.shape))
    out_rows.copy_(got)
    torch.testing.assert_close(out, wanted)

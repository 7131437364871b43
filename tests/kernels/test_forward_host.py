"""The host side of the forward kernel, and its work distribution run as plain Python. No GPU needed."""

import types
from collections import Counter

import pytest
import torch

pytest.importorskip("triton")

from fa3_inductor.kernels import forward  # noqa: E402


def on_cta(function, cta, ctas):
    """A Gluon function of scalars as a Python function that believes it runs on CTA `cta` of `ctas`."""
    gl = types.SimpleNamespace(program_id=lambda axis: cta, num_programs=lambda axis: ctas, minimum=min)
    return types.FunctionType(function.fn.__code__, {"gl": gl})


def scheduled(grid, args):
    """For each CTA the (row tile, head) pairs that it works on, in order."""
    tiles, m_tiles, heads, _, _, section, paired = args[5:12]
    (ctas, *_), causal = grid, args[16]
    return [
        [
            on_cta(forward._locate, cta, ctas)(step, m_tiles, heads, section, paired, causal)
            for step in range(on_cta(forward._steps, cta, ctas)(tiles, paired))
        ]
        for cta in range(ctas)
    ]


def problem(batch, q_heads, kv_heads, seqlen, head_dim, right, persistent=True, sm_count=132):
    q, k = (torch.empty(batch, h, seqlen, head_dim, device="meta", dtype=torch.bfloat16) for h in (q_heads, kv_heads))
    tile = forward.tile_for(head_dim, right is not None, seqlen)
    tile = forward.Tile(**{**vars(tile), "persistent": persistent})
    return forward.launch_arguments(q, k, k, q, q, 1.0, right, tile, sm_count)


PROBLEMS = [
    (16, 16, 16, 1024, 128),
    (1, 16, 4, 16384, 128),
    (32, 32, 32, 512, 64),
    (8, 32, 32, 2048, 64),
    (1, 1, 1, 1, 64),
    (1, 25, 25, 3000, 64),
    (3, 5, 1, 1500, 128),
    (2, 14, 2, 4097, 64),
    (1, 10, 10, 4096, 128),
]


@pytest.mark.parametrize("shape", PROBLEMS, ids=str)
@pytest.mark.parametrize("right", [None, 0])
@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("sm_count", [132, 114, 7])
def test_every_tile_once(shape, right, persistent, sm_count):
    grid, args = problem(*shape, right, persistent, sm_count)
    m_tiles, heads = args[6:8]
    assert m_tiles * args[17] * forward.ROWS >= shape[3] > (m_tiles - 1) * args[17] * forward.ROWS
    times = Counter(tile for cta in scheduled(grid, args) for tile in cta)
    assert times == Counter((m, h) for m in range(m_tiles) for h in range(heads))


@pytest.mark.parametrize("shape", PROBLEMS[:4], ids=str)
def test_causal_shares_are_equal(shape):
    grid, args = problem(*shape, 0)
    assert grid[0] == 132
    work = [sum(m_tile + 1 for m_tile, _ in cta) for cta in scheduled(grid, args)]
    assert max(work) - min(work) <= max(m + 1 for m in range(args[6])) + 1  # one pair


def test_one_tile_per_cta_starts_with_the_longest():
    grid, args = problem(1, 10, 10, 4096, 128, 0)
    order = [cta for (cta,) in scheduled(grid, args)]
    assert [m_tile for m_tile, _ in order] == sorted((m_tile for m_tile, _ in order), reverse=True)


def test_sections_of_heads_fit_the_cache_and_are_alike():
    """64 heads of 8 MB of keys and values: sections of 4 heads, all the same."""
    _, args = problem(1, 64, 64, 16384, 128, 0, persistent=False)
    assert args[10] == 4
    _, args = problem(1, 64, 8, 16384, 128, 0, persistent=False)  # eight query heads share each
    assert args[10] == 32


SHAPE = (2, 8, 100, 64)


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(dtype=torch.float32), "bfloat16 and float16, not in torch.float32"),
        (dict(q_shape=SHAPE[1:]), "[batch, heads, seqlen, head_dim]"),
        (dict(q_shape=(2, 8, 100, 96)), "head_dim 64 and 128, not 96"),
        (dict(v_shape=(2, 8, 100, 128)), "one head_dim for q, k and v"),
        (dict(q_shape=(2, 9, 100, 64)), "do not divide 9 query heads"),
        (dict(window_left=5), "no left edge"),
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
        assert forward.supports(q.shape, k.shape, k.shape, torch.bfloat16, None, k.shape[2] - q.shape[2]) is None
    assert len(env.guards) == guards


def empty(*shape):
    return torch.empty(shape, dtype=torch.bfloat16)


LAYOUTS = {  # what it is, and whether TMA can address it as it lies
    "contiguous": (lambda: empty(2, 8, 100, 64), True),
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
    forward._descriptor(got, 64)  # asserts what TMA asks for

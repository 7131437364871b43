"""The generated score programs, run as plain Python on a CPU: what they read, and what they make of it."""

import math
import types

import pytest
import torch

pytest.importorskip("triton")

from fa3_inductor.kernels import terms  # noqa: E402
from fa3_inductor.kernels.formulas import NO_FORMULAS, Formulas, check, evaluate, parse  # noqa: E402

BATCH, HEADS, SEQLEN_Q, SEQLEN_K = SHAPE = (2, 3, 40, 48)
SCALE = 0.3
LOG2E = math.log2(math.e)


class Pointer:
    """Elements of a tensor's storage, counted from its first one, as a kernel's pointers are."""

    def __init__(self, tensor, offset=0):
        self.tensor, self.offset = tensor, offset

    def __add__(self, offset):
        return Pointer(self.tensor, self.offset + offset)


def fake_gl(reads):
    def load(pointer, mask=None, other=0):
        index = torch.as_tensor(pointer.offset)
        size = pointer.tensor.untyped_storage().nbytes() // pointer.tensor.element_size()
        storage = pointer.tensor.as_strided((size,), (1,), 0)
        index = index + pointer.tensor.storage_offset()
        seen = torch.ones_like(index, dtype=torch.bool) if mask is None else mask.expand(index.shape)
        reads.append((index[seen], pointer.tensor))
        return torch.where(seen, storage[index.where(seen, 0)], torch.tensor(other, dtype=storage.dtype))

    def approximate_reciprocal(asm, constraints, args, dtype, pure, pack):
        assert asm == "rcp.approx.ftz.f32 $0, $1;"
        return 1 / args[0]

    return types.SimpleNamespace(
        load=load, int64=torch.int64, float32=torch.float32, exp2=torch.exp2, where=torch.where,
        minimum=lambda a, b: torch.minimum(torch.as_tensor(a), torch.as_tensor(b)), maximum=torch.maximum,
        abs=lambda x: torch.abs(torch.as_tensor(x)), exp=torch.exp, log=torch.log, sqrt=torch.sqrt,
        multiple_of=lambda x, n: x, constexpr=bool, inline_asm_elementwise=approximate_reciprocal,
    )  # fmt: skip


def scores_by_program(products, bias, mask, softcap, formulas=NO_FORMULAS):
    """The scores of SHAPE, tile by tile as the kernel does them; what was read; and the program."""
    program, operands = terms.program_of(bias, mask, softcap, SHAPE, formulas)
    load, apply, unit = terms.functions(program)
    operands = tuple((Pointer(tensor), *strides) for tensor, *strides in operands)
    reads: list = []
    gl = fake_gl(reads)
    names = {"gl": gl, "float": float, "_hide": lambda s, mask: torch.where(mask != 0, s, -math.inf)}
    load, apply = (types.FunctionType(f.fn.__code__, names) for f in (load, apply))
    result = torch.full_like(products, math.nan)
    for b in range(BATCH):
        for h in range(HEADS):
            for row0 in range(0, SEQLEN_Q, 16):
                for column0 in range(0, SEQLEN_K, 32):
                    rows, columns = row0 + torch.arange(16), column0 + torch.arange(32)
                    bounded = column0 + 32 > SEQLEN_K
                    loaded = load(
                        operands, torch.tensor(b), torch.tensor(h), rows, columns, SEQLEN_Q, SEQLEN_K, bounded
                    )
                    tile = torch.zeros(16, 32)
                    inside = products[b, h, row0 : row0 + 16, column0 : column0 + 32]
                    height, width = inside.shape
                    tile[:height, :width] = inside
                    tile = apply(tile, SCALE * LOG2E, loaded)
                    result[b, h, row0 : row0 + 16, column0 : column0 + 32] = tile[:height, :width]
    return (result * SCALE if unit is None else result * (unit / LOG2E)), reads, program


def operand(kind, axes, layout):
    shape = [size if axis in axes else 1 for axis, size in zip("bhqk", SHAPE)]
    full = torch.randn(*SHAPE) if kind == "bias" else torch.rand(*SHAPE) > 0.4
    x = full[tuple(slice(None, size) for size in shape)]
    if layout == "strided":
        wide = torch.zeros(*shape[:3], shape[3] * 2 + 1, dtype=x.dtype)
        wide[..., : shape[3] * 2 : 2] = x
        return wide[..., : shape[3] * 2 : 2]
    if layout == "lower rank":
        return x.contiguous()[tuple(0 for axis in "bhqk" if axis not in axes and "bhqk".index(axis) < 2)]
    return x.contiguous()


@pytest.mark.parametrize("layout", ["contiguous", "strided"])
@pytest.mark.parametrize("axes", ["", "k", "q", "qk", "bk", "hk", "hqk", "bqk", "bhqk", "bh"])
@pytest.mark.parametrize("kind", ["bias", "mask"])
def test_every_broadcast(kind, axes, layout):
    torch.manual_seed(0)
    products = torch.randn(*SHAPE)
    tensor = operand(kind, axes, layout)
    got, reads, program = scores_by_program(products, *((tensor, None) if kind == "bias" else (None, tensor)), None)
    want = products * SCALE
    want = want + tensor if kind == "bias" else want.masked_fill(~tensor, -math.inf)
    torch.testing.assert_close(got, want)
    (term,) = program.terms
    assert term.axes == tuple(axis in axes for axis in "bhqk")
    for index, read in reads:  # nothing outside of the tensor
        last = read.storage_offset() + sum(s * (n - 1) for s, n in zip(read.stride(), read.shape))
        assert index.numel() == 0 or (index.min() >= read.storage_offset() and index.max() <= last)


def test_all_at_once():
    torch.manual_seed(0)
    products = torch.randn(*SHAPE) * 10
    bias, mask = operand("bias", "hqk", "contiguous"), operand("mask", "bk", "contiguous")
    got, _, _ = scores_by_program(products, bias, mask, 2.0)
    want = (2.0 * torch.tanh(products * SCALE / 2.0) + bias).masked_fill(~mask, -math.inf)
    torch.testing.assert_close(got, want)


ROWS, COLUMNS = torch.arange(SEQLEN_Q)[:, None], torch.arange(SEQLEN_K)
SLOPES = torch.tensor([0.5, 0.25, 0.125]).view(1, HEADS, 1, 1)
OF_QUERIES = torch.arange(BATCH * SEQLEN_Q).view(BATCH, 1, SEQLEN_Q, 1) // 7
OF_KEYS = torch.arange(BATCH * SEQLEN_K).view(BATCH, 1, 1, SEQLEN_K) // 7
FORMULAS = [  # text, tables, what it is
    ("real(t0) * (real(k) - real(q))", [SLOPES], SLOPES * (COLUMNS - ROWS)),
    ("real(t0) * abs(real(k) - real(q)) - 1.5", [SLOPES.bfloat16()], SLOPES * (COLUMNS - ROWS).abs() - 1.5),
    ("minimum(real(q) / 2.0, sqrt(real(k)))", [], torch.minimum(ROWS / 2, COLUMNS.sqrt())),
    ("exp(-real(q)) + maximum(log(real(k + 1)), real(t0))", [SLOPES],
     torch.exp(-ROWS.float()) + torch.maximum(torch.log(COLUMNS + 1.0), SLOPES)),
    ("t0 == t1", [OF_QUERIES, OF_KEYS], OF_QUERIES == OF_KEYS),
    ("(k <= q) | (k < t0)", [OF_QUERIES[:, :, :1]], (COLUMNS <= ROWS) | (COLUMNS < OF_QUERIES[:, :, :1])),
    ("(q // 16 == k // 16) & ~(k % 3 == 1)", [], (ROWS // 16 == COLUMNS // 16) & (COLUMNS % 3 != 1)),
    ("where(t0 != 0, k, q) > 5", [OF_KEYS % 2 == 0], torch.where(OF_KEYS % 2 == 0, COLUMNS, ROWS) > 5),
]  # fmt: skip


@pytest.mark.parametrize("text, tables, value", FORMULAS, ids=[text for text, *_ in FORMULAS])
def test_formulas(text, tables, value):
    torch.manual_seed(0)
    products, shape = torch.randn(*SHAPE), torch.Size(SHAPE)
    evaluated = evaluate(text, tuple(tables), shape, torch.float32, torch.device("cpu"))
    torch.testing.assert_close(evaluated.expand(shape), value.expand(shape))
    is_mask = value.dtype == torch.bool
    formulas = Formulas(*(("", text) if is_mask else (text, "")), tuple(tables))
    check(formulas, SHAPE, None)
    want = products * SCALE
    want = want.masked_fill(~value, -math.inf) if is_mask else want + value
    torch.testing.assert_close(scores_by_program(products, None, None, None, formulas)[0], want)


def test_formulas_beside_tensors():
    torch.manual_seed(0)
    products = torch.randn(*SHAPE)
    bias, mask = operand("bias", "hqk", "contiguous"), operand("mask", "bk", "contiguous")
    formulas = Formulas("real(t0) * real(k)", "t1 == t2", (SLOPES, OF_QUERIES, OF_KEYS))
    got, _, program = scores_by_program(products, bias, mask, 2.0, formulas)
    want = 2.0 * torch.tanh(products * SCALE / 2.0) + bias + SLOPES * COLUMNS
    torch.testing.assert_close(got, want.masked_fill(~mask | (OF_QUERIES != OF_KEYS), -math.inf))
    # Where no key is hidden, only what the bias needs is read.
    assert program.without_mask() == terms.ScoreProgram(2.0, program.terms[:2], formulas.bias)


SCORES = [  # a formula of the scores, and the same in PyTorch
    ("where(s > 1.0, 1.0, where(s < -1.0, -1.0, s))", lambda s: s.clamp(-1, 1)),
    ("3.0 * tanh(s / 3.0)", lambda s: 3 * (s / 3).tanh()),
    ("s * exp(-real(t0) * abs(real(q) - real(k)))", lambda s: s * (-SLOPES * (ROWS - COLUMNS).abs()).exp()),
    ("sigmoid(s) * real(t0) - log(1.0 + s * s)", lambda s: s.sigmoid() * SLOPES - (1 + s * s).log()),
    ("where(k > q, 0.0, -s)", lambda s: (-s).masked_fill(COLUMNS > ROWS, 0.0)),
    ("maximum(abs(s), sqrt(s * s + 1.0) - 0.5)", lambda s: torch.maximum(s.abs(), (s * s + 1).sqrt() - 0.5)),
    ("1.0 / s", lambda s: 1 / s),
    ("absorb(k > q, s * s)", lambda s: (s * s) - (s * s).detach().masked_fill(COLUMNS <= ROWS, 0.0)),
    ("absorb(real(t0) > 0.1, s)", lambda s: s - s.detach().where(SLOPES > 0.1, 0.0)),
]  # fmt: skip


@pytest.mark.parametrize("text, function", SCORES, ids=[text for text, _ in SCORES])
def test_formulas_of_scores(text, function):
    torch.manual_seed(0)
    products, bias = torch.randn(*SHAPE) * 5, operand("bias", "hqk", "contiguous")
    formulas = Formulas("", "t1 == t2", (SLOPES, OF_QUERIES, OF_KEYS), text)
    check(formulas, SHAPE, None)
    got, _, program = scores_by_program(products, bias, None, None, formulas)
    want = (function(products * SCALE) + bias).masked_fill(OF_QUERIES != OF_KEYS, -math.inf)
    torch.testing.assert_close(got, want)
    # Where no key is hidden, the tables of a score are still there.
    count = 1 + ("t0" in text)
    assert program.without_mask() == terms.ScoreProgram(None, program.terms[:count], "", "", text)


@pytest.mark.parametrize("text, function", SCORES, ids=[text for text, _ in SCORES])
def test_derivatives_of_scores(text, function):
    """What the backward's program returns beside the scores; and scores past the last query weigh nothing."""
    torch.manual_seed(0)
    program, operands = terms.program_of(None, None, None, SHAPE, Formulas("", "", (SLOPES,), text))
    load, apply, _ = terms.functions(program, backward=True)
    gl = fake_gl([])
    names = {"gl": gl, "float": float, "_hide": lambda s, mask: torch.where(mask != 0, s, -math.inf)}
    load, apply = (types.FunctionType(f.fn.__code__, names) for f in (load, apply))
    operands = tuple((Pointer(tensor), *strides) for tensor, *strides in operands)
    rows, columns = torch.arange(SEQLEN_Q + 8), torch.arange(SEQLEN_K)
    products = torch.randn(SEQLEN_K, SEQLEN_Q + 8)
    products[:, SEQLEN_Q:] = 0.0
    at = torch.tensor(1), torch.tensor(2)
    loaded = load(operands, *at, rows, columns, SEQLEN_Q, SEQLEN_K, False)
    scores, slope = apply(products, SCALE * LOG2E, loaded)
    scaled = (products[:, :SEQLEN_Q].mT * SCALE).double().requires_grad_()
    want = function(scaled.expand(*SHAPE))[1, 2]
    torch.testing.assert_close(scores[:, :SEQLEN_Q].mT / LOG2E, want.float())
    (grad,) = torch.autograd.grad(want.sum(), scaled)
    slope = torch.as_tensor(slope).expand_as(scores)  # it is the number 1 where that is all that it can be
    torch.testing.assert_close(slope[:, :SEQLEN_Q].mT, grad.float(), rtol=1e-4, atol=1e-5)
    assert (scores[:, SEQLEN_Q:] == -math.inf).all() and slope.isfinite().all()


@pytest.mark.parametrize("text, problem", [
    ("q +", "is no expression"),
    ("__import__('os')", "has .*__import__"),
    ("q.real", "has 'q.real'"),
    ("x + 1", "has 'x'"),
    ("where(q < k, 1)", "has 'where"),
    ("q < k < 5", "has 'q < k < 5'"),
    ("'q'", "has"),
    ("q ** 2", "has"),
    ("[q for q in k]", "has"),
    ("(q := k)", "has"),
])  # fmt: skip
def test_what_is_no_formula(text, problem):
    with pytest.raises(ValueError, match=problem):
        parse(text)


@pytest.mark.parametrize("formulas, problem", [
    (Formulas("real(t1)", "", (SLOPES,)), "1 tables name t1"),
    (Formulas("", "", (SLOPES,), "s * real(t2)"), "1 tables name t2"),
    (Formulas("s + 1.0"), "bias or of a mask names the score"),
    (Formulas("", "s > 0.0"), "bias or of a mask names the score"),
    (Formulas("real(t0)", "", (torch.ones(5),)), "does not broadcast"),
    (Formulas("real(t0)", "", (torch.ones(SEQLEN_Q, SEQLEN_K),)), "varies along queries and keys both"),
    (Formulas("real(t0)", "", (SLOPES.double(),)), "is torch.float64"),
])  # fmt: skip
def test_tables_that_are_none(formulas, problem):
    with pytest.raises(ValueError, match=problem):
        check(formulas, SHAPE, None)


def test_a_soft_cap_holds_at_infinity():
    products = torch.zeros(*SHAPE)
    products[..., 0], products[..., 1], products[..., 2] = math.inf, -math.inf, 1e30
    got, _, _ = scores_by_program(products, None, None, 5.0)
    torch.testing.assert_close(got[0, 0, 0, :4], torch.tensor([5.0, -5.0, 5.0, 0.0]))


def test_programs_are_made_once():
    bias = torch.randn(1, HEADS, SEQLEN_Q, SEQLEN_K)
    first, _ = terms.program_of(bias, None, None, SHAPE)
    second, _ = terms.program_of(torch.randn_like(bias), None, None, SHAPE)
    assert first == second and terms.functions(first) is terms.functions(second)
    assert terms.functions(terms.ScoreProgram()) == (None, None, None)


def test_alignment_is_claimed_only_where_it_holds():
    cases = {
        True: torch.randn(1, HEADS, SEQLEN_Q, SEQLEN_K),
        False: torch.randn(1, HEADS, SEQLEN_Q, SEQLEN_K + 1)[..., :SEQLEN_K],
    }
    for aligned, bias in cases.items():
        assert terms.program_of(bias, None, None, SHAPE)[0].terms[0].aligned == aligned
    shifted = torch.randn(HEADS * SEQLEN_Q * SEQLEN_K + 1)[1:].view(1, HEADS, SEQLEN_Q, SEQLEN_K)
    assert not terms.program_of(shifted, None, None, SHAPE)[0].terms[0].aligned


def test_what_tma_brings():
    """The first operand, a bias in 16 bits or a mask, of queries and keys, in steps of 16 bytes, if there is room."""
    bias, mask = torch.randn(1, HEADS, SEQLEN_Q, SEQLEN_K).bfloat16(), torch.ones(BATCH, 1, SEQLEN_Q, SEQLEN_K).bool()
    shared = lambda *of, room=2: [t.shared for t in terms.program_of(*of, None, SHAPE, room=room)[0].terms]  # noqa: E731
    assert shared(bias, None) == shared(None, mask) == shared(None, mask, room=1) == [True]
    assert shared(bias, mask) == [True, False] and shared(bias.float(), mask) == [False, False]
    assert shared(bias, None, room=1) == shared(None, mask, room=0) == [False]
    assert shared(None, mask[..., :1, :]) == shared(None, mask[..., :1]) == [False]
    assert shared(None, torch.ones(BATCH, 1, SEQLEN_Q, SEQLEN_K + 8).bool()[..., :SEQLEN_K]) == [False]
    formulas = Formulas(mask="t0 != 0", tables=(torch.ones(1, 1, 1, SEQLEN_K),))
    assert [t.shared for t in terms.program_of(None, mask, None, SHAPE, formulas, room=2)[0].terms] == [False, False]


def test_what_does_not_broadcast_is_refused():
    with pytest.raises(ValueError, match="bias of .2, 40, 48. does not broadcast"):
        terms.program_of(torch.randn(2, SEQLEN_Q, SEQLEN_K), None, None, SHAPE)

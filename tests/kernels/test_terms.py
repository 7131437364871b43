"""The generated score programs, run as plain Python on a CPU: what they read, and what they make of it."""

import math
import types

import pytest
import torch

pytest.importorskip("triton")

from fa3_inductor.kernels import terms  # noqa: E402

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
        minimum=lambda a, b: torch.clamp(a, max=b), multiple_of=lambda x, n: x, constexpr=bool,
        inline_asm_elementwise=approximate_reciprocal,
    )  # fmt: skip


def scores_by_program(products, bias, mask, softcap):
    """The scores of SHAPE, tile by tile as the kernel does them; what was read; and the program."""
    program, operands = terms.program_of(bias, mask, softcap, SHAPE)
    load, apply, scaled = terms.functions(program)
    operands = tuple((Pointer(tensor), *strides) for tensor, *strides in operands)
    reads: list = []
    gl = fake_gl(reads)
    load, apply = (types.FunctionType(f.fn.__code__, {"gl": gl, "float": float}) for f in (load, apply))
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
    return (result / LOG2E if scaled else result * SCALE), reads, program


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
    assert terms.functions(terms.ScoreProgram()) == (None, None, False)


def test_alignment_is_claimed_only_where_it_holds():
    cases = {
        True: torch.randn(1, HEADS, SEQLEN_Q, SEQLEN_K),
        False: torch.randn(1, HEADS, SEQLEN_Q, SEQLEN_K + 1)[..., :SEQLEN_K],
    }
    for aligned, bias in cases.items():
        assert terms.program_of(bias, None, None, SHAPE)[0].terms[0].aligned == aligned
    shifted = torch.randn(HEADS * SEQLEN_Q * SEQLEN_K + 1)[1:].view(1, HEADS, SEQLEN_Q, SEQLEN_K)
    assert not terms.program_of(shifted, None, None, SHAPE)[0].terms[0].aligned


def test_what_does_not_broadcast_is_refused():
    with pytest.raises(ValueError, match="bias of .2, 40, 48. does not broadcast"):
        terms.program_of(torch.randn(2, SEQLEN_Q, SEQLEN_K), None, None, SHAPE)

"""The rounding kernels, run in Triton's interpreter, against the specification."""

import itertools
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

E4M3 = torch.float8_e4m3fn
ORDER = [0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15]  # of the keys in each 16 of a transposed V


def poisoned(*shape):
    return torch.full(shape, 0x7F, dtype=torch.uint8).view(E4M3)


def numbers(b, h, s, d, dtype, layout, rows):
    """Multiples of what e4m3 holds: the interpreter's cast loses carries. Scales are 1, 2^-8 and, for zeros, 1."""
    shape = (b, s, h, d) if layout == "heads inside" else (b, h, s, d)
    x = torch.randn(shape).mul(40).clamp(-448, 448).to(E4M3).to(dtype)
    x = x.transpose(1, 2) if layout == "heads inside" else x
    x[:, :, ::rows, 0] = 448  # the largest of each block
    x[:, :, rows:] /= 256
    x[:, 0] = 0
    return x


def differ(got, scales, expected, expected_scales):
    return not (torch.equal(got.float(), expected.float()) and torch.allclose(scales, expected_scales))


def wrong_rows(seqlen, head_dim, rows, dtype, layout):
    from fa3_inductor.kernels.quantise import rows_arguments, rows_kernel
    from fa3_inductor.kernels.reference import rounded_to_e4m3

    x = numbers(2, 2, seqlen, head_dim, dtype, layout, rows)
    to, scales = poisoned(2, 2, seqlen, -(-head_dim // 16) * 16), torch.empty(2, 2, -(-seqlen // rows))
    grid, args, _ = rows_arguments(x, to, scales, None, rows)
    rows_kernel[grid](*args)
    if differ(to[..., :head_dim], scales, *rounded_to_e4m3(x, rows)) or to[..., head_dim:].float().any():
        yield "rows"


def wrong_turned(seqlen, head_dim, rows):
    """Unit vectors become rows of the orthogonal matrix."""
    from fa3_inductor.kernels.fp8 import blocks
    from fa3_inductor.kernels.quantise import matrix_columns, rows_arguments, rows_kernel, signed_hadamard

    size, which = matrix_columns(head_dim), torch.arange(seqlen) * 7 % head_dim
    x = torch.nn.functional.one_hot(which, head_dim).half()[None, None]
    to, scales = poisoned(1, 1, seqlen, size), torch.empty(1, 1, -(-seqlen // rows))
    grid, args, _ = rows_arguments(x, to, scales, signed_hadamard(size, 3).half(), rows)
    rows_kernel[grid](*args)
    got = to.float() * scales.repeat_interleave(rows, 2)[:, :, :seqlen, None]
    if not torch.allclose(got[0, 0], blocks(x, x, 3, False)["matrix"][which]):
        yield "turned"


def wrong_round_trip(seqlen, head_dim, rows, dtype, layout, seed):
    """What e4m3 holds comes back as it was; with a matrix, unit vectors, which it turns into 1 and -1."""
    from fa3_inductor.kernels.quantise import matrix_columns, round_trip_arguments, round_trip_kernel, signed_hadamard

    if seed is None:
        x, matrix = numbers(2, 2, seqlen, head_dim, dtype, layout, rows), None
    else:
        x = torch.nn.functional.one_hot(torch.arange(2 * seqlen * 2) * 7 % head_dim, head_dim).to(dtype)
        x = x.view(2, seqlen, 2, head_dim).transpose(1, 2)
        matrix = signed_hadamard(matrix_columns(head_dim), seed).to(dtype)
    to = torch.full_like(x, float("nan"))
    grid, args, _ = round_trip_arguments(x, to, matrix, rows)
    round_trip_kernel[grid](*args)
    if not torch.allclose(to, x):
        yield "round trip"


def wrong_values(seqlen, head_dim, keys, dtype, layout):
    from fa3_inductor.kernels.quantise import values_arguments, values_kernel
    from fa3_inductor.kernels.reference import rounded_to_e4m3

    v = numbers(2, 2, seqlen, head_dim, dtype or torch.float32, layout, keys)
    padded = -(-seqlen // 16) * 16
    to, scales = poisoned(2, 2, head_dim, padded), torch.empty(2, 2, -(-seqlen // keys))
    expected, expected_scales = rounded_to_e4m3(v, keys)
    if dtype is None:
        v, scales = expected, None
    grid, args, _ = values_arguments(v, to, scales, keys)
    values_kernel[grid](*args)
    where = torch.arange(padded).unflatten(0, (-1, 16))[:, ORDER].flatten()
    got = torch.empty(2, 2, padded, head_dim)
    got[:, :, where] = to.float().mT
    if got[:, :, seqlen:].any() or differ(
        got[:, :, :seqlen], expected_scales if scales is None else scales, expected, expected_scales
    ):
        yield "values"


def cases():
    dtypes = itertools.cycle((torch.bfloat16, torch.float16))
    for seqlen, head_dim, layout in itertools.product((1, 64, 100, 300), (16, 40, 64, 128), ("plain", "heads inside")):
        name = seqlen, head_dim, layout
        yield name, wrong_rows(seqlen, head_dim, 64, next(dtypes), layout)
        yield name, wrong_values(seqlen, head_dim, 128, next(dtypes), layout)
        yield name, wrong_values(seqlen, head_dim, 128, None, layout)
        if seqlen == 100:
            yield name, wrong_round_trip(seqlen, head_dim, 64, next(dtypes), layout, None)
    for head_dim in (16, 40, 64, 128, 192, 256):
        yield head_dim, wrong_turned(100, head_dim, 64)
        yield head_dim, wrong_round_trip(100, head_dim, 64, torch.float16, "plain", 3)
    yield "many blocks", wrong_turned(8 * 132 * 16 + 5, 16, 16)


def main() -> int:
    """Runs the kernels on every case; exits with 1 if one is wrong."""
    failed = 0
    for name, wrong in cases():
        for what in wrong:
            failed = 1
            print(f"{name}: {what}")
    print("all cases ran")
    return failed


def test_against_the_specification():
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    child = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=environment)
    assert child.returncode == 0 and child.stdout == "all cases ran\n", child.stdout + child.stderr


@pytest.mark.parametrize("size", [16, 64, 128, 256])
def test_the_matrix_is_orthogonal(size):
    from fa3_inductor.kernels.fp8 import blocks

    x = torch.empty(1, 1, 1, size)
    matrix = blocks(x, x, 5, False)["matrix"]
    assert torch.equal(matrix @ matrix.mT, torch.eye(size) * size) and (matrix.abs() == 1).all()
    assert not torch.equal(matrix, blocks(x, x, 6, False)["matrix"])


def test_rounding_by_blocks():
    from fa3_inductor.kernels.reference import rounded_to_e4m3

    x = torch.randn(1, 1, 100, 8)
    x[:, :, :64] = 0
    x[0, 0, 70, 0], x[0, 0, 71, 1] = float("inf"), float("nan")
    rounded, scales = rounded_to_e4m3(x, 64)
    finite = x[0, 0, 64:].nan_to_num(0.0, 0.0, 0.0)
    assert scales[0, 0, 0] == 1 and torch.isclose(scales[0, 0, 1], finite.abs().amax() / 448)
    assert torch.equal(rounded[0, 0].isnan().nonzero(), torch.tensor([[70, 0], [71, 1]]))
    back = rounded[0, 0, 64:].float().nan_to_num(0.0) * scales[0, 0, 1]
    assert ((back - finite).abs() <= finite.abs() / 16 + scales[0, 0, 1] / 512).all()


if __name__ == "__main__":
    sys.exit(main())

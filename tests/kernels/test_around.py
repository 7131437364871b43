"""The kernels around the backward one, run in Triton's interpreter, against plain PyTorch."""

import itertools
import math
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

BATCH, HEADS = 2, 3
SEQLENS = (1, 31, 32, 100, 300)
HEAD_DIMS = ((8, 8), (40, 40), (64, 64), (96, 96), (128, 128), (192, 128), (256, 256))
LAYOUTS = {
    "contiguous": torch.randn,
    "heads inside": lambda b, h, s, d: torch.randn(b, s, h, d).transpose(1, 2),
    "a part": lambda b, h, s, d: torch.randn(b + 1, h + 1, s + 1, d + 8)[1:, 1:, 1:, 8:],
}
DOUTS = LAYOUTS | {"by head": lambda b, h, s, d: torch.randn(h, 1, d).expand(b, h, s, d)}
OUTS = LAYOUTS | {
    "transposed": lambda b, h, s, d: torch.randn(b, h, d, s).mT,
    "a number": lambda *shape: torch.randn(()).expand(shape),
}
LSES = {
    "contiguous": torch.randn,
    "heads inside": lambda b, h, s: torch.randn(b, s, h).transpose(1, 2),
    "every other": lambda b, h, s: torch.randn(b, h, 2 * s)[..., ::2],
}


def poisoned(*shape):
    """A contiguous tensor of NaN, and the longer one that it is the middle of."""
    whole = torch.full((math.prod(shape) + 2000,), math.nan)
    return whole[1000:-1000].view(shape), whole


def wrong_statistics(seqlen, head_dim, head_dim_v, dtype, extra, out_layout, dout_layout, lse_layout, dlse_layout):
    """What the kernel makes wrong. `extra`: rows of dQ's sums that pad the sequence, and columns."""
    from fa3_inductor.kernels.around import statistics_arguments, statistics_kernel

    out = OUTS[out_layout](BATCH, HEADS, seqlen, head_dim_v).to(dtype)
    dout = DOUTS[dout_layout](BATCH, HEADS, seqlen, head_dim_v).to(dtype)
    lse = LSES[lse_layout](BATCH, HEADS, seqlen)
    lse[torch.rand(lse.shape) < 0.3] = -math.inf
    padded = -(-seqlen // 64) * 64
    rows, around_rows = poisoned(2, BATCH, HEADS, padded)
    # Those of some heads in turn, or those of all.
    sums, around_sums = poisoned(4 if extra else BATCH * HEADS, padded if extra else seqlen, head_dim + extra)
    counts, around_counts = poisoned(BATCH * HEADS)
    dlse = None if dlse_layout is None else LSES[dlse_layout](BATCH, HEADS, seqlen)
    grid, args = statistics_arguments(out, dout, lse, dlse, *rows, sums, counts, 1.7)
    statistics_kernel[grid](*args)
    wanted = torch.full_like(rows, math.inf)
    wanted[0, ..., :seqlen] = torch.where(lse == -math.inf, math.inf, lse * 1.7)
    wanted[1] = 0
    wanted[1, ..., :seqlen] = (out.double() * dout.double()).sum(-1)
    if dlse is not None:
        wanted[1, ..., :seqlen] -= torch.where(lse == -math.inf, 0, dlse)
    if not torch.allclose(rows[0], wanted[0]):
        yield "scaled"
    if not torch.allclose(rows[1], wanted[1], atol=1e-4) or rows[1, ..., seqlen:].any():
        yield "delta"
    if sums.ne(0).any() or counts.ne(0).any():
        yield "zeros"
    if not (around_rows.isnan().sum() == around_sums.isnan().sum() == around_counts.isnan().sum() == 2000):
        yield "memory of others"


def wrong_finish(seqlen, head_dim, dtype, extra, layout):
    from fa3_inductor.kernels.around import finish_arguments, finish_kernel

    # Nothing to round: the interpreter does not round to bfloat16, it truncates.
    sums = torch.randint(-99, 99, (BATCH * HEADS, seqlen + extra, head_dim + extra)).float()
    whole = torch.full((BATCH + 1, HEADS + 1, seqlen + 40, head_dim + 8), math.nan, dtype=dtype)
    if layout == "heads inside":
        whole = whole.transpose(1, 2).contiguous().transpose(1, 2)
    wanted = whole.clone()
    rounded = sums.unflatten(0, (BATCH, HEADS))[..., :seqlen, :head_dim] * 0.25
    wanted[1:, 1:, 2 : seqlen + 2, :head_dim] = rounded.to(dtype)
    grid, args = finish_arguments(sums, whole[1:, 1:, 2 : seqlen + 2, :head_dim], 0.25)
    finish_kernel[grid](*args)
    if not torch.equal(whole.nan_to_num(99), wanted.nan_to_num(99)):
        yield "dq"


def cases():
    """(name, what is wrong) of all sizes in one layout and of all layouts in one size"""
    dtypes = itertools.cycle((torch.bfloat16, torch.float16))
    for (n, seqlen), (head_dim, head_dim_v) in itertools.product(enumerate(SEQLENS), HEAD_DIMS):
        dtype, extra = next(dtypes), 64 * (n % 2)
        sizes = seqlen, head_dim, head_dim_v, dtype, extra
        yield sizes, wrong_statistics(*sizes, "heads inside", "contiguous", "contiguous", None)
        yield sizes, wrong_finish(seqlen, head_dim, dtype, extra, "contiguous")
    for layouts in itertools.product(OUTS, DOUTS, LSES, LSES):
        yield layouts, wrong_statistics(33, 40, 40, next(dtypes), 0, *layouts)
    yield "heads inside", wrong_finish(33, 40, next(dtypes), 0, "heads inside")


def main() -> int:
    """Runs the kernels on every case; exits with 1 if one is wrong."""
    failed = 0
    for name, wrong in cases():
        for what in wrong:
            failed = 1
            print(f"{name}: {what}")
    print("all cases ran")
    return failed


def test_against_pytorch():
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    child = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=environment)
    assert child.returncode == 0 and child.stdout == "all cases ran\n", child.stdout + child.stderr


if __name__ == "__main__":
    sys.exit(main())

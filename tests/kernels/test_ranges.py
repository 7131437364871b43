"""The ranges of masks, found by the kernel run in Triton's interpreter, against what the mask says."""

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

from fa3_inductor.kernels.formulas import NO_FORMULAS, Formulas, evaluate  # noqa: E402
from fa3_inductor.kernels.ranges import mask_axes, ranges_shape  # noqa: E402
from fa3_inductor.kernels.terms import broadcast  # noqa: E402

ROWS = 64


def expected(mask, block_n):
    """[B, H, blocks, 4] of a mask [B, H, Sq, Sk], by its definition."""
    batch, heads, seqlen_q, seqlen_k = mask.shape
    found = torch.zeros(batch, heads, -(-seqlen_q // ROWS), 4, dtype=torch.int32)
    for b, h, block in torch.cartesian_prod(*map(torch.arange, found.shape[:3])).tolist():
        rows = mask[b, h, block * ROWS : (block + 1) * ROWS].bool()
        tiles = [rows[:, at : at + block_n] for at in range(0, seqlen_k, block_n)]
        some = [n for n, tile in enumerate(tiles) if tile.any()]
        if not some:
            continue
        runs, start = [(0, 0)], 0
        for n, tile in enumerate([*tiles, torch.zeros(1, 1)]):
            if tile.shape[1] < block_n or not tile.all():
                runs.append((n - start, n))
                start = n + 1
        length = max(length for length, _ in runs)
        found[b, h, block] = torch.tensor([some[0], some[-1] + 1, -length, 0])
        found[b, h, block, 2:] += max(stop for n, stop in runs if n == length)
    return found


def masks():
    """(name, mask, [B, H, Sq, Sk])"""
    generator = torch.Generator().manual_seed(torch.seed())
    q, k = torch.arange(300)[:, None], torch.arange(700)
    documents = torch.arange(300) // 77
    lengths = torch.tensor([0, 700, 129, 128])[:, None, None, None]
    return [
        ("causal", (q >= k), (2, 3, 300, 700)),
        ("padding", k < lengths, (4, 2, 300, 700)),
        ("left padding", k >= lengths, (4, 2, 300, 700)),
        ("documents", documents[:, None] == documents, (1, 2, 300, 300)),
        ("chunks and a prefix", (q // 64 == k // 64) | (k < 130), (1, 1, 300, 700)),
        ("a band", (k > q + 200) & (k < q + 600), (2, 1, 300, 700)),
        ("holes", torch.rand(2, 1, 300, 700, generator=generator) > 0.0001, (2, 2, 300, 700)),
        ("few", torch.rand(2, 2, 300, 700, generator=generator) < 0.00005, (2, 2, 300, 700)),
        ("by head", torch.rand(3, 1, 1, generator=generator) < 0.5, (1, 3, 300, 700)),
        ("by query", torch.rand(300, 1, generator=generator) < 0.9, (1, 1, 300, 700)),
        ("transposed", (q >= k).T.contiguous().T, (1, 1, 300, 700)),
        ("aligned", torch.arange(512)[:, None] + 300 >= torch.arange(1536), (2, 2, 512, 1536)),
        ("one query", torch.rand(1, 700, generator=generator) < 0.99, (1, 1, 1, 700)),
        ("one key", torch.ones(300, 1), (1, 1, 300, 1)),
        ("everything", torch.ones(()), (1, 2, 300, 700)),
    ]


def formulas():
    """(name, formulas, mask beside them or None, [B, H, Sq, Sk])"""
    generator = torch.Generator().manual_seed(torch.seed())
    documents = torch.randint(0, 4, (2, 1, 1, 300), generator=generator).sort().values
    in_bytes = documents.to(torch.uint8)
    lengths = torch.tensor([0, 700, 129, 128])[:, None, None, None]
    keep = torch.rand(3, 1, 1, 700, generator=generator) > 0.001
    return [
        ("causal", Formulas("", "k <= q"), None, (2, 3, 300, 700)),
        ("chunks", Formulas("", "q // 64 == k // 64"), None, (1, 2, 300, 300)),
        ("documents", Formulas("", "t0 == t1", (documents.mT, documents)), None, (2, 3, 300, 300)),
        ("documents in bytes", Formulas("", "t0 == t1", (in_bytes.mT, in_bytes)), None, (2, 1, 300, 300)),
        ("a prefix of each", Formulas("", "(k <= q) | (k < t0)", (lengths,)), None, (4, 2, 300, 700)),
        ("lengths", Formulas("", "k < t0", (lengths,)), None, (4, 2, 300, 700)),
        ("some batches", Formulas("", "t0 != 0", (lengths,)), None, (4, 2, 300, 700)),
        ("beside a mask", Formulas("real(t0)", "k <= q", (torch.rand(1, 3, 1, 1),)), keep, (3, 3, 300, 700)),
        ("of a bias too", Formulas("real(t0)", "(t1 != 0) & (q != 5)", (torch.rand(2, 1, 1, 1), keep[:1])), None,
         (2, 1, 300, 700)),
    ]  # fmt: skip


def cases():
    """(name, mask or None, formulas, what is shown, block_n, by_key)"""
    for name, mask, shape in masks():
        for block_n in (64, 128):
            whole = broadcast("mask", mask.bool(), shape)
            yield f"{name}, {block_n}", whole, NO_FORMULAS, whole, block_n, False
    for name, computed, mask, shape in formulas():
        for by_key in (False, True):
            whole = None if mask is None else broadcast("mask", mask, shape)
            seen = evaluate(computed.mask, computed.tables, shape, torch.float32, torch.device("cpu")).expand(shape)
            seen = seen.to(torch.uint8) if mask is None else seen * whole
            yield f"computed {name}, {by_key}", whole, computed, seen, 64, by_key


def main() -> int:
    """Runs the kernel on every case; exits with 1 if one is wrong."""
    from fa3_inductor.kernels.ranges import ranges_arguments, ranges_kernel

    wrong = 0
    for name, whole, computed, seen, block_n, by_key in cases():
        shape = seen.shape
        axes = mask_axes(whole, computed, shape)
        if by_key:
            shape, axes = (*shape[:2], shape[3], shape[2]), (*axes[:2], axes[3], axes[2])
            whole, seen = None if whole is None else whole.mT, seen.mT
        ranges = torch.full(ranges_shape(shape, axes, ROWS), -1, dtype=torch.int32)
        grid, args = ranges_arguments(whole, ranges, ROWS, block_n, shape, axes[2], computed, by_key)
        ranges_kernel[grid](*args)
        wanted = expected(seen, block_n)
        got = ranges.expand(wanted.shape)
        # Which of several longest runs it is does not matter.
        same = torch.equal(got[..., :2], wanted[..., :2]) and torch.equal(got.diff()[..., 2], wanted.diff()[..., 2])
        inside = all(
            block[2] == block[3] or seen[b, h, n * ROWS : (n + 1) * ROWS, block[2] * block_n : block[3] * block_n].all()
            for b, heads in enumerate(got.tolist())
            for h, blocks in enumerate(heads)
            for n, block in enumerate(blocks)
        )
        if not (same and inside):
            wrong = 1
            print(f"{name}: {got.tolist()} in place of {wanted.tolist()}")
    print("all cases ran")
    return wrong


def test_against_the_definition():
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    child = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=environment)
    assert child.returncode == 0 and child.stdout == "all cases ran\n", child.stdout + child.stderr


@pytest.mark.parametrize("rows, by_key", [(64, False), (128, False), (128, True)])
def test_much_is_loaded_at_once(rows, by_key):
    from fa3_inductor.kernels.offline import SPILLS, compile_offline
    from fa3_inductor.kernels.ranges import ranges_arguments, ranges_kernel

    whole = torch.empty(8192, 8192, dtype=torch.uint8, device="meta").expand(2, 4, 8192, 8192)
    whole = whole.mT if by_key else whole
    shape, axes = (2, 4, 8192, 8192), (False, False, True, True)
    ranges = torch.empty(ranges_shape(shape, axes, rows), dtype=torch.int32, device="meta")
    _, args = ranges_arguments(whole, ranges, rows, 128, shape, True)
    report = compile_offline("ranges", ranges_kernel, args, {"num_warps": 16})
    assert report.spill_bytes <= SPILLS[0]
    assert by_key or report.counts["LDG"] == 8  # of 16 bytes by 512 threads: 64 KB


if __name__ == "__main__":
    sys.exit(main())

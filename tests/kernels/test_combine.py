"""The kernel that puts parts of the keys together, run in Triton's interpreter, against attention over all of them."""

import itertools
import math
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

BATCH, KV_HEADS, SEQLEN_K = 2, 3, 40


def wrong(parts, group, seqlen, head_dim_v, with_sinks, layout):
    """What the kernel makes wrong. `group`: query heads that are rows of one head; without, `seqlen` is free."""
    from fa3_inductor.kernels.combine import combine_arguments, combine_kernel

    heads = KV_HEADS * group
    scores = 3 * torch.randn(BATCH, KV_HEADS, seqlen, SEQLEN_K)
    scores[torch.rand(scores.shape) < 0.8] = -math.inf
    scores[0, 0, 0] = -math.inf
    scores[1, 1, 0] = torch.finfo(torch.float32).min  # the mean of all keys, however they are divided
    values = torch.randn(BATCH, KV_HEADS, SEQLEN_K, head_dim_v)
    sinks = torch.randn(heads) if with_sinks else None
    edges = [SEQLEN_K * n // parts for n in range(parts + 1)]
    width = head_dim_v + 8
    part = torch.full((BATCH, KV_HEADS, parts, seqlen, width), math.nan)
    sums = torch.empty(BATCH, KV_HEADS, parts, 2, seqlen)
    for n, (first, stop) in enumerate(itertools.pairwise(edges)):
        own = torch.cat([scores[..., first:stop], torch.full((*scores.shape[:3], 1), -math.inf)], -1)  # (or no key)
        top = own.amax(-1)
        weights = (own - top.where(top > -math.inf, 0.0)[..., None]).exp()[..., :-1]
        sums[:, :, n, 0], sums[:, :, n, 1] = top, weights.sum(-1)
        part[:, :, n, :, :head_dim_v] = weights @ values[:, :, first:stop]
    every = scores
    if with_sinks:
        of_rows = sinks.view(KV_HEADS, group).expand(BATCH, KV_HEADS, seqlen)
        every = torch.cat([scores, of_rows[..., None]], -1)
    weights = every.softmax(-1)[..., :SEQLEN_K].nan_to_num(0)
    out = torch.full((BATCH, seqlen, KV_HEADS, head_dim_v + 3), math.nan).transpose(1, 2)
    if layout == "heads outside":
        out = out.contiguous()
    lse = torch.full((BATCH, KV_HEADS, seqlen), math.nan)
    scale = torch.tensor(3.0) if parts == 17 else None
    grid, args = combine_arguments(part, sums, out[..., :head_dim_v], lse, sinks, scale, group)
    combine_kernel[grid](*args)
    if (
        not torch.allclose(out[..., :head_dim_v], weights @ values * (1.0 if scale is None else scale), atol=1e-5)
        or not out[..., head_dim_v:].isnan().all()
    ):
        yield "out"
    if not torch.allclose(lse, every.logsumexp(-1), atol=1e-5):
        yield "lse"


def main() -> int:
    """Runs the kernel on every case; exits with 1 if one is wrong."""
    torch.manual_seed(0)
    failed = 0
    for parts, (group, seqlen), head_dim_v, with_sinks, layout in itertools.product(
        (1, 3, 17, 60), ((1, 1), (1, 5), (4, 4)), (8, 40), (False, True), ("heads inside", "heads outside")
    ):
        for what in wrong(parts, group, seqlen, head_dim_v, with_sinks, layout):
            failed = 1
            print(f"{parts, group, seqlen, head_dim_v, with_sinks, layout}: {what}")
    print("all cases ran")
    return failed


def test_against_attention_over_all_keys():
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    child = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=environment)
    assert child.returncode == 0 and child.stdout == "all cases ran\n", child.stdout + child.stderr


if __name__ == "__main__":
    sys.exit(main())

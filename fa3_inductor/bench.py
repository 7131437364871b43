"""`python -m fa3_inductor.bench forward`: the kernels beside PyTorch's own, on a Hopper GPU.

16384 tokens of width 2048, BF16, as in FlashAttention-3's paper. Kernel times are medians over replays of a CUDA graph;
TFLOP/s counts 4 * B * H * S^2 * D, halved for causal. `--peers DIR` adds FlashAttention-3 itself, from a wheel of
fa3-fwd in DIR. Nothing is timed before it has been compared with float64.
"""

import argparse
import functools
import glob
import json
import os
import sys
import tempfile
import types
import zipfile
from collections.abc import Callable

import torch
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from fa3_inductor.kernels.forward import attention_forward
from fa3_inductor.kernels.reference import attention_reference

TOKENS, WIDTH = 16384, 2048


@functools.cache
def flash_attention_3(folder: str) -> Callable:
    """FlashAttention-3's `flash_attn_func` on [B, S, H, D], out of the wheel of fa3-fwd in `folder`."""
    wheel = glob.glob(os.path.join(folder, "fa3_fwd-*.whl"))[0]
    site = tempfile.mkdtemp(prefix="fa3_inductor_peer_")
    zipfile.ZipFile(wheel).extractall(site)
    sys.path.insert(0, site)
    sys.modules.setdefault("flash_attn_config", types.ModuleType("flash_attn_config"))  # the wheel lacks it
    import fa3_fwd_interface

    return fa3_fwd_interface.flash_attn_func


def forward_providers(q, k, v, causal: bool, peers: str | None) -> dict[str, Callable[[], torch.Tensor]]:
    """What computes the same attention of q, k, v: [B, H, S, D], by name."""
    scale = q.shape[3] ** -0.5

    def sdpa(backend):
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, is_causal=causal)

    providers = {
        "ours": lambda: attention_forward(q, k, v, scale=scale, window_right=0 if causal else None)[0],
        "cuDNN": lambda: sdpa(SDPBackend.CUDNN_ATTENTION),
        "FA2": lambda: sdpa(SDPBackend.FLASH_ATTENTION),
    }
    if peers:
        function, bshd = flash_attention_3(peers), [x.transpose(1, 2) for x in (q, k, v)]
        providers["FA3"] = lambda: function(*bshd, causal=causal).transpose(1, 2)
    return providers


def replay_ms(function: Callable) -> float:
    """Median time of one call, replayed from a CUDA graph."""
    function()
    with torch.cuda.stream(torch.cuda.Stream()):
        return triton.testing.do_bench_cudagraph(function, rep=50, return_mode="median")


def inputs(batch: int, heads: int, seqlen: int, head_dim: int) -> list[torch.Tensor]:
    """q, k, v: [B, H, S, D], cut out of [B, S, H, D] memory, as projections leave it."""
    return [
        torch.randn(batch, seqlen, heads, head_dim, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in "qkv"
    ]


def check(head_dim: int, causal: bool, peers: str | None) -> None:
    """Raises AssertionError if one of the providers is wrong on a small problem."""
    q, k, v = inputs(2, 2, 1000, head_dim)
    exact, _ = attention_reference(
        *(x.double() for x in (q, k, v)), scale=head_dim**-0.5, window_right=0 if causal else None
    )
    for name, function in forward_providers(q, k, v, causal, peers).items():
        error = ((function().double() - exact).norm() / exact.norm()).item()
        assert error < 5e-3, f"{name} is wrong: D {head_dim}, causal {causal}, relative error {error}"


def forward(seqlens: list[int], peers: str | None) -> list[dict]:
    rows = []
    for head_dim in (64, 128):
        for causal in (False, True):
            check(head_dim, causal, peers)
            for seqlen in seqlens:
                batch, heads = max(1, TOKENS // seqlen), WIDTH // head_dim
                flops = 4 * batch * heads * seqlen**2 * head_dim / (2 if causal else 1)
                providers = forward_providers(*inputs(batch, heads, seqlen, head_dim), causal, peers)
                tflops = {name: flops / replay_ms(function) / 1e9 for name, function in providers.items()}
                rows.append(dict(head_dim=head_dim, causal=causal, seqlen=seqlen, tflops=tflops))
                if len(rows) == 1:
                    print(f"{'D':>4} {'mask':6} {'S':>6}" + "".join(f"{name:>8}" for name in tflops))
                mask = "causal" if causal else "full"
                print(f"{head_dim:4} {mask:6} {seqlen:6}" + "".join(f"{t:8.0f}" for t in tflops.values()), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fa3_inductor.bench", description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["forward"])
    parser.add_argument("--seqlens", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--peers", metavar="DIR", help="folder with a wheel of fa3-fwd")
    parser.add_argument("--json", metavar="FILE", help="write the numbers there")
    args = parser.parse_args()
    torch.manual_seed(0)
    rows = forward(args.seqlens, args.peers)
    if args.json:
        versions = dict(torch=torch.__version__, triton=triton.__version__, cudnn=torch.backends.cudnn.version())
        with open(args.json, "w") as file:
            json.dump(dict(device=torch.cuda.get_device_name(), **versions, unit="TFLOP/s", rows=rows), file, indent=1)


if __name__ == "__main__":
    main()

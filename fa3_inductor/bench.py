"""The kernels and whole models beside PyTorch's own, on a Hopper GPU.

`python -m fa3_inductor.bench forward`: 16384 tokens of width 2048, BF16, as in FlashAttention-3's paper. Kernel times
are medians over replays of a CUDA graph; TFLOP/s counts 4 * B * H * S^2 * D, halved for causal. `--peers DIR` adds
FlashAttention-3 itself, from a wheel of fa3-fwd in DIR. Nothing is timed before it has been compared with float64.

`python -m fa3_inductor.bench model`: a Llama of transformers through `torch.compile`, stock and with the pass; medians
of whole calls.
"""

import argparse
import functools
import glob
import itertools
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


def llama(implementation: str, training: bool) -> torch.nn.Module:
    """transformers' Llama with random weights: 4 layers, hidden 2048, 16 heads of 128, 4 KV heads, BF16."""
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=4,
        num_attention_heads=16,
        num_key_value_heads=4,
        vocab_size=32000,
        max_position_embeddings=65536,
        attn_implementation=implementation,
    )
    with torch.device("cuda"):
        return (LlamaForCausalLM if training else LlamaModel)(config).bfloat16().train(training)


def step_ms(step: Callable) -> tuple[float, float]:
    """Median time of a whole call in milliseconds, and peak memory in GiB."""
    for _ in range(3):
        step()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(10):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[len(times) // 2], torch.cuda.max_memory_allocated() / 2**30


def model(_seqlens: list[int], _peers: str | None) -> list[dict]:
    """A whole model through ``torch.compile``: stock Inductor beside the pass, for both of transformers' attentions."""
    from fa3_inductor.backend import fa3_inductor as backend

    rows = []
    print(f"{'':10} {'S':>6} {'attention':10} {'backend':13} {'ms':>7} {'GiB':>6}")
    for training, seqlen in ((False, 8192), (False, 16384), (True, 8192)):
        ids = torch.randint(0, 32000, (1, seqlen), device="cuda")
        for implementation, name in itertools.product(("eager", "sdpa"), ("inductor", "fa3_inductor")):
            torch._dynamo.reset()
            network = llama(implementation, training)
            compiled = torch.compile(network, backend=backend if name == "fa3_inductor" else name)

            def step(network=network, compiled=compiled, ids=ids, training=training):
                if training:
                    network.zero_grad(set_to_none=True)
                    compiled(input_ids=ids, labels=ids, use_cache=False).loss.backward()
                else:
                    with torch.no_grad():
                        compiled(input_ids=ids, use_cache=False)

            what = "training" if training else "inference"
            try:
                ms, gib = step_ms(step)
            except torch.OutOfMemoryError:
                ms = gib = float("nan")
            rows.append(dict(what=what, seqlen=seqlen, attention=implementation, backend=name, ms=ms, gib=gib))
            print(f"{what:10} {seqlen:6} {implementation:10} {name:13} {ms:7.1f} {gib:6.2f}", flush=True)
            del network, compiled, step
            torch.cuda.empty_cache()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fa3_inductor.bench", description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["forward", "model"])
    parser.add_argument("--seqlens", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--peers", metavar="DIR", help="folder with a wheel of fa3-fwd")
    parser.add_argument("--json", metavar="FILE", help="write the numbers there")
    args = parser.parse_args()
    torch.manual_seed(0)
    rows = {"forward": forward, "model": model}[args.what](args.seqlens, args.peers)
    if args.json:
        versions = dict(torch=torch.__version__, triton=triton.__version__, cudnn=torch.backends.cudnn.version())
        with open(args.json, "w") as file:
            json.dump(dict(device=torch.cuda.get_device_name(), **versions, rows=rows), file, indent=1)


if __name__ == "__main__":
    main()

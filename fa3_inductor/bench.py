"""The kernels and whole models beside PyTorch's own, on a Hopper GPU.

`python -m fa3_inductor.bench forward`: 16384 tokens of width 2048, BF16, as in FlashAttention-3's paper. Kernel times
are medians over replays of a CUDA graph, the contestants taking turns; TFLOP/s counts 4 * B * H * S^2 * D, halved for
causal. `--peers DIR` adds FlashAttention-3 itself, from a wheel of fa3-fwd in DIR; `--plot FILE` draws the grid (needs
matplotlib). Nothing is timed before it has been compared with float64.

`python -m fa3_inductor.bench backward`: the same for the gradients, with 2.5 times the FLOPs; here `--peers DIR` holds
the wheels of xformers 0.0.34, which has all of FlashAttention-3 in it, and of nvidia-cuda-runtime-cu12.

`python -m fa3_inductor.bench fp8`: the forward of float8_e4m3fn tensors; "rounding" is the same from BF16 tensors, with
the rounding counted. `--peers` as for the forward. `python -m fa3_inductor.bench accuracy`: its error on numbers with
outliers, beside that of other ways to round.

`python -m fa3_inductor.bench features`: what head dims, windows and terms on the scores cost, beside the plain kernel.

`python -m fa3_inductor.bench decode`: one query a sequence on a cache of keys and values, which is not in the L2 cache;
GB/s of keys and values. "static cache" has a mask for what is filled, all of it here. `--peers` as for the forward.

`python -m fa3_inductor.bench ablation`: what warp specialisation and overlapping products and softmax are worth.

`python -m fa3_inductor.bench launch`: microseconds that a call keeps the host busy.

`python -m fa3_inductor.bench model`: a Llama of transformers with a billion weights through `torch.compile`, stock and
with the pass, 8192 tokens at a time or one sequence; medians of whole calls. `--modes training` leaves the other out.
"""

import argparse
import ctypes
import dataclasses
import functools
import gc
import glob
import itertools
import json
import math
import os
import sys
import tempfile
import time
import types
import zipfile
from collections.abc import Callable

import torch
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from fa3_inductor import ops  # noqa: F401  (registers the operators)
from fa3_inductor.kernels.ablation import attention_unspecialised
from fa3_inductor.kernels.backward import attention_backward
from fa3_inductor.kernels.formulas import Formulas
from fa3_inductor.kernels.forward import attention_forward, launch_arguments, tile_for
from fa3_inductor.kernels.forward_kernel import forward_kernel
from fa3_inductor.kernels.fp8 import attention_fp8, attention_quantised
from fa3_inductor.kernels.quantise import signed_hadamard
from fa3_inductor.kernels.reference import attention_backward_reference, attention_reference

TOKENS, WIDTH = 16384, 2048


def unpacked(folder: str, wheel: str) -> str:
    """A new folder with what the wheel in `folder` has in it."""
    site = tempfile.mkdtemp(prefix="fa3_inductor_peer_")
    zipfile.ZipFile(glob.glob(os.path.join(folder, wheel))[0]).extractall(site)
    return site


@functools.cache
def flash_attention_3(folder: str) -> Callable:
    """FlashAttention-3's `flash_attn_func` on [B, S, H, D], out of the wheel of fa3-fwd in `folder`."""
    sys.path.insert(0, unpacked(folder, "fa3_fwd-*.whl"))
    sys.modules.setdefault("flash_attn_config", types.ModuleType("flash_attn_config"))  # the wheel lacks it
    import fa3_fwd_interface

    return fa3_fwd_interface.flash_attn_func


@functools.cache
def flash_attention_3_backward(folder: str) -> Callable:
    """FlashAttention-3's operator for the gradients of [B, S, H, D], out of xformers' wheel in `folder`."""
    runtime = unpacked(folder, "nvidia_cuda_runtime_cu12-*.whl")
    ctypes.CDLL(os.path.join(runtime, "nvidia/cuda_runtime/lib/libcudart.so.12"), mode=ctypes.RTLD_GLOBAL)
    torch.ops.load_library(os.path.join(unpacked(folder, "xformers-*.whl"), "xformers/flash_attn_3/_C.so"))
    return torch.ops.flash_attn_3.bwd


@functools.cache
def flex_attention() -> Callable:
    """FlexAttention compiled for static shapes, as `call(q, k, v, causal)`."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._dynamo.config.recompile_limit = 64  # once for each point of the grid
    compiled = torch.compile(flex_attention, dynamic=False)
    causal_mask = functools.cache(
        lambda seqlen: create_block_mask(lambda b, h, q, k: q >= k, None, None, seqlen, seqlen, device="cuda")
    )
    return lambda q, k, v, causal: compiled(q, k, v, block_mask=causal_mask(q.shape[2]) if causal else None)


def forward_providers(q, k, v, causal: bool, peers: str | None) -> tuple[dict[str, Callable[[], tuple]], None]:
    """What computes the same attention of q, k, v: [B, H, S, D], by name."""
    scale = q.shape[3] ** -0.5

    def sdpa(backend):
        with sdpa_kernel(backend):
            return (scaled_dot_product_attention(q, k, v, is_causal=causal),)

    providers = {
        "ours": lambda: attention_forward(q, k, v, scale=scale, window_right=0 if causal else None)[:1],
        "cuDNN": lambda: sdpa(SDPBackend.CUDNN_ATTENTION),
        "FA2": lambda: sdpa(SDPBackend.FLASH_ATTENTION),
        "Flex": lambda: (flex_attention()(q, k, v, causal),),
    }
    if peers:
        function, bshd = flash_attention_3(peers), [x.transpose(1, 2) for x in (q, k, v)]
        providers["FA3"] = lambda: (function(*bshd, causal=causal).transpose(1, 2),)
    return providers, None


def backward_providers(q, k, v, causal: bool, peers: str | None) -> tuple[dict[str, Callable[[], tuple]], Tensor]:
    """What computes dq, dk, dv of the same attention, by name, and the gradient of its result that they start from.

    "in order" is ours with one order of sums, "FA3 det." FlashAttention-3's deterministic mode, up to head_dim 128.
    """
    scale = q.shape[3] ** -0.5
    options = dict(scale=scale, window_right=0 if causal else None)
    out, lse = attention_forward(q, k, v, **options)
    dout = torch.randn_like(out)
    none = torch.empty(0, dtype=torch.int64, device="cuda")
    aten, seqlen = torch.ops.aten, q.shape[2]
    of_cudnn = (dout, q, k, v, out, lse.unsqueeze(-1), none, none, None, None, None, seqlen, seqlen, 0.0, causal)
    of_flash = (dout, q, k, v, out, lse, None, None, seqlen, seqlen, 0.0, causal, none.new_empty(2), none)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]

    @functools.cache
    def of_flex():  # on a stream of its own, as its gradients then are: of the default stream there is no CUDA graph
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            return flex_attention()(*leaves, causal)

    providers = {
        "ours": lambda: attention_backward(dout, q, k, v, None, None, out, lse, **options)[:3],
        "in order": lambda: attention_backward(dout, q, k, v, None, None, out, lse, **options, deterministic=True)[:3],
        "cuDNN": lambda: aten._scaled_dot_product_cudnn_attention_backward(*of_cudnn, scale=scale),
        "FA2": lambda: aten._scaled_dot_product_flash_attention_backward(*of_flash, scale=scale),
        "Flex": lambda: torch.autograd.grad(of_flex(), leaves, dout, retain_graph=True),
    }
    if peers:
        function, bshd = flash_attention_3_backward(peers), [x.transpose(1, 2) for x in (dout, q, k, v, out)]
        grads = [torch.empty_like(x) for x in bshd[1:4]]

        def flash_attention_3(deterministic=False):
            function(*bshd, lse, *grads, softmax_scale=scale, is_causal=causal, deterministic=deterministic)
            return [x.transpose(1, 2) for x in grads]

        providers["FA3"] = flash_attention_3
        if q.shape[3] <= 128:
            providers["FA3 det."] = lambda: flash_attention_3(deterministic=True)
    return providers, dout


def fp8_providers(q, k, v, causal: bool, peers: str | None) -> tuple[dict[str, Callable[[], tuple]], None]:
    """The same attention of q, k and v in e4m3, by name; "rounding" starts from BF16, and "BF16" stays there."""
    options = dict(scale=q.shape[3] ** -0.5, window_right=0 if causal else None)
    eighths, one = [x.to(torch.float8_e4m3fn) for x in (q, k, v)], torch.ones(1, 1, device="cuda")
    providers = {
        "ours": lambda: attention_fp8(*eighths, one, one, one, **options)[:1],
        "rounding": lambda: attention_quantised(q, k, v, **options)[:1],
        "BF16": lambda: attention_forward(q, k, v, **options)[:1],
    }
    if peers:
        function, bshd = flash_attention_3(peers), [x.transpose(1, 2) for x in eighths]
        providers["FA3"] = lambda: (function(*bshd, causal=causal).transpose(1, 2),)
    return providers, None


PROVIDER_NAMES = ["ours", "in order", "rounding", "BF16", "FA3", "FA3 det.", "cuDNN", "FA2", "Flex"]
PROVIDERS = {"forward": forward_providers, "backward": backward_providers, "fp8": fp8_providers}


def replay_ms(function: Callable, rep: int = 50) -> float:
    """Median time of one call, replayed from a CUDA graph for about ten times `rep` milliseconds."""
    function()
    with torch.cuda.stream(torch.cuda.Stream()):
        return triton.testing.do_bench_cudagraph(function, rep=rep, return_mode="median")


def in_turns(providers: dict[str, Callable]) -> dict[str, float]:
    """Milliseconds of each, the better of two turns: clocks and temperature drift."""
    times = {name: [] for name in providers}
    for _ in range(2):
        for name, function in providers.items():
            times[name].append(replay_ms(function, rep=15))
    return {name: min(both) for name, both in times.items()}


def inputs(batch: int, heads: int, seqlen: int, head_dim: int) -> list[torch.Tensor]:
    """q, k, v: [B, H, S, D], cut out of [B, S, H, D] memory, as projections leave it."""
    return [
        torch.randn(batch, seqlen, heads, head_dim, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in "qkv"
    ]


def check(what: str, head_dim: int, causal: bool, names: list[str], peers: str | None) -> None:
    """Raises AssertionError if one of the providers is wrong on a small problem."""
    q, k, v = inputs(2, 2, 1000, head_dim)
    double = [x.double() for x in (q, k, v)]
    options = dict(scale=head_dim**-0.5, window_right=0 if causal else None)
    exact = attention_reference(*double, **options)
    providers, dout = PROVIDERS[what](q, k, v, causal, peers)
    if what == "backward":
        exact = attention_backward_reference(dout.double(), *double, None, None, *exact, **options)
    for name, function in providers.items():
        for got, want in zip(function(), exact) if name in names else ():
            error = ((got.double() - want).norm() / want.norm()).item()
            assert error < (8e-2 if what == "fp8" else 5e-3), (
                f"{name} is wrong: D {head_dim}, causal {causal}, relative error {error}"
            )


def grid(args: argparse.Namespace) -> list[dict]:
    """Every head_dim, mask and length, forward or backward."""
    rows = []
    for head_dim, causal in itertools.product((64, 128, 256), (False, True)):
        check(args.what, head_dim, causal, args.providers, args.peers)
        for seqlen in args.seqlens:
            batch, heads = max(1, TOKENS // seqlen), WIDTH // head_dim
            flops = 4 * batch * heads * seqlen**2 * head_dim / (2 if causal else 1)
            flops *= 2.5 if args.what == "backward" else 1
            providers, _ = PROVIDERS[args.what](*inputs(batch, heads, seqlen, head_dim), causal, args.peers)
            times = in_turns({name: providers[name] for name in args.providers if name in providers})
            tflops = {name: flops / ms / 1e9 for name, ms in times.items()}
            rows.append(dict(head_dim=head_dim, causal=causal, seqlen=seqlen, tflops=tflops))
            if len(rows) == 1:
                print(f"{'D':>4} {'mask':6} {'S':>6}" + "".join(f"{name:>9}" for name in tflops))
            mask = "causal" if causal else "full"
            columns = "".join(f"{tflops.get(name, math.nan):9.0f}" for name in rows[0]["tflops"])
            print(f"{head_dim:4} {mask:6} {seqlen:6}" + columns, flush=True)
    ratios = summary(rows)
    for name, (geometric_mean, worst) in ratios.items():
        print(f"ours / {name}: geometric mean {geometric_mean:.3f}, at worst {worst:.3f}")
    if args.plot:
        plot(rows, args.plot)
    return rows


def summary(rows: list[dict]) -> dict[str, tuple[float, float]]:
    """Geometric mean and minimum of our speed over each other's, and over the best of the others.

    Over "FA3 det.", that of "in order".
    """
    names = [name for name in rows[0]["tflops"] if name != "ours"]
    others = [name for name in names if name not in ("in order", "rounding", "BF16")]
    contests = {
        name: [row["tflops"]["ours"] / row["tflops"][name] for row in rows if name in row["tflops"]] for name in names
    }
    if {"in order", "FA3 det."} <= set(names):
        both = [row["tflops"] for row in rows if "FA3 det." in row["tflops"]]
        contests["FA3 det."] = [tflops["in order"] / tflops["FA3 det."] for tflops in both]
    if len(others) > 1:
        contests["the best"] = [row["tflops"]["ours"] / max(row["tflops"].get(n, 0) for n in others) for row in rows]
    return {
        name: (math.exp(sum(map(math.log, ratios)) / len(ratios)), min(ratios)) for name, ratios in contests.items()
    }


def plot(rows: list[dict], file: str) -> None:
    """Draws what `grid` measured as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 3, figsize=(15, 8), layout="constrained")
    for axis, (causal, head_dim) in zip(axes.flat, itertools.product((False, True), (64, 128, 256))):
        of_axis = [row for row in rows if (row["head_dim"], row["causal"]) == (head_dim, causal)]
        for name in of_axis[0]["tflops"] if of_axis else ():
            axis.plot([str(r["seqlen"]) for r in of_axis], [r["tflops"][name] for r in of_axis], marker="o", label=name)
        axis.set(title=f"head_dim {head_dim}, {'causal' if causal else 'full'}", xlabel="seqlen", ylabel="TFLOP/s")
        axis.set_ylim(bottom=0)
        axis.legend()
    figure.savefig(file, dpi=100)


def accuracy(args: argparse.Namespace) -> list[dict]:
    """RMSE against float64 on N(0, 1) + N(0, 100) * Bernoulli(0.001), as in section 4.3 of FlashAttention-3's paper."""
    batch, heads, seqlen, head_dim = 1, 16, 4096, 128

    def outliers() -> Tensor:
        x = torch.randn(batch, heads, seqlen, head_dim, device="cuda")
        return (x + 10 * torch.randn_like(x) * (torch.rand_like(x) < 0.001)).bfloat16()

    q, k, v = (outliers() for _ in "qkv")
    one, options = torch.ones(1, 1, device="cuda"), dict(scale=head_dim**-0.5)
    scales = [(x.abs().amax() / 448).float().view(1, 1) for x in (q, k, v)]
    by_tensor = [(x / s).to(torch.float8_e4m3fn) for x, s in zip((q, k, v), scales)]
    matrix = (signed_hadamard(head_dim, 0)[0] / head_dim**0.5).cuda()
    turned = [(x.float() @ matrix) if x is not v else x.float() for x in (q, k, v)]
    scales_of_turned = [(x.abs().amax() / 448).view(1, 1) for x in turned]
    turned = [(x / s).to(torch.float8_e4m3fn) for x, s in zip(turned, scales_of_turned)]
    cases = {
        "BF16": lambda: attention_forward(q, k, v, **options),
        "FP8: block scales, incoherent processing": lambda: attention_quantised(q, k, v, **options),
        "FP8: block scales": lambda: attention_quantised(q, k, v, **options, seed=None),
        "FP8: incoherent processing": lambda: attention_fp8(*turned, *scales_of_turned, **options),
        "FP8: neither (one scale a tensor)": lambda: attention_fp8(*by_tensor, *scales, **options),
        "FP8: rounded as they are": lambda: attention_fp8(
            *(x.to(torch.float8_e4m3fn) for x in (q, k, v)), one, one, one, **options
        ),
    }
    exact = attention_reference(*(x.double() for x in (q, k, v)), **options)[0]
    rows = []
    for name, function in cases.items():
        rmse = (function()[0].double() - exact).square().mean().sqrt().item()
        rows.append(dict(what=name, rmse=rmse))
        print(f"{name:42} {rmse:.2e}", flush=True)
    return rows


def features(args: argparse.Namespace) -> list[dict]:
    """Speed per FLOP of what the kernel can do beside that of plain attention of head_dim 128, 8192 positions."""
    batch, heads, seqlen, window = 2, 16, 8192, 1024
    rand = functools.partial(torch.randn, device="cuda", dtype=torch.bfloat16)
    keys = torch.arange(seqlen, device="cuda")
    padding = (keys < torch.tensor([[seqlen], [seqlen - 1000]], device="cuda")).view(batch, 1, 1, seqlen)
    below, document = keys[:, None] >= keys, keys // window
    documents = document[:, None] == document
    causal = dict(window_right=0)
    slopes = rand(1, heads, 1, 1)
    alibi = Formulas("real(t0) * (real(k) - real(q))", "", (slopes,))
    clamp = Formulas(score="where(s > 50.0, 50.0, where(s < -50.0, -50.0, s))")
    of_documents = Formulas("", "t0 == t1", (document.view(1, 1, -1, 1), document.view(1, 1, 1, -1)))
    cases = {  # name: head_dim, head_dim_v, options, share of the S^2 pairs that are visible
        "full": (128, 128, {}, 1.0),
        "causal": (128, 128, causal, 0.5),
        "causal, kv heads 4": (128, 128, causal, 0.5),
        "causal, window 1024": (128, 128, dict(window_left=window - 1, window_right=0), window / seqlen),
        "causal, softcap 50": (128, 128, dict(softcap=50.0, **causal), 0.5),
        "causal, dropout 0.1": (128, 128, dict(seed=torch.ones_like(keys[:1]), dropout_p=0.1, **causal), 0.5),
        "causal, sinks": (128, 128, dict(sinks=rand(heads), **causal), 0.5),
        "causal, documents of 1024 [q, k]": (128, 128, dict(mask=documents, **causal), window / seqlen / 2),
        "full, documents of 1024 [q, k]": (128, 128, dict(mask=documents), window / seqlen),
        "causal, documents of 1024, computed": (128, 128, dict(formulas=of_documents, **causal), window / seqlen / 2),
        "causal, ALiBi [h, q, k]": (128, 128, dict(bias=slopes * (keys - keys[:, None]), **causal), 0.5),
        "full, scores clamped, computed": (128, 128, dict(formulas=clamp), 1.0),
        "causal, ALiBi, computed": (128, 128, dict(formulas=alibi, **causal), 0.5),
        "full, ALiBi, computed": (128, 128, dict(formulas=alibi), 1.0),
        "causal, key padding": (128, 128, dict(mask=padding, **causal), (padding & below).float().mean().item()),
        "full, key padding": (128, 128, dict(mask=padding), padding.float().mean().item()),
        "full, bias [h, q, k]": (128, 128, dict(bias=rand(1, heads, seqlen, seqlen)), 1.0),
        "full, mask [q, k]": (128, 128, dict(mask=keys[:, None] * 7 % 5 < keys % 7), 1.0),
        "full, head_dim 96": (96, 96, {}, 1.0),
        "full, head_dim 80": (80, 80, {}, 1.0),
        "causal, head_dim 192 / 128": (192, 128, causal, 0.5),
        "full, head_dim 256, bias [h, q, k]": (256, 256, dict(bias=rand(1, heads, seqlen, seqlen)), 1.0),
    }
    rows = []
    print(f"{'':36} {'ms':>7} {'TFLOP/s':>8} {'of plain':>8}")
    for name, (head_dim, head_dim_v, options, share) in cases.items():
        q, k, _ = inputs(batch, heads, seqlen, head_dim)
        v = inputs(batch, heads, seqlen, head_dim_v)[2]
        if "kv heads" in name:
            k, v = k[:, :4], v[:, :4]
        options = dict(scale=head_dim**-0.5, **options)
        ms = replay_ms(lambda q=q, k=k, v=v, options=options: attention_forward(q, k, v, **options)[0], rep=25)
        tflops = 2 * batch * heads * seqlen**2 * (head_dim + head_dim_v) * share / ms / 1e9
        plain = next((row["tflops"] for row in rows if name.startswith(row["what"])), tflops)
        rows.append(dict(what=name, ms=ms, tflops=tflops, of_plain=tflops / plain))
        print(f"{name:36} {ms:7.3f} {tflops:8.0f} {tflops / plain:8.2f}", flush=True)
    return rows


def decode(args: argparse.Namespace) -> list[dict]:
    """One query of 32 heads, 8 KV heads of 128 or as many as for queries, by batch size and length of the cache."""
    rows = []
    print(f"{'batch':>5} {'KV heads':>8} {'keys':>6}   us and GB/s")
    for (batch, kv_heads), seqlen in itertools.product(
        ((1, 8), (8, 8), (64, 8), (1, 32), (8, 32)), (1024, 4096, 16384, 65536)
    ):
        size = 2 * batch * kv_heads * seqlen * 128 * 2  # bytes
        if size > 12 << 30:
            continue
        caches = [inputs(batch, kv_heads, seqlen, 128)[1:] for _ in range(max(1, min(40, (400 << 20) // size)))]
        q = inputs(batch, 32, 1, 128)[0]
        last = torch.full((batch, 1, 1, 1), seqlen - 1, device="cuda")
        filled = Formulas("", "k <= t0", (last,))
        mask = torch.arange(seqlen, device="cuda") <= last
        options = dict(scale=128**-0.5)

        def sdpa(k, v, backend=None, mask=None, q=q):
            with sdpa_kernel(backend or [*SDPBackend.__members__.values()][1:]):
                return scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])

        providers = {
            "ours": lambda k, v, q=q, options=options: attention_forward(q, k, v, **options)[0],
            "static cache": lambda k, v, q=q, options=options, filled=filled: attention_forward(
                q, k, v, **options, formulas=filled
            )[0],
            "FA2": functools.partial(sdpa, backend=SDPBackend.FLASH_ATTENTION),
            "cuDNN": functools.partial(sdpa, backend=SDPBackend.CUDNN_ATTENTION),
            "SDPA, static cache": functools.partial(sdpa, mask=mask),
        }
        if args.peers:
            function = flash_attention_3(args.peers)
            providers["FA3"] = lambda k, v, q=q, function=function: function(
                *(x.transpose(1, 2) for x in (q, k, v)), num_splits=0
            ).transpose(1, 2)
        exact = attention_reference(q[:1].double(), *(x[:1].double() for x in caches[0]), **options)[0]
        calls = {}
        for name, function in providers.items():
            try:
                error = ((function(*caches[0])[:1].double() - exact).norm() / exact.norm()).item()
            except RuntimeError:  # no such kernel for this
                continue
            assert error < 5e-3, f"{name}: relative error {error}"
            calls[name] = lambda function=function, caches=caches: [function(*cache) for cache in caches]
        times = {name: ms / len(caches) for name, ms in in_turns(calls).items()}
        rows.append(dict(batch=batch, kv_heads=kv_heads, seqlen=seqlen, ms=times))
        columns = (f"{name} {ms * 1e3:.1f} {size / ms / 1e6:.0f}" for name, ms in times.items())
        print(f"{batch:5} {kv_heads:8} {seqlen:6}   " + ", ".join(columns), flush=True)
        del caches, calls
    return rows


def ablation(args: argparse.Namespace) -> list[dict]:
    """What each of the paper's techniques is worth, on the plain kernel of head_dim 128: 2 x 8192 positions, full."""
    q, k, v = inputs(2, 16, 8192, 128)
    exact = attention_reference(*(x[:1, :1].double() for x in (q, k, v)), scale=128**-0.5)[0]
    out, lse, tile = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32), tile_for(128, 128, False, 8192)
    tiles = {
        "all of them": tile,
        "without ping-pong": dataclasses.replace(tile, ping_pong=False),
        "without overlap of products and softmax": dataclasses.replace(tile, overlap=False),
        "without either": dataclasses.replace(tile, ping_pong=False, overlap=False),
    }

    def specialised(tile):
        grid, arguments = launch_arguments(q, k, v, out, lse, 128**-0.5, tile=tile)
        forward_kernel[grid](*arguments, num_warps=4)
        return out

    cases = {name: functools.partial(specialised, tile) for name, tile in tiles.items()}
    cases["with clusters and KV tiles of 160 keys, too"] = lambda: attention_forward(q, k, v, scale=128**-0.5)[0]
    cases["without warp specialisation"] = lambda: attention_unspecialised(q, k, v, 128**-0.5)
    for name, function in cases.items():
        error = ((function()[:1, :1].double() - exact).norm() / exact.norm()).item()
        assert error < 5e-3, f"{name}: relative error {error}"
    rows = []
    for name, ms in in_turns(cases).items():
        rows.append(dict(what=name, tflops=4 * q.numel() * 8192 / ms / 1e9))
        print(f"{name:44} {rows[-1]['tflops']:5.0f} TFLOP/s", flush=True)
    return rows


def launch(args: argparse.Namespace) -> list[dict]:
    """Host time of one call on tiny tensors, with the device's work waited for only at the end."""

    def host_us(function: Callable, calls: int = 2000) -> float:
        for _ in range(50):
            function()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            function()
        used = time.perf_counter() - start
        torch.cuda.synchronize()
        return used / calls * 1e6

    q, k, v = inputs(1, 2, 64, 64)
    providers = {
        "an empty Triton kernel": lambda: _empty[(1,)](num_warps=4),
        "attention_forward": lambda: attention_forward(q, k, v, scale=0.125),
        "torch.ops.fa3.attention": lambda: torch.ops.fa3.attention(q, k, v, None, None, 0.125, None, None, "hopper"),
        "scaled_dot_product_attention": lambda: scaled_dot_product_attention(q, k, v),
    }
    rows = [dict(what=name, us=host_us(function)) for name, function in providers.items()]
    for row in rows:
        print(f"{row['what']:30} {row['us']:7.1f} us")
    return rows


@triton.jit
def _empty():
    pass


def llama(implementation: str, training: bool) -> torch.nn.Module:
    """transformers' Llama with a billion random weights: 16 layers, hidden 2048, 32 heads of 64, 8 KV heads, BF16."""
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
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
    for _ in range(7):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[len(times) // 2], torch.cuda.max_memory_allocated() / 2**30


def model(args: argparse.Namespace) -> list[dict]:
    """A whole model through ``torch.compile``: stock Inductor, for both of transformers' attentions, and the pass."""
    from fa3_inductor.backend import fa3_inductor as backend

    rows = []
    print(f"{'':10} {'S':>6} {'attention':10} {'backend':13} {'ms':>7} {'tokens/s':>8} {'GiB':>6}")
    contestants = ("eager", "inductor"), ("sdpa", "inductor"), ("eager", "fa3_inductor"), ("sdpa", "fa3_inductor")
    for training, seqlen in itertools.product((False, True), (2048, 8192, 32768)):
        what = "training" if training else "inference"
        if what not in args.modes:
            continue
        ids = torch.randint(0, 32000, (max(1, 8192 // seqlen), seqlen), device="cuda")
        for implementation, name in contestants:
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

            try:
                ms, gib = step_ms(step)
            except torch.OutOfMemoryError:
                ms = gib = math.nan
            rate = ids.numel() / ms * 1e3
            rows.append(
                dict(what=what, seqlen=seqlen, attention=implementation, backend=name, ms=ms, rate=rate, gib=gib)
            )
            print(f"{what:10} {seqlen:6} {implementation:10} {name:13} {ms:7.1f} {rate:8.0f} {gib:6.2f}", flush=True)
            del network, compiled, step
            gc.collect()
            torch.cuda.empty_cache()
    return rows


PARTS = dict.fromkeys(PROVIDERS, grid) | dict(
    accuracy=accuracy, features=features, decode=decode, ablation=ablation, launch=launch, model=model
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fa3_inductor.bench", description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=list(PARTS))
    parser.add_argument("--seqlens", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--providers", nargs="+", default=PROVIDER_NAMES)
    parser.add_argument("--modes", nargs="+", default=["inference", "training"], help="of the model")
    parser.add_argument("--peers", metavar="DIR", help="folder with FlashAttention-3's wheels")
    parser.add_argument("--json", metavar="FILE", help="write the numbers there")
    parser.add_argument("--plot", metavar="FILE", help="draw the grid there, as a PNG")
    args = parser.parse_args()
    torch.manual_seed(0)
    rows = PARTS[args.what](args)
    if args.json:
        versions = dict(torch=torch.__version__, triton=triton.__version__, cudnn=torch.backends.cudnn.version())
        with open(args.json, "w") as file:
            json.dump(dict(device=torch.cuda.get_device_name(), **versions, rows=rows), file, indent=1)


if __name__ == "__main__":
    main()

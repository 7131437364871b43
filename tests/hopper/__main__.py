"""One small call of every kernel, for compute-sanitizer:

    compute-sanitizer --tool memcheck --report-api-errors no --error-exitcode 1 python -m tests.hopper

and the same with --tool racecheck. Names of PARTS choose among them.
"""

import sys

import torch

from fa3_inductor.kernels import backward, forward
from fa3_inductor.kernels.backward import attention_backward
from fa3_inductor.kernels.formulas import Formulas
from fa3_inductor.kernels.forward import attention_forward
from fa3_inductor.kernels.fp8 import attention_fp8, attention_quantised, round_trip

BATCH, Q_HEADS, KV_HEADS, SEQLEN_Q, SEQLEN_K = 2, 4, 2, 200, 333


def rand(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def cases() -> list[tuple[int, int, dict]]:
    """head_dim, head_dim_v and options."""
    mask = torch.rand(BATCH, 1, SEQLEN_Q, SEQLEN_K, device="cuda") > 0.3
    bias = rand(1, Q_HEADS, SEQLEN_Q, SEQLEN_K)
    document = torch.arange(SEQLEN_K, device="cuda").view(1, 1, 1, -1) // 100
    documents = Formulas("", "t0 == t1", (document[..., :SEQLEN_Q].mT, document))
    return [
        (64, 64, {}),
        (64, 64, dict(mask=mask)),
        (64, 64, dict(seed=torch.tensor([5], device="cuda"), dropout_p=0.2)),
        (40, 24, dict(sinks=rand(Q_HEADS))),
        (64, 64, dict(deterministic=True)),
        (128, 128, dict(window_right=0)),
        (128, 128, dict(bias=bias)),
        (128, 128, dict(formulas=documents, window_right=SEQLEN_K - SEQLEN_Q)),
        (128, 128, dict(formulas=Formulas("", "", (), "where(s > 0.5, 0.5, s)"))),
        (128, 128, dict(window_right=0, deterministic=True)),
        (192, 128, dict(window_right=0)),
        (256, 256, dict(window_left=70, window_right=0)),
        (256, 256, dict(mask=mask, softcap=5.0)),
        (256, 256, dict(deterministic=True)),
    ]


def every_kernel() -> None:
    one = torch.ones(1, 1, device="cuda")
    backward.multiprocessors = lambda device: 4  # so that CTAs take several tiles
    for head_dim, head_dim_v, options in cases():
        q, k = rand(BATCH, Q_HEADS, SEQLEN_Q, head_dim), rand(BATCH, KV_HEADS, SEQLEN_K, head_dim)
        v, dout = rand(BATCH, KV_HEADS, SEQLEN_K, head_dim_v), rand(BATCH, Q_HEADS, SEQLEN_Q, head_dim_v)
        options = dict(options, scale=0.1)
        bias, mask = options.pop("bias", None), options.pop("mask", None)
        deterministic, sinks = options.pop("deterministic", False), options.pop("sinks", None)
        out, lse = attention_forward(q, k, v, bias, mask, sinks=sinks, **options)
        attention_backward(
            dout, q, k, v, bias, mask, out, lse, bias_grad=bias is not None, deterministic=deterministic, **options
        )
        if "seed" not in options and not deterministic:
            attention_quantised(q, k, v, bias, mask, sinks=sinks, **options)
            for x, seed in ((q, 0), (v, None)):
                round_trip(x, 64, seed)
            if head_dim % 16 == 0:
                eighths = (x.to(torch.float8_e4m3fn) for x in (q, k, v))
                attention_fp8(*eighths, one, one, one, bias, mask, sinks=sinks, **options)
        torch.cuda.synchronize()
        print(head_dim, head_dim_v, *options, flush=True)


def one_query() -> None:
    some = torch.arange(3000, device="cuda") < torch.tensor([200, 2500], device="cuda").view(BATCH, 1, 1, 1)
    for head_dim, head_dim_v, options in (
        (128, 128, {}),
        (72, 40, dict(sinks=rand(Q_HEADS))),
        (256, 256, dict(mask=some)),
    ):
        q, k, v = rand(BATCH, Q_HEADS, 1, head_dim), *(rand(BATCH, KV_HEADS, 3000, d) for d in (head_dim, head_dim_v))
        attention_forward(q, k, v, scale=0.1, **options)
        torch.cuda.synchronize()
        print("one query", head_dim, head_dim_v, *options, flush=True)


def plain() -> None:
    forward.multiprocessors = lambda device: 4  # so that clusters take several tiles
    for head_dim, options in (
        (128, {}),
        (120, dict(window_right=2700)),
        (256, dict(sinks=rand(Q_HEADS))),
        (256, dict(window_left=2000, window_right=1000)),
    ):
        q, k, v = rand(1, Q_HEADS, 2300, head_dim), *(rand(1, KV_HEADS, 5000, head_dim) for _ in "kv")
        window = forward.clipped(options.get("window_left"), options.get("window_right"), 2300, 5000)
        assert forward.plain_tile_for(head_dim, head_dim, window, 2300, 5000), options
        attention_forward(q, k, v, scale=0.1, **options)
        torch.cuda.synchronize()
        print("plain", head_dim, *options, flush=True)


PARTS = {part.__name__: part for part in (every_kernel, one_query, plain)}

if __name__ == "__main__":
    torch.manual_seed(0)
    for name in sys.argv[1:] or PARTS:
        PARTS[name]()

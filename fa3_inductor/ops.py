"""The operators that the pass puts into graphs: `fa3::attention` and `fa3::attention_backward`.

Import this module to register them. They are opaque to Inductor, functional, differentiable once (in q, k, v, bias and
sinks), and have fakes for every shape, symbolic ones included. Both take `target`: "hopper" runs the Gluon kernels on
CUDA tensors, "reference" the plain PyTorch specification; CPU tensors always take the reference.
`fa3_inductor.kernels.reference` says what the other arguments mean.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from fa3_inductor.kernels import output_like
from fa3_inductor.kernels.reference import attention_backward_reference, attention_reference

_MASKING = "float scale, SymInt? window_left, SymInt? window_right, str target"
_SOFTCAP = "float? softcap=None"
# Fixed order, not exact strides: the kernels read any strides, and only the order decides how outputs lie
# (`output_like`). So views into a packed projection come through without a copy.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)

torch.library.define(
    "fa3::attention",
    f"(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? mask, {_MASKING}, {_SOFTCAP}, "
    "Tensor? sinks=None) -> (Tensor, Tensor)",
    tags=_TAGS,
)
torch.library.define(
    "fa3::attention_backward",
    f"(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? mask, Tensor out, Tensor lse, {_MASKING}, "
    f"bool bias_grad, {_SOFTCAP}) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=_TAGS,
)


@torch.library.impl("fa3::attention", "default")
def _attention(q, k, v, bias, mask, scale, window_left, window_right, target, softcap=None, sinks=None):
    if target == "hopper" and q.is_cuda:
        from fa3_inductor.kernels.forward import attention_forward

        return attention_forward(
            q, k, v, bias, mask, scale=scale, window_left=window_left, window_right=window_right, softcap=softcap,
            sinks=None if sinks is None else sinks.contiguous(),
        )  # fmt: skip
    _check(q, k, v, bias, mask, target)
    out, lse = attention_reference(
        q, k, v, bias, mask, scale=scale, window_left=window_left, window_right=window_right, softcap=softcap,
        sinks=sinks,
    )  # fmt: skip
    return output_like(q, v.shape[-1]).copy_(out), lse


@torch.library.register_fake("fa3::attention")
def _attention_fake(q, k, v, bias, mask, scale, window_left, window_right, target, softcap=None, sinks=None):
    _check(q, k, v, bias, mask, target)
    if sinks is not None and sinks.shape != q.shape[1:2]:
        raise ValueError(f"fa3::attention: sinks are [{q.shape[1]}], one for each query head, not {list(sinks.shape)}")
    return output_like(q, v.shape[-1]), q.new_empty(q.shape[:3], dtype=_lse_dtype(q))


@torch.library.impl("fa3::attention_backward", "default")
def _backward(dout, q, k, v, bias, mask, out, lse, scale, window_left, window_right, target, bias_grad, softcap=None):
    _check(q, k, v, bias, mask, target)
    dbias = _dbias(q, bias, bias_grad)
    if target == "hopper" and q.is_cuda:
        if bias is not None or mask is not None or softcap is not None:
            raise ValueError("fa3::attention_backward: the Hopper path takes no bias, mask or softcap")
        return *_fused_backward(dout, q, k, v, out, lse, scale, window_left, window_right), dbias
    grads = *_grads(q, k, v), dbias
    reference = attention_backward_reference(
        dout, q, k, v, bias, mask, out, lse, scale=scale, window_left=window_left, window_right=window_right,
        softcap=softcap,
    )  # fmt: skip
    for grad, value in zip(grads if bias_grad else grads[:3], reference):
        grad.copy_(value)
    return grads


@torch.library.register_fake("fa3::attention_backward")
def _backward_fake(
    dout, q, k, v, bias, mask, out, lse, scale, window_left, window_right, target, bias_grad, softcap=None
):
    _check(q, k, v, bias, mask, target)
    return *_grads(q, k, v), _dbias(q, bias, bias_grad)


def _setup_context(ctx, inputs, output):
    q, k, v, bias, mask, ctx.scale, ctx.window_left, ctx.window_right, ctx.target, ctx.softcap, sinks = inputs
    out, lse = output
    ctx.bias_grad = bias is not None and ctx.needs_input_grad[3]
    ctx.sinks_grad = sinks is not None and ctx.needs_input_grad[10]
    ctx.save_for_backward(q, k, v, bias, mask, out, lse, sinks)
    ctx.mark_non_differentiable(lse)


def _attention_vjp(ctx, dout, _dlse):
    q, k, v, bias, mask, out, lse, sinks = ctx.saved_tensors
    dq, dk, dv, dbias = torch.ops.fa3.attention_backward(
        dout, q, k, v, bias, mask, out, lse, ctx.scale, ctx.window_left, ctx.window_right, ctx.target, ctx.bias_grad,
        ctx.softcap,
    )  # fmt: skip
    dsinks = None
    if ctx.sinks_grad:  # a sink's weight times what it adds to the output, nothing, less what the row adds up to
        weights = torch.exp(sinks.to(lse.dtype).view(1, -1, 1) - lse)
        delta = (dout.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
        dsinks = -(weights * delta).sum((0, 2)).to(sinks.dtype)
    return dq, dk, dv, dbias if ctx.bias_grad else None, None, None, None, None, None, None, dsinks


def _no_double_backward(ctx, *grads):
    raise NotImplementedError("fa3::attention is differentiable once: double backward is not supported")


torch.library.register_autograd("fa3::attention", _attention_vjp, setup_context=_setup_context)
torch.library.register_autograd("fa3::attention_backward", _no_double_backward)


def _check(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, target: str) -> None:
    if target not in ("hopper", "reference"):
        raise ValueError(f"fa3::attention: target is 'hopper' or 'reference', not {target!r}")
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        raise ValueError("fa3::attention: q, k and v are [batch, heads, seqlen, head_dim]")
    if q.dtype != k.dtype or q.dtype != v.dtype or not q.is_floating_point():
        raise ValueError(f"fa3::attention: q, k and v share a floating dtype, not {q.dtype}, {k.dtype}, {v.dtype}")
    torch._check(
        q.shape[0] == k.shape[0] == v.shape[0] and k.shape[1:3] == v.shape[1:3] and q.shape[3] == k.shape[3],
        lambda: f"fa3::attention: shapes do not fit: q {q.shape}, k {k.shape}, v {v.shape}",
    )
    torch._check(
        q.shape[1] % k.shape[1] == 0, lambda: f"fa3::attention: {k.shape[1]} kv heads do not divide {q.shape[1]}"
    )
    if bias is not None and not bias.is_floating_point():
        raise ValueError(f"fa3::attention: bias is floating point, not {bias.dtype}")
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(f"fa3::attention: mask is bool, not {mask.dtype}")


def _lse_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _grads(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """Uninitialised dq, dk, dv, lying in memory as `output_like` says for q, k and v."""
    return tuple(output_like(x, x.shape[-1]) for x in (q, k, v))


def _dbias(q: Tensor, bias: Tensor | None, wanted: bool) -> Tensor:
    """Uninitialised gradient of bias, contiguous; an empty tensor if it is not wanted."""
    return bias.new_empty(bias.shape) if wanted else q.new_empty((0,))


def _fused_backward(dout, q, k, v, out, lse, scale, window_left, window_right) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv by PyTorch's own fused kernels, which need memory linear in the sequence lengths."""
    seqlen_q, seqlen_k = q.shape[2], k.shape[2]
    if window_left is not None and window_left >= seqlen_q - 1:
        window_left = None
    if window_right is not None and window_right >= seqlen_k - 1:
        window_right = None
    # cuDNN where its mask (causal from the top left) is the one, else FlashAttention-2 (windows from the bottom right).
    # Causal, 16 heads of 128, 8192 positions, on an H200: 484 TFLOP/s against 290.
    is_cudnns = window_left is None and (window_right is None or (window_right == 0 and seqlen_q == seqlen_k))
    head_dims = q.shape[3], v.shape[3]
    if is_cudnns and seqlen_k > 1 and (head_dims[0] == head_dims[1] or head_dims == (192, 128)):
        grads = _cudnn_backward(dout, q, k, v, out, lse, scale, window_right is not None)
        pairs = zip(grads, _grads(q, k, v))
        return tuple(grad if grad.stride() == empty.stride() else empty.copy_(grad) for grad, empty in pairs)
    dq, dk, dv = (grad.zero_() for grad in _grads(q, k, v))
    for rows, keys, left, right in _visible_blocks(seqlen_q, seqlen_k, window_left, window_right):
        per_query = (x[:, :, rows] for x in (dout, q, out))
        gq, gk, gv = _flash_backward(*per_query, k[:, :, keys], v[:, :, keys], lse[:, :, rows], scale, left, right)
        dq[:, :, rows] = gq
        dk[:, :, keys] += gk
        dv[:, :, keys] += gv
    return dq, dk, dv


def _visible_blocks(
    seqlen_q: int, seqlen_k: int, window_left: int | None, window_right: int | None
) -> Iterator[tuple[slice, slice, int | None, int | None]]:
    """The rows that see any key, in at most three blocks, each with the keys that it sees and its own window.

    These windows are FlashAttention-2's: counted from the bottom right corner, neither side negative, and the right
    side 0 or unbounded. (It takes one of seqlen_k or more for unbounded, and an unbounded one beside a bounded one for
    seqlen_k, which are wrong for more queries than keys.)
    """
    left = seqlen_q if window_left is None else window_left
    right = seqlen_k if window_right is None else window_right
    start, stop = max(0, -right), min(seqlen_q, seqlen_k + left)
    if left + right < 0 or start >= stop:
        return
    edge = min(max(seqlen_k - right, start), stop)  # from here on rows see the last key
    middle = min(max(left + 1, edge), stop)  # until here rows see the first key
    for first, last in ((start, edge), (edge, middle), (middle, stop)):
        if first < last:
            keys = slice(max(0, first - left), min(seqlen_k, last + right))
            from_corner = None if last - 1 <= left else left + keys.stop - last
            yield slice(first, last), keys, from_corner, 0 if last <= edge else None


def _cudnn_backward(dout, q, k, v, out, lse, scale, causal) -> tuple[Tensor, Tensor, Tensor]:
    dout, q, out, k, v = _addressable(dout, q, out, k, v)
    if dout.stride() != out.stride():  # cuDNN reads both by the strides of one
        dout = torch.empty_like(out).copy_(dout)
    no_dropout = q.new_empty(0, dtype=torch.int64), q.new_empty(0, dtype=torch.int64)
    return torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        dout, q, k, v, out, lse.contiguous().unsqueeze(-1), *no_dropout, None, None, None, q.shape[2], k.shape[2], 0.0,
        causal, scale=scale,
    )  # fmt: skip


def _flash_backward(dout, q, out, k, v, lse, scale, left, right) -> tuple[Tensor, Tensor, Tensor]:
    head_dim, head_dim_v = q.shape[3], v.shape[3]
    wide = max(head_dim, head_dim_v)
    padded = (
        x if x.shape[3] == wide else torch.nn.functional.pad(x, (0, wide - x.shape[3])) for x in (dout, q, out, k, v)
    )
    dout, q, out, k, v = (x.transpose(1, 2) for x in _addressable(*padded))
    state = q.new_empty(2, dtype=torch.int64), q.new_empty(0, dtype=torch.int64)  # of dropout
    dq, dk, dv = torch.ops.aten._flash_attention_backward(
        dout, q, k, v, out, lse.contiguous(), None, None, q.shape[1], k.shape[1], 0.0, False, *state, scale=scale,
        window_size_left=left, window_size_right=right,
    )  # fmt: skip
    dq, dk, dv = (x.transpose(1, 2) for x in (dq, dk, dv))
    return dq[..., :head_dim], dk[..., :head_dim], dv[..., :head_dim_v]


def _addressable(*tensors: Tensor) -> list[Tensor]:
    from fa3_inductor.kernels.forward import addressable

    return [addressable(x) for x in tensors]  # PyTorch's libraries are as particular as TMA is

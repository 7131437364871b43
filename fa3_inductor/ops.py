"""The operators that the pass puts into graphs: `fa3::attention` and `fa3::attention_backward`.

Import this module to register them. They are opaque to Inductor, functional, differentiable once (in q, k, v and bias),
and have fakes for every shape, symbolic ones included. Both take `target`: "hopper" runs the Gluon kernels on CUDA
tensors, "reference" the plain PyTorch specification; CPU tensors always take the reference.
`fa3_inductor.kernels.reference` says what the other arguments mean.
"""

import torch
from torch import Tensor

from fa3_inductor.kernels import output_like
from fa3_inductor.kernels.reference import attention_backward_reference, attention_reference

_MASKING = "float scale, SymInt? window_left, SymInt? window_right, str target"
# Fixed order, not exact strides: the kernels read any strides, and only the order decides how outputs lie
# (`output_like`). So views into a packed projection come through without a copy.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)

torch.library.define(
    "fa3::attention",
    f"(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? mask, {_MASKING}) -> (Tensor, Tensor)",
    tags=_TAGS,
)
torch.library.define(
    "fa3::attention_backward",
    f"(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? mask, Tensor out, Tensor lse, {_MASKING}, "
    "bool bias_grad) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=_TAGS,
)


@torch.library.impl("fa3::attention", "default")
def _attention(q, k, v, bias, mask, scale, window_left, window_right, target):
    if target == "hopper" and q.is_cuda:
        from fa3_inductor.kernels.forward import attention_forward

        if bias is not None or mask is not None or window_left is not None:
            raise ValueError("fa3::attention: the Hopper kernel takes no bias, mask or window_left")
        return attention_forward(q, k, v, scale=scale, window_right=window_right)
    _check(q, k, v, bias, mask, target)
    out, lse = attention_reference(q, k, v, bias, mask, scale=scale, window_left=window_left, window_right=window_right)
    return output_like(q, v.shape[-1]).copy_(out), lse


@torch.library.register_fake("fa3::attention")
def _attention_fake(q, k, v, bias, mask, scale, window_left, window_right, target):
    _check(q, k, v, bias, mask, target)
    return output_like(q, v.shape[-1]), q.new_empty(q.shape[:3], dtype=_lse_dtype(q))


@torch.library.impl("fa3::attention_backward", "default")
def _backward(dout, q, k, v, bias, mask, out, lse, scale, window_left, window_right, target, bias_grad):
    _check(q, k, v, bias, mask, target)
    dbias = _dbias(q, bias, bias_grad)
    if target == "hopper" and q.is_cuda:
        if bias is not None or mask is not None or window_left is not None:
            raise ValueError("fa3::attention_backward: the Hopper path takes no bias, mask or window_left")
        return *_fused_backward(dout, q, k, v, out, lse, scale, window_right), dbias
    grads = *_grads(q, k, v), dbias
    reference = attention_backward_reference(
        dout, q, k, v, bias, mask, out, lse, scale=scale, window_left=window_left, window_right=window_right
    )
    for grad, value in zip(grads if bias_grad else grads[:3], reference):
        grad.copy_(value)
    return grads


@torch.library.register_fake("fa3::attention_backward")
def _backward_fake(dout, q, k, v, bias, mask, out, lse, scale, window_left, window_right, target, bias_grad):
    _check(q, k, v, bias, mask, target)
    return *_grads(q, k, v), _dbias(q, bias, bias_grad)


def _setup_context(ctx, inputs, output):
    q, k, v, bias, mask, ctx.scale, ctx.window_left, ctx.window_right, ctx.target = inputs
    out, lse = output
    ctx.bias_grad = bias is not None and ctx.needs_input_grad[3]
    ctx.save_for_backward(q, k, v, bias, mask, out, lse)
    ctx.mark_non_differentiable(lse)


def _attention_vjp(ctx, dout, _dlse):
    q, k, v, bias, mask, out, lse = ctx.saved_tensors
    dq, dk, dv, dbias = torch.ops.fa3.attention_backward(
        dout, q, k, v, bias, mask, out, lse, ctx.scale, ctx.window_left, ctx.window_right, ctx.target, ctx.bias_grad
    )
    return dq, dk, dv, dbias if ctx.bias_grad else None, None, None, None, None, None


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


def _fused_backward(dout, q, k, v, out, lse, scale, window_right) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv by PyTorch's own fused kernels, which need memory linear in the sequence lengths."""
    parts = _causal_parts(q.shape[2], k.shape[2], window_right)
    if len(parts) == 1 and parts[0][:3] == (0, q.shape[2], k.shape[2]):
        grads = _aten_backward(dout, q, out, lse, k, v, scale, causal=parts[0][3])
        pairs = zip(grads, _grads(q, k, v))
        return tuple(grad if grad.stride() == empty.stride() else empty.copy_(grad) for grad, empty in pairs)
    dq, dk, dv = (grad.zero_() for grad in _grads(q, k, v))
    for start, stop, keys, causal in parts:
        rows = slice(start, stop)
        per_query = (x[:, :, rows] for x in (dout, q, out, lse))
        gq, gk, gv = _aten_backward(*per_query, k[:, :, :keys], v[:, :, :keys], scale, causal)
        dq[:, :, rows] = gq
        dk[:, :, :keys] += gk
        dv[:, :, :keys] += gv
    return dq, dk, dv


def _causal_parts(seqlen_q: int, seqlen_k: int, window_right: int | None) -> list[tuple[int, int, int, bool]]:
    """The rows that see any key as at most two blocks (first row, last row + 1, keys from the first, causal).

    A causal block is aligned to its bottom right corner, the other one sees all of its keys. Whatever the shift, the
    rows are some that see nothing, then a causal block, then a full one.
    """
    if window_right is None or window_right >= seqlen_k - 1:
        return [(0, seqlen_q, seqlen_k, False)]
    first = min(max(-window_right, 0), seqlen_q)
    last = min(max(seqlen_k - window_right, first), seqlen_q)
    causal = [(first, last, last + window_right, True)] if first < last else []
    return causal + ([(last, seqlen_q, seqlen_k, False)] if last < seqlen_q else [])


def _aten_backward(dout, q, out, lse, k, v, scale, causal) -> tuple[Tensor, Tensor, Tensor]:
    """cuDNN where its causal mask (from the top left) is right; else FlashAttention-2 (from the bottom right).

    Causal, 16 heads of 128, 8192 positions, on an H200: 484 TFLOP/s against 290.
    """
    from fa3_inductor.kernels.forward import addressable

    dout, q, out, k, v = (addressable(x) for x in (dout, q, out, k, v))  # their libraries are as particular as TMA is
    if dout.stride() != out.stride():  # cuDNN reads both by the strides of one
        dout = torch.empty_like(out).copy_(dout)
    seqlen_q, seqlen_k = q.shape[2], k.shape[2]
    no_dropout = q.new_empty(0, dtype=torch.int64), q.new_empty(0, dtype=torch.int64)
    if not causal or seqlen_q == seqlen_k:
        return torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            dout, q, k, v, out, lse.contiguous().unsqueeze(-1), *no_dropout, None, None, None, seqlen_q, seqlen_k, 0.0,
            causal, scale=scale,
        )  # fmt: skip
    return torch.ops.aten._scaled_dot_product_flash_attention_backward(
        dout, q, k, v, out, lse.contiguous(), None, None, seqlen_q, seqlen_k, 0.0, causal, *no_dropout, scale=scale
    )

"""The operators that the pass puts into graphs: `fa3::attention`, `fa3::attention_backward`, and, for inference,
`fa3::attention_fp8` of float8_e4m3fn tensors. `fa3::attention_quantised` rounds 16-bit ones to it; its gradients are
those of attention of the rounded values, which `fa3::round_trip` gives, in 16 bits.

Import this module to register them. They are opaque to Inductor, functional, differentiable once (out and lse in q, k,
v, bias and sinks; of FP8 tensors not at all), and have fakes for every shape, symbolic ones included. Of `target`,
"hopper" runs the Gluon kernels on CUDA tensors, "reference" the plain PyTorch specification; CPU tensors always take
the reference. With a `seed`, int64 [1], weights are dropped with probability `dropout_p`, by the rule of
`fa3_inductor.kernels.dropout`; with `deterministic`, gradients are summed up in one order. With `out_scale`, one
float32, the result comes multiplied by it and in float8_e4m3fn, what is larger as 448, and has no gradient.
`fa3_inductor.kernels.reference` says what the other arguments mean; `bias_formula`, `mask_formula`, `score_formula` and
the tables `t0` to `t3` are `fa3_inductor.kernels.formulas.Formulas`.
"""

import torch
from torch import Tensor

from fa3_inductor.kernels import output_like
from fa3_inductor.kernels.formulas import NO_FORMULAS, Formulas, has_bias_inside
from fa3_inductor.kernels.formulas import check as check_formulas
from fa3_inductor.kernels.reference import (
    attention_backward_reference,
    attention_fp8_reference,
    attention_quantised_reference,
    attention_reference,
    round_trip_reference,
)

_MASKING = "float scale, SymInt? window_left, SymInt? window_right, str target"
_SOFTCAP = "float? softcap=None"
_DETERMINISTIC = "bool deterministic=False"
_OUT_SCALE = "Tensor? out_scale=None"
MAX_TABLES = 4  # of the formulas of one attention
_TABLES = ", ".join(f"Tensor? t{n}=None" for n in range(MAX_TABLES))
_FORMULAS = f'str bias_formula="", str mask_formula="", str score_formula="", {_TABLES}'
# Fixed order, not exact strides: the kernels read any strides, and only the order decides how outputs lie
# (`output_like`). So views into a packed projection come through without a copy.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)

torch.library.define(
    "fa3::attention",
    f"(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? mask, {_MASKING}, {_SOFTCAP}, "
    f"Tensor? sinks=None, Tensor? seed=None, float dropout_p=0.0, {_DETERMINISTIC}, {_OUT_SCALE}, "
    f"{_FORMULAS}) -> (Tensor, Tensor)",
    tags=_TAGS,
)
torch.library.define(
    "fa3::attention_backward",
    f"(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? mask, Tensor out, Tensor lse, {_MASKING}, "
    f"bool bias_grad, {_SOFTCAP}, Tensor? seed=None, float dropout_p=0.0, "
    f"{_DETERMINISTIC}, Tensor? dlse=None, {_FORMULAS}) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
torch.library.define(
    "fa3::attention_fp8",
    "(Tensor q, Tensor k, Tensor v, Tensor q_scale, Tensor k_scale, Tensor v_scale, Tensor? bias, Tensor? mask, "
    f"{_MASKING}, ScalarType out_dtype, {_SOFTCAP}, Tensor? sinks=None, {_OUT_SCALE}, {_FORMULAS}) -> (Tensor, Tensor)",
    tags=_TAGS,
)
torch.library.define(
    "fa3::attention_quantised",
    f"(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? mask, {_MASKING}, int? incoherent_seed, {_SOFTCAP}, "
    f"Tensor? sinks=None, {_DETERMINISTIC}, {_OUT_SCALE}, {_FORMULAS}) -> (Tensor, Tensor)",
    tags=_TAGS,
)
torch.library.define(
    "fa3::round_trip",
    "(Tensor q, Tensor k, Tensor v, int keys, int? incoherent_seed, str target) -> (Tensor, Tensor, Tensor)",
    tags=_TAGS,
)


@torch.library.impl("fa3::attention", "default")
def _attention(
    q, k, v, bias, mask, scale, window_left, window_right, target, softcap=None, sinks=None, seed=None, dropout_p=0.0,
    deterministic=False, out_scale=None, *formulas,
):  # fmt: skip
    if target == "hopper" and q.is_cuda:
        from fa3_inductor.kernels.forward import attention_forward

        return attention_forward(
            q, k, v, bias, mask, scale=scale, window_left=window_left, window_right=window_right, softcap=softcap,
            sinks=None if sinks is None else sinks.contiguous(), seed=seed, dropout_p=dropout_p,
            formulas=_formulas(*formulas), out_scale=out_scale,
        )  # fmt: skip
    _check(q, k, v, bias, mask, target)
    out, lse = attention_reference(
        q, k, v, bias, mask, scale=scale, window_left=window_left, window_right=window_right, softcap=softcap,
        sinks=sinks, formulas=_checked(q, k, bias, formulas), **_dropout(q, k, seed, dropout_p),
    )  # fmt: skip
    return _result(q, v, out, q.dtype, out_scale), lse


@torch.library.register_fake("fa3::attention")
def _attention_fake(
    q, k, v, bias, mask, scale, window_left, window_right, target, softcap=None, sinks=None, seed=None, dropout_p=0.0,
    deterministic=False, out_scale=None, *formulas,
):  # fmt: skip
    _check(q, k, v, bias, mask, target)
    if seed is not None and (seed.dtype, seed.shape) != (torch.int64, (1,)):
        raise ValueError(f"fa3::attention: the seed of dropout is an int64 [1], not {seed.dtype} {list(seed.shape)}")
    if sinks is not None and sinks.shape != q.shape[1:2]:
        raise ValueError(f"fa3::attention: sinks are [{q.shape[1]}], one for each query head, not {list(sinks.shape)}")
    return _empty_result(q, v, q.dtype, out_scale), q.new_empty(q.shape[:3], dtype=_lse_dtype(q))


@torch.library.impl("fa3::attention_backward", "default")
def _backward(
    dout, q, k, v, bias, mask, out, lse, scale, window_left, window_right, target, bias_grad, softcap=None, seed=None,
    dropout_p=0.0, deterministic=False, dlse=None, *formulas,
):  # fmt: skip
    _check(q, k, v, bias, mask, target)
    if target == "hopper" and q.is_cuda:
        from fa3_inductor.kernels.backward import attention_backward

        grads = attention_backward(
            dout, q, k, v, bias, mask, out, lse, scale=scale, window_left=window_left, window_right=window_right,
            softcap=softcap, bias_grad=bias_grad, seed=seed, dropout_p=dropout_p,
            formulas=_formulas(*formulas), deterministic=deterministic, dlse=dlse,
        )  # fmt: skip
        return grads if bias_grad else (*grads[:3], q.new_empty((0,)))
    grads = *_grads(q, k, v), _dbias(q, bias, bias_grad)
    reference = attention_backward_reference(
        dout, q, k, v, bias, mask, out, lse, scale=scale, window_left=window_left, window_right=window_right,
        softcap=softcap, formulas=_checked(q, k, bias, formulas), dlse=dlse, **_dropout(q, k, seed, dropout_p),
    )  # fmt: skip
    for grad, value in zip(grads if bias_grad else grads[:3], reference):
        grad.copy_(value)
    return grads


@torch.library.register_fake("fa3::attention_backward")
def _backward_fake(
    dout, q, k, v, bias, mask, out, lse, scale, window_left, window_right, target, bias_grad, softcap=None, seed=None,
    dropout_p=0.0, deterministic=False, dlse=None, *formulas,
):  # fmt: skip
    _check(q, k, v, bias, mask, target)
    return *_grads(q, k, v), _dbias(q, bias, bias_grad)


@torch.library.impl("fa3::attention_fp8", "default")
def _attention_fp8(
    q, k, v, q_scale, k_scale, v_scale, bias, mask, scale, window_left, window_right, target, out_dtype, softcap=None,
    sinks=None, out_scale=None, *formulas,
):  # fmt: skip
    options = dict(
        scale=scale, window_left=window_left, window_right=window_right, softcap=softcap, out_dtype=out_dtype,
        sinks=None if sinks is None else sinks.contiguous(), formulas=_formulas(*formulas),
    )  # fmt: skip
    if target == "hopper" and q.is_cuda:
        from fa3_inductor.kernels.fp8 import attention_fp8

        return attention_fp8(q, k, v, q_scale, k_scale, v_scale, bias, mask, out_scale=out_scale, **options)
    _check(q, k, v, bias, mask, target)
    out, lse = attention_fp8_reference(q, k, v, q_scale, k_scale, v_scale, bias, mask, **options)
    return _result(q, v, out, out_dtype, out_scale), lse


@torch.library.register_fake("fa3::attention_fp8")
def _attention_fp8_fake(
    q, k, v, q_scale, k_scale, v_scale, bias, mask, scale, window_left, window_right, target, out_dtype, softcap=None,
    sinks=None, out_scale=None, *formulas,
):  # fmt: skip
    _check(q, k, v, bias, mask, target)
    if q.dtype != torch.float8_e4m3fn:
        raise ValueError(f"fa3::attention_fp8: q, k and v are float8_e4m3fn, not {q.dtype}")
    for x in (q_scale, k_scale, v_scale):
        if x.dtype != torch.float32 or x.ndim not in (2, 3):
            raise ValueError(
                f"fa3::attention_fp8: scales are float32, of 2 or 3 dimensions, not {x.dtype}, of {x.ndim}"
            )
    return _empty_result(q, v, out_dtype, out_scale), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.impl("fa3::attention_quantised", "default")
def _attention_quantised(
    q, k, v, bias, mask, scale, window_left, window_right, target, incoherent_seed, softcap=None, sinks=None,
    deterministic=False, out_scale=None, *formulas,
):  # fmt: skip
    from fa3_inductor.kernels import fp8

    options = dict(
        scale=scale, window_left=window_left, window_right=window_right, softcap=softcap,
        sinks=None if sinks is None else sinks.contiguous(), formulas=_formulas(*formulas),
    )  # fmt: skip
    if target == "hopper" and q.is_cuda:
        return fp8.attention_quantised(q, k, v, bias, mask, seed=incoherent_seed, out_scale=out_scale, **options)
    _check(q, k, v, bias, mask, target)
    out, lse = attention_quantised_reference(
        q, k, v, bias, mask, **options,
        **fp8.blocks(q, v, incoherent_seed, fp8.has_terms(bias, mask, softcap, options["formulas"])),
    )  # fmt: skip
    return _result(q, v, out, q.dtype, out_scale), lse


@torch.library.register_fake("fa3::attention_quantised")
def _attention_quantised_fake(
    q, k, v, bias, mask, scale, window_left, window_right, target, incoherent_seed, softcap=None, sinks=None,
    deterministic=False, out_scale=None, *formulas,
):  # fmt: skip
    _check(q, k, v, bias, mask, target)
    return _empty_result(q, v, q.dtype, out_scale), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.impl("fa3::round_trip", "default")
def _round_trip(q, k, v, keys, incoherent_seed, target):
    from fa3_inductor.kernels import fp8

    rows = ((q, fp8.ROWS, incoherent_seed), (k, keys, incoherent_seed), (v, keys, None))
    if target == "hopper" and q.is_cuda:
        return tuple(fp8.round_trip(x, n, seed) for x, n, seed in rows)
    matrix = None if incoherent_seed is None else fp8.matrix_of(q, incoherent_seed)
    rounded = (round_trip_reference(x, n, None if seed is None else matrix) for x, n, seed in rows)
    return tuple(output_like(x, x.shape[-1]).copy_(y) for x, y in zip((q, k, v), rounded))


@torch.library.register_fake("fa3::round_trip")
def _round_trip_fake(q, k, v, keys, incoherent_seed, target):
    return _grads(q, k, v)


def _no_gradient_of_fp8(ctx, *grads):
    raise NotImplementedError("attention of FP8 tensors has no gradient: set fa3_inductor.config.fp8 = 'off' to train")


def _setup_context(ctx, inputs, output):
    q, k, v, bias, mask, ctx.scale, ctx.window_left, ctx.window_right, ctx.target, ctx.softcap, sinks, *others = inputs
    seed, ctx.dropout_p, ctx.deterministic, out_scale, *formulas = others
    ctx.sinks_grad = sinks is not None and ctx.needs_input_grad[10]
    _save(ctx, q, k, v, bias, mask, output, sinks, seed, out_scale, formulas)


def _setup_context_quantised(ctx, inputs, output):
    q, k, v, bias, mask, ctx.scale, ctx.window_left, ctx.window_right, ctx.target, ctx.incoherent_seed, *others = inputs
    ctx.softcap, sinks, ctx.deterministic, out_scale, *formulas = others
    ctx.sinks_grad = sinks is not None and ctx.needs_input_grad[11]
    ctx.dropout_p = 0.0
    _save(ctx, q, k, v, bias, mask, output, sinks, None, out_scale, formulas)


def _save(ctx, q, k, v, bias, mask, output, sinks, seed, out_scale, formulas):
    if out_scale is not None:
        raise NotImplementedError("fa3::attention: a result in float8_e4m3fn has no gradient")
    ctx.formulas, tables = formulas[:3], formulas[3:]
    if any(table is not None and table.requires_grad for table in tables):
        raise NotImplementedError("fa3::attention: the tables of formulas have no gradient")
    out, lse = output
    ctx.bias_grad = bias is not None and ctx.needs_input_grad[3]
    if ctx.bias_grad and has_bias_inside(_formulas(*formulas)):
        raise NotImplementedError("fa3::attention: a bias inside the formula of the score has no gradient")
    ctx.save_for_backward(q, k, v, bias, mask, out, lse, sinks, seed, *tables)
    ctx.set_materialize_grads(False)


def _attention_vjp(ctx, dout, dlse):
    dq, dk, dv, dbias, dsinks = _vjp(ctx, dout, dlse, *ctx.saved_tensors)
    return dq, dk, dv, dbias, *[None] * 6, dsinks, *[None] * (7 + MAX_TABLES)


def _quantised_vjp(ctx, dout, dlse):
    from fa3_inductor.kernels import fp8

    q, k, v, bias, mask, *others = ctx.saved_tensors
    formulas = _formulas(*ctx.formulas, *others[4:])
    keys = fp8.tile_for(q.shape[3], v.shape[3], fp8.has_terms(bias, mask, ctx.softcap, formulas)).block_n
    rounded = torch.ops.fa3.round_trip(q, k, v, keys, ctx.incoherent_seed, ctx.target)
    dq, dk, dv, dbias, dsinks = _vjp(ctx, dout, dlse, *rounded, bias, mask, *others)
    return dq, dk, dv, dbias, *[None] * 7, dsinks, *[None] * (5 + MAX_TABLES)


def _vjp(ctx, dout, dlse, q, k, v, bias, mask, out, lse, sinks, seed, *tables):
    """Gradients of out and lse in q, k, v, bias and sinks."""
    dout = torch.zeros_like(out) if dout is None else dout
    dq, dk, dv, dbias = torch.ops.fa3.attention_backward(
        dout, q, k, v, bias, mask, out, lse, ctx.scale, ctx.window_left, ctx.window_right, ctx.target, ctx.bias_grad,
        ctx.softcap, seed, ctx.dropout_p, ctx.deterministic, dlse, *ctx.formulas, *tables,
    )  # fmt: skip
    dsinks = None
    if ctx.sinks_grad:  # a sink's weight times what it adds to the output, nothing, less what the row adds up to
        weights = torch.exp(sinks.to(lse.dtype).view(1, -1, 1) - lse)
        delta = (dout.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
        delta = delta if dlse is None else delta - dlse
        dsinks = -(weights * delta).sum((0, 2)).to(sinks.dtype)
    return dq, dk, dv, dbias if ctx.bias_grad else None, dsinks


def _no_double_backward(ctx, *grads):
    raise NotImplementedError("fa3::attention is differentiable once: double backward is not supported")


torch.library.register_autograd("fa3::attention", _attention_vjp, setup_context=_setup_context)
for _name in ("fa3::attention_backward", "fa3::round_trip"):
    torch.library.register_autograd(_name, _no_double_backward)
torch.library.register_autograd("fa3::attention_quantised", _quantised_vjp, setup_context=_setup_context_quantised)
torch.library.register_autograd("fa3::attention_fp8", _no_gradient_of_fp8)


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


def _empty_result(q: Tensor, v: Tensor, dtype: torch.dtype, out_scale: Tensor | None) -> Tensor:
    if out_scale is None:
        return output_like(q, v.shape[-1], dtype)
    if out_scale.dtype != torch.float32 or out_scale.numel() != 1:
        raise ValueError(f"fa3::attention: out_scale is one float32, not {out_scale.dtype} {list(out_scale.shape)}")
    return output_like(q, v.shape[-1], torch.float8_e4m3fn)


def _result(q: Tensor, v: Tensor, out: Tensor, dtype: torch.dtype, out_scale: Tensor | None) -> Tensor:
    """What the operator returns of the reference's result: that, or, times out_scale, in float8_e4m3fn."""
    result = _empty_result(q, v, dtype, out_scale)
    if out_scale is None:
        return result.copy_(out)
    return result.copy_((out.float() * out_scale).clamp(-448.0, 448.0))


def _formulas(bias: str = "", mask: str = "", score: str = "", *tables: Tensor | None) -> Formulas:
    """Those of an operator's last arguments."""
    if not (bias or mask or score):
        return NO_FORMULAS
    return Formulas(bias, mask, tuple(x for x in tables if x is not None), score)


def _checked(q: Tensor, k: Tensor, bias: Tensor | None, formulas: tuple) -> Formulas:
    checked = _formulas(*formulas)
    check_formulas(checked, (*q.shape[:3], k.shape[2]), bias)
    return checked


def _dropout(q: Tensor, k: Tensor, seed: Tensor | None, dropout_p: float) -> dict:
    """What the reference is told of dropout."""
    if seed is None:
        return {}
    from fa3_inductor.kernels.dropout import keep_scale, kept_weights

    return dict(kept=kept_weights(seed, dropout_p, (*q.shape[:3], k.shape[2])), keep_scale=keep_scale(dropout_p))


def _lse_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _grads(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """Uninitialised dq, dk, dv, lying in memory as `output_like` says for q, k and v."""
    return tuple(output_like(x, x.shape[-1]) for x in (q, k, v))


def _dbias(q: Tensor, bias: Tensor | None, wanted: bool) -> Tensor:
    """Uninitialised gradient of bias, contiguous; an empty tensor if it is not wanted."""
    return bias.new_empty(bias.shape) if wanted else q.new_empty((0,))

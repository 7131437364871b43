"""What attention means in this package, in plain PyTorch: any device, any floating dtype, quadratic memory.

Key j is visible to query i iff `i - window_left <= j <= i + window_right`, with both indices counted from the top-left
corner (None: unbounded on that side), and `mask` is True there. A query that sees no key gets out = 0, lse = -inf (or
its head's sink) and no gradient. NaN, and scores of +inf, make their row NaN, as they do in an eager softmax.

Arithmetic is float32, or float64 for float64 inputs; results are rounded once.
"""

import torch
from torch import Tensor

from fa3_inductor.kernels.formulas import NO_FORMULAS, Formulas, derivative, evaluate, has_bias_inside


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    scale: float,
    window_left: int | None = None,
    window_right: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    kept: Tensor | None = None,
    keep_scale: float = 1.0,
    rounded: Tensor | None = None,
    formulas: Formulas = NO_FORMULAS,
) -> tuple[Tensor, Tensor]:
    """softmax(cap(scale * q @ k^T) + bias) @ v over the visible keys, with cap(x) = softcap * tanh(x / softcap).

    Args:
        q: [B, Hq, Sq, D].
        k: [B, Hkv, Sk, D], Hkv dividing Hq; query head h reads key/value head h // (Hq // Hkv).
        v: [B, Hkv, Sk, Dv].
        bias: floating point, broadcastable to [B, Hq, Sq, Sk], added to the scaled scores.
        mask: bool, broadcastable to [B, Hq, Sq, Sk], True where a query may attend.
        softcap: None for none (Gemma Team, 2024, arXiv:2408.00118, section 2).
        sinks: [Hq], one more score in every row of a head, which has no value.
        kept: bool [B, Hq, Sq, Sk], for dropout: the weights that are kept, which are multiplied by keep_scale.
        rounded: [B, Hkv, Sk], for FP8: v is weighted with what float8_e4m3fn makes of 2^8 times this times the weights.

        formulas: a bias and a mask that are computed, beside those that are tensors, and what becomes of the scaled
            scores, in place of a soft cap.

    Returns:
        out [B, Hq, Sq, Dv] of q's dtype, and lse [B, Hq, Sq], the natural log of the sum of exp of each row's scores,
        its sink among them, of the dtype that was computed in.
    """
    scores = _scores(q, k, bias, mask, scale, window_left, window_right, softcap, formulas)
    if sinks is not None:
        column = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], dim=-1)
        v = torch.nn.functional.pad(v, (0, 0, 0, 1))
    peak = scores.amax(dim=-1, keepdim=True)
    peak = peak.masked_fill(peak == float("-inf"), 0.0)  # a row with no key: exp(-inf - 0) = 0, not NaN
    weights = torch.exp(scores - peak)
    total = weights.sum(dim=-1, keepdim=True)
    if kept is not None:
        whole = torch.nn.functional.pad(kept, (0, weights.shape[-1] - kept.shape[-1]))
        weights = weights * whole * keep_scale
    if rounded is not None:
        factor = torch.nn.functional.pad(rounded, (0, weights.shape[-1] - rounded.shape[-1]))
        weights = weights * factor.repeat_interleave(q.shape[1] // factor.shape[1], 1).unsqueeze(2)
        weights = (weights * 2**8).to(torch.float8_e4m3fn).to(weights.dtype) / 2**8
    out = weights @ _per_query_head(v, q).to(scores.dtype) / total.masked_fill(total == 0, 1.0)
    return out.to(q.dtype), (peak + total.log()).squeeze(-1)


def attention_backward_reference(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    *,
    scale: float,
    window_left: int | None = None,
    window_right: int | None = None,
    softcap: float | None = None,
    kept: Tensor | None = None,
    keep_scale: float = 1.0,
    formulas: Formulas = NO_FORMULAS,
    dlse: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of `attention_reference`'s `out` and `lse` (without sinks), recomputing the weights from `lse`.

    Args:
        dout, out: [B, Hq, Sq, Dv]; lse and dlse, if lse has a gradient: [B, Hq, Sq]; the rest as in
            `attention_reference`.

    Returns:
        dq, dk, dv in the shapes and dtypes of q, k, v, and dbias in bias's (None without a bias): summed over the
        dimensions that bias was broadcast along.
    """
    scores = _scores(q, k, bias, mask, scale, window_left, window_right, softcap, formulas)
    weights = torch.exp(scores - lse.to(scores.dtype).unsqueeze(-1)).masked_fill(scores == float("-inf"), 0.0)
    grad = dout.to(scores.dtype)
    delta = (grad * out.to(scores.dtype)).sum(dim=-1, keepdim=True)
    if dlse is not None:
        delta = delta - dlse.masked_fill(lse == float("-inf"), 0.0).to(scores.dtype).unsqueeze(-1)
    dweights = grad @ _per_query_head(v, q).to(scores.dtype).mT
    if kept is not None:
        dweights = dweights * kept * keep_scale
    dscores = weights * (dweights - delta)
    if kept is not None:
        weights = weights * kept * keep_scale
    dbias = None if bias is None else dscores.sum_to_size(bias.shape).to(bias.dtype)
    if softcap is not None or formulas.score:
        products = q.to(scores.dtype) @ _per_query_head(k, q).to(scores.dtype).mT * scale
    if softcap is not None:
        dscores = dscores * (1 - torch.tanh(products / softcap).square())
    if formulas.score:
        text = derivative(formulas.score)
        slope = evaluate(text, formulas.tables, scores.shape, scores.dtype, q.device, products, bias)
        dscores = dscores * slope.masked_fill(~slope.isfinite(), 0.0)
    dq = dscores @ _per_query_head(k, q).to(scores.dtype) * scale
    dk = _per_kv_head(dscores.mT @ q.to(scores.dtype), k) * scale
    dv = _per_kv_head(weights.mT @ grad, v)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dbias


def attention_fp8_reference(
    q: Tensor, k: Tensor, v: Tensor, q_scale: Tensor, k_scale: Tensor, v_scale: Tensor, bias: Tensor | None = None,
    mask: Tensor | None = None, *, out_dtype: torch.dtype = torch.bfloat16, keys: int = 128, **options,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`attention_reference` of q * q_scale, k * k_scale and v * v_scale, with rounded weights.

    Where v_scale differs from key to key, weights are multiplied by its share of the largest in their tile of keys, and
    rounded then.

    Args:
        q, k, v: float8_e4m3fn, as there.
        q_scale: broadcastable to [B, Hq] or [B, Hq, Sq]; k_scale, v_scale: to [B, Hkv] or [B, Hkv, Sk].
    """
    by_row = (s if s.ndim == 3 else s[..., None] for s in (q_scale, k_scale, v_scale))
    q_scale, k_scale, v_scale = (s.expand(x.shape[:3]) for x, s in zip((q, k, v), by_row))
    largest = by_tile(v_scale, keys).repeat_interleave(keys, 2)[:, :, : v.shape[2]]
    factor = v_scale / largest
    q, k, v = (x.float() * s[..., None] for x, s in ((q, q_scale), (k, k_scale), (v, largest)))
    out, lse = attention_reference(q, k, v, bias, mask, rounded=factor, **options)
    return out.to(out_dtype), lse


def by_tile(scale: Tensor, keys: int) -> Tensor:
    """The largest magnitude, 1 in place of 0, in each tile of keys of scale: [B, H, Sk]."""
    padded = torch.nn.functional.pad(scale.abs(), (0, -scale.shape[2] % keys))
    largest = padded.unflatten(2, (-1, keys)).amax(3)
    return largest.masked_fill(largest == 0, 1.0)


def attention_quantised_reference(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, mask: Tensor | None = None, *, rows: int, keys: int,
    matrix: Tensor | None = None, **options,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`attention_reference` of q, k and v rounded to float8_e4m3fn, with rounded weights.

    Args:
        rows, keys: how many rows of q, and of k and v, share a scale.
        matrix: [size, size], size D at least, a multiple of an orthogonal one: q and k are multiplied by it.
    """
    dtype, more = q.dtype, 1.0
    if matrix is not None:
        q, k = (torch.nn.functional.pad(x.float(), (0, len(matrix) - x.shape[3])) @ matrix for x in (q, k))
        more = (matrix[0] @ matrix[0]).item()
    q, k, v = (_dequantised(*rounded_to_e4m3(x, n), n) for x, n in ((q, rows), (k, keys), (v, keys)))
    options["scale"] /= more
    out, lse = attention_reference(q, k, v, bias, mask, rounded=torch.ones_like(v[..., 0]), **options)
    return out.to(dtype), lse


def round_trip_reference(x: Tensor, rows: int, matrix: Tensor | None = None) -> Tensor:
    """What `attention_quantised_reference` leaves of q, k or v, x: turned back by the matrix, and in x's dtype."""
    y = x.float() if matrix is None else torch.nn.functional.pad(x.float(), (0, len(matrix) - x.shape[3])) @ matrix
    y = _dequantised(*rounded_to_e4m3(y, rows), rows)
    if matrix is not None:
        y = (y @ matrix.mT / (matrix[0] @ matrix[0]))[..., : x.shape[3]]
    return y.to(x.dtype)


def rounded_to_e4m3(x: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """x: [B, H, S, D] in float8_e4m3fn, and the scale of each block of `rows` rows, float32 [B, H, blocks].

    A scale is a 448th of the block's largest number, 2^-60 at least, and 1 if all are zero. Infinities become NaN.
    """
    x = x.float().masked_fill(x.isinf(), float("nan"))
    padded = torch.nn.functional.pad(x, (0, 0, 0, -x.shape[2] % rows)).unflatten(2, (-1, rows))
    largest = padded.nan_to_num(0.0).abs().amax((3, 4))
    scales = (largest / 448.0).clamp_min(2.0**-60).masked_fill(largest == 0, 1.0)
    rounded = (padded / scales[..., None, None]).to(torch.float8_e4m3fn)
    return rounded.view(torch.uint8).flatten(2, 3)[:, :, : x.shape[2]].view(torch.float8_e4m3fn), scales


def _dequantised(x: Tensor, scales: Tensor, rows: int) -> Tensor:
    """The inverse of `rounded_to_e4m3`, in float32."""
    return x.float() * scales.repeat_interleave(rows, 2)[:, :, : x.shape[2], None]


def _scores(q, k, bias, mask, scale, window_left, window_right, softcap, formulas) -> Tensor:
    """Scaled scores [B, Hq, Sq, Sk] with -inf at every key that is not visible."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    scores = q.to(dtype) @ _per_query_head(k, q).to(dtype).mT * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if formulas.score:
        scores = evaluate(formulas.score, formulas.tables, scores.shape, dtype, q.device, scores, bias)
    if bias is not None and not has_bias_inside(formulas):
        scores = scores + bias.to(dtype)
    if formulas.bias:
        scores = scores + evaluate(formulas.bias, formulas.tables, scores.shape, dtype, q.device)
    row = torch.arange(q.shape[2], device=q.device).unsqueeze(-1)
    col = torch.arange(k.shape[2], device=q.device)
    if window_left is not None:
        scores = scores.masked_fill(col < row - window_left, float("-inf"))
    if window_right is not None:
        scores = scores.masked_fill(col > row + window_right, float("-inf"))
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    if formulas.mask:
        visible = evaluate(formulas.mask, formulas.tables, scores.shape, dtype, q.device)
        scores = scores.masked_fill(~visible, float("-inf"))
    return scores


def _per_query_head(kv: Tensor, q: Tensor) -> Tensor:
    """[B, Hkv, S, D] -> [B, Hq, S, D], each head repeated for the query heads that share it."""
    return kv.repeat_interleave(q.shape[1] // kv.shape[1], dim=1)


def _per_kv_head(grad: Tensor, kv: Tensor) -> Tensor:
    """[B, Hq, S, D] -> [B, Hkv, S, D], summed over the query heads of each key/value head."""
    return grad.unflatten(1, (kv.shape[1], -1)).sum(dim=2)

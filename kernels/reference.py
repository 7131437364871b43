"""What attention means in this package, in plain PyTorch: any device, any floating dtype, quadratic memory.

Key j is visible to query i iff `i - window_left <= j <= i + window_right`, with both indices counted from the top-left
corner (None: unbounded on that side), and `mask` is True there. A query that sees no key gets out = 0, lse = -inf (or
its head's sink) and no gradient. NaN, and scores of +inf, make their row NaN, as they do in an eager softmax.

Arithmetic is float32, or float64 for float64 inputs; results are rounded once.
"""

import torch
from torch import Tensor


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

    Returns:
        out [B, Hq, Sq, Dv] of q's dtype, and lse [B, Hq, Sq], the natural log of the sum of exp of each row's scores,
        its sink among them, of the dtype that was computed in.
    """
    scores = _scores(q, k, bias, mask, scale, window_left, window_right, softcap)
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
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of `attention_reference`'s `out` (without sinks), recomputing the weights from `lse`.

    Args:
        dout, out: [B, Hq, Sq, Dv]; lse: [B, Hq, Sq]; the rest as in `attention_reference`.

    Returns:
        dq, dk, dv in the shapes and dtypes of q, k, v, and dbias in bias's (None without a bias): summed over the
        dimensions that bias was broadcast along.
    """
    scores = _scores(q, k, bias, mask, scale, window_left, window_right, softcap)
    weights = torch.exp(scores - lse.to(scores.dtype).unsqueeze(-1)).masked_fill(scores == float("-inf"), 0.0)
    grad = dout.to(scores.dtype)
    delta = (grad * out.to(scores.dtype)).sum(dim=-1, keepdim=True)
    dweights = grad @ _per_query_head(v, q).to(scores.dtype).mT
    if kept is not None:
        dweights = dweights * kept * keep_scale
    dscores = weights * (dweights - delta)
    if kept is not None:
        weights = weights * kept * keep_scale
    dbias = None if bias is None else dscores.sum_to_size(bias.shape).to(bias.dtype)
    if softcap is not None:
        products = q.to(scores.dtype) @ _per_query_head(k, q).to(scores.dtype).mT * scale
        dscores = dscores * (1 - torch.tanh(products / softcap).square())
    dq = dscores @ _per_query_head(k, q).to(scores.dtype) * scale
    dk = _per_kv_head(dscores.mT @ q.to(scores.dtype), k) * scale
    dv = _per_kv_head(weights.mT @ grad, v)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dbias


def _scores(q, k, bias, mask, scale, window_left, window_right, softcap=None) -> Tensor:
    """Scaled scores [B, Hq, Sq, Sk] with -inf at every key that is not visible."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    scores = q.to(dtype) @ _per_query_head(k, q).to(dtype).mT * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.to(dtype)
    row = torch.arange(q.shape[2], device=q.device).unsqueeze(-1)
    col = torch.arange(k.shape[2], device=q.device)
    if window_left is not None:
        scores = scores.masked_fill(col < row - window_left, float("-inf"))
    if window_right is not None:
        scores = scores.masked_fill(col > row + window_right, float("-inf"))
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores


def _per_query_head(kv: Tensor, q: Tensor) -> Tensor:
    """[B, Hkv, S, D] -> [B, Hq, S, D], each head repeated for the query heads that share it."""
    return kv.repeat_interleave(q.shape[1] // kv.shape[1], dim=1)


def _per_kv_head(grad: Tensor, kv: Tensor) -> Tensor:
    """[B, Hq, S, D] -> [B, Hkv, S, D], summed over the query heads of each key/value head."""
    return grad.unflatten(1, (kv.shape[1], -1)).sum(dim=2)

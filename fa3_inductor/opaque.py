"""Operations that hide an attention from tracing, spelled out in PyTorch so that it becomes visible.

Each entry computes what the operator computes, for the arguments that its Python callers can pass; capture runs it in
the operator's place, and only an operator whose attention was fused is replaced by its expansion.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def _transformer_encoder_layer_fwd(
    src: Tensor,
    embed_dim: int,
    num_heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    use_gelu: bool,
    norm_first: bool,
    eps: float,
    norm_weight_1: Tensor,
    norm_bias_1: Tensor,
    norm_weight_2: Tensor,
    norm_bias_2: Tensor,
    ffn_weight_1: Tensor,
    ffn_bias_1: Tensor,
    ffn_weight_2: Tensor,
    ffn_bias_2: Tensor,
    mask: Tensor | None = None,
    mask_type: int | None = None,
) -> Tensor:
    """``nn.TransformerEncoderLayer``'s inference path (torch.nn.modules.transformer). ``mask``: True hides a key.

    ``mask_type``: 0 is [seqlen, seqlen], 1 is key padding [batch, seqlen], 2 is [batch, heads, seqlen, seqlen].
    """

    def attention(x: Tensor) -> Tensor:
        batch, seqlen, _ = x.shape
        qkv = F.linear(x, qkv_weight, qkv_bias).view(batch, seqlen, 3, num_heads, embed_dim // num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        scores = (q * (embed_dim // num_heads) ** -0.5) @ k.transpose(-2, -1)
        if mask is not None:
            hidden = mask.bool()
            hidden = hidden[:, None, None, :] if mask_type == 1 else hidden
            scores = scores.masked_fill(hidden, float("-inf"))
        out = torch.softmax(scores, -1) @ v
        return F.linear(out.transpose(1, 2).reshape(batch, seqlen, embed_dim), proj_weight, proj_bias)

    def feed_forward(x: Tensor) -> Tensor:
        hidden = F.linear(x, ffn_weight_1, ffn_bias_1)
        return F.linear(F.gelu(hidden) if use_gelu else F.relu(hidden), ffn_weight_2, ffn_bias_2)

    def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), weight, bias, eps)

    if norm_first:
        x = src + attention(norm(src, norm_weight_1, norm_bias_1))
        return x + feed_forward(norm(x, norm_weight_2, norm_bias_2))
    x = norm(src + attention(src), norm_weight_1, norm_bias_1)
    return norm(x + feed_forward(x), norm_weight_2, norm_bias_2)


EXPANSIONS: dict[Callable, Callable] = {
    torch._transformer_encoder_layer_fwd: _transformer_encoder_layer_fwd,
}

"""PyTorch's own attention modules."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fa3_inductor import Reason

from .registry import Call, call, register

BATCH, SEQLEN, WIDTH, HEADS = 2, 24, 64, 4


class Called(nn.Module):
    """``module``, called in the way that ``how(module, *args)`` says."""

    def __init__(self, module: nn.Module, how: Callable) -> None:
        super().__init__()
        self.module = module
        self.how = how

    def forward(self, *args: Any) -> Any:
        return self.how(self.module, *args)


def embedded(seqlen: int = SEQLEN) -> Tensor:
    return torch.randn(BATCH, seqlen, WIDTH)


def padding() -> Tensor:
    """True at the keys that nobody may see."""
    return torch.arange(SEQLEN).expand(BATCH, -1) > 18


def causal(seqlen: int = SEQLEN) -> Tensor:
    return nn.Transformer.generate_square_subsequent_mask(seqlen)


def attention(how: Callable, *args: Tensor, **options: Any) -> Call:
    return call(Called(nn.MultiheadAttention(WIDTH, HEADS, **{"batch_first": True, **options}), how), *args)


@register("torch/attention", 1)
def plain() -> Call:
    return attention(lambda m, x: m(x, x, x, need_weights=False)[0], embedded(), dropout=0.1)


@register("torch/attention-weights-returned", 1, fused=0, reason=Reason.WEIGHTS_USED)
def weights_returned() -> Call:
    return attention(lambda m, x: m(x, x, x), embedded(), dropout=0.1)


@register("torch/attention-weights-dropped", 1)
def weights_dropped() -> Call:
    """The weights are asked for, as is the default, and thrown away: very common."""
    return attention(lambda m, x: m(x, x, x)[0], embedded(), dropout=0.1)


@register("torch/attention-causal", 1)
def causal_mask() -> Call:
    def how(m: nn.Module, x: Tensor) -> Tensor:
        return m(x, x, x, need_weights=False, attn_mask=causal(x.shape[1]).to(x), is_causal=True)[0]

    return attention(how, embedded())


@register("torch/attention-padding", 1)
def padded() -> Call:
    return attention(
        lambda m, x, hidden: m(x, x, x, need_weights=False, key_padding_mask=hidden)[0], embedded(), padding()
    )


@register("torch/attention-padding-causal-weights", 1)
def padded_causal() -> Call:
    def how(m: nn.Module, x: Tensor, hidden: Tensor) -> Tensor:
        later = torch.ones(SEQLEN, SEQLEN, dtype=torch.bool, device=x.device).triu(1)
        return m(x, x, x, key_padding_mask=hidden, attn_mask=later)[0]

    return attention(how, embedded(), padding())


@register("torch/attention-cross-sequence-first", 1)
def cross() -> Call:
    x, context = torch.randn(SEQLEN, BATCH, WIDTH), torch.randn(13, BATCH, 48)
    options = {"kdim": 48, "vdim": 48, "batch_first": False}
    return attention(lambda m, x, y: m(x, y, y, need_weights=False)[0], x, context, **options)


@register("torch/attention-bias-kv-zero", 1)
def keys_added() -> Call:
    return attention(lambda m, x: m(x, x, x, need_weights=False)[0], embedded(), add_bias_kv=True, add_zero_attn=True)


def encoder(norm_first: bool = False, **options: Any) -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 96, batch_first=True, norm_first=norm_first)
    return nn.TransformerEncoder(layer, 2, **options)


@register("torch/encoder", 2)
def plain_encoder() -> Call:
    return call(encoder(), embedded())


@register("torch/encoder-padding", 2)
def padded_encoder() -> Call:
    return call(encoder(enable_nested_tensor=False), embedded(), src_key_padding_mask=padding())


@register("torch/encoder-causal", 2)
def causal_encoder() -> Call:
    return call(encoder(norm_first=True, enable_nested_tensor=False), embedded(), mask=causal(), is_causal=True)


@register("torch/encoder-autocast", 2, tolerance=20.0)
def autocast_encoder() -> Call:
    """Its errors are those of bfloat16."""

    def how(m: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return m(x)

    return call(Called(encoder(), how), embedded())


def encoder_decoder(**masks: Any) -> Call:
    model = nn.Transformer(WIDTH, HEADS, 2, 2, 96, batch_first=True)
    return call(model, embedded(), embedded(20), tgt_mask=causal(20), **masks)


@register("torch/transformer", 6)
def transformer() -> Call:
    """Whether the mask is causal would be found out by looking at it."""
    return encoder_decoder()


@register("torch/transformer-padding", 6)
def transformer_padding() -> Call:
    """Masks of two types, of which torch warns. (Without the memory's, Dynamo alone has another result than eager code:
    torch has a fast path for the encoder, which zeroes what is padding, and compiled code does not.)"""
    of_target = torch.arange(20).expand(BATCH, -1) > 15
    masks = {"src_key_padding_mask": padding(), "memory_key_padding_mask": padding()}
    return encoder_decoder(tgt_key_padding_mask=of_target, **masks)


@register("torch/transformer-is-causal", 6)
def transformer_is_causal() -> Call:
    return encoder_decoder(tgt_is_causal=True, src_is_causal=False)

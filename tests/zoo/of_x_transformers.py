"""x-transformers."""

from typing import Any

import torch
from torch import Tensor
from x_transformers import Decoder, Encoder, TransformerWrapper, ViTransformerWrapper, XTransformer

from fa3_inductor import Reason

from .of_torch import Called
from .registry import Call, call, register

TOKENS, LENGTH = 97, 24
LAYERS = {"dim": 64, "depth": 2, "heads": 4, "attn_dim_head": 16}


def ids(length: int = LENGTH) -> Tensor:
    return torch.randint(3, TOKENS, (2, length))


def add(
    name: str,
    layers: type,
    attentions: int,
    inputs: dict[str, Any] | None = None,
    known: dict[str, Any] | None = None,
    **options: Any,
) -> None:
    """Registers a model over tokens with ``layers(**options)``, called with ``inputs`` beside the tokens.

    ``known``: further fields of :class:`Model`.
    """

    @register(f"x-transformers/{name}", attentions, **known or {})
    def build() -> Call:
        stack = layers(**LAYERS, **options)
        return call(TransformerWrapper(num_tokens=TOKENS, max_seq_len=64, attn_layers=stack), ids(), **inputs or {})


add("decoder", Decoder, 2)
add("decoder-flash", Decoder, 2, attn_flash=True)
add("decoder-t5-bias", Decoder, 2, rel_pos_bias=True)
add("decoder-dynamic-bias", Decoder, 2, dynamic_pos_bias=True, dynamic_pos_bias_log_distance=False)
add(
    "decoder-talking-heads",
    Decoder,
    2,
    known={"fused": 0, "reason": Reason.WEIGHTS_OP},
    attn_pre_talking_heads=True,
    attn_post_talking_heads=True,
)
add("decoder-memory", Decoder, 2, attn_num_mem_kv=4)
add("decoder-sigmoid", Decoder, 0, attn_sigmoid=True)  # no softmax
add("decoder-gated-values", Decoder, 2, attn_gate_values=True)
add("decoder-weights-returned", Decoder, 2, {"return_attn": True}, {"fused": 0, "reason": Reason.WEIGHTS_USED})
add("encoder-mask", Encoder, 2, {"mask": torch.arange(LENGTH).expand(2, -1) < 18})


@register("x-transformers/encoder-decoder", 6)
def encoder_decoder() -> Call:
    sizes = {"num_tokens": TOKENS, "depth": 2, "heads": 4, "max_seq_len": 64}
    sides = {f"{side}_{name}": size for side in ("enc", "dec") for name, size in sizes.items()}

    def how(m: XTransformer, source: Tensor, target: Tensor) -> Tensor:
        return m.decoder.net(target, context=m.encoder(source, return_embeddings=True))

    return call(Called(XTransformer(dim=64, **sides), how), ids(), ids(20))


@register("x-transformers/vit", 2)
def vit() -> Call:
    model = ViTransformerWrapper(image_size=32, patch_size=8, num_classes=5, attn_layers=Encoder(**LAYERS))
    return call(model, torch.randn(2, 3, 32, 32))

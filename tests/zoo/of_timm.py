"""timm's image models; where timm has a switch for it, both with its fused attention and with the one it writes out."""

from typing import Any

import timm
import torch
from torch import nn

from .registry import Call, call, register


def written_out(model: nn.Module) -> nn.Module:
    """What TIMM_FUSED_ATTN=0 does."""
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    return model


def add(
    name: str,
    architecture: str,
    attentions: int | None,
    image: int = 32,
    spellings: tuple[str, ...] = ("fused", "unfused"),
    trains: bool = True,
    fused: int | None = None,
    **options: Any,
) -> None:
    """Registers ``timm.create_model(architecture, **options)`` for each spelling, on images of ``image`` pixels.

    ``trains`` and ``fused`` are those of :class:`Model`.
    """
    for spelling in spellings:

        @register(f"timm/{name}/{spelling}", attentions, trains=trains, fused=fused)
        def build(spelling: str = spelling) -> Call:
            model = timm.create_model(architecture, num_classes=5, **options)
            pixels = torch.randn(2, 3, image, image)
            return call(written_out(model) if spelling == "unfused" else model, pixels)


ONE = ("fused",)  # no switch, or nothing that it would change
TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4}

add("vit", "vit_base_patch16_224", 2, **TINY)
add("vit-qk-norm", "vit_base_patch16_224", 2, **TINY, qk_norm=True)
add("eva-rope", "eva02_tiny_patch14_224", 2, **TINY)
# Weights of two heads are subtracted in front of the values. ("Fused", each head is an attention of its own.)
add("differential", "vit_dwee_patch16_reg1_gap_256", None, **TINY)
# Cosine attention with a learned temperature.
add("swinv2", "swinv2_tiny_window8_256", 4, spellings=ONE, image=64, img_size=64, window_size=4, embed_dim=32,
    depths=(2, 2), num_heads=(2, 4))  # fmt: skip
# Talking heads, and attention of the class token.
add("cait", "cait_xxs24_224", 4, fused=2, **TINY)
# Attention in blocks and on grids, with a bias by relative position.
add("maxvit", "maxvit_tiny_rw_224", 22, image=64, spellings=ONE, trains=False, img_size=64)
# Keys and values of a smaller image.
add("pvt-v2", "pvt_v2_b0", 8, image=64, trains=False)
add("twins-pcpvt", "twins_pcpvt_small", 16, image=64, trains=False, img_size=64)
# A bias that is gathered from a table.
add("levit", "levit_128s", 11, image=64, spellings=ONE, trains=False, img_size=64)
# The first layer's weights are a sum of two softmaxes, one of them of positions alone.
add("convit", "convit_tiny", 2, spellings=ONE, fused=1, **TINY, local_up_to_layer=1)
add(
    "tnt",
    "tnt_s_patch16_224",
    4,
    spellings=ONE,
    img_size=32,
    patch_size=8,
    embed_dim=64,
    inner_dim=16,
    depth=2,
    num_heads_inner=2,
    num_heads_outer=4,
)
add("visformer", "visformer_tiny", None, image=64, trains=False, img_size=64)
# Linear attention.
add("mobilevitv2", "mobilevitv2_050", 0, image=64, spellings=ONE, trains=False)
add("efficientformer", "efficientformer_l1", 1, image=224, spellings=ONE, trains=False)
# Pooled queries, keys and values; a bias by relative position for rows and one for columns.
add("mvitv2", "mvitv2_tiny", 10, image=64, spellings=ONE, img_size=64)
add("botnet", "botnet26t_256", None, image=64, spellings=ONE, trains=False, img_size=64)
add(
    "naflexvit",
    "naflexvit_base_patch16_gap",
    2,
    spellings=ONE,
    trains=False,
    embed_dim=64,
    depth=2,
    num_heads=4,
    patch_size=8,
)
# Convolutions only.
add("repvit", "repvit_m1", 0, image=64, spellings=ONE, trains=False)


@register("timm/volo/fused", 5, trains=False)
def volo() -> Call:
    """The softmax of its first stage (outlook attention) is of a linear layer, not of a product with keys."""
    model = timm.models.volo.VOLO(
        layers=[1, 1, 1, 1], img_size=64, embed_dims=[32, 64, 64, 64], num_heads=[2, 4, 4, 4], num_classes=5
    )
    return call(model, torch.randn(2, 3, 64, 64))

"""Denoisers and autoencoders of diffusers.

All call scaled_dot_product_attention by default. Those with diffusers' general ``Attention`` also have a processor that
writes it out ("written-out"), and one that does so in slices ("sliced").
"""

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from diffusers.models import attention_processor, embeddings
from torch import Tensor, nn

from .registry import Call, call, register

BATCH, TEXT, WIDTH = 2, 12, 32


# ------------------------------------------------------------------------------------------- what they are called with


def text(width: int = WIDTH, length: int = TEXT) -> Tensor:
    return torch.randn(BATCH, length, width)


def mask(length: int = TEXT, hidden: int = 5) -> Tensor:
    """1 at what is to be seen: all but the last ``hidden`` of the first sequence, and the last of the second."""
    keep = torch.ones(BATCH, length, dtype=torch.long)
    keep[0, length - hidden :] = 0
    keep[1, length - 1 :] = 0
    return keep


def latents(channels: int = 4, *sizes: int) -> Tensor:
    return torch.randn(BATCH, channels, *(sizes or (8, 8)))


def timesteps() -> Tensor:
    return torch.tensor([999, 37])


def noise_levels() -> Tensor:
    return torch.tensor([0.9, 0.2])


def rotary(length: int, width: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines, the same for each pair of neighbours."""
    angles = torch.arange(length).unsqueeze(1) * 100.0 ** -torch.arange(0, 1, 2 / width)
    return angles.cos().repeat_interleave(2, 1), angles.sin().repeat_interleave(2, 1)


def grid(*sizes: int) -> Tensor:
    """The coordinates of the cells of a grid, one cell a row."""
    return torch.cartesian_prod(*map(torch.arange, sizes))


# ------------------------------------------------------------------------------------------- how they are built


def written_out(model: nn.Module) -> None:
    """What ``set_default_attn_processor`` does, also where a model does not have it."""
    for module in model.modules():
        if isinstance(module, attention_processor.Attention):
            added = module.added_kv_proj_dim is not None
            kind = attention_processor.AttnAddedKVProcessor if added else attention_processor.AttnProcessor
            module.set_processor(kind())


def sliced(model: nn.Module) -> None:
    """Two heads at a time."""
    model.set_attention_slice(2)


def fused_projections(model: nn.Module) -> None:
    model.fuse_qkv_projections()


def default(model: nn.Module) -> None:
    """As it is made."""


def add(
    name: str,
    model: str,
    attentions: int,
    inputs: Callable[[], dict[str, Any]],
    spellings: tuple[Callable[[nn.Module], None], ...] = (default,),
    trains: bool = False,
    known: dict[str, Any] | None = None,
    **settings: Any,
) -> None:
    """Registers class ``model`` of diffusers, made with ``settings``, in each of the ``spellings``.

    ``inputs`` makes the arguments. ``trains`` and ``known`` are fields of :class:`Model`.
    """
    for spelling in spellings:
        suffix = "" if spelling is default else "/" + spelling.__name__.replace("_", "-")

        @register(f"diffusers/{name}{suffix}", attentions, trains=trains, **known or {})
        def build(spelling: Callable[[nn.Module], None] = spelling) -> Call:
            module = getattr(diffusers, model)(**settings)
            spelling(module)
            return call(module, **inputs(), return_dict=False)


BOTH = (default, written_out)

# ------------------------------------------------------------------------------------------- U-Nets

# One transformer on the way down, one in the middle, two on the way up; each has self- and cross-attention.
UNET = {
    "sample_size": 16,
    "block_out_channels": (32, 64),
    "norm_num_groups": 8,
    "layers_per_block": 1,
    "cross_attention_dim": WIDTH,
    "attention_head_dim": 2,  # the number of heads, for historical reasons
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
# Attention at one resolution only, so that one mask is right for all.
UNET_FLAT = {
    **UNET,
    "block_out_channels": (32,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
}


def unet() -> dict[str, Any]:
    return {"sample": latents(4, 16, 16), "timestep": timesteps(), "encoder_hidden_states": text()}


def unet_padded() -> dict[str, Any]:
    return {**unet(), "encoder_attention_mask": mask()}


def unet_flat_padded() -> dict[str, Any]:
    image = {"sample": latents(4, 8, 8), "attention_mask": mask(64)}
    return {**unet_padded(), **image}


def unet_sdxl() -> dict[str, Any]:
    sizes = torch.tensor([[64, 64, 0, 0, 64, 64]]).expand(BATCH, -1)
    added = {"text_embeds": torch.randn(BATCH, 24), "time_ids": sizes}
    return {**unet(), "added_cond_kwargs": added}


def unet_images() -> dict[str, Any]:
    return {**unet(), "added_cond_kwargs": {"image_embeds": torch.randn(BATCH, 24)}}


add("unet-sd15", "UNet2DConditionModel", 8, unet, BOTH, trains=True, **UNET)
add("unet-sd15", "UNet2DConditionModel", 8, unet, (fused_projections,), **UNET)
add("unet-sd15", "UNet2DConditionModel", 16, unet, (sliced,), **UNET)
add("unet-sd15-masked", "UNet2DConditionModel", 8, unet_padded, BOTH, trains=True, **UNET)
add("unet-masked-image", "UNet2DConditionModel", 8, unet_flat_padded, BOTH, **UNET_FLAT)
add(
    "unet-sd21-upcast",
    "UNet2DConditionModel",
    8,
    unet,
    BOTH,
    upcast_attention=True,
    use_linear_projection=True,
    **{**UNET, "attention_head_dim": (2, 4)},
)
add(
    "unet-sdxl",
    "UNet2DConditionModel",
    16,
    unet_sdxl,
    BOTH,
    transformer_layers_per_block=(1, 2),
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=8,
    projection_class_embeddings_input_dim=24 + 6 * 8,
    **{
        **UNET,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    },
)
# Kandinsky 2.2: the keys and values of the image and those of the text in one attention.
add(
    "unet-kandinsky",
    "UNet2DConditionModel",
    4,
    unet_images,
    BOTH,
    trains=True,
    encoder_hid_dim=24,
    encoder_hid_dim_type="image_proj",
    addition_embed_type="image",
    mid_block_type="UNetMidBlock2DSimpleCrossAttn",
    resnet_time_scale_shift="scale_shift",
    **{
        **UNET,
        "attention_head_dim": 16,
        "down_block_types": ("SimpleCrossAttnDownBlock2D", "ResnetDownsampleBlock2D"),
        "up_block_types": ("ResnetUpsampleBlock2D", "SimpleCrossAttnUpBlock2D"),
    },
)
# Boxes, each with a text: what they say is attended to together with the picture.
add(
    "unet-gligen",
    "UNet2DConditionModel",
    12,
    lambda: {
        **unet(),
        "cross_attention_kwargs": {
            "gligen": {
                "boxes": torch.rand(BATCH, 3, 4),
                "masks": torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]]),
                "positive_embeddings": text(length=3),
            }
        },
    },
    BOTH,
    attention_type="gated",
    **UNET,
)


def ip_adapter(processor: Callable[..., nn.Module], plain: Callable[[], Any], masked: bool) -> Call:
    """Four tokens of one image and four of another, attended to beside the text; ``masked``: each in a half of the
    picture."""
    model = diffusers.UNet2DConditionModel(**UNET)
    projections = [embeddings.ImageProjection(24, WIDTH, num_image_text_embeds=4) for _ in range(2)]
    model.encoder_hid_proj = embeddings.MultiIPAdapterImageProjection(projections)
    model.register_to_config(encoder_hid_dim_type="ip_image_proj")
    processors = {}
    for name, module in model.named_modules():
        if isinstance(module, attention_processor.Attention):
            beside = processor(module.inner_dim, WIDTH, num_tokens=(4, 4), scale=0.7) if "attn2" in name else plain()
            processors[f"{name}.processor"] = beside
    model.set_attn_processor(processors)
    images = {"added_cond_kwargs": {"image_embeds": [torch.randn(BATCH, 1, 24), torch.randn(BATCH, 1, 24)]}}
    halves = torch.zeros(2, 1, 1, 16, 16)
    halves[0, ..., :8], halves[1, ..., 8:] = 1, 1
    masks = {"cross_attention_kwargs": {"ip_adapter_masks": list(halves)}} if masked else {}
    return call(model, **unet(), **images, **masks, return_dict=False)


@register("diffusers/unet-ip-adapter", 16, trains=False)
def unet_ip_adapter() -> Call:
    return ip_adapter(attention_processor.IPAdapterAttnProcessor2_0, attention_processor.AttnProcessor2_0, False)


@register("diffusers/unet-ip-adapter-masked", 16, trains=False)
def unet_ip_adapter_masked() -> Call:
    return ip_adapter(attention_processor.IPAdapterAttnProcessor2_0, attention_processor.AttnProcessor2_0, True)


@register("diffusers/unet-ip-adapter/written-out", 16, trains=False)
def unet_ip_adapter_written_out() -> Call:
    return ip_adapter(attention_processor.IPAdapterAttnProcessor, attention_processor.AttnProcessor, False)


# It pools the text with the mean of the shown tokens as its query.
add(
    "unet-kandinsky3",
    "Kandinsky3UNet",
    19,
    lambda: {**unet(), "encoder_attention_mask": mask().float()},
    time_embedding_dim=32,
    groups=8,
    attention_head_dim=16,
    layers_per_block=2,
    block_out_channels=(16, 32, 64, 128),
    cross_attention_dim=WIDTH,
    encoder_hid_dim=WIDTH,
)
add(
    "unet-i2vgen-xl",
    "I2VGenXLUNet",
    19,
    lambda: {
        **unet(),
        "sample": latents(4, 3, 16, 16),
        "fps": torch.tensor([8, 8]),
        "image_latents": latents(4, 3, 16, 16),
        "image_embeddings": torch.randn(BATCH, WIDTH),
    },
    **{
        **UNET,
        "attention_head_dim": 16,
        "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
        "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
    },
)
add(
    "unet-unconditional",
    "UNet2DModel",
    6,
    lambda: {"sample": latents(3, 16, 16), "timestep": timesteps()},
    BOTH,
    sample_size=16,
    block_out_channels=(32, 64),
    norm_num_groups=8,
    attention_head_dim=16,
    layers_per_block=2,
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
)
add(
    "controlnet",
    "ControlNetModel",
    4,
    lambda: {**unet(), "controlnet_cond": latents(3, 32, 32)},
    BOTH,
    conditioning_embedding_out_channels=(8, 16),
    **{key: size for key, size in UNET.items() if key not in ("sample_size", "up_block_types")},
)
# A spatial and a temporal transformer at each place; three frames.
add(
    "unet-svd",
    "UNetSpatioTemporalConditionModel",
    16,
    lambda: {
        "sample": torch.randn(BATCH, 3, 8, 16, 16),
        "timestep": timesteps(),
        "encoder_hidden_states": text(length=1),
        "added_time_ids": torch.tensor([[6.0, 127.0, 0.02]]).expand(BATCH, -1),
    },
    BOTH,
    sample_size=16,
    block_out_channels=(32, 64),
    layers_per_block=1,
    cross_attention_dim=WIDTH,
    num_attention_heads=(2, 4),
    addition_time_embed_dim=8,
    projection_class_embeddings_input_dim=24,
    num_frames=3,
    down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
    up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
)
add(
    "unet-motion",
    "UNetMotionModel",
    22,
    lambda: {**unet(), "sample": latents(4, 3, 16, 16), "encoder_hidden_states": torch.randn(BATCH * 3, TEXT, WIDTH)},
    BOTH,
    sample_size=16,
    block_out_channels=(32, 64),
    norm_num_groups=8,
    layers_per_block=1,
    cross_attention_dim=WIDTH,
    num_attention_heads=2,
    motion_num_attention_heads=2,
    down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
    up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
)
add(
    "unet-3d",
    "UNet3DConditionModel",
    18,
    lambda: {**unet(), "sample": latents(4, 3, 16, 16)},
    BOTH,
    **{
        **UNET,
        "attention_head_dim": 16,
        "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
        "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
    },
)
add(
    "stable-cascade",
    "StableCascadeUNet",
    4,
    lambda: {
        "sample": latents(16),
        "timestep_ratio": noise_levels(),
        "clip_text_pooled": text(24, 1),
        "clip_text": text(24),
        "clip_img": text(20, 1),
    },
    BOTH,
    conditioning_dim=WIDTH,
    block_out_channels=(32, 64),
    num_attention_heads=(2, 4),
    down_num_layers_per_block=(1, 1),
    up_num_layers_per_block=(1, 1),
    switch_level=(False,),
    clip_image_in_channels=20,
    clip_text_in_channels=24,
    clip_text_pooled_in_channels=24,
    dropout=(0.0, 0.0),
)


@register("diffusers/uvit", 6, trains=False)
def uvit() -> Call:
    model = diffusers.UVit2DModel(
        hidden_size=32,
        cond_embed_dim=24,
        micro_cond_encode_dim=8,
        micro_cond_embed_dim=40,
        encoder_hidden_size=24,
        vocab_size=66,
        codebook_size=64,
        in_channels=16,
        block_out_channels=32,
        num_res_blocks=1,
        block_num_heads=2,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=64,
    )
    sizes = torch.tensor([[64.0, 64.0, 0.0, 0.0, 6.0]]).expand(BATCH, -1)
    return call(model, torch.randint(0, 66, (BATCH, 6, 6)), text(24), torch.randn(BATCH, 24), sizes)


# ------------------------------------------------------------------------------------------- images

HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
PATCHES = {**HEADS, "patch_size": 2, "in_channels": 4, "sample_size": 8}


def captioned(length: int = TEXT) -> dict[str, Any]:
    return {"hidden_states": latents(), "timestep": timesteps(), "encoder_hidden_states": text(24, length)}


def captioned_padded() -> dict[str, Any]:
    return {**captioned(), "encoder_attention_mask": mask()}


add(
    "dit",
    "DiTTransformer2DModel",
    2,
    lambda: {"hidden_states": latents(), "timestep": timesteps(), "class_labels": torch.tensor([3, 5])},
    BOTH,
    trains=True,
    num_layers=2,
    out_channels=8,
    num_embeds_ada_norm=8,
    **PATCHES,
)
PIXART = {
    **PATCHES,
    "num_layers": 2,
    "cross_attention_dim": WIDTH,
    "caption_channels": 24,
    "out_channels": 8,
    "use_additional_conditions": False,
}
NO_SIZES = {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
add("pixart", "PixArtTransformer2DModel", 4, lambda: {**captioned(), **NO_SIZES}, **PIXART)
add(
    "pixart-masked",
    "PixArtTransformer2DModel",
    4,
    lambda: {**captioned_padded(), **NO_SIZES},
    BOTH,
    trains=True,
    **PIXART,
)


def pooled(length: int = TEXT) -> dict[str, Any]:
    return {**captioned(length), "pooled_projections": torch.randn(BATCH, 20)}


SD3 = {
    **PATCHES,
    "num_layers": 2,
    "caption_projection_dim": 32,
    "joint_attention_dim": 24,
    "pooled_projection_dim": 20,
    "out_channels": 4,
    "pos_embed_max_size": 16,
}
add("sd3", "SD3Transformer2DModel", 2, pooled, trains=True, **SD3)
add("sd35-dual", "SD3Transformer2DModel", 3, pooled, dual_attention_layers=(0,), qk_norm="rms_norm", **SD3)


def packed() -> dict[str, Any]:
    """The tokens of a picture of 4 x 4, and where each is."""
    return {
        "hidden_states": torch.randn(BATCH, 16, 4),
        "encoder_hidden_states": text(24),
        "timestep": noise_levels(),
        "img_ids": grid(1, 4, 4).float(),
        "txt_ids": torch.zeros(TEXT, 3),
    }


JOINT = {
    **HEADS,
    "patch_size": 1,
    "in_channels": 4,
    "num_layers": 1,
    "num_single_layers": 1,
    "joint_attention_dim": 24,
    "axes_dims_rope": (4, 6, 6),
}


def flux() -> dict[str, Any]:
    return {**packed(), "pooled_projections": torch.randn(BATCH, 20), "guidance": torch.full((BATCH,), 3.5)}


def flux2() -> dict[str, Any]:
    ids = {"img_ids": grid(1, 4, 4, 1).expand(BATCH, -1, -1), "txt_ids": grid(1, 1, 1, TEXT).expand(BATCH, -1, -1)}
    return {**packed(), **ids, "guidance": torch.full((BATCH,), 3.5)}


def chroma() -> dict[str, Any]:
    return {**packed(), "attention_mask": torch.cat([mask(), torch.ones(BATCH, 16, dtype=torch.long)], 1).bool()}


def chroma_as_called() -> dict[str, Any]:
    """Its pipeline passes ones and zeros in floating point, and those are added to the scores."""
    inputs = chroma()
    return {**inputs, "attention_mask": inputs["attention_mask"].float()}


CHROMA = {**JOINT, "approximator_num_channels": 8, "approximator_hidden_dim": 16, "approximator_layers": 1}
FLUX = {**JOINT, "pooled_projection_dim": 20, "guidance_embeds": True}
add("flux", "FluxTransformer2DModel", 2, flux, trains=True, **FLUX)
add("flux", "FluxTransformer2DModel", 2, flux, (fused_projections,), **FLUX)
add("flux2", "Flux2Transformer2DModel", 2, flux2, **{**JOINT, "axes_dims_rope": (4, 4, 4, 4)})
add("chroma-masked", "ChromaTransformer2DModel", 2, chroma, trains=True, **CHROMA)
add("chroma-masked-by-one", "ChromaTransformer2DModel", 2, chroma_as_called, **CHROMA)
add(
    "auraflow",
    "AuraFlowTransformer2DModel",
    2,
    lambda: {**captioned(), "timestep": noise_levels()},
    num_mmdit_layers=1,
    num_single_dit_layers=1,
    caption_projection_dim=32,
    joint_attention_dim=24,
    out_channels=4,
    pos_embed_max_size=16,
    **PATCHES,
)


def cogview() -> dict[str, Any]:
    size, corner = torch.tensor([[64, 64]]).expand(BATCH, -1), torch.zeros(BATCH, 2, dtype=torch.long)
    return {**captioned(), "original_size": size, "target_size": size, "crop_coords": corner}


COGVIEW = {
    **PATCHES,
    "num_layers": 2,
    "out_channels": 4,
    "text_embed_dim": 24,
    "time_embed_dim": 16,
    "condition_dim": 8,
    "pos_embed_max_size": 8,
}
COGVIEW4 = {**COGVIEW, "rope_axes_dim": (8, 8)}
add("cogview3", "CogView3PlusTransformer2DModel", 2, cogview, **COGVIEW)
add("cogview4", "CogView4Transformer2DModel", 2, cogview, **COGVIEW4)
add(
    "cogview4-masked",
    "CogView4Transformer2DModel",
    2,
    lambda: {**cogview(), "attention_mask": mask()},
    trains=True,
    **COGVIEW4,
)


def hunyuan_dit() -> dict[str, Any]:
    return {
        **captioned(),
        "timestep": timesteps().float(),
        "text_embedding_mask": mask(),
        "encoder_hidden_states_t5": text(24, 10),
        "text_embedding_mask_t5": mask(10),
        "image_meta_size": torch.tensor([[64.0, 64.0, 64.0, 64.0, 0.0, 0.0]]).repeat(BATCH, 1),
        "style": torch.zeros(BATCH, dtype=torch.long),
        "image_rotary_emb": rotary(16, 16),
    }


# The fifth pools the text.
add(
    "hunyuan-dit",
    "HunyuanDiT2DModel",
    5,
    hunyuan_dit,
    num_layers=2,
    hidden_size=32,
    cross_attention_dim=24,
    cross_attention_dim_t5=24,
    pooled_projection_dim=16,
    text_len=TEXT,
    text_len_t5=10,
    **PATCHES,
)
# Linear self-attention.
SANA = {
    **HEADS,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "num_cross_attention_heads": 4,
    "cross_attention_head_dim": 8,
    "cross_attention_dim": WIDTH,
    "caption_channels": 24,
    "sample_size": 8,
}
add("sana", "SanaTransformer2DModel", 2, captioned, **SANA)
add("sana-masked", "SanaTransformer2DModel", 2, captioned_padded, trains=True, **SANA)
# Fewer keys than queries, and refiners of the picture and of the text.
add(
    "lumina2",
    "Lumina2Transformer2DModel",
    4,
    lambda: {**captioned(), "timestep": noise_levels(), "encoder_attention_mask": mask().bool()},
    trains=True,
    sample_size=8,
    hidden_size=64,
    num_layers=2,
    num_refiner_layers=1,
    num_attention_heads=4,
    num_kv_heads=2,
    multiple_of=16,
    in_channels=4,
    axes_dim_rope=(4, 6, 6),
    axes_lens=(64, 32, 32),
    cap_feat_dim=24,
)


def lumina_next() -> dict[str, Any]:
    return {
        **captioned(),
        "timestep": noise_levels(),
        "encoder_mask": mask().bool(),
        "image_rotary_emb": torch.polar(torch.ones(()), torch.randn(384, 384, 8)),
        "cross_attention_kwargs": {},
    }


# Attends to the picture and to the text, and adds both.
add(
    "lumina-next",
    "LuminaNextDiT2DModel",
    4,
    lumina_next,
    sample_size=8,
    hidden_size=64,
    num_layers=2,
    num_attention_heads=4,
    num_kv_heads=2,
    multiple_of=16,
    learn_sigma=False,
    cross_attention_dim=24,
)


def omnigen() -> dict[str, Any]:
    """Text, an input picture of 16 tokens within it, the time, and the picture to be made: those see all, and the text
    what is before it. The first sequence is padded on the left."""
    text_length, image = 30, 16
    length = text_length + 1 + image
    see = torch.ones(length, length).tril()
    see[text_length:] = 1
    see = see.repeat(BATCH, 1, 1)
    see[:, 4:20, 4:20] = 1
    see[0, :, :3] = 0
    return {
        "hidden_states": latents(),
        "timestep": noise_levels(),
        "input_ids": torch.randint(1, 97, (BATCH, text_length)),
        "input_img_latents": [torch.randn(1, 4, 8, 8)],
        "input_image_sizes": {0: [[4, 20]]},
        "attention_mask": see,
        "position_ids": torch.arange(length).expand(BATCH, -1),
    }


add(
    "omnigen",
    "OmniGenTransformer2DModel",
    2,
    omnigen,
    hidden_size=64,
    num_attention_heads=4,
    num_key_value_heads=4,
    intermediate_size=96,
    num_layers=2,
    pad_token_id=0,
    vocab_size=97,
    time_step_dim=16,
    rope_scaling={"long_factor": [1.0] * 8, "short_factor": [1.0] * 8},
)
QWEN = {**JOINT, "patch_size": 2, "in_channels": 16, "out_channels": 4, "num_layers": 2}
del QWEN["num_single_layers"]


def qwen() -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(BATCH, 16, 16),
        "encoder_hidden_states": text(24),
        "timestep": noise_levels(),
        "img_shapes": [[(1, 4, 4)]] * BATCH,
    }


add("qwen-image", "QwenImageTransformer2DModel", 2, qwen, **QWEN)
add(
    "qwen-image-masked",
    "QwenImageTransformer2DModel",
    2,
    lambda: {**qwen(), "encoder_hidden_states_mask": mask()},
    trains=True,
    **QWEN,
)


def z_image() -> dict[str, Any]:
    """Pictures of two sizes, and captions of two lengths, each filled up to 32 tokens or 64."""
    return {
        "x": [torch.randn(16, 1, 16, 16), torch.randn(16, 1, 8, 12)],
        "cap_feats": [torch.randn(40, 24), torch.randn(12, 24)],
        "t": noise_levels(),
    }


add(
    "z-image",
    "ZImageTransformer2DModel",
    3,
    z_image,
    dim=32,
    n_layers=1,
    n_refiner_layers=1,
    n_heads=2,
    n_kv_heads=2,
    cap_feat_dim=24,
    axes_dims=[4, 6, 6],
    axes_lens=[256, 32, 32],
)


def hidream() -> dict[str, Any]:
    return {
        "hidden_states": latents(),
        "timesteps": timesteps(),
        "encoder_hidden_states_t5": text(24, 8),
        "encoder_hidden_states_llama3": torch.randn(2, BATCH, TEXT, 20),
        "pooled_embeds": torch.randn(BATCH, 16),
    }


add(
    "hidream",
    "HiDreamImageTransformer2DModel",
    2,
    hidream,
    num_layers=1,
    num_single_layers=1,
    caption_channels=[24, 20],
    text_emb_dim=16,
    num_routed_experts=2,
    num_activated_experts=2,
    axes_dims_rope=(4, 6, 6),
    max_resolution=(8, 8),
    llama_layers=(0, 1),
    out_channels=4,
    **{key: size for key, size in PATCHES.items() if key != "sample_size"},
)
add(
    "prx-masked",
    "PRXTransformer2DModel",
    2,
    lambda: {**captioned(), "timestep": noise_levels(), "attention_mask": mask().bool()},
    in_channels=4,
    context_in_dim=24,
    hidden_size=32,
    num_heads=2,
    depth=2,
    axes_dim=[8, 8],
)
PRIOR = {**HEADS, "num_layers": 2, "embedding_dim": 24, "num_embeddings": TEXT}


def prior() -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(BATCH, 24),
        "timestep": timesteps(),
        "proj_embedding": torch.randn(BATCH, 24),
        "encoder_hidden_states": text(24),
        "attention_mask": mask().bool(),
    }


# Causal, and padded.
add("prior", "PriorTransformer", 2, prior, BOTH, trains=True, **PRIOR)

# ------------------------------------------------------------------------------------------- video and audio

VIDEO = {**HEADS, "in_channels": 4, "out_channels": 4}


def video() -> dict[str, Any]:
    """Three frames of 8 x 8."""
    return {"hidden_states": latents(4, 3, 8, 8), "timestep": timesteps(), "encoder_hidden_states": text(24)}


def video_padded() -> dict[str, Any]:
    return {**video(), "encoder_attention_mask": mask()}


def frames_first(inputs: dict[str, Any]) -> dict[str, Any]:
    return {**inputs, "hidden_states": inputs["hidden_states"].transpose(1, 2).contiguous()}


COGVIDEO = {
    **VIDEO,
    "time_embed_dim": 16,
    "text_embed_dim": 24,
    "num_layers": 2,
    "sample_width": 8,
    "sample_height": 8,
    "sample_frames": 9,
    "max_text_seq_length": TEXT,
}
add("cogvideox", "CogVideoXTransformer3DModel", 2, lambda: frames_first(video()), **COGVIDEO)
add(
    "cogvideox-rope",
    "CogVideoXTransformer3DModel",
    2,
    lambda: {**frames_first(video()), "image_rotary_emb": rotary(48, 16)},
    trains=True,
    use_rotary_positional_embeddings=True,
    **COGVIDEO,
)
# The text alone, with a mask for rows too; the text and the video; and all in one stream.
add(
    "hunyuan-video",
    "HunyuanVideoTransformer3DModel",
    3,
    lambda: {
        **video_padded(),
        "pooled_projections": torch.randn(BATCH, 20),
        "guidance": torch.tensor([6000.0, 1000.0]),
    },
    trains=True,
    num_layers=1,
    num_single_layers=1,
    num_refiner_layers=1,
    patch_size=2,
    text_embed_dim=24,
    pooled_projection_dim=20,
    rope_axes_dim=(4, 6, 6),
    **VIDEO,
)
add(
    "ltx-video",
    "LTXVideoTransformer3DModel",
    4,
    lambda: {
        **video_padded(),
        "hidden_states": torch.randn(BATCH, 48, 4),
        "num_frames": 3,
        "height": 4,
        "width": 4,
    },
    trains=True,
    num_layers=2,
    cross_attention_dim=WIDTH,
    caption_channels=24,
    **VIDEO,
)
# Leaves out the hidden tokens, and attends to each sequence by itself: which Dynamo leaves to eager unless it is
# told to capture shapes that depend on data. The fifth pools the text.
add(
    "mochi",
    "MochiTransformer3DModel",
    5,
    lambda: {**video_padded(), "encoder_attention_mask": mask().bool()},
    known={"fused": 1},
    num_layers=2,
    pooled_projection_dim=16,
    text_embed_dim=24,
    time_embed_dim=16,
    max_sequence_length=TEXT,
    patch_size=2,
    **VIDEO,
)
WAN = {**VIDEO, "text_dim": 24, "freq_dim": 32, "ffn_dim": 64, "num_layers": 2, "rope_max_seq_len": 32}
add("wan", "WanTransformer3DModel", 4, video, trains=True, **WAN)
# The keys of the text and of the picture apart.
add(
    "wan-image",
    "WanTransformer3DModel",
    6,
    lambda: {**video(), "encoder_hidden_states_image": text(20, 257)},
    image_dim=20,
    added_kv_proj_dim=32,
    **WAN,
)


def allegro() -> dict[str, Any]:
    """A third of each head for the frame, the row and the column."""
    shown = torch.ones(BATCH, 3, 8, 8)
    shown[0, 2] = 0
    positions = tuple(grid(3, 4, 4).T.unsqueeze(1))
    rope = tuple(rotary(4, 8) for _ in positions)
    return {**video_padded(), "attention_mask": shown, "image_rotary_emb": (rope, positions)}


add(
    "allegro",
    "AllegroTransformer3DModel",
    4,
    allegro,
    num_layers=2,
    cross_attention_dim=48,
    caption_channels=24,
    sample_width=8,
    sample_height=8,
    sample_frames=3,
    **{**VIDEO, "attention_head_dim": 24},
)
add(
    "latte",
    "LatteTransformer3DModel",
    6,
    video,
    BOTH,
    num_layers=2,
    cross_attention_dim=WIDTH,
    caption_channels=24,
    video_length=3,
    num_embeds_ada_norm=1000,
    norm_type="ada_norm_single",
    norm_elementwise_affine=False,
    attention_bias=True,
    **{**PATCHES, "out_channels": 8},
)


def hunyuan_video15() -> dict[str, Any]:
    return {
        **video_padded(),
        "timestep": timesteps().float(),
        "encoder_hidden_states_2": text(20, 6),
        "encoder_attention_mask_2": mask(6, 3),
        "image_embeds": torch.randn(BATCH, 3, 16),
    }


# Sorts the tokens of its three inputs by what is shown.
add(
    "hunyuan-video15",
    "HunyuanVideo15Transformer3DModel",
    2,
    hunyuan_video15,
    num_layers=1,
    num_refiner_layers=1,
    mlp_ratio=2.0,
    patch_size=2,
    text_embed_dim=24,
    text_embed_2_dim=20,
    image_embed_dim=16,
    rope_axes_dim=(4, 6, 6),
    target_size=16,
    **VIDEO,
)
# Six attentions a layer: of each of video and sound to itself, to its text, and to the other.
add(
    "ltx2",
    "LTX2VideoTransformer3DModel",
    6,
    lambda: {
        "hidden_states": torch.randn(BATCH, 48, 4),
        "audio_hidden_states": torch.randn(BATCH, 9, 4),
        "encoder_hidden_states": text(24),
        "audio_encoder_hidden_states": text(24),
        "timestep": timesteps().float(),
        "encoder_attention_mask": mask(),
        "audio_encoder_attention_mask": mask(),
        "num_frames": 3,
        "height": 4,
        "width": 4,
        "fps": 25.0,
        "audio_num_frames": 9,
    },
    num_layers=1,
    cross_attention_dim=32,
    audio_in_channels=4,
    audio_out_channels=4,
    audio_num_attention_heads=2,
    audio_attention_head_dim=8,
    audio_cross_attention_dim=16,
    caption_channels=24,
    rope_double_precision=False,
    **VIDEO,
)
# Frames in pairs, which see those before and each other.
add(
    "skyreels-v2-causal",
    "SkyReelsV2Transformer3DModel",
    4,
    lambda: {
        **video(),
        "hidden_states": latents(4, 4, 8, 8),
        "timestep": torch.tensor([[100, 100, 900, 900]] * BATCH),
        "enable_diffusion_forcing": True,
    },
    num_frame_per_block=2,
    **WAN,
)
add(
    "wan-vace",
    "WanVACETransformer3DModel",
    6,
    lambda: {**video(), "control_hidden_states": latents(8, 3, 8, 8)},
    vace_layers=[0],
    vace_in_channels=8,
    **WAN,
)
# A face, read by attention that is written out, and attended to from the video.
add(
    "consisid",
    "ConsisIDTransformer3DModel",
    9,
    lambda: {
        **frames_first(video()),
        "image_rotary_emb": rotary(48, 16),
        "id_cond": torch.randn(BATCH, 20),
        "id_vit_hidden": [torch.randn(BATCH, 7, 12) for _ in range(5)],
    },
    use_rotary_positional_embeddings=True,
    is_train_face=True,
    cross_attn_interval=1,
    cross_attn_dim_head=16,
    cross_attn_num_heads=2,
    LFE_id_dim=20,
    LFE_vit_dim=12,
    LFE_depth=5,
    LFE_dim_head=16,
    LFE_num_heads=2,
    LFE_num_id_token=2,
    LFE_num_querie=6,
    LFE_output_dim=21,
    LFE_ff_mult=1,
    **COGVIDEO,
)


def kandinsky5() -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(1, 3, 8, 8, 4),
        "encoder_hidden_states": torch.randn(1, TEXT, 24),
        "timestep": torch.tensor([900.0]),
        "pooled_projections": torch.randn(1, 20),
        "visual_rope_pos": [torch.arange(3), torch.arange(4), torch.arange(4)],
        "text_rope_pos": torch.arange(TEXT),
    }


# It rounds queries and keys to bfloat16.
add(
    "kandinsky5",
    "Kandinsky5Transformer3DModel",
    5,
    kandinsky5,
    in_visual_dim=4,
    in_text_dim=24,
    in_text_dim2=20,
    time_dim=16,
    out_visual_dim=4,
    model_dim=32,
    ff_dim=64,
    num_text_blocks=1,
    num_visual_blocks=2,
    axes_dims=(4, 6, 6),
)
add(
    "easyanimate",
    "EasyAnimateTransformer3DModel",
    2,
    video,
    num_layers=2,
    mmdit_layers=1,
    patch_size=2,
    sample_width=8,
    sample_height=8,
    text_embed_dim=24,
    time_embed_dim=16,
    **VIDEO,
)
add(
    "cosmos",
    "CosmosTransformer3DModel",
    4,
    lambda: {**video(), "attention_mask": mask().bool(), "fps": 30},
    num_layers=2,
    mlp_ratio=2.0,
    text_embed_dim=24,
    adaln_lora_dim=8,
    max_size=(4, 16, 16),
    concat_padding_mask=False,
    **VIDEO,
)
add(
    "stable-audio",
    "StableAudioDiTModel",
    4,
    lambda: {
        "hidden_states": torch.randn(BATCH, 8, 20),
        "timestep": noise_levels(),
        "encoder_hidden_states": text(24),
        "global_hidden_states": torch.randn(BATCH, 1, 20),
        "rotary_embedding": rotary(21, 8),
        "attention_mask": mask(20).bool(),
        "encoder_attention_mask": mask().bool(),
    },
    sample_size=20,
    in_channels=8,
    out_channels=8,
    num_layers=2,
    num_attention_heads=4,
    attention_head_dim=16,
    num_key_value_attention_heads=2,
    cross_attention_dim=WIDTH,
    cross_attention_input_dim=24,
    time_proj_dim=16,
    global_states_input_dim=20,
)


@register("diffusers/t5-film", 4, trains=False)
def t5_film() -> Call:
    model = diffusers.T5FilmDecoder(
        input_dims=12, targets_length=16, d_model=32, num_layers=2, num_heads=2, d_kv=16, d_ff=48, dropout_rate=0.0
    )
    texts = [(text(), mask()), (text(length=8), mask(8, 3))]
    return call(model, texts, torch.randn(BATCH, 16, 12), torch.tensor([0.9, 0.2]))


# ------------------------------------------------------------------------------------------- autoencoders


def picture() -> dict[str, Any]:
    return {"sample": latents(3, 16, 16)}


VAE = {"block_out_channels": (16, 32), "norm_num_groups": 8}
TWO_LEVELS = {
    "down_block_types": ("DownEncoderBlock2D", "DownEncoderBlock2D"),
    "up_block_types": ("UpDecoderBlock2D", "UpDecoderBlock2D"),
}
# One head as wide as the layer, in the middle of the encoder and of the decoder.
add("autoencoder-kl", "AutoencoderKL", 2, picture, BOTH, trains=True, **VAE, **TWO_LEVELS)
add("autoencoder-kl", "AutoencoderKL", 2, picture, (fused_projections,), **VAE, **TWO_LEVELS)
add(
    "autoencoder-kl-attention",
    "AutoencoderKL",
    5,
    picture,
    BOTH,
    down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
    up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
    **VAE,
)
add(
    "autoencoder-kl-temporal",
    "AutoencoderKLTemporalDecoder",
    2,
    lambda: {**picture(), "num_frames": 2},
    BOTH,
    layers_per_block=2,
    down_block_types=TWO_LEVELS["down_block_types"],
    block_out_channels=(32, 64),
)
add("vq-model", "VQModel", 2, picture, BOTH, num_vq_embeddings=32, **VAE, **TWO_LEVELS)
# Linear attention.
add(
    "autoencoder-dc",
    "AutoencoderDC",
    0,
    picture,
    latent_channels=4,
    attention_head_dim=8,
    encoder_block_types=("ResBlock", "EfficientViTBlock"),
    decoder_block_types=("ResBlock", "EfficientViTBlock"),
    encoder_block_out_channels=(16, 16),
    decoder_block_out_channels=(16, 16),
    encoder_qkv_multiscales=((), (5,)),
    decoder_qkv_multiscales=((), (5,)),
    encoder_layers_per_block=(1, 1),
    decoder_layers_per_block=(1, 1),
    downsample_block_type="conv",
    upsample_block_type="interpolate",
)
# The first frame and then four at a time, in the encoder and in the decoder.
add(
    "autoencoder-wan",
    "AutoencoderKLWan",
    4,
    lambda: {"sample": torch.randn(1, 3, 5, 16, 16)},
    base_dim=8,
    z_dim=16,
    dim_mult=[1, 1, 1, 1],
    num_res_blocks=1,
)

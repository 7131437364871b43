"""transformers' models of images, audio, time series and decisions."""

from typing import Any

import torch

from .of_transformers import BATCH, EAGER, LENGTH, ONLY, SDPA, TOKENS, add, ids, mask, text_padded


def image(size: int = 32) -> dict[str, Any]:
    return {"pixel_values": torch.randn(BATCH, 3, size, size)}


def large_image() -> dict[str, Any]:
    return image(64)


def image_and_text() -> dict[str, Any]:
    return {**text_padded(), **image()}


def audio() -> dict[str, Any]:
    return {"input_values": torch.randn(BATCH, 2000)}


def audio_padded() -> dict[str, Any]:
    return {**audio(), "attention_mask": mask(2000)}


# ------------------------------------------------------------------------------------------- images

SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT_TOWER = {
    **SMALL,
    "vocab_size": TOKENS,
    "max_position_embeddings": 64,
    "eos_token_id": 2,
    "bos_token_id": 1,
    "pad_token_id": 0,
}
IMAGE_TOWER = {**SMALL, "image_size": 32, "patch_size": 8}
SWIN = {"patch_size": 2, "depths": [2, 2], "num_heads": [2, 4], "embed_dim": 32, "window_size": 4}
PYRAMID = {
    "num_encoder_blocks": 4,
    "depths": [1, 1, 1, 1],
    "hidden_sizes": [16, 16, 32, 32],
    "num_attention_heads": [1, 2, 4, 4],
    "sr_ratios": [4, 2, 1, 1],
}

add("vit", "ViTModel", "ViTConfig", 2, image)
add("deit", "DeiTModel", "DeiTConfig", 2, image, implementations=SDPA)
add("swin", "SwinModel", "SwinConfig", 4, image, implementations=EAGER, **SWIN)
add(
    "clip",
    "CLIPModel",
    "CLIPConfig",
    4,
    image_and_text,
    text_config=TEXT_TOWER,
    vision_config=IMAGE_TOWER,
    projection_dim=64,
)
add(
    "vit-mae",
    "ViTMAEModel",
    "ViTMAEConfig",
    2,
    image,
    implementations=SDPA,
    decoder_hidden_size=32,
    decoder_num_hidden_layers=1,
    decoder_num_attention_heads=2,
    decoder_intermediate_size=32,
)
add(
    "segformer",
    "SegformerModel",
    "SegformerConfig",
    4,
    large_image,
    implementations=ONLY,
    decoder_hidden_size=32,
    **PYRAMID,
)
add(
    "mobilevit",
    "MobileViTModel",
    "MobileViTConfig",
    9,
    large_image,
    implementations=ONLY,
    trains=False,
    image_size=64,
    hidden_sizes=[32, 32, 32],
    neck_hidden_sizes=[8, 8, 16, 16, 16, 16, 32],
    patch_size=2,
)
add("donut-swin", "DonutSwinModel", "DonutSwinConfig", 4, image, implementations=ONLY, **SWIN)
add("glpn", "GLPNModel", "GLPNConfig", 4, large_image, implementations=ONLY, **PYRAMID)
add(
    "blip2-qformer",
    "Blip2QFormerModel",
    "Blip2QFormerConfig",
    3,
    lambda: {
        "query_embeds": torch.randn(BATCH, 6, 64),
        "encoder_hidden_states": torch.randn(BATCH, 13, 48),
        "encoder_attention_mask": mask(13),
    },
    implementations=EAGER,
    encoder_hidden_size=48,
    cross_attention_frequency=2,
)
add(
    "git",
    "GitModel",
    "GitConfig",
    4,
    lambda: {**image_and_text(), "use_cache": False},
    implementations=EAGER,
    vision_config=IMAGE_TOWER,
)
add(
    "vilt",
    "ViltModel",
    "ViltConfig",
    2,
    lambda: {
        **image_and_text(),
        "token_type_ids": torch.zeros(BATCH, LENGTH, dtype=torch.long),
        "pixel_mask": torch.ones(BATCH, 32, 32, dtype=torch.long),
    },
    implementations=ONLY,
    trains=False,
)

# ------------------------------------------------------------------------------------------- audio, time series, others

WAV2VEC = {
    "conv_dim": [16, 16],
    "conv_kernel": [10, 3],
    "conv_stride": [5, 4],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
    "mask_time_prob": 0.0,
    "layerdrop": 0.0,
    "feat_extract_norm": "layer",
}


def time_series() -> dict[str, Any]:
    past, future = 31, 8
    return {
        "past_values": torch.randn(BATCH, past),
        "past_time_features": torch.randn(BATCH, past, 1),
        "past_observed_mask": torch.ones(BATCH, past),
        "future_values": torch.randn(BATCH, future),
        "future_time_features": torch.randn(BATCH, future, 1),
        "use_cache": False,
    }


def decisions() -> dict[str, Any]:
    steps = 8
    return {
        "states": torch.randn(BATCH, steps, 17),
        "actions": torch.randn(BATCH, steps, 4),
        "rewards": torch.randn(BATCH, steps, 1),
        "returns_to_go": torch.randn(BATCH, steps, 1),
        "timesteps": torch.arange(steps).expand(BATCH, -1),
        "attention_mask": torch.ones(BATCH, steps, dtype=torch.long),
    }


add("wav2vec2", "Wav2Vec2Model", "Wav2Vec2Config", 2, audio_padded, **WAV2VEC)
# Through F.multi_head_attention_forward, with a gated bias by relative position.
add("wavlm", "WavLMModel", "WavLMConfig", 2, audio, implementations=ONLY, **WAV2VEC)
add(
    "wav2vec2-bert",
    "Wav2Vec2BertModel",
    "Wav2Vec2BertConfig",
    2,
    lambda: {"input_features": torch.randn(BATCH, LENGTH, 16), "attention_mask": mask()},
    implementations=ONLY,
    feature_projection_input_dim=16,
    conv_depthwise_kernel_size=3,
    left_max_position_embeddings=8,
    right_max_position_embeddings=4,
    mask_time_prob=0.0,
    layerdrop=0.0,
)
add(
    "whisper",
    "WhisperForConditionalGeneration",
    "WhisperConfig",
    6,
    lambda: {"input_features": torch.randn(BATCH, 8, 48), "decoder_input_ids": ids(12), "use_cache": False},
    num_mel_bins=8,
    max_source_positions=24,
    max_target_positions=32,
    suppress_tokens=None,
    begin_suppress_tokens=None,
)
add(
    "ast",
    "ASTModel",
    "ASTConfig",
    2,
    lambda: {"input_values": torch.randn(BATCH, 48, 16)},
    implementations=SDPA,
    max_length=48,
    num_mel_bins=16,
    frequency_stride=8,
    time_stride=8,
)
add(
    "time-series",
    "TimeSeriesTransformerModel",
    "TimeSeriesTransformerConfig",
    6,
    time_series,
    implementations=EAGER,
    trains=False,
    prediction_length=8,
    context_length=24,
    lags_sequence=[1, 2, 7],
    num_time_features=1,
)
add(
    "decision-transformer", "DecisionTransformerModel", "DecisionTransformerConfig", 2, decisions, implementations=EAGER
)
add(
    "timesfm",
    "TimesFmModel",
    "TimesFmConfig",
    2,
    lambda: {
        "past_values": torch.randn(BATCH, 64),
        "past_values_padding": torch.zeros(BATCH, 64, dtype=torch.long),
        "freq": torch.zeros(BATCH, 1, dtype=torch.long),
    },
    implementations=EAGER,
    trains=False,
    patch_length=8,
    context_length=64,
    horizon_length=8,
)
add(
    "speecht5",
    "SpeechT5ForSpeechToText",
    "SpeechT5Config",
    6,
    lambda: {**audio(), "decoder_input_ids": ids(12), "use_cache": False},
    implementations=ONLY,
    trains=False,
    encoder_layerdrop=0.0,
    decoder_layerdrop=0.0,
    **WAV2VEC,
)

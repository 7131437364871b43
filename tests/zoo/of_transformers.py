"""transformers' models of text, with the attention that each writes out ("eager") and with calls of SDPA ("sdpa")."""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from .registry import Call, call, register

BATCH, LENGTH, TOKENS = 2, 24, 97

# Small sizes under every name that a configuration has for them.
TINY = {
    **dict.fromkeys(["hidden_size", "embedding_size", "embed_dim", "n_embd", "d_model", "dim"], 64),
    **dict.fromkeys(["num_hidden_layers", "num_layers", "n_layers", "n_layer"], 2),
    **dict.fromkeys(["encoder_layers", "decoder_layers", "num_encoder_layers", "num_decoder_layers"], 2),
    **dict.fromkeys(["num_attention_heads", "num_heads", "n_heads", "n_head"], 4),
    **dict.fromkeys(["encoder_attention_heads", "decoder_attention_heads"], 4),
    **{"num_key_value_heads": 2, "head_dim": 16, "d_kv": 16, "rotary_dim": 8},
    **dict.fromkeys(["intermediate_size", "ffn_hidden_size", "n_inner", "ffn_dim", "d_ff"], 96),
    **dict.fromkeys(["encoder_ffn_dim", "decoder_ffn_dim"], 96),
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts"], 4),
    **{"num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
    **{"vocab_size": TOKENS, "type_vocab_size": 2},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1},
    **dict.fromkeys(["max_position_embeddings", "n_positions", "n_ctx"], 64),
    **{"image_size": 32, "patch_size": 8},
}


def tiny_config(name: str, settings: dict[str, Any]) -> Any:
    """The configuration class ``name`` with those sizes of ``TINY`` that it has, and ``settings`` over them.

    A setting of None over a size of ``TINY`` leaves the class's own default.
    """
    cls = getattr(transformers, name)
    default = cls()
    aliases = cls.attribute_map or {}
    known = {*default.to_dict(), *aliases}
    grouped = default.to_dict().get("num_key_value_heads") != getattr(default, "num_attention_heads", None)
    sizes = {}
    for key, size in TINY.items():
        if key not in known or key in aliases:
            continue
        present = getattr(default, key, None)
        if isinstance(present, (list, tuple)) or (key == "head_dim" and present is None):
            continue
        if key == "num_key_value_heads" and "head_dim" not in known and (present is None or not grouped):
            continue
        sizes[key] = size
    merged = {**sizes, **settings}
    return cls(**{key: value for key, value in merged.items() if value is not None or key not in TINY})


def ids(length: int = LENGTH) -> Tensor:
    return torch.randint(3, TOKENS, (BATCH, length))


def mask(length: int = LENGTH, left: bool = False) -> Tensor:
    """1 at what is to be seen: all of it, but for six positions at one end of the first sequence."""
    keep = torch.ones(BATCH, length, dtype=torch.long)
    keep[0, slice(0, 6) if left else slice(length - 6, None)] = 0
    return keep


# ------------------------------------------------------------------------------------------- what they are called with


def lm() -> dict[str, Any]:
    return {"input_ids": ids(), "use_cache": False}


def lm_padded() -> dict[str, Any]:
    return {"input_ids": ids(), "attention_mask": mask(left=True), "use_cache": False}


def text() -> dict[str, Any]:
    return {"input_ids": ids()}


def text_padded() -> dict[str, Any]:
    return {"input_ids": ids(), "attention_mask": mask()}


def long_text_padded(length: int) -> Callable:
    return lambda: {"input_ids": ids(length), "attention_mask": mask(length)}


def translation() -> dict[str, Any]:
    return {"input_ids": ids(), "decoder_input_ids": ids(20), "use_cache": False}


def translation_padded() -> dict[str, Any]:
    return {**translation(), "attention_mask": mask()}


# ------------------------------------------------------------------------------------------- how they are built


def build_model(model: str, config: Any, implementation: str | None) -> nn.Module:
    cls = getattr(transformers, model)
    return cls(config) if implementation is None else cls._from_config(config, attn_implementation=implementation)


_CLASSES = set(dir(transformers))


def add(
    name: str,
    model: str,
    config: str,
    attentions: int,
    *inputs: Callable,
    implementations: tuple[str | None, ...] = ("eager", "sdpa"),
    trains: bool = True,
    fused: int | None = None,
    **settings: Any,
) -> None:
    """Registers class ``model`` of transformers for every implementation of its attention and each of ``inputs``.

    ``inputs`` make the arguments; where there are several, the name says which. ``trains`` and ``fused`` are those of
    :class:`Model`; ``settings`` are those of ``config``. A class of a later transformers is left out.
    """
    if model not in _CLASSES:
        return
    for implementation in implementations:
        for make in inputs:
            full_name = f"transformers/{name}/{implementation or 'only'}" + f":{make.__name__}" * (len(inputs) > 1)

            @register(full_name, attentions, trains=trains, fused=fused)
            def build(implementation: str | None = implementation, make: Callable = make) -> Call:
                return call(build_model(model, tiny_config(config, settings), implementation), **make())


# Implementations of models that are not run with both of the usual two. ONLY is for those without a choice.
EAGER, SDPA, FLEX, ONLY = ("eager",), ("sdpa",), ("flex_attention",), (None,)

# ------------------------------------------------------------------------------------------- decoders

SLIDING_AND_FULL = ["sliding_attention", "full_attention"]
GROUPED = {"num_key_value_heads": 2}
LLAMA = {"num_key_value_heads": 2, "head_dim": 16}
GEMMA3 = {"sliding_window": 8, "layer_types": SLIDING_AND_FULL, "query_pre_attn_scalar": 32}
GPT_OSS = {
    "sliding_window": 8,
    "layer_types": SLIDING_AND_FULL,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}

add("llama", "LlamaForCausalLM", "LlamaConfig", 2, lm, lm_padded, **LLAMA)
# Fused by its author.
add("llama", "LlamaForCausalLM", "LlamaConfig", 2, lm, implementations=FLEX, trains=False, fused=0, **LLAMA)
add("gpt2", "GPT2LMHeadModel", "GPT2Config", 2, lm, lm_padded)
add("mistral-sliding", "MistralForCausalLM", "MistralConfig", 2, lm, lm_padded, sliding_window=8, **LLAMA)
add("qwen2", "Qwen2ForCausalLM", "Qwen2Config", 2, lm_padded, **GROUPED)
add("qwen3-moe", "Qwen3MoeForCausalLM", "Qwen3MoeConfig", 2, lm, implementations=SDPA)
add(
    "gemma2-soft-cap",
    "Gemma2ForCausalLM",
    "Gemma2Config",
    2,
    lm,
    lm_padded,
    implementations=EAGER,
    sliding_window=8,
    query_pre_attn_scalar=32,
)
add("gemma3", "Gemma3ForCausalLM", "Gemma3TextConfig", 2, lm, lm_padded, **GEMMA3)
add("phi", "PhiForCausalLM", "PhiConfig", 2, lm)
add("bloom-alibi", "BloomForCausalLM", "BloomConfig", 2, lm, lm_padded, implementations=EAGER)
add("falcon", "FalconForCausalLM", "FalconConfig", 2, lm_padded, num_kv_heads=4)
add("falcon-alibi", "FalconForCausalLM", "FalconConfig", 2, lm_padded, alibi=True, multi_query=True)
add("falcon-new", "FalconForCausalLM", "FalconConfig", 2, lm, new_decoder_architecture=True, num_kv_heads=2)
add("opt", "OPTForCausalLM", "OPTConfig", 2, lm, lm_padded, word_embed_proj_dim=64)
add("mpt-alibi", "MptForCausalLM", "MptConfig", 2, lm_padded, implementations=EAGER)
add("starcoder2", "Starcoder2ForCausalLM", "Starcoder2Config", 2, lm, sliding_window=8, **GROUPED)
add("olmo2", "Olmo2ForCausalLM", "Olmo2Config", 2, lm, **GROUPED)
add("olmoe", "OlmoeForCausalLM", "OlmoeConfig", 2, lm, implementations=EAGER)
add("cohere", "CohereForCausalLM", "CohereConfig", 2, lm, **GROUPED)
add("gpt-oss-sinks", "GptOssForCausalLM", "GptOssConfig", 2, lm, lm_padded, implementations=EAGER, **GPT_OSS)
add("granite-swa-sinks", "GraniteSWAForCausalLM", "GraniteSWAConfig", 2, lm, lm_padded, implementations=EAGER)
add("inkling2-row-sinks", "Inkling2ForCausalLM", "Inkling2TextConfig", 6, lm, lm_padded, implementations=EAGER)
add(
    "deepseek-v3-latent",
    "DeepseekV3ForCausalLM",
    "DeepseekV3Config",
    2,
    lm,
    num_key_value_heads=4,
    head_dim=None,
    q_lora_rank=32,
    kv_lora_rank=16,
    qk_rope_head_dim=8,
    qk_nope_head_dim=16,
    v_head_dim=16,
    n_group=2,
    topk_group=1,
    first_k_dense_replace=1,
)
add("glm4", "Glm4ForCausalLM", "Glm4Config", 2, lm)
add(
    "llama4-chunked",
    "Llama4ForCausalLM",
    "Llama4TextConfig",
    2,
    lm,
    intermediate_size_mlp=96,
    attention_chunk_size=8,
    layer_types=["chunked_attention", "full_attention"],
    no_rope_layers=[1, 0],
)
add("smollm3", "SmolLM3ForCausalLM", "SmolLM3Config", 2, lm, implementations=SDPA)
add("xglm", "XGLMForCausalLM", "XGLMConfig", 2, lm_padded, implementations=EAGER, attention_heads=4)
add("biogpt", "BioGptForCausalLM", "BioGptConfig", 2, lm, implementations=EAGER)
# One layer of linear attention, and one of the other kind.
add(
    "minimax",
    "MiniMaxForCausalLM",
    "MiniMaxConfig",
    1,
    lm,
    implementations=EAGER,
    trains=False,
    layer_types=["linear_attention", "full_attention"],
    block_size=8,
)
# No attention at all.
add(
    "jamba", "JambaModel", "JambaConfig", 1, lm, num_hidden_layers=2, attn_layer_period=2, attn_layer_offset=1,
    expert_layer_period=8, expert_layer_offset=7, num_experts=2, num_experts_per_tok=1, mamba_d_state=4,
    mamba_dt_rank=8,
)  # fmt: skip
add("cpmant", "CpmAntForCausalLM", "CpmAntConfig", 2, lm, implementations=ONLY)
add("mamba", "MambaForCausalLM", "MambaConfig", 0, lm, implementations=ONLY, trains=False, state_size=4)
add(
    "rwkv",
    "RwkvForCausalLM",
    "RwkvConfig",
    0,
    lm,
    implementations=ONLY,
    trains=False,
    attention_hidden_size=64,
    context_length=64,
)

# ------------------------------------------------------------------------------------------- steps with a static cache

PREFILLED, CAPACITY = 5, 32


class CachedStep(nn.Module):
    """Some more tokens after the first five, which are in a static cache already."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.eval()
        self.cache = transformers.StaticCache(config=model.config, max_cache_len=CAPACITY)
        with torch.no_grad():
            model(input_ids=ids(PREFILLED), past_key_values=self.cache, use_cache=True)

    def _apply(self, fn: Callable, recurse: bool = True) -> nn.Module:
        """The cache goes where the model goes, and takes its dtype."""
        for layer in self.cache.layers:
            vars(layer).update({name: fn(x) for name, x in vars(layer).items() if isinstance(x, Tensor)})
            layer.dtype, layer.device = layer.keys.dtype, layer.keys.device
        return super()._apply(fn, recurse)

    def forward(self, **inputs: Tensor) -> Tensor:
        return self.model(past_key_values=self.cache, use_cache=True, **inputs).logits


def add_cached(
    name: str,
    model: str,
    config: str,
    tokens: int = 1,
    padded: bool = False,
    implementations: tuple[str, ...] = ("eager", "sdpa"),
    **settings: Any,
) -> None:
    """Registers a step of ``tokens`` tokens, without (or with) padding in what is cached."""
    what = "decode" if tokens == 1 else f"{tokens}-tokens"
    for implementation in implementations:

        @register(f"transformers/{name}-cached/{implementation}:{what}{'_padded' * padded}", 2, trains=False)
        def build(implementation: str = implementation) -> Call:
            end = PREFILLED + tokens
            step = CachedStep(build_model(model, tiny_config(config, settings), implementation))
            positions = torch.arange(PREFILLED, end).expand(BATCH, -1)
            keep = {"attention_mask": mask(end, left=True)} if padded else {}
            return call(step, input_ids=ids(tokens), position_ids=positions, **keep)


add_cached("llama", "LlamaForCausalLM", "LlamaConfig", **LLAMA)
add_cached("llama", "LlamaForCausalLM", "LlamaConfig", padded=True, **LLAMA)
add_cached("llama", "LlamaForCausalLM", "LlamaConfig", tokens=4, **LLAMA)
add_cached("gemma3", "Gemma3ForCausalLM", "Gemma3TextConfig", **GEMMA3)
add_cached("gpt-oss-sinks", "GptOssForCausalLM", "GptOssConfig", implementations=EAGER, **GPT_OSS)

# ------------------------------------------------------------------------------------------- encoders

add("bert", "BertModel", "BertConfig", 2, text, text_padded)
add("distilbert", "DistilBertModel", "DistilBertConfig", 2, text_padded)
add("albert", "AlbertModel", "AlbertConfig", 2, text_padded)
add(
    "deberta-v2",
    "DebertaV2Model",
    "DebertaV2Config",
    2,
    text_padded,
    implementations=ONLY,
    relative_attention=True,
    pos_att_type=["p2c", "c2p"],
    position_buckets=8,
    norm_rel_ebd="layer_norm",
    share_att_key=True,
)
add(
    "modernbert",
    "ModernBertModel",
    "ModernBertConfig",
    2,
    text,
    text_padded,
    global_attn_every_n_layers=2,
    local_attention=8,
)
# Its scores are diagonals of many small products, in the memory of which rows are shifted by one: none is q k^T.
add(
    "longformer",
    "LongformerModel",
    "LongformerConfig",
    2,
    text_padded,
    implementations=ONLY,
    fused=0,
    attention_window=[8, 8],
)
# The weights of a block of queries are cut up and multiplied by values piece by piece.
add(
    "big-bird-sparse",
    "BigBirdModel",
    "BigBirdConfig",
    2,
    long_text_padded(64),
    implementations=ONLY,
    trains=False,
    fused=0,
    attention_type="block_sparse",
    block_size=4,
    num_random_blocks=1,
    max_position_embeddings=128,
)
add("mpnet", "MPNetModel", "MPNetConfig", 2, text_padded, implementations=ONLY)
add("squeezebert", "SqueezeBertModel", "SqueezeBertConfig", 2, text_padded, implementations=ONLY)
add("roformer", "RoFormerModel", "RoFormerConfig", 2, text_padded, implementations=ONLY)
add("convbert", "ConvBertModel", "ConvBertConfig", 2, text_padded, implementations=ONLY)
add("megatron-bert", "MegatronBertModel", "MegatronBertConfig", 2, text_padded, implementations=ONLY)
# One attention in chunks, two over what they are pooled to, and a last one.
add(
    "canine",
    "CanineModel",
    "CanineConfig",
    4,
    long_text_padded(32),
    implementations=ONLY,
    local_transformer_stride=8,
    downsampling_rate=4,
    num_hash_buckets=32,
)
add("yoso", "YosoModel", "YosoConfig", 0, text_padded, implementations=ONLY, trains=False, use_expectation=True)  # acos
add("fnet", "FNetModel", "FNetConfig", 0, text, implementations=ONLY, trains=False)  # no attention
add("xlm", "XLMModel", "XLMConfig", 2, text_padded, implementations=ONLY, emb_dim=64)
add("flaubert", "FlaubertModel", "FlaubertConfig", 2, text_padded, implementations=ONLY, emb_dim=64)
add("jina-v3", "JinaEmbeddingsV3Model", "JinaEmbeddingsV3Config", 2, text_padded, implementations=SDPA)
add("eurobert", "EuroBertModel", "EuroBertConfig", 2, text_padded, implementations=SDPA)

# ------------------------------------------------------------------------------------------- encoders with a decoder

add("t5", "T5ForConditionalGeneration", "T5Config", 6, translation, translation_padded, implementations=EAGER)
add("bart", "BartForConditionalGeneration", "BartConfig", 6, translation, translation_padded)
add("marian", "MarianMTModel", "MarianConfig", 6, translation_padded, implementations=EAGER)
add(
    "led",
    "LEDForConditionalGeneration",
    "LEDConfig",
    6,
    translation_padded,
    implementations=ONLY,
    fused=4,  # the encoder is Longformer's
    attention_window=[8, 8],
    max_encoder_position_embeddings=64,
    max_decoder_position_embeddings=64,
)
add(
    "prophetnet",
    "ProphetNetModel",
    "ProphetNetConfig",
    6,
    translation_padded,
    implementations=ONLY,
    num_encoder_attention_heads=4,
    num_decoder_attention_heads=4,
    ngram=2,
)
add(
    "pegasus-x",
    "PegasusXForConditionalGeneration",
    "PegasusXConfig",
    7,  # the global tokens of the last layer have no use
    translation_padded,
    implementations=EAGER,
    num_global_tokens=4,
    block_size=8,
)
add(
    "longt5-local",
    "LongT5ForConditionalGeneration",
    "LongT5Config",
    6,
    translation_padded,
    implementations=ONLY,
    local_radius=4,
    encoder_attention_type="local",
)
add("umt5", "UMT5ForConditionalGeneration", "UMT5Config", 6, translation_padded, implementations=EAGER)
add(
    "fsmt",
    "FSMTForConditionalGeneration",
    "FSMTConfig",
    6,
    translation_padded,
    implementations=ONLY,
    src_vocab_size=TOKENS,
    tgt_vocab_size=TOKENS,
    langs=["en", "de"],
)

"""Any architecture of transformers, as small as its configuration lets it be, with random weights."""

import inspect
import re
import warnings
from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto

VOCAB, WIDTH, BATCH, LENGTH, IMAGE = 131, 16, 2, 10, 32

KINDS = {
    "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "masked": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "seq2seq": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "image-text": modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
}

MOST_PARAMETERS = 150e6  # a tower for images that tokens do not go through costs memory only

# What configurations call their sizes. A configuration is given those of the names that it has.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocabulary_size"), VOCAB),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "embedding_size", "model_dim"), WIDTH),
    **dict.fromkeys(("word_embed_proj_dim", "decoder_hidden_size", "encoder_hidden_size"), WIDTH),
    **dict.fromkeys(("lru_width", "attention_hidden_size", "out_hidden_size", "text_hidden_size"), WIDTH),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_decoder_layers", "num_encoder_layers", "depth"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 2),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads", "num_encoder_attention_heads"), 2),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "multi_query_group_num"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "attention_head_dim", "kv_channels", "v_head_dim", "qk_nope_head_dim"), 8),
    **dict.fromkeys(("qk_rope_head_dim",), 4),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 8),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "n_inner", "encoder_ffn_dim", "decoder_ffn_dim"), 32),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_intermediate_size"), 16),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_top_k", "n_group", "topk_group", "n_shared_experts"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length"), 64),
    **dict.fromkeys(("hidden_size_per_layer_input", "rotary_dim", "global_head_dim"), 8),
    **dict.fromkeys(("vocab_size_per_layer_input",), VOCAB),
    **dict.fromkeys(("num_global_key_value_heads",), 2),
    **dict.fromkeys(("sliding_window", "attention_window"), 8),
    **dict.fromkeys(("state_size", "mamba_d_state", "ssm_state_size"), 4),
    **dict.fromkeys(("image_size",), 32),
    **dict.fromkeys(("patch_size",), 8),
    **dict.fromkeys(("pad_token_id",), 0),
    **dict.fromkeys(("bos_token_id", "eos_token_id", "decoder_start_token_id", "forced_eos_token_id"), 1),
    **dict.fromkeys(("image_token_id", "image_token_index"), 2),
    **dict.fromkeys(("video_token_id", "video_token_index"), 3),
    **dict.fromkeys(("audio_token_id", "audio_token_index"), 4),
    **dict.fromkeys(("vision_start_token_id", "boi_token_index"), 5),
    **dict.fromkeys(("vision_end_token_id", "eoi_token_index"), 6),
    **dict.fromkeys(("expand", "mamba_expand"), 1),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 2),
    **dict.fromkeys(("mamba_head_dim",), 8),
    **dict.fromkeys(("n_groups", "mamba_n_groups", "top_k_experts"), 1),
    "vocabulary_map": {"<image>": 2, "<|extra_200|>": 3},
    "per_layer_config": {},
    "latent_query_num": 2,
    **dict.fromkeys(("d_latents", "num_latents", "entity_emb_size", "audio_hidden_size"), WIDTH),
    **dict.fromkeys(("entity_vocab_size",), VOCAB),
    **dict.fromkeys(("num_self_attends_per_block",), 2),
    **dict.fromkeys(("lsh_attn_chunk_length", "local_attn_chunk_length"), LENGTH),
    "axial_pos_embds": False,
    "default_language": "en_XX",
    "attention_types": [[["global", "local"], 1]],
    **dict.fromkeys(("is_decoder",), True),
}


# What later attempts change, where sizes exclude each other in some architecture; None leaves a name to its default.
def _of_width(width: int) -> dict[str, Any]:
    return {name: width for name, size in SIZES.items() if size == WIDTH} | {"head_dim": None}


ATTEMPTS: tuple[dict[str, Any], ...] = (
    {},
    dict.fromkeys(("head_dim", "attention_head_dim", "v_head_dim", "kv_channels", "attention_hidden_size")),
    {"is_decoder": None},
    {"num_hidden_layers": 4, "num_layers": 4},
    {"num_hidden_layers": None, "num_layers": None},
    {"max_position_embeddings": LENGTH},
    _of_width(128),
    _of_width(256),
    {"qk_rope_head_dim": 8},
    {"qk_rope_head_dim": 0},
    {"layer_types": ["full_attention"] * 2, "mlp_layer_types": ["dense", "sparse"]},
    {"layer_types": ["attention", "mamba"]},
)


def configuration(cls: type, kind: str, changes: dict[str, Any]) -> Any:
    """A small configuration; raises what the class raises where its sizes must fit in a way that we don't know."""
    names = set(inspect.signature(cls.__init__).parameters) | set(vars(cls))
    for base in cls.__mro__:
        names |= set(getattr(base, "__annotations__", {}))
    aliases = getattr(cls, "attribute_map", {})
    names = (names | set(aliases)) - {alias for alias, name in aliases.items() if name in SIZES and name in names}
    names -= {name for name in names if isinstance(getattr(cls, name, None), property)}
    sizes = {name: value for name, value in (SIZES | changes).items() if name in names and value is not None}
    if kind != "causal":
        sizes.pop("is_decoder", None)
    subs = getattr(cls, "sub_configs", {})
    if subs:
        default = cls()
        sizes |= {
            name: configuration(type(getattr(default, name)), kind, changes)
            for name in subs
            if getattr(default, name, None) is not None
        }
    return cls(**sizes)


def model(name: str, kind: str, **attributes: Any) -> torch.nn.Module:
    """The architecture of a model type of transformers, for example ("llama", "causal"), in training mode.

    It is one that runs. attributes: what to set in its configuration.
    """
    errors = []
    for changes in ATTEMPTS:
        for _ in range(4):
            try:
                config = configuration(transformers.CONFIG_MAPPING[name], kind, changes)
                result = _build(name, kind, config, attributes)
                inputs(result)
                return result
            except Exception as error:
                errors.append(error)
                named = [name for name in re.findall(r"\w+", str(error)) if name in SIZES]
                complained_of = {name: None for name in named if changes.get(name, name) is not None}
                if not complained_of:
                    break
                changes = changes | complained_of
    raise errors[0]


def _build(name: str, kind: str, config: Any, attributes: dict[str, Any]) -> torch.nn.Module:
    cls = KINDS[kind][name]
    cls = getattr(transformers, cls if isinstance(cls, str) else cls[0])
    if not isinstance(config, cls.config_class):  # the head is of one part of a model
        parts = [getattr(config, part, None) for part in config.sub_configs]
        config = next((part for part in parts if isinstance(part, cls.config_class)), config)
    tokens = {name: SIZES[name] for name in SIZES if name.endswith("_token_id")}
    for attribute, value in {**tokens, **attributes}.items():
        if getattr(config, attribute, None) is None or attribute in attributes:
            setattr(config, attribute, value)
    with warnings.catch_warnings(action="ignore"):
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in cls(config).parameters())
        if size > MOST_PARAMETERS:
            raise ValueError(f"its configuration could not be made small: {size / 1e6:.0f} million parameters")
        torch.manual_seed(0)
        result = cls(config)
    return result.float().train()


def _images(*shape: int) -> torch.Tensor:
    return torch.ones(BATCH, *shape, 3, IMAGE, IMAGE)


# Images and the like for models that do nothing without them, tried in turn.
FURTHER_INPUTS: tuple[dict[str, Any], ...] = (
    {},
    {"pixel_values": _images()},
    {"mm_token_type_ids": torch.zeros(BATCH, LENGTH, dtype=torch.int64)},
    {"bbox": torch.zeros(BATCH, LENGTH, 4)},
    {"pixel_values": _images(), "qformer_input_ids": torch.ones(BATCH, LENGTH, dtype=torch.int64)},
    {"pixel_values": _images(2), "qformer_input_ids": torch.ones(BATCH, LENGTH, dtype=torch.int64)},
    {"pixel_values": _images(1), "image_attention_mask": torch.ones(BATCH, LENGTH, 1, dtype=torch.int64)},
    {"pixel_values": _images(), "image_embeds_position_mask": torch.arange(LENGTH).expand(BATCH, -1) < 2},
    {"flattened_patches": torch.ones(BATCH, 16, 2 + 3 * 16 * 16), "attention_mask": torch.ones(BATCH, 16)},
    {  # four codebooks
        "input_ids": torch.full((4 * BATCH, LENGTH), 8),
        "attention_mask": torch.ones(BATCH, LENGTH),
        "labels": torch.full((BATCH, LENGTH, 4), 8),
    },
)


def inputs(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Tokens and labels, a fifth of them ignored, and what else a model needs to run."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(8, VOCAB, (BATCH, LENGTH), generator=generator)
    labels = ids.clone()
    labels[:, ::5] = -100
    given = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids), "use_cache": False}
    accepted = inspect.signature(module.forward).parameters
    errors = []
    for further in FURTHER_INPUTS:
        chosen = {name: value for name, value in (given | further).items() if name in accepted}
        try:
            if module(**chosen).loss is None:
                raise ValueError("it has no loss of tokens")
            return chosen
        except Exception as error:
            errors.append(error)
    raise errors[0]


def without_dropout(module: torch.nn.Module) -> None:
    """Sets every dropout rate of a model to zero, so that two runs do the same."""
    for part in module.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
        for name, value in vars(part).items():
            if isinstance(value, float) and ("drop" in name):
                setattr(part, name, 0.0)

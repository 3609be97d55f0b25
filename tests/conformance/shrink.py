"""Tiny configurations of Transformers' models, made by rules on the names of their fields.

A configuration class has no small variant; its fields have some fifty recurring names. What a rule makes inconsistent
shows when the model is built, and is reported as the reason why a head was not run.
"""

from __future__ import annotations

import contextlib
import re
from typing import Any

VOCABULARY = 64
HIDDEN = 32
HEADS = 4
LAYERS = 2

# The first pattern that matches a field's whole name gives its value; only integers are replaced.
SIZES: tuple[tuple[str, int], ...] = (
    (r"(.*_)?vocab_size(_.*)?", VOCABULARY),
    (r"(num_)?(key_value_heads|kv_heads)|num_key_value_heads|n_head_kv|num_kv_heads", 2),
    (r".*(attention_heads|num_heads|n_heads?|_attn_heads|linear_num_\w*heads)|heads", HEADS),
    (r"head_dim|.*_head_dim|d_kv|attention_head_size|kv_channels", HIDDEN // HEADS),
    (
        r"n_layers?|num_layers|.*_layers|num_hidden_layers|encoder_layers|decoder_layers|depth",
        LAYERS,
    ),
    (
        r"(.*_)?(intermediate_size|ffn_dim|d_ff|n_inner|mlp_dim|ff_dim|ffn_hidden_size)(_.*)?",
        2 * HIDDEN,
    ),
    (
        r"hidden_dim|(.*_)?(hidden_size|d_model|n_embd|embed_dim|embedding_size|dim_model|model_dim|d_embed)|dim|emb_dim",
        HIDDEN,
    ),
    (r"(.*_)?(max_position_embeddings|n_positions|max_seq_len|n_ctx|max_sequence_length)", 64),
    (r"(num_|n_)?(local_|routed_|.*_)?experts", 4),
    (r"(num_)?experts_per_tok(en)?|moe_top_?k|num_selected_experts|top_k_experts", 2),
    (r"n_group|topk_group|n_shared_experts", 1),
    (r"image_size|crop_size", 32),
    (r"patch_size", 8),
    (r"q_lora_rank|kv_lora_rank|.*lora_rank", 16),
    (r"qk_nope_head_dim|qk_rope_head_dim|v_head_dim", 8),
    (r"type_vocab_size", 2),
    (r"num_mel_bins", 16),
    (r"mamba_d_state|state_size|ssm_state_size", 8),
    (r"sliding_window|attention_window|window_size", 16),
)
_RULES = [(re.compile(pattern), value) for pattern, value in SIZES]


def shrink(config: Any) -> Any:
    """Return the configuration itself, made tiny in place with all that it nests; dropout is 0."""
    for name, value in list(vars(config).items()):
        if name.startswith("_"):
            continue
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            shrink(value)
        elif isinstance(value, bool) or value is None:
            continue
        elif isinstance(value, int):
            _set(config, name, _size(name, value))
        elif isinstance(value, float) and re.search(r"drop|layerdrop", name):
            _set(config, name, 0.0)
        elif isinstance(value, list) and name in {"layer_types", "mlp_layer_types", "block_types"}:
            _set(config, name, value[:LAYERS])
        elif (
            isinstance(value, (list, tuple)) and "layers" not in name and name == "attention_window"
        ):
            _set(config, name, [16] * LAYERS)
    return config


def _size(name: str, value: int) -> int:
    if name.endswith(("_token_id", "_token_index", "_idx")):
        # Special tokens keep clear of the words used, 10 and up, and apart where they were apart.
        return value if -1 <= value < VOCABULARY else 3 + value % 5
    for pattern, size in _RULES:
        if pattern.fullmatch(name):
            return min(size, value) if value > 0 else value
    return value


def _set(config: Any, name: str, value: Any) -> None:
    with contextlib.suppress(Exception):
        setattr(config, name, value)

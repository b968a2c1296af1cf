"""A tiny configuration of any architecture of transformers, made from its default one.

Sizes are changed by their names, and of the layer types one layer each is kept. What an architecture needs besides is
given as overrides: `tiny_config("cohere2", sliding_window=6)`.
"""

from __future__ import annotations

import re
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

VOCAB = 71

_NAMES: tuple[tuple[int, str], ...] = (
    (VOCAB, "vocab_size vocab_size_per_layer_input decoder_vocab_size"),
    (32, "hidden_size d_model n_embd embedding_size out_hidden_size word_embed_proj_dim embed_dim emb_dim lru_width"),
    (32, "attention_hidden_size backbone_hidden_size router_hidden_size ple_embed_dim kv_channels"),
    (48, "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim ffn_hidden_size dff dim_ff n_inner"),
    (48, "shared_intermediate_size intermediate_size_mlp dense_intermediate_size prefix_dense_intermediate_size"),
    (16, "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size qk_head_dim"),
    (16, "moe_shared_expert_intermediate_size q_lora_rank kv_lora_rank o_lora_rank hc_lowrank"),
    (8, "head_dim d_kv dim_head linear_key_head_dim linear_value_head_dim linear_head_dim v_head_dim"),
    (8, "qk_nope_head_dim swa_head_dim swa_v_head_dim index_head_dim query_pre_attn_scalar"),
    (8, "state_size mamba_d_state ssm_state_size mamba_n_heads mamba_num_heads mamba_d_head mamba_head_dim"),
    (8, "mamba_headdim hidden_size_per_layer_input attention_chunk_size block_size index_topk index_block_size"),
    (6, "sliding_window sliding_window_size attention_window_size window_size"),
    (4, "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads"),
    (4, "linear_num_value_heads linear_num_heads swa_num_attention_heads attention_heads n_mamba_heads"),
    (4, "num_experts num_local_experts n_routed_experts moe_num_experts laurel_rank gated_norm_rank d_rel"),
    (4, "time_step_rank zero_expert_num mamba_dt_rank qk_rope_head_dim rotary_dim"),
    (2, "num_hidden_layers n_layer n_layers num_layers depth decoder_layers encoder_layers num_layers_per_stack"),
    (2, "num_key_value_heads num_kv_heads swa_num_key_value_heads linear_num_key_heads o_groups"),
    (2, "num_experts_per_tok num_experts_per_token moe_topk moe_k top_k_experts altup_num_inputs"),
    (2, "heads_per_ngram split_ngram_parts patch_size spatial_merge_size temporal_patch_size"),
    (16, "num_position_embeddings image_size ngram_vocab_size_base index_n_heads"),
    (1, "n_groups mamba_n_groups mamba_ngroups n_group topk_group num_mem_blocks n_shared_experts"),
    (1, "num_shared_experts moe_num_shared_experts first_k_dense_replace num_dense_layers num_nextn_predict_layers"),
    (64, "mamba_d_ssm"),
    (512, "max_position_embeddings n_positions n_ctx max_seq_len context_length seq_length model_max_length"),
)
_SIZES = {name: value for value, names in _NAMES for name in names.split()}
_DROPOUT = re.compile("dropout|_pdrop|layerdrop|drop_rate")
_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# Lists of one entry a layer, of which one layer of every kind is kept.
_BY_LAYER = ("layer_types", "mlp_layer_types", "layers_block_type", "indexer_types")


def tiny_config(model_type: str, **overrides: Any) -> PreTrainedConfig:
    """The default configuration of `model_type` with tiny sizes and with dropout; a wrapper's parts are tiny each.

    Args:
        overrides: settings of the model, of a wrapper those of its text model; `outside={...}` are the wrapper's.
    """
    outside = overrides.pop("outside", {})
    cls = CONFIG_MAPPING[model_type]
    if "text_config" not in cls.sub_configs:
        return _tiny(cls, _IDS | overrides)
    default = cls()
    inside = {"text_config": _tiny(type(default.get_text_config()), _IDS | overrides).to_dict()}
    for name in cls.sub_configs:
        part = getattr(default, name, None)
        if name != "text_config" and isinstance(part, PreTrainedConfig):
            inside[name] = _tiny(type(part), {}).to_dict()
    config: PreTrainedConfig = cls(**inside, **_IDS, **outside)
    return config


def _tiny(cls: Any, overrides: dict[str, Any]) -> PreTrainedConfig:
    known = cls().to_dict()
    settings: dict[str, Any] = {}
    for name, value in _SIZES.items():
        given = known.get(cls.attribute_map.get(name, name))
        if isinstance(given, int) and not isinstance(given, bool) and given > 0:
            settings[cls.attribute_map.get(name, name)] = value
    if "kv_lora_rank" in known:  # its keys are made of others, one a head
        settings = {name: value for name, value in settings.items() if name not in ("head_dim", "qk_head_dim")}
        settings["num_key_value_heads"] = settings["num_attention_heads"]
    settings |= {name: 0.3 for name in known if _DROPOUT.search(name) and isinstance(known[name], float | int)}
    settings |= _kinds_of_layers(known, set(overrides))
    settings |= overrides
    config: PreTrainedConfig = cls(**settings)
    return config


def _kinds_of_layers(known: dict[str, Any], overridden: set[str]) -> dict[str, Any]:
    """The per-layer lists with one layer of every kind, at least two."""
    lists = {name: known[name] for name in _BY_LAYER if isinstance(known.get(name), list | tuple) and known[name]}
    if not lists or overridden & {*_BY_LAYER, "num_hidden_layers"}:
        return {}
    layers = list(zip(*lists.values(), strict=False))
    kinds = list(dict.fromkeys(layers))
    kept = kinds if len(kinds) > 1 else kinds * 2
    found: dict[str, Any] = {name: list(values) for name, values in zip(lists, zip(*kept, strict=True), strict=True)}
    return found | {"num_hidden_layers": len(kept)}

"""Tiny random checkpoints of Transformers' decoders, as Transformers saves them."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.3,
    "max_position_embeddings": 512,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
WINDOW = 4
DECODERS = {
    "qwen2": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "qwen3": {"head_dim": 24, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "llama": {"rope_parameters": LLAMA3_ROPE},
    "mistral": {"sliding_window": WINDOW},
    "gemma3_text": {
        "head_dim": 16,
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {"rope_type": "default", "rope_theta": 1e6},
        },
    },
}
EXPERTS = {
    "glm4_moe": {  # with buffers that are part of the checkpoint
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
        "partial_rotary_factor": 0.5,
    },
}
OTHERS = {  # which cannot be adapted
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "falcon": {},
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 2, "rotary_dim": 8},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "gpt_oss": {"num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 16},
}


def write_decoder(
    model_type: str, directory: Path, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype = torch.float32, **changes
) -> Path:
    """An autoregressive checkpoint with the tokenizer beside it, which need not name a mask."""
    ids = {"eos_token_id": [tokenizer.eos_token_id, 7], "vocab_size": len(tokenizer)}
    config = CONFIG_MAPPING[model_type](**SIZES | (DECODERS | EXPERTS | OTHERS)[model_type] | ids | changes)
    torch.manual_seed(5)
    AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory

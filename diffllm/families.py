"""Map checkpoints onto Transformers decoders: config keys, weight names, shift."""

import re
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def switch_off_causality(lm: PreTrainedModel) -> None:
    """Let every position attend to all others, within the window of layers that have one."""
    lm.config.is_causal = False  # read when masks are made
    for module in lm.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = False  # read by attention without a mask


def has_dynamic_rotary(config: PreTrainedConfig) -> bool:
    """Whether rotary embeddings depend on the longest position of a forward, which the host then reads."""
    settings = getattr(config, "rope_parameters", None) or {}
    kinds = [each.get("rope_type", "") for each in (settings, *settings.values()) if isinstance(each, dict)]
    return any("dynamic" in kind or kind == "longrope" for kind in kinds)


def has_window(config: PreTrainedConfig) -> bool:
    """Whether a decoder has layers that attend within a window."""
    settings = config.to_dict()
    kinds = settings.get("layer_types") or ["sliding_attention"]  # without layer types the window is every layer's
    return settings.get("sliding_window") is not None and "sliding_attention" in kinds


class DreamConfig(Qwen2Config):
    model_type = "Dream"


class SDARConfig(Qwen3Config):
    model_type = "sdar"


class FastDLLMConfig(Qwen2Config):
    model_type = "Fast_dLLM_Qwen"


LLADA_KEYS = {
    "d_model": "hidden_size",
    "mlp_hidden_size": "intermediate_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "max_sequence_length": "max_position_embeddings",
    "weight_tying": "tie_word_embeddings",
    "activation_type": "hidden_act",
    "embedding_size": "vocab_size",  # rows of the embedding, at least vocab_size
}
LLADA_REQUIRED = {
    "block_type": "llama",
    "layer_norm_type": "rms",
    "rope": True,
    "alibi": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "attention_layer_norm": False,
    "input_emb_norm": False,
    "scale_logits": False,
}


class LLaDAConfig(LlamaConfig):
    model_type = "llada"

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "LLaDAConfig":
        """Read the published keys, or Transformers' own.

        Raises:
            ValueError: a variant that Llama's decoder lacks.
        """
        for key, value in LLADA_REQUIRED.items():
            if config_dict.get(key, value) != value:
                raise ValueError(f"config.json has {key}={config_dict[key]!r}: only {value!r} is supported for LLaDA")
        own = {key: value for key, value in config_dict.items() if key not in LLADA_KEYS}
        known = {LLADA_KEYS[key]: config_dict[key] for key in LLADA_KEYS if config_dict.get(key) is not None}
        return super().from_dict(own | known, **kwargs)


@dataclass(frozen=True)
class Family:
    """A format of checkpoints.

    `config_keys` and `weight_names` map published to Transformers' names; `{n}` in a weight name is the layer. A model
    that attends by blocks has their length under `block_key`. `defaults` are for keys that a config.json may lack.
    """

    model_class: type[PreTrainedModel]
    config_class: type[PreTrainedConfig]
    shift: bool  # the hidden state of i-1 predicts token i
    architecture: str  # class name in a published config.json
    config_keys: dict[str, str] = field(default_factory=dict)
    weight_names: dict[str, str] = field(default_factory=dict)
    required: dict[str, Any] = field(default_factory=dict)  # published values that the decoder requires
    block_key: str = "block_length"
    defaults: dict[str, Any] = field(default_factory=dict)

    def config(self, published: dict[str, Any]) -> PreTrainedConfig:
        """The Transformers config of a published config.json.

        Raises:
            ValueError: a variant that the Transformers decoder lacks.
        """
        return self.config_class.from_dict({**published, "use_cache": False})

    def published_config(self, shape: dict[str, Any]) -> dict[str, Any]:
        """The config.json of a model from scratch, from its shape by Transformers' names."""
        published_key = {ours: published for published, ours in self.config_keys.items()}
        return {
            "architectures": [self.architecture],
            "model_type": self.config_class.model_type,
            "vocab_size": shape["vocab_size"],
            **self.required,
            **{published_key.get(key, key): value for key, value in shape.items()},
        }

    def published_name(self, name: str) -> str:
        """The published name of a Transformers weight."""
        for published, ours in self.weight_names.items():
            name, count = re.subn(_pattern(ours), published.replace("{n}", r"\1"), name)
            if count:
                break
        return name


def _pattern(name: str) -> str:
    return "^" + re.escape(name).replace(re.escape("{n}"), r"(\d+)") + r"(?=\.)"


_LLADA_BLOCK = {
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "attn_out": "self_attn.o_proj",
    "ff_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "ff_out": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ff_norm": "post_attention_layernorm",
}

FAMILIES: dict[str, Family] = {
    "dream": Family(Qwen2ForCausalLM, DreamConfig, shift=True, architecture="DreamModel"),
    "llada": Family(
        LlamaForCausalLM,
        LLaDAConfig,
        shift=False,
        architecture="LLaDAModelLM",
        config_keys=LLADA_KEYS,
        weight_names={
            "model.transformer.wte": "model.embed_tokens",
            "model.transformer.ln_f": "model.norm",
            "model.transformer.ff_out": "lm_head",
            **{
                f"model.transformer.blocks.{{n}}.{published}": f"model.layers.{{n}}.{ours}"
                for published, ours in _LLADA_BLOCK.items()
            },
        },
        required=LLADA_REQUIRED,
    ),
    # arXiv 2510.06303; the published configurations leave out what the published code has as defaults
    "sdar": Family(
        Qwen3ForCausalLM,
        SDARConfig,
        shift=False,
        architecture="SDARForCausalLM",
        block_key="block_size",
        defaults={"block_size": 4, "mask_token_id": 151669},
    ),
    # arXiv 2509.26328, likewise
    "fast_dllm_v2": Family(
        Qwen2ForCausalLM,
        FastDLLMConfig,
        shift=True,
        architecture="Fast_dLLM_QwenForCausalLM",
        block_key="bd_size",
        defaults={"bd_size": 32, "mask_token_id": 151665},
    ),
}

# Transformers renames the weights of these model types when it reads and writes them.
for _family in FAMILIES.values():
    register_checkpoint_conversion_mapping(
        _family.config_class.model_type,
        [
            WeightRenaming(_pattern(published), ours.replace("{n}", r"\1"))
            for published, ours in _family.weight_names.items()
        ],
    )


def family_of(published: dict[str, Any], source: str) -> Family:
    """The family of a config.json, by its `model_type`.

    Raises:
        ValueError: it is neither Dream, LLaDA nor a causal decoder of Transformers that takes any mask.
    """
    model_type = published.get("model_type")
    for family in FAMILIES.values():
        if family.config_class.model_type == model_type:
            if (architectures := published.get("architectures")) not in (None, [family.architecture]):
                raise ValueError(
                    f"{source}: config.json has architectures={architectures}: only {family.architecture} is supported "
                    f"for model_type={model_type!r}; others shift, attend or route differently"
                )
            return family
    if (family := _decoder_family(model_type)) is None:
        names = ", ".join(family.config_class.model_type for family in FAMILIES.values())
        raise ValueError(
            f"{source}: config.json has model_type={model_type!r}, which is no diffusion family ({names}) and no "
            "causal decoder of Transformers, such as qwen2, qwen3, llama, mistral or gemma3_text; encoder-decoders "
            "and multimodal models cannot be adapted"
        )
    if not family.model_class._supports_sdpa:
        raise ValueError(
            f"{source}: {family.architecture} of Transformers has no sdpa attention, which takes any mask; it cannot "
            "be adapted"
        )
    return family


@lru_cache
def _decoder_family(model_type: str | None) -> Family | None:
    """Family of a causal decoder of Transformers. It shifts: it was trained to predict the next token."""
    architecture = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type, "")
    if not architecture.endswith("ForCausalLM"):
        return None
    config_class = CONFIG_MAPPING[model_type]
    if config_class.sub_configs or config_class.is_encoder_decoder:
        return None
    return Family(MODEL_FOR_CAUSAL_LM_MAPPING[config_class], config_class, shift=True, architecture=architecture)

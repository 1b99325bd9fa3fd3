"""How the published families map onto Transformers decoders: configuration keys, weight names, shift."""

import re
from dataclasses import dataclass, field
from typing import Any

from transformers import (
    AutoConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)


class DreamConfig(Qwen2Config):
    model_type = "Dream"


class LLaDAConfig(LlamaConfig):
    model_type = "llada"


@dataclass(frozen=True)
class Family:
    """One published format.

    `config_keys` and `weight_names` are tables published → Transformers; `{n}` in a weight name is the layer.
    """

    model_class: type[PreTrainedModel]
    config_class: type[PreTrainedConfig]
    shift: bool  # token i is predicted from the hidden state of i-1
    architecture: str  # the class name in a published config.json
    config_keys: dict[str, str] = field(default_factory=dict)
    weight_names: dict[str, str] = field(default_factory=dict)
    required: dict[str, Any] = field(default_factory=dict)  # published values without which the decoder would differ

    def config(self, published: dict[str, Any]) -> PreTrainedConfig:
        """The Transformers config of a published config.json, causality off.

        Raises:
            ValueError: the config asks for a variant that the Transformers decoder does not have.
        """
        for key, value in self.required.items():
            if published.get(key, value) != value:
                raise ValueError(
                    f"config.json has {key}={published[key]!r}: only {value!r} is supported for {self.architecture}"
                )
        known = {self.config_keys.get(key, key): value for key, value in published.items() if value is not None}
        return self.config_class.from_dict({**known, "is_causal": False, "use_cache": False})

    def published_config(self, shape: dict[str, Any]) -> dict[str, Any]:
        """The config.json of a model made from scratch, from Transformers' names for its shape."""
        published_key = {ours: published for published, ours in self.config_keys.items()}
        return {
            "architectures": [self.architecture],
            "model_type": self.config_class.model_type,
            **self.required,
            **{published_key.get(key, key): value for key, value in shape.items()},
        }

    def loading_names(self) -> dict[str, str]:
        """Regular expressions published → Transformers, as `from_pretrained(key_mapping=…)` takes them."""
        return {_pattern(published): ours.replace("{n}", r"\1") for published, ours in self.weight_names.items()}

    def published_name(self, name: str) -> str:
        """A Transformers weight name as the published checkpoint calls it."""
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
        config_keys={
            "d_model": "hidden_size",
            "mlp_hidden_size": "intermediate_size",
            "n_layers": "num_hidden_layers",
            "n_heads": "num_attention_heads",
            "n_kv_heads": "num_key_value_heads",
            "max_sequence_length": "max_position_embeddings",
            "weight_tying": "tie_word_embeddings",
            "activation_type": "hidden_act",
        },
        weight_names={
            "model.transformer.wte": "model.embed_tokens",
            "model.transformer.ln_f": "model.norm",
            "model.transformer.ff_out": "lm_head",
            **{
                f"model.transformer.blocks.{{n}}.{published}": f"model.layers.{{n}}.{ours}"
                for published, ours in _LLADA_BLOCK.items()
            },
        },
        required={
            "block_type": "llama",
            "layer_norm_type": "rms",
            "rope": True,
            "alibi": False,
            "include_bias": False,
            "include_qkv_bias": False,
            "attention_layer_norm": False,
            "input_emb_norm": False,
            "scale_logits": False,
        },
    ),
}

for _family in FAMILIES.values():
    AutoConfig.register(_family.config_class.model_type, _family.config_class)


def family_of(published: dict[str, Any], source: str) -> Family:
    """The family that a config.json belongs to, by its `model_type`.

    Raises:
        ValueError: no family has that `model_type`.
    """
    by_model_type = {family.config_class.model_type: family for family in FAMILIES.values()}
    model_type = published.get("model_type")
    if model_type not in by_model_type:
        raise ValueError(
            f"{source}: config.json has model_type={model_type!r}, which is no diffusion family: "
            f"expected one of {', '.join(by_model_type)}"
        )
    return by_model_type[model_type]

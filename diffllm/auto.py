"""Register the families with Transformers' Auto classes, which then need no remote code."""

from dataclasses import replace
from typing import Any

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
)

from diffllm.checkpoint_source import CheckpointSource
from diffllm.dream_api import DiffusionGeneration
from diffllm.families import FAMILIES, DreamConfig, LLaDAConfig, switch_off_causality
from diffllm.modeling_diffllm import DiffLLM


class DiffusionMixin(DiffusionGeneration):
    """Attend in both directions, and generate by unmasking."""

    def __init__(self, config: Any):
        super().__init__(config)
        switch_off_causality(self)

    def denoiser(self) -> DiffLLM:
        """Return a `DiffLLM` around this model, not a copy.

        Raises:
            ValueError: its config has no mask or end-of-sequence token.
        """
        family = next(family for family in FAMILIES.values() if isinstance(self.config, family.config_class))
        source = CheckpointSource(self.name_or_path, self.config.to_dict(), family)
        source.check_ids()
        embeddings = self.get_input_embeddings()
        padding = embeddings.padding_idx
        model = DiffLLM(self, replace(source, name=None))
        embeddings.padding_idx = padding  # `DiffLLM` clears it, but this model may be trained further
        return model


class DreamModel(DiffusionMixin, Qwen2ForCausalLM):
    """Dream with its head, by the name in its config.json."""

    config_class = DreamConfig


class LLaDAModelLM(DiffusionMixin, LlamaForCausalLM):
    """LLaDA with its head, by the name in its config.json."""

    config_class = LLaDAConfig


class DreamTokenizer(Qwen2Tokenizer):
    """Dream's tokenizer, by the name in its tokenizer_config.json."""


for _model in (DreamModel, LLaDAModelLM):
    AutoConfig.register(_model.config_class.model_type, _model.config_class)
    for _auto in (AutoModel, AutoModelForCausalLM):
        _auto.register(_model.config_class, _model)
AutoTokenizer.register(DreamConfig, DreamTokenizer)

"""Diffusion language models: forward process, loss, families and the model itself."""

import data.terminal  # noqa: F401 — first, see there
import diffllm.auto  # noqa: F401 — registers the families with Transformers
from diffllm.config import DiffusionConfig, ModelConfig
from diffllm.loading import load_model, new_model
from diffllm.modeling_diffllm import DiffLLM
from diffllm.noise import ForwardProcess

__all__ = ["DiffLLM", "DiffusionConfig", "ForwardProcess", "ModelConfig", "load_model", "new_model"]

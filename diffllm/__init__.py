"""Diffusion language models: objectives, families and the model itself."""

import data.terminal  # noqa: F401 — first: see its docstring
import diffllm.auto  # noqa: F401 — registers the families with Transformers
from diffllm.config import ModelConfig
from diffllm.diffusion.masked import DiffusionConfig, MaskedDiffusion
from diffllm.loading import load_model, new_model
from diffllm.modeling_diffllm import DiffLLM

__all__ = ["DiffLLM", "DiffusionConfig", "MaskedDiffusion", "ModelConfig", "load_model", "new_model"]

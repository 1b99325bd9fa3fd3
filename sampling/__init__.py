"""The reverse process, on any model that gives logits."""

from sampling.batch import Denoiser
from sampling.cache import CanvasCache
from sampling.canvas import Canvas, Tokens, left_pad, trim
from sampling.config import SamplingConfig
from sampling.filling import Filling
from sampling.reverse import Filled, LogitsHook, SampleOutput, TokensHook, fill, sample

__all__ = [
    "Canvas",
    "CanvasCache",
    "Denoiser",
    "Filled",
    "Filling",
    "LogitsHook",
    "SampleOutput",
    "SamplingConfig",
    "Tokens",
    "TokensHook",
    "fill",
    "left_pad",
    "sample",
    "trim",
]

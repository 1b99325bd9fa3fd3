"""The reverse process, on any model that gives logits."""

from sampling.batch import Denoiser
from sampling.cache import CanvasCache
from sampling.canvas import Canvas, Tokens, ids_without_token, left_pad, trim
from sampling.config import SamplingConfig
from sampling.filling import Filling
from sampling.infill import Infilled, Template, infill, infill_templates
from sampling.likelihood import Choice, Score, choose, score, score_positions
from sampling.reverse import Filled, LogitsHook, SampleOutput, TokensHook, fill, sample

__all__ = [
    "Canvas",
    "CanvasCache",
    "Choice",
    "Denoiser",
    "Filled",
    "Filling",
    "Infilled",
    "LogitsHook",
    "SampleOutput",
    "SamplingConfig",
    "Score",
    "Template",
    "Tokens",
    "TokensHook",
    "choose",
    "fill",
    "ids_without_token",
    "infill",
    "infill_templates",
    "left_pad",
    "sample",
    "score",
    "score_positions",
    "trim",
]

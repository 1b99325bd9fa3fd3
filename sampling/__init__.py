"""The reverse process, for any model that gives logits."""

import signal
import sys

if sys.argv[:1] == ["-m"] and "sampling.render" in sys.orig_argv:  # no traceback while the imports run, for seconds
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from sampling.batch import Denoiser
from sampling.cache import CanvasCache, with_cache
from sampling.canvas import Canvas, Tokens, ids_without_token, left_pad, trim
from sampling.config import SamplingConfig
from sampling.events import StepEvent
from sampling.infill import Infilled, Template, infill, infill_templates
from sampling.likelihood import Choice, Score, choose, score, score_positions
from sampling.row_state import RowState
from sampling.sampler import LogitsHook, SampledRow, SampleOutput, Sampler, TokensHook, fill, sample
from sampling.transfer import to_device
from sampling.visibility import Visibility

Filled, Filling = SampledRow, RowState  # their former names, for one version

__all__ = [
    "Canvas",
    "CanvasCache",
    "Choice",
    "Denoiser",
    "Infilled",
    "LogitsHook",
    "RowState",
    "SampleOutput",
    "SampledRow",
    "Sampler",
    "SamplingConfig",
    "Score",
    "StepEvent",
    "Template",
    "Tokens",
    "TokensHook",
    "Visibility",
    "choose",
    "fill",
    "ids_without_token",
    "infill",
    "infill_templates",
    "left_pad",
    "sample",
    "score",
    "score_positions",
    "to_device",
    "trim",
    "with_cache",
]

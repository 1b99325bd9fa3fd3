"""The reverse process, on any model that gives logits."""

from sampling.canvas import left_pad, trim
from sampling.config import SamplingConfig
from sampling.reverse import Denoiser, SampleOutput, sample

__all__ = ["Denoiser", "SampleOutput", "SamplingConfig", "left_pad", "sample", "trim"]

"""Logits that are no numbers end the sampling of every kind."""

import pytest
import torch

from sampling import Canvas, SamplingConfig, fill, score
from tests.sampling.models import MASK, SPECIAL, MockDenoiser


class Broken(MockDenoiser):
    """One logit of one position is `value`."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def head(self, hidden):
        logits = hidden.clone()
        logits[-1, 3] = self.value
        return logits


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"alg": "maskgit_plus", "transfer": "threshold"},
        {"alg": "topk_margin", "temperature": 0.5, "top_p": 0.9},
        {"alg": "origin", "temperature": 0.5, "top_k": 4, "confidence": "scaled"},
        {"alg": "left_to_right", "cfg_scale": 1.0},
    ],
    ids=lambda settings: settings.get("alg", "default"),
)
def test_sampling_refuses_them(settings, value):
    canvas = Canvas([1, 2, MASK, MASK, MASK], prompt_length=2, row_id=0)
    with pytest.raises(FloatingPointError, match=r"not finite.*launch\.verify"):
        list(fill(Broken(value), [canvas], SamplingConfig(**settings), SPECIAL))


def test_a_bound_refuses_them():
    with pytest.raises(FloatingPointError, match="not finite"):
        score(Broken(torch.nan), [1, 2], [4, 5, 6], SPECIAL, samples=4)

"""Tokens, confidences and priorities against their definitions."""

import math

import pytest
import torch

from sampling import SamplingConfig
from sampling.confidence import confidence, inverse_cdf, priority, propose, warp

PROBS = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.8, 0.1]])


def test_confidences_are_what_their_papers_say():
    tokens = torch.tensor([1, 1])
    assert confidence(PROBS, tokens, "maskgit_plus").tolist() == pytest.approx([0.3, 0.8])
    assert confidence(PROBS, tokens, "topk_margin").tolist() == pytest.approx([0.2, 0.7])
    negative_entropy = [sum(p * math.log(p) for p in row) for row in PROBS.tolist()]
    assert confidence(PROBS, tokens, "entropy").tolist() == pytest.approx(negative_entropy)
    assert confidence(PROBS, tokens, "origin").tolist() == [0, 0]


def test_confidence_ignores_temperature_unless_scaled():
    logits = PROBS.log()
    uniforms = torch.tensor([0.1, 0.5])
    settings = {"alg": "maskgit_plus", "temperature": 0.01, "top_p": 0.9}
    _, unscaled = propose(logits, uniforms, SamplingConfig(**settings))
    _, scaled = propose(logits, uniforms, SamplingConfig(**settings, confidence="scaled"))
    assert unscaled.tolist() == pytest.approx([0.5, 0.8])
    assert scaled.tolist() == pytest.approx([1.0, 1.0])


def test_top_p_and_top_k_drop_the_tail():
    logits = PROBS.log()
    assert (warp(logits, SamplingConfig(top_p=0.6)) > -torch.inf).tolist() == [
        [True, True, False],
        [False, True, False],
    ]
    assert (warp(logits, SamplingConfig(top_k=1)) > -torch.inf).tolist() == [[True, False, False], [False, True, False]]


def test_draws_follow_the_distribution():
    """100,000 draws: each frequency lies within 5 standard errors, a false alarm once in 600,000 runs."""
    n = 100_000
    uniforms = torch.rand(n, generator=torch.Generator().manual_seed(0))
    tokens = inverse_cdf(PROBS[:1].expand(n, 3), uniforms)
    for token, p in enumerate(PROBS[0].tolist()):
        assert abs((tokens == token).float().mean().item() - p) < 5 * math.sqrt(p * (1 - p) / n)


def test_dropped_tokens_are_never_drawn():
    probs = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]]).expand(4, 5)
    uniforms = torch.tensor([0.0, 0.499999, 0.5, 1 - 2**-24])
    assert inverse_cdf(probs, uniforms).tolist() == [1, 1, 3, 3]


def test_alg_temp_samples_positions_by_their_confidence():
    """The first position of 20,000 orders follows softmax(confidence/alg_temp) within 5 standard errors."""
    n, scores = 20_000, torch.tensor([0.9, 0.5, 0.1])
    uniforms = torch.rand(n, 3, generator=torch.Generator().manual_seed(0))
    config = SamplingConfig(alg="maskgit_plus", alg_temp=0.5)
    first = torch.stack([priority(scores, row, config) for row in uniforms]).argmax(-1)
    for position, p in enumerate((scores / 0.5).softmax(-1).tolist()):
        assert abs((first == position).float().mean().item() - p) < 5 * math.sqrt(p * (1 - p) / n)

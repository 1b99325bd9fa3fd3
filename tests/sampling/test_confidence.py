"""Tokens, confidences and priorities against their definitions."""

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import TopKLogitsWarper, TopPLogitsWarper

from sampling import SamplingConfig
from sampling.confidence import inverse_cdf, priority, propose, support

PROBS = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.8, 0.1]])
UNIFORMS = torch.tensor([0.1, 0.5])


def rated(alg, **changes):
    return propose(PROBS.log(), None, SamplingConfig(alg=alg, **changes))


def test_confidences_are_what_their_papers_say():
    assert rated("maskgit_plus").confidence.tolist() == pytest.approx([0.5, 0.8])
    assert rated("topk_margin").confidence.tolist() == pytest.approx([0.2, 0.7])
    negative_entropy = [sum(p * math.log(p) for p in row) for row in PROBS.tolist()]
    assert rated("entropy").confidence.tolist() == pytest.approx(negative_entropy)
    assert rated("origin").confidence.tolist() == [0, 0]
    assert rated("maskgit_plus", transfer="entropy_bound").entropy.tolist() == pytest.approx(
        [-h for h in negative_entropy]
    )


def test_tokens_with_no_probability_add_nothing_to_the_entropy():
    logits = torch.tensor([[0.0, -torch.inf, 0.0]])
    assert propose(logits, None, SamplingConfig(alg="entropy")).entropy.item() == pytest.approx(math.log(2))


def test_confidence_ignores_temperature_unless_scaled():
    settings = {"alg": "maskgit_plus", "temperature": 0.01, "top_p": 0.9}
    unscaled = propose(PROBS.log(), UNIFORMS, SamplingConfig(**settings))
    scaled = propose(PROBS.log(), UNIFORMS, SamplingConfig(**settings, confidence="scaled"))
    assert unscaled.tokens.tolist() == scaled.tokens.tolist() == [0, 1]
    assert unscaled.confidence.tolist() == pytest.approx([0.5, 0.8])
    assert scaled.confidence.tolist() == pytest.approx([1.0, 1.0])


@settings(max_examples=60, deadline=None)
@example(seed=228, size=64, scale=8.0, temperature=2.0, top_p=0.999, top_k=None)
@given(
    seed=st.integers(0, 1000),
    size=st.sampled_from([5, 63, 64, 65, 300, 1000]),
    scale=st.sampled_from([0.05, 1.0, 8.0]),
    temperature=st.sampled_from([0.0, 0.5, 2.0]),
    top_p=st.sampled_from([None, 0.1, 0.9, 0.999]),
    top_k=st.sampled_from([None, 1, 7, 2000]),
)
def test_what_may_be_drawn_is_what_a_sort_of_the_vocabulary_gives(seed, size, scale, temperature, top_p, top_k):
    """Transformers' warpers, which sort it, in the published order; what rounding decides may be drawn or not."""
    logits = torch.randn(3, size, generator=torch.Generator().manual_seed(seed)) * scale
    expected = logits / (temperature or 1.0)
    if top_p is not None:
        expected = TopPLogitsWarper(top_p)(None, expected)
    if top_k is not None:
        expected = TopKLogitsWarper(min(top_k, size))(None, expected)
    values, ids = support(logits, SamplingConfig(temperature=temperature, top_p=top_p, top_k=top_k))
    ids = torch.arange(size).expand(3, -1) if ids is None else ids
    found = torch.full_like(logits, -torch.inf).scatter(1, ids, values)
    p, order = (logits / (temperature or 1.0)).double().softmax(-1).sort(descending=True)
    before = torch.empty_like(p).scatter(1, order, p.cumsum(-1) - p)
    rounded = (before - (top_p or 2.0)).abs() < 1e-6
    torch.testing.assert_close(found.masked_fill(rounded, 0), expected.masked_fill(rounded, 0))


def test_draws_follow_the_distribution():
    """100,000 draws: each frequency lies within 5 standard errors, a false alarm once in 600,000 runs."""
    n = 100_000
    uniforms = torch.rand(n, generator=torch.Generator().manual_seed(0))
    tokens = inverse_cdf(PROBS[:1].log().expand(n, 3), uniforms)
    for token, p in enumerate(PROBS[0].tolist()):
        assert abs((tokens == token).float().mean().item() - p) < 5 * math.sqrt(p * (1 - p) / n)


def test_dropped_tokens_are_never_drawn():
    probs = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]]).expand(4, 5)
    uniforms = torch.tensor([0.0, 0.499999, 0.5, 1 - 2**-24])
    assert inverse_cdf(probs.log(), uniforms).tolist() == [1, 1, 3, 3]


def test_alg_temp_samples_positions_by_their_confidence():
    """The first position of 20,000 orders follows softmax(confidence/alg_temp) within 5 standard errors."""
    n, scores = 20_000, np.array([0.9, 0.5, 0.1])
    uniforms = np.random.default_rng(0).random((n, 3))
    config = SamplingConfig(alg="maskgit_plus", alg_temp=0.5)
    first = np.stack([priority(scores, row, config) for row in uniforms]).argmax(-1)
    for position, p in enumerate(np.exp(scores / 0.5) / np.exp(scores / 0.5).sum()):
        assert abs((first == position).mean() - p) < 5 * math.sqrt(p * (1 - p) / n)

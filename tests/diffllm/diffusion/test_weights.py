"""CART as two scans against its definition."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffllm import DiffusionConfig
from diffllm.diffusion.weights import cart_weights, time_weights


def by_definition(context: list[bool], p: float) -> list[float]:
    return [
        sum(0.5 * p * (1 - p) ** (abs(i - j) - 1) for j in range(len(context)) if context[j] and j != i)
        for i in range(len(context))
    ]


@settings(deadline=None)
@given(
    context=st.lists(st.booleans(), min_size=1, max_size=150),
    p=st.floats(0.01, 1.0),
)
def test_cart_equals_its_sum(context, p):
    expected = torch.tensor(by_definition(context, p), dtype=torch.float)
    torch.testing.assert_close(cart_weights(torch.tensor([context]), p)[0], expected, rtol=1e-5, atol=1e-6)


def test_p_one_counts_the_direct_neighbours():
    context = torch.tensor([[True, False, True, True]])
    assert cart_weights(context, 1.0).tolist() == [[0.0, 1.0, 0.5, 0.5]]


def test_padding_and_masked_positions_are_no_context():
    attended = torch.tensor([[False, True, True, True]])
    masked = torch.tensor([[False, False, True, False]])
    weights = time_weights(torch.tensor([[0.5]]), masked, attended, "cart", cart_p=1.0)
    assert weights.tolist() == [[0, 0, 1.0, 0]]


@pytest.mark.parametrize(("kind", "weight"), [("none", 1.0), ("original", 4.0), ("linear", 0.75)])
def test_weights_by_time(kind, weight):
    masked = torch.tensor([[True, False]])
    weights = time_weights(torch.tensor([[0.25]]), masked, masked | True, kind, cart_p=0.1)
    assert weights.tolist() == [[weight, 0.0]]


@pytest.mark.parametrize(
    ("field", "value"),
    [("cart_p", 0.0), ("cart_p", 1.5), ("time_reweighting", "carts"), ("loss_norm", "token"), ("t_sampler", "grid"),
     ("eps", 1.0), ("token_reweighting_alpha", -1.0)],
)  # fmt: skip
def test_settings_outside_their_range_are_named(field, value):
    with pytest.raises(ValueError, match=f"diffusion.{field}={value}"):
        DiffusionConfig(**{field: value})

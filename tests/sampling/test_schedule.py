"""Number of committed tokens."""

import math

import numpy as np
import pytest

from sampling import SamplingConfig
from sampling.schedule import scheduled, select_adaptive, share_steps


def commits(n, steps, transfer):
    left, counts, config = n, [], SamplingConfig(transfer=transfer)
    for step in range(steps):
        counts.append(scheduled(config, step, steps, n, left))
        left -= counts[-1]
    assert left == 0
    return counts


def test_even_spreads_the_remainder_over_the_first_steps():
    assert commits(8, 3, "even") == [3, 3, 2]
    assert commits(3, 5, "even") == [1, 1, 1, 0, 0]


def test_linear_commits_the_share_of_the_time_step():
    assert commits(24, 8, "linear")[:2] == [2, 3]  # int(24 · 0.999/8), then int(22 · (0.999/8) / (1 - 0.999/8))
    assert commits(7, 1, "linear") == [7]


def test_cosine_commits_few_tokens_first():
    """The masked share after step i of 10 is near cos(π/2 · i/10)."""
    left = 1000 - np.cumsum(commits(1000, 10, "cosine"))
    expected = [1000 * math.cos(math.pi / 2 * i / 10) for i in range(1, 11)]
    assert left[:-1].tolist() == pytest.approx(expected[:-1], abs=10)


def test_steps_are_shared_out_over_blocks():
    assert share_steps(9, [4, 4, 4]) == [3, 3, 3]
    assert share_steps(8, [4, 4, 4]) == [3, 3, 2]
    assert share_steps(2, [4, 4, 4]) == [1, 1, 1]
    assert share_steps(9, [1, 16, 1]) == [1, 8, 1]
    assert share_steps(60, [2, 16]) == [7, 53]


P = np.array([0.5, 0.99, 0.7, 0.95])
ORDER = np.array([1, 3, 2, 0])


def chosen(entropy=None, p=P, **changes):
    return sorted(
        select_adaptive(SamplingConfig(**changes), ORDER, p, np.zeros(4) if entropy is None else entropy).tolist()
    )


def test_threshold_commits_all_above_and_at_least_one():
    assert chosen(transfer="threshold", threshold=0.7) == [1, 2, 3]
    assert chosen(transfer="threshold", threshold=1.0) == [1]


def test_factor_bounds_n_plus_one_times_what_is_unsure():
    """2·0.01, 3·0.05, 4·0.3, 5·0.5 are 0.02, 0.15, 1.2, 2.5."""
    for factor, expected in ((0.01, [1]), (0.1, [1]), (0.2, [1, 3]), (1.5, [1, 2, 3]), (3.0, [0, 1, 2, 3])):
        assert chosen(transfer="factor", factor=factor) == expected


def test_entropy_bound_counts_all_but_the_largest():
    """In order the entropies are 0.1, 0.2, 0.4, 0.8; Σ - max is 0, 0.1, 0.3, 0.7."""
    entropy = np.array([0.8, 0.1, 0.4, 0.2])
    for bound, expected in ((0.05, [1]), (0.15, [1, 3]), (0.35, [1, 2, 3]), (1.0, [0, 1, 2, 3])):
        assert chosen(entropy, transfer="entropy_bound", entropy_bound=bound) == expected

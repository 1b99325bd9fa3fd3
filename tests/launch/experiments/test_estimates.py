"""Means over seeds with their intervals."""

import pytest

from launch.experiments.estimates import estimate


def test_the_interval_is_students():
    """For 1, 2, 3: standard deviation 1, and 4.3027 is the 97.5 % quantile with two degrees of freedom."""
    found = estimate([1.0, 2.0, 3.0])
    assert (found.mean, found.count) == (2.0, 3)
    assert found.half == pytest.approx(4.3027 / 3**0.5, rel=1e-4)
    assert str(found) == "2 ± 2.5"


def test_one_value_has_no_interval():
    assert estimate([0.25]) == (0.25, None, 1)
    assert str(estimate([0.25])) == "0.25"

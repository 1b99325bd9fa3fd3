"""Fronts and their picture."""

import pytest

from launch.pareto import Point, draw, front


def point(name: str, accuracy: float, speed: float, nfe: float) -> Point:
    return Point((name, "x", "3"), accuracy, (max(0, accuracy - 0.1), min(1, accuracy + 0.1)), speed, nfe)


POINTS = [
    point("slow and good", 0.9, 10, 8),
    point("dominated", 0.8, 9, 8),
    point("as slow", 0.7, 10, 9),
    point("fast", 0.6, 1000, 2),
    point("as fast", 0.6, 1000, 2),
    point("few forwards", 0.5, 1, 1),
]


@pytest.mark.parametrize(
    ("axis", "names"),
    [
        ("tokens_per_second", ["fast", "as fast", "slow and good"]),
        ("nfe", ["few forwards", "fast", "as fast", "slow and good"]),
    ],
)
def test_no_other_point_is_better_than_those_of_the_front(axis, names):
    assert [each.values[0] for each in front(POINTS, axis)] == names


@pytest.mark.parametrize(
    ("points", "names"),
    [
        (POINTS, ["alg", "transfer", "steps"]),
        ([Point((), 0.0, (0.0, 0.3), 0.0, 1.0)], []),
        ([Point((str(i),), i / 20, (0.0, 1.0), 1.0, 1.0) for i in range(20)], ["steps"]),
        ([Point(("$" + "a" * 300 + "^$",), 0.5, (0.4, 0.6), 1.0, 1.0)], ["stop"]),
    ],
    ids=["several", "one", "many values", "no room for a label"],
)
def test_pictures_of_few_and_many_points(points, names):
    assert draw(points, names, "M on equations").startswith(b"\x89PNG")

"""Visibility: the positions that a position sees."""

import pytest
import torch

from sampling import Visibility

ATTENDED = torch.tensor([[True, True, True, True], [False, True, True, True]])
DOCUMENT = torch.tensor([[0, 0, 1, 1], [0, 0, 0, 1]])
BLOCK = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 2]])
PAIRS = torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(0)) < 0.5


def by_pair(attended=None, document=None, block=None, pairs=None):
    """The definition, one pair of positions after the other."""
    visible = torch.ones(2, 4, 4, dtype=torch.bool)
    for b, i, j in torch.cartesian_prod(torch.arange(2), torch.arange(4), torch.arange(4)).tolist():
        visible[b, i, j] &= attended is None or attended[b, j]
        visible[b, i, j] &= document is None or document[b, i] == document[b, j]
        visible[b, i, j] &= block is None or block[b, j] <= block[b, i]
        visible[b, i, j] &= pairs is None or pairs[b, i, j]
    return visible


@pytest.mark.parametrize(
    "conditions",
    [
        {"attended": ATTENDED},
        {"document": DOCUMENT},
        {"block": BLOCK},
        {"pairs": PAIRS},
        {"attended": ATTENDED, "document": DOCUMENT, "block": BLOCK, "pairs": PAIRS},
    ],
    ids="+".join,
)
def test_all_conditions_hold(conditions):
    expected, visibility = by_pair(**conditions), Visibility(**conditions)
    columns = torch.tensor([[3, 1], [2, 0]])
    rows = torch.tensor([1])
    assert torch.equal(visibility.dense().expand(2, 4, 4), expected)
    looking = torch.stack([row[at] for row, at in zip(expected, columns, strict=True)])
    assert torch.equal(visibility.dense(columns).expand(2, 2, 4), looking)
    assert torch.equal(visibility.rows(rows).dense().expand(1, 4, 4), expected[rows])


def test_without_conditions_all_is_seen():
    assert Visibility().dense() is None


def test_the_left_neighbour_is_within_the_row_and_the_document():
    row, column = torch.tensor([0, 0, 1, 1, 1]), torch.tensor([0, 2, 1, 2, 3])
    assert Visibility().left_neighbour(row, column).tolist() == [0, 1, 0, 1, 2]
    assert Visibility(attended=ATTENDED).left_neighbour(row, column).tolist() == [0, 1, 1, 1, 2]
    assert Visibility(document=DOCUMENT).left_neighbour(row, column).tolist() == [0, 2, 0, 1, 3]

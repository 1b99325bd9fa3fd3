"""A fingerprint depends on the rows, not on where they are stored."""

import numpy as np
import pyarrow as pa

from data import TokenRows
from tests.data.batches import make_rows


def test_the_fingerprint_tells_rows_apart():
    same, longer, moved = (make_rows([3, 4], lengths) for lengths in ([2, 2], [2, 3], [3, 1]))
    assert same.fingerprint() == make_rows([3, 4], [2, 2]).fingerprint()
    assert len({rows.fingerprint() for rows in (same, longer, moved)}) == 3


def test_the_fingerprint_is_of_the_rows_chosen_and_not_of_where_they_are_kept():
    whole = TokenRows(pa.concat_tables([make_rows([3, 5], [4, 2]).table, make_rows([2], [6]).table]))
    assert whole.select(np.arange(3)).fingerprint() == whole.fingerprint()
    assert whole.select(np.array([0, 1])).fingerprint() == make_rows([3, 5], [4, 2]).fingerprint()
    assert whole.select(np.array([1, 0, 2])).fingerprint() != whole.fingerprint()

"""Canvases, and the batches made of them."""

from sampling import Canvas, SamplingConfig, Visibility, left_pad, trim
from sampling.batch import RowBatch
from sampling.row_state import RowState
from tests.sampling.models import MASK, SPECIAL, MockDenoiser


def batch_of(*canvases):
    config = SamplingConfig()
    batch = RowBatch(MockDenoiser(), config, SPECIAL)
    batch.set_rows([RowState(canvas, config, SPECIAL) for canvas in canvases])
    return batch


def test_ragged_rows_are_right_aligned():
    batch = batch_of(Canvas.after([5, 6, 7], 2, MASK), Canvas.after([8], 2, MASK))
    [x] = batch._views()
    assert x.tolist() == [[5, 6, 7, MASK, MASK], [MASK, MASK, 8, MASK, MASK]]
    assert batch.visibility.attended.tolist() == [[True] * 5, [False, False, True, True, True]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4], [1, 1, 0, 1, 2]]


def test_without_padding_there_is_no_mask():
    batch = batch_of(Canvas.after([1], 2, MASK))
    assert batch.visibility == Visibility()
    assert batch.position_ids.tolist() == [[0, 1, 2]]


def test_left_pad():
    input_ids, attention_mask = left_pad([[5, 6, 7], [8]], pad_token_id=0)
    assert input_ids.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert attention_mask.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_trim_stops_before_the_first_eos():
    assert trim([3, 4, 9, 5, 9], [9]) == [3, 4]
    assert trim([3, 4], [9]) == [3, 4]

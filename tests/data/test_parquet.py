"""A small file cannot fill the memory: a row that is too large is bad before it becomes Python objects."""

import tracemalloc
from contextlib import contextmanager

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from data.chat import MAX_TEXT
from data.errors import BadRows
from data.files import iterate, read_rows
from tests.conftest import no_longer_than

BIG = "a" * 10_000_000
MEMORY = 2**28  # bytes, of Arrow and of Python


@contextmanager
def in_little_memory():
    default = pa.default_memory_pool()
    pa.set_memory_pool(pool := pa.proxy_memory_pool(default))
    tracemalloc.start()
    try:
        yield
        assert pool.max_memory() < MEMORY
        assert tracemalloc.get_traced_memory()[1] < MEMORY
    finally:
        tracemalloc.stop()
        pa.set_memory_pool(default)


def repeated(value, count):
    """An array that holds a value once, for all its rows."""
    return pa.DictionaryArray.from_arrays(pa.array([0] * count, pa.int32()), pa.array([value]))


def in_one_list(values):
    return pa.ListArray.from_arrays(pa.array([0, len(values)], pa.int32()), values)


def in_lists(values):
    return pa.ListArray.from_arrays(pa.array(range(len(values) + 1), pa.int32()), values)


def in_struct(values):
    return pa.StructArray.from_arrays([values], ["content"])


TEXT, BYTES = "'extra' has a text of 10,000,000 characters", "bytes, more than 16,777,216"
DELTA = {"use_dictionary": False, "column_encoding": {"question": "PLAIN", "extra": "DELTA_BYTE_ARRAY"}}


@pytest.mark.parametrize(
    ("extra", "written", "reason"),
    [
        (repeated(BIG, 400), {"compression": "snappy"}, TEXT),
        (repeated(BIG, 400), {"compression": "zstd", "store_schema": False}, TEXT),
        (repeated(BIG * 2, 400).cast(pa.dictionary(pa.int32(), pa.binary())), {}, BYTES),
        (in_struct(repeated(BIG, 400)), {}, TEXT),
        (in_lists(in_struct(repeated(BIG, 400))), {"compression": "zstd"}, TEXT),
        (in_one_list(repeated("a" * 10_000, 200_000)), {}, BYTES),
        (in_one_list(pa.array([1] * 4_000_000)), {"compression": "zstd"}, BYTES),
        (pa.array([BIG] * 8), DELTA, TEXT),
    ],
    ids=["snappy", "zstd", "bytes", "struct", "messages", "parts", "numbers", "delta"],
)
def test_rows_that_are_too_large_for_their_file(extra, written, reason, tmp_path):
    file, bad = tmp_path / "a.parquet", BadRows()
    pq.write_table(pa.table({"question": ["a"] * len(extra), "extra": extra}), file, **written)
    with no_longer_than(60), in_little_memory():
        assert list(iterate(file, bad)) == []
    assert bad.count == len(extra)
    assert bad.named[0].startswith(f"{file}:1: ")
    assert reason in bad.named[0]


@pytest.mark.parametrize("extra", [pa.array([BIG] * 8), in_one_list(pa.array([1] * 10_000_000))], ids=["page", "runs"])
def test_a_column_that_unpacks_without_end(extra, tmp_path):
    file = tmp_path / "a.parquet"
    pq.write_table(
        pa.table({"extra": extra}), file, compression="zstd", use_dictionary=not pa.types.is_string(extra.type)
    )
    with (
        in_little_memory(),
        pytest.raises(ValueError, match=r"a\.parquet: column extra\S* unpacks to more than 100 times"),
    ):
        read_rows([file])


def test_large_rows_among_others(tmp_path):
    """Of several row groups; characters count, not bytes, and the longest text that may be is kept."""
    texts = ["a", "é" * MAX_TEXT, "é" * (MAX_TEXT + 1), None]
    rows = {"question": texts, "n": [[1], None, [], [2]], "parts": [{"a": ["b"]}, None, {"a": None}, {"a": []}]}
    pq.write_table(pa.table(rows), tmp_path / "a.parquet", row_group_size=2)
    bad = BadRows()
    placed = list(iterate(tmp_path / "a.parquet", bad))
    assert [row for row, _ in placed] == [{name: rows[name][i] for name in rows} for i in (0, 1, 3)]
    assert [place.rpartition(":")[2] for _, place in placed] == ["1", "2", "4"]
    [reason] = bad.named
    assert f"a.parquet:3: field 'question' has a text of {MAX_TEXT + 1:,} characters" in reason


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view()])
def test_large_rows_of_a_saved_data_set(kind, tmp_path):
    texts = ["a", "b" * (MAX_TEXT + 1), "c"]
    Dataset(pa.table({"question": pa.array(texts, kind)})).save_to_disk(tmp_path / "saved")
    bad = BadRows()
    placed = list(iterate(tmp_path / "saved", bad))
    assert [(row["question"], place) for row, place in placed] == [
        (texts[i], f"{tmp_path}/saved:{i + 1}") for i in (0, 2)
    ]
    assert bad.named == [
        f"{tmp_path}/saved:2: field 'question' has a text of 1,048,577 characters, more than 1,048,576"
    ]


def test_a_saved_data_set_of_views(tmp_path):
    """Many rows see the same text."""
    view = np.array([len(BIG), int.from_bytes(b"aaaa", "little"), 0, 0], np.int32)  # length, prefix, buffer, offset
    views = pa.Array.from_buffers(
        pa.string_view(), 400, [None, pa.py_buffer(np.tile(view, 400)), pa.py_buffer(BIG.encode())]
    )
    Dataset(pa.table({"question": views})).save_to_disk(tmp_path / "saved")
    bad = BadRows()
    with in_little_memory():
        assert list(iterate(tmp_path / "saved", bad)) == []
    assert bad.count == 400

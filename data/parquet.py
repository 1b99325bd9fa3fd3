"""Rows of Parquet files and of Arrow tables, measured before they become Python objects.

A kilobyte of Parquet can hold gigabytes: a text once for many rows, runs, compressed pages. Texts stay encoded as they
are in the file, and a row that is too large never leaves Arrow.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import ArrowException

from data.chat import MAX_TEXT
from data.errors import BadRows, twice
from data.readers import MAX_LINE, PlacedRow

ROWS_AT_ONCE, BYTES_AT_ONCE = 1000, 2**24  # of a batch
VALUE = 8  # bytes that each value counts, null or not, beside those of its text
REPEATING = {"PLAIN_DICTIONARY", "RLE_DICTIONARY", "DELTA_BYTE_ARRAY"}  # one text in the file serves many values
# Bytes of a column in a row group. Smaller columns are read as dictionaries, which Arrow keeps in memory. A larger one
# must not unpack to more than MAX_RATIO times its bytes in the file.
MAX_COLUMN, MAX_RATIO = 2**26, 100


def read_parquet(file: Path, bad: BadRows) -> Iterator[PlacedRow]:
    """Yield the readable rows of a Parquet file; add the others to `bad`.

    Raises:
        ValueError: the file as a whole cannot be read.
    """
    try:
        with pq.ParquetFile(file) as parquet:
            metadata, names = parquet.metadata, parquet.schema_arrow.names
        if len(set(names)) < len(names):
            raise ValueError(f"{file}: {twice(names)}")
        before = 0
        for group in range(metadata.num_row_groups):
            for batch in _batches(file, metadata, group):
                yield from _rows(batch, str(file), before, bad)
                before += len(batch)
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not a readable parquet file ({error})") from error


def _batches(file: Path, metadata: pq.FileMetaData, group: int) -> Iterator[pa.RecordBatch]:
    """Yield the rows of a row group in batches of a few megabytes, with dictionaries packed.

    Raises:
        ValueError: a column unpacks to more than MAX_RATIO times its bytes in the file.
    """
    row_group = metadata.row_group(group)
    columns = [row_group.column(number) for number in range(row_group.num_columns)]
    dictionaries, repeats = [], False
    for number, column in enumerate(columns):
        leaf, encodings = metadata.schema.column(number), set(column.encodings)
        packed, unpacked = column.total_compressed_size, column.total_uncompressed_size
        if max(unpacked, column.num_values * max(VALUE, leaf.length)) > max(MAX_COLUMN, MAX_RATIO * packed):
            raise ValueError(
                f"{file}: column {leaf.path} unpacks to more than {MAX_RATIO} times its {packed:,} bytes in row group "
                f"{group + 1}; write the file again, in smaller row groups"
            )
        if leaf.physical_type != "BYTE_ARRAY" or encodings.isdisjoint(REPEATING):
            continue
        if "DELTA_BYTE_ARRAY" in encodings or unpacked > MAX_COLUMN:
            repeats = True
        else:
            dictionaries.append(leaf.path)
    average = sum(column.total_uncompressed_size for column in columns) // max(1, row_group.num_rows)
    rows = 1 if repeats else min(ROWS_AT_ONCE, max(1, BYTES_AT_ONCE // max(1, average)))
    with pq.ParquetFile(file, metadata=metadata, read_dictionary=dictionaries, pre_buffer=False) as parquet:
        yield from parquet.iter_batches(rows, row_groups=[group])


def _rows(batch: pa.RecordBatch, name: str, before: int, bad: BadRows) -> Iterator[PlacedRow]:
    """Yield the readable rows of a batch; add the others to `bad`. Row numbers start at `before` + 1."""
    reasons = too_large(pa.Table.from_batches([batch]))
    for i in range(len(batch)):
        place = f"{name}:{before + i + 1}"
        if i in reasons:
            bad.add(f"{place}: {reasons[i]}")
            continue
        try:
            [row] = batch.slice(i, 1).to_pylist()
        except (ValueError, OverflowError, ArrowException) as error:  # such as text that is not UTF-8
            bad.add(f"{place}: cannot be read ({error})")
        else:
            yield PlacedRow(row, place)


def too_large(rows: pa.Table) -> dict[int, str]:
    """Map each row with a text longer than MAX_TEXT or more than MAX_LINE bytes to the reason."""
    reasons, totals = {}, np.zeros(len(rows), np.int64)
    for name, column in zip(rows.column_names, rows.columns, strict=True):
        sizes, longest = map(np.concatenate, zip(*map(_measure, column.chunks), strict=True))
        totals += sizes
        for i in np.flatnonzero(longest > MAX_TEXT).tolist():
            reason = f"field '{name}' has a text of {longest[i]:,} characters, more than {MAX_TEXT:,}"
            reasons.setdefault(i, reason)
    for i in np.flatnonzero(totals > MAX_LINE).tolist():
        reasons.setdefault(i, f"the row has {totals[i]:,} bytes, more than {MAX_LINE:,}")
    return reasons


def _measure(array: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """[n] bytes of each value with its content, and [n] characters of its longest text."""
    kind, sizes, longest = array.type, np.full(len(array), VALUE), np.zeros(len(array), np.int64)
    if isinstance(array, pa.ExtensionArray):
        return _measure(array.storage)
    if pa.types.is_dictionary(kind):
        valid = array.indices.is_valid().to_numpy(zero_copy_only=False)
        used, indices = np.unique(array.indices.drop_null().to_numpy(), return_inverse=True)
        for values, measured in zip((sizes, longest), _measure(array.dictionary.take(pa.array(used))), strict=True):
            values[valid] = measured[indices]
    elif pa.types.is_struct(kind):
        for field in array.flatten():
            field_sizes, field_longest = _measure(field)
            sizes, longest = sizes + field_sizes, np.maximum(longest, field_longest)
    elif pa.types.is_nested(kind):
        if pa.types.is_map(kind):
            array = array.cast(pa.list_(pa.struct([kind.key_field, kind.item_field])))
        lengths = pc.list_value_length(array).fill_null(0).to_numpy()
        value_sizes, value_longest = _measure(array.flatten())
        ends, filled = lengths.cumsum(), lengths > 0
        if filled.any():
            starts = (ends - lengths)[filled]
            sizes[filled] += np.add.reduceat(value_sizes, starts)
            longest[filled] = np.maximum.reduceat(value_longest, starts)
    elif _is_text(kind) or _is_bytes(kind):
        lengths = _lengths(array)
        sizes += lengths
        if _is_text(kind):
            longest = lengths
            for i in np.flatnonzero(lengths > MAX_TEXT).tolist():
                longest[i] = pc.utf8_length(array[i].cast(pa.large_string())).as_py()
    return sizes, longest


def _lengths(array: pa.Array) -> np.ndarray:
    """[n] bytes of texts."""
    if array.type in (pa.string_view(), pa.binary_view()):  # 16 bytes a value, which begin with its length
        lengths = np.frombuffer(array.buffers()[1], np.int32)[::4][array.offset : array.offset + len(array)]
        return np.where(array.is_valid().to_numpy(zero_copy_only=False), lengths, 0).astype(np.int64)
    return pc.binary_length(array).fill_null(0).to_numpy().astype(np.int64)


def _is_text(kind: pa.DataType) -> bool:
    return kind in (pa.string(), pa.large_string(), pa.string_view())


def _is_bytes(kind: pa.DataType) -> bool:
    return kind in (pa.binary(), pa.large_binary(), pa.binary_view()) or pa.types.is_fixed_size_binary(kind)

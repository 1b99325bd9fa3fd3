"""The Arrow table of tokenized rows."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from hashlib import sha1

import numpy as np
import pyarrow as pa

SCHEMA = pa.schema(
    {
        "input_ids": pa.list_(pa.int32()),
        "prompt_length": pa.int32(),
        "context": pa.list_(pa.int32()),
        "thinking_tokens": pa.int32(),
        "answer_tokens": pa.int32(),
        "cut": pa.int32(),
        "source": pa.int32(),
        "difficulty": pa.float64(),
        "place": pa.string(),
    }
)


class TokenRows:
    """Prompts with their responses. A response ends with the end-of-sequence token, unless it was cut.

    Args:
        table: of SCHEMA, in memory or mapped from a file; tokens are read from the file row by row.
        chosen: indices of the rows, in order; all by default.
    """

    def __init__(self, table: pa.Table, chosen: np.ndarray | None = None):
        self.table = table
        self.chosen = range(len(table)) if chosen is None else chosen  # a range takes no memory
        self._starts = np.cumsum([0, *map(len, table["input_ids"].chunks)])
        self._chunks = {  # offsets and values, without a copy
            name: [(chunk.offsets.to_numpy(), chunk.values.to_numpy()) for chunk in table[name].chunks]
            for name in ("input_ids", "context")
        }

    @classmethod
    def of(cls, rows: Sequence[np.ndarray], prompt_lengths: Sequence[int], cut: bool = False) -> "TokenRows":
        """Make rows from token arrays, all whole or all cut."""
        encoded = [
            {"input_ids": ids, "prompt_length": length, "cut": int(cut)}
            for ids, length in zip(rows, prompt_lengths, strict=True)
        ]
        return cls(pa.Table.from_pylist(encoded, SCHEMA))

    def __len__(self) -> int:
        return len(self.chosen)

    def select(self, rows: np.ndarray) -> "TokenRows":
        """Select rows, in this order."""
        return TokenRows(self.table, self._of_chosen(np.arange(len(self.table)))[rows])

    def ids(self, row: int) -> np.ndarray:
        """[prompt + response] int32 tokens of a row."""
        return self._list("input_ids", row)

    def context(self, row: int) -> np.ndarray:
        """[spans, 2] start and end of each untrained part of a row's response."""
        return self._list("context", row).reshape(-1, 2)

    def place(self, row: int) -> str:
        """Origin of a row, as `file:line`."""
        return self.table["place"][int(self.chosen[row])].as_py()

    def column(self, name: str) -> np.ndarray:
        """[rows] values of a numeric column."""
        return self._of_chosen(self.table[name].to_numpy())

    @cached_property
    def prompt_lengths(self) -> np.ndarray:
        """[rows] tokens before the first trained answer."""
        return self.column("prompt_length").astype(np.int64)

    @cached_property
    def lengths(self) -> np.ndarray:
        """[rows] tokens of prompt and response."""
        return self._list_lengths("input_ids")

    @cached_property
    def cut(self) -> np.ndarray:
        """[rows] whether `data.truncation=right` cut off the end of the response."""
        return self.column("cut").astype(bool)

    @cached_property
    def response_lengths(self) -> np.ndarray:
        """[rows] tokens after the prompt."""
        return self.lengths - self.prompt_lengths

    def fingerprint(self) -> str:
        """Digest of tokens, sources and difficulties of all rows in order."""
        digest = sha1(self.prompt_lengths)
        for name in ("source", "difficulty"):
            if self.table[name].null_count < len(self.table) and self.column(name).any():
                digest.update(self.column(name))
        for name in ("input_ids", "context"):
            digest.update(self._list_lengths(name))
            for part in self._lists(name):
                digest.update(part)
        return digest.hexdigest()

    def _of_chosen(self, values: np.ndarray) -> np.ndarray:
        return values if isinstance(self.chosen, range) else values[self.chosen]

    def _list_lengths(self, name: str) -> np.ndarray:
        return self._of_chosen(np.concatenate([np.diff(offsets) for offsets, _ in self._chunks[name]]).astype(np.int64))

    def _lists(self, name: str) -> Iterator[np.ndarray]:
        """Yield all values of a list column in order; by chunk, which is faster, if all rows are chosen."""
        if isinstance(self.chosen, range):
            yield from (values[offsets[0] : offsets[-1]] for offsets, values in self._chunks[name])
        else:
            yield from (self._list(name, row) for row in range(len(self)))

    def _list(self, name: str, row: int) -> np.ndarray:
        index = self.chosen[row]
        chunk = np.searchsorted(self._starts, index, side="right") - 1
        offsets, values = self._chunks[name][chunk]
        within = index - self._starts[chunk]
        return values[offsets[within] : offsets[within + 1]]

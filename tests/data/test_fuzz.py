"""Broken files, by the hundred: always a clear error or a full account, never a hang, never a row lost in silence."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from data import DataConfig, rows_of_files
from tests.conftest import no_longer_than

FILES = {"jsonl": 300, "json": 100, "parquet": 150}
SECONDS = 20  # for one file
CUTS = (b"", b"\x00", b"\xff\xfe", b'"', b"\\", b"{", b"}", b"[", b"\n", b",", b":", b"null", b"1e999", b"\xed\xa0\x80")
ROWS = [
    {"question": f"{i} + {i}?", "answer": f"<think>\n{i} and {i}\n</think>\n{2 * i}", "difficulty": i, "source": None}
    for i in range(12)
]
MESSAGES = [
    {"messages": [{"role": "user", "content": "Hé?"}, {"role": "assistant", "content": f"{i}"}]} for i in range(9)
]
STRANGE = (
    None,
    4,
    "",
    " ",
    [],
    {},
    [None],
    {"role": "user"},
    "\ud800",
    "<|mask|>",
    [{"role": "x", "content": 3}],
    True,
)


def broken_rows(rng: np.random.Generator) -> list[dict]:
    """Rows of which some have fields missing, doubled or of another kind."""
    rows = [dict(row) for row in (ROWS if rng.random() < 0.6 else MESSAGES)]
    for _ in range(rng.integers(0, 4)):
        row = rows[rng.integers(len(rows))]
        field = str(rng.choice([*row, "prompt", "response", "messages"]))
        if rng.random() < 0.3:
            row.pop(field, None)
        else:
            row[field] = STRANGE[rng.integers(len(STRANGE))]
    return rows


def broken_bytes(content: bytes, rng: np.random.Generator) -> bytes:
    """Content that was cut, overwritten, grown, or left as it is."""
    data = bytearray(content)
    for _ in range(rng.integers(0, 4)):
        where = int(rng.integers(len(data) + 1))
        match rng.integers(4):
            case 0:
                del data[where:]
            case 1:
                data[where : where + int(rng.integers(1, 9))] = CUTS[rng.integers(len(CUTS))]
            case 2:
                data[where:where] = CUTS[rng.integers(len(CUTS))] * int(rng.integers(1, 300))
            case 3:
                data[where : where + 4] = rng.bytes(4)
    return bytes(data)


def write_broken(kind: str, path: Path, rng: np.random.Generator) -> None:
    if kind == "parquet":
        rows = [{"question": row["question"], "answer": row["answer"]} for row in ROWS]
        pa.parquet.write_table(pa.Table.from_pylist(rows), path)
        path.write_bytes(broken_bytes(path.read_bytes(), rng))
        return
    rows = broken_rows(rng)
    text = json.dumps(rows) if kind == "json" else "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(broken_bytes(text.encode(), rng))


def rows_in(kind: str, path: Path) -> int | None:
    """Rows of a file, however broken each may be; None where only the file as a whole can be read."""
    if kind == "jsonl":
        return sum(bool(line.strip()) for line in path.read_bytes().split(b"\n"))
    return None


@pytest.mark.parametrize("kind", FILES)
def test_broken_files(kind, tokenizer, tmp_path):
    outcomes = {"error": 0, "kept": 0, "some": 0}
    for number in range(FILES[kind]):
        rng = np.random.default_rng((number, len(kind)))
        path = tmp_path / f"{number}.{kind}"
        write_broken(kind, path, rng)
        errors = []
        for on_bad_row in ("error", "skip"):
            config = DataConfig(cache_dir=str(tmp_path / "cache"), on_bad_row=on_bad_row)
            try:
                with no_longer_than(SECONDS):
                    _, report = rows_of_files([str(path)], config, tokenizer, "training", True)
            except ValueError as error:
                errors.append(str(error))
                continue
            skipped = sum(noted.count for noted in report.dropped.values())
            assert report.read == report.kept + skipped
            assert rows_in(kind, path) in (None, report.read), path
            if on_bad_row == "error":
                assert not skipped
        assert all(path.name in error for error in errors), errors
        outcomes["error" if len(errors) == 2 else "some" if errors else "kept"] += 1
    assert outcomes["error"] >= 10, outcomes
    assert outcomes["kept"] >= 20, outcomes
    assert kind == "parquet" or outcomes["some"] >= 10, outcomes  # a parquet file breaks as a whole

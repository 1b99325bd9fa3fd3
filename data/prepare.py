"""Convert raw sets to training rows: `python -m data.prepare gsm8k train.jsonl raw/train.jsonl`.

Reads files, folders or hub ids, or generates a task. Writes a .jsonl file of rows with question and answer, prompt and
response, or messages, and reports on all rows.
"""

import json
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub.utils import logging as hub_logging

from data.convert import RAW_SETS, convert
from data.errors import BadRows
from data.files import iterate
from data.readers import PlacedRow
from data.report import Report
from data.storage import whole_file
from data.tasks.reasoning_gym import DIFFICULTY, generated_rows
from data.terminal import Parser, ending_in_one_line, printable

ROWS = 1000


def main(arguments: list[str]) -> None:
    hub_logging.set_verbosity_error()  # without it the hub's attempts precede their result
    with ending_in_one_line("stopped by SIGINT, nothing is written"):
        options = _parser().parse_args(arguments)
        print(prepare(options).text())
        print(printable(f"rows: {options.output}"))


def prepare(options: Namespace) -> Report:
    """Write the rows, all or none.

    Raises:
        ValueError: the output exists, no rows, or rows that cannot be used.
    """
    output = Path(options.output)
    if output.exists():
        raise ValueError(f"{output} exists: delete it, or name another output")
    if output.suffix != ".jsonl":
        raise ValueError(f"{output}: the output is a .jsonl file")
    bad = BadRows("--on-bad-row skip leaves such rows out")
    report = Report(options.name)
    output.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(output) as lines:
        for line in _lines(options, bad, report):
            lines.write(line)
            report.kept += 1
        if options.on_bad_row == "error":
            bad.refuse()
        if not report.kept:
            raise ValueError(f"{options.name}: no row is left.\n{bad.text()}")
    if bad.count:
        report.add_bad(bad)
    report.read = report.kept + bad.count
    return report


def _lines(options: Namespace, bad: BadRows, report: Report) -> Iterator[str]:
    if options.name in DIFFICULTY:
        if options.rows is not None and options.rows < 1:
            raise ValueError(f"--rows {options.rows}: must be at least 1")
        if options.sources:
            raise ValueError(f"{options.name} is generated: leave {options.sources[0]} out")
        rows = ROWS if options.rows is None else options.rows
        yield from map(_line, generated_rows(options.name, rows, options.seed or 0))
        return
    if unused := [name for name in ("rows", "seed") if getattr(options, name) is not None]:
        raise ValueError(f"--{unused[0]} is for generated tasks ({', '.join(DIFFICULTY)}); {options.name} is read")
    raw_set = RAW_SETS[options.name]
    sources = options.sources or [raw_set.hub_id]
    if sources == [None]:
        raise ValueError(f"{options.name} is a kind of file: name the files, folders or hub ids to read")
    for source in sources:
        for placed in iterate(source, bad):
            try:
                yield _line(PlacedRow(convert(placed, raw_set, report.add_unused), placed.place))
            except ValueError as error:
                bad.add(error)


def _line(placed: PlacedRow) -> str:
    line = json.dumps(placed.row, ensure_ascii=False, default=str) + "\n"
    try:
        line.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{placed.place}: not valid Unicode ({error.reason})") from error
    return line


def _parser() -> Parser:
    parser = Parser("data.prepare", __doc__)
    parser.add_argument(
        "name", choices=[*RAW_SETS, *DIFFICULTY], metavar="NAME", help=", ".join([*RAW_SETS, *DIFFICULTY])
    )
    parser.add_argument("output", help="the .jsonl file to write")
    parser.add_argument(
        "sources", nargs="*", help=".jsonl, .json or .parquet files, folders or hub ids; default: the hub's"
    )
    parser.add_argument(
        "--on-bad-row", choices=["error", "skip"], default="error", help="for rows that cannot be used; default: error"
    )
    parser.add_argument("--rows", type=int, help=f"number of rows of a generated task; default: {ROWS:,}")
    parser.add_argument("--seed", type=int, help="of a generated task")
    return parser


if __name__ == "__main__":
    main(sys.argv[1:])

"""Files to padded batches, and tasks: questions and how their answers are scored."""

import data.terminal  # noqa: F401 — first, see there
from data.config import DataConfig
from data.files import read_rows
from data.loader import BatchLayout, TrainBatches, ValBatches
from data.readers import PlacedRow
from data.report import Prepared, Report
from data.rows import rows_of, rows_of_files
from data.stream import StreamedBatches
from data.tokens import TokenRows, prompt_ids, turn_end

__all__ = [
    "BatchLayout",
    "DataConfig",
    "PlacedRow",
    "Prepared",
    "Report",
    "StreamedBatches",
    "TokenRows",
    "TrainBatches",
    "ValBatches",
    "prompt_ids",
    "read_rows",
    "rows_of",
    "rows_of_files",
    "turn_end",
]

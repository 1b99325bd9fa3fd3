"""Files to padded batches, and tasks: questions and how their answers are scored."""

import data.terminal  # noqa: F401 — first: see its docstring
from data.batches import Batch, BatchLayout, BatchSource, TrainBatches, ValBatches
from data.config import DataConfig
from data.encode import prompt_ids
from data.files import read_rows
from data.readers import PlacedRow
from data.report import Prepared, Report
from data.stream import StreamedBatches
from data.template import turn_end
from data.token_cache import rows_of, rows_of_files
from data.token_rows import TokenRows

__all__ = [
    "Batch",
    "BatchLayout",
    "BatchSource",
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

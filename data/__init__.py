"""Files to padded batches, and the generated task with its verifier."""

from data.config import DataConfig
from data.files import PlacedRow, read_rows
from data.loader import Share, TrainBatches, ValBatches
from data.tokens import TokenRows, prompt_ids, tokenize

__all__ = [
    "DataConfig",
    "PlacedRow",
    "Share",
    "TokenRows",
    "TrainBatches",
    "ValBatches",
    "prompt_ids",
    "read_rows",
    "tokenize",
]

"""Settings for loading, curating and batching data."""

import difflib
from dataclasses import dataclass, field

from data.chat import NAMES

TRUNCATIONS = ("error", "right", "drop")
CUTOFFS = ("min_pad", "random", "random_with_input_pad")
ON_BAD_ROW = ("error", "skip")
LOSS_ON = ("last", "all")
DUPLICATES = ("none", "exact", "near")
ORDERS = ("shuffled", "curriculum")


@dataclass
class DataConfig:
    """Which rows are trained on, and how they become batches.

    Of `train_batch_size` = `micro_batch_size_per_gpu` × `gradient_accumulation_steps` × ranks, whatever is null is
    derived.

    Raises:
        ValueError: a value outside its range; the message names the field, the value and the rule.
    """

    # .jsonl, .json or .parquet files, folders of them, or hub ids; empty trains on generated equations
    train_files: list[str] = field(default_factory=list)
    val_files: list[str] = field(default_factory=list)  # likewise; empty with train_files given: no validation
    # columns of the files by the names of a row's fields, such as {prompt: query, response: output}; null: by their own
    columns: dict[str, str] | None = None
    on_bad_row: str = "error"  # of a row that cannot be used: error | skip, with a line in the report
    loss_on: str = "last"  # answers that are trained on in a chat of several turns: last | all
    # of the training rows, a formula over their fields and over prompt_tokens, response_tokens, thinking_tokens and
    # answer_tokens, such as "source == 'math' and thinking_tokens < 1500"; null keeps all
    filter: str | None = None
    drop_duplicates: str = "none"  # of training rows: none | exact, but for case and spaces | near (extra `dedup`)
    near_duplicate: float = 0.8  # near: Jaccard similarity of their five-word sequences, as estimated by MinHash
    decontaminate_files: list[str] = field(default_factory=list)  # whose questions no training row may overlap with
    decontaminate_words: int = 8  # in a row that make an overlap
    subset: float | None = None  # of what is left: a share up to 1 or a number of rows above, drawn by `seed`
    mixture: list[float] = field(default_factory=list)  # weights of the train_files in an epoch; empty: by their rows
    order: str = "shuffled"  # of an epoch: shuffled | curriculum, from the least difficult to the most
    difficulty: str = "difficulty"  # curriculum: a formula as in `filter`, such as response_tokens
    streaming: bool = False  # read train_files while training, again and again, instead of tokenizing them first
    stream_window: int = 10_000  # rows that a stream shuffles together
    cache_dir: str | None = None  # of tokenized files; null: diffllm/ in the cache of Hugging Face (HF_HOME)
    max_length: int = 2048  # tokens of prompt and response
    truncation: str = "error"  # of a longer row: error | right cuts the response | drop
    train_batch_size: int | None = None  # rows of one optimizer step over all ranks
    micro_batch_size_per_gpu: int | None = None  # rows of one forward
    gradient_accumulation_steps: int | None = None  # forwards of one optimizer step
    enable_perbatch_cutoff: bool = True  # shorten each global batch; false pads every row to max_length
    perbatch_cutoff_type: str = "random_with_input_pad"  # min_pad | random | random_with_input_pad
    group_by_length: bool = False  # rows of like length share a batch: less padding, a less random order
    resp_cutoff_ratio: float = 0.0  # share of the batches that lose a random tail
    num_workers: int = 1  # loader processes of each rank

    def __post_init__(self) -> None:
        for name, allowed in (
            ("truncation", TRUNCATIONS),
            ("perbatch_cutoff_type", CUTOFFS),
            ("on_bad_row", ON_BAD_ROW),
            ("loss_on", LOSS_ON),
            ("drop_duplicates", DUPLICATES),
            ("order", ORDERS),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"data.{name}={getattr(self, name)}: choose one of {', '.join(allowed)}")
        for name, column in (self.columns or {}).items():
            if not column:
                raise ValueError(f"data.columns={{{name}: {column!r}}}: must be the name of a column, not empty")
            if name not in NAMES:
                close = difflib.get_close_matches(name, NAMES, n=1)
                hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(NAMES)}"
                raise ValueError(f"data.columns={{{name}: {column}}}: no schema has a field {name}; {hint}")
        if self.columns and len(set(self.columns.values())) < len(self.columns):
            raise ValueError(f"data.columns={self.columns}: a column has one name, and one of these has several")
        for name in (
            "max_length",
            "train_batch_size",
            "micro_batch_size_per_gpu",
            "gradient_accumulation_steps",
            "decontaminate_words",
            "stream_window",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"data.{name}={value}: must be at least 1")
        if not 0 <= self.resp_cutoff_ratio <= 1:
            raise ValueError(f"data.resp_cutoff_ratio={self.resp_cutoff_ratio}: must be in [0, 1]")
        if self.num_workers < 0:
            raise ValueError(f"data.num_workers={self.num_workers}: must not be negative")
        if not 0 < self.near_duplicate <= 1:
            raise ValueError(f"data.near_duplicate={self.near_duplicate}: must be in (0, 1]")
        if self.subset is not None and not (0 < self.subset <= 1 or self.subset == int(self.subset) > 1):
            raise ValueError(f"data.subset={self.subset}: must be a share in (0, 1] or a whole number of rows above 1")
        if self.mixture and (len(self.mixture) != len(self.train_files) or min(self.mixture) <= 0):
            raise ValueError(
                f"data.mixture={self.mixture}: must be one positive weight for each of the {len(self.train_files)} "
                "data.train_files"
            )
        for name in ("train_files", "val_files"):
            if twice := {file for file in getattr(self, name) if getattr(self, name).count(file) > 1}:
                raise ValueError(f"data.{name}: {', '.join(sorted(twice))} given twice; data.mixture weighs files")
        if self.streaming:
            whole = {
                "subset": None,
                "drop_duplicates": "none",
                "mixture": [],
                "order": "shuffled",
                "group_by_length": False,
            }
            if asked := [f"data.{name}" for name, default in whole.items() if getattr(self, name) != default]:
                raise ValueError(f"data.streaming=true: {', '.join(asked)} would need all rows; leave them out")
            if not self.train_files:
                raise ValueError("data.streaming=true: there is nothing to read, give data.train_files")
        if self.order == "curriculum" and self.group_by_length:
            raise ValueError("data.order=curriculum and data.group_by_length=true: both order the rows, choose one")


@dataclass
class TaskConfig:
    """The questions of evaluate.py."""

    # a task of data/tasks: equations | rows, those of data.val_files; null: rows if data.val_files are given
    name: str | None = None

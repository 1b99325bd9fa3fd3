"""Settings for loading, curating and batching data."""

from dataclasses import dataclass

from data.chat import NAMES
from data.errors import nearest
from data.settings import check_fields, setting

CUTOFFS = ("min_pad", "random", "random_with_input_pad")


@dataclass
class DataConfig:
    """Which rows are trained on, and how they become batches.

    Of `train_batch_size` = `micro_batch_size_per_gpu` × `gradient_accumulation_steps` × ranks, whatever is null is
    derived.

    Raises:
        ValueError: a value outside its range; the message names the field, the value and the rule.
    """

    # .jsonl, .json or .parquet files, folders of them, or hub ids; empty trains on generated equations
    train_files: list[str] = setting([], path=True)
    # likewise; empty with train_files given: no validation
    val_files: list[str] = setting([], path=True, free_when_resuming=True)
    # columns of the files by the names of a row's fields, such as {prompt: query, response: output}; null: by their own
    columns: dict[str, str] | None = setting(None, changes_rows="all")
    # of a row that cannot be used: error | skip, with a line in the report
    on_bad_row: str = setting("error", choices=("error", "skip"), changes_rows="all")
    # answers that are trained on in a chat of several turns: last | all
    loss_on: str = setting("last", choices=("last", "all"), changes_rows="all")
    # of the training rows, a formula over their fields and over prompt_tokens, response_tokens, thinking_tokens and
    # answer_tokens, such as "source == 'math' and thinking_tokens < 1500"; null keeps all
    filter: str | None = setting(None, changes_rows="curated")
    # of training rows: none | exact, but for case and spaces | near (extra `dedup`)
    drop_duplicates: str = setting("none", choices=("none", "exact", "near"), changes_rows="curated")
    # near: Jaccard similarity of their five-word sequences, as estimated by MinHash
    near_duplicate: float = setting(0.8, above=0, at_most=1, changes_rows="curated")
    decontaminate_files: list[str] = setting([], path=True)  # whose questions no training row may overlap with
    decontaminate_words: int = setting(8, at_least=1, changes_rows="curated")  # in a row that make an overlap
    subset: float | None = None  # of the rows that are left: a share up to 1 or a number above 1, drawn by `seed`
    mixture: list[float] = setting([])  # weights of the train_files in an epoch; empty: by their rows
    # of an epoch: shuffled | curriculum, from the least difficult to the most
    order: str = setting("shuffled", choices=("shuffled", "curriculum"), changes_rows="curated")
    # curriculum: a formula as in `filter`, such as response_tokens
    difficulty: str = setting("difficulty", changes_rows="curated")
    streaming: bool = False  # read train_files while training, again and again, instead of tokenizing them first
    stream_window: int = setting(10_000, at_least=1)  # rows that a stream shuffles together
    # of tokenized files; null: diffllm/ in the cache of Hugging Face (HF_HOME)
    cache_dir: str | None = setting(None, path=True, free_when_resuming=True)
    max_length: int = setting(2048, at_least=1, changes_rows="all")  # tokens of prompt and response
    # of a longer row: error | right cuts the response | drop
    truncation: str = setting("error", choices=("error", "right", "drop"), changes_rows="all")
    # rows of one optimizer step over all ranks
    train_batch_size: int | None = setting(None, at_least=1, free_when_resuming=True)
    micro_batch_size_per_gpu: int | None = setting(None, at_least=1, free_when_resuming=True)  # rows of one forward
    # forwards of one optimizer step
    gradient_accumulation_steps: int | None = setting(None, at_least=1, free_when_resuming=True)
    enable_perbatch_cutoff: bool = True  # shorten each global batch; false pads every row to max_length
    perbatch_cutoff_type: str = setting(
        "random_with_input_pad", choices=CUTOFFS
    )  # min_pad | random | random_with_input_pad
    group_by_length: bool = False  # rows of like length share a batch: less padding, a less random order
    resp_cutoff_ratio: float = setting(0.0, at_least=0, at_most=1)  # share of the batches that lose a random tail
    num_workers: int = setting(1, at_least=0, free_when_resuming=True)  # loader processes of each rank

    def __post_init__(self) -> None:
        check_fields(self, "data")
        for name, column in (self.columns or {}).items():
            if not column:
                raise ValueError(f"data.columns={{{name}: {column!r}}}: must be the name of a column, not empty")
            if name not in NAMES:
                hint = nearest(name, NAMES)
                raise ValueError(f"data.columns={{{name}: {column}}}: no schema has a field {name}; {hint}")
        if self.columns and len(set(self.columns.values())) < len(self.columns):
            raise ValueError(f"data.columns={self.columns}: a column has one name, and one of these has several")
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
            default, of_all_rows = DataConfig(), ("subset", "drop_duplicates", "mixture", "order", "group_by_length")
            if changed := [f"data.{name}" for name in of_all_rows if getattr(self, name) != getattr(default, name)]:
                raise ValueError(f"data.streaming=true: {', '.join(changed)} would need all rows; leave them out")
            if not self.train_files:
                raise ValueError("data.streaming=true: there is nothing to read, give data.train_files")
        if self.order == "curriculum" and self.group_by_length:
            raise ValueError("data.order=curriculum and data.group_by_length=true: both order the rows, choose one")


@dataclass
class TaskConfig:
    """The questions of evaluate.py."""

    # a task of data/tasks: equations | rows, those of data.val_files; null: rows if data.val_files are given
    name: str | None = None

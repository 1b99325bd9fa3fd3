"""Settings for loading, curating and batching data, and for the task."""

from dataclasses import dataclass

from data.chat import NAMES
from data.errors import nearest
from data.settings import check_fields, setting

CUTOFFS = ("min_pad", "random", "random_with_input_pad")


@dataclass
class DataConfig:
    """Select rows and form batches.

    The sizes obey `train_batch_size` = `micro_batch_size_per_gpu` × `gradient_accumulation_steps` × ranks; null sizes
    are derived.

    Raises:
        ValueError: a value breaks its rule; the message names field, value and rule.
    """

    # .jsonl, .json or .parquet files, folders of them, or hub ids; empty: the rows of the task
    train_files: list[str] = setting([], path=True)
    # validation rows, given likewise; empty: none, or the held-out rows of the task if train_files is empty too
    val_files: list[str] = setting([], path=True, free_when_resuming=True)
    # share of the prompts whose rows are held out for validation if there are no val_files; drawn by `seed`
    val_split: float = setting(0.0, at_least=0, below=1)
    # column of each schema field, such as {prompt: query, response: output}; null: columns are named like the fields
    columns: dict[str, str] | None = setting(None, changes_rows="all")
    # rows that cannot be used: error | skip
    on_bad_row: str = setting("error", choices=("error", "skip"), changes_rows="all")
    # trained answers of a chat: last | all
    loss_on: str = setting("last", choices=("last", "all"), changes_rows="all")
    # thinking of the answers, also of earlier ones in a chat: keep | drop
    thinking: str = setting("keep", choices=("keep", "drop"), changes_rows="all")
    # keep training rows for which a formula over fields and token counts is true, such as
    # "source == 'math' and thinking_tokens < 1500"; null keeps all
    filter: str | None = setting(None, changes_rows="curated")
    # training rows: none | exact ignores case and spaces | near (extra `dedup`)
    drop_duplicates: str = setting("none", choices=("none", "exact", "near"), changes_rows="curated")
    # near: least Jaccard similarity of five-word sequences
    near_duplicate: float = setting(
        0.8, above=0, at_most=1, changes_rows="curated", used_with={"drop_duplicates": ("near",)}
    )
    decontaminate_files: list[str] = setting([], path=True)  # drop training rows that overlap with their questions
    # successive words of an overlap
    decontaminate_words: int = setting(8, at_least=1, changes_rows="curated", used_with={"decontaminate_files": ()})
    subset: float | None = None  # random part of the remaining rows: a share up to 1, or a number of rows above 1
    mixture: list[float] = setting([])  # weights of the train_files in an epoch; empty: their numbers of rows
    # epoch: shuffled | curriculum sorts from easy to hard
    order: str = setting("shuffled", choices=("shuffled", "curriculum"), changes_rows="curated")
    # curriculum: formula like `filter`, such as response_tokens
    difficulty: str = setting("difficulty", changes_rows="curated", used_with={"order": ("curriculum",)})
    streaming: bool = False  # tokenize train_files while training instead of before
    # rows that a stream shuffles together
    stream_window: int = setting(10_000, at_least=1, used_with={"streaming": ()})
    # tokenized rows; null: $HF_HOME/diffllm
    cache_dir: str | None = setting(None, path=True, free_when_resuming=True)
    max_length: int = setting(2048, at_least=1, changes_rows="all")  # tokens of prompt and response
    # longer rows: error | right cuts the response | drop
    truncation: str = setting("error", choices=("error", "right", "drop"), changes_rows="all")
    # rows of an optimizer step on all ranks
    train_batch_size: int | None = setting(None, at_least=1, free_when_resuming=True)
    micro_batch_size_per_gpu: int | None = setting(None, at_least=1, free_when_resuming=True)  # rows of a forward
    # forwards of an optimizer step
    gradient_accumulation_steps: int | None = setting(None, at_least=1, free_when_resuming=True)
    enable_perbatch_cutoff: bool = True  # shorten each global batch; false pads every row to max_length
    # min_pad | random | random_with_input_pad, see data.collate.response_widths
    perbatch_cutoff_type: str = setting(
        "random_with_input_pad", choices=CUTOFFS, used_with={"enable_perbatch_cutoff": ()}
    )
    group_by_length: bool = False  # rows of similar length share a batch: less padding, less random order
    # put several short rows into one of at most max_length, each seeing itself alone: less padding, the same loss
    packing: bool = setting(False, free_when_resuming=True)
    # rows end at a multiple of so many tokens, or at max_length; null: of diffusion.block_length, if there is one
    pad_to_multiple: int | None = setting(None, at_least=1)
    resp_cutoff_ratio: float = setting(0.0, at_least=0, at_most=1)  # share of the batches that lose a random tail
    num_workers: int = setting(1, at_least=0, free_when_resuming=True)  # loader processes of each rank

    def __post_init__(self) -> None:
        check_fields(self, "data")
        for name, column in (self.columns or {}).items():
            if not column:
                raise ValueError(f"data.columns={{{name}: {column!r}}}: must name a column")
            if name not in NAMES:
                hint = nearest(name, NAMES)
                raise ValueError(f"data.columns={{{name}: {column}}}: no schema has a field {name}; {hint}")
        if self.columns and len(set(self.columns.values())) < len(self.columns):
            raise ValueError(f"data.columns={self.columns}: two fields name the same column")
        if self.subset is not None and not (0 < self.subset <= 1 or self.subset == int(self.subset) > 1):
            raise ValueError(f"data.subset={self.subset}: must be a share in (0, 1] or a whole number of rows above 1")
        if self.mixture and (len(self.mixture) != len(self.train_files) or min(self.mixture) <= 0):
            raise ValueError(
                f"data.mixture={self.mixture}: must be one positive weight for each of the {len(self.train_files)} "
                "data.train_files"
            )
        for name in ("train_files", "val_files"):
            if twice := {file for file in getattr(self, name) if getattr(self, name).count(file) > 1}:
                raise ValueError(f"data.{name}: {', '.join(sorted(twice))} given twice; set weights by data.mixture")
        if self.streaming:
            default, of_all_rows = DataConfig(), ("subset", "drop_duplicates", "mixture", "order", "group_by_length")
            if changed := [f"data.{name}" for name in of_all_rows if getattr(self, name) != getattr(default, name)]:
                raise ValueError(f"data.streaming=true: {', '.join(changed)} need all rows at once; leave them out")
            if self.val_split and not self.val_files:
                raise ValueError("data.val_split needs all rows at once: with data.streaming=true give data.val_files")
            if not self.train_files:
                raise ValueError("data.streaming=true with data.train_files=[]: name the files to stream")
        if self.packing and not self.enable_perbatch_cutoff:
            raise ValueError("data.packing=true with data.enable_perbatch_cutoff=false: no row leaves room for another")
        if self.order == "curriculum" and self.group_by_length:
            raise ValueError("data.order=curriculum and data.group_by_length=true: choose one order")


@dataclass
class TaskConfig:
    """Tasks of evaluate.py, whose rows train.py uses if there are no files of rows."""

    # of data/tasks; empty: rows if data.val_files are given, else equations
    name: list[str] = setting([])
    # by task, where the rows that it does not generate are: a file, folder or hub id, such as {gsm8k: test.jsonl}
    files: dict[str, str] = setting({})
    train_rows: int = setting(100_000, at_least=1)  # countdown, sudoku4: generated training rows
    numbers: int = setting(3, at_least=3, at_most=5)  # countdown: numbers of a generated problem
    # masks drawn to compare an option of `choose`, or a length of an `infill` slot, by the bound on its likelihood
    mc_num: int = setting(128, at_least=2)
    # infill: tokens of a slot, such as 12, or 4-16 to try each; null: as many as the text that is missing has
    slot: str | None = None

    def __post_init__(self) -> None:
        check_fields(self, "task")
        if self.mc_num % 2:
            raise ValueError(f"task.mc_num={self.mc_num}: must be even, masks are drawn in pairs")

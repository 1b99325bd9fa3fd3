"""Base class of tasks: rows, the prompt of a row, the score of a response."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import ClassVar, Literal

from transformers import PreTrainedTokenizerBase

from data.chat import Columns, Message, final_answer, to_chat
from data.config import DataConfig, TaskConfig
from data.errors import BadRows
from data.files import READERS, iterate
from data.readers import PlacedRow
from data.report import Noted
from data.tasks.judge import extract, is_right, plain, stated


class Task(ABC):
    """Rows, their prompts, and scores of responses. A subclass defines `name` and `rows`, and may override the rest.

    Attributes:
        name: chooses the task on the command line, `task.name=NAME`.
        kind: the model generates a response, chooses one of the row's `options` by likelihood, or fills in the row's
            `template`.
        hub_id: set of the hub with the rows, unless `task.files` names others; None if the task needs no such set.
        reads_files: whether `task.files` may name its rows.
        judge: names what compares answers, with its version if it is a library.
        bad: rows that cannot be used; `rows` and the evaluation add to it.
        overlap: training rows that `rows` leaves out because they are test rows too.
    """

    name: ClassVar[str]
    kind: ClassVar[Literal["generate", "choose", "infill"]] = "generate"
    hub_id: ClassVar[str | None] = None
    reads_files: ClassVar[bool] = True
    judge: ClassVar[str] = "strict normaliser"
    config: DataConfig
    settings: TaskConfig

    def __init__(self, config: DataConfig | None = None, settings: TaskConfig | None = None):
        self.config, self.settings = config or DataConfig(), settings or TaskConfig()
        self.bad = BadRows("data.on_bad_row=skip leaves such rows out")
        self.overlap = Noted()

    @abstractmethod
    def rows(self, split: Literal["train", "test"]) -> Iterable[PlacedRow]:
        """Return the rows of a split, in a fixed order. `test` and `train` are disjoint.

        Raises:
            ValueError: the rows cannot be found.
        """

    def file(self) -> str:
        """Return the name of the task's rows in `task.files`, or else their `hub_id`.

        Raises:
            ValueError: neither.
        """
        if (file := self.settings.files.get(self.name, self.hub_id)) is None:
            raise ValueError(f"task.name={self.name}: give its rows by task.files.{self.name}=FILE")
        return file

    def read(self, files: Iterable[str]) -> Iterator[PlacedRow]:
        """Yield the rows of files under the names of `data.columns`; add unreadable ones to `bad`.

        `bad` forgets the rows of an earlier call, so give all files in one.

        Raises:
            ValueError: `data.columns` names a column that no row has, or see `data.files.iterate`.
        """
        columns = Columns(self.config.columns)
        self.bad.forget()
        for file in files:
            for row in iterate(file, self.bad):
                try:
                    named = columns(row)
                except ValueError as error:
                    self.bad.add(error)
                else:
                    yield named
        columns.check()

    def messages(self, row: PlacedRow) -> list[Message]:
        """Return the prompt of a row as chat messages.

        Raises:
            ValueError: the row cannot be used; the message names its place.
        """
        return to_chat(row)["prompt"]

    def reference(self, row: PlacedRow) -> str:
        """Return the row's own response, thinking included.

        Raises:
            ValueError: see `messages`.
        """
        return to_chat(row)["response"]

    def options(self, row: PlacedRow) -> list[str]:
        """Return the responses that a model may choose from, in a task of kind choose.

        Raises:
            ValueError: see `messages`.
        """
        raise NotImplementedError(f"{type(self).__name__} is of kind choose: define its options")

    def template(self, row: PlacedRow, tokenizer: PreTrainedTokenizerBase) -> str:
        """Return raw text with slots such as `<|mask:12|>` or `<|mask:4-16|>`, in a task of kind infill.

        Raises:
            ValueError: see `messages`.
        """
        raise NotImplementedError(f"{type(self).__name__} is of kind infill: define its template")

    def expected(self, row: PlacedRow) -> str:
        """Return the answer that a right response has: by default, what the reference states, else all of its text.

        Raises:
            ValueError: see `messages`.
        """
        reference = self.reference(row)
        return stated(reference) or final_answer(reference)

    def states_answer(self, row: PlacedRow) -> bool:
        """Whether the reference of a row states an answer; else the default `score` compares it as a whole text.

        True for a task that has another `expected` or `score`.

        Raises:
            ValueError: see `messages`.
        """
        is_default = (type(self).expected, type(self).score) == (Task.expected, Task.score)
        return not is_default or stated(self.reference(row)) is not None

    def answer(self, response: str) -> str | None:
        """Return the final answer of a response, or None if it has none. By default, any text is one."""
        return extract(response) or plain(response)

    def metrics(self, row: PlacedRow, response: str) -> dict[str, float]:
        """Return further measures of a response by name; an evaluation averages them."""
        return {}

    def score(self, row: PlacedRow, response: str) -> float:
        """Return a score in [0, 1]; 1 is right. By default, compare final answers, see `data.tasks.judge`.

        Raises:
            ValueError: the row cannot be used to score a response; the message names its place.
        """
        return float(is_right(response, self.expected(row)))

    def check(self, row: PlacedRow) -> None:
        """Refuse a row whose own response is not right.

        Raises:
            ValueError: the row's own response does not score 1, or cannot be scored; the message names its place.
        """
        if (score := self.score(row, self.reference(row))) != 1:
            raise ValueError(f"{row.place}: the row's own answer scores {score:g} in task.name={self.name}, expected 1")

    def file_of(self, split: Literal["train", "test"]) -> str:
        """Return the name of the task's rows of a split. A folder or a hub id has both splits, a file has test rows.

        Raises:
            ValueError: the split is train, and `task.files` names a file or a split; or see `file`.
        """
        file = self.file()
        if Path(file).suffix not in READERS and ":" not in file:
            return f"{file}:{split}"
        if split == "train":
            raise ValueError(
                f"task.files.{self.name}={file}: it has test rows only; name rows to train on in data.train_files"
            )
        return file

    def test_file(self, split: Literal["train", "test"]) -> str:
        """Return the name of the rows of a task that has test rows only.

        Raises:
            ValueError: the split is train, or see `file`.
        """
        if split == "train":
            raise ValueError(f"task.name={self.name}: it has test rows only; name rows to train on in data.train_files")
        return self.file()


def installed(package: str) -> str | None:
    """Return the version of a package, or None without it."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None

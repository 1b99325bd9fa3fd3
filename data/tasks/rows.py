"""Task of the user's own rows, scored by the verifier that `source` names or by their answers."""

from collections.abc import Iterator
from typing import Literal

from data.chat import final_answer
from data.readers import PlacedRow
from data.tasks import reasoning_gym
from data.tasks.base import Task, installed
from data.tasks.judge import stated


class Rows(Task):
    name = "rows"
    reads_files = False

    @property
    def judge(self) -> str:
        """The strict normaliser, and reasoning-gym with its version where its verifiers are installed."""
        version = installed("reasoning-gym")
        return f"{super().judge}, reasoning-gym {version}" if version else super().judge

    def rows(self, split: Literal["train", "test"]) -> Iterator[PlacedRow]:
        """Return the rows of `data.train_files` or `data.val_files`.

        Raises:
            ValueError: no files are set, or see `read`.
        """
        setting = {"train": "train_files", "test": "val_files"}[split]
        if not (files := getattr(self.config, setting)):
            raise ValueError(f"task.name=rows with data.{setting}=[]: name the files of rows")
        return self.read(files)

    def states_answer(self, row: PlacedRow) -> bool:
        """Whether the reference of a row states an answer, or a verifier scores the row."""
        return _has_verifier(row) or stated(self.reference(row)) is not None

    def score(self, row: PlacedRow, response: str) -> float:
        """Return the score of the verifier if the row has one, else that of `Task.score`."""
        if _has_verifier(row):
            return reasoning_gym.verify(row, final_answer(response))
        return super().score(row, response)


def _has_verifier(row: PlacedRow) -> bool:
    return str(row.row.get("source")).startswith(reasoning_gym.PREFIX)

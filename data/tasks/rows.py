"""Task of the user's own rows, scored by the verifier that `source` names or by their answers."""

from collections.abc import Iterator
from typing import Literal

from data.chat import Columns, final_answer
from data.files import iterate
from data.readers import PlacedRow
from data.tasks import reasoning_gym
from data.tasks.base import Task


class Rows(Task):
    name = "rows"

    def rows(self, split: Literal["train", "test"]) -> Iterator[PlacedRow]:
        """Yield the rows of `data.train_files` or `data.val_files` under the names of `data.columns`.

        Raises:
            ValueError: no files are set; `data.columns` names a column that no row has; or see `data.files.iterate`.
        """
        setting = {"train": "train_files", "test": "val_files"}[split]
        if not (files := getattr(self.config, setting)):
            raise ValueError(f"task.name=rows with data.{setting}=[]: name the files of rows")
        columns = Columns(self.config.columns)
        for file in files:
            for row in iterate(file, self.bad):
                try:
                    named = columns(row)
                except ValueError as error:
                    self.bad.add(error)
                else:
                    yield named
        columns.check()

    def score(self, row: PlacedRow, response: str) -> float:
        """Return the score of the verifier if the row has one, else that of `Task.score`."""
        if str(row.row.get("source")).startswith(reasoning_gym.PREFIX):
            return reasoning_gym.verify(row, final_answer(response))
        return super().score(row, response)

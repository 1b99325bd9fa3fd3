"""Batches of rows that are read during training, for data that is too large to be tokenized first.

Every rank reads all rows in the order of the files and shuffles them within windows. A batch does not depend on the
number of ranks, and a run resumes at the exact row.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from hashlib import sha256

import numpy as np
import pyarrow as pa
from torch.utils.data import IterableDataset
from transformers import PreTrainedTokenizerBase

from data.batches import BatchLayout, Noise, Stream, to_torch
from data.collate import assemble, response_widths
from data.config import DataConfig
from data.files import digest, iterate, outline
from data.preparation import Preparation
from data.report import Report
from data.token_cache import tokenizer_digest
from data.token_rows import TokenRows
from data.workers import Batch, from_workers, to_device_ready, to_numpy


@dataclass(frozen=True)
class Position:
    """The next row of a stream."""

    epoch: int = 0
    first: int = 0  # chats of the epoch before the row's window, kept or not
    offset: int = 0  # rows of the window before the row
    seen: int = 0  # rows of all windows before; sample indices continue from it


class StreamedBatches(IterableDataset):
    """This rank's micro-batches of successive optimizer steps.

    Attributes:
        report: on the rows read since this run started.

    Raises:
        ValueError: during the iteration, at the window with the error; see `rows_of_files`.
    """

    steps_per_epoch = None

    def __init__(
        self,
        files: Sequence[str],
        config: DataConfig,
        tokenizer: PreTrainedTokenizerBase,
        layout: BatchLayout,
        noise: Noise,
        seed: int,
    ):
        self.files, self.config, self.tokenizer, self.layout = files, config, tokenizer, layout
        self.noise, self.seed = noise, seed
        self.report, self.first_step = Report("training"), 0
        self._last = Position()  # after the last step that `loader` yielded
        self._positions: dict[int, Position] = {}  # by the steps done: the last position, and the one before

    def loader(self, steps: range) -> Iterator[list[Batch]]:
        """Yield this rank's micro-batches, step by step; in pinned memory if there is a GPU."""
        self.first_step = steps.start
        if steps.start:
            self.report.name = f"training after step {steps.start}"
        workers = min(self.config.num_workers, 1)  # more would read the rows several times
        with closing(from_workers(self, workers, pack=_pack)) as items:
            for step, item in zip(steps, items, strict=False):
                if isinstance(item, Exception):
                    raise item
                micro_batches, position, report = item
                self._positions, self._last = {step: self._last, step + 1: position}, position
                trained = (step + 1 - steps.start) * self.layout.global_batch_size
                self.report = replace(report, trained=trained)
                yield to_device_ready(micro_batches)

    def __iter__(self) -> Iterator[tuple[list[Batch], Position, Report] | Exception]:
        """Yield (micro-batches, position, report), or an error: a worker would add its traceback to a raised one."""
        try:
            yield from self._steps()
        except (ValueError, OSError) as error:
            yield error

    def _steps(self) -> Iterator[tuple[list[Batch], Position, Report]]:
        rows, step = self._rows(self._last), self.first_step
        while True:
            picked = [next(rows) for _ in range(self.layout.global_batch_size)]
            tokens = TokenRows(pa.concat_tables([row.table.slice(place, 1) for row, place, *_ in picked]))
            samples = np.array([number for _, _, number, *_ in picked])
            rng = np.random.default_rng((Stream.CUT, self.seed, step))
            widths = response_widths(tokens.prompt_lengths, tokens.response_lengths, self.config, rng)
            batches = []
            for micro_batch in range(self.layout.micro_batches):
                slots = self.layout.slots(micro_batch)
                batch = assemble(tokens, slots, widths[slots], self.tokenizer.eos_token_id)
                batch |= {"sample_index": samples[slots], "step": np.full_like(slots, step)}
                batches.append(self.noise(to_torch(batch, slots, self.layout.global_batch_size), 0))
            *_, position, report = picked[-1]
            yield batches, position, report
            step += 1

    def _rows(self, position: Position) -> Iterator[tuple[TokenRows, int, int, Position, Report]]:
        """Yield rows without end: table, index in the table, sample index, position after the row, report."""
        preparation = Preparation(self.config, self.tokenizer, self.report.name, curated=True)
        while True:
            sources = {file: iterate(file, preparation.bad, stream=True) for file in self.files}
            before = position
            for rows, taken in preparation.windows(sources, self.config.stream_window, skip=position.first):
                preparation.check()
                rng = np.random.default_rng((Stream.WINDOW, self.seed, position.epoch, position.first))
                order, report = rng.permutation(len(rows)), preparation.summary()
                for offset in range(position.offset, len(order)):
                    place = int(order[offset])
                    yield rows, place, position.seen + place, replace(position, offset=offset + 1), report
                position = Position(position.epoch, taken, 0, position.seen + len(rows))
            preparation.check()
            if position.seen == before.seen:
                raise ValueError(f"no row is left.\n{preparation.summary().text()}")
            position = Position(position.epoch + 1, 0, 0, position.seen)

    def identity(self) -> tuple[int, str]:
        """0, as the number of rows is unknown, and a digest of the files' outlines and the tokenizer.

        Raises:
            ValueError: a file is missing.
        """
        content = [
            [(file, outline(file)) for file in self.files],
            [digest(file) for file in self.config.decontaminate_files],
            tokenizer_digest(self.tokenizer),
        ]
        return 0, sha256(json.dumps(content).encode()).hexdigest()

    def epoch(self, step: int) -> float:
        """Complete passes over the rows at the last step that `loader` yielded."""
        return float(self._last.epoch)

    def position(self, step: int) -> dict[str, int]:
        """Position after `step` steps, the number of steps at the last item of `loader` or one less."""
        return asdict(self._positions[step])

    def resume(self, position: dict[str, int]) -> None:
        """Let `loader` start at a position of an earlier run."""
        self._last = Position(**position)


def _pack(item: tuple | Exception) -> tuple | Exception:
    if isinstance(item, Exception):
        return item
    micro_batches, position, report = item
    return to_numpy(micro_batches), position, report

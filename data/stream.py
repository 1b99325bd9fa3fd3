"""Rows that are read while they are trained on, for what is too large to be tokenized first.

Every rank reads all of it, in the order of the files, and shuffles within windows. So a batch is the same whatever the
ranks, and where to go on is known exactly.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from hashlib import sha256

import numpy as np
import pyarrow as pa
from torch.utils.data import DataLoader, IterableDataset
from transformers import PreTrainedTokenizerBase

from data.config import DataConfig
from data.cutoff import assemble, response_widths
from data.files import digest, iterate, outline
from data.loader import CUT, Batch, BatchLayout, Noise, each, follow_rank, to_device_ready, to_numpy, to_torch
from data.report import Report
from data.rows import Preparation, tokenizer_digest
from data.tokens import TokenRows

_WINDOW = 5  # first word of the keys of a window's order


@dataclass(frozen=True)
class Position:
    """The next row of a stream."""

    epoch: int = 0
    first: int = 0  # chats of the epoch before its window, kept or not
    offset: int = 0  # rows of its window before it
    seen: int = 0  # rows of all windows before, which numbers it

    def to_dict(self) -> dict[str, int]:
        """As plain values, for a checkpoint."""
        return asdict(self)


class StreamedBatches(IterableDataset):
    """The optimizer steps that follow `position`: of each the micro-batches that this rank forwards.

    Attributes:
        position: after the last step that `loader` gave; `before`: before that.
        report: of what was read for it, since the run was started.

    Raises:
        ValueError: while it is read, what `rows_of_files` raises, at the window where it is found.
    """

    steps_per_epoch = None  # not known before all is read

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
        self.start = Position()
        self._positions: dict[int, Position] = {}
        self.report, self.first_step = Report("training"), 0

    def loader(self, steps: range) -> Iterator[list[Batch]]:
        """Iterate over steps, made ahead of time in a worker process; in pinned memory if there is a GPU."""
        self.first_step, trained = steps.start, 0
        if steps.start:
            self.report.name = f"training after step {steps.start}"
        workers = min(self.config.num_workers, 1)  # one stream
        loader = DataLoader(
            self,
            batch_size=None,
            num_workers=workers,
            prefetch_factor=4 if workers else None,
            collate_fn=_arrays,
            worker_init_fn=follow_rank,
        )
        with closing(each(loader)) as items:
            for step, item in zip(steps, items, strict=False):
                if isinstance(item, Exception):
                    raise item
                micro_batches, position, report = item
                self._positions = dict([*self._positions.items()][-1:]) | {step + 1: position}
                self.start = position
                trained += self.layout.global_batch_size
                self.report = replace(report, trained=trained)
                yield to_device_ready(micro_batches)

    def __iter__(self) -> Iterator[tuple[list[Batch], Position, Report] | Exception]:
        """Micro-batches, position and report; at last an error, which a worker would raise with all its traceback."""
        try:
            yield from self._steps()
        except (ValueError, OSError) as error:
            yield error

    def _steps(self) -> Iterator[tuple[list[Batch], Position, Report]]:
        rows, step = self._rows(self.start), self.first_step
        while True:
            picked = [next(rows) for _ in range(self.layout.global_batch_size)]
            tokens = TokenRows(pa.concat_tables([row.table.slice(place, 1) for row, place, *_ in picked]))
            samples = np.array([number for _, _, number, *_ in picked])
            rng = np.random.default_rng((CUT, self.seed, step))
            widths = response_widths(tokens.prompt_lengths, tokens.response_lengths, self.config, rng)
            batches = []
            for micro_batch in range(self.layout.micro_batches):
                slots = self.layout.slots(micro_batch)
                batch = assemble(tokens, slots, widths[slots], self.tokenizer.eos_token_id)
                batch["sample_index"] = samples[slots]
                batches.append(self.noise(to_torch(batch, slots, self.layout.global_batch_size), 0))
            *_, position, report = picked[-1]
            yield batches, position, report
            step += 1

    def _rows(self, position: Position) -> Iterator[tuple[TokenRows, int, int, Position, Report]]:
        """Rows from a position on, without end: table and place in it, number, position behind it, report."""
        preparation = Preparation(self.config, self.tokenizer, self.report.name, curated=True)
        while True:
            sources = {file: iterate(file, preparation.bad, stream=True) for file in self.files}
            before = position
            for rows, taken in preparation.windows(sources, self.config.stream_window, skip=position.first):
                preparation.check()
                order = np.random.default_rng((_WINDOW, self.seed, position.epoch, position.first)).permutation(
                    len(rows)
                )
                report = preparation.summary()
                for offset in range(position.offset, len(order)):
                    place = int(order[offset])
                    yield rows, place, position.seen + place, replace(position, offset=offset + 1), report
                position = Position(position.epoch, taken, 0, position.seen + len(rows))
            preparation.check()
            if position.seen == before.seen:
                raise ValueError(f"no row is left.\n{preparation.summary().text()}")
            position = Position(position.epoch + 1, 0, 0, position.seen)

    def position(self, step: int) -> dict[str, int]:
        return asdict(self._positions.get(step, self.start))

    def resume(self, position: dict[str, int]) -> None:
        self.start = Position(**position)

    def identity(self) -> tuple[int, str]:
        """No number of rows, and what tells their source from others without reading all of it.

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
        """Passes over the rows that are complete."""
        return float(self.start.epoch)


def _arrays(item: tuple | Exception) -> tuple | Exception:
    if isinstance(item, Exception):
        return item
    micro_batches, position, report = item
    return to_numpy(micro_batches), position, report

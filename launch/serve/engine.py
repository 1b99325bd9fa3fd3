"""Sample the canvases of all requests in one thread, which owns the model.

Requests with equal settings share a `Sampler`, whatever their seeds and lengths. Samplers take turns, step by step. A
row's tokens do not depend on who shares its batch, so an answer is that of `sample.py prompt=…`.
"""

import threading
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache

from transformers import PreTrainedTokenizerBase

from data.terminal import print_stderr
from diffllm import DiffLLM
from diffllm.generate import special_tokens
from sampling import Canvas, SampledRow, Sampler, SamplingConfig, StepEvent, Tokens

OF_A_ROW = ("seed", "max_new_tokens")  # settings that rows of one sampler need not share
EXPLAINED = (ValueError, MemoryError, FloatingPointError)  # errors whose message goes to the client


class QueueFullError(Exception):
    """No place is left in the queue."""


class EngineEndedError(Exception):
    """The thread that samples has ended."""


@dataclass(eq=False)
class Job:
    """A response to sample. The engine's thread sets `event` and `outcome`, and then calls `notify`.

    Attributes:
        event: the last step, of a job that is watched.
        outcome: the filled canvas, or the error that ended the job.
    """

    canvas: Canvas
    config: SamplingConfig
    notify: Callable[[], object]
    watched: bool = False
    event: StepEvent | None = None
    outcome: SampledRow | Exception | None = None

    def step(self, event: StepEvent) -> None:
        """Take a step of the canvas."""
        self.event = event
        self._wake()

    def end(self, outcome: SampledRow | Exception) -> None:
        """Take the filled canvas, or an error."""
        self.outcome = outcome
        self._wake()

    def _wake(self) -> None:
        """Call `notify`. Its error must not end other jobs, or the thread."""
        try:
            self.notify()
        except Exception as error:
            print_traceback(error)


@dataclass
class Group:
    """A sampler and its jobs, by the identity of their canvases."""

    sampler: Sampler
    jobs: dict[int, Job] = field(default_factory=dict)


class Engine:
    """Samples jobs, `batch_size` at once, in the order of their arrival.

    Args:
        tokenizer: only the engine's thread may use it.
        queue: jobs that may wait.
    """

    def __init__(self, model: DiffLLM, tokenizer: PreTrainedTokenizerBase, batch_size: int, queue: int):
        self.model, self.tokenizer, self.batch_size, self.queue = model, tokenizer, batch_size, queue
        self._waiting: deque[Job] = deque()
        self._cancelled: list[Job] = []
        self._groups: dict[str, Group] = {}  # by settings
        self._stopped: Exception | None = None
        self._closing = False
        self._changed = threading.Condition()  # held while a job is queued, cancelled or admitted
        self._special = lru_cache(maxsize=64)(self._special_tokens)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether jobs are sampled."""
        return self._thread.is_alive()

    @property
    def running(self) -> int:
        """Number of jobs that are being sampled."""
        return sum(len(group.jobs) for group in [*self._groups.values()])

    @property
    def waiting(self) -> int:
        """Number of jobs in the queue."""
        return len(self._waiting)

    def submit(self, job: Job) -> None:
        """Add a job to the queue.

        Raises:
            QueueFullError: as many jobs wait as may.
            EngineEndedError: the thread has ended.
        """
        if self._thread.ident and not self.alive:  # a thread that has not started yet has no ident
            raise EngineEndedError
        with self._changed:
            if len(self._waiting) + self.running >= self.queue + self.batch_size:
                raise QueueFullError
            self._waiting.append(job)
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Drop a job before the next step. One that has ended changes nothing."""
        with self._changed:
            self._cancelled.append(job)
            self._changed.notify()

    def stop(self, reason: Exception) -> None:
        """End all jobs with an error before the next step, and each job that is submitted later."""
        with self._changed:
            self._stopped = reason
            self._changed.notify()

    def close(self) -> None:
        """End the thread after its step."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        def has_work() -> bool:
            return bool(self._waiting or self._groups or self._cancelled or self._closing)

        while True:
            with self._changed:
                self._changed.wait_for(has_work)
            if self._closing:
                return
            try:
                self._turn()
            except Exception as error:  # a bug of this class: without the thread later jobs would wait for ever
                print_traceback(error)
                self._end_all(error)

    def _turn(self) -> None:
        """Take a step of each sampler, after jobs have left and come."""
        self._drop_cancelled()
        if self._stopped is not None:
            self._end_all(self._stopped)
        self._admit()
        for key in [*self._groups]:
            self._step(key)

    def _drop_cancelled(self) -> None:
        with self._changed:
            cancelled, self._cancelled = self._cancelled, []
            for job in cancelled:
                if job in self._waiting:
                    self._waiting.remove(job)
        for job in cancelled:
            for key, group in [*self._groups.items()]:
                if group.jobs.pop(id(job.canvas), None):
                    group.sampler.drop(job.canvas)
                    self._drop_empty(key)

    def _end_all(self, reason: Exception) -> None:
        with self._changed:
            jobs = [*self._waiting]
            self._waiting.clear()
        for job in jobs:
            job.end(reason)
        for key in [*self._groups]:
            self._fail(key, reason)

    def _admit(self) -> None:
        """Give free places to waiting jobs."""
        while self._waiting and self.running < self.batch_size:
            job = self._waiting[0]
            try:
                key, group = self._group_of(job.config)
                group.sampler.add(job.canvas, job.step if job.watched else None, job.config.seed)
            except Exception as error:
                self._waiting.popleft()
                print_unexpected(error)
                job.end(error)
                continue
            with self._changed:
                self._waiting.popleft()
                self._groups[key] = group
                group.jobs[id(job.canvas)] = job

    def _group_of(self, config: SamplingConfig) -> tuple[str, Group]:
        """The group of some settings, a new one if none has them, and its key.

        Raises:
            ValueError: see `special_tokens`.
        """
        key = repr({name: value for name, value in vars(config).items() if name not in OF_A_ROW})
        if key in self._groups:
            return key, self._groups[key]
        special = self._special(tuple(config.stop), tuple(config.forbidden))
        return key, Group(Sampler(self.model, config, special))

    def _special_tokens(self, stop: tuple[str, ...], forbidden: tuple[str, ...]) -> Tokens:
        config = SamplingConfig(stop=[*stop], forbidden=[*forbidden])
        return special_tokens(self.model, self.tokenizer, config)

    def _step(self, key: str) -> None:
        """Take a step of a sampler. An error ends its jobs, and not the engine."""
        group = self._groups[key]
        try:
            filled = group.sampler.step()
        except Exception as error:
            print_unexpected(error)
            # They hold the tensors of the step for as long as someone holds the error.
            traceback.clear_frames(error.__traceback__)
            self._fail(key, error)
            return
        for row in filled:
            group.jobs.pop(id(row.canvas)).end(row)
        self._drop_empty(key)

    def _fail(self, key: str, error: Exception) -> None:
        for job in self._groups.pop(key).jobs.values():
            job.end(error)

    def _drop_empty(self, key: str) -> None:
        """Drop a sampler without jobs."""
        if not self._groups[key].jobs:
            del self._groups[key]


def print_unexpected(error: Exception) -> None:
    """Print an error with its traceback, unless its message is enough for the client."""
    if not isinstance(error, EXPLAINED):
        print_traceback(error)


def print_traceback(error: Exception) -> None:
    """Print an error with its traceback."""
    print_stderr("".join(traceback.format_exception(error)))

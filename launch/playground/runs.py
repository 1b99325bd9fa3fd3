"""Samples for the page: each step while it happens, and no step after the reader has left."""

import copy
import json
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from queue import Empty, SimpleQueue
from threading import Event, Lock, Thread
from time import monotonic, perf_counter
from typing import Any

from transformers import PreTrainedTokenizerBase

from data import prompt_ids
from data.chat import Message
from data.storage import first_line
from data.terminal import printable
from diffllm import DiffLLM
from diffllm.generate import check_context, response_of, special_tokens
from launch.answers import AnswerTemplate, check_template
from launch.playground.queue import Queue
from launch.recording import Recorder
from sampling import Canvas, SamplingConfig, StepEvent, Template, Tokens, fill, infill_templates
from sampling.render.page import page
from trainer.config import Config

MODES = ("prompt", "chat", "template")
CHARACTERS = 100_000  # most of a text that is tokenized
SECONDS = 0.05  # between two drafts that are sent to the page
IDLE = 0.5  # seconds
OnStep = Callable[[StepEvent], None]


class Stopped(Exception):  # noqa: N818 — no error
    """The reader of a sampling has left."""


@dataclass(frozen=True)
class Request:
    """A request of a user.

    Raises:
        ValueError: an unknown mode, no text, or one that is too long or not Unicode.
    """

    mode: str
    prompt: str
    template: str
    system: str = ""
    turns: Sequence[Message] = ()  # of a chat so far

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode={self.mode}: choose one of {', '.join(MODES)}")
        for name in ("prompt", "template", "system"):
            if len(text := getattr(self, name)) > CHARACTERS:
                raise ValueError(f"{name}: its {len(text):,} characters are too many, at most {CHARACTERS:,} can be")
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"{name}: character {error.start + 1} is half of a surrogate pair") from error
        if self.mode == "template" and not self.template.strip():
            raise ValueError("the template is empty: write a text with slots, such as 3x=<|mask:2|>")
        if self.mode != "template" and not self.prompt.strip():
            raise ValueError("the prompt is empty: write a question")

    @property
    def messages(self) -> list[Message]:
        """The conversation, up to the prompt."""
        system = [Message(role="system", content=self.system)] if self.system.strip() else []
        turns = self.turns if self.mode == "chat" else ()
        return [*system, *turns, Message(role="user", content=self.prompt)]


@dataclass
class Run:
    """One sampling of a request, as the page shows it.

    Lines of the recording are JSON: gradio and the browser go through all values at each draft, and texts are cheap.
    """

    label: str
    header: str
    before: int = 0  # requests that it waits for
    steps: list[str] = field(default_factory=list)
    result: dict[str, Any] | None = None
    page: str | None = None  # the export


@dataclass(frozen=True)
class Sample:
    """A canvas, and the function that fills it and returns text and number of tokens."""

    canvas: Canvas
    special: Tokens
    shown_from: int  # tokens before the text that is shown
    fill: Callable[[OnStep], tuple[str, int]]


class Playground:
    """A model that samples one request at a time.

    Args:
        config: settings of the command line.
        waiting: requests that may wait for the one that is sampled.
    """

    def __init__(self, model: DiffLLM, tokenizer: PreTrainedTokenizerBase, config: Config, waiting: int):
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.queue = Queue(waiting)
        self.sampling = Lock()  # held by the thread that samples, which ends its step after its reader has left
        self._reading = Lock()  # held by a reader who uses `tokenizer`: some calls change it
        self._sampler = copy.deepcopy(tokenizer)  # used by the thread that samples alone

    def run(self, request: Request, settings: Sequence[tuple[str, SamplingConfig]]) -> Iterator[list[Run]]:
        """Sample a request with one setting after the other. Yield all runs while they go on.

        Args:
            settings: each with its label.

        Raises:
            ValueError: before anything is sampled: a prompt or template that the model cannot take, or too many
                requests wait.
        """
        with self.queue.place() as place:
            with self._reading:
                prepared = [self._prepare(request, *each) for each in settings]
            runs: list[Run] = []
            for run, recorder, sample in prepared:
                runs.append(run)
                yield from self._fill(runs, recorder, sample, place)
            yield runs

    def _prepare(self, request: Request, label: str, config: SamplingConfig) -> tuple[Run, Recorder, Sample]:
        """Check a request with its settings, and start its recording."""
        sample = self._sample(request, config)
        prompt, template = request.prompt or None, request.template if request.mode == "template" else None
        origin = replace(self.config, sampling=config, prompt=prompt, template=template)
        recorder = Recorder(origin, self.tokenizer, sample.canvas, sample.special, sample.shown_from)
        return Run(label, json.dumps(asdict(recorder.header))), recorder, sample

    def _fill(self, runs: list[Run], recorder: Recorder, sample: Sample, place: object) -> Iterator[list[Run]]:
        """Fill in the last of the runs when the place has its turn. Yield all, again and again."""
        run = runs[-1]
        run.before = self.queue.before(place)
        yield runs
        while run.before:
            run.before = self.queue.before(place, IDLE)
            yield runs
        sent = 0.0
        with closing(events_of(sample.fill, self.sampling)) as events:
            while True:
                try:
                    event = next(events)
                except StopIteration as end:
                    (text, tokens), seconds = end.value
                    break
                if event is not None:
                    with self._reading:
                        run.steps.append(json.dumps(asdict(recorder.step(event))))
                if event is None or monotonic() - sent > SECONDS:
                    yield runs
                    sent = monotonic()
        recording = recorder.recording(text, tokens, seconds)
        run.result, run.page = asdict(recording.result), page(recording)

    def _sample(self, request: Request, config: SamplingConfig) -> Sample:
        """Check a request, and prepare its canvas."""
        special = special_tokens(self.model, self.tokenizer, config)
        prompt = prompt_ids(request.messages, self.tokenizer) if request.prompt.strip() else []
        if request.mode == "template":
            return self._fill_template(request, config, special, prompt)
        check_context(self.model, len(prompt), config)
        canvas = Canvas.after(prompt, config.max_new_tokens, special.mask, len(request.turns) // 2)

        def respond(on_step: OnStep) -> tuple[str, int]:
            own = special_tokens(self.model, self._sampler, config)  # `special` decodes by the readers' tokenizer
            [filled] = fill(self.model, [canvas], config, own, on_step=on_step)
            response = response_of(filled, self._sampler, config)
            return response.text, response.tokens

        return Sample(canvas, special, len(prompt), respond)

    def _fill_template(self, request: Request, config: SamplingConfig, special: Tokens, prompt: list[int]) -> Sample:
        template = Template.parse(request.template)
        if any(len(lengths) > 1 for lengths in template.slots):
            raise ValueError("the page fills slots of one length, such as <|mask:12|>; sample.py tries several")
        if prompt:
            template = AnswerTemplate(template.pieces, template.slots, tuple(prompt))
        check_template(template, self.model, self.tokenizer, config, special)
        [canvas] = template.canvases(self.tokenizer, special.mask)

        def respond(on_step: OnStep) -> tuple[str, int]:
            [filled] = infill_templates(self.model, self._sampler, [template], config, special, on_step=on_step)
            return filled.text, filled.length

        return Sample(canvas, special, len(prompt), respond)


def events_of(sample: Callable[[OnStep], Any], lock: Lock) -> Generator[StepEvent | None, None, Any]:
    """Yield the events of a sampling that runs in a thread; return its result and its seconds.

    Yields None after each IDLE seconds without an event: a generator can be closed between two values only.

    If the generator is closed, the sampling ends instead of taking its next step.

    Args:
        lock: held while it samples.
    """
    events, stopped, outcome, end = SimpleQueue(), Event(), Future(), object()

    def on_step(event: StepEvent) -> None:
        if stopped.is_set():
            raise Stopped
        events.put(event)

    def work() -> None:
        try:
            with lock:
                if stopped.is_set():
                    raise Stopped
                started = perf_counter()
                outcome.set_result((sample(on_step), perf_counter() - started))
        except BaseException as error:  # raised again by `outcome.result`
            # They hold the tensors of the step for as long as someone holds the error.
            traceback.clear_frames(error.__traceback__)
            outcome.set_exception(error)
        events.put(end)

    Thread(target=work, daemon=True).start()  # a process that ends does not wait for it, as it would for an executor
    try:
        while (event := _next(events)) is not end:
            yield event
        return outcome.result()
    finally:
        stopped.set()


def _next(events: SimpleQueue) -> Any:
    try:
        return events.get(timeout=IDLE)
    except Empty:
        return None


def message_of(error: Exception) -> str:
    """One line for the page. An unexpected error goes to the terminal too."""
    if type(error) is not ValueError:
        traceback.print_exception(error)
    return printable(first_line(error))

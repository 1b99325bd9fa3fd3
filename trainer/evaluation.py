"""Answer the questions of tasks over all ranks, resumable after any interruption.

A response depends on its prompt and row id, the sampling settings, weights and tokenizer, so any rank may sample it at
any time. Each rank appends finished responses to its own file for each task in the directory `OUTPUT.partial`. A run
resumes only if `run.json` in that directory has the digests and settings of this run.
"""

import itertools
import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, fields
from hashlib import sha1
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import Module
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from data import PlacedRow, prompt_ids
from data.chat import Chat, Message, tools_of
from data.curation import subset
from data.encode import encode
from data.errors import differences, listed
from data.storage import AppendedRecords, digest_bytes, read_object, read_records, refuse_links, whole_file
from data.tasks import tasks_of
from data.tasks.base import Task
from data.terminal import print_stderr
from data.token_cache import tokenizer_digest
from diffllm import DiffLLM
from diffllm.answers import Option, choose_options, fill_templates
from diffllm.generate import Response, check_context, generate
from diffllm.static_forward import prepare_sampling
from sampling import SamplingConfig, Template
from trainer.config import Config
from trainer.distributed import Distributed, locked

RECORD = {item.name: item.type for item in fields(Response)}


class Question(NamedTuple):
    """A row, and what a model is given of it: a prompt, a prompt with options, or a template."""

    row: PlacedRow
    messages: list[Message]  # empty with a template
    ids: np.ndarray  # [L] int32, the prompt, or the template with its slots at their longest
    options: Sequence[Option] = ()
    template: str | None = None


class Answers(NamedTuple):
    """Responses to all questions of a task."""

    responses: list[Response]  # in the order of the questions
    tokens_per_second: float | None  # of this run over all ranks; None if it sampled no tokens


def ask(row: PlacedRow, messages: list[Message], tokenizer: PreTrainedTokenizerBase) -> Question:
    """Tokenize the prompt of a row.

    Raises:
        ValueError: see `data.chat.tools_of` and `data.prompt_ids`.
    """
    ids = prompt_ids(messages, tokenizer, row.place, tools_of(row))
    return Question(row, messages, np.array(ids, dtype=np.int32))


def _ask_freely(task: Task, row: PlacedRow, tokenizer: PreTrainedTokenizerBase) -> Question:
    return ask(row, task.messages(row), tokenizer)


def _ask_to_choose(task: Task, row: PlacedRow, tokenizer: PreTrainedTokenizerBase) -> Question:
    """Tokenize the prompt and options of a row; each option as an answer in training, with its end."""
    question, texts = _ask_freely(task, row, tokenizer), task.options(row)
    chats = [Chat(prompt=question.messages, response=text, tools=tools_of(row) or []) for text in texts]
    options = []
    for text, encoded in zip(texts, encode(chats, [row.place] * len(texts), tokenizer), strict=True):
        if isinstance(encoded, ValueError):
            raise encoded
        options.append(Option(text, encoded.input_ids[encoded.prompt_length :]))
    return question._replace(options=options)


def _ask_to_infill(task: Task, row: PlacedRow, tokenizer: PreTrainedTokenizerBase) -> Question:
    text = task.template(row, tokenizer)
    try:
        canvases = Template.parse(text).canvases(tokenizer, tokenizer.mask_token_id)
    except ValueError as error:
        raise ValueError(f"{row.place}: {error}") from error
    longest = max((canvas.tokens for canvas in canvases), key=len)
    return Question(row, [], np.array(longest, dtype=np.int32), template=text)


ASK = {"generate": _ask_freely, "choose": _ask_to_choose, "infill": _ask_to_infill}  # by kind of task


def evaluated_tasks(config: Config) -> list[Task]:
    """Return the tasks of an evaluation: those of `task.name`, or else the rows of `data.val_files`, or equations.

    Raises:
        ValueError: `data.val_files` that no task reads, or see `tasks_of`.
    """
    tasks = tasks_of(config.data, config.task, "rows" if config.data.val_files else "equations")
    if config.data.val_files and "rows" not in (names := [task.name for task in tasks]):
        raise ValueError(
            f"data.val_files={config.data.val_files} with task.name={names}: only the task rows reads them; give the "
            f"rows of {names[0]} by task.files.{names[0]}=FILE"
        )
    return tasks


def questions_of(task: Task, tokenizer: PreTrainedTokenizerBase, seed: int) -> list[Question]:
    """Return the questions of a task's test rows, or of `data.subset` of them. Add unusable rows to `task.bad`.

    Raises:
        ValueError: rows cannot be used, unless `data.on_bad_row=skip`; none is left; or see `data.curation.subset`.
    """
    questions = []
    task.bad.forget()
    for row in task.rows("test"):
        try:
            task.check(row)
            questions.append(ASK[task.kind](task, row, tokenizer))
        except ValueError as error:
            task.bad.add(error)
    if task.config.on_bad_row == "error" or not questions:
        task.bad.refuse()
    if not questions:
        raise ValueError(f"task.name={task.name}: it has no test rows")
    if task.config.subset is None:
        return questions
    return [questions[i] for i in subset(len(questions), task.config.subset, seed)]


def origin_of(
    tasks: Mapping[str, Sequence[Question]], config: SamplingConfig, model: Module, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """Return digests of rows, weights and tokenizer, and the sampling settings, by names for errors.

    The digest of a task's rows does not depend on the tokenizer, that of its rows in tokens does.

    Args:
        tasks: questions by task.
    """
    weights = sha1()
    for name, parameter in model.named_parameters():
        content = parameter.detach().cpu().flatten().view(torch.uint8).numpy()
        weights.update(f"{name} {parameter.dtype} {[*parameter.shape]} {digest_bytes(content)}".encode())
    return {
        **{f"rows of {name}": _digest(map(_content, questions)) for name, questions in tasks.items()},
        **{f"rows of {name} in tokens": _digest(map(_tokens, questions)) for name, questions in tasks.items()},
        "the model's weights": weights.hexdigest()[:12],
        "the tokenizer": tokenizer_digest(tokenizer)[:12],
        **{
            f"sampling.{name}": value for name, value in asdict(config).items() if name not in ("batch_size", "compile")
        },
    }


def _digest(contents: Iterable[bytes]) -> str:
    """Number and digest of rows."""
    count, content = 0, sha1()
    for each in contents:
        content.update(each + b"/")
        count += 1
    return f"{count} rows ({content.hexdigest()[:12]})"


def _content(question: Question) -> bytes:
    return json.dumps(question.row.row, sort_keys=True, default=str).encode()


def _tokens(question: Question) -> bytes:
    options = [np.array(option.ids, dtype=np.int32).tobytes() for option in question.options]
    return b"|".join([question.ids.tobytes(), *options, (question.template or "").encode()])


def answer_all(
    tasks: Mapping[str, Sequence[Question]],
    model: DiffLLM,
    tokenizer: PreTrainedTokenizerBase,
    config: SamplingConfig,
    output: Path,
    origin: dict[str, Any],
    distributed: Distributed,
    write: Callable[[dict[str, Answers]], None],
    so_far: Callable[[str, Response], str] = lambda *_: "",
    samples: int = 128,
) -> None:
    """Answer every question, one task after the other; rank 0 calls `write`. Collective.

    After an interruption the same call resumes, on any number of ranks and with any `sampling.batch_size`.

    Args:
        tasks: questions by task. A response does not depend on other tasks.
        output: file of `write`. The directory `OUTPUT.partial` holds finished responses until it is written.
        origin: `origin_of` the tasks, and further values that the output depends on.
        write: takes the answers by task.
        so_far: takes each response on rank 0 with its task, those of earlier runs first. Returns a text for the
            progress bar.
        samples: masks drawn for an option, or a length of a slot; even.

    Raises:
        ValueError: before any sampling: a question does not fit the model's context; rows, settings or weights differ
            from the interrupted run; or another run writes to the same output.
        KeyboardInterrupt: with the advice to resume.
    """
    directory = output.with_name(f"{output.name}.partial")
    refuse_links(output, directory)
    for question in itertools.chain(*tasks.values()):
        _check_context(question, model, config)
    try:
        with locked(directory, distributed, "run.json"):

            def begin() -> dict[str, set[int]]:
                found = finished(directory)
                _check_origin(directory, sum(map(len, found.values())), origin)
                _check_rows(directory, found, tasks)
                for name, responses in found.items():
                    for response in responses.values():
                        so_far(name, response)
                return {name: {*found.get(name, ())} for name in tasks}

            done, seconds = distributed.on_main(begin), {}
            if distributed.is_main and (count := sum(map(len, done.values()))):
                every = sum(map(len, tasks.values()))
                print_stderr(f"{directory}: {count} of {every} rows are done")
            for name, questions in tasks.items():
                started, given = time.perf_counter(), (model, tokenizer, config, directory, distributed)
                _sample(name, questions, done[name], *given, so_far, samples)
                distributed.wait()
                seconds[name] = time.perf_counter() - started

            def finish() -> None:
                found = finished(directory)
                write(
                    {
                        name: _answers(name, found.get(name, {}), len(questions), done[name], seconds[name])
                        for name, questions in tasks.items()
                    }
                )

            distributed.on_main(finish)
        distributed.on_main(lambda: shutil.rmtree(directory))
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt("run the same command to resume") from error


def _check_context(question: Question, model: DiffLLM, config: SamplingConfig) -> None:
    """Refuse a question that does not fit the model's context."""
    place = question.row.place
    if not question.options and question.template is None:
        check_context(model, len(question.ids), config, f"{place}: a prompt")
        return
    model.check_sampling(config)
    length = len(question.ids) + max((len(option.ids) for option in question.options), default=0)
    if length > (context := model.lm.config.max_position_embeddings):
        what = "a template" if question.template else "a prompt with its longest option"
        raise ValueError(f"{place}: {what} of {length} tokens does not fit the model's context of {context} tokens")


def _check_origin(directory: Path, done: int, origin: dict[str, Any]) -> None:
    """Write or check `run.json`.

    Raises:
        ValueError: the directory holds responses of another run.
    """
    record = directory / "run.json"
    if not done:
        with whole_file(record) as file:
            file.write(json.dumps(origin, indent=2) + "\n")
    elif found := differences(read_object(record), origin):
        raise ValueError(
            f"{directory} holds {done} rows of an interrupted run with other settings: {'; '.join(found)}. "
            "Give the same ones to resume it, delete the directory to start again, or name another output"
        )


def _check_rows(
    directory: Path, found: Mapping[str, Mapping[int, Response]], tasks: Mapping[str, Sequence[Question]]
) -> None:
    """Refuse responses to rows that the tasks do not have, before a judge looks their questions up."""
    counts = {name: len(tasks.get(name, ())) for name in found}
    if strays := [f"{name} {row}" for name, rows in found.items() for row in rows if row not in range(counts[name])]:
        raise ValueError(f"{directory} has responses to rows that do not exist: {listed(strays)}; delete their lines")


def _sample(
    name: str,
    questions: Sequence[Question],
    done: set[int],
    model: DiffLLM,
    tokenizer: PreTrainedTokenizerBase,
    config: SamplingConfig,
    directory: Path,
    distributed: Distributed,
    so_far: Callable[[str, Response], str],
    samples: int,
) -> None:
    """Answer this rank's share of a task's unanswered questions.

    The first new line of the rank's file overwrites a line that a kill has cut short.

    Raises:
        OSError: responses cannot be written, or their file was deleted.
    """
    todo = [row_id for row_id in range(len(questions)) if row_id not in done]
    todo.sort(key=lambda row_id: -len(questions[row_id].ids))  # the longest first: a lack of memory shows at once
    row_ids = todo[distributed.rank :: distributed.size]
    asked = [questions[row_id] for row_id in row_ids]
    prepare_sampling(model, config.compile, _forwards(asked, config, samples))
    responses = _responses(asked, row_ids, model, tokenizer, config, samples)
    label = f"{name}, rank 0 of {distributed.size}" if distributed.size > 1 else name
    file = directory / f"{name}.rank{distributed.rank}-of-{distributed.size}.jsonl"
    bar = tqdm(responses, label, len(row_ids), unit="row", disable=not (distributed.is_main and row_ids))
    with closing(AppendedRecords(file)) as lines, bar:
        for response in bar:
            lines.append(asdict(response))
            if distributed.is_main:
                bar.set_postfix_str(so_far(name, response), refresh=False)


def _responses(
    questions: Sequence[Question],
    row_ids: Sequence[int],
    model: DiffLLM,
    tokenizer: PreTrainedTokenizerBase,
    config: SamplingConfig,
    samples: int,
) -> Iterator[Response]:
    """Yield responses to questions of one kind as soon as they are done."""
    if questions and questions[0].options:
        given = [(question.ids, question.options) for question in questions]
        return choose_options(model, tokenizer, given, config, row_ids, samples)
    if questions and questions[0].template is not None:
        templates = [Template.parse(question.template) for question in questions]
        return fill_templates(model, tokenizer, templates, config, row_ids, samples)
    return generate(model, tokenizer, [question.ids for question in questions], config, row_ids)


def _forwards(questions: Sequence[Question], config: SamplingConfig, samples: int) -> int:
    """Forwards that the questions take, roughly: the steps of each batch, or the masks of all options."""
    if options := sum(len(question.options) for question in questions):
        return options * samples // config.batch_size
    return (config.steps or config.max_new_tokens) * -(-len(questions) // config.batch_size)


def finished(directory: Path) -> dict[str, dict[int, Response]]:
    """Return the finished responses of a directory by task and row id.

    Raises:
        ValueError: a line is broken; the message shows it.
    """
    done: dict[str, dict[int, Response]] = {}
    for file in sorted(directory.glob("*.rank*.jsonl")):
        of_task = done.setdefault(file.name.rpartition(".rank")[0], {})
        for record in read_records(file).objects:
            if {name: type(value) for name, value in record.items()} != RECORD:
                text = json.dumps(record)[:80]
                raise ValueError(f"{file} has a line that is no response: {text}; delete that line")
            of_task[record["row_id"]] = Response(**record)
    return done


def _answers(name: str, responses: dict[int, Response], count: int, done: set[int], seconds: float) -> Answers:
    """Return the responses of a task in the order of the questions.

    Args:
        count: number of questions.
        done: row ids of earlier runs.
        seconds: of this run.

    Raises:
        OSError: responses of another rank cannot be read yet, as on a slow network disk.
    """
    if missing := count - len(responses):
        raise OSError(f"{missing} finished rows of {name} cannot be read yet: run the same command again")
    tokens = sum(response.tokens for response in responses.values() if response.row_id not in done)
    return Answers([responses[row_id] for row_id in range(count)], tokens / seconds if tokens else None)

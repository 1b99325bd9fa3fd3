"""Sample responses to many prompts over all ranks, resumable after any interruption.

A response depends on its prompt, its row id, the sampling settings and the weights alone, so any rank may sample it at
any time. Each rank appends finished responses to its own file in the directory `OUTPUT.partial`. `run.json` in that
directory holds what the responses depend on: a run resumes only with the same.
"""

import json
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, fields
from hashlib import sha1
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from data import PlacedRow, prompt_ids
from data.chat import Message, tools_of
from data.errors import differences
from data.storage import AppendedRecords, read_object, read_records, refuse_links, whole_file
from data.tasks.base import Task
from data.terminal import printable
from diffllm import DiffLLM
from diffllm.generate import Response, check_context, generate
from sampling import SamplingConfig
from trainer.distributed import Distributed, locked

RECORD = {item.name: item.type for item in fields(Response)}  # of a finished row


class Question(NamedTuple):
    """A row as the model gets it."""

    row: PlacedRow
    messages: list[Message]
    ids: np.ndarray  # [L], int32: the prompt


def ask(row: PlacedRow, messages: list[Message], tokenizer: PreTrainedTokenizerBase) -> Question:
    """Tokenize the prompt of a row.

    Raises:
        ValueError: see `data.chat.tools_of` and `data.prompt_ids`.
    """
    ids = prompt_ids(messages, tokenizer, row.place, tools_of(row))
    return Question(row, messages, np.array(ids, dtype=np.int32))


def questions_of(task: Task, tokenizer: PreTrainedTokenizerBase) -> list[Question]:
    """Return the questions of a task's test rows. `task.bad` holds the rows that cannot be used.

    Raises:
        ValueError: rows cannot be used, unless `data.on_bad_row=skip`, or none is left.
    """
    questions = []
    for row in task.rows("test"):
        try:
            task.check(row)
            questions.append(ask(row, task.messages(row), tokenizer))
        except ValueError as error:
            task.bad.add(error)
    if task.config.on_bad_row == "error" or not questions:
        task.bad.refuse()
    if not questions:
        raise ValueError(f"task.name={task.name}: it has no test rows")
    return questions


def answer_all(
    questions: Sequence[Question],
    model: DiffLLM,
    tokenizer: PreTrainedTokenizerBase,
    config: SamplingConfig,
    output: Path,
    origin: dict[str, Any],
    distributed: Distributed,
    write: Callable[[list[Response], float | None], None],
) -> None:
    """Sample a response to every question and let rank 0 write them. Collective.

    After an interruption the same call resumes, on any number of ranks and with any `sampling.batch_size`.

    Args:
        output: what `write` writes. The directory `OUTPUT.partial` holds finished responses until then.
        origin: what else the output depends on, by the name for the user.
        write: takes the responses in the order of the questions, and the tokens a second that this run sampled on all
            ranks together, None if earlier runs had sampled all.

    Raises:
        ValueError: a question does not fit the model's context; other rows, settings or weights than those of the
            interrupted run; or another run writes to the same output. Nothing was sampled.
        KeyboardInterrupt: with the advice to resume.
    """
    directory = output.with_name(f"{output.name}.partial")
    refuse_links(output, directory)
    for question in questions:
        check_context(model, len(question.ids), config, f"{question.row.place}: a prompt")
    origin = origin | _origin(questions, config, model)
    try:
        with locked(directory, distributed, "run.json"):
            done = distributed.on_main(lambda: _begin(directory, origin))
            if distributed.is_main and done:
                print(printable(f"{directory}: {len(done)} of {len(questions)} rows are done"), file=sys.stderr)
            started = time.perf_counter()
            _sample(questions, done, model, tokenizer, config, directory, distributed)
            distributed.wait()
            seconds = time.perf_counter() - started

            def finish() -> None:
                responses = _in_order(directory, len(questions))
                sampled = [response.tokens for response in responses if response.row_id not in done]
                write(responses, sum(sampled) / seconds if sampled else None)

            distributed.on_main(finish)
        distributed.on_main(lambda: shutil.rmtree(directory))
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt("the same command goes on where this one was") from error


def _origin(questions: Sequence[Question], config: SamplingConfig, model: DiffLLM) -> dict[str, Any]:
    """All that responses depend on, by names for the user."""
    tokens, weights = sha1(), sha1()
    for question in questions:
        tokens.update(question.ids.tobytes() + b"/")
    for name, parameter in model.named_parameters():
        weights.update(f"{name} {torch.hash_tensor(parameter.detach()).item()}".encode())
    return {
        "prompts in tokens": f"{len(questions)} rows ({tokens.hexdigest()[:12]})",
        "the model's weights": weights.hexdigest()[:12],
        **{f"sampling.{name}": value for name, value in asdict(config).items() if name != "batch_size"},
    }


def _begin(directory: Path, origin: dict[str, Any]) -> set[int]:
    """Make the directory one of this run, and return the row ids of its finished responses.

    Raises:
        ValueError: it holds responses of another run.
    """
    done, record = finished(directory), directory / "run.json"
    if not done:
        with whole_file(record) as file:
            file.write(json.dumps(origin, indent=2) + "\n")
        return set()
    if found := differences(read_object(record), origin):
        raise ValueError(
            f"{directory} holds {len(done)} rows of an interrupted run with other settings: {'; '.join(found)}. "
            "Give the same ones to go on with it, delete the directory to start anew, or name another output"
        )
    return set(done)


def _sample(
    questions: Sequence[Question],
    done: set[int],
    model: DiffLLM,
    tokenizer: PreTrainedTokenizerBase,
    config: SamplingConfig,
    directory: Path,
    distributed: Distributed,
) -> None:
    """Sample this rank's share of what is not done. A new line takes the place of an end that a kill has torn.

    Raises:
        OSError: responses cannot be written, or their file was deleted.
    """
    todo = [row_id for row_id in range(len(questions)) if row_id not in done]
    todo.sort(key=lambda row_id: -len(questions[row_id].ids))  # so that too little memory shows at once
    row_ids = todo[distributed.rank :: distributed.size]
    responses = generate(model, tokenizer, [questions[row_id].ids for row_id in row_ids], config, row_ids)
    label = f"rank 0 of {distributed.size}" if distributed.size > 1 else None
    file = directory / f"rank{distributed.rank}-of-{distributed.size}.jsonl"
    bar = tqdm(responses, label, len(row_ids), unit="row", disable=not distributed.is_main)
    with closing(AppendedRecords(file)) as lines, bar:
        for response in bar:
            lines.append(asdict(response))


def finished(directory: Path) -> dict[int, Response]:
    """Return the finished responses in a directory by row id.

    Raises:
        ValueError: a line is broken; the message names it.
    """
    done = {}
    for file in sorted(directory.glob("rank*.jsonl")):
        for record in read_records(file).objects:
            if {name: type(value) for name, value in record.items()} != RECORD:
                text = json.dumps(record)[:80]
                raise ValueError(f"{file} has a line that is no response: {text}; delete that line")
            done[record["row_id"]] = Response(**record)
    return done


def _in_order(directory: Path, count: int) -> list[Response]:
    """Return all responses in the order of the questions.

    Raises:
        OSError: responses of another rank cannot be read, as on a network disk that lags.
    """
    done = finished(directory)
    if missing := count - len(done):
        raise OSError(f"{directory}: {missing} finished rows cannot be read yet: run the same command again")
    return [done[row_id] for row_id in range(count)]

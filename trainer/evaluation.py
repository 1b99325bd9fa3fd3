"""Sample responses to many prompts over all ranks, resumable after any interruption.

A response depends on its prompt and row id, the sampling settings, weights and tokenizer, so any rank may sample it at
any time. Each rank appends finished responses to its own file in the directory `OUTPUT.partial`. A run resumes only if
`run.json` in that directory has the digests and settings of this run.
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
from data.curation import subset
from data.errors import differences
from data.storage import AppendedRecords, digest_bytes, read_object, read_records, refuse_links, whole_file
from data.tasks.base import Task
from data.terminal import printable
from data.token_cache import tokenizer_digest
from diffllm import DiffLLM
from diffllm.generate import Response, check_context, generate
from diffllm.static_forward import prepare_sampling
from sampling import SamplingConfig
from trainer.distributed import Distributed, locked

RECORD = {item.name: item.type for item in fields(Response)}


class Question(NamedTuple):
    """A row and its prompt."""

    row: PlacedRow
    messages: list[Message]
    ids: np.ndarray  # [L] int32, the prompt


def ask(row: PlacedRow, messages: list[Message], tokenizer: PreTrainedTokenizerBase) -> Question:
    """Tokenize the prompt of a row.

    Raises:
        ValueError: see `data.chat.tools_of` and `data.prompt_ids`.
    """
    ids = prompt_ids(messages, tokenizer, row.place, tools_of(row))
    return Question(row, messages, np.array(ids, dtype=np.int32))


def questions_of(task: Task, tokenizer: PreTrainedTokenizerBase, seed: int) -> list[Question]:
    """Return the questions of a task's test rows, or of `data.subset` of them. Add unusable rows to `task.bad`.

    Raises:
        ValueError: rows cannot be used, unless `data.on_bad_row=skip`; none is left; or see `data.curation.subset`.
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
    if task.config.subset is None:
        return questions
    return [questions[i] for i in subset(len(questions), task.config.subset, seed)]


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
    """Sample a response to every question; rank 0 calls `write`. Collective.

    After an interruption the same call resumes, on any number of ranks and with any `sampling.batch_size`.

    Args:
        output: file of `write`. The directory `OUTPUT.partial` holds finished responses until it is written.
        origin: further values that the output depends on, by their names in errors.
        write: takes the responses in the order of the questions, and the tokens per second of this run over all ranks,
            or None if earlier runs had sampled all responses.

    Raises:
        ValueError: before any sampling: a question does not fit the model's context; rows, settings or weights differ
            from the interrupted run; or another run writes to the same output.
        KeyboardInterrupt: with the advice to resume.
    """
    directory = output.with_name(f"{output.name}.partial")
    refuse_links(output, directory)
    for question in questions:
        check_context(model, len(question.ids), config, f"{question.row.place}: a prompt")
    try:
        with locked(directory, distributed, "run.json"):
            done = distributed.on_main(lambda: _begin(directory, origin | _origin(questions, config, model, tokenizer)))
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
        raise KeyboardInterrupt("run the same command to resume") from error


def _origin(
    questions: Sequence[Question], config: SamplingConfig, model: DiffLLM, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """Digests of prompts, weights and tokenizer, and the sampling settings, by their names in errors."""
    tokens, weights = sha1(), sha1()
    for question in questions:
        tokens.update(question.ids.tobytes() + b"/")
    for name, parameter in model.named_parameters():
        content = parameter.detach().cpu().flatten().view(torch.uint8).numpy()
        weights.update(f"{name} {parameter.dtype} {[*parameter.shape]} {digest_bytes(content)}".encode())
    return {
        "prompts in tokens": f"{len(questions)} rows ({tokens.hexdigest()[:12]})",
        "the model's weights": weights.hexdigest()[:12],
        "the tokenizer": tokenizer_digest(tokenizer)[:12],
        **{
            f"sampling.{name}": value for name, value in asdict(config).items() if name not in ("batch_size", "compile")
        },
    }


def _begin(directory: Path, origin: dict[str, Any]) -> set[int]:
    """Write or check `run.json`. Return the row ids of finished responses.

    Raises:
        ValueError: the directory holds responses of another run.
    """
    done, record = finished(directory), directory / "run.json"
    if not done:
        with whole_file(record) as file:
            file.write(json.dumps(origin, indent=2) + "\n")
        return set()
    if found := differences(read_object(record), origin):
        raise ValueError(
            f"{directory} holds {len(done)} rows of an interrupted run with other settings: {'; '.join(found)}. "
            "Give the same ones to resume it, delete the directory to start again, or name another output"
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
    """Sample this rank's share of the unfinished rows. The first new line overwrites a line that a kill has cut short.

    Raises:
        OSError: responses cannot be written, or their file was deleted.
    """
    todo = [row_id for row_id in range(len(questions)) if row_id not in done]
    todo.sort(key=lambda row_id: -len(questions[row_id].ids))  # the longest first: a lack of memory shows at once
    row_ids = todo[distributed.rank :: distributed.size]
    steps = config.steps or config.max_new_tokens
    prepare_sampling(model, config.compile, forwards=steps * -(-len(row_ids) // config.batch_size))
    responses = generate(model, tokenizer, [questions[row_id].ids for row_id in row_ids], config, row_ids)
    label = f"rank 0 of {distributed.size}" if distributed.size > 1 else None
    file = directory / f"rank{distributed.rank}-of-{distributed.size}.jsonl"
    bar = tqdm(responses, label, len(row_ids), unit="row", disable=not distributed.is_main)
    with closing(AppendedRecords(file)) as lines, bar:
        for response in bar:
            lines.append(asdict(response))


def finished(directory: Path) -> dict[int, Response]:
    """Return the finished responses of a directory by row id.

    Raises:
        ValueError: a line is broken; the message shows it.
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
        OSError: responses of another rank cannot be read yet, as on a slow network disk.
    """
    done = finished(directory)
    if missing := count - len(done):
        raise OSError(f"{directory}: {missing} finished rows cannot be read yet: run the same command again")
    return [done[row_id] for row_id in range(count)]

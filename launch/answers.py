"""One prompt answered or template filled in on the terminal, or a file of prompts: on all ranks, however interrupted.

A response depends on its row, its number in the file, the sampling settings and the model alone, so it does not matter
which rank gives it, or when. Each rank appends those that are done to a file of its own in the directory
`OUTPUT.partial`; when all are there they are written to OUTPUT, in the order of the input. `run.json` in the directory
says what the responses depend on: a run goes on only with the same.
"""

import json
import shutil
import sys
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import asdict, fields
from hashlib import sha1
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from data import PlacedRow, prompt_ids, read_rows
from data.chat import ANSWERS, Columns, Message, to_prompt, tools_of
from data.storage import AppendedRecords, read_object, read_records, refuse_links, whole_file
from data.terminal import for_stdout, printable
from diffllm import DiffLLM
from diffllm.generate import Response, check_fits, generate, special_tokens
from sampling import SamplingConfig, Template, infill_templates
from trainer.build import load_for_sampling
from trainer.config import Config
from trainer.distributed import init_distributed, locked, ranks_from_environment

RECORD = {item.name: item.type for item in fields(Response)}  # of a finished row


def answer(config: Config) -> None:
    """Answer `prompt` or fill in `template` on the terminal, or answer every row of the file `input` into `output`.

    Raises:
        ValueError: not one of the three; see `answer_prompt`, `fill_template` and `answer_file`.
    """
    if sum(given is not None for given in (config.prompt, config.template, config.input)) != 1:
        raise ValueError("give one of prompt=…, template=… or input=FILE.jsonl output=FILE.jsonl")
    if config.template is not None:
        fill_template(config)
    elif config.input is not None:
        try:
            answer_file(config)
        except KeyboardInterrupt:
            sys.exit("stopped: the same command goes on where this one was")
    else:
        answer_prompt(config)


def answer_prompt(config: Config) -> None:
    """Print the response to `config.prompt`.

    Raises:
        ValueError: an output, several ranks, an empty prompt or one too long for the model, or no checkpoint.
    """
    if config.output is not None:
        raise ValueError(f"output={config.output}: goes with input=FILE; prompt=… is answered on the terminal")
    check_alone("prompt=…")
    if not config.prompt.strip():
        raise ValueError("prompt= is empty: give a question, such as prompt='Solve 3x+5=20'")
    model, tokenizer = load_for_sampling(config)
    prompt = prompt_ids([Message(role="user", content=config.prompt)], tokenizer)
    [response] = generate(model, tokenizer, [prompt], config.sampling)
    print(for_stdout(response.text))
    if not response.text:
        print("the response is empty: the model ended it at once", file=sys.stderr)
    elif not response.text.strip():
        print("the response is white space only", file=sys.stderr)


def fill_template(config: Config) -> None:
    """Print `config.template` with its slots, such as `<|mask:12|>`, filled in; it is raw text, not a chat.

    Raises:
        ValueError: an output, several ranks, no checkpoint, or a template without slots or too long for the model.
    """
    if config.output is not None:
        raise ValueError(f"output={config.output}: goes with input=FILE; template=… is filled in on the terminal")
    check_alone("template=…")
    template = Template.parse(config.template)
    model, tokenizer = load_for_sampling(config)
    special = special_tokens(model, tokenizer, config.sampling)
    length = max(len(canvas.tokens) for canvas in template.canvases(tokenizer, special.mask))
    if length > (context := model.lm.config.max_position_embeddings):
        raise ValueError(f"template: its {length} tokens do not fit the model's context of {context} tokens")
    [filled] = infill_templates(model, tokenizer, [template], config.sampling, special)
    print(for_stdout(filled.text))


def check_alone(what: str) -> None:
    """Refuse several ranks.

    Raises:
        ValueError: torchrun has started more than one.
    """
    if (ranks := ranks_from_environment()[1]) > 1:
        raise ValueError(f"{what} is for one rank, torchrun has started {ranks}: start it with `python sample.py …`")


def answer_file(config: Config) -> None:
    """Write the rows of `config.input` to `config.output`, each with its `response`, `nfe` and `tokens_per_forward`.

    A `response` that a row has already is kept as its `reference`.

    If it is interrupted, the same command goes on, on any number of ranks and with any `sampling.batch_size`.

    Raises:
        ValueError: no output, or one that exists; a row that is no prompt, or too long for the model; no checkpoint; an
            interrupted run with other rows, settings or weights. All of it before anything is sampled.
    """
    if config.output is None or Path(config.output).suffix != ".jsonl":
        raise ValueError(f"input={config.input} with output={config.output}: give output=FILE.jsonl")
    output = Path(config.output)
    if output.exists():
        raise ValueError(f"output={output} exists already: delete it, or name another file")
    directory = output.with_name(f"{output.name}.partial")
    refuse_links(output, directory)
    rows = read_rows([config.input])
    columns = Columns(config.data.columns)
    named = [columns(placed) for placed in rows]
    columns.check(optional=ANSWERS)
    chats = [(to_prompt(placed), tools_of(placed)) for placed in named]

    with init_distributed() as distributed:
        model, tokenizer = load_for_sampling(config)
        prompts = [
            np.array(prompt_ids(messages, tokenizer, placed.place, tools), dtype=np.int32)
            for placed, (messages, tools) in zip(rows, chats, strict=True)
        ]
        for placed, prompt in zip(rows, prompts, strict=True):
            check_fits(model, len(prompt), config.sampling, f"{placed.place}: a prompt")
        origin = _origin(rows, prompts, config.sampling, model)
        with locked(directory, distributed, "run.json"):
            done = distributed.on_main(lambda: _begin(directory, origin))
            todo = [row_id for row_id in range(len(rows)) if row_id not in done]
            todo.sort(key=lambda row_id: -len(prompts[row_id]))  # so that too little memory shows at once
            row_ids = todo[distributed.rank :: distributed.size]
            if distributed.is_main and done:
                print(printable(f"{directory}: {len(done)} of {len(rows)} rows are done"), file=sys.stderr)
            responses = generate(model, tokenizer, [prompts[row_id] for row_id in row_ids], config.sampling, row_ids)
            label = f"rank 0 of {distributed.size}" if distributed.size > 1 else None
            responses = tqdm(responses, label, len(row_ids), unit="row", disable=not distributed.is_main)
            _append(directory / f"rank{distributed.rank}-of-{distributed.size}.jsonl", responses)
            distributed.wait()
            distributed.on_main(lambda: _finish(directory, rows, output))
        distributed.on_main(lambda: shutil.rmtree(directory))


def _origin(
    rows: Sequence[PlacedRow], prompts: Sequence[np.ndarray], sampling: SamplingConfig, model: DiffLLM
) -> dict[str, Any]:
    """All that responses depend on, by names for the user.

    Raises:
        ValueError: a row that JSON cannot hold.
    """
    content, tokens, weights = sha1(), sha1(), sha1()
    for placed, prompt in zip(rows, prompts, strict=True):
        try:
            content.update(json.dumps(placed.row).encode() + b"\n")
        except TypeError as error:
            raise ValueError(f"{placed.place}: cannot be written as JSON ({error}): leave that field out") from error
        tokens.update(prompt.tobytes() + b"/")
    for name, parameter in model.named_parameters():
        weights.update(f"{name} {torch.hash_tensor(parameter.detach()).item()}".encode())
    return {
        "input": f"{len(rows)} rows ({content.hexdigest()[:12]})",
        "the chat template's tokens": tokens.hexdigest()[:12],
        "the model's weights": weights.hexdigest()[:12],
        **{f"sampling.{name}": value for name, value in asdict(sampling).items() if name != "batch_size"},
    }


def _begin(directory: Path, origin: dict[str, Any]) -> set[int]:
    """Make the directory one of this run, whose finished rows are returned.

    Raises:
        ValueError: it holds rows of another run.
    """
    done, record = _read(directory), directory / "run.json"
    if not done:
        with whole_file(record) as file:
            file.write(json.dumps(origin, indent=2) + "\n")
        return set()
    saved = read_object(record)
    found = [
        f"{name} is {saved.get(name)} there and {origin.get(name)} here"
        for name in sorted(saved.keys() | origin.keys())
        if saved.get(name) != origin.get(name)
    ]
    if found:
        raise ValueError(
            f"{directory} holds {len(done)} rows of an interrupted run with other settings: {'; '.join(found)}. "
            "Give the same ones to go on with it, delete the directory to start anew, or name another output"
        )
    return set(done)


def _append(file: Path, responses: Iterable[Response]) -> None:
    """Append responses as they come, in the place of an end that a kill has torn.

    Raises:
        OSError: they cannot be written, or the file was deleted.
    """
    with closing(AppendedRecords(file)) as lines:
        for response in responses:
            lines.append(asdict(response))


def _read(directory: Path) -> dict[int, Response]:
    """Responses that are done, by the numbers of their rows.

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


def _finish(directory: Path, rows: Sequence[PlacedRow], output: Path) -> None:
    """Write the output.

    Raises:
        OSError: rows that another rank has written cannot be read, as on a network disk that lags.
    """
    done = _read(directory)
    if missing := len(rows) - len(done):
        raise OSError(f"{directory}: {missing} finished rows cannot be read yet: run the same command again")

    def line(row: dict[str, Any], response: Response) -> str:
        nfe, tokens_per_forward = response.nfe, response.tokens_per_forward
        added = {"response": response.text, "nfe": nfe, "tokens_per_forward": tokens_per_forward}
        return json.dumps(with_fields(row, added)) + "\n"

    with whole_file(output) as lines:
        lines.writelines(line(placed.row, done[row_id]) for row_id, placed in enumerate(rows))


def with_fields(row: dict[str, Any], added: dict[str, Any]) -> dict[str, Any]:
    """A row with further fields. Its own of the same names stay: a response as `reference`, others as `input_NAME`."""
    kept = {name: value for name, value in row.items() if name not in added}
    for name in (name for name in row if name in added):
        other = "reference" if name == "response" else f"input_{name}"
        while other in row or other in kept:
            other = f"input_{other}"
        kept[other] = row[name]
    return {**kept, **added}

"""sample.py: answer one prompt or fill in one template on the terminal, or answer a file of prompts on all ranks."""

import json
import sys
from hashlib import sha1
from pathlib import Path
from typing import Any

from data import PlacedRow, prompt_ids, read_rows
from data.chat import ANSWERS, Columns, Message, to_prompt
from data.storage import whole_file
from data.terminal import for_stdout
from diffllm.generate import Response, generate, special_tokens
from sampling import Template, infill_templates
from trainer.build import load_for_sampling
from trainer.config import Config
from trainer.distributed import init_distributed, ranks_from_environment
from trainer.evaluation import answer_all, ask


def answer(config: Config) -> None:
    """Answer `prompt` or fill in `template` on the terminal, or answer every row of the file `input` into `output`.

    Raises:
        ValueError: none or several of the three; see `answer_prompt`, `fill_template` and `answer_file`.
    """
    if [config.prompt, config.template, config.input].count(None) != 2:
        raise ValueError("give one of prompt=…, template=… or input=FILE.jsonl output=FILE.jsonl")
    if config.template is not None:
        fill_template(config)
    elif config.input is not None:
        answer_file(config)
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
    """Fill the slots of `config.template`, such as `<|mask:12|>`, and print it. The template is raw text, not a chat.

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

    A row's own `response` becomes its `reference`. After an interruption the same command resumes.

    Raises:
        ValueError: before any sampling: no output, or one that exists; a row without a prompt; no checkpoint; or see
            `answer_all`.
    """
    if config.output is None or Path(config.output).suffix != ".jsonl":
        raise ValueError(f"input={config.input} with output={config.output}: give output=FILE.jsonl")
    output = Path(config.output)
    if output.exists():
        raise ValueError(f"output={output} exists already: delete it, or name another file")
    rows = read_rows([config.input])
    origin = {"input": f"{len(rows)} rows ({_digest(rows)})"}
    columns = Columns(config.data.columns)
    named = [columns(placed) for placed in rows]
    columns.check(optional=ANSWERS)
    prompts = [to_prompt(placed) for placed in named]

    def write(responses: list[Response], _: float | None) -> None:
        with whole_file(output) as lines:
            for placed, response in zip(rows, responses, strict=True):
                lines.write(json.dumps(with_fields(placed.row, response.fields())) + "\n")

    with init_distributed() as distributed:
        model, tokenizer = load_for_sampling(config, distributed.device)
        questions = [ask(placed, messages, tokenizer) for placed, messages in zip(named, prompts, strict=True)]
        answer_all(questions, model, tokenizer, config.sampling, output, origin, distributed, write)


def _digest(rows: list[PlacedRow]) -> str:
    """Digest of the rows.

    Raises:
        ValueError: a row that cannot be written as JSON.
    """
    content = sha1()
    for row, place in rows:
        try:
            content.update(json.dumps(row).encode() + b"\n")
        except TypeError as error:
            raise ValueError(f"{place}: cannot be written as JSON ({error}): leave that field out") from error
    return content.hexdigest()[:12]


def with_fields(row: dict[str, Any], added: dict[str, Any]) -> dict[str, Any]:
    """A row with added fields. Its own fields of these names become `reference` (a response) or `input_NAME`."""
    kept = {name: value for name, value in row.items() if name not in added}
    for name in (name for name in row if name in added):
        other = "reference" if name == "response" else f"input_{name}"
        while other in row or other in kept:
            other = f"input_{other}"
        kept[other] = row[name]
    return {**kept, **added}

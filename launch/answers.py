"""sample.py: answer one prompt or fill in one template on the terminal, or answer a file of prompts on all ranks."""

import json
import sys
import time
from dataclasses import dataclass
from hashlib import sha1
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import PreTrainedTokenizerBase

from data import PlacedRow, prompt_ids, read_rows
from data.chat import ANSWERS, COMPLETION, Columns, Message, to_prompt
from data.storage import whole_file
from data.terminal import for_stdout
from diffllm import DiffLLM
from diffllm.generate import check_context, special_tokens
from launch.drawing import respond
from launch.recording import Recorder, check_record
from sampling import Canvas, SamplingConfig, StepEvent, Template, Tokens, infill_templates
from sampling.infill import SlottedCanvas
from trainer.build import load_for_sampling
from trainer.config import Config
from trainer.distributed import check_alone, init_distributed
from trainer.evaluation import Answers, answer_all, ask, origin_of


@dataclass(frozen=True)
class AnswerTemplate(Template):
    """The whole answer to a prompt, with slots."""

    prompt: tuple[int, ...] = ()  # token ids, up to the start of the answer

    def canvases(self, tokenizer: PreTrainedTokenizerBase, mask: int, row_id: int = 0) -> list[SlottedCanvas]:
        """One canvas for each length to try: prompt, answer, and the end-of-sequence token, as in training.

        Raises:
            ValueError: see `Template.canvases`.
        """
        start = len(self.prompt)
        return [
            SlottedCanvas(
                [*self.prompt, *canvas.tokens, tokenizer.eos_token_id],
                start + canvas.prompt_length,
                row_id,
                tuple(range(start + slot.start, start + slot.stop) for slot in canvas.slots),
            )
            for canvas in super().canvases(tokenizer, mask, row_id)
        ]


def answer(config: Config) -> None:
    """Answer `prompt` or fill in `template` on the terminal, or answer every row of the file `input` into `output`.

    Raises:
        ValueError: none of the three, or `input` with another; see `answer_prompt`, `fill_template` and `answer_file`.
    """
    if (config.input is None) == (config.prompt is None and config.template is None):
        raise ValueError("give prompt=…, template=… or both, or input=FILE.jsonl output=FILE.jsonl")
    if config.template is not None:
        fill_template(config)
    elif config.input is not None:
        answer_file(config)
    else:
        answer_prompt(config)


def answer_prompt(config: Config) -> None:
    """Print the response to `config.prompt`. On a terminal stderr shows it while it forms.

    Raises:
        ValueError: no checkpoint, a prompt too long for the model, or see `check_for_terminal`.
        OSError: the recording cannot be written.
    """
    check_for_terminal(config, "prompt=…")
    model, tokenizer = load_for_sampling(config)
    prompt = tokens_of_prompt(config, tokenizer)
    check_context(model, len(prompt), config.sampling)
    console = Console(stderr=True) if sys.stderr.isatty() else None
    recorder = None
    if config.record is not None:
        special = special_tokens(model, tokenizer, config.sampling)
        canvas = Canvas.after(prompt, config.sampling.max_new_tokens, special.mask)
        recorder = Recorder(config, tokenizer, canvas, special, len(prompt))
    on_step = recorder.step if recorder else None
    started = time.perf_counter()
    response = respond(model, tokenizer, prompt, config.sampling, console, 0, on_step)
    seconds = time.perf_counter() - started
    print(for_stdout(response.text))
    if recorder:
        recorder.save(response.text, response.tokens, seconds)
    if not response.text:
        print("the response is empty: the model ended it at once", file=sys.stderr)
    elif not response.text.strip():
        print("the response is white space only", file=sys.stderr)
    elif not response.ended:
        limit = config.sampling.max_new_tokens
        print(f"no end within sampling.max_new_tokens={limit}: a larger one may complete the response", file=sys.stderr)


def fill_template(config: Config) -> None:
    """Fill the slots of `config.template`, such as `<|mask:12|>`, and print it.

    With `config.prompt` the template is the whole answer to it in a chat. Alone it is raw text. Its control tokens are
    real.

    Raises:
        ValueError: no checkpoint, a template without slots or too long for the model, or see `check_for_terminal`.
        OSError: the recording cannot be written.
    """
    check_for_terminal(config, "template=…")
    template = Template.parse(config.template)
    model, tokenizer = load_for_sampling(config)
    if config.prompt is not None:
        template = AnswerTemplate(template.pieces, template.slots, tuple(tokens_of_prompt(config, tokenizer)))
    special = special_tokens(model, tokenizer, config.sampling)
    check_template(template, model, tokenizer, config.sampling, special)
    recorders = {}
    if config.record is not None:
        start = 0 if config.prompt is None else len(template.prompt)
        for canvas in template.canvases(tokenizer, special.mask):
            recorders[len(canvas.tokens)] = Recorder(config, tokenizer, canvas, special, start)

    def record(event: StepEvent) -> None:
        recorders[len(event.tokens)].step(event)

    on_step = record if recorders else None
    started = time.perf_counter()
    [filled] = infill_templates(model, tokenizer, [template], config.sampling, special, on_step=on_step)
    seconds = time.perf_counter() - started
    print(for_stdout(filled.text))
    if recorders:
        recorders[len(filled.tokens)].save(filled.text, filled.length, seconds)


def check_template(
    template: Template, model: DiffLLM, tokenizer: PreTrainedTokenizerBase, config: SamplingConfig, special: Tokens
) -> None:
    """Refuse a template or settings that the model cannot take.

    Raises:
        ValueError: the template is too long, the mask token is in its text, or see `DiffLLM.check_sampling`.
    """
    model.check_sampling(config)
    length, context = sum(map(max, template.slots)), model.lm.config.max_position_embeddings
    if length <= context:  # else its canvases could fill the memory
        length = max(len(canvas.tokens) for canvas in template.canvases(tokenizer, special.mask))
    if length > context:
        raise ValueError(f"template: its {length} tokens do not fit the model's context of {context} tokens")


def tokens_of_prompt(config: Config, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of `config.prompt` in a chat, up to the start of the answer."""
    return prompt_ids([Message(role="user", content=config.prompt)], tokenizer)


def check_for_terminal(config: Config, what: str) -> None:
    """Refuse settings that do not go with an answer on the terminal.

    Raises:
        ValueError: an output, several ranks, an empty prompt, or see `check_record`.
    """
    if config.output is not None:
        raise ValueError(f"output={config.output}: goes with input=FILE; {what} is answered on the terminal")
    check_alone(what, "python sample.py")
    if config.prompt is not None and not config.prompt.strip():
        raise ValueError("prompt= is empty: give a question, such as prompt='Solve 3x+5=20'")
    if config.record is not None:
        check_record(Path(config.record))


def answer_file(config: Config) -> None:
    """Write the rows of `config.input` to `config.output`, each with its `response`, `nfe` and `tokens_per_forward`.

    A row's own `response` or `completion` becomes its `reference`. After an interruption the same command resumes.

    Raises:
        ValueError: before any sampling: a record, no output, or one that exists; a row without a prompt; no checkpoint;
            or see `answer_all`.
    """
    if config.record is not None:
        raise ValueError(f"record={config.record}: goes with prompt=… or template=…, not with input={config.input}")
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

    def write(answers: dict[str, Answers]) -> None:
        with whole_file(output) as lines:
            for placed, response in zip(rows, answers["input"].responses, strict=True):
                lines.write(json.dumps(with_fields(placed.row, response.fields())) + "\n")

    with init_distributed() as distributed:
        model, tokenizer = load_for_sampling(config, distributed.device)
        asked = {"input": [ask(placed, messages, tokenizer) for placed, messages in zip(named, prompts, strict=True)]}
        origin |= distributed.on_main(lambda: origin_of(asked, config.sampling, model, tokenizer))
        answer_all(asked, model, tokenizer, config.sampling, output, origin, distributed, write)


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
    """A row with added fields.

    Its own fields of these names become `reference` (`response`, or else `completion`) or `input_NAME`.
    """
    if COMPLETION in row and row.get("response") is None:
        row = {"response" if name == COMPLETION else name: value for name, value in row.items() if name != "response"}
    kept = {name: value for name, value in row.items() if name not in added}
    for name in (name for name in row if name in added):
        other = "reference" if name == "response" else f"input_{name}"
        while other in row or other in kept:
            other = f"input_{other}"
        kept[other] = row[name]
    return {**kept, **added}

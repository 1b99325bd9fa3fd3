"""Right answers to questions that were not trained on: what evaluate.py does."""

import json
import time
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from statistics import mean
from typing import NamedTuple

from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from data import DataConfig, prompt_ids
from data.chat import Columns, Message, to_chat
from data.equations import held_out_rows
from data.errors import BadRows
from data.files import iterate
from data.readers import PlacedRow
from data.storage import refuse_links, whole_file
from data.terminal import printable
from data.verify import check_verifiable, is_correct, reference
from diffllm.generate import Response, generate
from trainer.build import load_for_sampling
from trainer.config import Config, to_dict

SHOWN = 6


class Question(NamedTuple):
    """A row, and what the model is asked."""

    placed: PlacedRow
    messages: list[Message]
    ids: list[int]


def evaluate(config: Config) -> None:
    """Answer every question, print a table and write `evaluation.json` into `trainer.output_dir`.

    The questions are those of `data.val_files`, or the held-out equations where none is given. A task's own verifier
    judges, or else whether the final answers are the same number or text.

    Raises:
        ValueError: questions that cannot be used, unless `data.on_bad_row=skip`, or cannot be judged, or none is left.
    """
    path = Path(config.trainer.output_dir) / "evaluation.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    refuse_links(path)
    model, tokenizer = load_for_sampling(config)
    questions, skipped = _questions(config.data, tokenizer)
    started = time.perf_counter()
    answers = generate(model, tokenizer, [question.ids for question in questions], config.sampling)
    asked = "questions" if config.data.val_files else "held-out equations"
    done = tqdm(answers, total=len(questions), desc=asked, unit="answer")
    responses = sorted(done, key=lambda response: response.row_id)
    seconds = time.perf_counter() - started
    rows = [question.placed.row for question in questions]
    right = [is_correct(row, response.text) for row, response in zip(rows, responses, strict=True)]
    scores = {
        "questions": len(questions),
        "skipped": skipped,
        "right": sum(right),
        "exact_match": sum(right) / len(questions),
        "nfe": mean(response.nfe for response in responses),
        "tokens_per_forward": mean(response.tokens_per_forward for response in responses),
        "tokens_per_second": sum(response.tokens for response in responses) / seconds,
    }
    _print(questions, responses, right, scores, asked)

    record = {
        "scores": scores,
        "config": to_dict(config),
        "versions": {name: version(name) for name in ("diffllm", "torch", "transformers")},
        "answers": [
            {
                "prompt": question.messages,
                "expected": reference(question.placed.row),
                "response": response.text,
                "right": ok,
                "nfe": response.nfe,
            }
            for question, response, ok in zip(questions, responses, right, strict=True)
        ],
    }
    with whole_file(path) as file:
        file.write(json.dumps(record, indent=2) + "\n")
    print(printable(f"every setting, version and answer: {path}"))


def _questions(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[list[Question], int]:
    """What is asked, and how many rows cannot be."""
    bad, questions = BadRows("data.on_bad_row=skip leaves such rows out"), []
    files = [iterate(file, bad) for file in config.val_files] or [held_out_rows()]
    columns = Columns(config.columns)
    for placed in chain.from_iterable(files):
        try:
            placed = columns(placed)
            chat = to_chat(placed)
            check_verifiable(placed)
            ids = prompt_ids(chat["prompt"], tokenizer, placed.place, chat.get("tools"))
            questions.append(Question(placed, chat["prompt"], ids))
        except ValueError as error:
            bad.add(error)
    columns.check()
    if config.on_bad_row == "error" or not questions:
        bad.refuse()
    if bad.count:
        print(printable(bad.text()))
    return questions, bad.count


def _print(
    questions: list[Question], responses: list[Response], right: list[bool], scores: dict[str, float], asked: str
) -> None:
    table = Table(title=f"the first {min(SHOWN, len(questions))} of {len(questions)} {asked}", show_lines=True)
    for column in ("question", "response", "verdict"):
        table.add_column(column)
    for question, response, ok in list(zip(questions, responses, right, strict=True))[:SHOWN]:
        texts = question.messages[-1]["content"], response.text, "right" if ok else "wrong"
        table.add_row(*map(printable, texts))
    Console(markup=False).print(table)
    print(
        f"exact match {scores['exact_match']:.1%} ({scores['right']} of {scores['questions']} {asked})\n"
        f"NFE {scores['nfe']:.1f} and {scores['tokens_per_forward']:.2f} tokens a forward on average, "
        f"{scores['tokens_per_second']:,.0f} tokens/s"
    )

"""evaluate.py: score the responses of a model to the questions of a task."""

import json
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console
from rich.table import Table

from data.storage import whole_file
from data.tasks import tasks_of
from data.tasks.base import Task
from data.terminal import printable
from diffllm.generate import Response
from trainer.build import load_for_sampling
from trainer.config import Config, to_dict
from trainer.distributed import init_distributed
from trainer.evaluation import Question, answer_all, questions_of
from trainer.manifest import versions

SHOWN = 6


def evaluate(config: Config) -> None:
    """Answer every test question of a task over all ranks. Rank 0 writes `trainer.output_dir`/evaluation.json.

    Raises:
        ValueError: an unknown task, a task of another kind than generate, or see `questions_of` and `answer_all`.
    """
    [task] = tasks_of(config.data, config.task, "rows" if config.data.val_files else "equations")
    if task.kind != "generate":
        raise ValueError(f"task.name={task.name}: its kind is {task.kind}; only generate can be evaluated")
    path = Path(config.trainer.output_dir) / "evaluation.json"
    with init_distributed() as distributed:
        model, tokenizer = load_for_sampling(config, distributed.device)
        questions = questions_of(task, tokenizer, config.seed)
        if distributed.is_main and task.bad.count:
            print(printable(task.bad.text()))

        def write(responses: list[Response], tokens_per_second: float | None) -> None:
            pairs = zip(questions, responses, strict=True)
            right = [task.score(question.row, response.text) == 1 for question, response in pairs]
            scores = {
                "questions": len(questions),
                "skipped": task.bad.count,
                "right": sum(right),
                "exact_match": sum(right) / len(questions),
                "nfe": mean(response.nfe for response in responses),
                "tokens_per_forward": mean(response.tokens_per_forward for response in responses),
                "tokens_per_second": tokens_per_second,
            }
            _print(task, questions, responses, right, scores)
            with whole_file(path) as file:
                file.write(json.dumps(_record(config, task, questions, responses, right, scores), indent=2) + "\n")
            print(printable(f"every setting, version and answer: {path}"))

        origin = {"task.name": task.name}
        answer_all(questions, model, tokenizer, config.sampling, path, origin, distributed, write)


def _record(
    config: Config,
    task: Task,
    questions: list[Question],
    responses: list[Response],
    right: list[bool],
    scores: dict[str, Any],
) -> dict[str, Any]:
    return {
        "scores": scores,
        "config": to_dict(config),
        "versions": versions(),
        "answers": [
            {
                "prompt": question.messages,
                "expected": task.reference(question.row),
                **response.fields(),
                "right": ok,
            }
            for question, response, ok in zip(questions, responses, right, strict=True)
        ],
    }


def _print(
    task: Task, questions: list[Question], responses: list[Response], right: list[bool], scores: dict[str, Any]
) -> None:
    table = Table(title=f"{task.name}: the first {min(SHOWN, len(questions))} of {len(questions)}", show_lines=True)
    for column in ("question", "response", "verdict"):
        table.add_column(column)
    for question, response, ok in list(zip(questions, responses, right, strict=True))[:SHOWN]:
        texts = question.messages[-1]["content"], response.text, "right" if ok else "wrong"
        table.add_row(*map(printable, texts))
    Console(markup=False).print(table)
    speed = scores["tokens_per_second"]
    print(
        f"exact match {scores['exact_match']:.1%} ({scores['right']} of {scores['questions']} questions)\n"
        f"NFE {scores['nfe']:.1f} and {scores['tokens_per_forward']:.2f} tokens a forward on average"
        + ("" if speed is None else f", {speed:,.0f} tokens/s")
    )

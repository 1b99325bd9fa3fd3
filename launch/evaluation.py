"""evaluate.py: score the responses of a model to the questions of tasks."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console
from rich.table import Table
from torch.nn import Module
from transformers import PreTrainedTokenizerBase

from data.errors import differences, listed
from data.storage import read_object, whole_file
from data.tasks.base import Task
from data.terminal import print_stderr, printable
from diffllm.generate import Response
from launch.results import FILE, identity, interval, read_result, score_table
from trainer.build import load_for_sampling
from trainer.config import Config, to_dict
from trainer.distributed import Distributed, device_name, init_distributed
from trainer.evaluation import Answers, Question, answer_all, evaluated_tasks, origin_of, questions_of
from trainer.manifest import commit, versions

SHOWN = 6  # answers
MANY_CUT = 0.5  # share of responses that the canvas's end cuts, above which a warning names it


def evaluate(config: Config) -> None:
    """Answer every test question of the tasks over all ranks. Rank 0 writes `trainer.output_dir`/evaluation.json.

    If that file has the same evaluation, print its scores. A file of another one is renamed.

    Raises:
        ValueError: see `evaluated_tasks`, `questions_of` and `answer_all`.
        KeyboardInterrupt: with the scores so far.
    """
    tasks = evaluated_tasks(config)
    path = Path(config.trainer.output_dir) / FILE
    with init_distributed() as distributed:
        model, tokenizer = load_for_sampling(config, distributed.device)
        questions = {task.name: questions_of(task, tokenizer, config.seed) for task in tasks}
        if distributed.is_main:
            for task in tasks:
                _name_odd_rows(task, questions[task.name])
        given = (config, tasks, questions, model, tokenizer, distributed)
        depends = distributed.on_main(lambda: manifest(*given))
        if distributed.on_main(lambda: _is_done(path, depends)):
            return
        judge = Judge(tasks, questions)
        sampled = (questions, model, tokenizer, config.sampling, path, identity(depends), distributed)
        write = partial(write_result, config, judge, depends)
        try:
            answer_all(*sampled, write, judge.so_far, config.task.mc_num)
        except KeyboardInterrupt as error:
            raise KeyboardInterrupt(*judge.texts(), *error.args) from error


class Judge:
    """Judges responses, each once.

    Args:
        questions: by task.
    """

    def __init__(self, tasks: Sequence[Task], questions: Mapping[str, Sequence[Question]]):
        self.tasks, self.questions = {task.name: task for task in tasks}, questions
        self._known: dict[tuple[str, int], bool] = {}
        self._judged, self._right = Counter(), Counter()

    def is_right(self, name: str, response: Response) -> bool:
        """Whether a response to a question of a task is right."""
        key = name, response.row_id
        if key not in self._known:
            row = self.questions[name][response.row_id].row
            self._known[key] = self.tasks[name].score(row, response.text) == 1
            self._judged[name] += 1
            self._right[name] += self._known[key]
        return self._known[key]

    def so_far(self, name: str, response: Response) -> str:
        """Judge a response. Return the share of the task's responses so far that are right."""
        self.is_right(name, response)
        return f"{self._right[name] / self._judged[name]:.1%} right"

    def texts(self) -> list[str]:
        """A line on the responses of each task so far."""
        return [f"{name}: {self._right[name]} of {count} right so far" for name, count in self._judged.items()]

    def scores(self, task: Task, answers: Answers) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Scores of a task, and a record of each answer."""
        records, responses = [], answers.responses
        for question, response in zip(self.questions[task.name], responses, strict=True):
            metrics = task.metrics(question.row, response.text)
            chosen = {}
            if question.options:
                chosen = {"options": [option.text for option in question.options], **response.details}
                text = question.options[response.details["best_per_token"]].text
                metrics |= {"exact_match_per_token": float(task.score(question.row, text) == 1)}
            reference = task.reference(question.row)
            expected = task.expected(question.row) if task.kind == "generate" else reference
            records.append(
                {
                    "prompt": question.template or question.messages,
                    "expected": expected,
                    **({} if expected == reference else {"reference": reference}),
                    **response.fields(),
                    **chosen,
                    "ended": response.ended,
                    "answer": task.answer(response.text),
                    "right": self.is_right(task.name, response),
                    "metrics": metrics,
                }
            )
        right, generates = sum(record["right"] for record in records), task.kind != "choose"
        return {
            "questions": len(records),
            "skipped": task.bad.count,
            "right": right,
            "exact_match": right / len(records),
            "interval": interval(right, len(records)),
            **{name: mean(record["metrics"][name] for record in records) for name in records[0]["metrics"]},
            "not_ended": mean(not response.ended for response in responses),
            "no_answer": mean(record["answer"] is None for record in records),
            "nfe": mean(response.nfe for response in responses),
            "tokens_per_forward": mean(each.tokens_per_forward for each in responses) if generates else None,
            "tokens_per_second": answers.tokens_per_second,
        }, records


def write_result(config: Config, judge: Judge, depends: dict[str, Any], answers: Mapping[str, Answers]) -> None:
    """Judge the answers to all tasks. Write `trainer.output_dir`/evaluation.json and print its scores.

    Args:
        depends: `manifest` of the answers.
        answers: by task.
    """
    path, scores, judged = Path(config.trainer.output_dir) / FILE, {}, {}
    for name, task in judge.tasks.items():
        scores[name], judged[name] = judge.scores(task, answers[name])
        _show(task, judge.questions[name], judged[name])
    record = {"scores": scores, **depends, "answers": judged}
    _keep_other(path, depends)
    with whole_file(path) as file:
        file.write(json.dumps(record, indent=2) + "\n")
    _print(scores, config)
    print(printable(f"every setting, version and answer: {path}"))


def manifest(
    config: Config,
    tasks: Sequence[Task],
    questions: Mapping[str, Sequence[Question]],
    model: Module,
    tokenizer: PreTrainedTokenizerBase,
    distributed: Distributed,
) -> dict[str, Any]:
    """Return the settings, digests, judges, versions and device of an evaluation."""
    bounds = {"task.mc_num": config.task.mc_num} if any(task.kind != "generate" for task in tasks) else {}
    dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    settings = to_dict(config)
    settings["task"]["name"] = [task.name for task in tasks]  # that of a task by default too
    return {
        "origin": bounds | origin_of(questions, config.sampling, model, tokenizer),
        "judges": {task.name: task.judge for task in tasks},
        "versions": versions() | {"commit": commit()},
        "device": device_name(distributed.device),
        "dtype": str(dtype).removeprefix("torch."),
        "ranks": distributed.size,
        "config": settings,
    }


def _name_odd_rows(task: Task, questions: Sequence[Question]) -> None:
    """Print which rows of a task cannot be used, and how many can be solved by their whole text alone."""
    if task.bad.count:
        print(printable(task.bad.text()))
    if free := sum(not task.states_answer(question.row) for question in questions):
        print(f"{task.name}: {free} of {len(questions)} references state no answer and are compared as whole texts")


def _is_done(path: Path, depends: dict[str, Any]) -> bool:
    """Whether a file has this evaluation; then print its scores."""
    if not path.exists() or _differences(path, depends):
        return False
    print(printable(f"{path} has this evaluation already; delete it to run it again"))
    print(score_table(([name], scores) for name, scores in read_object(path)["scores"].items()))
    return True


def _differences(path: Path, depends: dict[str, Any]) -> list[str]:
    try:
        saved = read_result(str(path))
    except ValueError as error:
        return [str(error)]
    return differences(identity(saved), identity(depends))


def _keep_other(path: Path, depends: dict[str, Any]) -> None:
    """Rename the file of another evaluation, if there is one, to evaluation.N.json."""
    if not path.exists():
        return
    number = 1
    while (kept := path.with_suffix(f".{number}{path.suffix}")).exists():
        number += 1
    found = listed(_differences(path, depends))
    path.rename(kept)
    print(printable(f"{path} held another evaluation, which is now {kept}: {found}"))


def _show(task: Task, questions: Sequence[Question], records: Sequence[dict[str, Any]]) -> None:
    """Print the first answers to a task's questions."""
    table = Table(title=f"{task.name}: the first {min(SHOWN, len(records))} of {len(records)}", show_lines=True)
    for column in ("question", "response", "verdict"):
        table.add_column(column)
    for question, record in list(zip(questions, records, strict=True))[:SHOWN]:
        asked = question.template or question.messages[-1]["content"]
        texts = asked, record["response"], "right" if record["right"] else "wrong"
        table.add_row(*map(printable, texts))
    Console(markup=False).print(table)


def _print(scores: Mapping[str, Mapping[str, Any]], config: Config) -> None:
    """Print a line of scores for each task, and name a task without any answer, or whose responses are mostly cut."""
    print(score_table(([name], each) for name, each in scores.items()), flush=True)
    for name, each in scores.items():
        cut = f"{each['not_ended']:.0%} were cut at sampling.max_new_tokens={config.sampling.max_new_tokens}"
        if each["no_answer"] == 1:
            print_stderr(f"warning: {name}: no response has an answer; {cut}")
        elif each["not_ended"] > MANY_CUT:
            print_stderr(f"warning: {name}: of the responses {cut}; a higher one may help")

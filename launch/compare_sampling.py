"""python -m launch.compare_sampling SETTINGS compares ways to sample: accuracy on a task against speed and forwards.

Takes the choices and settings of evaluate.py. Settings of `sampling` with several values, separated by commas, are
combined. `seeds=0,1,2` repeats the combinations that draw at random with these values of sampling.seed.

  python -m launch.compare_sampling model.path=M sampling.alg=entropy,maskgit_plus sampling.steps=6,9,18
  python -m launch.compare_sampling model.path=M task=gsm8k data.subset=200 sampling=dream,fast seeds=0,1,2

trainer.output_dir (outputs/compare_sampling) gets results.json, results.csv, comparison.md, and comparison.png with the
extra `plot`; `readme=REGION` also writes a region of launch/experiments/README.md. The same command samples only
combinations that results.json lacks. The exit code is 1 if one failed.
"""

import itertools
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from data.errors import differences, twice
from data.storage import lock_file, read_object, write_object
from data.tasks.base import Task
from data.terminal import print_stderr, printable
from diffllm import DiffLLM
from diffllm.generate import generate
from diffllm.static_forward import prepare_sampling
from launch.arguments import check_arguments, quote_text, warn_of_unread
from launch.cli import EXPECTED, describe, user_errors
from launch.experiments.page import PAGE, split_at
from launch.results import READS
from launch.sampling_page import Combination, report
from launch.settings import read_settings
from sampling import SamplingConfig
from trainer.build import load_for_sampling
from trainer.config import Config
from trainer.distributed import LOCK, check_alone, device_name
from trainer.evaluation import Question, evaluated_tasks, origin_of, questions_of
from trainer.manifest import versions

OWN = ("seeds=", "readme=")
ONCE = "sampling.compile"  # prepares the model, which all combinations share
RUN = {"sampling", "questions", "right", "tokens", "seconds", "nfe", "tokens_per_forward"}  # of `measure`
FAILURES = (ValueError, MemoryError, FloatingPointError)  # of a combination; the others go on


def split_grid(arguments: Sequence[str]) -> tuple[list[str], list[str], list[tuple[str, ...]]]:
    """The arguments with one value, the names of the varied settings, and the overrides of each combination.

    Raises:
        ValueError: another setting than those of `sampling` has several values.
    """
    fixed, names, varied = [], [], []
    for argument in arguments:
        is_setting = "=" in argument and not argument.startswith("-")
        override = OverridesParser.create().parse_override(quote_text(argument)) if is_setting else None
        if override is None or not override.is_sweep_override():
            fixed.append(argument)
            continue
        key = override.key_or_group
        if key.partition(".")[0] != "sampling" or key == ONCE:
            raise ValueError(f"{argument}: only settings of sampling may have several values, and not {ONCE}")
        names.append(key.removeprefix("sampling."))
        varied.append([f"{key}={value}" for value in override.sweep_string_iterator()])
    return fixed, names, [*itertools.product(*varied)]


def read_combinations(
    fixed: Sequence[str], grid: Sequence[tuple[str, ...]], seeds: Sequence[int]
) -> tuple[list[Combination], set[str]]:
    """The combinations, those that contradict themselves with their error; and lines on the settings of all of them."""
    combinations, shown = [], []
    for overrides in grid:
        lines: set[str] = set()
        combination = Combination(tuple(each.partition("=")[2] for each in overrides))
        try:
            config = read_settings([*fixed, *overrides], recommended=lines)[1].sampling
            repeated = seeds if seeds and is_random(config) else [config.seed]
            combination.configs = [replace(config, seed=seed) for seed in repeated]
            shown.append(lines)
        except EXPECTED as error:
            combination.error = " ".join(describe(error).split())
        combinations.append(combination)
    return combinations, set.intersection(*shown) if shown else set()


def is_random(config: SamplingConfig) -> bool:
    """Whether an answer depends on the seed."""
    return bool(config.temperature or config.order_temp or config.remask)


def measure(
    model: DiffLLM,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    questions: Sequence[Question],
    config: SamplingConfig,
) -> dict[str, Any]:
    """Answer all questions once, the longest first."""
    order = sorted(range(len(questions)), key=lambda row_id: -len(questions[row_id].ids))
    started = time.perf_counter()
    responses = [*generate(model, tokenizer, [questions[row_id].ids for row_id in order], config, order)]
    seconds = time.perf_counter() - started
    return {
        "sampling": asdict(config),
        "questions": len(questions),
        "right": sum(task.score(questions[each.row_id].row, each.text) == 1 for each in responses),
        "tokens": sum(each.tokens for each in responses),
        "seconds": seconds,
        "nfe": mean(each.nfe for each in responses),
        "tokens_per_forward": mean(each.tokens_per_forward for each in responses),
    }


def origin_of_all(
    path: str,
    model: DiffLLM,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    questions: Sequence[Question],
    config: SamplingConfig,
) -> dict[str, Any]:
    """Return the model, digests, versions and device of all results of a directory, by names for errors."""
    origin = origin_of({task.name: questions}, config, model, tokenizer)
    return {
        "model.path": path,
        "task.name": task.name,
        **{name: value for name, value in origin.items() if not name.startswith("sampling.")},
        "device": device_name(model.device),
        "threads": torch.get_num_threads(),
        **{f"version of {name}": version for name, version in versions().items()},
    }


def known_runs(file: Path, origin: dict[str, Any]) -> list[dict[str, Any]]:
    """The runs of an earlier command.

    Raises:
        ValueError: they are of another model, task or machine, or damaged.
    """
    if not file.exists():
        return []
    record = read_object(file)
    if found := differences(record.get("origin", {}), origin):
        raise ValueError(f"{file} has other results: {'; '.join(found)}. Delete it, or give another trainer.output_dir")
    runs = record.get("runs")
    if not isinstance(runs, list) or not all(isinstance(run, dict) and run.keys() == RUN for run in runs):
        raise ValueError(f"{file} has no runs of this command: delete it, or give another trainer.output_dir")
    return runs


def run_all(
    combinations: Sequence[Combination],
    model: DiffLLM,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    questions: Sequence[Question],
    file: Path,
    origin: dict[str, Any],
) -> None:
    """Run what `file` lacks, and write it after each run. The first run follows one of a batch that warms up.

    Raises:
        KeyboardInterrupt: with the advice to resume.
        ValueError: see `known_runs`.
    """
    runs, is_warm = known_runs(file, origin), False
    known = {json.dumps(run["sampling"]): run for run in runs}
    todo = [(combination, config) for combination in combinations for config in combination.configs]
    try:
        for combination, config in tqdm(todo, unit="run"):
            key = json.dumps(asdict(config))
            try:
                if key not in known and not is_warm:
                    measure(model, tokenizer, task, questions[: config.batch_size], config)
                    is_warm = True
                if key not in known:
                    known[key] = measure(model, tokenizer, task, questions, config)
            except FAILURES as error:
                combination.error = " ".join(describe(error).split())
                continue
            combination.runs.append(known[key])
            write_object(file, {"origin": origin, "runs": [*known.values()]})
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt("run the same command to resume") from error


def compare_strategies(arguments: Sequence[str]) -> bool:
    """Compare the combinations of a command line. Return whether all succeeded.

    Raises:
        ValueError: several ranks or tasks, an unknown setting, no checkpoint, rows that cannot be used, no combination
            without an error, or see `split_grid` and `known_runs`.
    """
    check_alone("launch.compare_sampling", "python -m launch.compare_sampling")
    own = dict(each.split("=", 1) for each in arguments if each.startswith(OWN))
    settings = ["trainer.experiment_name=compare_sampling", *(each for each in arguments if not each.startswith(OWN))]
    seeds, region = _seeds(own["seeds"]) if "seeds" in own else [], own.get("readme")
    if region:
        split_at(region, PAGE)
    check_arguments([quote_text(each) for each in settings])
    warn_of_unread("launch.compare_sampling", settings, READS)
    fixed, names, grid = split_grid(settings)
    shared = [each for each in fixed if each.startswith(ONCE) or not each.startswith("sampling")]
    config: Config = read_settings(shared)[1]
    task, *others = evaluated_tasks(config)
    if others:
        raise ValueError(f"task.name={config.task.name}: ways to sample are compared on one task; give one of them")
    if task.kind != "generate":
        raise ValueError(f"task.name={task.name}: its kind is {task.kind}; only generate is sampled")
    combinations, lines = read_combinations(fixed, grid, seeds)
    if all(each.error for each in combinations):
        raise ValueError(combinations[0].error)
    for line in sorted(lines):
        print_stderr(line)
    transformers_logging.disable_progress_bar()
    model, tokenizer = load_for_sampling(config)
    questions = questions_of(task, tokenizer, config.seed)
    if task.bad.count:
        print(printable(task.bad.text()))
    _prepare(model, config, combinations, len(questions))
    origin = origin_of_all(config.model.path, model, tokenizer, task, questions, config.sampling)
    directory = Path(config.trainer.output_dir)
    directory.mkdir(parents=True, exist_ok=True)
    command = [each for each in arguments if each != f"readme={region}"]
    with lock_file(directory / LOCK):
        run_all(combinations, model, tokenizer, task, questions, directory / "results.json", origin)
        report(combinations, names, origin, directory, command, region)
    return not any(each.error for each in combinations)


def _prepare(model: DiffLLM, config: Config, combinations: Sequence[Combination], questions: int) -> None:
    """Compile for all runs together."""
    every = itertools.chain(*(each.configs for each in combinations))
    forwards = sum((each.steps or each.max_new_tokens) * -(-questions // each.batch_size) for each in every)
    prepare_sampling(model, config.sampling.compile, forwards)


def _seeds(text: str) -> list[int]:
    if not all(each.isdecimal() for each in text.split(",")):
        raise ValueError(f"seeds={text}: give whole numbers separated by commas, such as seeds=0,1,2")
    seeds = [int(each) for each in text.split(",")]
    if len({*seeds}) < len(seeds):
        raise ValueError(f"seeds={text}: {twice(map(str, seeds))}")
    return seeds


if __name__ == "__main__":
    with user_errors(debug=False):
        if {"-h", "--help"} & set(sys.argv[1:]):
            sys.exit(print(__doc__))
        sys.exit(0 if compare_strategies(sys.argv[1:]) else 1)

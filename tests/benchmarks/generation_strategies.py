"""Accuracy and speed of strategies: `python -m tests.benchmarks.generation_strategies MODEL_PATH [DIRECTORY]`.

Answers the held-out questions of the built-in task with a model trained on it (`make quickstart`) in every way of
`STRATEGIES`, and by the published procedure, of which the fastest of three runs counts. First come those of `CACHED`,
five times in turn with the published procedure: medians. Then all, as a table that is also written to DIRECTORY
(outputs/strategies) as strategies.json and strategies.png: accuracy against tokens a second and against forwards.
Tokens are counted up to the end-of-sequence token, which counts. A last table shows what the ranking of positions does
at low temperatures: by the model's own distribution, and, as published, by the one after temperature.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean, median

from matplotlib import pyplot
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from data import prompt_ids
from data.tasks.equations import Equations
from diffllm import DiffLLM, load_model
from diffllm.generate import generate
from diffllm.tokenizer import load_tokenizer
from sampling import SamplingConfig, left_pad, trim
from tests.benchmarks.published_sampler import published_sample

NEW_TOKENS = 18
BATCH_SIZE = 64
PUBLISHED = {"alg": "entropy", "steps": NEW_TOKENS}
SURE = {"alg": "maskgit_plus", "transfer": "threshold"}
STRATEGIES = {
    **{f"{alg}, 18 steps": {"alg": alg, "steps": 18} for alg in ("origin", "left_to_right", "topk_margin")},
    **{
        f"{alg}, {steps} steps": {"alg": alg, "steps": steps}
        for alg in ("maskgit_plus", "entropy")
        for steps in (18, 9, 6, 3)
    },
    **{f"entropy, {transfer}, 6 steps": {"transfer": transfer, "steps": 6} for transfer in ("cosine", "even")},
    "entropy, remask 0.1, 18 steps": {"remask": 0.1, "steps": 18},
    "entropy, blocks of 6, 18 steps": {"block_length": 6, "steps": 18},
    **{f"threshold {p}": SURE | {"threshold": p} for p in (0.5, 0.7, 0.9, 0.99)},
    **{f"factor {f}": SURE | {"transfer": "factor", "factor": f} for f in (0.5, 1.0, 2.0)},
    **{f"entropy bound {bound}": {"transfer": "entropy_bound", "entropy_bound": bound} for bound in (0.05, 0.2, 0.5)},
    **{f"threshold 0.9, {cache}": SURE | {"cache": cache} for cache in ("prefix", "dual", "delayed")},
    "threshold 0.9, dual, refresh 2": SURE | {"cache": "dual", "cache_refresh": 2},
    **{
        f"threshold 0.9, blocks of {length}, {cache}": SURE | {"block_length": length, "cache": cache}
        for length in (6, 9)
        for cache in ("none", "prefix", "dual", "delayed")
    },
}
CACHED = ("threshold 0.9, dual", "threshold 0.9, blocks of 9, dual", "threshold 0.9, dual, refresh 2")
TEMPERATURES = (1e-3, 0.01, 0.05, 0.1, 0.2)


@dataclass
class Measured:
    strategy: str
    accuracy: float
    nfe: float  # mean of the rows
    tokens_per_forward: float  # likewise
    tokens_per_second: float


class Questions:
    """The held-out questions, and a model to answer them."""

    def __init__(self, path: str):
        self.model: DiffLLM = load_model(path).eval()
        self.tokenizer = load_tokenizer(path)
        self.task = Equations()
        self.rows = self.task.rows("test")
        self.prompts = [prompt_ids(self.task.messages(row), self.tokenizer) for row in self.rows]

    def ours(self, **settings) -> list[tuple[str, int, int]]:
        """Text, tokens and forwards of every answer."""
        config = SamplingConfig(max_new_tokens=NEW_TOKENS, batch_size=BATCH_SIZE, **settings)
        responses = sorted(generate(self.model, self.tokenizer, self.prompts, config), key=lambda each: each.row_id)
        return [(each.text, round(each.tokens_per_forward * each.nfe), each.nfe) for each in responses]

    def published(self) -> list[tuple[str, int, int]]:
        config, answers = SamplingConfig(max_new_tokens=NEW_TOKENS, **PUBLISHED), []
        for start in range(0, len(self.prompts), BATCH_SIZE):
            batch = left_pad(self.prompts[start : start + BATCH_SIZE], self.model.pad_token_id)
            for sequence in published_sample(self.model, batch[0], config, batch[1])[:, -NEW_TOKENS:].tolist():
                response = trim(sequence, (self.model.eos_token_id,))
                tokens = min(len(response) + 1, NEW_TOKENS)
                answers.append((self.tokenizer.decode(response).strip(), tokens, config.steps))
        return answers

    def measure(self, strategy: str, answer: Callable[[], list[tuple[str, int, int]]]) -> Measured:
        started = time.perf_counter()
        texts, tokens, nfe = zip(*answer(), strict=True)
        seconds = time.perf_counter() - started
        return Measured(
            strategy,
            accuracy=mean(self.task.score(row, text) for row, text in zip(self.rows, texts, strict=True)),
            nfe=mean(nfe),
            tokens_per_forward=mean(n / forwards for n, forwards in zip(tokens, nfe, strict=True)),
            tokens_per_second=sum(tokens) / seconds,
        )


def show(measured: list[Measured], base: Measured) -> None:
    table = Table(title=f"{NEW_TOKENS} new tokens, {BATCH_SIZE} rows at once")
    for column in ("strategy", "accuracy", "forwards", "tokens a forward", "tokens a second", "against published"):
        table.add_column(column, justify="left" if column == "strategy" else "right")
    for each in measured:
        speed, ratio = each.tokens_per_second, each.tokens_per_second / base.tokens_per_second
        numbers = (f"{each.accuracy:.1%}", f"{each.nfe:.1f}", f"{each.tokens_per_forward:.2f}", f"{speed:,.0f}")
        table.add_row(each.strategy, *numbers, f"{ratio:.2f}")
    Console(width=120).print(table)


def draw(measured: list[Measured], file: Path) -> None:
    figure, axes = pyplot.subplots(1, 2, figsize=(15, 7), sharey=True)
    for axis, name in zip(axes, ("tokens_per_second", "nfe"), strict=True):
        for each in measured:
            x, y = getattr(each, name), 100 * each.accuracy
            axis.scatter(x, y, color="black" if each.strategy == "published" else None)
            axis.annotate(each.strategy, (x, y), fontsize=6, xytext=(3, 3), textcoords="offset points")
        axis.set_xlabel(name.replace("_", " "))
    axes[0].set_ylabel("held-out questions answered right, %")
    figure.tight_layout()
    figure.savefig(file, dpi=150)


def compare_speed(questions: Questions) -> None:
    """The published procedure and the cached strategies in turn, five times each: medians."""
    runs = {"published": questions.published}
    runs |= {name: partial(questions.ours, **STRATEGIES[name]) for name in CACHED}
    measured = [[questions.measure(name, run) for name, run in runs.items()] for _ in range(6)][1:]
    medians = [
        replace(each[0], tokens_per_second=median(one.tokens_per_second for one in each))
        for each in zip(*measured, strict=True)
    ]
    show(medians, medians[0])


def compare_rankings(questions: Questions, steps: int) -> None:
    table = Table(title=f"accuracy by temperature, {steps} steps")
    for column in ("alg", "confidence", "0", *map(str, TEMPERATURES)):
        table.add_column(column)
    for alg in ("maskgit_plus", "entropy"):
        for confidence in ("unscaled", "scaled"):
            settings = {"alg": alg, "confidence": confidence, "steps": steps}
            found = [
                questions.measure("", lambda t=t, settings=settings: questions.ours(temperature=t, **settings)).accuracy
                for t in (0.0, *TEMPERATURES)
            ]
            table.add_row(alg, confidence, *(f"{accuracy:.1%}" for accuracy in found))
    Console(width=120).print(table)


def main() -> None:
    if len(sys.argv) not in (2, 3):
        sys.exit("usage: python -m tests.benchmarks.generation_strategies MODEL_PATH [DIRECTORY]")
    directory = Path(sys.argv[2] if len(sys.argv) == 3 else "outputs/strategies")
    directory.mkdir(parents=True, exist_ok=True)
    questions = Questions(sys.argv[1])
    compare_speed(questions)
    published, measured = [], []
    for i, (strategy, settings) in enumerate(tqdm(STRATEGIES.items(), unit="strategy")):
        if i % (len(STRATEGIES) // 2) == 0:
            published.append(questions.measure("published", questions.published))
        measured.append(questions.measure(strategy, lambda settings=settings: questions.ours(**settings)))
    base = max(published, key=lambda each: each.tokens_per_second)
    measured.insert(0, base)
    show(measured, base)
    (directory / "strategies.json").write_text(json.dumps([asdict(each) for each in measured], indent=2) + "\n")
    draw(measured, directory / "strategies.png")
    compare_rankings(questions, steps=4)


if __name__ == "__main__":
    main()

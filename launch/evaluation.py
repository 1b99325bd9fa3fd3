"""Right answers to questions that were not trained on: what evaluate.py does."""

import json
import time
from importlib.metadata import version
from pathlib import Path
from statistics import mean

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from data import prompt_ids, read_rows
from data.chat import to_chat
from data.equations import held_out_rows
from data.verify import is_correct, reference
from launch.generate import Response, generate, load_for_sampling
from trainer.config import Config, to_dict

SHOWN = 6


def evaluate(config: Config) -> None:
    """Answer every question, print a table and write `evaluation.json` into `trainer.output_dir`.

    The questions are those of `data.val_files`, or the held-out equations where none is given. A task's own verifier
    judges, or else whether the final answers are the same number or text.
    """
    model, tokenizer = load_for_sampling(config)
    placed_rows = read_rows(config.data.val_files) if config.data.val_files else held_out_rows()
    rows = [placed.row for placed in placed_rows]
    prompts = [prompt_ids(to_chat(placed)["prompt"], tokenizer) for placed in placed_rows]
    started = time.perf_counter()
    done = tqdm(generate(model, tokenizer, prompts, config.sampling), total=len(rows), desc="evaluate", unit="question")
    responses = sorted(done, key=lambda response: response.name)
    seconds = time.perf_counter() - started
    right = [is_correct(row, response.text) for row, response in zip(rows, responses, strict=True)]
    scores = {
        "questions": len(rows),
        "right": sum(right),
        "exact_match": sum(right) / len(rows),
        "nfe": mean(response.nfe for response in responses),
        "tokens_per_forward": mean(response.tokens_per_forward for response in responses),
        "tokens_per_second": sum(response.tokens for response in responses) / seconds,
    }
    _print([to_chat(placed)["prompt"][-1]["content"] for placed in placed_rows], responses, right, scores)

    path = Path(config.trainer.output_dir) / "evaluation.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "scores": scores,
        "config": to_dict(config),
        "versions": {name: version(name) for name in ("diffllm", "torch", "transformers")},
        "answers": [
            {
                "prompt": to_chat(placed)["prompt"],
                "expected": reference(placed.row),
                "response": response.text,
                "right": ok,
                "nfe": response.nfe,
            }
            for placed, response, ok in zip(placed_rows, responses, right, strict=True)
        ],
    }
    path.write_text(json.dumps(record, indent=2) + "\n")
    print(f"every setting, version and answer: {path}")


def _print(questions: list[str], responses: list[Response], right: list[bool], scores: dict[str, float]) -> None:
    table = Table(title=f"the first {min(SHOWN, len(questions))} of {len(questions)} questions", show_lines=True)
    for column in ("question", "response", "verdict"):
        table.add_column(column)
    for question, response, ok in list(zip(questions, responses, right, strict=True))[:SHOWN]:
        table.add_row(question, response.text, "right" if ok else "wrong")
    Console(markup=False).print(table)
    print(
        f"exact match {scores['exact_match']:.1%} ({scores['right']} of {scores['questions']} questions)\n"
        f"NFE {scores['nfe']:.1f} and {scores['tokens_per_forward']:.2f} tokens a forward on average, "
        f"{scores['tokens_per_second']:,.0f} tokens/s"
    )

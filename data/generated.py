"""Reasoning tasks made to order by reasoning-gym (extra `tasks`), in S1K's schema, with its verifiers."""

import re
from collections.abc import Iterator
from typing import Any

from data.chat import final_answer, with_thinking
from data.readers import PlacedRow

PREFIX = "reasoning_gym/"  # of the field `source`
FORMULA = re.compile(r"[\d\s()/*+-]{1,200}")  # what the verifier of countdown may be given: it computes it
# Where each task says how hard a problem is.
DIFFICULTY = {
    "countdown": lambda metadata: len(metadata["numbers"]),
    "mini_sudoku": lambda metadata: metadata["num_empty"],
    "gsm_symbolic": lambda metadata: metadata["difficulty"],
}


def generate(task: str, rows: int, seed: int) -> Iterator[PlacedRow]:
    """Problems of a task, the same for the same seed; the thinking is its worked answer, empty where it has none.

    Raises:
        ValueError: reasoning-gym is not installed.
    """
    for number, entry in enumerate(_gym().create_dataset(task, size=rows, seed=seed), start=1):
        metadata = entry["metadata"]
        row = {
            "question": entry["question"],
            "answer": with_thinking(metadata.get("answer_cot", "").partition("####")[0], entry["answer"]),
            "source": PREFIX + task,
            "difficulty": DIFFICULTY[task](metadata),
            "metadata": {name: metadata[name] for name in metadata if name != "answer_cot"},
        }
        yield PlacedRow(row, f"{task} {number}")


def score(row: dict[str, Any], answer: str) -> float:
    """What the task's verifier gives for an answer to a row: 1 is right.

    Raises:
        ValueError: the row lacks what the verifier needs, or reasoning-gym is not installed.
    """
    task = row["source"].removeprefix(PREFIX)
    if not isinstance(row.get("metadata"), dict):
        raise ValueError(f"field 'metadata' is missing, which the verifier of {row['source']!r} needs")
    if task == "countdown" and (not FORMULA.fullmatch(answer) or "**" in answer):
        return 0.0
    entry = {"question": row["question"], "answer": final_answer(row["answer"]), "metadata": row["metadata"]}
    return _gym().get_score_answer_fn(task)(answer, entry)


def _gym() -> Any:
    try:
        import reasoning_gym
    except ImportError as error:
        raise ValueError("generated tasks need reasoning-gym: pip install 'diffllm[tasks]'") from error
    return reasoning_gym

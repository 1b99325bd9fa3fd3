"""S1K from the hub as rows with question and answer: `python -m data.s1k s1k.jsonl`.

Needs the hub. The source (arXiv 2501.19393) keeps the reasoning and the final answer in two columns; the answer of our
rows is both, the reasoning in `<think>` tags.
"""

import json
import sys
from pathlib import Path
from typing import Any

from data.chat import END_THINK, THINK

HUB_ID = "simplescaling/s1K"


def from_hub(row: dict[str, Any]) -> dict[str, Any]:
    """One of our rows from one of the hub's."""
    thinking, answer = row["thinking_trajectories"][0].strip(), row["attempt"].strip()
    return {
        "question": row["question"],
        "answer": f"{THINK}\n{thinking}\n{END_THINK}\n{answer}",
        "source": row["source_type"],
    }


def main(path: Path) -> None:
    from datasets import load_dataset  # slow to import, and only needed here

    try:
        rows = [from_hub(row) for row in load_dataset(HUB_ID, split="train")]
    except ConnectionError as error:
        sys.exit(f"error: {HUB_ID} cannot be reached: {error}")
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    print(f"{len(rows)} rows in {path}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m data.s1k FILE.jsonl")
    main(Path(sys.argv[1]))

"""Files into token rows, against `datasets.map`: `python -m tests.benchmarks.prepare_rows [ROWS …]`.

Short rows in a .jsonl file, tokenized with the chat template and kept on disk: by `rows_of_files`, with its checks and
its report, and by `load_dataset` and `map` with the least that does the same. Then both are opened again. Prints rows a
second and the peak of the process's own memory above what it held before, for each number of rows.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from datasets import disable_progress_bars, load_dataset, load_from_disk

from data import DataConfig, rows_of_files
from diffllm.tokenizer import builtin_tokenizer
from tests.benchmarks.measure import own_peak_of

TOKENIZER = builtin_tokenizer()


def write_rows(path: Path, rows: int) -> None:
    with path.open("w") as file:
        for i in range(rows):
            row = {
                "question": f"Add {i} and {i % 1000}.",
                "answer": f"<think>\n{i}+{i % 1000}\n</think>\n{i + i % 1000}",
            }
            file.write(json.dumps(row) + "\n")


def ours(path: Path, cache: Path) -> int:
    rows, _ = rows_of_files([str(path)], DataConfig(cache_dir=str(cache)), TOKENIZER, "training", True)
    return sum(len(chunk.values) for chunk in rows.table["input_ids"].chunks)  # no array of the rows


def mapped(path: Path, cache: Path) -> int:
    kept = cache / "mapped"
    if not kept.exists():
        raw = load_dataset("json", data_files=str(path), split="train", cache_dir=str(cache))
        raw.map(_tokenize, batched=True, remove_columns=raw.column_names).save_to_disk(kept)
    rows = load_from_disk(kept)
    return sum(rows.data.column("length").to_pylist())


def _tokenize(batch: dict[str, list]) -> dict[str, list]:
    chats = [[{"role": "user", "content": question}] for question in batch["question"]]
    prompts = TOKENIZER.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
    prompts = TOKENIZER(prompts, add_special_tokens=False)["input_ids"]
    answers = TOKENIZER(batch["answer"], add_special_tokens=False)["input_ids"]
    ids = [prompt + answer + [TOKENIZER.eos_token_id] for prompt, answer in zip(prompts, answers, strict=True)]
    return {"input_ids": ids, "prompt_length": list(map(len, prompts)), "length": list(map(len, ids))}


def measure(work: Callable[[Path, Path], int], path: Path, cache: Path) -> tuple[float, int, int]:
    """Seconds, peak bytes and result."""
    result = []
    started = time.perf_counter()
    peak = own_peak_of(lambda: result.append(work(path, cache)))
    return time.perf_counter() - started, peak, result[0]


def main() -> None:
    disable_progress_bars()
    for rows in map(int, sys.argv[1:] or (10_000, 100_000, 1_000_000)):
        with tempfile.TemporaryDirectory() as directory:
            path, tokens = Path(directory) / "rows.jsonl", set()
            write_rows(path, rows)
            for name, work in (("rows_of_files", ours), ("datasets.map", mapped)):
                cache = Path(directory) / name
                for what in ("prepared", "opened"):
                    seconds, peak, count = measure(work, path, cache)
                    tokens.add(count)
                    print(
                        f"{rows:,} rows {what} by {name}: {rows / seconds:,.0f} rows/s, {peak / 2**20:,.0f} MiB",
                        flush=True,
                    )
            assert len(tokens) == 1


if __name__ == "__main__":
    main()

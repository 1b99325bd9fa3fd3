"""Cache token rows on disk, so that files are tokenized once."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import fields
from hashlib import sha256
from pathlib import Path

import pyarrow as pa
from huggingface_hub.constants import HF_HOME
from pyarrow import ArrowException
from transformers import PreTrainedTokenizerBase

from data.config import DataConfig
from data.files import digest, iterate
from data.preparation import Preparation
from data.readers import PlacedRow
from data.report import Prepared, Report
from data.storage import digest_file, lock_file, read_object, whole_directory
from data.token_rows import SCHEMA, TokenRows

FORMAT = 6  # version of an entry, part of its key


def rows_of(
    sources: Mapping[str, Iterable[PlacedRow]],
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    name: str = "training",
    curated: bool = True,
) -> Prepared:
    """Prepare rows in memory.

    Args:
        sources: rows by source name.

    Raises:
        ValueError: see `Preparation`.
    """
    preparation = Preparation(config, tokenizer, name, curated)
    rows = TokenRows(pa.Table.from_batches(preparation.batches(sources), SCHEMA))
    return Prepared(rows, preparation.summary())


def rows_of_files(
    files: Iterable[str], config: DataConfig, tokenizer: PreTrainedTokenizerBase, name: str, curated: bool
) -> Prepared:
    """Prepare the rows of files, or map them from the cache if an earlier call prepared them.

    The key of a cache entry is a digest of the files, the tokenizer with its template, and the settings. One process
    writes an entry while others wait for it. An entry is whole or absent.

    Raises:
        ValueError: see `Preparation` and `data.files.iterate`; or the entry is damaged.
    """
    cache = Path(config.cache_dir or Path(HF_HOME) / "diffllm").expanduser()
    cache.mkdir(parents=True, exist_ok=True)
    key = _key(files, config, tokenizer, curated)
    directory = cache / key
    if not directory.exists():
        with lock_file(cache / f"{key}.lock", wait=True):
            if not directory.exists():
                with whole_directory(directory) as unfinished:
                    _build(files, config, tokenizer, name, curated, unfinished)
                    if _key(files, config, tokenizer, curated) != key:
                        raise ValueError("data.train_files or data.val_files changed while they were read: start again")
    try:
        saved = read_object(directory / "report.json")
        rows = TokenRows(pa.ipc.open_stream(pa.memory_map(str(directory / "rows.arrow"))).read_all())
        report = Report.from_json(saved["report"] | {"name": name})
        if len(rows) != report.kept:
            raise ValueError(f"it has {len(rows)} of {report.kept} rows")
        if digest_file(directory / "rows.arrow") != saved["digest"]:
            raise ValueError("rows.arrow was changed")
        return Prepared(rows, report)
    except (ArrowException, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{directory}: these tokenized rows cannot be read ({error}); delete the directory") from error


def _build(
    files: Iterable[str],
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    curated: bool,
    directory: Path,
) -> None:
    preparation = Preparation(config, tokenizer, name, curated)
    sources = {file: iterate(file, preparation.bad) for file in files}
    with pa.ipc.new_stream(str(directory / "rows.arrow"), SCHEMA) as written:
        for batch in preparation.batches(sources):
            written.write(batch)
    saved = {"digest": digest_file(directory / "rows.arrow"), "report": preparation.summary().to_json()}
    (directory / "report.json").write_text(json.dumps(saved))


def _key(files: Iterable[str], config: DataConfig, tokenizer: PreTrainedTokenizerBase, curated: bool) -> str:
    kinds = ("all", "curated") if curated else ("all",)
    settings = [item.name for item in fields(config) if item.metadata.get("changes_rows") in kinds]
    content = {
        "format": FORMAT,
        "files": [(file, digest(file)) for file in files],
        "decontaminate": [digest(file) for file in config.decontaminate_files if curated],
        "settings": {name: getattr(config, name) for name in settings},
        "tokenizer": tokenizer_digest(tokenizer),
    }
    return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Digest of a tokenizer with its special tokens and chat template."""
    special = (tokenizer.special_tokens_map, tokenizer.split_special_tokens)
    content = [tokenizer.backend_tokenizer.to_str(), special, tokenizer.chat_template]
    return sha256(json.dumps(content, default=str).encode()).hexdigest()

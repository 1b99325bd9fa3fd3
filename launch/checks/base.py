"""The result of a check, and the run whose parts the checks share."""

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import NamedTuple

import torch
from rich.console import RenderableType
from transformers import PreTrainedTokenizerBase

from data import Batch, BatchLayout, BatchSource, Prepared
from data.terminal import announced
from diffllm import DiffLLM
from diffllm.diffusion import Objective, build_objective
from launch.budget import count_rows, count_steps
from launch.ranks import most_ranks
from launch.shapes import meta_model
from trainer.build import build_batches, build_tokenizer, build_trainable, check_length
from trainer.config import Config, batch_layout
from trainer.distributed import Distributed
from trainer.parallel import shard

FEW = 4  # rows that the model is tried on
CPU_RANKS = 1  # that launch/local.sh starts without a GPU


class Result(NamedTuple):
    """A line of a check."""

    status: str  # ok | warn | FAIL | skip
    text: str
    advice: str | None = None  # what to do; None if the text says it
    details: RenderableType | None = None  # printed below the line


ok, warn, fail, skip = (partial(Result, status) for status in ("ok", "warn", "FAIL", "skip"))
NOT_SAMPLED = skip("answers of a causal model are not sampled by unmasking")


class Check(NamedTuple):
    """A check: the first line of the function's docstring explains it."""

    function: Callable[["Run"], Iterator[Result]]
    symptom: str  # what it finds the cause of, in the table of trainer/README.md
    needs: tuple[str, ...] = ()  # checks without which it is skipped


@dataclass
class Run:
    """A run, whose parts are built when a check asks for them. Nothing is written but the cache of tokenized rows.

    Attributes:
        choice: of the group `model`.
        tokens: positions of the row that is shown token by token; 0 shows all.
        train: try optimizer steps.
    """

    config: Config
    choice: str
    distributed: Distributed
    tokens: int = 60
    train: bool = True

    @property
    def device(self) -> torch.device:
        return self.distributed.device

    @cached_property
    def ranks(self) -> int:
        """Ranks of the run on this machine, as launch/local.sh starts them."""
        return most_ranks(torch.cuda.device_count() or CPU_RANKS, self.config)

    @cached_property
    def layout(self) -> BatchLayout:
        """The batch of the run."""
        return batch_layout(self.config.data, 0, self.ranks)

    @cached_property
    def steps(self) -> int | None:
        """Steps of the run if no row is dropped; None if the number of rows is not known yet."""
        rows = None if self.config.trainer.max_steps else count_rows(self.config)
        return count_steps(self.config, self.layout, rows)

    @cached_property
    def outline(self) -> tuple[DiffLLM, str]:
        """The model without weights, on the meta device, and the file with its shape."""
        return meta_model(self.config, self.choice)

    @property
    def shape(self) -> DiffLLM:
        """The model without weights, on the meta device."""
        return self.outline[0]

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        tokenizer, context = build_tokenizer(self.config.model)
        check_length(self.config.data, context)
        return tokenizer

    @cached_property
    def objective(self) -> Objective:
        return build_objective(self.config.diffusion, self.tokenizer.mask_token_id, self.config.seed)

    @cached_property
    def batches(self) -> tuple[BatchSource, dict[str, Prepared]]:
        """Batches of few rows, in forwards no larger than the run's; the rows of training and validation."""
        size = min(FEW, self.layout.global_batch_size)
        micro = next(rows for rows in range(min(size, self.layout.micro_batch_size), 0, -1) if size % rows == 0)
        config = replace(self.config, data=replace(self.config.data, num_workers=0))
        with announced("reading and tokenizing the rows"):
            layout = BatchLayout(0, 1, micro, size // micro)
            source, _, prepared = build_batches(config, self.tokenizer, layout, self.objective.corrupt, None)
        return source, prepared

    @property
    def prepared(self) -> dict[str, Prepared]:
        """Rows and reports by `training`, absent for a stream, and `validation`."""
        return self.batches[1]

    @cached_property
    def micro_batches(self) -> list[Batch]:
        """Few rows, as a step trains on them."""
        with closing(self.batches[0].loader(range(1))) as batches:
            return next(batches)

    @cached_property
    def model(self) -> DiffLLM:
        """The model as it is trained, on one rank."""
        config = replace(self.config, trainer=replace(self.config.trainer, replicate=1))
        with announced("loading the model"):
            model, _ = build_trainable(config, self.device)
            shard(model, self.distributed, config)
        return model

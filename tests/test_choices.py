"""Every choice of a setting is handled: a name that is only listed does not run as another choice."""

import ast
from collections.abc import Callable
from inspect import getsource
from textwrap import dedent
from typing import Any

import numpy as np
import pytest
import torch

from data import DataConfig
from data.batches import TrainBatches
from data.collate import response_widths
from data.curation import Duplicates
from data.preparation import Preparation
from data.template import render_parts
from diffllm import DiffusionConfig, new_model
from diffllm.checkpoint_source import CheckpointSource
from diffllm.compilation import is_compiled
from diffllm.diffusion import OBJECTIVES
from diffllm.diffusion.masked import MaskedDiffusion
from diffllm.diffusion.weights import time_weights
from diffllm.families import FAMILIES
from diffllm.static_forward import prepare_sampling
from diffllm.tokenizer import builtin_tokenizer
from sample import MODES
from sampling import Canvas, RowState, SamplingConfig
from sampling.cache import computed, with_cache
from sampling.confidence import propose
from sampling.config import CHOICES, LLADA_ALGS
from tests.conftest import ROOT, small_shape
from tests.sampling.models import MASK, SPECIAL
from trainer.build import (
    LR_SCHEDULES,
    _adamw,
    _check_objective,
    build_optimizer,
    build_trainable,
    compute_dtype,
    export_dtype,
    load_for_sampling,
)
from trainer.config import Config, TrainerConfig
from trainer.console import Console
from trainer.loop import TrainingLoop
from trainer.memory import state_memory
from trainer.parallel import recompute_activations
from trainer.schema import tree
from trainer.trackers import TRACKERS


def listed() -> dict[str, tuple[str, ...]]:
    """The choices of each setting that has some."""
    settings = tree(*(objective.settings for objective in OBJECTIVES.values()))
    choices = {name: item.metadata["choices"] for name, item in settings if item.metadata.get("choices")}
    return choices | {f"sampling.{name}": allowed for name, allowed in CHOICES.items()}


def unchecked(config: Any, **changes: str) -> Any:
    """A configuration with names that need not be listed."""
    vars(config).update(changes)
    return config


def commit(transfer: str) -> None:
    """One step of a row whose candidates are as unsure as can be: it must commit a token, or sampling would not end."""
    config = unchecked(SamplingConfig(steps=2), transfer=transfer)
    row = RowState(Canvas([1, *[MASK] * 4], 1), config, SPECIAL)
    unsure = np.zeros(4, np.float32)
    row.commit(np.arange(4), unsure, unsure, unsure + 100)
    assert len(row.committed)


def compute_some(cache: str) -> None:
    config = with_cache(unchecked(SamplingConfig(), cache=cache), attention_block=2)
    if config.cache != "none":  # computes all positions
        computed(RowState(Canvas([1, MASK], 1), config, SPECIAL, attention_block=2))


# Code that takes the choice, and raises KeyError or NotImplementedError for one that it does not handle.
RUN: dict[str, Callable[[str], object]] = {
    "mode": MODES.__getitem__,
    "model.family": FAMILIES.__getitem__,
    "model.attn_implementation": lambda name: new_model(
        unchecked(small_shape(), attn_implementation=name), builtin_tokenizer()
    ),
    "data.perbatch_cutoff_type": lambda name: response_widths(
        np.array([3]), np.array([4]), unchecked(DataConfig(), perbatch_cutoff_type=name), np.random.default_rng(0)
    ),
    "diffusion.time_reweighting": lambda name: time_weights(
        torch.ones(1, 1), *torch.ones(2, 1, 2, dtype=torch.bool), name, cart_p=0.1
    ),
    "diffusion.loss_norm": lambda name: MaskedDiffusion(unchecked(DiffusionConfig(), loss_norm=name), 0, 0).denominator(
        {name: torch.ones(1) for name in ("masked", "importance", "maskable", "sample_index")}
    ),
    "optim.lr_schedule": LR_SCHEDULES.__getitem__,
    "trainer.logger": {"console": Console, **TRACKERS}.__getitem__,
    "trainer.export_dtype": lambda name: export_dtype(
        Config(trainer=unchecked(TrainerConfig(), export_dtype=name)), CheckpointSource(None, {}, FAMILIES["dream"])
    ),
    "sampling.alg": lambda name: propose(
        torch.zeros(1, 3), None, unchecked(SamplingConfig(), alg=LLADA_ALGS.get(name, name))
    ),
    "sampling.transfer": commit,
    "sampling.confidence": lambda name: propose(
        torch.zeros(1, 3), torch.zeros(1), unchecked(SamplingConfig(temperature=1.0), confidence=name)
    ),
    "sampling.cache": compute_some,
}

# Functions that compare a setting with its choices, and the choice that they need not name.
NAMED: dict[str, tuple[tuple[Callable, ...], str | None]] = {
    "model.attention": ((load_for_sampling, _check_objective), "auto"),
    "model.recompute": ((recompute_activations,), "full"),
    "model.loss_kernel": ((build_trainable,), "chunked"),
    "model.quantize": ((build_trainable, state_memory), None),
    "model.compile": ((is_compiled,), "false"),
    "data.on_bad_row": ((Preparation.check,), "skip"),
    "data.loss_on": ((render_parts,), "all"),
    "data.thinking": ((Preparation._chats,), "keep"),
    "data.drop_duplicates": ((Preparation.__init__, Duplicates.__init__), "exact"),
    "data.order": ((TrainBatches.order,), "shuffled"),
    "data.truncation": ((Preparation.__init__,), "error"),
    "diffusion.t_sampler": (
        (MaskedDiffusion.stratify, MaskedDiffusion.time, DiffusionConfig.prefers_small_t.fget),
        "stratified",
    ),
    "optim.name": ((_adamw, build_optimizer), None),
    "trainer.nonfinite": ((TrainingLoop._refuse,), "skip"),
    "trainer.precision": ((compute_dtype,), "fp32"),
    "sampling.compile": ((prepare_sampling,), None),
    "sampling.eos_confidence": ((RowState.commit,), "keep"),
}


def is_handled(name: str, choice: str) -> bool:
    if name in RUN:
        try:
            RUN[name](choice)
        except (KeyError, NotImplementedError):
            return False
        except ValueError as error:
            return "pip install" in str(error)  # handled by an extra that is not installed
        return True
    functions, unnamed = NAMED[name]
    nodes = [node for function in functions for node in ast.walk(ast.parse(dedent(getsource(function))))]
    return choice == unnamed or choice in [node.value for node in nodes if isinstance(node, ast.Constant)]


@pytest.mark.parametrize("name", listed())
def test_each_choice_is_handled(name):
    assert [choice for choice in listed()[name] if not is_handled(name, choice)] == []


@pytest.mark.parametrize("name", listed())
def test_a_name_that_is_only_listed_is_found(name):
    assert not is_handled(name, "only_listed")


@pytest.mark.parametrize(
    ("name", "table"), [("mode", MODES), ("model.family", FAMILIES), ("optim.lr_schedule", LR_SCHEDULES)]
)
def test_what_a_table_handles_is_listed(name, table):
    assert {*listed()[name]} == {*table}


def test_no_setting_is_left_over():
    assert {*RUN} | {*NAMED} == {*listed()}


def test_the_page_of_sampling_names_its_choices():
    page = (ROOT / "sampling" / "README.md").read_text()
    named = {choice for name, choices in CHOICES.items() if name != "compile" for choice in choices}
    assert {choice for choice in named if f"`{choice}`" not in page} == set()

"""Checks of packages, devices, settings, memory and disk. None reads rows or weights."""

import os
import platform
import tomllib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from packaging.requirements import Requirement

from data.quantities import count_text, size_text
from diffllm.gguf import is_gguf
from launch import ROOT
from launch.activations import pass_memory
from launch.checks.base import Result, Run, fail, ok, warn
from launch.plan import MARGIN, memory_table
from trainer.build import compute_dtype
from trainer.config import Config, warmup_steps
from trainer.disk import disk, free_space
from trainer.distributed import device_memory
from trainer.memory import remedies, state_memory

SHOWN = ("torch", "transformers", "datasets", "hydra-core", "omegaconf")


def packages(run: Run) -> Iterator[Result]:
    """Python and packages are of the versions in pyproject.toml; packages that the settings need are installed."""
    project, extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"], needed_extras(run.config)
    wanted = [(f"python{project['requires-python']}", None, "make install PYTHON=python3.12")]
    wanted += [(text, None, f"pip install -c constraints.txt '{text}'") for text in project["dependencies"]]
    for extra, setting in extras.items():
        advice = f"pip install -c constraints.txt -e '.[{extra}]'"
        wanted += [(text, setting, advice) for text in project["optional-dependencies"][extra]]
    wrong = []
    for text, setting, advice in wanted:
        required = Requirement(text)
        found = _version(required.name)
        if found is None or not required.specifier.contains(found, prereleases=True):
            needed = f"{setting} needs {text}" if setting else f"diffllm needs {text}"
            wrong.append(fail(f"{needed}; {found or 'nothing'} is installed", advice))
    names = ["python", *SHOWN]
    yield from wrong or [
        ok(", ".join(f"{name} {_version(name)}" for name in names) + "".join(f"; extra {name}" for name in extras))
    ]


def _version(name: str) -> str | None:
    try:
        return platform.python_version() if name == "python" else version(name)
    except PackageNotFoundError:
        return None


def needed_extras(config: Config) -> dict[str, str]:
    """The extras that the settings need, each with such a setting."""
    model, path = config.model, config.model.path
    needed = {
        "lora": (f"model.lora_rank={model.lora_rank}", model.lora_rank),
        "quantize": (f"model.quantize={model.quantize}", model.quantize != "none"),
        "gguf": (f"model.path={path}", path is not None and is_gguf(path)),
        "flash": (f"model.attn_implementation={model.attn_implementation}", "flash" in model.attn_implementation),
        "liger": (f"model.loss_kernel={model.loss_kernel}", model.loss_kernel == "liger"),
        "torchao": (f"optim.name={config.optim.name}", config.optim.name == "adamw_8bit"),
        "dedup": (f"data.drop_duplicates={config.data.drop_duplicates}", config.data.drop_duplicates == "near"),
        "tensorboard": ("trainer.logger=tensorboard", "tensorboard" in config.trainer.logger),
        "trackio": ("trainer.logger=trackio", "trackio" in config.trainer.logger),
    }
    return {extra: setting for extra, (setting, is_needed) in needed.items() if is_needed}


def devices(run: Run) -> Iterator[Result]:
    """GPUs, their memory, whether they compute in the run's precision; ranks on this machine."""
    dtype = str(compute_dtype(run.config, run.device)).removeprefix("torch.")
    if run.device.type == "cpu":
        hidden = "CUDA_VISIBLE_DEVICES" in os.environ
        if not hidden and any(Path("/dev").glob("nvidia[0-9]*")):
            advice = "install a build of torch for this driver's CUDA, see pytorch.org"
            yield warn(f"this machine has a GPU, but torch {torch.__version__} cannot use it", advice)
        yield ok(f"CPU only: {os.cpu_count()} cores, {dtype}, ranks={run.ranks}")
        return
    cards = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    names = ", ".join(f"{card.name} of {size_text(card.total_memory)}" for card in cards)
    if dtype == "bfloat16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        yield fail(f"{names}: no bf16, which the run computes in", "trainer.precision=fp32")
    else:
        yield ok(f"{names}; {dtype}, ranks={run.ranks}")


def settings(run: Run) -> Iterator[Result]:
    """The sizes of the batch agree, and there are rows for a step."""
    layout, steps, optim = run.layout, run.steps, run.config.optim
    length = "an unknown number of steps"
    if steps is not None:
        length = f"{steps:,} steps, {warmup_steps(optim, steps):,} of them warm-up"
    yield ok(
        f"{layout.global_batch_size} rows a step = {layout.micro_batch_size} a forward × {layout.micro_batches} "
        f"accumulated × {layout.ranks} ranks; {length}; lr {optim.lr:g}, {optim.lr_schedule}"
    )


def shape(run: Run) -> Iterator[Result]:
    """The shape of the model is known, and its context holds the rows."""
    yield ok(
        f"{count_text(sum(p.numel() for p in run.outline[0].parameters()))} parameters, shape from {run.outline[1]}"
    )


def memory(run: Run) -> Iterator[Result]:
    """The run's peak of memory, as `launch.plan` predicts it, fits the device."""
    needed, usable = needed_memory(run), device_memory(run.device)
    usable = (1 - MARGIN) * usable if run.device.type == "cuda" else usable / run.ranks
    length = f"rows of data.max_length={run.config.data.max_length}"
    text = f"needs {size_text(needed)} for {length}, each of {run.ranks} ranks has {size_text(usable)}"
    if needed <= usable:
        yield ok(text)
    else:
        advice = f"what may help: {', '.join(remedies(run.config, run.layout))}; python -m launch.plan gpu=… plans each"
        yield fail(text, advice)


def needed_memory(run: Run) -> int:
    """Bytes of a rank at the peak; on a CPU, where the phases of a step are not told apart, at most so many."""
    if run.device.type == "cuda":
        return max(memory_table(run.shape, run.config, run.layout)["total"])
    state = state_memory(run.shape, run.config, run.ranks, run.device)
    dtype = compute_dtype(run.config, run.device)
    passed = pass_memory(run.shape, run.config, run.layout.micro_batch_size, dtype)
    return state.total + passed.kept + max(passed.loss, passed.backward)


def disk_space(run: Run) -> Iterator[Result]:
    """The output directory can be written, and its disk has room for checkpoints and the exported model."""
    directory = Path(run.config.trainer.output_dir)
    there = next(place for place in (directory, *directory.absolute().parents) if place.exists())
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        yield fail(f"{directory}: {there} is no directory that you may write to", "trainer.output_dir=DIR elsewhere")
        return
    written, (free, replaced) = disk(run.shape, run.config, run.steps, run.device), free_space(directory)
    text = f"{directory} takes up to {size_text(written.total)}, {size_text(free)} are free"
    if written.total <= free + replaced:
        yield ok(text)
    else:
        yield fail(text, "trainer.output_dir=DIR on another disk, or trainer.keep_checkpoints=1")

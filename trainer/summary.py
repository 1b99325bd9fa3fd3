"""Describe a run before its first step, and sum it up at its end, as lines for the terminal."""

import shlex
from pathlib import Path

import torch

from data import BatchSource, TokenRows
from data.quantities import count_text, size_text
from data.terminal import printable
from diffllm import DiffLLM
from diffllm.compilation import is_compiled
from diffllm.quantize import numel
from trainer.build import compute_dtype
from trainer.config import Config, TrainerConfig, warmup_steps
from trainer.disk import disk, free_space
from trainer.distributed import Distributed
from trainer.progress import Clock, Progress

TOY = (
    "WEIGHTS ARE RANDOM, the model knows no language; to fine-tune a checkpoint give model.path=DIR_OR_HUB_ID, or a "
    "choice such as model=dream_7b"
)


def describe(
    config: Config,
    distributed: Distributed,
    model: DiffLLM,
    source: BatchSource,
    rows: int,
    validation: TokenRows | None,
    steps: int,
    done: int,
) -> list[str]:
    """Lines on model, device, batch, steps, validation and files of a run, after `done` of its steps.

    Args:
        rows: number of training rows, 0 for a stream.
    """
    lines = {
        "model": describe_model(config, model),
        **({"note": TOY} if config.model.path is None and config.data.train_files and not done else {}),
        "device": _device(config, distributed, model, steps * source.layout.micro_batches),
        "batch": _batch(config, source),
        "steps": _steps(config, source, rows, steps),
        "loss": _loss(config),
        "attention": describe_attention(config, model),
        "validation": _validation(config.trainer, validation),
        "files": _files(config, model, distributed, steps),
    }
    width = max(map(len, lines)) + 2
    return [printable(f"{name + ':':{width}}{text}") for name, text in lines.items()]


def describe_model(config: Config, model: DiffLLM) -> str:
    """The decoder, where its weights are from, and how many are trained."""
    parameters = list(model.parameters())
    total, trained = _count(parameters), _count([p for p in parameters if p.requires_grad])
    kind = type(model.lm).__name__.removesuffix("ForCausalLM")
    origin = config.model.path or "scratch, with the built-in tokenizer of bytes"
    share = f"{trained} of {total}" if trained != total else f"all {total}"
    adapters = f" in adapters of rank {config.model.lora_rank}" if config.model.lora_rank else ""
    return f"{kind} from {origin}; trains {share} parameters{adapters}"


def describe_attention(config: Config, model: DiffLLM) -> str:
    """Say what a position sees, and name the blocks of the checkpoint if they are others."""
    learned, context = model.published.get(model.family.block_key), model.lm.config.max_position_embeddings
    if learned is None or min(learned, context) == (config.diffusion.block_length or context):
        return config.diffusion.attention
    return f"{config.diffusion.attention}; config.json of the model has blocks of {learned}"


def _count(parameters: list[torch.Tensor]) -> str:
    return count_text(sum(map(numel, parameters)))


def _device(config: Config, distributed: Distributed, model: DiffLLM, passes: int) -> str:
    device = distributed.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    dtype = str(compute_dtype(config, device)).removeprefix("torch.")
    compiled = is_compiled(config.model.compile, device, passes)
    return (
        f"{distributed.size} × {name}, {dtype}, attention {model.lm.config._attn_implementation}, "
        f"{'compiled layers' if compiled else 'not compiled'}"
        + (", recomputes activations" if config.model.enable_gradient_checkpointing else "")
    )


def _batch(config: Config, source: BatchSource) -> str:
    layout, length = source.layout, config.data.max_length
    ranks = "1 rank" if layout.ranks == 1 else f"{layout.ranks} ranks"
    return (
        f"{layout.micro_batch_size} rows a forward × {layout.micro_batches} accumulated × {ranks} = "
        f"{layout.global_batch_size} rows a step, up to {layout.global_batch_size * length:,} tokens "
        f"(data.max_length={length})"
    )


def _steps(config: Config, source: BatchSource, rows: int, steps: int) -> str:
    optim = config.optim
    epochs = f", {source.epoch(steps):.3g} epochs of {rows:,} rows" if rows else ", of a stream"
    schedule = f"{warmup_steps(optim, steps):,} of them warm-up, then {optim.lr_schedule}"
    return f"{steps:,}{epochs}; lr {optim.lr:g}, {schedule}"


def _loss(config: Config) -> str:
    default = type(config.diffusion)()
    settings = {
        name: value
        for name, value in vars(config.diffusion).items()
        if isinstance(value, str) or value != getattr(default, name)
    }
    return ", ".join(f"{name}={value}" for name, value in settings.items())


def _validation(settings: TrainerConfig, rows: TokenRows | None) -> str:
    if rows is None:
        return "none; data.val_split=0.02 holds out a part of the training rows"
    interval = settings.val_check_interval
    return f"{len(rows):,} rows, {f'every {interval:,} steps and ' if interval else ''}at the end"


def _files(config: Config, model: DiffLLM, distributed: Distributed, steps: int) -> str:
    directory, written = Path(config.trainer.output_dir), disk(model, config, steps, distributed.device)
    interval = config.trainer.save_checkpoint_steps
    when = f"every {interval:,} steps and at the end" if interval else "at the end only"
    parts = [f"{written.kept} × {size_text(written.checkpoint)} for checkpoints, saved {when}"] if written.kept else []
    parts += [f"{size_text(written.export)} for hf/"] if written.export else []
    free, present = free_space(directory)
    room = f"{size_text(free)} free"
    if written.total > free + present:
        room = f"ONLY {size_text(free)} FREE, {size_text(written.total - present)} needed"
    return f"{directory}: {', '.join(['metrics', *parts])}; {room}"


def conclude(config: Config, progress: Progress, clock: Clock, best: Path | None) -> list[str]:
    """Lines on time, validation, files and the next command of a finished run.

    Args:
        best: the checkpoint that was exported in place of the last step.
    """
    settings, directory = config.trainer, Path(config.trainer.output_dir)
    lines = [f"took {clock.total} for {clock.steps:,} steps and {clock.tokens:,.0f} tokens"]
    if progress.best is not None:
        last = "not finite" if progress.value is None else f"{progress.value:.4g}"
        lines.append(f"{progress.metric}: {last} at the end, lowest {progress.best:.4g} at step {progress.best_step:,}")
    if settings.patience is not None and progress.not_better >= settings.patience:
        lines.append(f"ended early: it did not fall in trainer.patience={settings.patience} validations")
    model = [f"model{f' of {best.name}' if best else ''}: {directory / 'hf'}"] if settings.save_model else []
    lines.append(", ".join([*model, f"metrics: {directory / 'metrics.jsonl'}"]))
    lines.append(f"draw the metrics: python -m trainer.plot {shlex.quote(str(directory))}")
    if settings.save_model and not config.diffusion.causal:
        lines.append(f'next: python sample.py model.path={directory / "hf"} prompt="YOUR QUESTION"')
    return lines

"""Optimizer steps from a source of batches: resumable, checked, logged; independent of rows and objective."""

import math
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from data import Batch, BatchSource
from data.packing import row_lengths
from data.terminal import printable
from diffllm import DiffLLM
from diffllm.compilation import refusing_failures
from diffllm.diffusion.loss import LossOutput
from trainer.build import build_optimizer, compute_dtype, set_lr
from trainer.checkpoint import Checkpoints, TrainingState, load
from trainer.config import Config, to_dict
from trainer.distributed import Distributed, locked
from trainer.ending import Deadline
from trainer.identity import Identity, find_checkpoint
from trainer.interruption import NAMES, Interruption
from trainer.manifest import path_of
from trainer.memory import naming_remedies
from trainer.metrics import MetricsLog, ValSample
from trainer.nonfinite import FailedStep, keep
from trainer.speed import Speed

# Entries of a run's directory that must not be links; `checkpoints` may be one, to another disk.
WRITTEN = ("metrics.jsonl", "hf", "data_report.json", "data_report.png", "wandb_id", "nonfinite")


@dataclass
class Progress:
    """Counts that a checkpoint keeps."""

    skipped_steps: int = 0  # without a masked token
    nonfinite_steps: int = 0  # with a loss or gradient that is not finite


class TrainingLoop(ABC):
    """Trains a sharded model. A subclass gives the loss of a batch, validation and export.

    Args:
        model: sharded by `trainer.parallel.shard`.
        source: yields the batches of each step.
        steps: number of steps of the whole run.
    """

    def __init__(self, config: Config, distributed: Distributed, model: DiffLLM, source: BatchSource, steps: int):
        self.config, self.distributed, self.model = config, distributed, model
        self.source, self.steps = source, steps
        self.output_dir = Path(config.trainer.output_dir)
        self.dtype = compute_dtype(config, distributed.device)
        self.identity = Identity.of(config, source, model.vocab_size)
        self.optimizer = build_optimizer(model.parameters(), config.optim)
        self.speed = Speed(model, distributed, self.dtype, config.trainer.peak_tflops)
        self.progress = Progress()

    @abstractmethod
    def prepare(self, step: int, micro_batches: list[Batch]) -> list[Batch]:
        """Add whatever depends on the step to its micro-batches."""

    @abstractmethod
    def denominator(self, batch: Batch) -> Tensor:
        """The batch's part of the step's loss denominator; parts add up."""

    @abstractmethod
    def compute_loss(self, batch: Batch, denominator: float) -> LossOutput:
        """A micro-batch's part of the step's loss.

        Args:
            denominator: of the whole step, summed over ranks.
        """

    @abstractmethod
    def measure(self, batch: Batch, output: LossOutput) -> Tensor:
        """Sums over a micro-batch, from which `metrics` are computed; they add up."""

    @abstractmethod
    def metrics(self, sums: list[float]) -> dict[str, float]:
        """Metrics from the sums over all ranks."""

    @abstractmethod
    def validate(self) -> dict[str, float]:
        """Validation metrics of the current model. Collective."""

    @abstractmethod
    def sample(self) -> list[ValSample]:
        """Text sampled from the current model, on rank 0. Collective."""

    @abstractmethod
    def export(self, directory: Path) -> None:
        """Write the trained model. Collective."""

    @abstractmethod
    def report(self, done: int) -> None:
        """Write the data report before training starts, after `done` steps of earlier runs."""

    @abstractmethod
    def report_read(self, done: int) -> None:
        """Write the data report of the rows that this run read after `done` steps, when it ends."""

    def fit(self) -> None:
        """Train to the last step, from the checkpoint that `trainer.resume` names, then export the model.

        A signal of `trainer.interruption` ends the run after the current step, with a checkpoint.

        Raises:
            SystemExit: SIGTERM or SIGINT stopped the run.
        """
        settings = self.config.trainer
        with locked(self.output_dir, self.distributed, *WRITTEN), Interruption() as self.interruption:
            state = TrainingState(self.model, self.optimizer, self.distributed)
            done, broken = self._resume(state)
            self.report(done)
            directory = self.output_dir / "checkpoints"
            self.checkpoints = Checkpoints(
                directory, state, settings.keep_checkpoints, settings.async_checkpoints, broken
            )
            try:
                log = MetricsLog(settings, to_dict(self.config), done, self.steps, self.distributed)
                batches = self.source.loader(range(done, self.steps))
                with log, closing(batches), Deadline.on_error():
                    finished = self._train(batches, done, log)
                    self.checkpoints.wait()
            finally:
                self.checkpoints.close()
                self.report_read(done)
            if finished:
                self.export(self.output_dir / "hf")
                self.print_main(f"model: {self.output_dir / 'hf'}, metrics: {self.output_dir / 'metrics.jsonl'}")

    def _train(self, batches: Iterator[list[Batch]], done: int, log: MetricsLog) -> bool:
        """Take the steps after the first `done`. Return False if SIGUSR1 stopped the run before the last step.

        Raises:
            SystemExit: SIGTERM or SIGINT stopped the run.
        """
        settings = self.config.trainer
        for step in range(done + 1, self.steps + 1):
            started = time.perf_counter()
            micro_batches = next(batches)
            waited = time.perf_counter() - started
            counts = self._count(micro_batches)
            if counts["failed_saves"]:
                self.checkpoints.wait()
            with (
                refusing_failures("model.compile", self.config.model.compile),
                naming_remedies(self.config, self.source.layout),
            ):
                metrics = self.train_step(step, micro_batches, counts)
                metrics |= self.speed.metrics(counts, time.perf_counter() - started, waited)
                if self._is_due(step, settings.val_check_interval):
                    metrics |= self.validate()
                    log.log_samples(step, self.sample())
            log.log(step, metrics)
            signals = [name for name in NAMES if counts[name]] if step < self.steps else []
            if signals or self._is_due(step, settings.save_checkpoint_steps):
                self.checkpoints.save(step, self._manifest(step))
            if signals:
                self.checkpoints.wait()
                self.print_main(
                    f"stopped by {signals[0]} after {step} of {self.steps} steps; run the same command to resume"
                )
                if signals[0] != "SIGUSR1":
                    raise SystemExit(128 + signal.Signals[signals[0]])
                return False
        return True

    def train_step(self, step: int, micro_batches: list[Batch], counts: dict[str, float]) -> dict[str, float]:
        """Take one optimizer step, a function of the parameters and the rows, whatever the layout.

        Args:
            counts: from `_count`.

        Returns:
            Metrics of the step over all ranks.

        Raises:
            FloatingPointError: the loss or the gradient is not finite; the parameters did not change.
        """
        lr = set_lr(self.optimizer, self.config.optim, self.steps, step - 1)
        micro_batches = self.prepare(step, micro_batches)
        losses, sums, metrics, grad_norm = [], [], {"train/loss": 0.0}, 0.0
        if counts["masked"]:
            for batch in micro_batches:
                last = batch is micro_batches[-1]
                self.model.set_requires_gradient_sync(last or self.config.trainer.reduce_each_micro_batch)
                output = self.compute_loss(batch, counts["denominator"])
                output.loss.backward()
                losses.append(output.loss.detach())
                sums.append(self.measure(batch, output))
            metrics, grad_norm = self._reduce(losses, sums, self._clip())
        if not counts["masked"]:
            self.progress.skipped_steps += 1
        elif math.isfinite(metrics["train/loss"]) and math.isfinite(grad_norm):
            self.checkpoints.wait_for_copy()
            self.optimizer.step()
        else:
            self._refuse(step, micro_batches, losses, counts["denominator"], grad_norm)
        self.optimizer.zero_grad()
        return {
            **metrics,
            "train/grad_norm": grad_norm,
            "train/lr": lr,
            "train/epoch": self.source.epoch(step),
            "train/skipped_steps": self.progress.skipped_steps,
            "train/nonfinite_steps": self.progress.nonfinite_steps,
            "data/masked_share": counts["masked"] / max(counts["maskable"], 1),
            "data/padding_share": 1 - counts["row_tokens"] / counts["positions"],
        }

    def _count(self, micro_batches: list[Batch]) -> dict[str, float]:
        """Token counts and loss denominator, summed over ranks before the forward.

        Received signals and failed saves are counted too, so that all ranks react to them in the same step.
        """
        lengths = torch.cat([row_lengths(batch) for batch in micro_batches])
        counts = {
            "denominator": sum(self.denominator(batch) for batch in micro_batches),
            "masked": sum(batch["masked"].sum() for batch in micro_batches),
            "maskable": sum(batch["maskable"].sum() for batch in micro_batches),
            "attended": lengths.sum(),
            "pairs": lengths.square().sum(),
            "row_tokens": sum(batch["row_tokens"].sum() for batch in micro_batches),
            "positions": sum(batch["input_ids"].numel() for batch in micro_batches),
            "failed_saves": self.checkpoints.poll(),
            **self.interruption.received,
        }
        return dict(zip(counts, self.distributed.sum(*counts.values()), strict=True))

    def _reduce(self, losses: list[Tensor], sums: list[Tensor], norm: Tensor) -> tuple[dict[str, float], float]:
        """Metrics over all micro-batches and ranks, and the gradient norm: the step's only wait for the GPU."""
        loss = sum(loss.double() for loss in losses)
        loss, *total, norm = self.distributed.sum(loss, *sum(sums), equal=[norm])
        return {"train/loss": loss, **{f"train/{name}": value for name, value in self.metrics(total).items()}}, norm

    def _clip(self) -> Tensor:
        """Clip the gradient; its norm before."""
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optim.clip_grad)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def _refuse(
        self, step: int, micro_batches: list[Batch], losses: list[Tensor], denominator: float, grad_norm: float
    ) -> None:
        """Skip a non-finite step; save its micro-batches for replay. Collective.

        Raises:
            FloatingPointError: `trainer.nonfinite=raise`, or too many such steps.
        """
        settings, checkpoints = self.config.trainer, self.output_dir / "checkpoints"
        before = path_of(checkpoints, step - 1)
        self.optimizer.zero_grad()
        self.checkpoints.wait()
        if not self.distributed.on_main(before.exists):
            self.checkpoints.save(step - 1, self._manifest(step - 1))
            self.checkpoints.wait()
        failed = FailedStep(
            step=step,
            rank=self.distributed.rank,
            denominator=denominator,
            dtype=self.dtype,
            micro_batches=micro_batches,
            config=to_dict(self.config),
            checkpoint=str(before),
        )
        places = keep(failed, losses, self.output_dir / "nonfinite", self.distributed)
        self.progress.nonfinite_steps += 1
        message = (
            f"step {step}: the loss or its gradient is not finite (gradient norm {grad_norm}), the step was not "
            f"applied. Run its rows again with `python -m trainer.replay FILE`: {places}"
        )
        if settings.nonfinite == "raise":
            raise FloatingPointError(f"{message}. Then lower optim.lr, check these rows, or set trainer.nonfinite=skip")
        if self.progress.nonfinite_steps > settings.max_nonfinite_steps:
            raise FloatingPointError(f"{message}. More than trainer.max_nonfinite_steps={settings.max_nonfinite_steps}")
        self.print_main(message)

    def _is_due(self, step: int, interval: int | None) -> bool:
        return step == self.steps or (interval is not None and step % interval == 0)

    def _resume(self, state: TrainingState) -> tuple[int, dict[Path, str]]:
        """Restore the checkpoint that `trainer.resume` names.

        Returns:
            Steps done, 0 without a checkpoint; and the broken checkpoints of the run, each with the reason.
        """
        directory = self.output_dir / "checkpoints"
        path, skipped = find_checkpoint(directory, self.config.trainer.resume, self.distributed)
        self.print_main(*(f"skipped {broken}: {reason}" for broken, reason in skipped.items()))
        if path is None:
            return 0, skipped
        self.distributed.on_main(lambda: self.identity.check(path))
        manifest = load(path, state)
        self.progress = Progress(manifest["skipped_steps"], manifest.get("nonfinite_steps", 0))
        if position := manifest.get("stream"):
            self.source.resume(position)
        self.print_main(f"resumed from {path}: {manifest['step']} of {self.steps} steps are done")
        if manifest["step"] >= self.steps:
            self.print_main("no step is left; the model is exported again")
        return manifest["step"], skipped

    def _manifest(self, step: int) -> dict[str, Any]:
        position = self.source.position(step) or None
        return self.identity.manifest(ranks=self.distributed.size, **asdict(self.progress), stream=position)

    def print_main(self, *lines: str) -> None:
        """Print lines on rank 0."""
        if self.distributed.is_main:
            for line in lines:
                print(printable(line), flush=True)

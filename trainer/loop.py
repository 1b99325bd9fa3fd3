"""Optimizer steps from a source of batches: resumable, checked, logged; independent of rows and objective."""

import math
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import closing, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from data import Batch, BatchSource
from data.terminal import announced, printable
from diffllm import DiffLLM
from diffllm.compilation import refusing_failures
from diffllm.diffusion.loss import LossOutput
from trainer.build import build_optimizer, compute_dtype, lr_of, set_lr
from trainer.checkpoint import Checkpoints, TrainingState, find_fault, load
from trainer.config import Config, to_dict
from trainer.distributed import Distributed, locked
from trainer.ending import Deadline
from trainer.hub import check_push, push
from trainer.identity import Identity, find_checkpoint
from trainer.interruption import NAMES, Interruption
from trainer.manifest import path_of
from trainer.memory import naming_remedies
from trainer.metrics import MetricsLog
from trainer.nonfinite import FailedStep, keep
from trainer.progress import Clock, Progress
from trainer.speed import Speed
from trainer.summary import conclude
from trainer.trackers import ValSample

# Entries of a run's directory that must not be links; `checkpoints` may be one, to another disk.
WRITTEN = (
    *("metrics.jsonl", "hf", "hf_adapter", "data_report.json", "data_report.txt"),
    *("settings.yaml", "tensorboard", "tracker_id", "nonfinite"),
)


class TrainingLoop(ABC):
    """Trains a sharded model. A subclass gives the loss of a batch, validation and export.

    Args:
        model: sharded by `trainer.parallel.shard`.
        source: yields the batches of each step.
        steps: number of steps of the whole run.
        validation_rows: digest of the rows that validation is measured on, None without any.
    """

    def __init__(
        self,
        config: Config,
        distributed: Distributed,
        model: DiffLLM,
        source: BatchSource,
        steps: int,
        validation_rows: str | None = None,
    ):
        self.config, self.distributed, self.model = config, distributed, model
        self.source, self.steps = source, steps
        self.output_dir = Path(config.trainer.output_dir)
        self.dtype = compute_dtype(config, distributed.device)
        self.identity = Identity.of(config, source, model.vocab_size)
        self.optimizer = build_optimizer(model, config.optim)
        self.speed = Speed(model, distributed, self.dtype, config.trainer.peak_tflops)
        self.validation_rows = validation_rows
        self.progress, self.clock = Progress(rows=validation_rows), Clock()

    @abstractmethod
    def prepare(self, step: int, micro_batches: list[Batch]) -> list[Batch]:
        """Add whatever depends on the step to its micro-batches."""

    @abstractmethod
    def denominator(self, batch: Batch) -> Tensor:
        """The batch's part of the step's loss denominator; parts add up."""

    @abstractmethod
    def tokens_in_loss(self, batch: Batch) -> int:
        """Number of tokens in the loss of a micro-batch."""

    @abstractmethod
    def computed(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Count the positions that the decoder computes for a micro-batch, and the pairs in its attention."""

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
    def describe(self, done: int) -> list[str]:
        """Lines that say what the run is, before its first step after `done` steps of earlier runs."""

    @abstractmethod
    def report(self, done: int) -> str:
        """Write the data report before training starts, after `done` steps of earlier runs. Return its text."""

    @abstractmethod
    def report_read(self, done: int) -> None:
        """Write the data report of the rows that this run read after `done` steps, when it ends."""

    def fit(self) -> None:
        """Train to the last step, from the checkpoint that `trainer.resume` names, then export the model.

        A signal of `trainer.interruption` ends the run after the current step, with a checkpoint. The run ends early
        if validation does not improve for `trainer.patience`.

        Raises:
            SystemExit: SIGTERM or SIGINT stopped the run.
        """
        settings = self.config.trainer
        if settings.push_to_hub is not None:
            self.distributed.on_main(lambda: check_push(settings.push_to_hub))
        with locked(self.output_dir, self.distributed, *WRITTEN), Interruption() as self.interruption:
            state = TrainingState(self.model, self.optimizer, self.distributed)
            done, broken = self._resume(state)
            plan = self.describe(done)
            self.print_main(*plan)
            report = self.report(done)
            directory = self.output_dir / "checkpoints"
            self.checkpoints = Checkpoints(
                directory, state, settings.keep_checkpoints, settings.async_checkpoints, broken, settings.keep_best
            )
            try:
                log = MetricsLog(settings, to_dict(self.config), self.progress, done, self.steps, self.distributed)
                log.log_text("run/plan", "\n".join(plan))
                log.log_text("run/data_report", report)
                batches = self.source.loader(range(done, self.steps))
                with log, closing(batches), Deadline.on_error():
                    finished = self._train(batches, done, log)
                    self.checkpoints.wait()
            finally:
                self.checkpoints.close()
                self.report_read(done)
            if finished:
                self._finish(state)

    def _train(self, batches: Iterator[list[Batch]], done: int, log: MetricsLog) -> bool:
        """Take the steps after the first `done`. Return False if SIGUSR1 stopped the run before the last step.

        Raises:
            SystemExit: SIGTERM or SIGINT stopped the run.
        """
        settings = self.config.trainer
        for step in range(done + 1, self.steps + 1):
            if self._out_of_patience():
                break
            with (
                refusing_failures("model.compile", self.config.model.compile),
                naming_remedies(self.config, self.source.layout),
            ):
                with announced("the first step") if step == done + 1 else nullcontext():
                    metrics, counts = self._next_step(step, batches)
                validated = {}
                if self._is_due(step, settings.val_check_interval):
                    with log.paused():
                        validated = self.validate()
                        log.log_samples(step, self.sample())
            improved = self.progress.judge(step, validated)
            log.log(step, metrics | validated)
            if estimate := self.clock.estimate(self.steps - step):
                log.print(estimate)

            last = step == self.steps or self._out_of_patience()
            signals = [name for name in NAMES if counts[name] and not last]
            due = last or bool(signals) or self._is_due(step, settings.save_checkpoint_steps)
            if last and self.progress.diverged:
                self.checkpoints.keep += 1  # it replaces no earlier checkpoint
            if settings.save_checkpoints and (due or (improved and settings.keep_best)):
                self.checkpoints.save(step, self._manifest(step))
            if signals:
                self._stop(step, signals[0])
                return False
        return True

    def _next_step(self, step: int, batches: Iterator[list[Batch]]) -> tuple[dict[str, float], dict[str, float]]:
        """Take the next step. Return its metrics and counts."""
        started = time.perf_counter()
        micro_batches = next(batches)
        waited = time.perf_counter() - started
        counts = self._count(micro_batches)
        if counts["failed_saves"]:
            self.checkpoints.wait()
        metrics = self.train_step(step, micro_batches, counts)
        seconds = time.perf_counter() - started
        self.clock.add(seconds, counts["row_tokens"])
        return metrics | self.speed.metrics(counts, seconds, waited), counts

    def _stop(self, step: int, name: str) -> None:
        """End the run after a signal.

        Raises:
            SystemExit: the signal was not SIGUSR1.
        """
        self.checkpoints.wait()
        saves = self.config.trainer.save_checkpoints
        advice = "run the same command to resume" if saves else "trainer.save_checkpoints=false: its steps are lost"
        self.print_main(f"stopped by {name} after {step} of {self.steps} steps; {advice}")
        if name != "SIGUSR1":
            raise SystemExit(128 + signal.Signals[name])

    def _out_of_patience(self) -> bool:
        patience = self.config.trainer.patience
        return patience is not None and self.progress.not_better >= patience

    def _finish(self, state: TrainingState) -> None:
        """Export the model and sum the run up. Collective.

        Raises:
            FloatingPointError: the last validation is not finite, and no better checkpoint was kept.
        """
        settings = self.config.trainer
        best = self.checkpoints.best_of(self.progress.best_step) if settings.save_model else None
        if self.progress.diverged and best is None:
            raise FloatingPointError(
                f"{self.progress.metric} is not finite at the end: the run has diverged, no model is written. Lower "
                "optim.lr, and train anew"
            )
        if settings.save_model:
            if best is not None and self.progress.not_better:  # else the last step is the best
                load(best, state)
            with announced("writing the model"):
                self.export(self.output_dir / "hf")
            self.distributed.wait()  # an upload may take longer than the timeout of a collective
            if settings.push_to_hub is not None and self.distributed.is_main:
                self.print_main(push(self.output_dir / "hf", settings.push_to_hub))
        self.print_main(*conclude(self.config, self.progress, self.clock, best))

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
        if counts["in_loss"]:
            for batch in micro_batches:
                last = batch is micro_batches[-1]
                self.model.set_requires_gradient_sync(last or self.config.trainer.reduce_each_micro_batch)
                output = self.compute_loss(batch, counts["denominator"])
                output.loss.backward()
                losses.append(output.loss.detach())
                sums.append(self.measure(batch, output))
            metrics, grad_norm = self._reduce(losses, sums, self._clip())
        if not counts["in_loss"]:
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
            "data/masked_share": counts["in_loss"] / max(counts["maskable"], 1),
            "data/padding_share": 1 - counts["row_tokens"] / counts["positions"],
        }

    def _count(self, micro_batches: list[Batch]) -> dict[str, float]:
        """Token counts and loss denominator, summed over ranks before the forward.

        Received signals and failed saves are counted too, so that all ranks react to them in the same step.
        """
        computed, pairs = zip(*map(self.computed, micro_batches), strict=True)
        counts = {
            "denominator": sum(self.denominator(batch) for batch in micro_batches),
            "in_loss": sum(self.tokens_in_loss(batch) for batch in micro_batches),
            "maskable": sum(batch["maskable"].sum() for batch in micro_batches),
            "computed": sum(computed),
            "pairs": sum(pairs),
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
        if settings.save_checkpoints and not self.distributed.on_main(before.exists):
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
        command = f"python -m trainer.replay FILE{'' if settings.save_checkpoints else ' CHECKPOINT'}"
        message = (
            f"step {step}: the loss or its gradient is not finite (gradient norm {grad_norm}), the step was not "
            f"applied. Run its rows again with `{command}`: {places}"
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
            if (self.output_dir / "metrics.jsonl").exists():
                self.print_main(f"{self.output_dir} has metrics of an earlier run, but no checkpoint: starting anew")
            return 0, skipped
        self.distributed.on_main(lambda: self.identity.check(path))
        manifest = load(path, state)
        self.progress = Progress.of(manifest)
        self._check_best(directory)
        if position := manifest.get("stream"):
            self.source.resume(position)
        self.print_main(f"resumed from {path}: {manifest['step']} of {self.steps} steps are done")
        if manifest["step"] >= self.steps:
            self.print_main("no step is left; the model is exported again")
        elif (planned := manifest.get("steps", self.steps)) != self.steps:
            self.print_main(self._other_length(manifest["step"], planned))
        return manifest["step"], skipped

    def _check_best(self, directory: Path) -> None:
        """Forget the best validation so far if it had other rows, or its checkpoint is not whole. Collective."""
        best, fault = path_of(directory, self.progress.best_step), None
        if self.progress.rows != self.validation_rows:
            fault = "the validation rows are others now"
        elif self.config.trainer.keep_best and self.progress.best_step:
            fault = find_fault(best, self.distributed)
        if fault is None:
            return
        if self.progress.best_step:
            self.print_main(f"step {self.progress.best_step} was the best, but no longer counts: {best}: {fault}")
        self.progress.forget_best(self.validation_rows)

    def _other_length(self, done: int, planned: int) -> str:
        """A line on the learning rate of a resumed run that was planned for another number of steps."""
        optim = self.config.optim
        before, now = (lr_of(optim, steps, done) for steps in (planned, self.steps))
        return (
            f"planned for {planned:,} steps, now {self.steps:,}: optim.lr_schedule={optim.lr_schedule} is that of the "
            f"new length, so the next step has lr {now:.3g} where {before:.3g} was planned"
        )

    def _manifest(self, step: int) -> dict[str, Any]:
        return self.identity.manifest(
            ranks=self.distributed.size,
            steps=self.steps,
            **asdict(self.progress),
            stream=self.source.position(step) or None,
        )

    def print_main(self, *lines: str) -> None:
        """Print lines on rank 0."""
        if self.distributed.is_main:
            for line in lines:
                print(printable(line), flush=True)

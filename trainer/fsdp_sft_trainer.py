"""The trainer: supervised fine-tuning of a diffusion language model on FSDP2."""

import math
import signal
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor

from data.loader import Batch
from data.report import save
from data.storage import whole_directory
from data.stream import Position
from data.terminal import printable
from diffllm.annealing import AttentionAnnealing
from diffllm.lora import add_lora, merge_lora
from diffllm.loss import focal_of, liger
from diffllm.modeling_diffllm import LossOutput
from diffllm.weights import loss_denominator
from trainer.build import (
    build_batches,
    build_lr_schedule,
    build_model,
    build_optimizer,
    compute_dtype,
    frozen_dtype,
    set_lr,
)
from trainer.checkpoint import Checkpoints, TrainingState, load
from trainer.config import Config, batch_layout, to_dict, total_steps
from trainer.distributed import Distributed, locked
from trainer.ending import Deadline
from trainer.forward import forward
from trainer.identity import Identity, find_checkpoint
from trainer.interruption import NAMES, Interruption
from trainer.manifest import path_of
from trainer.memory import check_fits
from trainer.metrics import MetricsLog
from trainer.nonfinite import FailedStep, keep
from trainer.parallel import shard
from trainer.speed import Speed
from trainer.tally import Tally
from trainer.validation import ValSamples, validate

# What a run writes into its directory, beside checkpoints, which may be a link to another disk.
WRITTEN = ("metrics.jsonl", "hf", "data_report.json", "data_report.png", "wandb_id", "nonfinite")


class FSDPSFTTrainer:
    """Trains the model that a configuration describes, over all ranks of a world.

    Raises:
        ValueError: rows, tokenizer, model or batch arithmetic that cannot work; the message says what to change.
    """

    def __init__(self, config: Config, distributed: Distributed):
        self.config, self.distributed = config, distributed
        self.output_dir = Path(config.trainer.output_dir)
        layout = batch_layout(config.data, distributed.rank, distributed.size)

        dtype = frozen_dtype(config, distributed.device)
        self.model, self.tokenizer = build_model(config.model, config.seed, dtype, empty=True)
        if config.model.lora_rank:
            add_lora(self.model, config.model, config.seed)
        if config.model.loss_kernel == "liger":
            self.model.masked_loss = liger()
        annealing_steps = config.diffusion.attention_annealing_steps
        if annealing_steps and self.model.windowed:
            raise ValueError(
                f"diffusion.attention_annealing_steps={annealing_steps}: some layers of this model attend within a "
                "window, which would be lifted and come back; set it to 0"
            )
        context = self.model.lm.config.max_position_embeddings
        if config.data.max_length > context:
            raise ValueError(f"data.max_length={config.data.max_length}: the model's context is {context} tokens")
        check_fits(self.model, config, distributed)
        self.train_batches, self.val_batches, self.rows = build_batches(
            config, self.tokenizer, self.model.mask_token_id, layout
        )
        self.print_main(*(report.text() for _, report in self.rows.values()))
        self.annealing = AttentionAnnealing(annealing_steps, config.data.max_length, config.seed)

        self.identity = Identity.of(config, self.train_batches, self.model.lm.config.vocab_size)
        self.steps = total_steps(config.trainer, self.train_batches.steps_per_epoch)
        if annealing_steps > self.steps:
            raise ValueError(
                f"diffusion.attention_annealing_steps={annealing_steps}: more than the {self.steps} steps of the run, "
                "so that none would see what sampling does; set fewer"
            )
        self.speed = Speed(
            self.model, distributed, compute_dtype(config, distributed.device), config.trainer.peak_tflops
        )
        self.val_samples = ValSamples(self.model, self.tokenizer, self.rows.get("validation"), config, distributed)
        shard(self.model, distributed, config)
        self.optimizer = build_optimizer(self.model.parameters(), config.optim)
        self.lr_at = build_lr_schedule(config.optim, self.optimizer, self.steps)
        self.skipped_steps = self.nonfinite_steps = 0

    def fit(self) -> None:
        """Train to the last step, from the checkpoint that `trainer.resume` names; then export the model.

        Asked to stop by a signal, it saves a checkpoint where the step ends and leaves.

        Raises:
            SystemExit: SIGTERM or SIGINT stopped the run.
        """
        settings = self.config.trainer
        with locked(self.output_dir, self.distributed, *WRITTEN), Interruption() as self.interruption:
            state = TrainingState(self.model, self.optimizer, self.distributed)
            done, broken = self._resume(state)
            if not done and self.distributed.is_main:
                save([report for _, report in self.rows.values()], self.output_dir)
            directory = self.output_dir / "checkpoints"
            self.checkpoints = Checkpoints(
                directory, state, settings.keep_checkpoints, settings.async_checkpoints, broken
            )
            try:
                log = MetricsLog(settings, to_dict(self.config), done, self.steps, self.distributed)
                batches = self.train_batches.loader(range(done, self.steps))
                with log, closing(batches), Deadline.on_error():
                    finished = self._train(batches, done, log)
                    self.checkpoints.wait()
            finally:
                self.checkpoints.close()
                if self.config.data.streaming:
                    self._account(done)
            if finished:
                self.export(self.output_dir / "hf")
                self.print_main(f"model: {self.output_dir / 'hf'}, metrics: {self.output_dir / 'metrics.jsonl'}")

    def _train(self, batches: Iterator[list[Batch]], done: int, log: MetricsLog) -> bool:
        """Steps after the first `done`, until the last or a signal; whether it was the last."""
        settings = self.config.trainer
        for step in range(done + 1, self.steps + 1):
            started = time.perf_counter()
            micro_batches = next(batches)
            waited = time.perf_counter() - started
            counts = self._count(micro_batches)
            if counts["failed_saves"]:
                self.checkpoints.wait()
            metrics = self.train_step(step, micro_batches, counts)
            metrics |= self.speed.metrics(counts, time.perf_counter() - started, waited)
            if self._due(step, settings.val_check_interval) and self.val_batches is not None:
                metrics |= validate(self.model, self.val_batches, self.distributed)
                log.log_samples(step, self.val_samples())
            log.log(step, metrics)
            asked = step < self.steps and [name for name in NAMES if counts[name]]
            if asked or self._due(step, settings.save_checkpoint_steps):
                self.checkpoints.save(step, self._manifest(self.train_batches.position))
            if asked:
                self.checkpoints.wait()
                self.print_main(
                    f"stopped by {asked[0]} after {step} of {self.steps} steps; the same command goes on from here"
                )
                if asked[0] != "SIGUSR1":
                    raise SystemExit(128 + signal.Signals[asked[0]])
                return False
        return True

    def train_step(self, step: int, micro_batches: list[Batch], counts: dict[str, float]) -> dict[str, float]:
        """One optimizer step: a function of the parameters and the rows, whatever the layout.

        Args:
            counts: what `_count` makes of the micro-batches.

        Returns:
            Metrics of the step over all ranks.

        Raises:
            FloatingPointError: the loss or the gradient is not finite; the parameters are left as they were.
        """
        lr = self.lr_at(step - 1)
        set_lr(self.optimizer, lr)
        tally, losses, grad_norm = Tally(self.distributed), [], 0.0
        norm = counts["norm"]
        micro_batches = self.annealing(micro_batches, step)
        if counts["masked"]:
            for batch in micro_batches:
                last = batch is micro_batches[-1]
                self.model.set_requires_gradient_sync(last or self.config.trainer.reduce_each_micro_batch)
                restored = self.compute_loss(batch, norm)
                restored.loss.backward()
                losses.append(restored.loss.detach())
                tally.add(batch, restored, losses[-1])
            grad_norm = self._clip()
        metrics = tally.metrics("train")
        if not counts["masked"]:
            self.skipped_steps += 1
        elif math.isfinite(metrics["train/loss"]) and math.isfinite(grad_norm):
            self.checkpoints.wait_for_copy()
            self.optimizer.step()
        else:
            self._refuse(step, micro_batches, losses, norm, grad_norm)
        self.optimizer.zero_grad()
        return {
            **metrics,
            "train/grad_norm": grad_norm,
            "train/lr": lr,
            "train/epoch": self.train_batches.epoch(step),
            "train/skipped_steps": self.skipped_steps,
            "train/nonfinite_steps": self.nonfinite_steps,
            "data/masked_share": counts["masked"] / max(counts["maskable"], 1),
            "data/padding_share": 1 - counts["row_tokens"] / counts["positions"],
        }

    def _count(self, micro_batches: list[Batch]) -> dict[str, float]:
        """What a step holds over all ranks and micro-batches, known before any forward: denominators among them.

        Signals that came and saves that failed are counted too, so that all ranks learn of them in the same step.
        """
        lengths = torch.cat([batch["attention_mask"].sum(-1) for batch in micro_batches])
        counts = {
            "norm": sum(loss_denominator(batch, self.config.diffusion.loss_norm) for batch in micro_batches),
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

    def compute_loss(self, batch: Batch, norm: float) -> LossOutput:
        """A micro-batch's part of the loss, Σ weight·nll / norm, and what the model makes of the masked tokens.

        Args:
            batch: x_t [B, L], input_ids (x_0) [B, L], masked [B, L], weights [B, L], attention_mask, position_ids.
            norm: the denominator of the whole optimizer step.
        """
        restored = forward(self.model, batch, self.distributed, focal_of(self.config.diffusion))
        return restored._replace(loss=restored.loss / norm)

    def _clip(self) -> float:
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optim.clip_grad)
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def _refuse(
        self, step: int, micro_batches: list[Batch], losses: list[Tensor], norm: float, grad_norm: float
    ) -> None:
        """Leave a step out whose loss or gradient is not finite, and keep what it takes to look into it. Collective.

        Raises:
            FloatingPointError: `trainer.nonfinite=raise`, or too many such steps.
        """
        settings, checkpoints = self.config.trainer, self.output_dir / "checkpoints"
        before = path_of(checkpoints, step - 1)
        self.optimizer.zero_grad()
        self.checkpoints.wait()
        if not self.distributed.on_main(before.exists):
            self.checkpoints.save(step - 1, self._manifest(self.train_batches.before))
            self.checkpoints.wait()
        failed = FailedStep(
            step=step,
            rank=self.distributed.rank,
            norm=norm,
            dtype=compute_dtype(self.config, self.distributed.device),
            micro_batches=micro_batches,
            config=to_dict(self.config),
            checkpoint=str(before),
        )
        places = keep(failed, losses, self.output_dir / "nonfinite", self.distributed)
        self.nonfinite_steps += 1
        message = (
            f"step {step}: the loss or its gradient is not finite (gradient norm {grad_norm}), the step was not "
            f"applied. Run its rows again with `python -m trainer.replay FILE`: {places}"
        )
        if settings.nonfinite == "raise":
            raise FloatingPointError(f"{message}. Then lower optim.lr, check these rows, or set trainer.nonfinite=skip")
        if self.nonfinite_steps > settings.max_nonfinite_steps:
            raise FloatingPointError(f"{message}. More than trainer.max_nonfinite_steps={settings.max_nonfinite_steps}")
        self.print_main(message)

    def _due(self, step: int, interval: int | None) -> bool:
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
        self.skipped_steps, self.nonfinite_steps = manifest["skipped_steps"], manifest.get("nonfinite_steps", 0)
        if self.config.data.streaming:
            self.train_batches.position = Position(**manifest["stream"])
        self.print_main(f"resumed from {path}: {manifest['step']} of {self.steps} steps are done")
        if manifest["step"] >= self.steps:
            self.print_main("no step is left; the model is exported again")
        return manifest["step"], skipped

    def _manifest(self, position: Position | None) -> dict[str, Any]:
        return self.identity.manifest(
            ranks=self.distributed.size,
            skipped_steps=self.skipped_steps,
            nonfinite_steps=self.nonfinite_steps,
            stream=position and position.to_dict(),
        )

    def export(self, directory: Path) -> None:
        """Write the model and its tokenizer in the published format. Collective."""
        full = get_model_state_dict(self.model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if self.distributed.is_main:
            with whole_directory(directory, replace=True) as unfinished:
                self.model.save_pretrained(unfinished, merge_lora(full, self.config.model), self.tokenizer)

    def _account(self, done: int) -> None:
        """What became of the rows that a stream read after step `done`: known only now."""
        report = self.train_batches.report
        if not report.read:
            return
        self.print_main(report.text())
        if self.distributed.is_main:
            save([report, *(report for _, report in self.rows.values())], self.output_dir, extend=done > 0)

    def print_main(self, *lines: str) -> None:
        if self.distributed.is_main:
            for line in lines:
                print(printable(line), flush=True)

"""The trainer: supervised fine-tuning of a diffusion language model on FSDP2."""

import math
import time
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor

from data import TokenRows, TrainBatches, ValBatches, tokenize
from data.loader import Batch
from diffllm import DiffusionConfig, ForwardProcess
from diffllm.loss import weighted_sum
from trainer import checkpoint
from trainer.build import build_lr_schedule, build_model, build_optimizer, build_rows, shard
from trainer.checkpoint import TrainingState
from trainer.config import Config, differences, share_of, to_dict, total_steps
from trainer.forward import forward
from trainer.metrics import MetricsLog
from trainer.validation import validate
from trainer.world import World

VAL_SEED = 0


class FSDPSFTTrainer:
    """Trains the model that a configuration describes, over all ranks of a world.

    Raises:
        ValueError: rows, tokenizer, model or batch arithmetic that cannot work; the message says what to change.
    """

    def __init__(self, config: Config, world: World):
        self.config, self.world = config, world
        self.output_dir = Path(config.trainer.output_dir)
        share = share_of(config.data, world.rank, world.size)

        self.model, self.tokenizer = build_model(config.model, config.seed)
        context = self.model.lm.config.max_position_embeddings
        if config.data.max_length > context:
            raise ValueError(f"data.max_length={config.data.max_length}: the model's context is {context} tokens")
        train, val = self._tokenize()
        eos, mask = self.tokenizer.eos_token_id, self.model.mask_token_id
        noise = ForwardProcess(config.diffusion, mask, config.seed)
        self.train_batches = TrainBatches(train, config.data, share, eos, noise, config.seed)
        elbo = ForwardProcess(DiffusionConfig(eps=config.diffusion.eps), mask, VAL_SEED)
        self.val_batches = ValBatches(val, share, eos, elbo) if val else None

        self.steps = total_steps(config.trainer, self.train_batches.steps_per_epoch)
        shard(self.model, world, config)
        self.optimizer = build_optimizer(self.model, config.optim)
        self.lr_at = build_lr_schedule(config.optim, self.optimizer, self.steps)
        self.skipped_steps = 0

    def _tokenize(self) -> list[TokenRows | None]:
        """Training and validation rows; nothing is dropped or cut without saying so."""
        data = self.config.data
        tokenized = []
        for name, rows in zip(("training", "validation"), build_rows(data), strict=True):
            tokens = tokenize(rows, self.tokenizer, data.max_length, data.truncation) if rows else None
            if tokens is not None:
                self._say(f"{len(tokens)} {name} rows; {tokens.dropped} more dropped and {tokens.cut} cut as too long")
            tokenized.append(tokens)
        return tokenized

    def fit(self) -> None:
        """Train to the last step, from the checkpoint that `trainer.resume` names; then export the model."""
        settings = self.config.trainer
        state = TrainingState(self.model, self.optimizer, self.world)
        done = self._resume(state)
        with MetricsLog(settings, to_dict(self.config), done, self.steps, enabled=self.world.is_main) as log:
            loader = self.train_batches.loader(range(done, self.steps))
            for step, micro_batches in enumerate(loader, start=done + 1):
                metrics = self.train_step(step, micro_batches)
                if self._due(step, settings.val_check_interval) and self.val_batches is not None:
                    metrics |= validate(self.model, self.val_batches, self.world)
                log.log(step, metrics)
                if self._due(step, settings.save_checkpoint_steps):
                    self._save(state, step)
        self.export(self.output_dir / "hf")
        self._say(f"model: {self.output_dir / 'hf'}, metrics: {self.output_dir / 'metrics.jsonl'}")

    def train_step(self, step: int, micro_batches: list[Batch]) -> dict[str, float]:
        """One optimizer step: a function of the parameters and the rows, whatever the layout.

        Returns:
            Metrics of the step over all ranks.

        Raises:
            FloatingPointError: the gradient is not finite; the parameters are left as they were.
        """
        started = time.perf_counter()
        counts = self._count(micro_batches)
        norm = counts[self.config.diffusion.loss_norm]
        lr = self.lr_at(step - 1)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        loss = correct = grad_norm = 0.0
        if counts["masked"] == 0:
            self.skipped_steps += 1
        else:
            for batch in micro_batches:
                self.model.set_requires_gradient_sync(batch is micro_batches[-1])
                batch_loss, batch_correct = self.compute_loss(batch, norm)
                batch_loss.backward()
                loss, correct = loss + batch_loss.detach(), correct + batch_correct
            grad_norm = self._clip(step)
            self.optimizer.step()
            self.optimizer.zero_grad()
            loss, correct = self.world.sum(loss, correct)
        return {
            "train/loss": loss,
            "train/masked_accuracy": correct / max(counts["masked"], 1),
            "train/grad_norm": grad_norm,
            "train/lr": lr,
            "train/epoch": step / self.train_batches.steps_per_epoch,
            "train/skipped_steps": self.skipped_steps,
            "data/masked_share": counts["masked"] / max(counts["maskable"], 1),
            "data/padding_share": 1 - counts["attended"] / counts["positions"],
            "perf/tokens_per_second": counts["attended"] / (time.perf_counter() - started),
        }

    def _count(self, micro_batches: list[Batch]) -> dict[str, float]:
        """What a step holds over all ranks and micro-batches, known before any forward: denominators among them."""
        counts = {
            "masked": sum(batch["masked"].sum() for batch in micro_batches),
            "maskable": sum(batch["maskable"].sum() for batch in micro_batches),
            "sequence": sum(len(batch["input_ids"]) for batch in micro_batches),
            "attended": sum(batch["attention_mask"].sum() for batch in micro_batches),
            "positions": sum(batch["input_ids"].numel() for batch in micro_batches),
        }
        return dict(zip(counts, self.world.sum(*counts.values()), strict=True))

    def compute_loss(self, batch: Batch, norm: float) -> tuple[Tensor, Tensor]:
        """A micro-batch's part of the loss, Σ weight·nll / norm, and how many tokens it restores right.

        Args:
            batch: x_t [B, L], input_ids (x_0) [B, L], masked [B, L], weights [B, L], attention_mask, position_ids.
            norm: the denominator of the whole optimizer step.
        """
        restored = forward(self.model, batch, self.world)
        weights = batch["weights"][batch["masked"]].to(self.world.device)
        loss = weighted_sum(restored.nll, weights, self.config.diffusion) / norm
        return loss, restored.correct.sum()

    def _clip(self, step: int) -> float:
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optim.clip_grad)
        norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        if not math.isfinite(norm):
            raise FloatingPointError(f"step {step}: the gradient norm is {norm}; lower optim.lr or check the data")
        return norm

    def _due(self, step: int, interval: int | None) -> bool:
        return step == self.steps or (interval is not None and step % interval == 0)

    def _resume(self, state: TrainingState) -> int:
        """Steps already done, restored from the checkpoint that `trainer.resume` names; 0 if there is none."""
        path = self.world.on_main(self._find_checkpoint)
        if path is None:
            return 0
        manifest = checkpoint.load(path, state)
        self.skipped_steps = manifest["skipped_steps"]
        self._say(f"resumed from {path}: {manifest['step']} of {self.steps} steps are done")
        return manifest["step"]

    def _find_checkpoint(self) -> Path | None:
        directory, resume = self.output_dir / "checkpoints", self.config.trainer.resume
        newest, skipped = checkpoint.find_newest(directory)
        if resume == "auto":
            self._say(*(f"skipped {reason}" for reason in skipped))
            path = newest
        elif newest is not None and newest.resolve() != Path(resume).resolve():
            raise ValueError(
                f"trainer.resume={resume}, but {directory} holds the checkpoints of a run: "
                "give another trainer.experiment_name, or delete it"
            )
        elif resume == "never":
            path = None
        elif defect := checkpoint.find_defect(path := Path(resume)):
            raise ValueError(f"trainer.resume={resume}: {defect}")
        if path is not None:
            self._check_same_run(path)
        return path

    def _check_same_run(self, path: Path) -> None:
        manifest = checkpoint.read_manifest(path)
        batch_size = self.train_batches.share.global_batch_size
        found = differences(manifest["config"], self.config)
        if manifest["global_batch_size"] != batch_size:
            found.append(f"the global batch is {manifest['global_batch_size']} there and {batch_size} here")
        if found:
            raise ValueError(
                f"{path} belongs to a run with other settings: {'; '.join(found)}. "
                "Give the same ones to go on with it, or another trainer.experiment_name to start anew"
            )

    def _save(self, state: TrainingState, step: int) -> None:
        manifest = {
            "config": to_dict(self.config),
            "skipped_steps": self.skipped_steps,
            "global_batch_size": self.train_batches.share.global_batch_size,
            "ranks": self.world.size,
            "versions": {name: version(name) for name in ("diffllm", "torch", "transformers")},
        }
        checkpoint.save(self.output_dir / "checkpoints", step, state, manifest, self.config.trainer.keep_checkpoints)

    def export(self, directory: Path) -> None:
        """Write the model and its tokenizer in the published format. Collective."""
        full = get_model_state_dict(self.model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if self.world.is_main:
            with checkpoint.replacing(directory) as unfinished:
                self.model.save_pretrained(unfinished, full, self.tokenizer)

    def _say(self, *lines: str) -> None:
        if self.world.is_main:
            for line in lines:
                print(line, flush=True)

"""Supervised fine-tuning of a diffusion language model: the training loop with rows and an objective."""

from contextlib import closing
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from tqdm import tqdm

from data import Batch
from data.report import save
from data.storage import whole_directory, whole_file
from data.terminal import announced
from diffllm.annealing import AttentionAnnealing
from diffllm.diffusion import build_objective
from diffllm.diffusion.loss import LossOutput
from diffllm.lora import add_lora, base_name, merge_lora, write_adapter
from trainer.build import build_batches, build_model, build_trainable, export_dtype, frozen_dtype, recommendation
from trainer.config import Config, batch_layout, check_rows, total_steps
from trainer.console import shows_bars
from trainer.distributed import Distributed
from trainer.identity import find_checkpoint
from trainer.loop import TrainingLoop
from trainer.memory import check_memory
from trainer.parallel import shard
from trainer.preview import print_preview
from trainer.summary import describe
from trainer.trackers import ValSample
from trainer.validation import ValSamples, validate

VAL_SEED = 0
SHOWN_ROWS = 2
SHOWN_AFTER = 2  # seconds of a validation, before its progress is shown


class FSDPSFTTrainer(TrainingLoop):
    """Trains the model of a configuration on its rows, over all ranks.

    Raises:
        ValueError: rows, tokenizer, model or batch sizes do not fit together; the message says what to change.
    """

    def __init__(self, config: Config, distributed: Distributed):
        with announced("loading the model"):
            model, self.tokenizer = build_trainable(config, distributed.device)
        check_memory(model, config, distributed)
        self.objective = build_objective(config.diffusion, model.mask_token_id, config.seed)
        self.val_objective = self.objective.for_validation(VAL_SEED)
        layout = batch_layout(config.data, distributed.rank, distributed.size)
        with announced("reading and tokenizing the rows"):
            source, self.val_batches, self.rows = build_batches(
                config, self.tokenizer, layout, self.objective.corrupt, self.val_objective.corrupt
            )
        steps = total_steps(config.trainer, source)
        check_rows(config, steps, self.val_batches is not None)
        annealing_steps = config.diffusion.attention_annealing_steps
        self.annealing = AttentionAnnealing(annealing_steps, config.data.max_length, config.seed)
        self.val_samples = ValSamples(model, self.tokenizer, self.rows.get("validation"), config, distributed)
        with announced("reading the weights"):
            shard(model, distributed, config, passes=steps * layout.micro_batches)
        validation = self.rows.get("validation")
        digest = validation and validation.rows.fingerprint()
        super().__init__(config, distributed, model, source, steps, digest)
        self.print_main(*(report.text() for _, report in self.rows.values()))

    def fit(self) -> None:
        """Train, see `TrainingLoop.fit`; with `trainer.max_steps=0` show the run and its first rows instead."""
        if self.config.trainer.max_steps != 0:
            super().fit()
            return
        self.print_main(*self.describe(0))
        self._preview(Console())
        path, _ = find_checkpoint(self.output_dir / "checkpoints", self.config.trainer.resume, self.distributed)
        if path is not None:
            self.distributed.on_main(lambda: self.identity.check(path))
        self.print_main(f"trainer.max_steps=0: not trained; a run would begin {f'after {path}' if path else 'anew'}")

    def prepare(self, step: int, micro_batches: list[Batch]) -> list[Batch]:
        return self.annealing(micro_batches, step)

    def denominator(self, batch: Batch) -> Tensor:
        return self.objective.denominator(batch)

    def tokens_in_loss(self, batch: Batch) -> int:
        return len(self.objective.positions(batch)[0])

    def computed(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return self.objective.computed(batch)

    def compute_loss(self, batch: Batch, denominator: float) -> LossOutput:
        output = self.objective.loss(self.model, batch)
        return output._replace(loss=output.loss / denominator)

    def measure(self, batch: Batch, output: LossOutput) -> Tensor:
        return self.objective.measure(batch, output)

    def metrics(self, sums: list[float]) -> dict[str, float]:
        return self.objective.metrics(sums)

    def validate(self) -> dict[str, float]:
        if self.val_batches is None:
            return {}
        hidden = not shows_bars(self.config.trainer, self.distributed)
        batches = tqdm(self.val_batches, "validation", unit="batch", leave=False, delay=SHOWN_AFTER, disable=hidden)
        return validate(self.model, self.val_objective, batches, self.distributed)

    def sample(self) -> list[ValSample]:
        return self.val_samples()

    def export(self, directory: Path) -> None:
        """Write the model and its tokenizer in the published format, and its adapters beside it. Collective."""
        full = get_model_state_dict(self.model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if self.distributed.is_main:
            if self.config.model.quantize != "none":
                full = self._beside_whole_weights(full)
            dtype = export_dtype(self.config, self.model.source)
            merged = {name: weight.to(dtype) for name, weight in merge_lora(full, self.config.model).items()}
            with whole_directory(directory, replace=True) as unfinished:
                settings = {"sampling": recommendation(self.config), "causal": self.config.diffusion.causal}
                self.model.save_pretrained(unfinished, merged, self.tokenizer, **settings)
            if self.config.model.lora_rank:
                with whole_directory(directory.with_name(f"{directory.name}_adapter"), replace=True) as unfinished:
                    write_adapter(unfinished, full, self.config.model, self.model.block_length)

    def _beside_whole_weights(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Replace 4-bit weights by those of the source, which were quantized."""
        config = replace(self.config.model, quantize="none", attn_implementation="sdpa")
        model, _ = build_model(config, dtype=frozen_dtype(self.config, self.distributed.device))
        add_lora(model, config, self.config.seed)
        return model.state_dict() | {name: value for name, value in state_dict.items() if base_name(name) is None}

    def describe(self, done: int) -> list[str]:
        rows, validation = self.identity.training_rows, self.rows.get("validation")
        held_out = validation and validation.rows
        return describe(self.config, self.distributed, self.model, self.source, rows, held_out, self.steps, done)

    def report(self, done: int) -> str:
        reports = [report for _, report in self.rows.values()]
        text = "\n".join(report.text() for report in reports)
        if done or not self.distributed.is_main:
            return text
        save(reports, self.output_dir)
        if "training" in self.rows:  # reading a stream ahead would count rows that are not trained on
            with whole_file(self.output_dir / "data_report.txt") as file:
                file.write(f"{text}\n\n")
                self._preview(Console(file=file, width=120))
        return text

    def _preview(self, console: Console) -> None:
        """Print rows of this rank's first step on rank 0."""
        if self.distributed.is_main:
            training = self.rows.get("training")
            with closing(self.source.loader(range(1))) as batches:
                print_preview(console, next(batches), self.tokenizer, training and training.rows, SHOWN_ROWS)

    def report_read(self, done: int) -> None:
        report = self.source.report
        if report is None or not report.read:
            return
        self.print_main(report.text())
        if self.distributed.is_main:
            save([report, *(report for _, report in self.rows.values())], self.output_dir, extend=done > 0)

"""Supervised fine-tuning of a diffusion language model: the training loop with rows and an objective."""

from pathlib import Path

from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from data import Batch
from data.report import save
from data.storage import whole_directory
from diffllm.annealing import AttentionAnnealing
from diffllm.diffusion import build_objective
from diffllm.diffusion.loss import LossOutput
from diffllm.lora import merge_lora
from trainer.build import build_batches, build_trainable
from trainer.config import Config, batch_layout, total_steps
from trainer.distributed import Distributed
from trainer.loop import TrainingLoop
from trainer.memory import check_memory
from trainer.metrics import ValSample
from trainer.parallel import shard
from trainer.validation import ValSamples, validate

VAL_SEED = 0


class FSDPSFTTrainer(TrainingLoop):
    """Trains the model of a configuration on its rows, over all ranks.

    Raises:
        ValueError: rows, tokenizer, model or batch sizes do not fit together; the message says what to change.
    """

    def __init__(self, config: Config, distributed: Distributed):
        model, self.tokenizer = build_trainable(config, distributed.device)
        check_memory(model, config, distributed)
        self.objective = build_objective(config.diffusion, model.mask_token_id, config.seed)
        self.val_objective = self.objective.for_validation(VAL_SEED)
        layout = batch_layout(config.data, distributed.rank, distributed.size)
        source, self.val_batches, self.rows = build_batches(
            config,
            self.tokenizer,
            layout,
            self.objective.corrupt,
            self.val_objective.corrupt,
        )
        steps = total_steps(config.trainer, source)
        annealing_steps = config.diffusion.attention_annealing_steps
        if annealing_steps > steps:
            raise ValueError(
                f"diffusion.attention_annealing_steps={annealing_steps}: more than the {steps} steps of the run, so "
                "none would have the full attention of sampling; set fewer"
            )
        self.annealing = AttentionAnnealing(annealing_steps, config.data.max_length, config.seed)
        self.val_samples = ValSamples(model, self.tokenizer, self.rows.get("validation"), config, distributed)
        shard(model, distributed, config, passes=steps * layout.micro_batches)
        super().__init__(config, distributed, model, source, steps)
        self.print_main(*(report.text() for _, report in self.rows.values()))

    def prepare(self, step: int, micro_batches: list[Batch]) -> list[Batch]:
        return self.annealing(micro_batches, step)

    def denominator(self, batch: Batch) -> Tensor:
        return self.objective.denominator(batch)

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
        return validate(self.model, self.val_objective, self.val_batches, self.distributed)

    def sample(self) -> list[ValSample]:
        return self.val_samples()

    def export(self, directory: Path) -> None:
        """Write the model and its tokenizer in the published format. Collective."""
        full = get_model_state_dict(self.model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if self.distributed.is_main:
            with whole_directory(directory, replace=True) as unfinished:
                self.model.save_pretrained(unfinished, merge_lora(full, self.config.model), self.tokenizer)

    def report(self, done: int) -> None:
        if not done and self.distributed.is_main:
            save([report for _, report in self.rows.values()], self.output_dir)

    def report_read(self, done: int) -> None:
        report = self.source.report
        if report is None or not report.read:
            return
        self.print_main(report.text())
        if self.distributed.is_main:
            save([report, *(report for _, report in self.rows.values())], self.output_dir, extend=done > 0)

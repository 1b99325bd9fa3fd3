"""Settings of the optimizer, the trainer and the tree of all groups; batch arithmetic."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from data import BatchLayout, BatchSource, DataConfig
from data.config import TaskConfig
from data.settings import check_fields, setting
from diffllm import DiffusionConfig, ModelConfig
from diffllm.diffusion import ObjectiveConfig
from sampling import SamplingConfig

DEFAULT_MICRO_BATCH_SIZE = 8


@dataclass
class OptimConfig:
    """The optimizer and its lr schedule.

    Raises:
        ValueError: a value outside its range; the message names the field, the value and the rule.
    """

    # adamw | adamw_8bit, its moments in 8 bits (extra `torchao`) | muon, for the matrices of the layers, beside adamw
    name: str = setting("adamw", choices=("adamw", "adamw_8bit", "muon"))
    lr: float = setting(1e-5, above=0)  # the highest learning rate
    betas: list[float] = setting([0.9, 0.95], at_least=0, below=1)  # decay of AdamW's two moments
    weight_decay: float = setting(0.01, at_least=0)  # on matrices, not on norms and biases
    clip_grad: float = setting(1.0, above=0)  # largest global gradient norm
    # after the warm-up: cosine to 0 | linear to 0 | constant | wsd, constant and then linear to 0 over the last steps
    lr_schedule: str = setting("cosine", choices=("cosine", "linear", "constant", "wsd"))
    # share of the steps in which the learning rate rises
    warmup_steps_ratio: float = setting(0.1, at_least=0, at_most=1)
    # wsd: share of the steps in which it falls
    decay_steps_ratio: float = setting(0.2, at_least=0, at_most=1, used_with={"lr_schedule": ("wsd",)})

    def __post_init__(self) -> None:
        check_fields(self, "optim")
        if len(self.betas) != 2:
            raise ValueError(f"optim.betas={self.betas}: must be two numbers in [0, 1)")
        if self.lr_schedule == "wsd" and self.warmup_steps_ratio + self.decay_steps_ratio > 1:
            raise ValueError(
                f"optim.decay_steps_ratio={self.decay_steps_ratio}: with optim.warmup_steps_ratio="
                f"{self.warmup_steps_ratio} it must not exceed 1"
            )


@dataclass
class TrainerConfig:
    """Length, checkpoints, logging and sharding of a training run.

    Raises:
        ValueError: a value outside its range; the message names the field, the value and the rule.
    """

    project_name: str = "diffllm"  # of wandb and trackio
    experiment_name: str = "default"  # names the run and its directory
    # all files of the run
    output_dir: str = setting("outputs/${trainer.experiment_name}", path=True)
    total_epochs: int = setting(3, at_least=1)  # passes over the training rows
    # optimizer steps; overrides total_epochs. 0 loads the model, reads the rows, shows some of them and ends
    max_steps: int | None = setting(None, at_least=0)
    # steps between validations; null validates at the end only
    val_check_interval: int | None = setting(None, at_least=1)
    # answers to the first validation rows, sampled and printed at each validation
    val_samples: int = setting(0, at_least=0)
    # steps between checkpoints; null saves at the end only
    save_checkpoint_steps: int | None = setting(None, at_least=1)
    keep_checkpoints: int = setting(2, at_least=1)  # older ones are deleted
    save_checkpoints: bool = True  # false: a run that stops cannot resume
    # keep the checkpoint of the lowest first validation metric, such as val/elbo, and export it at the end
    keep_best: bool = False
    # validations in a row without a new lowest value of that metric, after which the run ends; null: none
    patience: int | None = setting(None, at_least=1)
    save_model: bool = True  # export the trained model to hf/
    push_to_hub: str | None = None  # OWNER/NAME: upload hf/ to a private repository
    # weights of hf/: bf16 | f32 | auto: f32 from scratch or from float32 weights, else bf16
    export_dtype: str = setting("auto", choices=("auto", "bf16", "f32"))
    # auto: newest whole checkpoint of output_dir, if any | never | the path of a checkpoint
    resume: str = setting("auto", path=True)
    # console | wandb | tensorboard (extra `tensorboard`) | trackio (extra `trackio`); metrics.jsonl is always written
    logger: list[str] = setting(["console"], choices=("console", "wandb", "tensorboard", "trackio"))
    progress: bool = True  # show progress bars on a terminal; false, or in a log: plain lines
    async_checkpoints: bool = True  # write a copy in the host's memory while training continues
    # a loss or gradient that is not finite: raise | skip the step
    nonfinite: str = setting("raise", choices=("raise", "skip"))
    # more skipped ones than this end the run
    max_nonfinite_steps: int = setting(10, at_least=0, used_with={"nonfinite": ("skip",)})
    # number of model copies, each sharded over ranks / replicate ranks (HSDP)
    replicate: int = setting(1, at_least=1)
    cpu_offload: bool = False  # keep parameters, gradients and optimizer in the host's memory
    # peak of one device, for perf/mfu; null takes the data sheet's, if one is known
    peak_tflops: float | None = setting(None, above=0)
    reshard_after_forward: bool = True  # free a layer's gathered weights after its forward; false is faster
    reduce_each_micro_batch: bool = True  # reduce-scatter after each micro-batch, not once a step; false is faster
    # bf16 parameters in the forward, float32 gradients and optimizer | fp32 | auto: by device
    precision: str = setting("auto", choices=("auto", "bf16", "fp32"), free_when_resuming=False)

    def __post_init__(self) -> None:
        check_fields(self, "trainer")
        if not self.output_dir.strip():
            raise ValueError("trainer.output_dir is empty: name the directory that a run writes to")
        if self.push_to_hub is not None and not self.save_model:
            raise ValueError(f"trainer.push_to_hub={self.push_to_hub} with trainer.save_model=false: choose one")
        if self.keep_best and not self.save_checkpoints:
            raise ValueError("trainer.keep_best=true with trainer.save_checkpoints=false: choose one")
        for name in ("patience", "keep_best"):
            if getattr(self, name) and self.val_check_interval is None:
                raise ValueError(
                    f"trainer.{name}={getattr(self, name)}: compares validations, give trainer.val_check_interval too"
                )


@dataclass
class Config:
    """The tree that train.py, sample.py and evaluate.py share.

    Settings that are free when a run resumes do not change a step's result, except that the lr schedule follows the
    length of the run.
    """

    model: ModelConfig = setting(ModelConfig)  # the checkpoint, or the shape of a model from scratch
    data: DataConfig = setting(DataConfig)  # the rows, and how they become batches
    diffusion: ObjectiveConfig = setting(DiffusionConfig)  # the objective, with its settings
    optim: OptimConfig = setting(OptimConfig)  # the optimizer and its lr schedule
    # length, validation, checkpoints, loggers and sharding of a run
    trainer: TrainerConfig = setting(TrainerConfig, free_when_resuming=True)
    # the reverse process; sampling=MODEL/TASK has the published settings of a model on a task
    sampling: SamplingConfig = setting(SamplingConfig, free_when_resuming=True)
    # the questions of evaluate.py; several: task=[equations,rows]
    task: TaskConfig = setting(TaskConfig, free_when_resuming=True)
    # keys weights from scratch, row order, cuts and noise; the sampler has sampling.seed
    seed: int = setting(0, at_least=0, below=2**63)
    # sample.py: answer | chat, on the terminal
    mode: str = setting("answer", choices=("answer", "chat"), free_when_resuming=True)
    prompt: str | None = setting(None, free_when_resuming=True)  # sample.py: one question
    # sample.py: text with slots to fill, such as <|mask:12|>, or <|mask:4-16|> for 4 to 16; with prompt, its answer
    template: str | None = setting(None, free_when_resuming=True)
    # sample.py: a .jsonl or .parquet file of rows with question or prompt
    input: str | None = setting(None, path=True, free_when_resuming=True)
    # sample.py: the .jsonl file for the input rows with their responses
    output: str | None = setting(None, path=True, free_when_resuming=True)
    # sample.py, with prompt or template: a new .jsonl file for the steps, which `python -m sampling.render` shows
    record: str | None = setting(None, path=True, free_when_resuming=True)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.data.streaming and self.trainer.max_steps is None:
            raise ValueError("data.streaming=true: the number of rows is unknown, give trainer.max_steps")
        if self.diffusion.attention_annealing_steps and "flash" in self.model.attn_implementation:
            raise ValueError(
                f"model.attn_implementation={self.model.attn_implementation} cannot hide single positions, as "
                "diffusion.attention_annealing_steps requires: use sdpa"
            )
        if self.diffusion.causal and self.trainer.val_samples:
            raise ValueError(
                f"trainer.val_samples={self.trainer.val_samples} with diffusion.objective={self.diffusion.objective}: "
                "answers are sampled by unmasking, which a causal model does not learn; set it to 0"
            )
        blocks, parts = self.diffusion.block_length, self.sampling.block_length
        if blocks is not None and parts is not None and blocks % parts:
            raise ValueError(
                f"sampling.block_length={parts}: must divide diffusion.block_length={blocks}; null fills whole blocks"
            )
        if self.optim.name == "adamw_8bit" and self.trainer.async_checkpoints:
            raise ValueError(
                "optim.name=adamw_8bit: torchao's moments cannot be copied for a background save; set "
                "trainer.async_checkpoints=false"
            )


def to_dict(config: Config) -> dict[str, Any]:
    """The resolved tree as plain values, the form that checkpoints and results keep."""
    return asdict(config)


def batch_layout(config: DataConfig, rank: int, ranks: int) -> BatchLayout:
    """This rank's part of the global batch. Batch settings that are null are derived from the others.

    Raises:
        ValueError: the numbers contradict each other; the message names all of them.
    """
    total, micro, accumulation = (
        config.train_batch_size,
        config.micro_batch_size_per_gpu,
        config.gradient_accumulation_steps,
    )
    numbers = (
        f"data.train_batch_size={total}, data.micro_batch_size_per_gpu={micro}, "
        f"data.gradient_accumulation_steps={accumulation}, ranks={ranks}"
    )
    if total is None:
        micro, accumulation = micro or DEFAULT_MICRO_BATCH_SIZE, accumulation or 1
        total = micro * accumulation * ranks
    elif micro is None:
        accumulation = accumulation or 1
        micro = total // (accumulation * ranks)
    elif accumulation is None:
        accumulation = total // (micro * ranks)
    if micro * accumulation * ranks != total:
        raise ValueError(
            f"{numbers}: train_batch_size must be micro_batch_size_per_gpu × gradient_accumulation_steps × ranks; "
            "change one, or leave one out to derive it"
        )
    return BatchLayout(rank=rank, ranks=ranks, micro_batch_size=micro, micro_batches=accumulation)


def total_steps(config: TrainerConfig, batches: BatchSource) -> int:
    """Optimizer steps of the whole run; with `max_steps=0`, of the run without it, 0 for a stream.

    A stream needs `max_steps`: the length of its epoch is unknown.
    """
    return config.max_steps or config.total_epochs * (batches.steps_per_epoch or 0)


def warmup_steps(config: OptimConfig, steps: int) -> int:
    """Steps of the warm-up."""
    return math.ceil(config.warmup_steps_ratio * steps)


def check_rows(config: Config, steps: int, validated: bool) -> None:
    """Refuse settings that need more rows than a run has.

    Args:
        steps: of the run, 0 if unknown.
        validated: the run has validation rows.

    Raises:
        ValueError: no step has the attention of sampling; or the best step is sought without validation.
    """
    name, settled = config.diffusion.settles
    if 0 < steps < settled:
        raise ValueError(
            f"diffusion.{name}={getattr(config.diffusion, name)}: attention changes over {settled} steps, and the run "
            f"has {steps}, so none would have the attention of sampling; set fewer"
        )
    if not validated and (config.trainer.keep_best or config.trainer.patience):
        raise ValueError(
            "trainer.keep_best and trainer.patience need validation rows: give data.val_files or data.val_split"
        )

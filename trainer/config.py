"""The whole configuration: groups, strictness and batch arithmetic."""

import difflib
import math
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from os.path import expanduser
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from data import BatchLayout, DataConfig
from data.config import TaskConfig
from diffllm import DiffusionConfig, ModelConfig
from diffllm.config import SHAPE_FIELDS
from sampling import SamplingConfig
from sampling.config import TEXTS, unescape

LR_SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}
PRECISIONS = ("auto", "bf16", "fp32")
LOGGERS = ("console", "wandb")
OPTIMIZERS = ("adamw", "adamw_8bit")
NONFINITE = ("raise", "skip")
MODES = ("answer", "chat")
DEFAULT_MICRO_BATCH_SIZE = 8
PATHS = (
    *("model.path", "model.chat_template"),
    *(f"data.{name}" for name in ("train_files", "val_files", "decontaminate_files", "cache_dir")),
    *("trainer.output_dir", "trainer.resume", "input", "output"),
)


@dataclass
class OptimConfig:
    """AdamW and its lr schedule.

    Raises:
        ValueError: a value outside its range; the message names the field, the value and the rule.
    """

    name: str = "adamw"  # adamw | adamw_8bit, its moments in 8 bits (extra `torchao`)
    lr: float = 1e-5  # the highest learning rate
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    weight_decay: float = 0.01  # on matrices, not on norms and biases
    clip_grad: float = 1.0  # largest global gradient norm
    lr_schedule: str = "cosine"  # after the warm-up: cosine to 0 | linear to 0 | constant
    warmup_steps_ratio: float = 0.1  # share of the steps in which the learning rate rises

    def __post_init__(self) -> None:
        if self.name not in OPTIMIZERS:
            raise ValueError(f"optim.name={self.name}: choose one of {', '.join(OPTIMIZERS)}")
        if self.lr <= 0:
            raise ValueError(f"optim.lr={self.lr}: must be positive")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optim.betas={self.betas}: must be two numbers in [0, 1)")
        if self.weight_decay < 0:
            raise ValueError(f"optim.weight_decay={self.weight_decay}: must not be negative")
        if self.clip_grad <= 0:
            raise ValueError(f"optim.clip_grad={self.clip_grad}: must be positive")
        if self.lr_schedule not in LR_SCHEDULES:
            raise ValueError(f"optim.lr_schedule={self.lr_schedule}: choose one of {', '.join(LR_SCHEDULES)}")
        if not 0 <= self.warmup_steps_ratio <= 1:
            raise ValueError(f"optim.warmup_steps_ratio={self.warmup_steps_ratio}: must be in [0, 1]")


@dataclass
class TrainerConfig:
    """The loop: its length, what it saves and where it reports.

    Raises:
        ValueError: a value outside its range; the message names the field, the value and the rule.
    """

    project_name: str = "diffllm"  # wandb project
    experiment_name: str = "default"  # names the run and its directory
    output_dir: str = "outputs/${trainer.experiment_name}"  # everything the run writes
    total_epochs: int = 3
    max_steps: int | None = None  # optimizer steps; overrides total_epochs
    val_check_interval: int | None = None  # steps between validations; null validates at the end only
    save_checkpoint_steps: int | None = None  # steps between checkpoints; null saves at the end only
    keep_checkpoints: int = 2  # older ones are deleted
    resume: str = "auto"  # auto: newest whole checkpoint of output_dir, if any | never | the path of a checkpoint
    logger: list[str] = field(default_factory=lambda: ["console"])  # console, wandb; metrics.jsonl is always written
    async_checkpoints: bool = True  # write them while training goes on, from a copy in the host's memory
    nonfinite: str = "raise"  # a loss or gradient that is not finite: raise | skip the step
    max_nonfinite_steps: int = 10  # more skipped ones than this end the run
    replicate: int = 1  # copies of the model, each sharded over ranks / replicate ranks (HSDP)
    cpu_offload: bool = False  # keep parameters, gradients and optimizer in the host's memory
    peak_tflops: float | None = None  # of one device, for perf/mfu; null takes the data sheet's, or measures a product
    reshard_after_forward: bool = True  # free each layer's gathered weights until the backward; false is faster
    reduce_each_micro_batch: bool = True  # so that ranks add up their shard of the gradients only; false is faster
    precision: str = "auto"  # bf16 parameters in the forward, float32 gradients and optimizer | fp32 | auto: by device

    def __post_init__(self) -> None:
        for name in (
            "total_epochs",
            "max_steps",
            "val_check_interval",
            "save_checkpoint_steps",
            "keep_checkpoints",
            "replicate",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"trainer.{name}={value}: must be at least 1")
        for name, allowed in (("precision", PRECISIONS), ("nonfinite", NONFINITE)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"trainer.{name}={getattr(self, name)}: choose one of {', '.join(allowed)}")
        if not self.output_dir.strip():
            raise ValueError("trainer.output_dir is empty: name the directory that a run writes to")
        if self.max_nonfinite_steps < 0:
            raise ValueError(f"trainer.max_nonfinite_steps={self.max_nonfinite_steps}: must not be negative")
        if self.peak_tflops is not None and self.peak_tflops <= 0:
            raise ValueError(f"trainer.peak_tflops={self.peak_tflops}: must be positive")
        if unknown := set(self.logger) - set(LOGGERS):
            raise ValueError(f"trainer.logger={sorted(unknown)}: choose from {', '.join(LOGGERS)}")


@dataclass
class Config:
    """The tree that train.py, sample.py and evaluate.py share."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    seed: int = 0  # of weights from scratch, row order, cuts and noise; draws of the sampler have sampling.seed
    mode: str = "answer"  # sample.py: answer | chat, on the terminal
    prompt: str | None = None  # sample.py: one question
    template: str | None = None  # sample.py: text with slots to fill, such as <|mask:12|>, or <|mask:4-16|> for 4 to 16
    input: str | None = None  # sample.py: a .jsonl or .parquet file of rows with question or prompt
    output: str | None = None  # sample.py: the .jsonl file that gets a row with its response for each input row

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed}: must not be negative, and below 2^63")
        if self.mode not in MODES:
            raise ValueError(f"mode={self.mode}: choose one of {', '.join(MODES)}")
        if self.data.streaming and self.trainer.max_steps is None:
            raise ValueError("data.streaming=true: how many rows there are is not known, give trainer.max_steps")
        if self.diffusion.attention_annealing_steps and "flash" in self.model.attn_implementation:
            raise ValueError(
                f"model.attn_implementation={self.model.attn_implementation} cannot hide single positions, as "
                "diffusion.attention_annealing_steps asks: use sdpa"
            )
        if self.optim.name == "adamw_8bit" and self.trainer.async_checkpoints:
            raise ValueError(
                "optim.name=adamw_8bit: torchao's moments cannot be copied aside; set trainer.async_checkpoints=false"
            )


def field_names(schema: type = Config, prefix: str = "") -> list[str]:
    """Every dotted name of the tree, groups included."""
    names = []
    for item in fields(schema):
        names.append(prefix + item.name)
        if is_dataclass(item.type):
            names += field_names(item.type, f"{prefix}{item.name}.")
    return names


def nearest(name: str, allowed: list[str]) -> str:
    """A hint for a misspelt name: the closest allowed ones."""
    close = difflib.get_close_matches(name, allowed, n=2, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"known are {', '.join(allowed)}"


def resolve(composed: DictConfig) -> Config:
    """The composed tree as checked dataclasses.

    Raises:
        ValueError: an unknown key, a value of the wrong type or outside its range.
    """
    try:
        plain = OmegaConf.to_container(composed)
        lists = (
            ("model", "target_modules"),
            ("data", "train_files"),
            ("data", "val_files"),
            ("data", "decontaminate_files"),
            ("trainer", "logger"),
            ("sampling", "stop"),
            ("sampling", "forbidden"),
        )
        for group, name in lists:
            if isinstance(value := plain.get(group, {}).get(name), str):
                plain[group][name] = [value]  # a list of one may be written without brackets
        config = _at_home(OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), plain)))
    except ConfigKeyError as error:
        raise ValueError(f"{error.full_key}: no such setting; {nearest(error.full_key, field_names())}") from error
    except OmegaConfBaseException as error:
        raise ValueError(f"{error.full_key}: {error.msg.splitlines()[0]}") from error
    for name in TEXTS:
        setattr(config.sampling, name, unescape(name, getattr(config.sampling, name)))
    return config


def _at_home(config: Config) -> Config:
    """Replace `~` at the beginning of paths: on a command line most shells leave it as it is.

    Raises:
        ValueError: a path is not text.
    """
    for name in PATHS:
        group, _, field_name = name.rpartition(".")
        owner = getattr(config, group) if group else config
        value = getattr(owner, field_name)
        for path in value if isinstance(value, list) else [value]:
            if not isinstance(path, str | None):
                raise ValueError(f"{name}={value}: {path!r} is not the name of a file")
        if value is not None:
            setattr(owner, field_name, [*map(expanduser, value)] if isinstance(value, list) else expanduser(value))
    return config


def to_dict(config: Config) -> dict[str, Any]:
    """The resolved tree as plain values, as it is saved with checkpoints and results."""
    return asdict(config)


# What may differ when a run goes on. None of it changes what a step computes, but for the lr schedule, which follows
# the length of the run.
FREE_WHEN_RESUMING = (
    "model.enable_gradient_checkpointing",
    "model.recompute",
    "model.attn_implementation",
    "model.loss_kernel",
    "model.compile",
    "data.train_batch_size",
    "data.micro_batch_size_per_gpu",
    "data.gradient_accumulation_steps",
    "data.num_workers",
    "data.cache_dir",
    "data.val_files",
    *(f"trainer.{item.name}" for item in fields(TrainerConfig) if item.name != "precision"),
    "sampling",
    "task",
    "mode",
    "prompt",
    "template",
    "input",
    "output",
)


def differences(saved: dict[str, Any], config: Config) -> list[str]:
    """What makes a run another one than a saved configuration describes, as `name is A there and B here`."""

    free = set(FREE_WHEN_RESUMING)
    if config.model.path is not None:  # whose config.json says them
        free |= {f"model.{name}" for name in SHAPE_FIELDS}

    def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
        leaves = {}
        for key, value in tree.items():
            name = prefix + key
            if name not in free:
                group = isinstance(value, dict) and not prefix  # dicts within a group are values of a setting
                leaves |= flat(value, f"{name}.") if group else {name: value}
        return leaves

    # A setting that an older version did not have has its default there.
    there, here = flat(to_dict(Config())) | flat(saved), flat(to_dict(config))
    return [
        f"{name} is {there.get(name)} there and {here.get(name)} here"
        for name in sorted(there.keys() | here.keys())
        if there.get(name) != here.get(name)
    ]


def batch_layout(config: DataConfig, rank: int, ranks: int) -> BatchLayout:
    """This rank's part of the global batch, deriving of the three batch settings those not given.

    Raises:
        ValueError: the numbers contradict each other or do not divide; the message names all of them.
    """
    total, micro, accumulation = (
        config.train_batch_size,
        config.micro_batch_size_per_gpu,
        config.gradient_accumulation_steps,
    )
    given = (
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
            f"{given}: train_batch_size must be micro_batch_size_per_gpu × gradient_accumulation_steps × ranks; "
            "change one, or leave one out to derive it"
        )
    return BatchLayout(rank=rank, ranks=ranks, micro_batch_size=micro, micro_batches=accumulation)


def total_steps(config: TrainerConfig, steps_per_epoch: int | None) -> int:
    """Optimizer steps of the whole run."""
    return config.max_steps or config.total_epochs * steps_per_epoch


def warmup_steps(config: OptimConfig, steps: int) -> int:
    """Steps of the warm-up."""
    return math.ceil(config.warmup_steps_ratio * steps)

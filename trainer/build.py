"""What a run is made of, from its configuration: model, tokenizer, rows, optimizer."""

from collections.abc import Callable

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.optim import AdamW
from transformers import PreTrainedTokenizerBase, get_scheduler

from data import PlacedRow, read_rows
from data.config import DataConfig
from data.equations import held_out_rows, train_rows
from diffllm import DiffLLM, ModelConfig, load_model, new_model
from diffllm.tokenizer import builtin_tokenizer, check_tokenizer, load_tokenizer
from trainer.config import LR_SCHEDULES, Config, OptimConfig, warmup_steps
from trainer.world import World


def build_model(
    config: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[DiffLLM, PreTrainedTokenizerBase]:
    """The checkpoint of `model.path` with its tokenizer, or a float32 model from scratch with the built-in one.

    Raises:
        ValueError: see `load_model`, `load_tokenizer`, `check_tokenizer` and `new_model`.
    """
    if config.path is None:
        tokenizer = builtin_tokenizer()
        model = new_model(config, tokenizer, seed)
    else:
        model = load_model(config.path, dtype, config.attn_implementation)
        tokenizer = load_tokenizer(config.path)
    check_tokenizer(tokenizer, model.mask_token_id, model.lm.config.vocab_size)
    return model, tokenizer


def build_rows(config: DataConfig) -> tuple[list[PlacedRow], list[PlacedRow]]:
    """Training and validation rows: of the files, or the generated equations where no file is given."""
    if not config.train_files:
        return train_rows(), read_rows(config.val_files) if config.val_files else held_out_rows()
    return read_rows(config.train_files), read_rows(config.val_files)


def shard(model: DiffLLM, world: World, config: Config) -> None:
    """Split the model over all ranks with FSDP2, layer by layer; gradients are summed, never averaged.

    In bf16 the forward and backward see bf16 parameters; gradients are reduced and parameters kept in float32.
    """
    precision = config.trainer.precision
    bf16 = precision == "bf16" or (precision == "auto" and world.device.type == "cuda")
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if bf16 else None, reduce_dtype=torch.float32)
    model.to(world.device)
    if config.model.enable_gradient_checkpointing:
        model.lm.activation_checkpointing_enable({"use_reentrant": False})
    layers = model.lm.get_decoder().layers
    for layer in layers:
        fully_shard(layer, mp_policy=policy, reshard_after_forward=config.trainer.reshard_after_forward)
    fully_shard(model, mp_policy=policy)
    for part in (*layers, model):
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)  # gloo has no reduction that scales
    model.train()


def build_optimizer(model: DiffLLM, config: OptimConfig) -> AdamW:
    """AdamW without decay on norms and biases."""
    decayed = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    return AdamW(
        [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=config.lr,
        betas=tuple(config.betas),
    )


def build_lr_schedule(config: OptimConfig, optimizer: AdamW, steps: int) -> Callable[[int], float]:
    """Learning rate by the number of steps done: a function, so that no position has to be kept."""
    schedule = get_scheduler(LR_SCHEDULES[config.lr_schedule], optimizer, warmup_steps(config, steps), steps)
    return lambda done: config.lr * schedule.lr_lambdas[0](done)

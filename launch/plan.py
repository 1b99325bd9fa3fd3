"""Predict memory and time of a run without a GPU: `python -m launch.plan model=dream_7b gpus=8 gpu_memory=80`.

Takes the settings of train.py and those of `Machine`. Predicts the memory of each GPU, the largest micro-batch, and the
time of a step at a given MFU. The exit code is 1 if the run does not fit.

`trainer.memory` computes the state. Activations and logits are counted in a forward and backward pass over tensors
without data, in the worst case: rows of data.max_length, all tokens masked. A run is taken to be long enough for
model.compile=auto, and model.loss_kernel=liger is planned as chunked. On an H200 with sdpa, Qwen2.5-0.5B and 8×2,048
tokens took 29.4 GiB where 30.3 are planned, and compiled 23.2 where 24.5 are.
"""

import math
import sys
from dataclasses import asdict, dataclass, fields, replace
from difflib import get_close_matches
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf, open_dict

from data import BatchLayout
from data.errors import nearest
from data.terminal import printable, table
from diffllm import DiffLLM, ModelConfig, new_model
from diffllm.adapt import with_mask
from diffllm.checkpoint_source import CheckpointSource
from diffllm.diffusion.loss import LOGITS_PER_CHUNK
from diffllm.families import family_of
from diffllm.loading import empty_model
from diffllm.lora import add_lora
from diffllm.tokenizer import MASK_TOKEN, builtin_tokenizer
from launch.activations import pass_memory
from launch.cli import CONF, check_arguments, user_errors
from trainer.build import compute_dtype
from trainer.config import Config, batch_layout
from trainer.distributed import Distributed
from trainer.memory import GIB, remedies, state_memory, whole_gradients
from trainer.schema import field_names, resolve
from trainer.speed import Speed

MARGIN = 0.1  # of gpu_memory stays free, for fragmentation, NCCL and the CUDA context
PHASES = ("loss", "last layer", "first layer", "update")  # forward up to the loss; backward; optimizer
CUDA = torch.device("cuda")
SHAPES = Path(__file__).with_name("shapes.yaml")
UNREAD_IDS = {"mask_token_id": 0, "eos_token_id": 1}  # a model must have them, a plan does not use them


@dataclass(frozen=True)
class Machine:
    """GPUs to plan for."""

    gpus: int = 8
    gpu_memory: float = 80.0  # GiB of each
    mfu: float = 0.4  # model FLOPs utilisation, see trainer.speed
    tflops: float = 989.0  # peak of each, bf16

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not 0 < value < math.inf:
                raise ValueError(f"{name}={value}: must be a positive number")
        if self.mfu > 1:
            raise ValueError(f"mfu={self.mfu}: must be in (0, 1]")


def memory_table(model: DiffLLM, config: Config, layout: BatchLayout) -> dict[str, tuple[int, ...]]:
    """Bytes of a GPU in each of PHASES, and their totals.

    In the backward pass gradients grow as activations shrink: the peak is at the last layer or at the first.
    """
    dtype, head = compute_dtype(config, CUDA), model.lm.lm_head.weight
    whole_layers = config.model.enable_gradient_checkpointing and config.model.recompute == "full"
    compiling = config.model.compile != "false" and not whole_layers  # recomputed ones keep their inputs alone
    passed = pass_memory(model, config, layout.micro_batch_size, dtype, compiling)
    state = state_memory(model, config, layout.ranks, CUDA)
    if config.trainer.cpu_offload:
        state = replace(state, weights=0, gradients=0, optimizer=0)
    # Gradients of earlier micro-batches: sharded, or whole if they are reduced once a step.
    summed = whole_gradients(model, config, layout) or (state.gradients if layout.micro_batches > 1 else 0)
    # The gathered weights include the gradient of the head.
    logits = passed.loss - (head.numel() * dtype.itemsize if head.requires_grad else 0)
    one_layer = passed.kept // model.lm.config.num_hidden_layers + passed.backward
    parts = {
        "weights": (state.weights,) * 4,
        "gradients": (summed, summed, state.gradients, state.gradients),
        "optimizer": (state.optimizer,) * 4,
        "gathered weights": (state.gathered, state.gathered, state.gathered, 0),
        "activations": (passed.kept, passed.kept + passed.backward, one_layer, 0),
        "logits": (logits, 0, 0, 0),
    }
    return parts | {"total": tuple(map(sum, zip(*parts.values(), strict=True)))}


def largest_micro_batch(model: DiffLLM, config: Config, layout: BatchLayout, usable: float) -> int:
    """Largest number of rows that fits into `usable` bytes, even if nothing is compiled; 0 if one row does not."""
    config = replace(config, model=replace(config.model, compile="false"))

    def totals(rows: int) -> tuple[int, ...]:
        return memory_table(model, config, replace(layout, micro_batch_size=rows))["total"]

    # From so many tokens on memory is linear: logits have many chunks, activations outweigh a weight's gradient.
    tokens = max(8 * LOGITS_PER_CHUNK / model.lm.config.vocab_size, 4 * model.lm.config.hidden_size)
    rows = math.ceil(tokens / config.data.max_length)
    once, twice = totals(rows), totals(2 * rows)
    if once[-1] > usable:
        return 0
    fitting = min(rows + rows * (usable - a) / (b - a) for a, b in zip(once[:-1], twice[:-1], strict=True))
    largest = max(0, int(fitting))
    while largest and max(totals(largest)) > usable:
        largest -= 1
    return largest


def read_arguments(arguments: list[str]) -> tuple[Machine, Config, str]:
    """Machine, settings, and the choice of the group `model`.

    Raises:
        ValueError: an unknown name, or a value outside its range.
    """
    names, machine_values, settings = [field.name for field in fields(Machine)], {}, []
    for argument in arguments:
        name, _, value = argument.partition("=")
        if name in names:
            machine_values[name] = value
        elif name not in field_names() and get_close_matches(name, names):
            raise ValueError(f"{argument}: no such setting; {nearest(name, names)}")
        elif "=" not in argument:
            raise ValueError(f"{argument}: write settings as NAME=VALUE, such as gpus=8")
        else:
            settings.append(argument)
    check_arguments(settings)
    machine = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Machine), machine_values))
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = compose("config", ["trainer.experiment_name=plan", *settings], return_hydra_config=True)
    with open_dict(composed):
        choice = composed.pop("hydra").runtime.choices.model
    return machine, resolve(composed), choice


def meta_model(config: Config, choice: str) -> tuple[DiffLLM, str]:
    """The model on the meta device, and the file with its shape.

    Raises:
        ValueError: no file has the shape, or the context is shorter than data.max_length.
    """
    attention = "sdpa"  # FlashAttention keeps the same tensors, and may not be installed
    if config.model.path is None:
        file = f"conf/model/{choice}.yaml"
        with torch.device("meta"):
            model = new_model(replace(config.model, attn_implementation=attention), builtin_tokenizer())
    else:
        source, file = _source(config.model)
        model = empty_model(source, attn_implementation=attention)
    if config.model.lora_rank:
        add_lora(model, config.model, config.seed)
    context = model.lm.config.max_position_embeddings
    if config.data.max_length > context:
        raise ValueError(f"data.max_length={config.data.max_length}: the model's context is {context} tokens")
    return model, file


def _source(config: ModelConfig) -> tuple[CheckpointSource, str]:
    """The checkpoint of `model.path`, adapted if causal, and the file with its shape: its config.json or SHAPES.

    Raises:
        ValueError: neither has it.
    """
    if Path(config.path).exists():
        source = CheckpointSource.open(config.path)
        file = config.path if Path(config.path).is_file() else f"{config.path}/config.json"
        return with_mask(source, config.mask_token or MASK_TOKEN)[0] if source.is_autoregressive else source, file
    shapes = OmegaConf.to_object(OmegaConf.load(SHAPES))
    if config.path not in shapes:
        raise ValueError(
            f"model.path={config.path}: no such file or directory, and launch/{SHAPES.name} does not have its shape; "
            f"for a checkpoint on the hub choose one of {', '.join(shapes)}, or download its config.json"
        )
    published = shapes[config.path] | UNREAD_IDS
    return CheckpointSource(None, published, family_of(published, config.path)), f"launch/{SHAPES.name}"


def plan(arguments: list[str]) -> bool:
    """Print the plan of a command line. Return whether the run fits."""
    machine, config, choice = read_arguments(arguments)
    layout, length = batch_layout(config.data, 0, machine.gpus), config.data.max_length
    if machine.gpus % config.trainer.replicate:
        raise ValueError(f"trainer.replicate={config.trainer.replicate}: must divide gpus={machine.gpus}")
    model, file = meta_model(config, choice)
    parameters, tokens = sum(parameter.numel() for parameter in model.parameters()), layout.global_batch_size * length
    print(printable(f"{parameters / 1e9:.2f} billion parameters, shape from {file}"))
    print(
        f"{tokens:,} tokens a step: gpus={machine.gpus} × {layout.micro_batches} forward passes × "
        f"{layout.micro_batch_size} rows × {length}\n"
    )

    bytes_in, usable = memory_table(model, config, layout), (1 - MARGIN) * machine.gpu_memory * GIB
    rows = ([name, *(f"{size / GIB:.2f}" for size in phases)] for name, phases in bytes_in.items())
    print(table([["GiB on each GPU", *PHASES], *rows]))
    if config.trainer.cpu_offload:
        state = state_memory(model, config, machine.gpus, CUDA)
        print(f"and in the host's memory {(state.total - state.gathered) / GIB:.2f} for each GPU")
    needed = max(bytes_in["total"])
    fits = needed <= usable
    largest = max(largest_micro_batch(model, config, layout, usable), layout.micro_batch_size if fits else 0)
    print(
        f"\n{'fits' if fits else 'does not fit'}: {needed / GIB:.2f} of {usable / GIB:.2f} GiB, which is gpu_memory="
        f"{machine.gpu_memory:g} less {MARGIN:.0%} for fragmentation, NCCL and the CUDA context"
    )
    print(f"largest micro-batch that fits: {largest or 'none'}")
    if not fits:
        print("what helps:", ", ".join(remedies(config, layout, largest)))

    speed = Speed(model, Distributed(0, machine.gpus, torch.device("cpu")), compute_dtype(config, CUDA), machine.tflops)
    counts = {"row_tokens": tokens, "attended": tokens, "pairs": tokens * length, "masked": tokens / 2}
    seconds = speed.flops(counts) / (machine.tflops * 1e12 * machine.gpus * machine.mfu)
    print(
        f"{seconds:.2f} s a step, {tokens / seconds:,.0f} tokens/s with mfu={machine.mfu:g}, tflops={machine.tflops:g} "
        "and half of the tokens masked"
    )
    return fits


if __name__ == "__main__":
    with user_errors(debug=False):
        sys.exit(0 if plan(sys.argv[1:]) else 1)

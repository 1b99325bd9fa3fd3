"""Predict memory, time and disk of a run without a GPU: `python -m launch.plan experiment=dream_s1k gpu=h100 gpus=8`.

Takes the settings of train.py and those of `launch.machine`. Predicts the memory of each GPU, the largest micro-batch,
what helps if it does not fit, the time at a given MFU, and the disk. The exit code is 1 if the run does not fit.

`trainer.memory` computes the state. Activations and logits are counted in a forward and backward pass over tensors
without data, in the worst case: rows of data.max_length, all tokens masked. A run is taken to be long enough for
model.compile=auto, and model.loss_kernel=liger is planned as chunked. On an H200 with sdpa, Qwen2.5-0.5B and 8×2,048
tokens took 29.4 GiB where 30.3 are planned, and compiled 23.2 where 24.5 are.
"""

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from itertools import chain, takewhile

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data import BatchLayout
from data.quantities import UNITS, count_text, duration_text, size_text, unit_of
from data.terminal import printable, table
from diffllm import DiffLLM
from diffllm.diffusion.loss import LOGITS_PER_CHUNK
from diffllm.lora import base_name
from launch.activations import PassMemory, pass_memory
from launch.budget import CUDA, HOST_ADAMW, PCIE, count_rows, count_steps, step_time
from launch.cli import user_errors
from launch.machine import Gpus, Machine, complete, explanations
from launch.settings import read_settings
from launch.shapes import meta_model
from trainer.build import compute_dtype
from trainer.config import Config, batch_layout
from trainer.disk import disk
from trainer.distributed import GIB
from trainer.memory import MORE_GPUS, remedies, state_memory, whole_gradients
from trainer.summary import describe_attention

MARGIN = 0.1  # of gpu_memory stays free, for fragmentation, NCCL and the CUDA context
PHASES = ("loss", "last layer", "first layer", "update")  # forward up to the loss; backward; optimizer
HELP = """python -m launch.plan [NAME=VALUE …] predicts memory, time and disk of a training run, without a GPU.

It takes the choices and settings of train.py (python train.py --help), and

{}

  python -m launch.plan experiment=dream_s1k_lora_24gb gpu=4090
  python -m launch.plan experiment=dream_s1k gpu=h100 gpus=8
  python -m launch.plan model.path=DIR data.train_files=rows.jsonl data.max_length=4096 model.lora_rank=16

The exit code is 0 if the run fits, and 1 if it does not."""


@dataclass(frozen=True)
class Plan:
    """A run on some GPUs, and the memory that it needs."""

    config: Config
    layout: BatchLayout
    gpus: Gpus
    model: DiffLLM  # on the meta device
    file: str  # with the model's shape
    passed: PassMemory
    memory: dict[str, tuple[int, ...]]  # see memory_table

    @property
    def needed(self) -> int:
        """Bytes of a GPU at the peak."""
        return max(self.memory["total"])

    @property
    def usable(self) -> float:
        """Bytes of a GPU that the run may take."""
        return (1 - MARGIN) * self.gpus.memory

    @property
    def fits(self) -> bool:
        return self.needed <= self.usable


def micro_batch_memory(model: DiffLLM, config: Config, layout: BatchLayout) -> PassMemory:
    """Memory of a micro-batch's forward and backward pass on a GPU."""
    whole_layers = config.model.enable_gradient_checkpointing and config.model.recompute == "full"
    compiling = config.model.compile != "false" and not whole_layers  # recomputed ones keep their inputs alone
    return pass_memory(model, config, layout.micro_batch_size, compute_dtype(config, CUDA), compiling)


def memory_table(
    model: DiffLLM, config: Config, layout: BatchLayout, passed: PassMemory | None = None
) -> dict[str, tuple[int, ...]]:
    """Bytes of a GPU in each of PHASES, and their totals.

    In the backward pass gradients grow as activations shrink: the peak is at the last layer or at the first.

    Args:
        passed: of `micro_batch_memory`, if known.
    """
    dtype, head = compute_dtype(config, CUDA), model.lm.lm_head.weight
    passed = passed or micro_batch_memory(model, config, layout)
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
    values, config, choice = read_settings(arguments, [field.name for field in fields(Machine)])
    try:
        machine = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Machine), values))
    except OmegaConfBaseException as error:
        raise ValueError(f"{error.full_key}={values[error.full_key]}: {error.msg.splitlines()[0]}") from error
    return machine, config, choice


def make_plan(arguments: list[str], like: Plan | None = None) -> Plan:
    """The plan of a command line.

    Args:
        like: a plan whose parts are taken over where the settings agree; they take seconds.

    Raises:
        ValueError: settings that contradict each other, or see `read_arguments` and `meta_model`.
    """
    machine, config, choice = read_arguments(arguments)
    gpus = complete(machine)
    layout = batch_layout(config.data, 0, gpus.count)
    if gpus.count % config.trainer.replicate:
        raise ValueError(f"trainer.replicate={config.trainer.replicate}: must divide gpus={gpus.count}")
    if like is None or config.model != like.config.model:
        like, (model, file) = None, meta_model(config, choice)
    else:
        model, file = like.model, like.file
    if like is None or _micro_batch(config, layout) != _micro_batch(like.config, like.layout):
        passed = micro_batch_memory(model, config, layout)
    else:
        passed = like.passed
    return Plan(config, layout, gpus, model, file, passed, memory_table(model, config, layout, passed))


def _micro_batch(config: Config, layout: BatchLayout) -> tuple[int, int]:
    return layout.micro_batch_size, config.data.max_length


def helping(plan: Plan, arguments: list[str]) -> Iterator[tuple[str, Plan]]:
    """Yield each setting that alone lowers the peak of a run that does not fit; all together if none suffices."""
    accumulated = replace(plan.layout, micro_batches=max(2, plan.layout.micro_batches))
    largest = largest_micro_batch(plan.model, plan.config, accumulated, plan.usable)
    settings, lower = remedies(plan.config, plan.layout, largest), []
    if not plan.config.model.lora_rank and not any(argument.startswith("experiment=") for argument in arguments):
        settings.append("experiment=lora")
    for setting in settings:
        if setting == MORE_GPUS:
            setting, other = _more_gpus(plan, arguments)
        else:
            other = _changed(plan, arguments, setting)
        if other is not None and other.needed < plan.needed:
            lower.append((setting, other))
    yield from lower
    if len(lower) > 1 and not any(other.fits for _, other in lower):
        together = _changed(plan, arguments, " ".join(setting for setting, _ in lower))
        if together is not None:
            yield "all of these", together


def _more_gpus(plan: Plan, arguments: list[str]) -> tuple[str, Plan | None]:
    """The first of four doublings of the GPUs that fits, else the first; None if it does not divide the batch."""
    doublings = [f"gpus={plan.gpus.count * 2**i}" for i in range(1, 5)]
    plans = takewhile(lambda each: each[1] is not None, ((more, _changed(plan, arguments, more)) for more in doublings))
    first = next(plans, (MORE_GPUS, None))
    return next((each for each in chain([first], plans) if each[1] is not None and each[1].fits), first)


def _changed(plan: Plan, arguments: list[str], setting: str) -> Plan | None:
    """The plan with other settings; None if they contradict the rest, as GPUs that do not divide the batch."""
    try:
        return make_plan([*arguments, *setting.split()], like=plan)
    except ValueError:
        return None


def print_plan(arguments: list[str]) -> bool:
    """Print the plan of a command line. Return whether the run fits."""
    plan = make_plan(arguments)
    print(printable("\n".join([*_run_lines(plan), "", *_memory_lines(plan, arguments), "", *_cost_lines(plan)])))
    return plan.fits


def _run_lines(plan: Plan) -> Iterator[str]:
    """The model, the GPUs and a step."""
    sizes = [(name, weight.numel(), weight.requires_grad) for name, weight in plan.model.named_parameters()]
    own = sum(size for name, size, _ in sizes if base_name(name) is not None)
    trained = sum(size for _, size, is_trained in sizes if is_trained)
    adapters = f", {count_text(trained)} trained in adapters" if plan.config.model.lora_rank else ""
    yield f"{count_text(own)} parameters{adapters}, shape from {plan.file}"
    gpus, layout, length = plan.gpus, plan.layout, plan.config.data.max_length
    yield f"gpus={gpus.count} of {gpus.source}: gpu_memory={gpus.memory / GIB:.4g} GiB, tflops={gpus.tflops:g}"
    yield (
        f"{layout.global_batch_size * length:,} tokens a step: {gpus.count} × {layout.micro_batches} forward passes of "
        f"data.micro_batch_size_per_gpu={layout.micro_batch_size} × data.max_length={length}"
    )
    yield f"attention: {describe_attention(plan.config, plan.model)}"


def _memory_lines(plan: Plan, arguments: list[str]) -> Iterator[str]:
    """Memory by part and phase, whether it fits, and what helps if not."""
    unit = unit_of(plan.needed)
    rows = ([name, *(f"{size / UNITS[unit]:.2f}" for size in phases)] for name, phases in plan.memory.items())
    yield table([[f"{unit} on each GPU", *PHASES], *rows])
    if host := _in_host(plan):
        yield f"and in the host's memory {size_text(host)} for each GPU"
    yield ""
    yield (
        f"{'fits' if plan.fits else 'does not fit'}: {size_text(plan.needed)} of {size_text(plan.usable)}, which is "
        f"gpu_memory={plan.gpus.memory / GIB:.4g} less {MARGIN:.0%} for fragmentation, NCCL and the CUDA context"
    )
    if plan.fits:
        largest = largest_micro_batch(plan.model, plan.config, plan.layout, plan.usable)
        yield f"largest micro-batch that fits: {max(largest, plan.layout.micro_batch_size)}"
    elif helps := list(helping(plan, arguments)):
        verdicts = ([name, size_text(other.needed), _verdict(other)] for name, other in helps)
        yield table([["what helps, each alone", "needs", ""], *verdicts])
    else:
        yield "no setting helps: take a smaller model"


def _verdict(plan: Plan) -> str:
    if not plan.fits:
        return "lower"
    return f"fits, with {size_text(_in_host(plan))} of the host" if plan.config.trainer.cpu_offload else "fits"


def _in_host(plan: Plan) -> int:
    """Bytes of the host's memory for a GPU: what `trainer.cpu_offload` moves there, and a copy that is saved from."""
    state, settings = state_memory(plan.model, plan.config, plan.layout.ranks, CUDA), plan.config.trainer
    moved = state.total - state.gathered if settings.cpu_offload else 0
    saving = settings.save_checkpoints and settings.async_checkpoints
    return moved + (state.gradients + state.optimizer if saving else 0)  # trained weights are as large as gradients


def _cost_lines(plan: Plan) -> Iterator[str]:
    """Time of a step and of the run; disk."""
    config, layout = plan.config, plan.layout
    tokens, step = layout.global_batch_size * config.data.max_length, step_time(plan.model, config, layout, plan.gpus)
    yield (
        f"time: {duration_text(step.total)} a step, {tokens / step.total:,.0f} tokens/s, with mfu={plan.gpus.mfu:g} "
        f"and {config.diffusion.loss_share:.0%} of the tokens in the loss"
        f"{'; too little work to keep a GPU busy' if step.is_launching else ''}"
    )
    if step.offload:
        yield (
            f"  {duration_text(step.offload)} of it for trainer.cpu_offload: {PCIE / 1e9:g} GB/s over PCIe, and AdamW "
            f"on the host at {HOST_ADAMW * 1e9:g} s a billion weights"
        )
    rows = None if config.trainer.max_steps else count_rows(config)
    steps, epochs = count_steps(config, layout, rows), config.trainer.total_epochs
    if steps is None:
        missing = config.data.train_files or [f"the rows of {name}" for name in config.task.name]
        epoch = 1000 / layout.global_batch_size * step.total
        yield (
            f"  1,000 rows take {duration_text(epoch)} an epoch, {duration_text(epochs * epoch)} in "
            f"trainer.total_epochs={epochs} (not on this machine: {', '.join(missing)})"
        )
    else:
        reason = f"trainer.max_steps={steps}" if rows is None else f"trainer.total_epochs={epochs} of {rows:,} rows"
        yield f"  {duration_text(steps * step.total)} for {steps:,} steps: {reason}"
    yield f"  all rows are taken to have data.max_length={config.data.max_length} tokens; shorter ones take less"
    written = disk(plan.model, config, steps, CUDA)
    yield (
        f"disk: {size_text(written.total)} at most: {written.most} × {size_text(written.checkpoint)} for checkpoints "
        f"({written.kept} are kept), {size_text(written.export)} for hf/"
    )


def main(arguments: list[str]) -> bool:
    """Print the plan of a command line, or the help. Return whether the run fits."""
    if {"-h", "--help"} & {*arguments}:
        print(HELP.format(explanations()))
        return True
    return print_plan(arguments)


if __name__ == "__main__":
    with user_errors(debug=False):
        sys.exit(0 if main(sys.argv[1:]) else 1)

"""Checks of the model: its weights, a forward, a gradient, some steps on few rows, a sampled response."""

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from data.errors import listed
from data.quantities import size_text
from data.terminal import announced, printable
from diffllm.checkpoint_source import CheckpointSource
from diffllm.generate import generate
from diffllm.lora import base_name
from launch.checks.base import NOT_SAMPLED, Result, Run, fail, ok, skip, warn
from launch.checks.rows import row_of
from trainer.build import build_optimizer, set_lr
from trainer.distributed import device_memory
from trainer.memory import state_memory
from trainer.parallel import gathered, reshard
from trainer.summary import describe_model

WINDOW = 128  # positions of a row whose logits are computed
STEPS = 20  # on the same few rows
LEAST_FALL = 0.01  # of the loss in these steps
FROM_SCRATCH = 0.25  # most relative distance between the first loss and ln(vocabulary)
SAMPLING_STEPS = 32  # at most
REPEATED = 4  # tokens of a response that repeats one


def checkpoint(run: Run) -> Iterator[Result]:
    """The checkpoint is on this machine or the hub, and of a supported kind."""
    if (path := run.config.model.path) is None:
        yield ok("none: the weights are random")
        return
    source = CheckpointSource.open(path)
    kind = "a causal model, adapted when it is loaded" if source.is_autoregressive else "a diffusion model"
    yield ok(f"{path}: {source.family.architecture}, {kind}")


def weights(run: Run) -> Iterator[Result]:
    """The model is built, its weights are read, and they are finite numbers."""
    if reason := _too_large(run, training=False):
        yield skip(reason)
        return
    parameters = {name: _local(parameter.detach()) for name, parameter in run.model.named_parameters()}
    broken = [name for name, values in parameters.items() if not values.isfinite().all()]
    empty = [
        name
        for name, values in parameters.items()
        if values.ndim > 1 and base_name(name) is not None and not values.any()
    ]
    if broken:
        yield fail(f"not finite: {listed(broken)}", "download the checkpoint again, or take an earlier one")
    elif empty:
        yield fail(f"all zero: {listed(empty)}", "download the checkpoint again")
    else:
        yield ok(describe_model(run.config, run.model))


def _local(tensor: Tensor) -> Tensor:
    """The whole tensor, which is on one rank."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _too_large(run: Run, training: bool) -> str | None:
    """Return why the model or its training does not fit one rank, or None."""
    state = state_memory(run.shape, run.config, 1, run.device)
    needed = state.total if training else state.weights + state.gathered
    available = device_memory(torch.device("cpu") if run.config.trainer.cpu_offload else run.device)
    if needed <= available:
        return None
    what = "weights, gradients and optimizer" if training else "the weights"
    return f"{what} need {size_text(needed)} on one rank, which has {size_text(available)}"


def forward(run: Run) -> Iterator[Result]:
    """The logits of a row are finite numbers, and the attention is bidirectional."""
    row = row_of(run)
    tokens = row["x_t"][0][row["attention_mask"][0].bool()][-WINDOW:][None]
    changed = tokens.clone()
    changed[0, -1] = (changed[0, -1] + 1) % run.model.vocab_size
    # In families that shift, the state before a position predicts it: this one is before the last position in all.
    before, after = (_logits(run, each)[0, -2] for each in (tokens, changed))
    if not before.isfinite().all():
        yield fail("logits are not finite", "trainer.precision=fp32; else the checkpoint is broken")
    elif torch.equal(before, after):
        advice = "the decoder stays causal: take another model, or another model.attn_implementation"
        yield fail("a later token does not change the logits before it", advice)
    else:
        yield ok("logits are finite, and depend on tokens on both sides")


@torch.no_grad()
def _logits(run: Run, tokens: Tensor) -> Tensor:
    """[1, L, V] logits of tokens [1, L]."""
    with gathered(run.model, run.config.trainer):
        return run.model.denoise(tokens.to(run.device)).float()


def first_loss(run: Run) -> Iterator[Result]:
    """The loss of few rows before training is that of a guess from scratch, and lower for a checkpoint."""
    with torch.no_grad():
        nll = torch.cat([run.objective.loss(run.model, batch).nll for batch in run.micro_batches]).mean().item()
    reshard(run.model)
    chance = math.log(run.model.vocab_size)
    text = f"{nll:.2f} nats a trained token, a guess has ln({run.model.vocab_size:,}) = {chance:.2f}"
    if not math.isfinite(nll):
        yield fail(text, "trainer.precision=fp32; else the checkpoint is broken")
    elif run.config.model.path is None and abs(nll / chance - 1) > FROM_SCRATCH:
        yield warn(f"{text}: random weights should guess", "a smaller model.initializer_range")
    elif run.config.model.path is not None and nll > chance:
        advice = "the rows are unlike those it was trained on, the tokenizer is not its own, or its weights are broken"
        yield warn(f"{text}: the checkpoint is worse", advice)
    else:
        yield ok(text)


def gradient(run: Run) -> Iterator[Result]:
    """The gradient of few rows is finite, and reaches all trained parameters."""
    if reason := _not_trained(run):
        yield skip(reason)
        return
    _backward(run)
    grads = {
        name: None if parameter.grad is None else _local(parameter.grad)
        for name, parameter in run.model.named_parameters()
        if parameter.requires_grad
    }
    run.model.zero_grad()
    # B of an adapter begins as zero, so A has no gradient in the first step.
    missing = [name for name, grad in grads.items() if grad is None or (".lora_A." not in name and not grad.any())]
    broken = [name for name, grad in grads.items() if grad is not None and not grad.isfinite().all()]
    if broken:
        yield fail(f"not finite: {listed(broken)}", "trainer.precision=fp32; else the checkpoint is broken")
    elif missing:
        advice = "the model does not use them in its loss; leave them out of model.target_modules"
        yield fail(f"no gradient: {listed(missing)}", advice)
    else:
        norm = torch.stack([grad.double().norm() for grad in grads.values()]).norm()
        clip = f"optim.clip_grad={run.config.optim.clip_grad:g}"
        yield ok(f"finite in all {len(grads)} trained tensors; norm {norm:.3g}, {clip}")


def _not_trained(run: Run) -> str | None:
    """Return why no training step is tried, or None."""
    return _too_large(run, training=True) if run.train else "train=false"


def _backward(run: Run) -> float:
    """Loss of few rows, whose gradient is added to the parameters'."""
    denominator = sum(run.objective.denominator(batch) for batch in run.micro_batches).item()
    total = 0.0
    for batch in run.micro_batches:
        loss = run.objective.loss(run.model, batch).loss / denominator
        loss.backward()
        total += loss.item()
    return total


def memorisation(run: Run) -> Iterator[Result]:
    """Some steps on the same few rows, with the run's optimizer and learning rate, lower their loss."""
    if reason := _not_trained(run):
        yield skip(reason)
        return
    optim, losses = run.config.optim, []
    optimizer = build_optimizer(run.model, optim)
    with announced(f"{STEPS} steps on few rows"):
        for step in range(STEPS):
            set_lr(optimizer, optim, STEPS, step)
            losses.append(_backward(run))
            torch.nn.utils.clip_grad_norm_(run.model.parameters(), optim.clip_grad)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(_backward(run))
    first, last = losses[0], losses[-1]
    text = f"{STEPS} steps on the same few rows at optim.lr={optim.lr:g}: loss {first:.4g} → {last:.4g}"
    if not last < first:
        yield fail(f"{text}, which does not fall", f"a smaller optim.lr, such as {optim.lr / 10:.0e}")
    elif last > (1 - LEAST_FALL) * first:
        yield warn(f"{text}, which hardly falls", f"a larger optim.lr, such as {optim.lr * 10:.0e}")
    else:
        yield ok(text)


def generation(run: Run) -> Iterator[Result]:
    """A response to a prompt of the rows is sampled; it is not empty, ends, and does not repeat one token."""
    if run.config.diffusion.causal:
        yield NOT_SAMPLED
        return
    prepared = next((run.prepared[name] for name in ("validation", "training") if name in run.prepared), None)
    if prepared is None:
        yield skip("data.streaming=true without data.val_files: no prompt to answer")
        return
    own = run.config.sampling
    steps = own.steps or own.max_new_tokens
    sampling = replace(own, steps=min(steps, SAMPLING_STEPS), compile="false")
    prompt = prepared.rows.ids(0)[: prepared.rows.prompt_lengths[0]]
    with announced("sampling a response"), gathered(run.model, run.config.trainer):
        [response] = generate(run.model, run.tokenizer, [prompt], sampling)
    shown = printable(repr(response.text if len(response.text) <= 60 else f"{response.text[:60]}…"))
    text = f"{shown}, {response.tokens} tokens in {response.nfe} forwards"
    if steps > SAMPLING_STEPS and not own.adaptive:
        text += f", tried with {SAMPLING_STEPS} of {steps} steps"
    tokens = run.tokenizer(response.text, add_special_tokens=False)["input_ids"]
    if not _has_learnt(run):
        yield ok(f"{text}; before training it means nothing")
    elif not response.text.strip():
        advice = "sample with sampling.min_new_tokens; train with data.perbatch_cutoff_type=min_pad"
        yield warn(f"{text}: it is empty", advice)
    elif len(tokens) >= REPEATED and len({*tokens}) == 1:
        yield warn(f"{text}: it repeats one token", "more sampling.steps, or sampling.temperature above 0")
    elif not response.ended:
        yield warn(f"{text}: it does not end", "a larger sampling.max_new_tokens; more sampling.steps")
    else:
        yield ok(text)


def _has_learnt(run: Run) -> bool:
    """Whether the weights are those of a diffusion model before the run starts."""
    path = run.config.model.path
    return path is not None and not CheckpointSource.open(path).is_autoregressive

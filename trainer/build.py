"""Build the parts of a run from its settings: model, tokenizer, batches, optimizer."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    PreTrainedTokenizerBase,
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
    get_wsd_schedule,
)

from data import (
    BatchLayout,
    BatchSource,
    Prepared,
    Report,
    StreamedBatches,
    TrainBatches,
    ValBatches,
    rows_of,
    rows_of_files,
)
from data.batches import Noise
from data.config import DataConfig
from data.curation import held_out, subset
from data.packing import noise_and_pack
from data.report import Noted
from data.tasks import tasks_of
from data.terminal import announced
from diffllm import DiffLLM, ModelConfig, load_model, new_model
from diffllm.adapt import adapt, with_mask
from diffllm.attention import attention_for, head_size
from diffllm.block_attention import LEAST_HEAD
from diffllm.checkpoint_source import CheckpointSource
from diffllm.diffusion.loss import liger
from diffllm.loading import building, decoder_on_meta, empty_model
from diffllm.lora import add_lora, load_adapter
from diffllm.quantize import quantize
from diffllm.static_forward import prepare_sampling
from diffllm.tokenizer import (
    MASK_TOKEN,
    builtin_tokenizer,
    check_tokenizer,
    load_tokenizer,
    name_own_mask,
    set_chat_template,
    set_template_variables,
)
from sampling import SamplingConfig
from trainer.config import Config, OptimConfig, warmup_steps
from trainer.distributed import GIB, device_memory
from trainer.muon import Muon

# Arguments of the schedules beside the steps of the warm-up, from (steps of the run, of them in the decay).
LR_SCHEDULES: dict[str, tuple[Callable[..., LambdaLR], Callable[[int, int], dict[str, Any]]]] = {
    "cosine": (get_cosine_schedule_with_warmup, lambda steps, _: {"num_training_steps": steps}),
    "linear": (get_linear_schedule_with_warmup, lambda steps, _: {"num_training_steps": steps}),
    "constant": (get_constant_schedule_with_warmup, lambda *_: {}),
    "wsd": (
        get_wsd_schedule,
        lambda steps, decay: {"num_training_steps": steps, "num_decay_steps": decay, "decay_type": "linear"},
    ),
}
EXPORT_DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}


def build_model(
    config: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float32, empty: bool = False
) -> tuple[DiffLLM, PreTrainedTokenizerBase]:
    """The checkpoint of `model.path` with its tokenizer, or a float32 model from scratch with the built-in tokenizer.

    An autoregressive checkpoint is adapted, an adapter merged. Each rank then holds all weights until they are sharded,
    as for a model from scratch. For a large one, write the adapted checkpoint once by `python -m diffllm.adapt`.

    Args:
        empty: leave the weights of a diffusion checkpoint on the meta device; `trainer.parallel.shard` reads them.

    Raises:
        ValueError: see `load_model`, `new_model`, `adapt`, and those of `diffllm.tokenizer`.
    """
    if config.path is None:
        if config.adapter is not None:
            raise ValueError(f"model.adapter={config.adapter}: give the checkpoint that it belongs to as model.path")
        tokenizer = builtin_tokenizer()
        model = new_model(config, tokenizer, seed)
    else:
        merged = config.adapter is not None and not config.lora_rank
        empty = empty and not merged
        model, tokenizer = _from_checkpoint(CheckpointSource.open(config.path), config, dtype, empty)
        if merged:
            load_adapter(model, config)
    _set_up(tokenizer, config)
    check_tokenizer(tokenizer, model.mask_token_id, model.lm.config.vocab_size)
    return model, tokenizer


def build_tokenizer(config: ModelConfig) -> tuple[PreTrainedTokenizerBase, int]:
    """The tokenizer of `build_model` and the model's context in tokens, without reading weights.

    Raises:
        ValueError: see `build_model`.
    """
    context = config.max_position_embeddings
    if config.path is None:
        tokenizer = builtin_tokenizer()
    else:
        source = CheckpointSource.open(config.path)
        if source.is_autoregressive:
            _, tokenizer, _ = with_mask(source, config.mask_token or MASK_TOKEN)
        else:
            source.check_ids()
            tokenizer = load_tokenizer(source.name)
            name_own_mask(tokenizer, source.published["mask_token_id"])
        with building(source.name):
            context = source.family.config(source.published).max_position_embeddings
    _set_up(tokenizer, config)
    return tokenizer, context


def _set_up(tokenizer: PreTrainedTokenizerBase, config: ModelConfig) -> None:
    """Give a tokenizer the template of the settings."""
    if config.mask_token not in (None, tokenizer.mask_token):
        raise ValueError(f"model.mask_token={config.mask_token}: the model has {tokenizer.mask_token}; leave it out")
    if config.chat_template is not None:
        set_chat_template(tokenizer, config.chat_template)
    set_template_variables(tokenizer, config.chat_template_kwargs)


def _from_checkpoint(
    source: CheckpointSource, config: ModelConfig, dtype: torch.dtype, empty: bool
) -> tuple[DiffLLM, PreTrainedTokenizerBase]:
    attention = attention_for(config.attn_implementation)
    if source.is_autoregressive:
        return adapt(source, config.mask_token or MASK_TOKEN, dtype, attention)
    load = empty_model if empty else load_model
    model = load(source, dtype, attention)
    tokenizer = load_tokenizer(source.name)
    model.set_tokenizer(tokenizer)
    name_own_mask(tokenizer, model.mask_token_id)
    return model, tokenizer


def load_for_sampling(config: Config, device: torch.device | None = None) -> tuple[DiffLLM, PreTrainedTokenizerBase]:
    """Load the checkpoint of `model.path` to sample a row, in bfloat16 on a GPU, else in float32.

    Args:
        device: by default the GPU, if available.

    Raises:
        ValueError: no `model.path`, a causal checkpoint that was not trained to restore tokens, or see `build_model`.
    """
    if config.model.path is None:
        raise ValueError("model.path is not given: name a checkpoint, such as model.path=outputs/quickstart/hf")
    if config.model.adapter is None and CheckpointSource.open(config.model.path).is_autoregressive:
        raise ValueError(
            f"model.path={config.model.path}: a causal model, which has not learnt to restore masked tokens; train it "
            "first (experiment=adapt_ar), or let Transformers' `generate` sample it from left to right"
        )
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    attention = attention_for(config.model.attn_implementation, device, dtype)
    settings = replace(config.model, attn_implementation=attention, lora_rank=0)  # an adapter is merged
    if device.type == "cuda" and config.model.quantize == "none":
        _check_weights_fit(CheckpointSource.open(config.model.path), dtype, device)
    with announced("loading the model"):
        model, tokenizer = build_model(settings, dtype=dtype)  # not cast later: that would round the rotary buffers
    _check_attention(config.model, model)
    if config.model.attention == "block" and model.block_length is None:
        raise ValueError(
            f"model.attention=block: config.json of {config.model.path} has no {model.family.block_key}: the model was "
            "trained to attend to all positions; train it with diffusion=block, or leave it out"
        )
    if config.model.attention == "full":
        model.block_length = None
    if config.model.quantize != "none":
        quantize(model, device)
    model = model.to(device).eval()
    prepare_sampling(model, config.sampling.compile, forwards=config.sampling.steps or config.sampling.max_new_tokens)
    return model, tokenizer


def _check_attention(config: ModelConfig, model: DiffLLM) -> None:
    """Refuse `varlen` for a model that it cannot forward without padding; `auto` pads its rows.

    Raises:
        ValueError: the message says which models those are.
    """
    if config.attn_implementation == "varlen" and not model.unpad:
        raise ValueError(
            "model.attn_implementation=varlen: not for layers with a window, dropout in the attention, or heads whose "
            "size is not a multiple of 8 up to 256; use auto or sdpa"
        )


def _check_weights_fit(source: CheckpointSource, dtype: torch.dtype, device: torch.device) -> None:
    """Refuse a model whose weights exceed the memory of a GPU, before they are read.

    Raises:
        ValueError: the message gives the memory needed and available.
    """
    needed = dtype.itemsize * sum(parameter.numel() for parameter in decoder_on_meta(source).parameters())
    if needed > (available := device_memory(device)):
        raise ValueError(
            f"does not fit: the weights need {needed / GIB:.1f} GiB, and {torch.cuda.get_device_name(device)} has "
            f"{available / GIB:.1f}. Use a GPU with more memory, or hide it: CUDA_VISIBLE_DEVICES= samples on the CPU"
        )


def _check_objective(config: Config, model: DiffLLM, device: torch.device) -> None:
    """Refuse a model that cannot attend or predict on the device as the objective needs it.

    Raises:
        ValueError: the message says what to change.
    """
    objective, attention = config.diffusion, config.model.attention
    name = f"diffusion.objective={objective.objective}"
    if attention != "auto" and (attention == "block") != (objective.block_length is not None):
        raise ValueError(
            f"model.attention={attention}: a run attends as {name} does. Leave it out, or choose "
            f"{'diffusion=block' if attention == 'block' else 'diffusion=elbo'}"
        )
    if objective.causal and not model.family.shift:
        raise ValueError(
            f"{name}: {model.family.architecture} predicts each token from its own position, which a causal model "
            "sees; choose a family that shifts, such as model.family=dream"
        )
    tiled = objective.copies > 1 and model.lm.config._attn_implementation == "varlen" and device.type == "cuda"
    if tiled and (size := head_size(model.lm.config)) < LEAST_HEAD:
        raise ValueError(
            f"{name}: FlexAttention needs heads of at least {LEAST_HEAD} dimensions on a GPU, and these have {size}; "
            "set model.attn_implementation=sdpa"
        )
    hiding = []  # settings that hide positions, and what does without
    if steps := objective.attention_annealing_steps:
        hiding.append((f"diffusion.attention_annealing_steps={steps}", "set it to 0"))
    if objective.causal or objective.block_length is not None:
        hiding.append((name, "choose diffusion=elbo"))
    for setting, advice in hiding:
        if model.windowed:
            raise ValueError(f"{setting}: some layers attend within a window, which it would ignore; {advice}")
        if model.flash:
            raise ValueError(
                f"{setting}: model.attn_implementation={config.model.attn_implementation} cannot hide positions; "
                f"use sdpa or varlen, or {advice}"
            )
    if config.data.packing and model.windowed:
        raise ValueError("data.packing=true: some layers of this model attend within a window; set it to false")


def build_trainable(config: Config, device: torch.device) -> tuple[DiffLLM, PreTrainedTokenizerBase]:
    """The model of a run with its adapters, and its tokenizer. Weights of a checkpoint stay on the meta device.

    Raises:
        ValueError: settings that the model cannot follow, or see `build_model`.
    """
    if config.model.loss_kernel == "liger" and device.type != "cuda":
        raise ValueError("model.loss_kernel=liger needs a GPU, and none is here; use chunked")
    attention = attention_for(config.model.attn_implementation, device, compute_dtype(config, device))
    if config.diffusion.copies > 1 and config.model.attn_implementation == "auto":
        attention = "varlen"  # needs no mask of the whole canvas
    settings = replace(config.model, attn_implementation=attention)
    quantized = config.model.quantize != "none"
    if quantized and not config.model.lora_rank:
        raise ValueError(f"model.quantize={config.model.quantize}: 4-bit weights are not trained; give model.lora_rank")
    model, tokenizer = build_model(settings, config.seed, frozen_dtype(config, device), empty=not quantized)
    _check_attention(config.model, model)
    if quantized:
        quantize(model, device)
    if config.model.lora_rank:
        add_lora(model, config.model, config.seed)
        if config.model.adapter is not None:
            load_adapter(model, config.model)
    if config.model.loss_kernel == "liger":
        model.masked_loss = liger()
    _check_objective(config, model, device)
    model.block_length = config.diffusion.block_length
    check_length(config.data, model.lm.config.max_position_embeddings)
    return model, tokenizer


def check_length(config: DataConfig, context: int) -> None:
    """Refuse rows that are longer than the context of the model.

    Raises:
        ValueError: the message gives both.
    """
    if config.max_length > context:
        raise ValueError(
            f"data.max_length={config.max_length}: the model's context is {context} tokens; set it to {context} or less"
        )


def build_batches(
    config: Config, tokenizer: PreTrainedTokenizerBase, layout: BatchLayout, noise: Noise, val_noise: Noise
) -> tuple[BatchSource, ValBatches | None, dict[str, Prepared]]:
    """Training batches, validation batches if any, and the rows of both with their reports.

    Args:
        noise, val_noise: corrupt the batches.

    Raises:
        ValueError: see `data.rows_of_files` and `_rows_of_tasks`; `data.subset` is more than all rows; or too few
            rows for a batch.
    """
    multiple = config.data.pad_to_multiple or config.diffusion.block_length
    data, eos = replace(config.data, pad_to_multiple=multiple), tokenizer.eos_token_id
    if data.packing:
        noise = partial(noise_and_pack, noise, data.max_length)
    rows = {}
    if data.streaming:
        train = StreamedBatches(data.train_files, data, tokenizer, layout, noise, config.seed)
    else:
        if data.train_files:
            prepared = rows_of_files(data.train_files, data, tokenizer, "training", curated=True)
        else:
            prepared = _rows_of_tasks(config, tokenizer, "train", "training", curated=True)
        rows["training"], report = prepared, prepared.report
        try:
            if data.val_split and not data.val_files:
                rows["training"], rows["validation"] = prepared, _ = _split(prepared, data.val_split, config.seed)
            if data.subset is not None:
                rows["training"] = prepared = _subset(prepared, data.subset, config.seed)
            train = TrainBatches(prepared.rows, data, layout, eos, noise, config.seed)
            report.padding_share = train.padding_share()
            report.epoch = dict(zip(report.sources, train.first_epoch(len(report.sources)).tolist(), strict=True))
        except ValueError as error:
            raise ValueError(f"{error}.\n{report.text()}") from error
    if data.val_files:
        rows["validation"] = rows_of_files(data.val_files, data, tokenizer, "validation", curated=False)
    elif not data.train_files and not data.val_split:
        rows["validation"] = _rows_of_tasks(config, tokenizer, "test", "validation", curated=False)
    val = ValBatches(rows["validation"].rows, layout, eos, val_noise) if "validation" in rows else None
    return train, val, rows


def _rows_of_tasks(
    config: Config, tokenizer: PreTrainedTokenizerBase, split: Literal["train", "test"], name: str, curated: bool
) -> Prepared:
    """Rows of a split of the tasks. Problems that cannot be used, or are test rows too, are in the report.

    Args:
        name, curated: see `data.rows_of`.

    Raises:
        ValueError: problems cannot be used, unless `data.on_bad_row=skip`.
    """
    tasks = tasks_of(config.data, config.task)
    rows = {task.name: task.rows(split) for task in tasks}
    prepared = rows_of(rows, config.data, tokenizer, name, curated=curated)
    for task in tasks:
        if config.data.on_bad_row == "error":
            task.bad.refuse()
        bad = Noted(task.bad.count, task.bad.named)
        for what, rows in (("cannot be used", bad), ("are test rows too", task.overlap)):
            if rows.count:
                prepared.report.read += rows.count
                prepared.report.dropped[f"problems of task.name={task.name} that {what}"] = rows
    return prepared


def _split(prepared: Prepared, share: float, seed: int) -> tuple[Prepared, Prepared]:
    """Rows to train on, and rows held out for validation."""
    held = held_out(prepared.rows, share, seed)
    report = Report("validation", sources=dict.fromkeys(prepared.report.sources, 0))
    validation = prepared.rows.select(np.flatnonzero(held))
    report.keep(validation)
    report.read = report.kept
    reason = f"held out for validation by data.val_split={share:g}"
    training = prepared.report.keep_only(prepared.rows, np.flatnonzero(~held), reason)
    return Prepared(training, prepared.report), Prepared(validation, report)


def _subset(prepared: Prepared, size: float, seed: int) -> Prepared:
    chosen = subset(len(prepared.rows), size, seed)
    rows = prepared.report.keep_only(prepared.rows, chosen, f"not in data.subset={size:g}")
    return Prepared(rows, prepared.report)


def frozen_dtype(config: Config, device: torch.device) -> torch.dtype:
    """Dtype that weights are kept in: float32 if they are trained, the compute dtype beside adapters."""
    return compute_dtype(config, device) if config.model.lora_rank else torch.float32


def compute_dtype(config: Config, device: torch.device) -> torch.dtype:
    """Dtype of the parameters in the forward and backward pass."""
    precision = config.trainer.precision
    bf16 = precision == "bf16" or (precision == "auto" and device.type == "cuda")
    return torch.bfloat16 if bf16 else torch.float32


def export_dtype(config: Config, source: CheckpointSource) -> torch.dtype:
    """Dtype of the exported weights, see `trainer.export_dtype`.

    Args:
        source: of the model; a config.json without a dtype counts as bf16.
    """
    if config.trainer.export_dtype != "auto":
        return EXPORT_DTYPES[config.trainer.export_dtype]
    given = source.published.get("dtype") or source.published.get("torch_dtype")
    return torch.float32 if config.model.path is None or given == "float32" else torch.bfloat16


def recommendation(config: Config) -> SamplingConfig | None:
    """Sampling settings for the export of a run; None keeps those of its checkpoint if the run has defaults alone.

    A causal model is not sampled by unmasking and has none.
    """
    defaults = config.model.path is not None and config.sampling == SamplingConfig()
    return None if defaults or config.diffusion.causal else config.sampling


def build_optimizer(model: DiffLLM, config: OptimConfig) -> Optimizer:
    """AdamW or Muon over the trained parameters, without decay on norms and biases.

    Raises:
        ValueError: 8-bit moments without torchao.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = muon_matrices(model) if config.name == "muon" else []
    others = [parameter for parameter in trained if not any(parameter is matrix for matrix in matrices)]
    groups = [
        {"params": [parameter for parameter in others if parameter.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [parameter for parameter in others if parameter.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    fused = {} if config.name == "adamw_8bit" else {"fused": True}
    settings = {"lr": config.lr, "betas": tuple(config.betas), **fused}
    if config.name == "muon":
        optimizer = Muon(matrices, groups, weight_decay=config.weight_decay, **settings)
    else:
        optimizer = _adamw(config.name)(groups, **settings)
    for group in optimizer.param_groups:
        group["initial_lr"] = config.lr  # the schedule multiplies it; torchao keeps `lr` in a float32 tensor
    return optimizer


def muon_matrices(model: DiffLLM) -> list[Tensor]:
    """The trained matrices inside the layers, which Muon optimizes."""
    layers = model.lm.get_decoder().layers
    return [parameter for parameter in layers.parameters() if parameter.requires_grad and parameter.ndim == 2]


def _adamw(name: str) -> type[Optimizer]:
    if name == "adamw":
        return AdamW
    try:
        from torchao.optim import AdamW8bit
    except ImportError as error:
        raise ValueError("optim.name=adamw_8bit needs torchao: pip install 'diffllm[torchao]'") from error
    return AdamW8bit


def set_lr(optimizer: Optimizer, config: OptimConfig, steps: int, done: int) -> float:
    """Set and return the learning rate of the step that follows `done` of `steps` steps.

    Each step makes a schedule and positions it by `last_epoch`: it needs no checkpoint, and skipped steps count.
    """
    make, arguments = LR_SCHEDULES[config.lr_schedule]
    decay = math.floor(config.decay_steps_ratio * steps)
    schedule = make(optimizer, warmup_steps(config, steps), **arguments(steps, decay), last_epoch=done - 1)
    return float(schedule.get_last_lr()[0])


def lr_of(config: OptimConfig, steps: int, done: int) -> float:
    """Learning rate of the step that follows `done` of `steps` steps."""
    nothing = AdamW([torch.zeros(1)], lr=config.lr)
    nothing.param_groups[0]["initial_lr"] = config.lr
    return set_lr(nothing, config, steps, done)

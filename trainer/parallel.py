"""A model over all ranks: FSDP2, activation checkpointing, compilation, weights read shard by shard, and sampling."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from diffllm import DiffLLM, ModelConfig
from diffllm.checkpoint_errors import readable
from diffllm.compilation import backend_of, is_compiled
from diffllm.diffusion.loss import compiled
from diffllm.loading import HEAD_OF_ITS_OWN, check_weights
from diffllm.lora import base_name
from diffllm.quantize import is_quantized
from trainer.build import compute_dtype
from trainer.config import Config, TrainerConfig
from trainer.distributed import Distributed

# Selective recomputation keeps the results of these operators: they take much time to recompute.
KEPT_OPERATORS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::_scaled_dot_product", "flash_attn::", "torch_attn::")


def shard(model: DiffLLM, distributed: Distributed, config: Config, passes: int = 0) -> None:
    """Shard the model over all ranks with FSDP2, layer by layer. Gradients are summed, never averaged.

    With `trainer.replicate` > 1 each copy is sharded over its own ranks (HSDP). In bf16 the forward and backward use
    bf16 parameters; trained parameters are kept, and gradients reduced, in float32. Weights on the meta device are read
    from the model's checkpoint: each rank reads its shard.

    Args:
        passes: forward passes of the run, for `model.compile=auto`.

    Raises:
        ValueError: `trainer.replicate` does not divide the ranks; see `read_weights` too.
    """
    settings = config.trainer
    compiling = is_compiled(config.model.compile, distributed.device, passes)
    recompute_activations(model, config.model, compiling)
    if compiling:
        compile_parts(model, config.model)
    policy = MixedPrecisionPolicy(
        param_dtype=compute_dtype(config, distributed.device),
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # loss weights stay float32; hidden states have the dtype of the embedding
    )
    # On one rank frozen weights, which have the dtype of the forward, would only be copied, unless from the host.
    # Packed ones stay whole on every rank.
    kept = distributed.size == 1 and not settings.cpu_offload
    whole = {p for p in model.parameters() if is_quantized(p) or (kept and not p.requires_grad)}
    split = partial(
        fully_shard,
        ignored_params=whole,
        mesh=build_mesh(distributed, settings.replicate),
        mp_policy=policy,
        offload_policy=CPUOffloadPolicy(pin_memory=distributed.device.type == "cuda")
        if settings.cpu_offload
        else OffloadPolicy(),
    )
    for layer in model.lm.get_decoder().layers:
        split(layer, reshard_after_forward=settings.reshard_after_forward)
    split(model)
    for part in sharded_parts(model) if distributed.size > 1 else ():  # alone, dividing by 1 would copy the gradients
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)  # gloo cannot scale in a reduction

    device = torch.device("cpu") if settings.cpu_offload else distributed.device
    empty = any(parameter.is_meta for parameter in model.parameters())

    def placed(tensor: Tensor) -> Tensor:
        if is_quantized(tensor):
            return tensor
        return torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.to(device)

    model._apply(placed)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(distributed.device))
    if empty:
        model.lm.tie_weights()
        read_weights(model, model.source.name)
    model.train()


@contextmanager
def gathered(model: DiffLLM, config: TrainerConfig) -> Iterator[None]:
    """Gather all weights of a sharded model on every rank, so that each samples on its own. Collective to enter.

    In the block `hidden` and `head` need no communication, so ranks may call them different numbers of times; do not
    call `forward`. Weights have the dtype of the forward. Afterwards the model is sharded again and in training mode.
    """
    parts = sharded_parts(model)
    # Registered in the block only: in training `forward` calls `hidden`, and FSDP would gather the root twice a step.
    register_fsdp_forward_method(model, "hidden")
    try:
        model.set_reshard_after_forward(False)
        for part in parts:
            part.unshard()
        model.eval()  # in training mode, layers that recompute activations ignore a cache
        with torch.compiler.set_stance("force_eager"):  # every new shape would be compiled
            yield
    finally:
        del model.hidden
        model.train()
        for layer in parts[:-1]:
            layer.set_reshard_after_forward(config.reshard_after_forward)
        reshard(model)


def sharded_parts(model: DiffLLM) -> tuple[nn.Module, ...]:
    """Layers, then the model: each is one FSDP unit."""
    return (*model.lm.get_decoder().layers, model)


def reshard(model: DiffLLM) -> None:
    """Free gathered weights of all layers and of the root; the method of FSDP frees those of one unit."""
    for part in sharded_parts(model):
        part.reshard()


def build_mesh(distributed: Distributed, replicate: int) -> DeviceMesh:
    """Mesh of all ranks, in one dimension or as replicate × shard.

    Raises:
        ValueError: `replicate` does not divide the ranks.
    """
    if distributed.size % replicate:
        raise ValueError(f"trainer.replicate={replicate}: must divide the {distributed.size} ranks")
    if replicate == 1:
        return init_device_mesh(distributed.device.type, (distributed.size,), mesh_dim_names=("shard",))
    shape = (replicate, distributed.size // replicate)
    return init_device_mesh(distributed.device.type, shape, mesh_dim_names=("replicate", "shard"))


def compile_parts(model: DiffLLM, config: ModelConfig) -> None:
    """Compile each layer, and the loss unless Liger computes it."""
    backend = backend_of(config.compile)
    for layer in model.lm.get_decoder().layers:
        layer.compile(backend=backend)
    if config.loss_kernel == "chunked":
        model.masked_loss = compiled(backend)


def recompute_activations(model: DiffLLM, config: ModelConfig, compiling: bool = False) -> None:
    """Apply activation checkpointing if `model.enable_gradient_checkpointing` is set.

    Compiled layers need none for selective recomputation: the compiler keeps products and attention, and computes the
    rest again.
    """
    if not config.enable_gradient_checkpointing or (compiling and config.recompute == "selective"):
        return
    arguments = {"use_reentrant": False}
    if config.recompute == "selective":
        arguments["context_fn"] = partial(create_selective_checkpoint_contexts, _kept_or_not)
    model.lm.activation_checkpointing_enable(arguments)


def _kept_or_not(context, operator, *args, **kwargs) -> CheckpointPolicy:
    kept = operator.name().startswith(KEPT_OPERATORS)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def read_weights(model: DiffLLM, source: str) -> None:
    """Read the weights of a published checkpoint into a sharded model, each rank its own slices. Collective.

    Raises:
        ValueError: no safetensors, or weights that are cut short, missing, unexpected or of another shape.
    """
    directory = Path(source)
    with readable(source, "the weights"):
        if not directory.is_dir():
            directory = Path(snapshot_download(source, allow_patterns=["*.safetensors"]))
        reader = HuggingFaceStorageReader(str(directory))
        saved = {name: tuple(item.size) for name, item in reader.read_metadata().state_dict_metadata.items()}
    if not saved:
        raise ValueError(f"model.path={source}: no .safetensors files; train from a checkpoint that has them")

    weights = _published_weights(model)
    unexpected = saved.keys() - weights.keys()
    head, embedding = map(model.family.published_name, ("lm_head.weight", "model.embed_tokens.weight"))
    if model.lm.config.tie_word_embeddings and {head, embedding} <= saved.keys():
        if not _equal_in_files(directory, head, embedding):
            raise ValueError(HEAD_OF_ITS_OWN.format(source))
        unexpected -= {head}
    both = sorted(saved.keys() & weights.keys())
    check_weights(
        source,
        weights.keys() - saved.keys(),
        unexpected,
        [(name, saved[name], weights[name].shape) for name in both if saved[name] != tuple(weights[name].shape)],
    )
    try:
        dcp.load(weights, storage_reader=reader)
    except CheckpointException as error:
        raise ValueError(f"model.path={source}: the weights cannot be read ({error})") from error


def _equal_in_files(directory: Path, *names: str) -> bool:
    tensors = {}
    for file in directory.glob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            tensors |= {name: weights.get_tensor(name) for name in names if name in weights.keys()}  # noqa: SIM118
    return torch.equal(*tensors.values())


def _published_weights(model: DiffLLM) -> dict[str, Tensor]:
    """Tensors of a model that a published checkpoint holds, by published name; adapters are left out."""
    kept = model.state_dict().keys()
    buffers = ((name, buffer) for name, buffer in model.named_buffers() if name in kept)
    return {
        model.family.published_name(plain.removeprefix("lm.")): tensor
        for name, tensor in chain(model.named_parameters(), buffers)
        if (plain := base_name(name)) is not None
    }

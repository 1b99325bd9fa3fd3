"""Compile parts of a model with torch.compile, and say what happens where that fails."""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, fx
from torch._dynamo.exc import TorchDynamoException

from data.storage import first_line

# Compiling takes up to a minute, and saves some milliseconds a layer and forward pass on an H200.
WORTH_PASSES = 500
RECOMPILATIONS = 64  # of a function, for other shapes and kinds of masks; torch gives up after 8


def is_compiled(setting: str, device: torch.device, passes: int) -> bool:
    """Whether `model.compile` compiles: `auto` does on a GPU, for at least WORTH_PASSES forward passes.

    Args:
        passes: forward passes of the run.
    """
    return setting == "true" or (setting == "auto" and device.type == "cuda" and passes >= WORTH_PASSES)


def set_compiler() -> None:
    """Set what torch keeps for each thread by itself: call it in the thread that calls compiled code."""
    if torch._dynamo.config.recompile_limit < RECOMPILATIONS:
        torch._dynamo.config.recompile_limit = RECOMPILATIONS
    # The code for the backward pass is made with that for the forward pass, so that its errors are met there too.
    if not torch._functorch.config.force_non_lazy_backward_lowering:
        torch._functorch.config.force_non_lazy_backward_lowering = True


def backend_of(setting: str) -> str | Callable[[fx.GraphModule, list[Tensor]], Callable]:
    """Backend for torch.compile. With `auto` a part that cannot be compiled runs as it is, after one warning."""
    set_compiler()
    return "inductor" if setting == "true" else _compile_or_warn


class CannotCompileError(ValueError):
    """FlexAttention must be compiled: as it is, it computes all pairs of positions."""


def compile_flex(graph: fx.GraphModule, inputs: list[Tensor]) -> Callable:
    """Backend for torch.compile without another way.

    Raises:
        CannotCompileError: compilation failed.
    """
    try:
        return torch._dynamo.lookup_backend("inductor")(graph, inputs)
    except Exception as error:
        raise CannotCompileError(
            f"FlexAttention cannot be compiled here ({first_line(error)}): set model.attn_implementation=sdpa"
        ) from error


def _compile_or_warn(graph: fx.GraphModule, inputs: list[Tensor]) -> Callable:
    if any("flex_attention" in str(node.target) for node in graph.graph.nodes):
        return compile_flex(graph, inputs)
    try:
        return torch._dynamo.lookup_backend("inductor")(graph, inputs)
    except Exception as error:  # of the compiler, its toolchain or the driver
        if is_first_rank():
            warnings.warn(f"not compiled, which is slower: {first_line(error)}", stacklevel=2)
        # Needs no toolchain, and recomputes in the backward pass what compiled code would.
        return torch._dynamo.lookup_backend("aot_eager_decomp_partition")(graph, inputs)


def is_first_rank() -> bool:
    """Whether this process is rank 0, or alone."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def refusing_failures(name: str, setting: str) -> Iterator[None]:
    """Turn an error of the compiler into one line.

    Args:
        name: of the setting.

    Raises:
        ValueError: compilation failed, and the setting is `true`.
        CannotCompileError: that of FlexAttention failed.
    """
    try:
        yield
    except TorchDynamoException as error:
        inner = getattr(error, "inner_exception", error)
        if isinstance(inner, CannotCompileError):
            raise inner from error
        if setting != "true":
            raise
        reason = first_line(inner)
        raise ValueError(f"{name}=true: compilation failed ({reason}); set {name}=auto or false") from error

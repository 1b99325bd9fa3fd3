"""Sampling without the host's work: compiled layers and ratings, and CUDA graphs of forwards that occur again.

A forward of few positions takes the GPU less time than the host needs to launch its kernels. A graph launches all of
them at once; it is bound to the shapes, and to the memory, with which it was captured.
"""

import sys
import warnings
from collections import Counter, deque
from collections.abc import Callable
from functools import wraps
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from data.storage import first_line
from diffllm.compilation import backend_of, is_first_rank, refusing_failures, set_compiler
from diffllm.families import has_dynamic_rotary
from diffllm.modeling_diffllm import DiffLLM
from sampling import CanvasCache
from sampling.confidence import Proposal, Rating, rate

# On an H200 a graph saved 18 of 23 ms for 1×32 positions of a 7B model, and nothing for 16×384.
MOST_POSITIONS = 4096
WORTH_FORWARDS = 2000  # of a run, for compiled layers: they take about a minute
# A capture takes as long as some plain forwards, and a graph saves most of one. A shape that has occurred so often
# among the last RECENT forwards will probably do so again.
CAPTURED_AT, RECENT = 6, 500
MOST_GRAPHS = 64


def prepare_sampling(model: DiffLLM, setting: str, forwards: int = 0) -> None:
    """Let a model sample with CUDA graphs, and with compiled layers if the run is long enough. May be called again.

    Args:
        setting: `sampling.compile`: `auto` captures graphs on a GPU, and compiles for at least WORTH_FORWARDS · `true`
            does both, and compiles on a CPU too · `false` does neither.
        forwards: of the run.

    Raises:
        ValueError: another setting, or `true` and a model that cannot be captured.
    """
    setting, on_gpu = str(setting).lower(), model.device.type == "cuda"
    if setting not in ("auto", "true", "false"):
        raise ValueError(f"sampling.compile={setting}: choose one of auto, true, false")
    refused = model.windowed or model.flash or has_dynamic_rotary(model.lm.config)
    if setting == "true" and refused:
        raise ValueError(
            "sampling.compile=true: not for layers with a window or FlashAttention, or rotary embeddings that depend "
            "on the length; set it to auto or false"
        )
    if setting == "false" or refused or not (on_gpu or setting == "true"):
        return
    compiled = model.static is not None and model.static.compiled
    if not compiled and (setting == "true" or forwards >= WORTH_FORWARDS):
        compile_sampling(model, setting)
        compiled = True
    if model.static is None or model.static.compiled != compiled:
        failed = model.static is not None and model.static.capture is None
        capture = CudaGraphs(model.device) if on_gpu and not failed else None
        model.static = StaticForward(model.decode, setting, capture, compiled)


def compile_sampling(model: DiffLLM, setting: str) -> None:
    """Compile the forward of each layer, and the rating of tokens.

    Each layer gets its own part of the cache, so that all share their compilations.
    """
    if is_first_rank():
        print("compiling for sampling: the first forwards take up to a minute", file=sys.stderr, flush=True)
    layers = model.lm.get_decoder().layers
    plain = type(layers[0]).forward
    compiled = torch.compile(plain, backend=backend_of(setting))
    for number, layer in enumerate(layers):  # methods, so that those of a copied layer use its own weights
        layer.forward = MethodType(_with_own_cache(plain, compiled, number, setting), layer)
    model.rating = compiled_rating(setting)


def compiled_rating(setting: str) -> Rating:
    """Compiled `rate`. It leaves the logits as they are; one compilation serves all numbers of candidates above 1."""

    def rate_copy(logits: Tensor, *more: Any) -> Proposal:
        return rate(logits.clone(), *more)  # without it the compiled code would write its changes to the logits

    compiled = torch.compile(rate_copy, dynamic=True, backend=backend_of(setting))

    def run(*arguments: Any) -> Proposal:
        set_compiler()
        with refusing_failures("sampling.compile", setting):
            return compiled(*arguments)

    return run


def _with_own_cache(plain: Callable, compiled: Callable, number: int, setting: str) -> Callable:
    @wraps(plain)
    def run(layer, *arguments, past_key_values=None, **settings):
        if past_key_values is not None:
            past_key_values = past_key_values.of_layer(number)
            if past_key_values.keys is None:  # its memory is made outside of compiled code
                return plain(layer, *arguments, past_key_values=past_key_values, **settings)
        set_compiler()
        with refusing_failures("sampling.compile", setting):
            return compiled(layer, *arguments, past_key_values=past_key_values, **settings)

    return run


class StaticForward:
    """Calls the decoder, through a graph once a shape has occurred CAPTURED_AT times lately.

    Args:
        decode: `DiffLLM.decode`.
        setting: `sampling.compile`; with `auto` a graph that cannot be captured is a warning, with `true` an error.
        capture: makes a replay of a function without arguments; None captures nothing.
        compiled: the layers are.
    """

    def __init__(self, decode: Callable[..., Tensor], setting: str, capture: Callable | None, compiled: bool = False):
        self.decode, self.setting, self.capture, self.compiled = decode, setting, capture, compiled
        self.recent: deque[tuple] = deque()  # shapes of the last forwards
        self.seen: Counter[tuple] = Counter()  # how often each is among them
        self.graphs: dict[tuple, tuple[Callable[[], Tensor], list[Tensor]]] = {}

    def __deepcopy__(self, memo: dict) -> None:
        """A copied model has none: graphs compute with the weights of the original."""

    def takes(self, positions: int) -> bool:
        """Whether forwards of so many positions are captured."""
        return self.capture is not None and positions <= MOST_POSITIONS

    def __call__(
        self, input_ids: Tensor, position_ids: Tensor, mask: Tensor | None, cache: CanvasCache | None
    ) -> Tensor:
        """[B, Q, D] hidden states; the next call overwrites them."""
        if not self.takes(input_ids.numel()):
            return self.decode(input_ids, position_ids, mask, cache)
        given = [input_ids, position_ids, *([] if mask is None else [mask])]
        indices = [] if cache is None else cache.indices()
        key = (None if cache is None else cache.shape(), *(tuple(tensor.shape) for tensor in (*given, *indices)))
        self._count(key)
        if key not in self.graphs:
            if self.seen[key] >= CAPTURED_AT:
                self._capture(key, given, cache)
            if key not in self.graphs:
                return self.decode(input_ids, position_ids, mask, cache)
        replay, inputs = self.graphs[key] = self.graphs.pop(key)  # the last one used is the last one dropped
        for kept, new in zip(inputs, (*given, *indices), strict=True):
            kept.copy_(new)
        return replay()

    def _count(self, key: tuple) -> None:
        """Count a shape among those of the last RECENT forwards."""
        self.recent.append(key)
        self.seen[key] += 1
        if len(self.recent) > RECENT:
            oldest = self.recent.popleft()
            self.seen[oldest] -= 1
            if not self.seen[oldest]:
                del self.seen[oldest]

    def _capture(self, key: tuple, given: list[Tensor], cache: CanvasCache | None) -> None:
        """Capture a graph with inputs of its own.

        Raises:
            ValueError: it cannot be captured, and `sampling.compile=true`.
            torch.OutOfMemoryError: the forward does not fit.
        """
        inputs = [tensor.clone() for tensor in given]
        indices = [] if cache is None else cache.use_copies()
        mask = inputs[2] if len(inputs) > 2 else None
        try:
            replay = self.capture(lambda: self.decode(*inputs[:2], mask, cache))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            error = error.__context__ or error  # the end of a capture hides what went wrong in it
            if self.setting == "true":
                raise ValueError(
                    f"sampling.compile=true: no CUDA graph can be captured ({first_line(error)}); set auto or false"
                ) from error
            warnings.warn(f"no CUDA graphs, which is slower: {first_line(error)}", stacklevel=2)
            self.capture = None
            self.graphs.clear()
            return
        if cache is not None:  # those of buffers that it had before never come again
            number, generation, *_ = cache.shape()
            for other in [other for other in self.graphs if other[0] and other[0][0] == number]:
                if other[0][1] != generation:
                    del self.graphs[other]
        self.graphs[key] = replay, [*inputs, *indices]
        if len(self.graphs) > MOST_GRAPHS:
            del self.graphs[next(iter(self.graphs))]


class CudaGraphs:
    """Captures functions as CUDA graphs. They share memory: read an output before the next graph runs."""

    def __init__(self, device: torch.device):
        self.device, self.pool = device, torch.cuda.graph_pool_handle()
        with torch.cuda.device(device):
            self.stream = torch.cuda.Stream()  # one for all, as cuBLAS keeps memory for each

    def __call__(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """A function that launches the kernels of `run` and returns its tensor, overwritten."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device):
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                for _ in range(2):  # what is made in the first calls must not be captured
                    run()
            torch.cuda.current_stream().wait_stream(self.stream)
            # The outer block restores the stream if the capture fails, which torch's own does not.
            with (
                torch.cuda.stream(torch.cuda.current_stream()),
                torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local"),
            ):
                output = run()

        def replay() -> Tensor:
            with torch.cuda.device(self.device):
                graph.replay()
            return output

        return replay

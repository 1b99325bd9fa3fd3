"""What can be known of a GPU without one: all tensors are where they are needed, and the host waits once a step.

Each test calls a function in a process with a pretended GPU, which no other test may have.
"""

import copy
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import pytest
import torch
from torch import Tensor

from data import Batch
from diffllm import DiffLLM, new_model
from diffllm.attention import visibility_of
from diffllm.diffusion import Objective, build_objective
from diffllm.diffusion.block import BlockConfig
from diffllm.diffusion.causal import CausalConfig
from diffllm.diffusion.masked import DiffusionConfig
from diffllm.static_forward import StaticForward
from diffllm.tokenizer import builtin_tokenizer
from sampling import Canvas, SamplingConfig, sample, score
from sampling.sampler import Sampler
from tests.conftest import small_shape
from tests.diffllm.diffusion.test_block import rows

PROMPTS = [([5, 6, 7, 8, 9], 12), ([20, 21], 9), ([40, 41, 42], 12)]
BLOCK = 4


@pytest.fixture(scope="module")
def on_pretended() -> Iterator[Callable[..., Any]]:
    """Calls a function in a process of its own."""
    with ProcessPoolExecutor(1, get_context("forkserver")) as process:
        yield lambda function, *arguments: process.submit(function, *arguments).result()


def _model(block_length: int | None = None) -> DiffLLM:
    model = new_model(small_shape(initializer_range=0.3), builtin_tokenizer()).eval()
    model.block_length = block_length
    return model


def _refusals() -> tuple[list[str], int]:
    """What operators on tensors of two devices raise, and how often the host waited for three others."""
    from tests.pretended_gpu import DEVICE, pretended_gpu

    errors = []
    with pretended_gpu() as gpu:
        here, there = torch.ones(3), torch.ones(3).pin_memory().to(DEVICE, non_blocking=True)
        for operator in (lambda: here + there, lambda: here[there.long()], lambda: torch.where(there > 0, here, here)):
            try:
                operator()
            except RuntimeError as error:
                errors.append(str(error))
        assert not gpu.waits
        there.add_(1).sum().item()
        assert here.to(DEVICE).cpu().tolist() == [1, 1, 1]
    return errors, gpu.waits.total()


def test_what_a_gpu_refuses_and_waits_for(on_pretended):
    errors, waits = on_pretended(_refusals)
    assert len(errors) == 3
    assert all("tensors of two devices" in error for error in errors)
    assert waits == 3


def _filled(model: DiffLLM, config: SamplingConfig) -> tuple[list[list[int]], int]:
    """Tokens of the prompts' canvases, and the number of steps that they took together."""
    sampler, rows, steps = Sampler(model, config, model.special_tokens), [], 0
    for number, (prompt, new) in enumerate(PROMPTS):
        sampler.add(Canvas.after(prompt, new, model.mask_token_id, number))
    while len(sampler):
        rows += sampler.step()
        steps += 1
    return [row.tokens for row in sorted(rows, key=lambda row: row.canvas.row_id)], steps


def _sampled(changes: dict[str, Any], block_length: int | None) -> tuple[bool, int, int]:
    """Whether the tokens are those of the CPU, the number of waits, and the number of steps."""
    from tests.pretended_gpu import DEVICE, pretended_gpu

    model, config = _model(block_length), SamplingConfig(**{"steps": 6, "stop_at_eos": False} | changes)
    expected, steps = _filled(model, config)
    with pretended_gpu() as gpu:
        model = copy.deepcopy(model).to(DEVICE)
        if block_length is None:
            model.static = StaticForward(model.decode, "auto", None)  # the shapes and the memory of graphs
        gpu.waits.clear()
        tokens, _ = _filled(model, config)
    return tokens == expected, gpu.waits.total(), steps


@pytest.mark.parametrize("block_length", [None, BLOCK])
@pytest.mark.parametrize(
    "changes",
    [
        {"alg": "entropy"},
        {"alg": "topk_margin", "temperature": 0.7, "top_k": 5},
        {"alg": "origin", "cfg_scale": 0.5},
        {"temperature": 0.7, "remask": 0.5, "eos_penalty": 1.0, "min_new_tokens": 4},
        {"cache": "dual", "block_length": 4, "transfer": "threshold", "threshold": 0.05},
        {"cache": "delayed", "cache_refresh": 3},
    ],
    ids=str,
)
def test_sampling_waits_once_a_step(on_pretended, changes, block_length):
    same, waits, steps = on_pretended(_sampled, changes, block_length)
    assert same
    assert waits == steps


def _whole(model: DiffLLM) -> list[list[int] | float]:
    """Results of hooks, of a nucleus, and of a likelihood."""
    config = SamplingConfig(steps=6, max_new_tokens=12, stop_at_eos=False)
    prompts = torch.tensor([[5, 6, 7], [8, 9, 10]]).to(model.device)
    hooks = {"tokens_hook": lambda step, x, logits: x, "logits_hook": lambda step, x, logits: logits * 2}
    hooked = sample(model, prompts, config, model.special_tokens, **hooks).sequences.tolist()
    nucleus = SamplingConfig(steps=6, temperature=0.7, top_p=0.9, stop_at_eos=False)
    return [*hooked, *_filled(model, nucleus)[0], score(model, [5, 6], [7, 8, 9], model.special_tokens, 8).mean]


def _all_alike() -> tuple[list, list]:
    from tests.pretended_gpu import DEVICE, pretended_gpu

    model = _model()
    expected = _whole(model)
    with pretended_gpu():
        return _whole(model.to(DEVICE)), expected


def test_hooks_nuclei_and_likelihoods(on_pretended):
    found, expected = on_pretended(_all_alike)
    assert found[:-1] == expected[:-1]
    assert found[-1] == pytest.approx(expected[-1])


def _objective(name: str) -> Objective:
    settings = {"masked": DiffusionConfig(), "block": BlockConfig(block_length=BLOCK), "causal": CausalConfig()}[name]
    return build_objective(settings, mask_token_id=1, seed=0)


def _step(model: DiffLLM, objective: Objective, batch: Batch) -> tuple[Tensor, ...]:
    """Loss, sums, and a gradient."""
    output = objective.loss(model, batch)
    output.loss.backward()
    return output.loss.detach(), objective.measure(batch, output), model.lm.lm_head.weight.grad


def _trained(name: str) -> tuple[list[Tensor], list[Tensor], int]:
    """Results of a step here and there, and the number of waits."""
    from tests.pretended_gpu import DEVICE, pretended_gpu

    model, objective = _model(), _objective(name)
    batch = objective.corrupt(rows(), epoch=0)
    expected = _step(copy.deepcopy(model), objective, batch)
    with pretended_gpu() as gpu:
        model.to(DEVICE)
        gpu.waits.clear()
        results = _step(model, objective, batch)
        waits = gpu.waits.total()
        return [tensor.cpu() for tensor in results], list(expected), waits


@pytest.mark.parametrize("name", ["masked", "block", "causal"])
def test_a_step_waits_for_nothing_before_its_sums_are_read(on_pretended, name):
    found, expected, waits = on_pretended(_trained, name)
    torch.testing.assert_close(found, expected)
    assert waits == 0


def _masked_on_the_host() -> tuple[float, float]:
    from tests.pretended_gpu import DEVICE, pretended_gpu

    model, batch = _model(), _objective("masked").corrupt(rows(), epoch=0)
    names, seen = ("x_t", "input_ids", "weights", "position_ids"), visibility_of(batch)

    def loss() -> float:
        x_t, x_0, weights, position_ids = (batch[name].to(model.device) for name in names)
        return model(x_t, x_0, batch["masked"], weights, position_ids=position_ids, visibility=seen).loss.item()

    expected = loss()
    with pretended_gpu():
        model.to(DEVICE)
        return loss(), expected


def test_masked_positions_may_be_on_the_host(on_pretended):
    found, expected = on_pretended(_masked_on_the_host)
    assert found == pytest.approx(expected)

"""What only a GPU can show. Each test calls a function in a process that sees the GPUs; all others see none."""

import warnings
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from data import Batch
from diffllm import DiffLLM, load_model
from diffllm.compilation import is_compiled
from diffllm.diffusion import ObjectiveConfig, build_objective
from diffllm.diffusion.block import BlockConfig
from diffllm.diffusion.causal import CausalConfig
from diffllm.diffusion.masked import DiffusionConfig
from diffllm.static_forward import StaticForward, prepare_sampling
from sampling import SamplingConfig, sample
from sampling.canvas import count_positions, left_pad
from tests.benchmarks.near_ties import first_difference
from tests.conftest import GOLDEN, small_config
from tests.trainer.runs import joined, losses, metrics, newest, train
from trainer.config import Config
from trainer.distributed import init_distributed
from trainer.fsdp_sft_trainer import FSDPSFTTrainer
from trainer.parallel import compile_parts

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")
SAMPLING = SamplingConfig(max_new_tokens=24, steps=24, stop_at_eos=False)


@pytest.fixture
def config(equations, tmp_path):
    """Runs of 200 steps in bf16, unless changed."""
    return partial(_config, equations, tmp_path)


def _config(equations, tmp_path, name, **changes) -> Config:
    return small_config(equations, tmp_path / name, **{"trainer__max_steps": 200} | changes)


def test_bf16_trains_as_float32_does(on_gpu, config):
    """Within 2 % of the same bound after 200 steps."""
    bounds = []
    for precision in ("bf16", "fp32"):
        run = on_gpu(train, config(precision, trainer__precision=precision))
        bounds.append(metrics(run)[-1]["val/elbo"])
    assert bounds[0] == pytest.approx(bounds[1], rel=0.02)


def test_runs_resume_after_saves_in_the_background(on_gpu, config):
    """The second save is the one that failed with torch 2.11; the optimizer is the fused one."""
    settings = {"trainer__save_checkpoint_steps": 4, "trainer__precision": "fp32"}
    constant = {"optim__lr_schedule": "constant", "optim__warmup_steps_ratio": 0.0}
    whole = on_gpu(train, config("whole", trainer__max_steps=12, **settings, **constant))
    assert newest(whole).name == "step_00000012"
    on_gpu(train, config("parts", trainer__max_steps=8, **settings, **constant))
    resumed = on_gpu(train, config("parts", trainer__max_steps=12, **settings, **constant))
    assert losses(resumed) == pytest.approx(losses(whole), rel=1e-6)


def _waits(config: Config) -> list[int]:
    """Number of times that each step waited for the GPU."""
    waits, step = [], FSDPSFTTrainer.train_step

    def counted(self, *arguments):
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                return step(self, *arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")
            waits.append(sum("synchronizing CUDA" in str(warning.message) for warning in caught))

    FSDPSFTTrainer.train_step = counted
    try:
        train(config)
    finally:
        FSDPSFTTrainer.train_step = step
    return waits


@pytest.mark.parametrize("attention", ["varlen", "sdpa"])
def test_a_step_waits_once(on_gpu, config, attention):
    waits = on_gpu(_waits, config(attention, trainer__max_steps=6, model__attn_implementation=attention))
    assert set(waits[2:]) == {1}


def _model(dtype: torch.dtype, attention: str = "sdpa") -> DiffLLM:
    torch.set_float32_matmul_precision("highest")
    return load_model(GOLDEN / "dream_tiny", dtype, attention).to(DEVICE).eval()


def _batch() -> Batch:
    """Three ragged rows."""
    torch.manual_seed(0)
    columns, first = torch.arange(96), torch.tensor([[0], [40], [70]])
    return {
        "input_ids": torch.randint(200, (3, 96)),
        "maskable": columns >= first + 10,
        "attention_mask": (columns >= first).long(),
        "position_ids": count_positions(columns >= first),
        "sample_index": torch.arange(3),
        "slot": torch.arange(3),
        "batch_size": torch.full((3,), 3),
    }


def _loss_and_gradient(model: DiffLLM, settings: ObjectiveConfig) -> tuple[float, list[torch.Tensor]]:
    objective = build_objective(settings, model.mask_token_id, seed=0)
    batch = objective.corrupt(_batch(), epoch=0)
    model.zero_grad()
    loss = objective.loss(model, batch).loss / objective.denominator(batch)
    loss.backward()
    return loss.item(), [parameter.grad.float().cpu() for parameter in model.parameters()]


def _distances(dtype: torch.dtype, settings: ObjectiveConfig) -> dict[str, tuple[float, float]]:
    """Relative distance of loss and gradient from those with padding and masks, in float32 and eager, of other ways."""
    expected, exact = _loss_and_gradient(_model(torch.float32), settings)
    norm = torch.cat([grad.flatten() for grad in exact]).norm()
    distances = {}
    padded = dtype == torch.float32 and settings.copies == 1  # which FlashAttention does not take
    for attention in ("sdpa",) if padded else ("sdpa", "varlen"):
        for compiling in (False, True):
            model = _model(dtype, attention)
            if compiling:
                compile_parts(model, Config().model)
            loss, gradient = _loss_and_gradient(model, settings)
            far = torch.cat([(a - b).flatten() for a, b in zip(gradient, exact, strict=True)]).norm() / norm
            distances[f"{attention} {'compiled' if compiling else 'eager'}"] = abs(loss / expected - 1), float(far)
    return distances


@pytest.mark.parametrize("settings", [DiffusionConfig(), BlockConfig(block_length=8), CausalConfig()], ids=str)
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, (1e-4, 1e-4)), (torch.bfloat16, (0.02, 0.2))])
def test_every_way_to_compute_a_step_is_the_same(on_gpu, dtype, most, settings):
    """With blocks, `varlen` is FlexAttention."""
    distances = on_gpu(_distances, dtype, settings)
    assert all(loss < most[0] and gradient < most[1] for loss, gradient in distances.values()), distances


def _prompts() -> tuple[torch.Tensor, torch.Tensor]:
    """Three prompts of unequal length, left-padded."""
    ids, attended = left_pad([range(10, 18), range(50, 74), [99]], 0)
    return ids.to(DEVICE), attended.to(DEVICE)


def _alone_and_together(
    config: SamplingConfig, block_length: int | None = None
) -> tuple[list[list[int]], list[list[int]]]:
    """Responses to the prompts in one batch and one by one, in float32."""
    model, (ids, attended) = _model(torch.float32), _prompts()
    model.block_length = block_length
    together = sample(model, ids, config, model.special_tokens, attended).sequences[:, ids.shape[1] :].tolist()
    alone = []
    for row in range(len(ids)):
        own = attended[row].bool()
        one = sample(model, ids[row : row + 1, own], config, model.special_tokens, row_ids=[row])
        alone.append(one.sequences[0, int(own.sum()) :].tolist())
    return together, alone


@pytest.mark.parametrize("block_length", [None, 8])
@pytest.mark.parametrize("alg", ["entropy", "maskgit_plus", "topk_margin", "origin"])
def test_a_row_does_not_depend_on_its_batch(on_gpu, alg, block_length):
    together, alone = on_gpu(_alone_and_together, replace(SAMPLING, alg=alg), block_length)
    assert together == alone


def test_blocks_are_exact_in_their_cache(on_gpu):
    exact, _ = on_gpu(_alone_and_together, replace(SAMPLING, cache="none"), 8)
    cached, _ = on_gpu(_alone_and_together, SAMPLING, 8)
    assert cached == exact


@pytest.mark.parametrize("cache", ["prefix", "dual", "delayed"])
def test_a_cache_refreshed_at_every_forward_is_exact(on_gpu, cache):
    exact, _ = on_gpu(_alone_and_together, SAMPLING)
    cached, _ = on_gpu(_alone_and_together, replace(SAMPLING, cache=cache, cache_refresh=1))
    assert cached == exact


def _graphs(config: SamplingConfig, block_length: int | None) -> tuple[bool, int]:
    """Whether sampling through CUDA graphs gives the tokens of plain forwards, in bf16, and the number of graphs."""
    model, (ids, attended) = _model(torch.bfloat16), _prompts()
    model.block_length = block_length
    model.static = StaticForward(model.decode, "auto", None)  # the same shapes, so the same kernels
    plain = sample(model, ids, config, model.special_tokens, attended).sequences
    model.static = None
    prepare_sampling(model, "auto")
    same = [torch.equal(sample(model, ids, config, model.special_tokens, attended).sequences, plain) for _ in range(2)]
    return all(same), len(model.static.graphs)


@pytest.mark.parametrize("cache", ["none", "prefix", "dual", "delayed", "block"])
def test_graphs_change_no_token(on_gpu, cache):
    config = replace(SAMPLING, cache=cache, block_length=8)
    same, graphs = on_gpu(_graphs, config, 8 if cache == "block" else None)
    assert same
    assert graphs


def _compiled() -> float:
    """Share of the tokens, sampled through compiled layers and ratings in float32, that differ from plain forwards."""
    model, (ids, attended) = _model(torch.float32), _prompts()
    model.static = StaticForward(model.decode, "auto", None)  # the same shapes
    plain = sample(model, ids, SAMPLING, model.special_tokens, attended).sequences
    model.static = None
    prepare_sampling(model, "true")
    return float((sample(model, ids, SAMPLING, model.special_tokens, attended).sequences != plain).float().mean())


def test_compiled_layers_change_no_token(on_gpu):
    assert on_gpu(_compiled) == 0


def _tie() -> float:
    """How near the two choices are, by float32, where sampling in bf16 first differs from it; 0 if it never does."""
    config = replace(SAMPLING, alg="maskgit_plus")
    ids = torch.arange(10, 26, device=DEVICE)[None]
    exact, rounded = (
        sample(model, ids, config, model.special_tokens, history=True).history
        for model in (_model(torch.float32), _model(torch.bfloat16))
    )
    model = _model(torch.float32)
    before = F.pad(ids, (0, config.max_new_tokens), value=model.mask_token_id)
    return first_difference(model, before, exact, rounded, config)


def test_bf16_differs_from_float32_at_near_ties_only(on_gpu):
    assert on_gpu(_tie) < 0.05


def _rank(rank: int, config: Config, port: int) -> None:
    with joined(rank, 2, port) as distributed:
        FSDPSFTTrainer(config, distributed).fit()


def _spawn(config: Config) -> None:
    from tests.trainer.runs import free_port

    torch.multiprocessing.start_processes(_rank, (config, free_port()), 2, start_method="spawn")


def test_two_gpus_train_as_one(on_gpu, config):
    if on_gpu(torch.cuda.device_count) < 2:
        pytest.skip("needs two GPUs")
    settings = {"trainer__precision": "fp32", "trainer__max_steps": 12}
    one, two = config("one", **settings), config("two", **settings)
    on_gpu(train, one)
    on_gpu(_spawn, two)
    assert losses(two.trainer.output_dir) == pytest.approx(losses(one.trainer.output_dir), rel=1e-5)


def _attention(config: Config) -> tuple[str, bool]:
    """The attention of a run's model, and whether it is compiled."""
    with init_distributed() as distributed:
        trainer = FSDPSFTTrainer(config, distributed)
        return trainer.model.lm.config._attn_implementation, trainer.model.masked_loss.__name__ == "compiled_loss"


def test_long_runs_are_compiled_and_unpadded_by_default(on_gpu, config):
    long = config("long", trainer__max_steps=10_000)
    assert is_compiled("auto", DEVICE, 10_000)
    assert on_gpu(_attention, long) == ("varlen", True)
    assert on_gpu(_attention, config("short", trainer__max_steps=10)) == ("varlen", False)

"""Each rank samples its own prompts from a sharded model, and training is not affected."""

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor

from diffllm.generate import generate
from diffllm.lora import add_lora
from sampling import SamplingConfig
from sampling.config import ALGS, CACHES
from tests.trainer.runs import free_port, joined, losses, start_ranks, weights
from trainer.build import build_model, compute_dtype
from trainer.fsdp_sft_trainer import FSDPSFTTrainer
from trainer.parallel import gathered, reshard

SAMPLING = SamplingConfig(max_new_tokens=16, steps=6, block_length=8, temperature=0.7, batch_size=2)
EVERY = [
    *(replace(SAMPLING, alg=alg) for alg in ALGS),
    *(replace(SAMPLING, cache=cache) for cache in CACHES if cache not in ("auto", "none", "block")),
    replace(SAMPLING, transfer="threshold", threshold=0.01, cfg_scale=1.0, cache="dual"),
    replace(SAMPLING, remask=0.5),
]


def samples(model, trainer, rank, configs):
    """Row, text and forwards of each response; ranks have unequally many prompts and canvases, rank 0 none."""
    rows = trainer.rows["validation"].rows
    prompts = [rows.ids(row)[: rows.prompt_lengths[row] - row].tolist() for row in range(2 * rank)]
    return [
        [(response.row_id, response.text, response.nfe) for response in generate(model, trainer.tokenizer, prompts, c)]
        for c in (replace(config, max_new_tokens=8 + 8 * rank) for config in configs)
    ]


def unsharded(trainer):
    """The model of a trainer with all its weights, in the dtype of the forward."""
    config = trainer.config
    model, _ = build_model(config.model, config.seed)
    if config.model.lora_rank:
        add_lora(model, config.model, config.seed)
    sharded = trainer.model.state_dict()  # also of layers that a validation left gathered
    for name, parameter in model.named_parameters():
        parameter.data = sharded[name].full_tensor().to(compute_dtype(config, trainer.distributed.device))
    return model.eval()


def sample_while_training(trainer, configs):
    """Do more than `ValSamples` does at a validation, which is between two steps."""
    model, distributed, settings, as_it_is = trainer.model, trainer.distributed, trainer.config, trainer.val_samples
    layers, rank = model.lm.get_decoder().layers, distributed.rank

    def sample():
        random = torch.get_rng_state()
        whole = unsharded(trainer)
        with suppress(InterruptedError), gathered(model, settings.trainer):
            if rank != 1:  # which leaves with an error while others sample
                samples(model, trainer, rank, configs[:1])
            raise InterruptedError
        with gathered(model, settings.trainer):
            found = samples(model, trainer, rank, configs)
        assert found == samples(whole, trainer, rank, configs)
        forwards = distributed.gather(sum(nfe for responses in found for *_, nfe in responses))
        assert forwards[0] == 0
        assert len(set(forwards)) == distributed.size

        answers = as_it_is()
        prompts = [row.ids(i)[: row.prompt_lengths[i]].tolist() for row in [trainer.val_batches.rows] for i in range(3)]
        expected = generate(whole, trainer.tokenizer, prompts, settings.sampling)
        texts = [response.text for response in sorted(expected, key=lambda response: response.row_id)]
        assert [answer.response for answer in answers] == (texts if distributed.is_main else [])

        assert model.training
        assert torch.equal(random, torch.get_rng_state())
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
        with torch.no_grad():
            trainer.val_objective.loss(model, next(iter(trainer.val_batches)))
        for layer in layers:
            sharded = all(isinstance(parameter, DTensor) for parameter in layer.parameters())
            assert sharded == settings.trainer.reshard_after_forward
        reshard(model)
        trainer.val_samples = as_it_is  # once is enough
        return answers

    return sample


def _rank(rank, ranks, runs, port):
    with joined(rank, ranks, port) as distributed:
        for config, configs in runs:
            trainer = FSDPSFTTrainer(config, distributed)
            if configs:
                trainer.val_samples = sample_while_training(trainer, configs)
            trainer.fit()


def check(small_run, start, ranks, **variants):
    """Runs that sample train as runs that do not, and their samples are those of the unsharded model."""
    pairs, runs = [], []
    for name, (configs, changes) in variants.items():
        settings = {"trainer__max_steps": 3, "trainer__val_check_interval": 2, **changes}
        plain, sampled = small_run(name, **settings), small_run(f"{name}-sampled", **settings)
        sampled.trainer.val_samples, sampled.sampling = 3, SAMPLING
        pairs.append((Path(plain.trainer.output_dir), Path(sampled.trainer.output_dir)))
        runs += [(plain, []), (sampled, configs)]
    start(_rank, ranks, runs)
    for plain, sampled in pairs:
        assert losses(sampled) == losses(plain)
        assert all(torch.equal(tensor, weights(sampled)[name]) for name, tensor in weights(plain).items())


def test_two_ranks_sample_on_their_own(small_run, two_ranks):
    few = [replace(SAMPLING, cache="prefix")]
    offloaded_adapters = {"trainer__cpu_offload": True, "model__lora_rank": 4}
    recomputed = {"trainer__precision": "bf16", "model__enable_gradient_checkpointing": True}
    copies = {"trainer__replicate": 2, "trainer__reshard_after_forward": False}
    check(
        small_run,
        two_ranks,
        2,
        plain=(EVERY, {}),
        adapters=(few, offloaded_adapters),
        recomputed=(few, recomputed),
        copies=(few, copies),
    )


def four_ranks(function, *arguments):
    start_ranks(function, (*arguments, free_port()), 4)


@pytest.mark.slow
def test_four_ranks_in_two_copies(small_run):
    check(small_run, four_ranks, 4, copies=(EVERY, {"trainer__replicate": 2}), shards=(EVERY, {}))

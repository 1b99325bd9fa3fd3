"""Adapters beside 4-bit weights: they train, resume, and are exported beside the whole weights."""

import pytest
import torch

from diffllm import load_model, new_model
from diffllm.quantize import is_quantized
from tests.conftest import small_shape
from tests.trainer.runs import losses, train, weights
from trainer.build import load_for_sampling
from trainer.distributed import init_distributed
from trainer.export import export
from trainer.fsdp_sft_trainer import FSDPSFTTrainer
from trainer.memory import state_memory

SHAPE = {"hidden_size": 64, "intermediate_size": 128}  # bitsandbytes packs blocks of 64 weights


@pytest.fixture
def quantized_run(small_run, tmp_path, tokenizer):
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install 'diffllm[quantize]'")
    new_model(small_shape(**SHAPE), tokenizer, seed=3).save_pretrained(tmp_path / "base", tokenizer=tokenizer)

    def configure(name="run", **changes):
        settings = {"model__path": str(tmp_path / "base"), "model__lora_rank": 4, "model__quantize": "nf4"}
        return small_run(name, **settings | {"trainer__save_checkpoint_steps": 6} | changes)

    return configure


def test_adapters_train_beside_4_bit_weights_and_resume(quantized_run, train_on_two_ranks, tmp_path):
    run = train(quantized_run())
    assert losses(run)[-1] < losses(run)[0]
    plain = train(quantized_run("plain", model__quantize="none"))
    assert losses(plain) != losses(run)
    assert losses(plain) == pytest.approx(losses(run), rel=0.1)

    before = losses(run)
    (run / "checkpoints" / "step_00000012").rename(tmp_path / "last")
    assert losses(train(quantized_run())) == before
    train_on_two_ranks([quantized_run("two")])
    assert losses(run.parent / "two") == pytest.approx(losses(run), rel=1e-5)


def test_exports_stand_on_the_whole_weights(quantized_run, tmp_path):
    run, base = train(quantized_run()), load_model(tmp_path / "base").state_dict()
    merged = load_model(run / "hf").state_dict()
    deltas = {name: (merged[name] - base[name]).abs().max() for name in base}
    assert all((delta > 0) == name.endswith("_proj.weight") for name, delta in deltas.items())
    assert max(deltas.values()) < 0.05  # quantizing changes weights by more
    export(run / "checkpoints" / "step_00000012", tmp_path / "exported")
    exported = load_model(tmp_path / "exported").state_dict()
    assert all(torch.equal(exported[name], tensor) for name, tensor in merged.items())
    assert (run / "hf_adapter" / "adapter_config.json").exists()
    assert weights(run).keys() == {name.removeprefix("lm.") for name in base}


def test_a_quantized_model_is_smaller_as_foretold_and_samples(quantized_run):
    config = quantized_run()
    with init_distributed() as distributed:
        model = FSDPSFTTrainer(config, distributed).model
        foretold = state_memory(model, config, 1, distributed.device)
    packed = sum(parameter.numel() for parameter in model.parameters() if is_quantized(parameter))
    linear = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    assert packed == linear // 2
    rest = sum(4 * parameter.numel() for parameter in model.parameters() if not is_quantized(parameter))
    assert foretold.weights == pytest.approx(packed * 1.03 + rest, rel=0.02)
    sampler, _ = load_for_sampling(config)
    assert any(map(is_quantized, sampler.parameters()))
    assert torch.isfinite(sampler.logits(torch.arange(8)[None])).all()


def test_4_bit_weights_are_not_trained(quantized_run):
    with pytest.raises(ValueError, match=r"model\.quantize=nf4.*model\.lora_rank"):
        train(quantized_run(model__lora_rank=0))

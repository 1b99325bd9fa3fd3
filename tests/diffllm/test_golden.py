"""Results of the published Dream and LLaDA code, bitwise equal with the same kernels."""

import json

import pytest
import torch
from safetensors.torch import load_file

from diffllm import DiffusionConfig
from diffllm.diffusion.loss import weighted_sum
from diffllm.diffusion.weights import time_weights
from tests.conftest import GOLDEN

DREAM, LLADA = load_file(GOLDEN / "dream.safetensors"), load_file(GOLDEN / "llada.safetensors")
DREAM_RUNS = json.loads((GOLDEN / "dream.json").read_text())
LLADA_RUNS = json.loads((GOLDEN / "llada.json").read_text())["generate"]
EOS = 254


def assert_same_logits(ours, golden):
    """Bitwise with the kernels that the golden files were made with, else within 2e-6 of the largest logit."""
    if torch.backends.cpu.get_cpu_capability() == "AVX2":
        assert torch.equal(ours, golden)
    else:
        assert (ours - golden).abs().max() <= 2e-6 * golden.abs().max()


@torch.no_grad()
def test_dream_logits(dream):
    assert_same_logits(dream.logits(DREAM["full.input_ids"]), DREAM["full.logits"])


@torch.no_grad()
def test_dream_logits_of_a_left_padded_batch(dream):
    attention_mask = DREAM["leftpad.attention_mask"]
    logits = dream.logits(DREAM["leftpad.input_ids"], attention_mask, DREAM["leftpad.position_ids"])
    attended = attention_mask.bool()
    assert_same_logits(logits[attended], DREAM["leftpad.logits"][attended])


@torch.no_grad()
def test_llada_logits(llada):
    assert_same_logits(llada.logits(LLADA["full.input_ids"]), LLADA["full.logits"])


@torch.no_grad()
def test_nll_of_the_masked_tokens(dream):
    x_0, masked = DREAM["loss.x_0"], DREAM["loss.masked"]
    x_t = x_0.masked_fill(masked, dream.mask_token_id)
    restored = dream(x_t, x_0, masked, masked.float())
    torch.testing.assert_close(restored.nll, DREAM["loss.nll"][masked], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["none", "original", "linear", "cart.0.1", "cart.0.3", "cart.0.8"])
def test_time_weights(name):
    kind, _, p = name.partition(".")
    masked = DREAM["loss.masked"]
    weights = time_weights(DREAM["loss.t"][:, None], masked, torch.ones_like(masked), kind, float(p or 0.1))
    torch.testing.assert_close(weights[masked], DREAM[f"weight.{name}"][masked], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", DREAM_RUNS["losses"], ids=str)
def test_losses(case):
    config = DiffusionConfig(
        time_reweighting=case["time_reweighting"],
        cart_p=case["cart_p"] or 0.1,
        token_reweighting=case["token_reweighting"],
        token_reweighting_alpha=0.25,
        token_reweighting_gamma=2.0,
        loss_norm="masked",
    )
    masked = DREAM["loss.masked"]
    attended = torch.ones_like(masked)
    weights = time_weights(DREAM["loss.t"][:, None], masked, attended, config.time_reweighting, config.cart_p)
    total = weighted_sum(DREAM["loss.nll"][masked], weights[masked], config.token_loss).item()
    assert total == pytest.approx(case["weighted_sum"], rel=1e-6)
    assert total / masked.sum().item() == pytest.approx(case["loss"], rel=1e-6)


@pytest.mark.parametrize(
    "case", DREAM_RUNS["generate"], ids=lambda case: f"{case['alg']}-{case['steps']}-{case['batch']}"
)
def test_dream_generation_step_by_step(dream, case):
    output = dream.diffusion_generate(
        torch.tensor(case["input_ids"]),
        attention_mask=torch.tensor(case["attention_mask"]),
        max_new_tokens=case["max_new_tokens"],
        steps=case["steps"],
        temperature=case["temperature"],
        alg=case["alg"],
        output_history=True,
        return_dict_in_generate=True,
    )
    assert [canvas.tolist() for canvas in output.history] == case["history"]
    assert output.sequences.tolist() == case["sequences"]
    assert output.nfe[0] <= case["steps"]


@pytest.mark.parametrize("case", LLADA_RUNS, ids=lambda case: "-".join(str(v) for v in list(case.values())[:6]))
def test_llada_generation(llada, case):
    def without_eos(step, x, logits):
        return logits.index_fill(-1, torch.tensor(EOS), -torch.inf) if case["logits_eos_inf"] else logits

    sequences = llada.diffusion_generate(
        torch.tensor(case["input_ids"]),
        max_new_tokens=case["gen_length"],
        steps=case["steps"],
        block_length=case["block_length"],
        alg="maskgit_plus",
        transfer="even",
        cfg_scale=case["cfg_scale"],
        generation_logits_hook_func=without_eos,
    )
    assert sequences.tolist() == case["sequences"]

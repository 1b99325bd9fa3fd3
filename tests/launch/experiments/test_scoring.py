"""Scores of the models of a sweep: by unmasking, or from left to right."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationMixin

from data.tasks.equations import Equations
from diffllm.diffusion.causal import CausalConfig
from diffllm.tokenizer import load_tokenizer
from launch.compare import compare_results
from launch.experiments import scoring
from launch.experiments.scoring import score
from launch.results import read_result
from launch.sweep import last_metrics
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
    def make(objective, more=(), config_dirs=(), **changes):
        config = small_run("0", trainer__max_steps=2, **changes)
        if objective == "causal":
            config.diffusion = CausalConfig()
        run = train(config)
        record = {"overrides": [f"diffusion={objective}", *SETTINGS, *more], "config_dirs": config_dirs}
        (run / "job.json").write_text(json.dumps(record))
        return run

    return make


@pytest.mark.parametrize("objective", ["elbo", "causal"])
def test_a_job_is_scored_once_on_all_questions(job, objective, monkeypatch):
    run = job(objective)
    score(run)
    scores = read_result(str(run))["scores"]["equations"]
    assert scores["questions"] == QUESTIONS  # data.subset is of the training rows
    assert 1 <= scores["nfe"] <= (2 if objective == "elbo" else 5)
    assert last_metrics(run)["nfe"] == scores["nfe"]
    monkeypatch.setattr(scoring, "read_settings", None)
    score(run)


def test_both_kinds_of_results_compare(job, capsys):
    runs = []
    for objective in ("elbo", "causal"):
        run = job(objective)
        score(run)
        runs.append(run.rename(run.with_name(objective)))
    compare_results([*map(str, runs)])
    said = capsys.readouterr().out
    assert "of the same 6 questions" in said
    assert "greedy" in next(line for line in said.splitlines() if line.startswith("sampling.alg"))


def test_tokens_and_forwards_count_the_end(job, monkeypatch):
    """Of 5 tokens at most: the first answer ends after two, and the second is cut."""
    run = job("causal")
    end = load_tokenizer(run / "hf").eos_token_id
    rows = torch.tensor([[7, 7, end, end, end], [7, 7, 7, 7, 7]])

    def generate(model, input_ids, **_):
        return torch.cat([input_ids, rows.repeat(2, 1)[: len(input_ids)]], dim=1)

    monkeypatch.setattr(GenerationMixin, "generate", generate)
    score(run)
    scores, answers = (read_result(str(run))[name]["equations"] for name in ("scores", "answers"))
    assert [answer["nfe"] for answer in answers] == [3, 5] * 3
    assert [answer["ended"] for answer in answers] == [True, False] * 3
    assert (scores["nfe"], scores["tokens_per_forward"], scores["not_ended"]) == (4, 1, 0.5)
    assert scores["tokens_per_second"] > 0


def test_several_tasks_are_scored(job, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1+1?", "response": "2"}\n')
    run = job("causal", ["task.name=[equations,rows]", f"data.val_files=[{tmp_path / 'rows.jsonl'}]"])
    score(run)
    assert {name: each["questions"] for name, each in read_result(str(run))["scores"].items()} == {
        "equations": QUESTIONS,
        "rows": 1,
    }


def test_a_choice_of_ones_own_is_found_again(job, tmp_path):
    (own := tmp_path / "mine" / "sampling").mkdir(parents=True)
    (own / "short.yaml").write_text("max_new_tokens: 3\n")
    run = job("elbo", ["sampling=short", "sampling.max_new_tokens=3"], [str(own.parent)])
    score(run)
    assert read_result(str(run))["config"]["sampling"]["max_new_tokens"] == 3


def test_answers_in_a_batch_are_those_of_single_questions(job):
    run = job("causal")
    score(run)
    answers = [each["response"] for each in read_result(str(run))["answers"]["equations"]]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(run / "hf"), load_tokenizer(run / "hf")
    for question, answer in zip(questions_of(Equations(), tokenizer, 0), answers, strict=True):
        ids = tokenizer.decode(question.ids.tolist())
        inputs = tokenizer(ids, return_tensors="pt", add_special_tokens=False)
        output = model.generate(**inputs, max_new_tokens=5, do_sample=False)[0, inputs.input_ids.shape[1] :]
        assert tokenizer.decode(output, skip_special_tokens=True) == answer


def test_a_job_without_a_model_is_named(job):
    with pytest.raises(ValueError, match=r"0: has no model .*trainer\.save_model=true"):
        score(job("elbo", trainer__save_model=False))

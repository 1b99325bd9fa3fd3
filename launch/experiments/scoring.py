"""Score the models of a sweep on their tasks: by unmasking, or from left to right those that were trained causally."""

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from data import turn_end
from data.storage import read_object
from data.terminal import printable
from diffllm import ModelConfig
from diffllm.generate import Response
from diffllm.tokenizer import load_tokenizer
from launch.evaluation import Judge, evaluate, manifest, write_result
from launch.settings import read_settings
from sampling import SamplingConfig, trim
from trainer.config import Config
from trainer.distributed import init_distributed
from trainer.evaluation import Answers, Question, evaluated_tasks, questions_of


def score(job: Path) -> None:
    """Write `evaluation.json` of a finished job of a sweep, unless it is there.

    Raises:
        ValueError: the job exported no model, or see `launch.evaluation.evaluate`.
    """
    if (job / "evaluation.json").exists():
        return
    if not (job / "hf").exists():
        raise ValueError(f"{job}: has no model in hf/ to score; train with trainer.save_model=true")
    record = read_object(job / "job.json")
    _, config, _ = read_settings([*(f"--config-dir={own}" for own in record["config_dirs"]), *record["overrides"]])
    config.model = ModelConfig(path=str(job / "hf"))
    config.data.subset = None  # of the training rows: the questions are those of all jobs
    if config.task.name and "rows" not in config.task.name:
        config.data.val_files = []  # for the validation of the run only
    config.trainer.output_dir = str(job)
    transformers_logging.disable_progress_bar()
    print(printable(f"scoring {job}"))
    if config.diffusion.causal:
        answer_causally(config)
    else:
        evaluate(config)


def answer_causally(config: Config) -> None:
    """Answer the test questions of the tasks greedily, by `generate` of Transformers with its cache.

    Raises:
        ValueError: a task of another kind than generate, or see `questions_of`.
    """
    tasks = evaluated_tasks(config)
    if others := [task.name for task in tasks if task.kind != "generate"]:
        raise ValueError(f"task.name={others}: a causal model is scored on tasks of kind generate only")
    with init_distributed() as distributed:
        dtype = torch.bfloat16 if distributed.device.type == "cuda" else torch.float32
        model = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=dtype).to(distributed.device)
        tokenizer = load_tokenizer(config.model.path)
        questions = {task.name: questions_of(task, tokenizer, config.seed) for task in tasks}
        depends = manifest(config, tasks, questions, model, tokenizer, distributed)
    depends["origin"]["sampling.alg"] = "generate of Transformers, greedy"
    answers = {name: _answer(model, tokenizer, each, config.sampling) for name, each in questions.items()}
    write_result(config, Judge(tasks, questions), depends, answers)


@torch.inference_mode()
def _answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question], config: SamplingConfig
) -> Answers:
    ends = [*{tokenizer.eos_token_id, tokenizer.pad_token_id, turn_end(tokenizer)} - {None}]
    settings = {"max_new_tokens": config.max_new_tokens, "do_sample": False, "eos_token_id": ends}
    responses, started = [], time.perf_counter()
    for start in range(0, len(questions), config.batch_size):
        ids = [question.ids.tolist() for question in questions[start : start + config.batch_size]]
        inputs = tokenizer.pad({"input_ids": ids}, padding_side="left", return_tensors="pt").to(model.device)
        for row in model.generate(**inputs, **settings)[:, inputs.input_ids.shape[1] :].tolist():
            answer = trim(row, ends)
            ended = len(answer) < len(row)
            tokens = len(answer) + ended  # with the one that ends it; each took a forward
            responses.append(Response(len(responses), tokenizer.decode(answer), tokens, tokens, 1.0, ended))
    return Answers(responses, sum(response.tokens for response in responses) / (time.perf_counter() - started))

"""Score the models of a sweep on their tasks: by unmasking, or from left to right those that were trained causally."""

from pathlib import Path
from statistics import mean

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from data import turn_end
from data.storage import read_object, write_object
from data.tasks import tasks_of
from data.terminal import printable
from diffllm import ModelConfig
from diffllm.tokenizer import load_tokenizer
from launch.evaluation import evaluate
from launch.settings import read_settings
from sampling import trim
from trainer.config import Config
from trainer.evaluation import questions_of


def score(job: Path) -> None:
    """Write `evaluation.json` of a finished job of a sweep, unless it is there.

    Raises:
        ValueError: the job exported no model, or see `launch.evaluation.evaluate`.
    """
    if (job / "evaluation.json").exists():
        return
    if not (job / "hf").exists():
        raise ValueError(f"{job}: has no model in hf/ to score; train with trainer.save_model=true")
    _, config, _ = read_settings(read_object(job / "job.json")["overrides"])
    config.model = ModelConfig(path=str(job / "hf"))
    config.data.subset = None  # of the training rows: the questions are those of all jobs
    config.trainer.output_dir = str(job)
    transformers_logging.disable_progress_bar()
    print(printable(f"scoring {job}"))
    if config.diffusion.causal:
        answer_causally(config)
    else:
        evaluate(config)


@torch.inference_mode()
def answer_causally(config: Config) -> None:
    """Answer the test questions of the task greedily, by `generate` of Transformers with its cache."""
    [task] = tasks_of(config.data, config.task, "rows" if config.data.val_files else "equations")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=dtype).to(device)
    tokenizer = load_tokenizer(config.model.path)
    ends = [*{tokenizer.eos_token_id, tokenizer.pad_token_id, turn_end(tokenizer)} - {None}]
    settings = {"max_new_tokens": config.sampling.max_new_tokens, "do_sample": False, "eos_token_id": ends}
    questions, size, answers = questions_of(task, tokenizer, config.seed), config.sampling.batch_size, []
    for start in range(0, len(questions), size):
        ids = [question.ids.tolist() for question in questions[start : start + size]]
        inputs = tokenizer.pad({"input_ids": ids}, padding_side="left", return_tensors="pt").to(device)
        output = model.generate(**inputs, **settings)
        answers += [trim(row, ends) for row in output[:, inputs.input_ids.shape[1] :].tolist()]
    texts = [tokenizer.decode(ids) for ids in answers]
    right = [task.score(question.row, text) == 1 for question, text in zip(questions, texts, strict=True)]
    scores = {
        "questions": len(questions),
        "right": sum(right),
        "exact_match": mean(right),
        "nfe": mean(min(len(ids) + 1, config.sampling.max_new_tokens) for ids in answers),  # one more for the end
        "tokens_per_forward": 1.0,
    }
    given = [{"response": text, "right": ok} for text, ok in zip(texts, right, strict=True)]
    write_object(Path(config.trainer.output_dir) / "evaluation.json", {"scores": scores, "answers": given})
    print(f"exact match {scores['exact_match']:.1%} ({scores['right']} of {scores['questions']} questions)")

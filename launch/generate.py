"""Prompts in, responses out: what sample.py does."""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from data import prompt_ids, read_rows
from data.chat import Message, to_prompt
from diffllm import DiffLLM
from sampling import SamplingConfig, left_pad, sample, trim
from trainer.build import build_model
from trainer.config import Config


@dataclass
class Response:
    text: str  # trimmed at the end-of-sequence token
    tokens: int  # of the text
    nfe: int  # model forwards of the batch that it was sampled in
    seconds: float  # its share of that batch's time


def answer(config: Config) -> None:
    """Answer `prompt` on the terminal, or every row of the file `input` into the file `output`.

    Raises:
        ValueError: neither or both of prompt and input, or no checkpoint, or a row that is no prompt.
    """
    if (config.prompt is None) == (config.input is None):
        raise ValueError("give either prompt=… or input=FILE.jsonl output=FILE.jsonl")
    if config.input is not None and config.output is None:
        raise ValueError(f"input={config.input}: give output=FILE.jsonl too")
    if config.prompt is not None:
        chats = [[Message(role="user", content=config.prompt)]]
    else:
        placed_rows = read_rows([config.input])
        chats = [to_prompt(placed) for placed in placed_rows]
    model, tokenizer = load_for_sampling(config)
    responses = generate(model, tokenizer, chats, config.sampling)
    if config.prompt is not None:
        print(next(responses).text)
        return
    with Path(config.output).open("w") as file:
        for placed, response in zip(placed_rows, tqdm(responses, total=len(chats), unit="prompt"), strict=True):
            file.write(json.dumps({**placed.row, "response": response.text, "nfe": response.nfe}) + "\n")


def load_for_sampling(config: Config) -> tuple[DiffLLM, PreTrainedTokenizerBase]:
    """The checkpoint of `model.path`, on the GPU if there is one.

    Raises:
        ValueError: no `model.path`, or see `build_model`.
    """
    if config.model.path is None:
        raise ValueError("model.path is not given: name a checkpoint, such as model.path=outputs/quickstart/hf")
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    model, tokenizer = build_model(config.model, dtype=dtype)  # loaded in it: casting would round the rotary buffers
    return model.to(device).eval(), tokenizer


def generate(
    model: DiffLLM, tokenizer: PreTrainedTokenizerBase, chats: Sequence[Sequence[Message]], config: SamplingConfig
) -> Iterator[Response]:
    """Sample a response to every chat, in batches of `config.batch_size`.

    Raises:
        ValueError: a prompt and `max_new_tokens` do not fit the model's context.
    """
    prompts = [prompt_ids(chat, tokenizer) for chat in chats]
    context = model.lm.config.max_position_embeddings
    longest = max(map(len, prompts))
    if longest + config.max_new_tokens > context:
        raise ValueError(
            f"a prompt of {longest} tokens and sampling.max_new_tokens={config.max_new_tokens} do not fit the "
            f"model's context of {context} tokens"
        )
    for start in range(0, len(prompts), config.batch_size):
        batch = prompts[start : start + config.batch_size]
        input_ids, attention_mask = (tensor.to(model.device) for tensor in left_pad(batch, model.pad_token_id))
        started = time.perf_counter()
        output = sample(
            model.denoise,
            input_ids,
            config,
            model.mask_token_id,
            attention_mask=attention_mask,
            rows=range(start, start + len(batch)),
        )
        sequences = output.sequences[:, input_ids.shape[1] :].tolist()
        seconds = (time.perf_counter() - started) / len(batch)
        for tokens in sequences:
            tokens = trim(tokens, (model.eos_token_id, tokenizer.eos_token_id))
            yield Response(tokenizer.decode(tokens).strip(), len(tokens), output.nfe, seconds)

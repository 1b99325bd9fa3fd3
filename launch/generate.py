"""Prompts in, responses out: what sample.py does."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from data import prompt_ids, read_rows
from data.chat import Message, to_prompt
from diffllm import DiffLLM
from sampling import Canvas, Filled, SamplingConfig, Tokens, fill, trim
from trainer.build import build_model
from trainer.config import Config


@dataclass
class Response:
    name: int  # of the prompt
    text: str  # up to the end-of-sequence token or stop string
    tokens: int  # up to the end-of-sequence token
    nfe: int  # forwards of the model that it took part in
    tokens_per_forward: float


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
    responses = generate(model, tokenizer, [prompt_ids(chat, tokenizer) for chat in chats], config.sampling)
    if config.prompt is not None:
        print(next(responses).text)
        return
    responses = sorted(tqdm(responses, total=len(chats), unit="prompt"), key=lambda response: response.name)
    with Path(config.output).open("w") as file:
        for placed, response in zip(placed_rows, responses, strict=True):
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
    model: DiffLLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    config: SamplingConfig,
    names: Sequence[int] | None = None,
) -> Iterator[Response]:
    """Sample a response to every prompt; each comes when it is done, `config.batch_size` are under way.

    Args:
        prompts: token ids.
        names: of the prompts, for their draws and in their responses; by default 0 … N-1.

    Raises:
        ValueError: a prompt and `max_new_tokens` do not fit the model's context, or see `special_tokens`.
    """
    context = model.lm.config.max_position_embeddings
    longest = max(map(len, prompts), default=0)
    if longest + config.max_new_tokens > context:
        raise ValueError(
            f"a prompt of {longest} tokens and sampling.max_new_tokens={config.max_new_tokens} do not fit the "
            f"model's context of {context} tokens"
        )
    special = special_tokens(model, tokenizer, config)
    canvases = [
        Canvas.after(prompt, config.max_new_tokens, special.mask, name)
        for prompt, name in zip(prompts, range(len(prompts)) if names is None else names, strict=True)
    ]
    for filled in fill(model, canvases, config, special):
        yield response_of(filled, tokenizer, config)


def response_of(filled: Filled, tokenizer: PreTrainedTokenizerBase, config: SamplingConfig) -> Response:
    """A response as text, up to its end."""
    tokens = trim(filled.response, filled.eos)
    text = tokenizer.decode(tokens)
    end = min((place for stop in config.stop if (place := text.find(stop)) >= 0), default=len(text))
    return Response(filled.canvas.name, text[:end].strip(), len(tokens), filled.nfe, filled.tokens_per_forward)


def special_tokens(model: DiffLLM, tokenizer: PreTrainedTokenizerBase, config: SamplingConfig) -> Tokens:
    """What the settings say of texts, in tokens.

    Raises:
        ValueError: a stop string that has no tokens, or a forbidden text that is not one token.
    """
    stop = []
    for text in config.stop:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if not ids or tokenizer.unk_token_id in ids:
            raise ValueError(f"sampling.stop={config.stop}: {text!r} cannot be written in the model's tokens")
        stop.append(tuple(ids))
    forbidden = []
    for text in config.forbidden:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) != 1 or tokenizer.unk_token_id in ids:
            raise ValueError(
                f"sampling.forbidden={config.forbidden}: {text!r} is not one token of the model but {len(ids)}: "
                f"{tokenizer.convert_ids_to_tokens(ids)}"
            )
        forbidden += ids
    eos = tuple(dict.fromkeys((model.eos_token_id, tokenizer.eos_token_id)))
    return Tokens(model.mask_token_id, eos, tuple(stop), tuple(forbidden))

"""Answers that do not follow a prompt token by token: the likeliest of some options, the slots of a template."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from diffllm.generate import Response, special_tokens
from diffllm.modeling_diffllm import DiffLLM
from sampling import SamplingConfig, Template, choose, infill_templates


class Option(NamedTuple):
    """A response to choose from."""

    text: str
    ids: Sequence[int]  # with the end-of-sequence token, as in training


def choose_options(
    model: DiffLLM,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[tuple[Sequence[int], Sequence[Option]]],
    config: SamplingConfig,
    row_ids: Sequence[int],
    samples: int,
) -> Iterator[Response]:
    """Choose an option for every question, a prompt of token ids and its options. Yield each as soon as it is done.

    The options of a question share their noise, which `sampling.seed` keys. The response is the option with the highest
    bound on its likelihood. `details` holds the bounds of all options, and the indices of the best by bound and by
    bound a token.

    Args:
        row_ids: names the responses.
        samples: masks drawn for each option, see `sampling.likelihood.score_positions`.

    Raises:
        ValueError: see `sampling.likelihood.score_positions`.
    """
    special = special_tokens(model, tokenizer, config)
    for row_id, (prompt, options) in zip(row_ids, questions, strict=True):
        ids = [option.ids for option in options]
        choice = choose(model, prompt, ids, special, samples, config.seed, config.batch_size)
        details = {
            "best": choice.best,
            "best_per_token": choice.best_per_token,
            "nats": [score.mean for score in choice.scores],
            "standard_errors": [score.standard_error for score in choice.scores],
            "tokens": [score.tokens for score in choice.scores],
        }
        nfe = sum(score.nfe for score in choice.scores)
        yield Response(row_id, options[choice.best].text, 0, nfe, 0.0, True, details)


def fill_templates(
    model: DiffLLM,
    tokenizer: PreTrainedTokenizerBase,
    templates: Sequence[Template],
    config: SamplingConfig,
    row_ids: Sequence[int],
    samples: int,
) -> Iterator[Response]:
    """Fill in templates, `config.batch_size` at once. A response is the texts of the slots, one a line.

    Args:
        row_ids: numbers of the templates, which key their draws and name their responses.
        samples: masks drawn for each of several lengths, see `sampling.infill_templates`.

    Raises:
        ValueError: see `sampling.infill_templates`.
    """
    special, size = special_tokens(model, tokenizer, config), config.batch_size
    for start in range(0, len(templates), size):
        some = slice(start, start + size)
        filled = infill_templates(
            model, tokenizer, templates[some], config, special, row_ids=row_ids[some], samples=samples
        )
        for row_id, each in zip(row_ids[some], filled, strict=True):
            yield Response(row_id, "\n".join(each.slots), each.length, each.nfe, each.length / each.nfe, True)

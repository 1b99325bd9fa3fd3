"""Draw a response on the terminal while it forms."""

from collections.abc import Callable
from itertools import groupby, islice

import numpy as np
from rich.console import Console
from rich.live import Live
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from data.terminal import printable
from diffllm import DiffLLM
from diffllm.generate import Response, response_of, special_tokens
from sampling import Canvas, SamplingConfig, StepEvent, fill

MASKED, COMMITTED, CLEAN = "dim", "bold green", "default"


def respond(
    model: DiffLLM,
    tokenizer: PreTrainedTokenizerBase,
    prompt: list[int],
    config: SamplingConfig,
    console: Console | None,
    row_id: int = 0,
    on_step: Callable[[StepEvent], object] | None = None,
) -> Response:
    """Sample a response to token ids.

    Args:
        console: shows every step, then erases it; None shows nothing.
        row_id: number of the prompt, which keys its draws.
        on_step: called after each step.
    """
    special = special_tokens(model, tokenizer, config)
    canvas = Canvas.after(prompt, config.max_new_tokens, special.mask, row_id)
    if console is None:
        [filled] = fill(model, [canvas], config, special, on_step=on_step)
        return response_of(filled, tokenizer, config)
    with Live(console=console, auto_refresh=False, transient=True) as live:

        def show(event: StepEvent) -> None:
            live.update(draft(event, tokenizer), refresh=True)
            if on_step is not None:
                on_step(event)

        try:
            [filled] = fill(model, [canvas], config, special, on_step=show)
        finally:
            live.update("")  # the last frame is drawn whole, and one taller than the screen cannot be erased
    return response_of(filled, tokenizer, config)


def draft(event: StepEvent, tokenizer: PreTrainedTokenizerBase) -> Text:
    """The response after a step: masked, committed by this step, and committed before."""
    styles = np.full(len(event.tokens), CLEAN, dtype=object)
    styles[event.committed], styles[event.masked] = COMMITTED, MASKED
    response = zip(styles.tolist(), event.tokens.tolist(), strict=True)
    text = Text()
    for style, run in groupby(islice(response, event.prompt_length, None), key=lambda token: token[0]):
        ids = [token for _, token in run]
        shown = "▒" * len(ids) if style == MASKED else tokenizer.decode(ids, skip_special_tokens=True)
        text.append(printable(shown), style)
    return text

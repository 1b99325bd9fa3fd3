"""A served model: its engine, its tokenizer, its settings, its metrics."""

import asyncio
import copy
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from transformers import PreTrainedTokenizerBase

from data import prompt_ids
from data.terminal import print_stderr
from diffllm import DiffLLM
from diffllm.generate import check_context, special_tokens
from launch.serve.config import ServeConfig
from launch.serve.engine import Engine
from launch.serve.metrics import Metrics
from launch.serve.protocol import CHAT, ApiError, Endpoint, Query, setting_error
from sampling import SamplingConfig


class Service:
    """A model, the engine that samples it, and what all requests share.

    Args:
        name: of the model, for clients.
        sampling: settings of requests that give none.
    """

    def __init__(
        self,
        name: str,
        model: DiffLLM,
        tokenizer: PreTrainedTokenizerBase,
        sampling: SamplingConfig,
        config: ServeConfig,
    ):
        self.name, self.model, self.sampling, self.config = name, model, sampling, config
        self.started = int(time.time())
        self.eos = special_tokens(model, tokenizer, SamplingConfig()).eos
        self.engine = Engine(model, tokenizer, sampling.batch_size, config.queue)
        # A tokenizer is used in one thread only: some calls change it.
        self.tokenizer, self._reader = copy.deepcopy(tokenizer), ThreadPoolExecutor(1, "reader")
        self.metrics = Metrics(self.engine)

    def close(self) -> None:
        """End the threads."""
        self.engine.close()
        self._reader.shutdown()

    async def read(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function of the tokenizer in its thread."""
        return await asyncio.get_running_loop().run_in_executor(self._reader, function, *arguments)

    def encode(self, query: Query, endpoint: Endpoint) -> list[int]:
        """Token ids of a prompt.

        Raises:
            ApiError: the template refuses it, it does not fit the context, or its tokens cannot be prompts.
        """
        try:
            ids = prompt_ids(query.prompt, self.tokenizer, "messages") if endpoint is CHAT else self._raw(query.prompt)
        except ValueError as error:
            raise ApiError(400, str(error), endpoint.prompt) from error
        try:
            check_context(self.model, len(ids), query.config)
        except ValueError as error:
            refused = setting_error(error, query.length)
            if refused.param is None:
                refused = ApiError(400, str(refused), query.length, "context_length_exceeded")
            raise refused from error
        return ids

    def _raw(self, prompt: str | list[int]) -> list[int]:
        """Token ids of a raw text, as those of `sample.py template=…`."""
        ids = self.tokenizer(prompt, add_special_tokens=False)["input_ids"] if isinstance(prompt, str) else prompt
        if wrong := [token for token in ids if not 0 <= token < self.model.vocab_size]:
            raise ValueError(f"prompt: the model has no token {wrong[0]}")
        if self.model.mask_token_id in ids:
            raise ValueError("prompt: has the mask token; take it out")
        return ids

    async def end_within(self, seconds: float) -> None:
        """End requests that are not answered after some seconds."""
        if running := self.engine.running + self.engine.waiting:
            limit = f"{seconds:g} seconds (launch.shutdown)"
            print_stderr(f"stopping: {running} requests have {limit}; another SIGINT ends them")
        await asyncio.sleep(seconds)
        self.engine.stop(ApiError(503, "the server stops", code="server_stops", retry_after="30"))

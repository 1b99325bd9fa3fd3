"""Evaluate by lm-eval: `python -m launch.lm_eval --model diffllm --model_args pretrained=M --tasks gsm8k_cot`.

The command line is lm-eval's own. Importing this module registers the model `diffllm`, also for lm-eval as a library.
Run it by `python -m`: as a script it would be imported in place of the package `lm_eval`.
"""

import json
import logging
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from data.chat import Chat, Message
from data.template import check_for_chats, render_prompt
from data.terminal import print_stderr
from diffllm.generate import Response, generate, special_tokens
from diffllm.static_forward import prepare_sampling
from launch.cli import user_errors
from launch.lm_eval_arguments import SAMPLING, HarnessConfig, compose_settings, device_of, split_arguments, typed
from sampling import Canvas, Denoiser, SamplingConfig, Visibility, fill, score_positions
from trainer.build import load_for_sampling
from trainer.distributed import Distributed, init_distributed, ranks_from_environment
from trainer.manifest import versions

try:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, warning_once
except ImportError as error:
    needed = "launch.lm_eval needs lm-eval: pip install 'diffllm[lm-eval]'"
    if __name__ == "__main__":
        sys.exit(f"error: {needed}")
    raise ImportError(needed) from error

logger = logging.getLogger("lm_eval.diffllm")  # printed like lm-eval's own messages
DEFAULT_DEVICE = "cuda:0"  # of lm-eval's command line, also where there is no GPU
OF_REQUESTS = {*SAMPLING} - {"batch_size", "compile", "stop"}  # settings that a task may change; its `until` adds stops
# What decides whether a continuation is greedy: all its tokens, one a step, each the likeliest.
GREEDY = {"temperature": 0.0, "alg_temp": 0.0, "transfer": "linear", "steps": None, "remask": 0.0, "cache": "none"}
GREEDY |= {"min_new_tokens": 0, "stop": [], "stop_at_eos": False}


@register_model("diffllm")
class HarnessModel(TemplateLM):
    """A diffusion language model for lm-eval.

    Log-likelihoods are lower bounds by `sampling.likelihood`, those of alternatives under the same noise. A
    continuation is greedy if sampling at temperature 0, a position a step, writes it into as many masks as it has
    tokens.

    Args:
        arguments: fields of `HarnessConfig` and `SamplingConfig`, names of `RENAMED`, and settings `model.NAME`, see
            `launch.lm_eval_arguments`.

    Raises:
        ValueError: an unknown argument, a wrong value, or see `load_for_sampling`.
    """

    distributed = Distributed(0, 1, torch.device("cpu"))  # set by `main`

    def __init__(self, **arguments: Any):
        super().__init__()
        if (ranks := ranks_from_environment()[1]) != self.distributed.size:
            raise ValueError(f"{ranks} ranks: start them by `torchrun --nproc_per_node={ranks} -m launch.lm_eval …`")
        own, settings = split_arguments(arguments)
        self.harness, (config, lines) = typed(HarnessConfig(), own), compose_settings(settings)
        if self.distributed.is_main:
            for line in lines:
                print_stderr(line)
        self.sampling, self.given = config.sampling, {name.removeprefix("sampling.") for name in settings}
        self.model, self.tokenizer = load_for_sampling(config, device_of(self.harness, self.distributed))
        self._rank, self._world_size = self.distributed.rank, self.distributed.size
        self._device = self.model.device
        context = self.model.lm.config.max_position_embeddings
        self.max_length: int = self.harness.max_length or context
        if self.max_length > context:
            raise ValueError(f"max_length={self.max_length}: the model's context is {context} tokens")
        self.greedy = replace(self.sampling, **GREEDY)
        self.special = special_tokens(self.model, self.tokenizer, self.greedy)
        if self.harness.add_bos_token and self.tokenizer.bos_token is None:
            raise ValueError("add_bos_token=True: the tokenizer has no bos token; leave it out")

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> "HarnessModel":
        """The model with some arguments. They win over lm-eval's options `--batch_size` and `--device`."""
        options = {name: value for name, value in (additional_config or {}).items() if value is not None}
        if options.get("device") == DEFAULT_DEVICE:
            del options["device"]
        return cls(**options | arg_dict)

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        """Settings and versions, which lm-eval adds to its results."""
        return {"harness": asdict(self.harness), "sampling": asdict(self.sampling), "versions": versions()}

    def apply_chat_template(self, chat_history: list[Message], add_generation_prompt: bool = True) -> str:
        """Render a chat up to the start of the answer, or up to the end of a last message that begins the answer."""
        check_for_chats(self.tokenizer)
        messages, start = chat_history, ""
        if not add_generation_prompt:
            *messages, last = chat_history
            start = last["content"]
        return render_prompt(Chat(prompt=messages, response=""), self.tokenizer, "a prompt") + start

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Tokens of a raw text; `add_bos_token` applies unless `add_special_tokens` is False."""
        bos = self.tokenizer.bos_token if self.harness.add_bos_token and add_special_tokens is not False else ""
        text = string if string.startswith(bos) else bos + string
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokens of context and continuation, tokenized together, unless that merges the continuation away."""
        before, after = super()._encode_pair(context, continuation)
        return before, after or self.tok_encode(continuation, add_special_tokens=False)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Sample a response to each request. Requests with the same task and settings are sampled together.

        Raises:
            ValueError: before any sampling: settings of a request that do not hold, see `generate`.
        """
        groups: dict[str, list[int]] = defaultdict(list)
        for place, request in enumerate(requests):
            groups[json.dumps([request.task_name, request.idx, request.args[1]])].append(place)
        started = [self._start([requests[place] for place in places]) for places in groups.values()]
        steps, batches = self.sampling.steps or self.sampling.max_new_tokens, len(requests) / self.sampling.batch_size
        prepare_sampling(self.model, self.sampling.compile, forwards=int(steps * batches))
        texts = [""] * len(requests)
        with self._bar(requests, "responses", disable_tqdm) as bar:
            for group, (rows, responses) in zip(groups.values(), started, strict=True):
                for response in responses:
                    for place in (group[i] for i in rows[response.row_id]):
                        texts[place] = response.text
                        self.cache_hook.add_partial("generate_until", requests[place].args, response.text)
                        bar.update()
        return texts

    def _start(self, requests: Sequence[Instance]) -> tuple[dict[int, list[int]], Iterator[Response]]:
        """Places of requests with the same settings by row id, and their responses in the order in which they are done.

        A row id numbers document and repetition, so that a response depends neither on other requests nor on the ranks.
        With several ranks lm-eval adds requests that repeat earlier ones; they have no rows of their own.
        """
        config, seen = self._config_of(requests[0].args[1]), Counter()
        room = self.max_length - config.max_new_tokens
        if room < 1:
            raise ValueError(
                f"max_new_tokens={config.max_new_tokens}: leaves no room for a prompt in {self.max_length} tokens; "
                "lower it"
            )
        rows, prompts = defaultdict(list), {}
        for place, request in enumerate(requests):
            row_id = request.doc_id * request.repeats + seen[request.doc_id] % request.repeats
            seen[request.doc_id] += 1
            rows[row_id].append(place)
            prompts[row_id] = _last(self.tok_encode(request.args[0]), room)
        order = sorted(prompts, key=lambda row_id: -len(prompts[row_id]))  # a lack of memory shows at once
        longest_first = [prompts[row_id] for row_id in order]
        return rows, generate(self.model, self.tokenizer, longest_first, config, order)

    def _config_of(self, gen_kwargs: dict[str, Any]) -> SamplingConfig:
        """Sampling settings of a request: the model's arguments, then the request's, then the checkpoint's."""
        wanted = dict(normalize_gen_kwargs(gen_kwargs, self.sampling.max_new_tokens))
        wanted["max_new_tokens"] = wanted.pop("max_gen_toks")
        until = [text for text in wanted.pop("until") if text]
        del wanted["do_sample"]  # false has set the temperature to 0
        if unknown := sorted(wanted.keys() - OF_REQUESTS):
            warning_once(logger, f"generation settings of a task without effect: {', '.join(unknown)}")
        taken = {name: value for name, value in wanted.items() if name in OF_REQUESTS - self.given}
        for name in wanted.keys() & self.given:
            if wanted[name] != (ours := getattr(self.sampling, name)):
                warning_once(logger, f"{name}={ours} of --model_args replaces the task's {name}={wanted[name]}")
        return typed(self.sampling, taken | {"stop": self.sampling.stop + until * (not self.harness.escape_until)})

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Bound on log p(continuation | context), and whether the continuation is the greedy one.

        Args:
            requests: texts of context and continuation, and the tokens of each.
        """
        rows = [self._fitting(context, continuation) for _, context, continuation in requests]
        order = sorted(range(len(rows)), key=lambda place: -len(rows[place][0] + rows[place][1]))
        found: list[tuple[float, bool]] = [(0.0, False)] * len(rows)
        with self._bar(rows, "log-likelihoods", disable_tqdm) as bar:
            for start in range(0, len(order), self.sampling.batch_size):
                places = order[start : start + self.sampling.batch_size]
                some = [rows[place] for place in places]
                for place, *result in zip(places, self._bounds(some), self._are_greedy(some), strict=True):
                    found[place] = tuple(result)
                    self.cache_hook.add_partial("loglikelihood", requests[place][0], found[place])
                    bar.update()
        return found

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Bound on log p of whole texts.

        Of a text that does not fit, the sum over windows: each follows one token of context, the last as many as fit.
        """
        bounds = []
        for request in self._bar(requests, "texts", disable_tqdm):
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            windows = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length - 1, context_len=1)
            bounds.append(sum(self._bounds([make_disjoint_window(window) for window in windows])))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, bounds[-1])
        return bounds

    def _fitting(self, context: list[int], continuation: list[int]) -> tuple[list[int], list[int]]:
        """Context, cut at the start where it exceeds `max_length`, and continuation.

        Raises:
            ValueError: the continuation alone exceeds it.
        """
        if len(continuation) > self.max_length:
            raise ValueError(
                f"a continuation has {len(continuation)} tokens, more than max_length={self.max_length}: raise it, or "
                "score whole texts by loglikelihood_rolling, in windows"
            )
        kept = _last(context + continuation, self.max_length)
        start = max(len(kept) - len(continuation), 0)
        return kept[:start], kept[start:]

    def _bounds(self, rows: Sequence[tuple[list[int], list[int]]]) -> list[float]:
        """Bound on log p(continuation | context) of each row, in nats."""
        if not (scale := self.sampling.cfg_scale):
            return self._scores(self.model, rows)
        guided = (Guided(self.model, self.special.mask, scale, len(after)) for _, after in rows)
        return [self._scores(model, [row])[0] for model, row in zip(guided, rows, strict=True)]

    def _scores(self, model: Denoiser, rows: Sequence[tuple[list[int], list[int]]]) -> list[float]:
        whole = [(before + after, range(len(before), len(before + after))) for before, after in rows]
        samples, config = self.harness.mc_num, self.sampling
        scores = score_positions(model, whole, self.special, samples, config.seed, config.batch_size)
        return [score.mean for score in scores]

    def _are_greedy(self, rows: Sequence[tuple[list[int], list[int]]]) -> list[bool]:
        """Whether sampling at temperature 0 writes each continuation."""
        if not self.harness.is_check_greedy:
            return [False] * len(rows)
        canvases = [Canvas.after(before, len(after), self.special.mask, i) for i, (before, after) in enumerate(rows)]
        filled = {row.canvas.row_id: row.tokens for row in fill(self.model, canvases, self.greedy, self.special)}
        return [filled[i] == before + after for i, (before, after) in enumerate(rows)]

    def _bar(self, work: Sequence[Any], name: str, disable: bool) -> tqdm:
        return tqdm(work, name, disable=disable or self.rank != 0)

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Numbers of all ranks [ranks]. Collective."""
        return torch.tensor(self.distributed.gather(tensor.item()))

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """Objects of all ranks on rank `dst`, None on others. Collective."""
        found = self.distributed.gather(obj)
        return found if self.rank == dst else None

    def barrier(self) -> None:
        """Wait for all ranks. Collective."""
        self.distributed.wait()


class Guided:
    """A denoiser with guidance: l_u + (1 + cfg_scale)·(l - l_u), l_u with the context masked (LLaDA, eq. 16).

    Args:
        response_length: of all rows, whose other tokens are the context.
    """

    def __init__(self, model: Denoiser, mask: int, cfg_scale: float, response_length: int):
        self.model, self.mask, self.cfg_scale, self.response_length = model, mask, cfg_scale, response_length
        self.device, self.vocab_size = model.device, model.vocab_size

    def hidden(self, x_t: Tensor, position_ids: Tensor, visibility: Visibility, row: Tensor, column: Tensor) -> Tensor:
        """[N, 2, D] states with and without the context."""
        without = x_t.clone()
        without[:, : -self.response_length] = self.mask
        return torch.stack([self.model.hidden(x, position_ids, visibility, row, column) for x in (x_t, without)], 1)

    def head(self, hidden: Tensor) -> Tensor:
        """[N, V] guided logits."""
        logits, without = (self.model.head(states).float() for states in hidden.unbind(1))
        return without + (1 + self.cfg_scale) * (logits - without)


def _last(tokens: list[int], most: int) -> list[int]:
    """The last tokens that fit."""
    if len(tokens) > most:
        warning_once(logger, "a text does not fit max_length and loses tokens at its start, as may others")
    return tokens[-most:]


def main() -> None:
    """Run lm-eval's command line, on each rank of torchrun."""
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    with user_errors(debug=False), init_distributed() as distributed:
        HarnessModel.distributed = distributed
        cli_evaluate()


if __name__ == "__main__":
    main()

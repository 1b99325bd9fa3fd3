"""Validation: metrics under fixed noise, and sampled answers."""

from collections.abc import Iterable

import torch
from transformers import PreTrainedTokenizerBase

from data import Batch, Prepared
from diffllm import DiffLLM
from diffllm.diffusion import Objective
from diffllm.generate import check_context, generate, special_tokens
from sampling import trim
from trainer.config import Config
from trainer.distributed import Distributed
from trainer.memory import check_gathers
from trainer.parallel import gathered, reshard
from trainer.trackers import ValSample


@torch.no_grad()
def validate(
    model: DiffLLM, objective: Objective, batches: Iterable[Batch], distributed: Distributed
) -> dict[str, float]:
    """Metrics of an objective over the validation rows of all ranks. Collective."""
    model.eval()
    sums = sum(objective.measure(batch, objective.loss(model, batch)) for batch in batches)
    reshard(model)
    model.train()
    return {f"val/{name}": value for name, value in objective.metrics(distributed.sum(*sums)).items()}


class ValSamples:
    """Samples answers to the first `trainer.val_samples` validation rows, with the same draws in each call.

    Args:
        model: must be sharded before the first call.
        validation: rows, or None.

    Raises:
        ValueError: no rows; a prompt and `max_new_tokens` do not fit the model's context; a rank cannot hold the whole
            model; or see `special_tokens`.
    """

    def __init__(
        self,
        model: DiffLLM,
        tokenizer: PreTrainedTokenizerBase,
        validation: Prepared | None,
        config: Config,
        distributed: Distributed,
    ):
        self.model, self.tokenizer, self.config, self.distributed = model, tokenizer, config, distributed
        self.prompts: list[list[int]] = []
        self.references: list[str] = []
        if not (wanted := config.trainer.val_samples):
            return
        setting = f"trainer.val_samples={wanted}"
        if validation is None:
            raise ValueError(f"{setting}: no validation rows; name some in data.val_files, or set it to 0")
        check_gathers(model, config, distributed)
        rows = validation.rows
        ends = special_tokens(model, tokenizer, config.sampling).eos
        for row in range(min(wanted, len(rows))):
            ids, length = rows.ids(row).tolist(), int(rows.prompt_lengths[row])
            check_context(model, length, config.sampling, f"{setting}: {rows.place(row)}: a prompt")
            self.prompts.append(ids[:length])
            self.references.append(tokenizer.decode(trim(ids[length:], ends)))

    def __call__(self) -> list[ValSample]:
        """Samples in the order of the rows on rank 0, an empty list on the other ranks. Collective."""
        if not self.prompts:
            return []
        mine = range(self.distributed.rank, len(self.prompts), self.distributed.size)
        prompts = [self.prompts[row] for row in mine]
        with gathered(self.model, self.config.trainer):
            sampled = generate(self.model, self.tokenizer, prompts, self.config.sampling, mine)
            responses = {response.row_id: response.text for response in sampled}
        self.distributed.wait()  # ranks may differ by more than the timeout of a collective
        parts = self.distributed.gather(responses)
        if not self.distributed.is_main:
            return []
        responses = {row: text for part in parts for row, text in part.items()}
        return [
            ValSample(self.tokenizer.decode(prompt), responses[row], reference)
            for row, (prompt, reference) in enumerate(zip(self.prompts, self.references, strict=True))
        ]

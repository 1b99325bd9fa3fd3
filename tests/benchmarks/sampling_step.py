"""Generation against the published procedure: `python -m tests.benchmarks.sampling_step [CASE …]`.

Same weights, same prompts; at temperature 0 the tokens are asserted to be the same, except at near ties. The weights
are random, with a deviation that sets the positions apart as a trained model does: at the usual 0.02 all of them are
nearly alike. Prints for each case the medians of 5 runs, their ratio, and the peak of memory above what the process
held before.
"""

import sys
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F

from diffllm import ModelConfig, new_model
from diffllm.tokenizer import builtin_tokenizer
from sampling import SamplingConfig, sample
from tests.benchmarks.measure import median_seconds, peak_bytes
from tests.benchmarks.near_ties import first_difference
from tests.benchmarks.published_sampler import published_sample

QWEN_VOCABULARY = 151_936
DEVIATION = 0.1  # of the weights
NEAR = 1e-4  # nats
TOY = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4}
SMALL = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8}


@dataclass
class Case:
    shape: dict[str, int]
    rows: int
    prompt: int  # tokens
    new: int  # tokens
    steps: int
    alg: str = "entropy"
    temperature: float = 0.0
    top_p: float | None = None


CASES = {
    "toy": Case(TOY, rows=4, prompt=64, new=64, steps=8),
    "toy_long": Case(TOY, rows=4, prompt=128, new=64, steps=8),
    "toy_maskgit": Case(TOY, rows=4, prompt=64, new=64, steps=8, alg="maskgit_plus"),
    "toy_nucleus": Case(TOY, rows=4, prompt=64, new=64, steps=4, temperature=0.7, top_p=0.9),
    "small": Case(SMALL, rows=4, prompt=64, new=64, steps=8),
    "sparse": Case(TOY, rows=1, prompt=12, new=20, steps=512),
}


def compare(case: Case) -> str:
    shape = ModelConfig(vocab_size=QWEN_VOCABULARY, initializer_range=DEVIATION, **case.shape)
    model = new_model(shape, builtin_tokenizer()).eval()
    model.unnamed_ids = ()  # the published procedure samples tokens without a name
    torch.manual_seed(0)
    prompts = torch.randint(10, 1000, (case.rows, case.prompt))
    config = SamplingConfig(
        max_new_tokens=case.new,
        steps=case.steps,
        alg=case.alg,
        temperature=case.temperature,
        top_p=case.top_p,
        stop_at_eos=False,
    )
    made = {}

    def ours(config: SamplingConfig = config) -> None:
        made["ours"] = sample(model, prompts, config, model.special_tokens)

    def published(config: SamplingConfig = config) -> None:
        made["published"] = published_sample(model, prompts, config)

    seconds = median_seconds(ours, published)
    same = "tokens differ, as each draws its own"
    if not case.temperature:
        before = F.pad(prompts, (0, case.new), value=model.mask_token_id)
        ours_steps = sample(model, prompts, config, model.special_tokens, history=True).history
        published_sample(model, prompts, config, history=(their_steps := []))
        gap = first_difference(model, before, ours_steps, their_steps, config)
        assert gap < NEAR, f"the tokens differ, at a gap of {gap}"
        same = f"same tokens but at near ties below {gap:.1e}" if gap else "same tokens"
    nfe = made["ours"].nfe[0]
    one_step = replace(config, steps=1)  # all is masked: the most logits that a step can need
    memory = [peak_bytes(partial(variant, one_step)) / 2**20 for variant in (ours, published)]
    settings = f"{case.alg}, temperature {case.temperature}, top_p {case.top_p}, {case.steps} steps"
    return (
        f"hidden {case.shape['hidden_size']}, {case.shape['num_hidden_layers']} layers, vocabulary "
        f"{QWEN_VOCABULARY:,}, {case.rows}×({case.prompt} + {case.new} new tokens), {settings}: "
        f"{seconds[0]:.2f} s with {nfe} forwards, published {seconds[1]:.2f} s, {seconds[1] / seconds[0]:.2f} times "
        f"faster, {same}; memory above weights {memory[0]:,.0f} MiB, published {memory[1]:,.0f} MiB"
    )


def main() -> None:
    for name in sys.argv[1:] or CASES:
        print(f"{name}: {compare(CASES[name])}", flush=True)


if __name__ == "__main__":
    main()

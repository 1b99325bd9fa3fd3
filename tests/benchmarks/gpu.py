"""Training and sampling on the GPU that is here: `python -m tests.benchmarks.gpu [CASE …] [--output DIRECTORY]`.

Each case measures variants in one process, next to the published procedure and to a floor: matrix products at the rate,
or weights read at the bandwidth, that are measured here. Equalities are checked; one that fails is the exit code 1.
Writes gpu.json and gpu.md. Without a GPU the shapes are tiny and the numbers say nothing: this tries the script.
"""

import gc
import json
import platform
import sys
import tempfile
import traceback
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from data.storage import first_line
from data.terminal import table
from diffllm import DiffLLM
from diffllm.diffusion.block import BlockConfig, BlockDiffusion
from diffllm.diffusion.loss import compiled, masked_loss
from diffllm.diffusion.masked import DiffusionConfig, MaskedDiffusion
from diffllm.diffusion.weights import time_weights
from diffllm.static_forward import StaticForward, compiled_rating, prepare_sampling
from launch.plan import memory_table
from sampling import SamplingConfig, Visibility, sample
from sampling.batch import positions_at_once
from sampling.canvas import count_positions
from sampling.confidence import Rating, rate
from tests.benchmarks.block_step import SETTINGS, make_batch, step
from tests.benchmarks.measure import median_seconds
from tests.benchmarks.models import DEVICE, SHAPES, random_model, write_checkpoint
from tests.benchmarks.near_ties import first_difference
from tests.benchmarks.published_sampler import published_sample
from tests.benchmarks.training_step import published
from trainer.build import build_trainable
from trainer.config import Config, batch_layout
from trainer.distributed import GIB, Distributed, init_distributed
from trainer.fsdp_sft_trainer import FSDPSFTTrainer
from trainer.manifest import versions
from trainer.parallel import compile_parts

ON_GPU = DEVICE.type == "cuda"
SMALL, LARGE = ("0.5b", "7b") if ON_GPU else ("tiny", "tiny")
STEPS = 30 if ON_GPU else 3  # of a training run; the last half is measured
RUNS = 5 if ON_GPU else 1
NEAR = 0.1 if ON_GPU else 1e-3  # nats between the two sides of a tie in bf16, and in float32
P = 0.1  # of CART


@dataclass
class Report:
    """Rows of a case, and the equalities that it checked."""

    rows: list[dict[str, object]] = field(default_factory=list)
    equalities: list[dict[str, object]] = field(default_factory=list)
    error: str | None = None  # that ended it early

    def add(self, variant: str, seconds: float, **more: object) -> None:
        self.rows.append({"variant": variant, "ms": round(seconds * 1e3, 2), **more})

    def check(self, what: str, distance: float, most: float) -> None:
        self.equalities.append({"what": what, "distance": distance, "most": most, "holds": distance <= most})


def timed(*variants: Callable[[], object]) -> list[float]:
    return median_seconds(*variants, runs=RUNS)


@contextmanager
def measured_peak(row: dict[str, object]) -> Iterator[None]:
    """Put the peak of the GPU's memory in GiB into a row."""
    gc.collect()
    if ON_GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    yield
    if ON_GPU:
        row["peak_gib"] = round(torch.cuda.max_memory_allocated() / GIB, 2)


@cache
def rates() -> tuple[float, float]:
    """FLOP/s of a matrix product, and bytes/s of a copy, measured here."""
    size = 8192 if ON_GPU else 256
    a = torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16 if ON_GPU else torch.float32)
    target = torch.empty_like(a)
    [product] = timed(lambda: torch.mm(a, a, out=target))
    [copy] = timed(lambda: target.copy_(a))
    return 2 * size**3 / product, 2 * a.nbytes / copy


def floor(model: DiffLLM, positions: int) -> float:
    """Seconds of a decoder's forward: its products, or its weights, whichever takes longer."""
    weights = sum(parameter.numel() for parameter in model.lm.get_decoder().layers.parameters())
    size = next(model.parameters()).element_size()
    flops, bandwidth = rates()
    return max(2 * weights * positions / flops, weights * size / bandwidth)


def full_batch(model: DiffLLM, rows: int, length: int) -> tuple[Tensor, ...]:
    """x_t, x_0, masked [B, L] and t [B]: half of the last three quarters is masked."""
    torch.manual_seed(1)
    x_0 = torch.randint(10, 1000, (rows, length))
    masked = (torch.arange(length) >= length // 4) & (torch.rand(rows, length) < 0.5)
    return x_0.masked_fill(masked, model.mask_token_id), x_0, masked, torch.full((rows,), 0.5)


def step_of(model: DiffLLM, batch: tuple[Tensor, ...], attended: Tensor | None = None) -> Callable[[], float]:
    """Forward and backward pass with CART weights."""
    x_t, x_0, masked, t = batch
    everything = torch.ones_like(masked) if attended is None else attended
    weights = time_weights(t[:, None], masked, everything, "cart", P).to(DEVICE)
    seen = {} if attended is None else {"visibility": Visibility(attended=attended)}
    if attended is not None:
        seen["position_ids"] = count_positions(attended).to(DEVICE)
    inputs = x_t.to(DEVICE), x_0.to(DEVICE)

    def step() -> float:
        model.zero_grad(set_to_none=True)
        loss = model(*inputs, masked, weights, **seen).loss / masked.sum()
        loss.backward()
        return loss.item()

    return step


def published_step(model: DiffLLM, batch: tuple[Tensor, ...]) -> Callable[[], float]:
    inputs = [tensor.to(DEVICE) for tensor in batch]

    def step() -> float:
        model.zero_grad(set_to_none=True)
        return published(model, *inputs)

    return step


def case_step(report: Report) -> None:
    """Forward and backward pass: the published procedure, ours, and ours compiled."""
    for shape, rows, length in ((SMALL, 8, 2048), (LARGE, 2, 2048)) if ON_GPU else ((SMALL, 2, 64),):
        model = random_model(shape).train()
        batch = full_batch(model, rows, length)
        variants = {"published": published_step(model, batch), "ours": step_of(model, batch)}
        losses = {name: step() for name, step in variants.items()}
        for name, seconds in zip(variants, timed(*variants.values()), strict=True):
            report.add(f"{shape} {rows}×{length} {name}", seconds, tokens_per_second=round(rows * length / seconds))
        compile_parts(model, SHAPES[shape])
        step = step_of(model, batch)
        losses["compiled"] = step()
        [seconds] = timed(step)
        report.add(f"{shape} {rows}×{length} compiled", seconds, tokens_per_second=round(rows * length / seconds))
        for name, loss in losses.items():
            report.check(f"loss of {shape}, {name}", abs(loss / losses["published"] - 1), 0.01 if ON_GPU else 1e-4)
        del model, variants, step


def case_ragged(report: Report) -> None:
    """Rows of unequal length: padded, and without their padding."""
    shape, rows, length = (SMALL, 8, 2048) if ON_GPU else (SMALL, 3, 64)
    losses = {}
    for attention in ("sdpa", "varlen"):
        model = random_model(shape, attention).train()
        x_t, x_0, masked, t = full_batch(model, rows, length)
        pads = (torch.rand(rows, generator=torch.Generator().manual_seed(2)) * 0.8 * length).long()
        pads[0] = 0
        attended = torch.arange(length) >= pads[:, None]
        step = step_of(model, (x_t, x_0, masked & attended, t), attended)
        losses[attention] = step()
        [seconds] = timed(step)
        report.add(f"{shape} {attention}", seconds, tokens_per_second=round(int(attended.sum()) / seconds))
        del model, step
    report.check("loss without padding", abs(losses["varlen"] / losses["sdpa"] - 1), 0.01 if ON_GPU else 1e-4)


def case_head(report: Report) -> None:
    """The head with its loss and gradients, against its three matrix products alone."""
    for shape, n in ((SMALL, 6144), (LARGE, 1536)) if ON_GPU else ((SMALL, 64),):
        config, dtype = SHAPES[shape], torch.bfloat16 if ON_GPU else torch.float32
        torch.manual_seed(0)
        hidden = torch.randn(n, config.hidden_size, device=DEVICE, dtype=dtype).requires_grad_()
        head = (0.02 * torch.randn(config.vocab_size, config.hidden_size, device=DEVICE, dtype=dtype)).requires_grad_()
        targets, weights = torch.randint(config.vocab_size, (n,), device=DEVICE), torch.rand(n, device=DEVICE)

        def step(kernel, hidden=hidden, head=head, targets=targets, weights=weights) -> Tensor:
            hidden.grad = head.grad = None
            loss, nll, _ = kernel(hidden, head, targets, weights)
            loss.backward()
            return nll

        @torch.no_grad()
        def products(hidden=hidden, head=head) -> None:
            for some in hidden.split(1024):
                logits = some @ head.T
                logits @ head
                logits.T @ some

        faster = compiled("inductor")
        exact, rated = step(masked_loss), step(faster)
        report.check(f"nll of {shape}, compiled", float((exact - rated).abs().max()), 0.01 if ON_GPU else 1e-4)
        names = ("products", "loss", "loss compiled")
        for name, seconds in zip(
            names, timed(products, partial(step, masked_loss), partial(step, faster)), strict=True
        ):
            report.add(f"{shape} {n} positions, {name}", seconds)


def case_rating(report: Report) -> None:
    """Logits of the head and ratings of the likeliest tokens, against the product alone."""
    shape, dtype = SHAPES[LARGE], torch.bfloat16 if ON_GPU else torch.float32
    torch.manual_seed(0)
    head = 0.02 * torch.randn(shape.vocab_size, shape.hidden_size, device=DEVICE, dtype=dtype)
    config, faster = SamplingConfig(alg="entropy"), compiled_rating("true")
    at_once = positions_at_once(SimpleNamespace(device=DEVICE, vocab_size=shape.vocab_size))

    @torch.no_grad()
    def rated(hidden: Tensor, rating: Rating) -> Tensor:
        """[n] entropies."""
        return torch.cat([rating(some @ head.T, None, None, config).entropy for some in hidden.split(at_once)])

    for n in (32, 256, 4096) if ON_GPU else (32,):
        hidden = torch.randn(n, shape.hidden_size, device=DEVICE, dtype=dtype)
        report.check(
            f"entropies of {n} candidates, compiled",
            float((rated(hidden, rate) - rated(hidden, faster)).abs().max()),
            1e-3,
        )
        variants = {
            "product": partial(torch.matmul, hidden, head.T),
            "rated": partial(rated, hidden, rate),
            "rated, compiled": partial(rated, hidden, faster),
        }
        for name, seconds in zip(variants, timed(*variants.values()), strict=True):
            report.add(f"{n} candidates, {name}", seconds)


def case_blocks(report: Report) -> None:
    """A step by blocks of 32, with FlexAttention on a GPU, against one by masks and one with a dense mask."""
    length = 2048 if ON_GPU else 64
    batch = make_batch(length, length // 4)
    for compiling in (False, True):
        losses = {}
        for name, attention, objective in (
            ("by masks", "sdpa", MaskedDiffusion(DiffusionConfig(**SETTINGS), 1, 0)),
            ("dense", "sdpa", BlockDiffusion(BlockConfig(**SETTINGS), 1, 0)),
            ("by blocks", "varlen", BlockDiffusion(BlockConfig(**SETTINGS), 1, 0)),
        ):
            model = random_model(SMALL, attention).train()
            if compiling:
                compile_parts(model, SHAPES[SMALL])
            noised = objective.corrupt(batch, 0)
            losses[name] = float(objective.loss(model, noised).loss.detach() / objective.denominator(noised))
            [seconds] = timed(partial(step, model, objective, noised))
            report.add(
                f"{SMALL} {len(batch['slot'])}×{length} {name}{', compiled' if compiling else ''}",
                seconds,
                tokens_per_second=round(len(batch["slot"]) * length / seconds),
            )
            del model
        distance = abs(losses["by blocks"] / losses["dense"] - 1)
        report.check(f"loss by blocks{', compiled' if compiling else ''}", distance, 0.01 if ON_GPU else 1e-4)


def _rows_file(directory: Path, rows: int, length: int) -> Path:
    """Rows with a prompt of a quarter of `length`, and responses that are cut to any max_length."""
    letters = torch.randint(26, (rows, 6 * length), generator=torch.Generator().manual_seed(0))
    with (directory / "rows.jsonl").open("w") as file:
        for row in letters.tolist():
            text = "".join(chr(97 + letter) for letter in row)
            record = {"prompt": text[: length // 4], "response": text[length // 4 :]}
            file.write(json.dumps(record) + "\n")
    return directory / "rows.jsonl"


def case_train(report: Report) -> None:
    """train.py's own loop, with optimizer and checks; the memory that `launch.plan` foretells beside the peak."""
    length = 2048 if ON_GPU else 64
    settings = {
        f"{SMALL} full 8×{length}": (SMALL, 8, length, {}),
        f"{LARGE} LoRA 2×{2 * length}": (LARGE, 2, 2 * length, {"lora_rank": 16}),
        f"{LARGE} full 4×{length}": (LARGE, 4, length, {"enable_gradient_checkpointing": True}),
    }
    with tempfile.TemporaryDirectory() as name, init_distributed() as distributed:
        directory = Path(name)
        rows = _rows_file(directory, 64, length)
        for variant, (shape, batch, size, model) in settings.items():
            path = directory / shape if (directory / shape).exists() else write_checkpoint(shape, directory)
            for compile in ("true", "false"):
                config = Config()
                config.model = replace(config.model, path=str(path), compile=compile, **model)
                config.data = replace(
                    config.data, train_files=[str(rows)], max_length=size, truncation="right", num_workers=1,
                    train_batch_size=batch, perbatch_cutoff_type="min_pad", cache_dir=str(directory / "cache"),
                )  # fmt: skip
                config.trainer = replace(
                    config.trainer, max_steps=STEPS, output_dir=str(directory / f"{compile} {variant}"),
                    logger=[], val_samples=0, peak_tflops=None if ON_GPU else 0.1, save_checkpoint_steps=None,
                )  # fmt: skip
                row: dict[str, object] = {}
                try:
                    with measured_peak(row):
                        steps = _train(config, distributed)
                except (MemoryError, ValueError) as error:
                    if "does not fit" not in str(error) and "out of memory" not in str(error):
                        raise
                    report.rows.append({"variant": variant, "ms": None, "note": str(error)[:60]})
                    continue
                layout = batch_layout(config.data, 0, 1)
                planned = memory_table(build_trainable(config, DEVICE)[0], config, layout)["total"]
                half = sorted(steps[len(steps) // 2 :], key=lambda step: step["perf/step_seconds"])
                middle = half[len(half) // 2]
                report.add(
                    f"{variant}{' compiled' if compile == 'true' else ''}",
                    middle["perf/step_seconds"],
                    tokens_per_second=round(middle["perf/tokens_per_second"]),
                    mfu=round(middle["perf/mfu"], 3) if "perf/mfu" in middle else None,
                    first_step_seconds=round(steps[0]["perf/step_seconds"], 1),
                    planned_gib=round(max(planned) / GIB, 2),
                    **row,
                )


class EnoughSteps(Exception):  # noqa: N818
    """Ends a run before it saves and exports."""


def _train(config: Config, distributed: Distributed) -> list[dict[str, float]]:
    """Metrics of each step of a run."""
    trainer = FSDPSFTTrainer(config, distributed)
    steps, metrics = [], trainer.speed.metrics

    def recorded(*arguments) -> dict[str, float]:
        steps.append(metrics(*arguments))
        if len(steps) == STEPS:
            raise EnoughSteps
        return steps[-1]

    trainer.speed.metrics = recorded
    with suppress(EnoughSteps):
        trainer.fit()
    return steps


@dataclass(frozen=True)
class Sampled:
    rows: int
    prompt: int
    new: int
    steps: int
    settings: dict[str, object] = field(default_factory=dict)
    blocks: int | None = None  # positions of a block of the model's attention

    def __str__(self) -> str:
        more = "".join(f", {name} {value}" for name, value in self.settings.items())
        more += "" if self.blocks is None else f", attention by blocks of {self.blocks}"
        return f"{self.rows}×({self.prompt} + {self.new}), {self.steps} steps{more}"

    def computed(self) -> Iterator[int]:
        """Positions of a row that each forward computes; all blocks take equally many steps."""
        whole, block = self.prompt + self.new, self.blocks or self.settings.get("block_length", self.new)
        for start in range(0, self.new, block):
            if self.blocks:  # at first with the clean tokens that are not cached yet
                first, later = block + (block if start else self.prompt), block
            else:
                first = whole
                later = {"prefix": self.new - start, "dual": block}.get(self.settings.get("cache"), whole)
            yield from [first, *[later] * (self.steps * block // self.new - 1)]


CACHED = {"cache": "prefix", "block_length": 32, "alg": "maskgit_plus"}
SAMPLED = (
    [
        Sampled(1, 128, 256, 64),
        Sampled(1, 512, 256, 256, CACHED),
        Sampled(16, 512, 256, 256, CACHED),
        Sampled(16, 512, 256, 256, CACHED | {"cache": "dual"}),
        Sampled(16, 128, 256, 32),
        Sampled(1, 512, 256, 256, blocks=32),
        Sampled(16, 512, 256, 64, blocks=32),
    ]
    if ON_GPU
    else [Sampled(1, 16, 32, 8), Sampled(2, 16, 32, 16, CACHED | {"block_length": 8}), Sampled(2, 16, 32, 16, blocks=8)]
)


def case_sample(report: Report) -> None:
    """Whole responses: plain forwards, graphs, graphs of compiled layers, and the published procedure."""
    for case in SAMPLED:
        prompts = torch.randint(10, 1000, (case.rows, case.prompt), generator=torch.Generator().manual_seed(0))
        prompts = prompts.to(DEVICE)
        config = SamplingConfig(
            max_new_tokens=case.new, steps=case.steps, stop_at_eos=False, batch_size=case.rows, **case.settings
        )
        model = random_model(LARGE).eval()
        model.block_length = case.blocks
        made, nfe = {}, 0

        def ours(name: str, model=model, prompts=prompts, config=config, made=made) -> list[int]:
            made[name] = sample(model, prompts, config, model.special_tokens, history=True)
            return made[name].nfe

        # Forwards without graphs have the shapes of those with: the same kernels give the same bits.
        for name, forwards in (("plain", None), ("graphs", 0), ("compiled and graphs", 10**9)):
            model.static = StaticForward(model.decode, "auto", None) if forwards is None else None
            if forwards is not None:
                prepare_sampling(model, "auto" if ON_GPU or not forwards else "true", forwards)
            nfe = ours(name)[0]  # warms up
            row: dict[str, object] = {}
            with measured_peak(row):
                [seconds] = timed(partial(ours, name))
            report.add(
                f"{case}, {name}",
                seconds / nfe,
                nfe=nfe,
                tokens_per_second=round(case.rows * case.new / seconds),
                **row,
            )
        report.check(
            f"tokens of {case}, graphs", float((made["graphs"].sequences != made["plain"].sequences).sum()), 0.0
        )
        before = F.pad(prompts, (0, case.new), value=model.mask_token_id)
        partial_forwards = case.settings or case.blocks
        others = {} if partial_forwards else {"compiled": made["compiled and graphs"].history}
        if not partial_forwards:
            history: list[Tensor] = []
            plain = random_model(LARGE).eval()
            published_sample(plain, prompts, config, history=history)
            [seconds] = timed(lambda: published_sample(plain, prompts, config))  # noqa: B023
            report.add(f"{case}, published", seconds / case.steps, nfe=case.steps)
            others["published"] = history
            for name, steps in others.items():
                gap = first_difference(plain, before, made["plain"].history, steps, config)
                report.check(f"gap where tokens of {case} first differ, {name}", gap, NEAR)
            del plain
        forwards = [floor(model, case.rows * positions) for positions in case.computed()]
        report.add(f"{case}, floor of the layers", sum(forwards) / len(forwards))
        del model, made


CASES: dict[str, Callable[[Report], None]] = {
    "step": case_step,
    "ragged": case_ragged,
    "head": case_head,
    "rating": case_rating,
    "blocks": case_blocks,
    "train": case_train,
    "sample": case_sample,
}


def environment() -> dict[str, object]:
    """The machine and the versions that the numbers belong to."""
    flops, bandwidth = rates()
    device = torch.cuda.get_device_name() if ON_GPU else f"{platform.processor() or platform.machine()}, tiny shapes"
    return {
        "device": device,
        "cuda": torch.version.cuda,
        "matrix product, TFLOP/s": round(flops / 1e12, 2),
        "copy, GB/s": round(bandwidth / 1e9, 1),
        **versions(),
    }


def markdown(machine: dict[str, object], reports: dict[str, Report]) -> str:
    """Tables of all cases."""
    lines = ["# GPU benchmarks", "", ", ".join(f"{name} {value}" for name, value in machine.items())]
    for case, report in reports.items():
        names = list(dict.fromkeys(name for row in report.rows for name in row))
        lines += ["", f"## {case}", "", f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
        lines += [f"| {' | '.join(str(row.get(name, '')) for name in names)} |" for row in report.rows]
        for equality in report.equalities:
            verdict = "holds" if equality["holds"] else "FAILS"
            lines.append(f"\n{equality['what']}: {equality['distance']:.2g}, at most {equality['most']:g}: {verdict}")
        if report.error:
            lines.append(f"\nended early: {report.error}")
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> int:
    parser = ArgumentParser("python -m tests.benchmarks.gpu", description=__doc__.partition("\n")[0])
    parser.add_argument("cases", nargs="*", help=f"of {', '.join(CASES)}; default: all")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks"))
    options = parser.parse_args(arguments)
    if unknown := [case for case in options.cases if case not in CASES]:
        parser.error(f"{', '.join(unknown)}: no such case; choose from {', '.join(CASES)}")
    machine, reports = environment(), {}
    options.output.mkdir(parents=True, exist_ok=True)
    for case in options.cases or CASES:
        reports[case] = report = Report()
        try:
            CASES[case](report)
        except Exception as error:  # the other cases are measured all the same
            traceback.print_exc()
            report.error = f"{type(error).__name__}: {first_line(error)}"
        rows = [[f"{case}:", "ms"], *([row["variant"], row["ms"]] for row in report.rows)]
        print(table(rows), flush=True)
        written = {"machine": machine, "cases": {name: asdict(each) for name, each in reports.items()}}
        (options.output / "gpu.json").write_text(json.dumps(written, indent=2) + "\n")
        (options.output / "gpu.md").write_text(markdown(machine, reports))
    failed = [equality for report in reports.values() for equality in report.equalities if not equality["holds"]]
    for equality in failed:
        print(f"error: {equality['what']}: {equality['distance']:.3g}, at most {equality['most']:g}", file=sys.stderr)
    ended = {case: report.error for case, report in reports.items() if report.error}
    for case, error in ended.items():
        print(f"error: {case} ended early: {error}", file=sys.stderr)
    print(f"{options.output}/gpu.md")
    return 1 if failed or ended else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

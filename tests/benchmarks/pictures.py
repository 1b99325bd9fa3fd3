"""Draw the pictures of the README from a finished run: `python -m tests.benchmarks.pictures outputs/quickstart`.

In `launch/pictures`, forming.svg is an answer after some of its steps, curve.svg the bound in training and validation.
"""

import io
import sys
from pathlib import Path

import numpy as np
from matplotlib import pyplot
from rich.console import Console
from rich.table import Table
from rich.text import Text

from data import prompt_ids
from data.storage import read_records, whole_file
from diffllm import load_model
from diffllm.generate import special_tokens
from diffllm.tokenizer import load_tokenizer
from launch.drawing import draft
from sampling import Canvas, SamplingConfig, fill

PICTURES = Path(__file__).parents[2] / "launch" / "pictures"
QUESTION = "Solve 6x-9=33"
SHOWN = (2, 6, 10, 14, 17)  # steps
WINDOW = 50  # steps of the mean in the curve


def forming(run: Path) -> str:
    """An answer after the SHOWN steps, as SVG."""
    model, tokenizer = load_model(run / "hf").eval(), load_tokenizer(run / "hf")
    config = SamplingConfig(max_new_tokens=18)
    special = special_tokens(model, tokenizer, config)
    prompt = prompt_ids([{"role": "user", "content": QUESTION}], tokenizer)
    drafts: list[Text] = []
    list(
        fill(
            model,
            [Canvas.after(prompt, config.max_new_tokens, special.mask)],
            config,
            special,
            on_step=lambda event: drafts.append(draft(event, tokenizer)),
        )
    )
    grid = Table.grid(padding=(0, 4))
    chosen = [number for number in SHOWN if number <= len(drafts)]
    grid.add_row(*(Text(f"step {number}", style="dim italic") for number in chosen))
    grid.add_row(*(drafts[number - 1] for number in chosen))
    console = Console(record=True, width=92, file=io.StringIO(), force_terminal=True)
    console.print(grid)
    return console.export_svg(title=QUESTION, unique_id="forming")


def curve(run: Path) -> bytes:
    """The bound by step, as SVG."""
    records = read_records(run / "metrics.jsonl").objects
    trained = np.array([record["train/elbo"] for record in records])
    mean = np.convolve(trained, np.ones(WINDOW) / WINDOW, mode="valid")
    validated = {record["step"]: record["val/elbo"] for record in records if "val/elbo" in record}
    pyplot.rcParams["svg.hashsalt"] = "curve"  # the same picture from the same numbers
    figure, axes = pyplot.subplots(figsize=(6, 3), layout="constrained")
    steps = np.arange(WINDOW, len(trained) + 1)
    axes.plot(steps[::10], mean[::10], label=f"training, mean of {WINDOW} steps")
    axes.plot(list(validated), list(validated.values()), "o-", label="validation")
    axes.set(xlabel="step", ylabel="elbo, nats a token", yscale="log", title=run.name)
    axes.legend()
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def main(run: Path) -> None:
    PICTURES.mkdir(exist_ok=True)
    with whole_file(PICTURES / "forming.svg") as file:
        file.write(forming(run))
    with whole_file(PICTURES / "curve.svg", "wb") as file:
        file.write(curve(run))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""Draw the pictures of the README from a finished run: `python -m tests.benchmarks.pictures outputs/quickstart`.

In `launch/pictures`, forming.svg is an answer after some of its steps, curves.svg the first panels of `trainer.plot`.
"""

import io
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from data import prompt_ids
from data.storage import whole_file
from diffllm import load_model
from diffllm.generate import special_tokens
from diffllm.tokenizer import load_tokenizer
from launch.drawing import draft
from sampling import Canvas, SamplingConfig, fill
from trainer.curves import group, read_run
from trainer.plot import PANELS, draw, svg

PICTURES = Path(__file__).parents[2] / "launch" / "pictures"
QUESTION = "Solve 6x-9=33"
SHOWN = (2, 6, 10, 14, 17)  # steps


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
    console = Console(record=True, width=80, file=io.StringIO(), force_terminal=True)
    console.print(grid)
    return console.export_svg(title=QUESTION, unique_id="forming")


def main(run: Path) -> None:
    PICTURES.mkdir(exist_ok=True)
    with whole_file(PICTURES / "forming.svg") as file:
        file.write(forming(run))
    with whole_file(PICTURES / "curves.svg") as file:
        file.write(svg(draw(group([read_run(run)]), PANELS[:4])))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

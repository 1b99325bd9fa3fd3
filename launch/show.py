"""Show rows as they are trained on: `python -m launch.show model=dream_7b data.train_files=mine.jsonl rows=3`.

Takes the settings of train.py, `rows` to show, and `characters` of each text (0 shows all). Reads the tokenizer, but no
weights. The rows are spread over those of the first steps.
"""

import sys
from dataclasses import replace

from rich.console import Console

from data import BatchLayout
from diffllm.diffusion import build_objective
from launch.cli import user_errors
from launch.settings import read_settings, whole_number
from trainer.build import build_batches, build_tokenizer, check_length
from trainer.config import DEFAULT_MICRO_BATCH_SIZE
from trainer.preview import CHARACTERS, print_preview

DEFAULTS = {"rows": 3, "characters": CHARACTERS}


def show(arguments: list[str]) -> None:
    """Print the report on the rows of a command line, then some of them.

    Raises:
        ValueError: an unknown setting, a wrong value, or rows that cannot be trained on.
    """
    values, config, _ = read_settings(arguments, ["rows", "characters"])
    rows, characters = (whole_number(name, values.get(name), default) for name, default in DEFAULTS.items())
    tokenizer, context = build_tokenizer(config.model)
    check_length(config.data, context)
    objective = build_objective(config.diffusion, tokenizer.mask_token_id, config.seed)
    data = config.data
    size = data.train_batch_size or (data.micro_batch_size_per_gpu or DEFAULT_MICRO_BATCH_SIZE) * (
        data.gradient_accumulation_steps or 1
    )
    config = replace(config, data=replace(data, num_workers=0))
    source, _, prepared = build_batches(config, tokenizer, BatchLayout(0, 1, size, 1), objective.corrupt, None)
    for _, report in prepared.values():
        print(report.text())
    table = prepared["training"].rows if "training" in prepared else None
    batches = (batch for micro_batches in source.loader(range(-(-rows // size))) for batch in micro_batches)
    print_preview(Console(), batches, tokenizer, table, rows, characters)


if __name__ == "__main__":
    with user_errors(debug=False):
        if {"-h", "--help"} & set(sys.argv[1:]):
            sys.exit(print(__doc__))
        show(sys.argv[1:])

"""Score a model on a task: `python evaluate.py experiment=quickstart model.path=outputs/quickstart/hf`.

`task=NAME` chooses the task. `torchrun --nproc_per_node=8 evaluate.py …` shares its questions among the ranks.
"""

from launch.cli import entry
from launch.evaluation import evaluate
from trainer.config import Config

ROWS = ("data.val_files", "data.columns", "data.on_bad_row", "data.subset")
READS = ("model", "sampling", "task", "seed", "trainer.output_dir", "trainer.experiment_name", *ROWS)


@entry(READS)
def main(config: Config) -> None:
    evaluate(config)


if __name__ == "__main__":
    main()

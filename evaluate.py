"""Score a model on tasks: `python evaluate.py experiment=quickstart model.path=outputs/quickstart/hf`.

`task=NAME` chooses a task, `'task=[NAME,NAME]'` several. `torchrun --nproc_per_node=8 evaluate.py …` shares the
questions among the ranks.
"""

from launch.cli import entry
from launch.evaluation import evaluate
from launch.results import READS
from trainer.config import Config


@entry(READS)
def main(config: Config) -> None:
    evaluate(config)


if __name__ == "__main__":
    main()

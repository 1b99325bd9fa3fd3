"""Sample from a checkpoint: `python sample.py model.path=outputs/quickstart/hf prompt="Solve 3x+5=20"`."""

from launch.cli import entry
from launch.generate import answer
from trainer.config import Config


@entry
def main(config: Config) -> None:
    answer(config)


if __name__ == "__main__":
    main()

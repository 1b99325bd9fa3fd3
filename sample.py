"""Sample from a checkpoint: `python sample.py model.path=outputs/dream_s1k/hf prompt="What is 3 times 5?"`."""

from launch.cli import entry
from launch.generate import answer
from trainer.config import Config


@entry
def main(config: Config) -> None:
    answer(config)


if __name__ == "__main__":
    main()

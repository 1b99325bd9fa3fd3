"""Score on held-out equations: `python evaluate.py experiment=quickstart model.path=outputs/quickstart/hf`."""

from launch.cli import entry
from launch.evaluation import evaluate
from trainer.config import Config


@entry
def main(config: Config) -> None:
    evaluate(config)


if __name__ == "__main__":
    main()

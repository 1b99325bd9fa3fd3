"""Sample from a checkpoint: `python sample.py model.path=outputs/dream_s1k/hf prompt="What is 3 times 5?"`."""

from launch.answers import answer
from launch.chat import chat
from launch.cli import entry
from trainer.config import Config

MODES = {"answer": answer, "chat": chat}
READS = ("model", "sampling", "mode", "prompt", "template", "input", "output", "record", "data.columns")


@entry(READS)
def main(config: Config) -> None:
    MODES[config.mode](config)


if __name__ == "__main__":
    main()

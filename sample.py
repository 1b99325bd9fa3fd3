"""Sample from a checkpoint: answer a prompt or a file of prompts, fill in a template, or chat.

  python sample.py model.path=outputs/quickstart/hf prompt="Solve 3x+5=20" sampling.steps=6
  python sample.py model.path=outputs/quickstart/hf template="Solve 3x+<|mask:1|>=20"
  python sample.py model.path=outputs/dream_s1k/hf mode=chat
  torchrun --nproc_per_node=8 sample.py model.path=outputs/dream_s1k/hf input=rows.jsonl output=answers.jsonl

Give prompt, template or both, or input with output, or mode=chat. The answer goes to stdout. A model is sampled with
the settings that it recommends; the command line wins.
"""

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

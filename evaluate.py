"""Score a model on tasks, the built-in ones or your own rows.

  python evaluate.py model.path=outputs/quickstart/hf
  python evaluate.py model.path=M 'task=[gsm8k,math]' sampling=dream_instruct/gsm8k
  torchrun --nproc_per_node=8 evaluate.py model.path=M data.val_files=test.jsonl trainer.output_dir=outputs/mine

It writes scores and answers to trainer.output_dir; the same command resumes. The ranks share the questions.
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

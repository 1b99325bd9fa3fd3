"""Train a diffusion language model: fine-tune a checkpoint, adapt a causal model, or start from scratch.

  python train.py experiment=quickstart
  torchrun --nproc_per_node=8 train.py model=dream_7b data.train_files=mine.jsonl optim.lr=2e-6
  python train.py experiment=quickstart -m optim.lr=1e-3,4e-3 seed=0,1

A run writes to trainer.output_dir; the same command resumes it. trainer.max_steps=0 shows the run, and trains nothing.
"""

from launch.cli import entry
from launch.sweep import train_job
from trainer.config import Config
from trainer.distributed import init_distributed
from trainer.fsdp_sft_trainer import FSDPSFTTrainer

READS = ("model", "data", "diffusion", "optim", "trainer", "sampling", "task", "seed")


@entry(READS, run_job=train_job)
def main(config: Config) -> None:
    with init_distributed() as distributed:
        FSDPSFTTrainer(config, distributed).fit()


if __name__ == "__main__":
    main()

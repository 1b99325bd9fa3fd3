"""Fine-tune a diffusion language model: `torchrun train.py optim.lr=2e-6 diffusion.time_reweighting=cart`."""

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

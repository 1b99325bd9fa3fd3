"""Fine-tune a diffusion language model: `torchrun train.py optim.lr=2e-6 diffusion.time_reweighting=cart`."""

from launch.cli import entry
from trainer.config import Config
from trainer.fsdp_sft_trainer import FSDPSFTTrainer
from trainer.world import open_world


@entry
def main(config: Config) -> None:
    with open_world() as world:
        FSDPSFTTrainer(config, world).fit()


if __name__ == "__main__":
    main()

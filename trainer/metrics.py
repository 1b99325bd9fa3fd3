"""Where metrics go: metrics.jsonl always, the console's progress bar, wandb."""

import json
import secrets
from pathlib import Path
from typing import Any

from tqdm import tqdm

from trainer.config import TrainerConfig


class MetricsLog:
    """Writes the metrics of each step; made on rank 0 only.

    After a resume the lines of steps that will be done again are removed, and the same wandb run goes on.
    """

    def __init__(self, config: TrainerConfig, settings: dict[str, Any], done: int, steps: int):
        directory = Path(config.output_dir)
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / "metrics.jsonl"
        kept = [line for line in _lines(path) if done and json.loads(line)["step"] <= done]
        path.write_text("".join(kept))
        self._file = path.open("a")
        self._bar = tqdm(
            total=steps,
            initial=done,
            desc="train",
            unit="step",
            dynamic_ncols=True,
            disable="console" not in config.logger,
        )
        self._wandb = _wandb_run(config, settings, directory, done) if "wandb" in config.logger else None

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._file.write(json.dumps({"step": step, **metrics}) + "\n")
        self._file.flush()
        if self._wandb is not None:
            self._wandb.log(metrics, step=step)

    def advance(self, loss: float, tokens_per_second: float) -> None:
        """Move the progress bar by one step."""
        self._bar.set_postfix_str(f"loss {loss:.4f}, {tokens_per_second:,.0f} tokens/s", refresh=False)
        self._bar.update()

    def say(self, text: str) -> None:
        """A line above the progress bar."""
        if not self._bar.disable:
            self._bar.write(text)

    def close(self) -> None:
        self._bar.close()
        self._file.close()
        if self._wandb is not None:
            self._wandb.finish()


def _lines(path: Path) -> list[str]:
    """Whole lines; a kill can leave half of one at the end."""
    if not path.is_file():
        return []
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def _wandb_run(config: TrainerConfig, settings: dict[str, Any], directory: Path, done: int):
    import wandb

    id_file = directory / "wandb_id"
    if not done or not id_file.is_file():
        id_file.write_text(secrets.token_hex(4))
    return wandb.init(
        project=config.project_name,
        name=config.experiment_name,
        id=id_file.read_text(),
        resume="allow",
        dir=directory,
        config=settings,
    )

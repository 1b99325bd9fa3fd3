"""Where metrics go: metrics.jsonl always, the console's progress bar, wandb."""

import json
import math
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from trainer.config import TrainerConfig


class MetricsLog:
    """Takes the metrics of each step until it is closed; only the one that is enabled, on rank 0, writes anything.

    After a resume the lines of steps that will be done again are removed, and the same wandb run goes on.
    """

    def __init__(self, config: TrainerConfig, settings: dict[str, Any], done: int, steps: int, enabled: bool):
        self._file = self._bar = self._wandb = None
        if not enabled:
            return
        directory = Path(config.output_dir)
        directory.mkdir(parents=True, exist_ok=True)
        self._file = _open_metrics(directory / "metrics.jsonl", done)
        if "console" in config.logger:
            self._bar = tqdm(total=steps, initial=done, desc="train", unit="step", dynamic_ncols=True)
        if "wandb" in config.logger:
            self._wandb = _wandb_run(config, settings, directory, done)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._file is not None:
            self._file.close()
        self._tell_wandb(lambda run: run.finish(exit_code=int(error[0] is not None)))

    def log(self, step: int, metrics: dict[str, float]) -> None:
        if self._file is not None:
            numbers = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
            self._file.write(json.dumps({"step": step, **numbers}) + "\n")
            self._file.flush()
        self._tell_wandb(lambda run: run.log(metrics, step=step))
        if self._bar is not None:
            loss, speed = metrics["train/loss"], metrics["perf/tokens_per_second"]
            self._bar.set_postfix_str(f"loss {loss:.4f}, {speed:,.0f} tokens/s", refresh=False)
            self._bar.update()
            if "val/elbo" in metrics:
                self._bar.write(
                    f"step {step}: train loss {loss:.4f}, val elbo {metrics['val/elbo']:.4f} nats/token (perplexity ≤ "
                    f"{metrics['val/perplexity_bound']:.3f}), masked accuracy {metrics['val/masked_accuracy']:.1%}"
                )

    def _tell_wandb(self, what: Callable[[Any], None]) -> None:
        """A cluster that stops a job ends wandb's own process too: that must not keep a run from saving."""
        if self._wandb is None:
            return
        try:
            what(self._wandb)
        except Exception as error:
            self._wandb = None
            print(f"wandb gets no more of this run ({error}); metrics.jsonl does", flush=True)


def _open_metrics(path: Path, done: int):
    """The file, with the whole lines of the first `done` steps in it; a kill can leave half of one at the end."""
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= done]
    path.write_text("".join(kept))
    return path.open("a")


def _wandb_run(config: TrainerConfig, settings: dict[str, Any], directory: Path, done: int):
    import wandb  # slow to import, and only needed here

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

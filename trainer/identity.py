"""What makes a run the one it is, and not another that happens to have the same directory."""

from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from data import StreamedBatches, TrainBatches
from trainer import checkpoint
from trainer.config import Config, differences, to_dict


@dataclass(frozen=True)
class Identity:
    """Kept with every checkpoint; a run goes on only from one with the same."""

    config: Config
    global_batch_size: int
    training_rows: int
    training_tokens: str  # fingerprint of the token rows, or of the files that are streamed
    vocabulary: int  # tokens that the model knows

    @classmethod
    def of(cls, config: Config, batches: TrainBatches | StreamedBatches, vocabulary: int) -> "Identity":
        return cls(config, batches.share.global_batch_size, *batches.identity(), vocabulary)

    def manifest(self, **progress: Any) -> dict[str, Any]:
        """What goes into checkpoint.json."""
        versions = {name: version(name) for name in ("diffllm", "torch", "transformers")}
        return {**asdict(self), "config": to_dict(self.config), "versions": versions, **progress}

    def check(self, path: Path) -> None:
        """Refuse a checkpoint of another run.

        Raises:
            ValueError: naming all that differs.
        """
        saved = checkpoint.read_manifest(path)
        found = differences(saved["config"], self.config)
        for name, here in asdict(self).items():
            if name != "config" and saved.get(name) != here:
                found.append(f"{name} is {saved.get(name, 'not recorded')} there and {here} here")
        if found:
            raise ValueError(
                f"{path} belongs to a run with other settings: {'; '.join(found)}. "
                "Give the same ones to go on with it, or another trainer.experiment_name to start anew"
            )


def find_checkpoint(directory: Path, resume: str) -> tuple[Path | None, list[str]]:
    """The checkpoint that `trainer.resume` names, None if there is none, and what was passed over and why.

    Raises:
        ValueError: it names none, or would branch off inside the run that `directory` holds.
    """
    newest, skipped = checkpoint.find_newest(directory)
    if resume == "auto":
        return newest, skipped
    if newest is not None and newest.resolve() != Path(resume).resolve():
        raise ValueError(
            f"trainer.resume={resume}, but {directory} holds the checkpoints of a run: "
            "give another trainer.experiment_name, or delete it"
        )
    if resume == "never":
        return None, []
    if defect := checkpoint.find_defect(Path(resume)):
        raise ValueError(f"trainer.resume={resume}: {defect}")
    return Path(resume), []

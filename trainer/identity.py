"""Identity of a run: a checkpoint of another run in the same directory is refused."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data import BatchSource, errors
from trainer.checkpoint import find_newest
from trainer.config import Config, to_dict
from trainer.distributed import Distributed
from trainer.manifest import candidates, check_version, check_whole, read_manifest, versions
from trainer.schema import differences


@dataclass(frozen=True)
class Identity:
    """Saved with every checkpoint. A run resumes only from a checkpoint with an equal identity."""

    config: Config
    global_batch_size: int
    training_rows: int
    training_tokens: str  # digest of the token rows, or of the streamed files
    vocabulary: int  # size

    @classmethod
    def of(cls, config: Config, batches: BatchSource, vocabulary: int) -> "Identity":
        return cls(config, batches.layout.global_batch_size, *batches.identity(), vocabulary)

    def manifest(self, **progress: Any) -> dict[str, Any]:
        """Fields of checkpoint.json."""
        return {**asdict(self), "config": to_dict(self.config), "versions": versions(), **progress}

    def check(self, path: Path) -> None:
        """Refuse a checkpoint of another run.

        Raises:
            ValueError: the message names every difference.
        """
        check_version(path)
        saved = read_manifest(path)
        counts = {name: value for name, value in asdict(self).items() if name != "config"}
        recorded = {name: value for name, value in saved.items() if name in counts}
        changed = differences(saved["config"], self.config) + errors.differences(recorded, counts)
        if changed:
            raise ValueError(
                f"{path} belongs to a run with other settings: {'; '.join(changed)}. "
                "Give the same ones to resume it, or another trainer.experiment_name for a new run"
            )


def find_checkpoint(directory: Path, resume: str, distributed: Distributed) -> tuple[Path | None, dict[Path, str]]:
    """The checkpoint that `trainer.resume` names, or None, and the reason for each skipped one. Collective.

    Raises:
        ValueError: it names no whole checkpoint, or `directory` holds the checkpoints of another run.
    """
    newest, skipped = find_newest(directory, distributed)
    if resume == "auto":
        if newest is None and distributed.on_main(lambda: candidates(directory)):
            reasons = "".join(f"\n{path}: {reason}" for path, reason in skipped.items())
            raise ValueError(
                f"{directory} holds checkpoints, but none that is whole: restore one, or start again by "
                f"trainer.resume=never{reasons}"
            )
        return newest, skipped
    if newest is not None and newest.resolve() != Path(resume).resolve():  # its later checkpoints would look newer
        raise ValueError(
            f"trainer.resume={resume}, but {directory} holds the checkpoints of a run: "
            "give another trainer.experiment_name, or delete it"
        )
    if resume == "never":
        return None, skipped
    try:
        distributed.on_main(lambda: check_whole(Path(resume)))
    except ValueError as error:
        raise ValueError(f"trainer.resume={resume}: {error}") from error
    return Path(resume), skipped

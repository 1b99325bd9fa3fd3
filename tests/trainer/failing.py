"""train.py, in which something fails: `failing.py PLACE RANK ARGUMENTS…`, in the third step where there are steps."""

import os
import runpy
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

from data.batches import TrainBatches  # noqa: E402
from trainer import dcp, fsdp_sft_trainer, manifest, validation  # noqa: E402
from trainer.fsdp_sft_trainer import FSDPSFTTrainer  # noqa: E402

PLACES = {
    "start": (fsdp_sft_trainer, "build_trainable"),
    "rows": (fsdp_sft_trainer, "build_batches"),
    "worker": (TrainBatches, "__getitem__"),
    "loss": (FSDPSFTTrainer, "compute_loss"),
    "clip": (FSDPSFTTrainer, "_clip"),
    "validation": (fsdp_sft_trainer, "validate"),
    "samples": (validation, "generate"),
    "background": (dcp.DigestingFileSystem, "create_stream"),
    "publish": (manifest, "digest_bytes"),
    "export": (fsdp_sft_trainer, "merge_lora"),
}
AFTER = {"worker": 5, "loss": 2, "clip": 2}  # calls that succeed
KINDS = {"error": RuntimeError, "value": ValueError, "disk": OSError, "memory": MemoryError}


def fail_in(place: str, how: str) -> None:
    """Let a call of `place` raise, end the process, or hang."""
    owner, name = PLACES[place]
    real, calls = getattr(owner, name), 0

    def failing(*arguments, **settings):
        nonlocal calls
        calls += 1
        if calls <= AFTER.get(place, 0):
            return real(*arguments, **settings)
        print(f"failing in {place} in process {os.getpid()}", flush=True)
        if how == "hang":
            time.sleep(1000)
        if how == "thread":  # that nobody ends
            threading.Thread(target=time.sleep, args=(1000,)).start()
        raise KINDS.get(how, RuntimeError)(f"a {how} of the test")

    setattr(owner, name, failing)


if __name__ == "__main__":
    place, how, rank, *sys.argv[1:] = sys.argv[1:]
    if os.environ.get("RANK", "0") == rank and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        fail_in(place, how)
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")

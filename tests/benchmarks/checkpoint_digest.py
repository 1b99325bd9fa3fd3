"""Cost of digests: `python -m tests.benchmarks.checkpoint_digest [GIB] [DIRECTORY]`.

Writes tensors with DCP as it is and with digests made while writing, in turn, and checks the digests afterwards. Prints
medians of 5 in GB/s; files that were just written come from memory, so the check is not bound by the disk.
"""

import shutil
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemWriter

from data.storage import digest_file
from tests.benchmarks.measure import median_seconds
from trainer.dcp import DigestingWriter


def main(gib: float = 1.0, directory: str | None = None) -> None:
    state = {f"{i}": torch.rand(2**24) for i in range(int(gib * 16))}  # 64 MiB each
    size = sum(tensor.nbytes for tensor in state.values()) / 1e9
    with tempfile.TemporaryDirectory(dir=directory) as scratch:

        def write(writer: type[FileSystemWriter]) -> Path:
            checkpoint = Path(tempfile.mkdtemp(dir=scratch))
            dcp.save(state, storage_writer=writer(checkpoint), no_dist=True)
            return checkpoint

        def write_once(writer: type[FileSystemWriter]) -> None:
            shutil.rmtree(write(writer))

        plain, digested = median_seconds(lambda: write_once(FileSystemWriter), lambda: write_once(DigestingWriter))
        [file] = write(DigestingWriter).glob("*.distcp")
        [checked] = median_seconds(lambda: digest_file(file))
    print(
        f"{size:.1f} GB: written at {size / plain:.2f} GB/s, with digests at {size / digested:.2f} GB/s "
        f"({digested / plain - 1:+.1%} time); checked at {size / checked:.1f} GB/s"
    )


if __name__ == "__main__":
    main(*(kind(value) for kind, value in zip((float, str), sys.argv[1:], strict=False)))

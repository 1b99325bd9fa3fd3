"""Write with torch.distributed.checkpoint and digests; read without running code from a file.

DCP pickles its `.metadata` and every entry that is not a tensor; a stranger's checkpoint could hold any code. So
only tensors are saved, an unpickler that knows DCP's own classes reads `.metadata`, and nothing else is unpickled.
"""

import io
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from data.storage import DigestedFile

METADATA = ".metadata"
CLASSES = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "Metadata",
            "TensorStorageMetadata",
            "TensorProperties",
            "_MEM_FORMAT_ENCODING",
            "ChunkStorageMetadata",
            "MetadataIndex",
            "StorageMeta",
        )
    ),
}


@dataclass(frozen=True)
class DigestedResult(WriteResult):
    """DCP's record of a written tensor, with the digest of its file."""

    digest: str


class DigestingFileSystem(FileSystem):
    """Computes digests of files while they are written.

    Attributes:
        digests: XXH3 by file name.
    """

    def __init__(self) -> None:
        self.digests: dict[str, str] = {}

    @contextmanager
    def create_stream(self, path: str | Path, mode: str) -> Iterator[IO[bytes]]:
        if mode != "wb":
            with super().create_stream(path, mode) as stream:
                yield stream
            return
        with DigestedFile(path) as file:
            try:
                yield file
            except RuntimeError as error:
                raise file.failure or error from error
        self.digests[Path(path).name] = file.hexdigest()


class DigestingWriter(FileSystemWriter):
    """Writes a checkpoint and gathers the digests of its files on rank 0.

    Args:
        staged: the tensors are copies in the host's memory. Torch would still wait for the GPU, and its training.

    Attributes:
        digests: XXH3 by file name, on rank 0 after the write.
    """

    def __init__(self, path: Path, staged: bool = False):
        super().__init__(path, **{"per_thread_copy_ahead": 0} if staged else {})
        self.fs = DigestingFileSystem()
        self.digests: dict[str, str] = {}

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        written = super().write_data(plan, planner).wait()
        digests = self.fs.digests
        results = [DigestedResult(**vars(item), digest=digests[item.storage_data.relative_path]) for item in written]
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        super().finish(metadata, results)
        self.digests = {item.storage_data.relative_path: item.digest for rank in results for item in rank}
        self.digests[METADATA] = self.fs.digests[f"{METADATA}.tmp"]

    def storage_meta(self) -> StorageMeta:
        return StorageMeta(save_id=self.save_id)  # without the path: it would need another class to unpickle


class SafeReader(FileSystemReader):
    """Reads a checkpoint that may come from a stranger."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Unpickle `.metadata`.

        Raises:
            UnpicklingError: its content is not DCP's description of tensors in files beside it.
        """
        with (Path(self.path) / METADATA).open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError(f"{METADATA} does not describe a checkpoint")
        for name, entry in metadata.state_dict_metadata.items():
            if not isinstance(entry, TensorStorageMetadata):
                raise pickle.UnpicklingError(f"{METADATA} has an entry {name} that is not a tensor")
        places = {info.relative_path for info in metadata.storage_data.values()}
        if outside := sorted(place for place in places if Path(place).name != place):
            raise pickle.UnpicklingError(f"{METADATA} names files outside the checkpoint: {', '.join(outside)}")
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata


class TensorLoadPlanner(DefaultLoadPlanner):
    """Loads tensors alone: DCP unpickles other entries."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise pickle.UnpicklingError(f"{read_item.dest_index.fqn} is not a tensor")


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and (module, name) not in CLASSES:
            raise pickle.UnpicklingError(f"{METADATA} asks for {module}.{name}, which no checkpoint needs")
        return super().find_class(module, name)

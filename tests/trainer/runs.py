"""Short runs for the tests, in this process or over several ranks."""

import json
import multiprocessing
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import cycle
from pathlib import Path

import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file

import trainer.evaluation  # noqa: F401 — for the processes of start_ranks
from diffllm.diffusion import loss
from trainer.checkpoint import find_newest
from trainer.config import Config
from trainer.distributed import Distributed, init_distributed
from trainer.fsdp_sft_trainer import FSDPSFTTrainer
from trainer.manifest import MANIFEST, read_manifest, write_manifest

multiprocessing.set_forkserver_preload(["tests.trainer.runs"])
WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
PORTS = cycle(range(20_000 + 500 * WORKER, 20_500 + 500 * WORKER))  # below those of outgoing connections


def train(config: Config) -> Path:
    """Run in this process, as one rank."""
    with init_distributed() as distributed:
        FSDPSFTTrainer(config, distributed).fit()
    return Path(config.trainer.output_dir)


def start_ranks(rank: Callable[..., None], arguments: tuple, ranks: int) -> None:
    """Run a function in processes of their own, forked from one that has imported everything and done nothing."""
    mp.start_processes(rank, arguments, ranks, start_method="forkserver")


def free_port() -> int:
    """A port that nothing listens on, from those of this worker of pytest: no other process is given it meanwhile."""
    for port in PORTS:
        with socket.socket() as free, suppress(OSError):
            free.bind(("localhost", port))
            return port
    raise OSError("no port is free")


@contextmanager
def joined(rank: int, ranks: int, port: int) -> Iterator[Distributed]:
    """Make this process of `start_ranks` one of the ranks."""
    torch.set_num_threads(1)
    loss.LOGITS_PER_CHUNK = 20_000  # so that the small model's loss comes in several chunks
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    with init_distributed() as distributed:
        yield distributed


def train_as_rank(rank: int, configs: list[Config], ranks: int, port: int) -> None:
    with joined(rank, ranks, port) as distributed:
        for config in configs:
            FSDPSFTTrainer(config, distributed).fit()


def newest(run: Path) -> Path | None:
    """The newest whole checkpoint, as a run finds it."""
    with init_distributed() as distributed:
        return find_newest(run / "checkpoints", distributed)[0]


def change_manifest(checkpoint: Path, change: Callable[[dict], None]) -> None:
    """Change checkpoint.json as another version, or a stranger, would have written it."""
    manifest = read_manifest(checkpoint)
    change(manifest)
    digests = {name: file["xxh3"] for name, file in manifest.pop("files").items()}
    del manifest["digest"]
    (checkpoint / MANIFEST).unlink()
    write_manifest(checkpoint, manifest, digests)


def losses(run: Path) -> list[float]:
    return [line["train/loss"] for line in metrics(run)]


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "hf" / "model.safetensors")

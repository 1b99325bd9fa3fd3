"""Shared fixtures. The environment is set before torch is imported."""

import json
import multiprocessing
import os
import shutil
import signal
import socket
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from multiprocessing import get_context

# The golden numerics were made with these kernels: with them float32 results are bitwise equal.
os.environ.setdefault("ATEN_CPU_CAPABILITY", "avx2")
# Compiled ones have a cache of their own: torch would also take those that it compiled for another instruction set.
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.join(tempfile.gettempdir(), "diffllm-tests-avx2"))
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Tests are of CPUs, as the golden numerics are; those marked `gpu` call functions in processes that see the GPUs.
os.environ.setdefault("TEST_GPUS", os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(64)))))
os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("TEST_SEES_GPUS", "")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")
os.environ.setdefault("TRACKIO_DIR", os.path.join(tempfile.gettempdir(), "diffllm-tests-trackio"))

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from huggingface_hub import constants

from data import DataConfig, storage
from data.tasks.equations import Equations
from diffllm import DiffLLM, ModelConfig, load_model, new_model
from diffllm.tokenizer import builtin_tokenizer
from tests.browser import browser, chromium  # noqa: F401 — fixtures
from tests.trainer.runs import free_port, train, train_as_rank
from trainer.config import Config

torch.set_num_threads(1)
GOLDEN = Path(__file__).parent / "golden"
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def tokenizer():
    return builtin_tokenizer()


@pytest.fixture(scope="session")
def dream() -> DiffLLM:
    return load_model(GOLDEN / "dream_tiny").eval()


@pytest.fixture(scope="session")
def llada() -> DiffLLM:
    return load_model(GOLDEN / "llada_tiny").eval()


@pytest.fixture
def small_model(tokenizer) -> DiffLLM:
    return new_model(small_shape(), tokenizer).eval()


def small_shape(**changes) -> ModelConfig:
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return ModelConfig(**shape | {"num_key_value_heads": 1, "initializer_range": 0.06} | changes)


@pytest.fixture(params=["nothing", "not at all"])
def silent_hub(request, monkeypatch):
    """A hub that takes connections and answers nothing, or takes none."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
        if request.param == "not at all":
            server.close()
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(storage, "HUB_SECONDS", 0.5)
        storage.ask_hub.cache_clear()
        yield endpoint
        storage.ask_hub.cache_clear()


@contextmanager
def no_longer_than(seconds: int) -> Iterator[None]:
    def late(*_):
        raise AssertionError(f"took more than {seconds} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="session")
def equations(tmp_path_factory) -> DataConfig:
    """A few of the equations in files, so that they are tokenized once for all runs."""
    directory = tmp_path_factory.mktemp("equations")
    for name, rows in (("train", Equations().rows("train")[:320]), ("val", Equations().rows("test")[:40])):
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(placed.row) + "\n" for placed in rows))
    return DataConfig(
        train_files=[str(directory / "train.jsonl")],
        val_files=[str(directory / "val.jsonl")],
        cache_dir=str(directory / "cache"),
    )


def small_config(equations: DataConfig, output_dir: Path, **changes) -> Config:
    """12 steps of a small model on the equations, which take a second."""
    config = Config(model=small_shape(), data=replace(equations))
    config.data.max_length = 64
    config.data.train_batch_size = 8
    config.data.num_workers = 0
    config.optim.lr = 1e-3
    config.trainer.max_steps = 12
    config.trainer.logger = []
    config.trainer.peak_tflops = 0.1  # a CPU has no data sheet
    config.trainer.output_dir = str(output_dir)
    for key, value in changes.items():
        group, field = key.split("__")
        assert hasattr(getattr(config, group), field), key
        setattr(getattr(config, group), field, value)
    return config


@pytest.fixture
def small_run(tmp_path, equations):
    """Makes configurations of small runs, by default in `tmp_path`/run."""
    return lambda name="run", **changes: small_config(equations, tmp_path / name, **changes)


@pytest.fixture(scope="session")
def default_run(equations, tmp_path_factory) -> Path:
    """The finished run of `small_run()`, one for all tests: to be read only."""
    return train(small_config(equations, tmp_path_factory.mktemp("default") / "run"))


@pytest.fixture
def finished_run(default_run, tmp_path) -> Path:
    """A copy of the finished run where `small_run()` would write it: `train(small_run())` resumes it."""
    return Path(shutil.copytree(default_run, tmp_path / "run"))


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[Callable[..., None]]:
    """Calls a function in two processes, the same ones for all tests, with its rank, the arguments and a free port."""
    with ExitStack() as stack:
        context = get_context("forkserver")
        pools = [stack.enter_context(ProcessPoolExecutor(1, context)) for _ in range(2)]

        def call(function: Callable[..., None], *arguments) -> None:
            port = free_port()
            try:
                futures = [pool.submit(function, rank, *arguments, port) for rank, pool in enumerate(pools)]
                for done in as_completed(futures):
                    done.result()
            except BaseException:
                for process in multiprocessing.active_children():  # a rank may wait for the one that failed
                    process.kill()
                raise

        yield call


@pytest.fixture(scope="session")
def on_gpu() -> Iterator[Callable[..., Any]]:
    """Calls a function in a process that sees the GPUs."""
    if not list(Path("/dev").glob("nvidia[0-9]*")):
        pytest.skip("needs a GPU")
    with pytest.MonkeyPatch.context() as patch, ProcessPoolExecutor(1, get_context("spawn")) as process:
        for name in ("TEST_SEES_GPUS", "CUDA_VISIBLE_DEVICES"):
            patch.setenv(name, os.environ["TEST_GPUS"])
        count = process.submit(torch.cuda.device_count).result()
        patch.undo()
        if not count:
            pytest.skip("needs a GPU that torch can use")
        yield lambda function, *arguments: process.submit(function, *arguments).result()


@pytest.fixture
def train_on_two_ranks(two_ranks) -> Callable[[list[Config]], None]:
    """Runs one configuration after the other, each over two ranks."""
    return lambda configs: two_ranks(train_as_rank, configs, 2)

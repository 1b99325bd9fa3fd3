"""Time and memory of variants in one process."""

import gc
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import torch


def median_seconds(*variants: Callable[[], object], runs: int = 5) -> list[float]:
    """Medians over `runs` calls of each variant, taken in turn so that a busy moment meets both; one call warms up."""
    seconds: list[list[float]] = [[] for _ in variants]
    for run in range(runs + 1):
        for variant, taken in zip(variants, seconds, strict=True):
            started = time.perf_counter()
            variant()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if run:
                taken.append(time.perf_counter() - started)
    return [statistics.median(taken) for taken in seconds]


def peak_bytes(work: Callable[[], object]) -> int:
    """Peak of the process's resident memory above its level before (Linux); one call warms up."""
    work()
    return peak_of(work)


def peak_of(work: Callable[[], object]) -> int:
    """The same of the first call."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _status("VmRSS")
    work()
    return _status("VmHWM") - before


def own_peak_of(work: Callable[[], object], every: float = 0.02) -> int:
    """The same of what the system cannot take back: pages of mapped files are not counted. Looked at now and then."""
    gc.collect()
    done, before = Event(), _status("RssAnon")
    with ThreadPoolExecutor(1) as pool:
        watched = pool.submit(_watch, done, every)
        try:
            work()
        finally:
            done.set()
        return watched.result() - before


def _watch(done: Event, every: float) -> int:
    peak = 0
    while not done.wait(every):
        peak = max(peak, _status("RssAnon"))
    return max(peak, _status("RssAnon"))


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024

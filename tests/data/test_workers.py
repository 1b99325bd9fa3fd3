"""Workers end with the iteration."""

import multiprocessing
import threading
import time
from contextlib import closing

from torch.utils.data import Dataset

from data.workers import from_workers
from tests.conftest import no_longer_than


class Stuck(Dataset):
    """Its second item takes for ever, in a way that leaves a thread behind."""

    def __getitem__(self, item):
        if item:
            threading.Thread(target=time.sleep, args=(1000,)).start()
            time.sleep(1000)
        return item


def test_workers_end_with_the_iteration_whatever_they_do():
    before = set(multiprocessing.active_children())
    with no_longer_than(5), closing(from_workers(Stuck(), 2, range(9), pack=int)) as items:
        assert next(items) == 0
        workers = set(multiprocessing.active_children()) - before
        assert len(workers) == 2
    assert not any(worker.is_alive() for worker in workers)

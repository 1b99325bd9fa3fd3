"""A signal ends a run after the current step, with a checkpoint; the same command resumes."""

import multiprocessing
import os
import signal

import pytest
import torch

from tests.trainer.runs import losses, metrics, train, weights
from trainer.distributed import Distributed, init_distributed, locked
from trainer.fsdp_sft_trainer import FSDPSFTTrainer


@pytest.fixture
def interrupted(monkeypatch):
    """Send this process signals during its fifth step."""

    def configure(*numbers: int):
        train_step = FSDPSFTTrainer.train_step

        def signalled(self, step, *rest):
            if step == 5:
                for number in numbers:
                    os.kill(os.getpid(), number)
            return train_step(self, step, *rest)

        monkeypatch.setattr(FSDPSFTTrainer, "train_step", signalled)

    return configure


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops_and_the_run_goes_on(
    small_run, default_run, interrupted, tmp_path, monkeypatch, capsys, number
):
    before = signal.getsignal(number)
    with monkeypatch.context():
        interrupted(number)
        if number != signal.SIGUSR1:
            with pytest.raises(SystemExit) as exit:
                train(small_run())
            assert exit.value.code == 128 + number
        else:
            train(small_run())
        monkeypatch.undo()
    run = tmp_path / "run"
    # The ranks agree on what came when they count the next step's tokens.
    assert [line["step"] for line in metrics(run)] == [1, 2, 3, 4, 5, 6]
    assert (run / "checkpoints" / "step_00000006").is_dir()
    assert not (run / "hf").exists()
    assert f"stopped by {signal.Signals(number).name} after 6 of 12 steps" in capsys.readouterr().out
    assert signal.getsignal(number) == before

    again = train(small_run())
    assert losses(again) == losses(default_run)
    assert all(torch.equal(tensor, weights(again)[name]) for name, tensor in weights(default_run).items())


def test_in_the_last_step_it_changes_nothing(small_run, interrupted):
    interrupted(signal.SIGUSR1)
    assert (train(small_run(trainer__max_steps=5)) / "hf").is_dir()


def test_loader_workers_ignore_signals(small_run):
    with init_distributed() as distributed:
        trainer = FSDPSFTTrainer(small_run(data__num_workers=1), distributed)
        before = {*multiprocessing.active_children()}
        batches = trainer.source.loader(range(12))
        next(batches)
        [worker] = {*multiprocessing.active_children()} - before
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            os.kill(worker.pid, number)
        assert len(list(batches)) == 11


def test_two_runs_in_one_directory(tmp_path):
    main = Distributed(0, 1, torch.device("cpu"))
    context = multiprocessing.get_context("fork")
    locked_there, done_here = context.Event(), context.Event()

    def other_run():
        with init_distributed() as distributed, locked(tmp_path / "run", distributed):
            locked_there.set()
            done_here.wait(60)

    process = context.Process(target=other_run)
    process.start()
    assert locked_there.wait(60)
    with init_distributed():
        message = r"another run writes to .*run: wait for it, or name another"
        with pytest.raises(ValueError, match=message), locked(tmp_path / "run", main):
            pass
        done_here.set()
        process.join()
        with locked(tmp_path / "run", main):
            pass

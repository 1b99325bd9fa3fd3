"""The thread that samples: turns, places, order."""

from dataclasses import replace

import pytest

from launch.serve.engine import Engine, EngineEndedError, Job, QueueFullError
from sampling import Canvas, SampledRow
from tests.launch.serve.serving import SMALL, sure_model, until


@pytest.fixture
def engine(tokenizer):
    engine = Engine(sure_model(), tokenizer, batch_size=2, queue=3)
    yield engine
    if engine.alive:
        engine.close()


def job(engine: Engine, ended: list, **settings) -> Job:
    config = replace(SMALL, stop_at_eos=False, **settings)
    made = Job(Canvas.after([1, 2], config.max_new_tokens, engine.model.mask_token_id), config, lambda: None)
    made.notify = lambda: ended.append(made)
    return made


def widths(engine: Engine, monkeypatch) -> list[int]:
    """Gets the number of rows of each forward."""
    rows, hidden = [], engine.model.hidden
    monkeypatch.setattr(engine.model, "hidden", lambda x, *given: rows.append(len(x)) or hidden(x, *given))
    return rows


def test_settings_take_turns(engine, monkeypatch):
    """A job does not wait for the end of one with other settings."""
    rows, ended = widths(engine, monkeypatch), []
    long, short = job(engine, ended, max_new_tokens=16), job(engine, ended, max_new_tokens=4, alg="left_to_right")
    for each in (long, short):
        engine.submit(each)
    engine.start()
    until(lambda: len(ended) == 2)
    assert ended == [short, long]
    assert {*rows} == {1}


def test_seeds_and_lengths_share_a_batch(engine, monkeypatch):
    rows, ended = widths(engine, monkeypatch), []
    for seed, length in ((1, 4), (2, 4), (3, 8)):
        engine.submit(job(engine, ended, temperature=1.0, transfer="even", seed=seed, max_new_tokens=length))
    engine.start()
    until(lambda: len(ended) == 3)
    assert rows == [2] * 4 + [1] * 8
    assert len({tuple(each.outcome.tokens[:6]) for each in ended}) == 3


def test_places(engine):
    """Two jobs may run and three wait; a cancelled one gives its place to another."""
    ended, jobs = [], []
    for _ in range(5):
        jobs.append(job(engine, ended))
        engine.submit(jobs[-1])
    with pytest.raises(QueueFullError):
        engine.submit(job(engine, ended))
    for each in (jobs[0], jobs[4]):
        engine.cancel(each)
    engine.start()
    until(lambda: len(ended) == 3)
    assert {id(each) for each in ended} == {id(each) for each in jobs[1:4]}
    assert all(isinstance(each.outcome, SampledRow) for each in ended)
    assert engine.running == engine.waiting == 0


def test_a_running_job_is_dropped(engine, monkeypatch):
    """And the others of its batch go on."""
    ended, dropped = [], job(engine, [], max_new_tokens=16)
    hidden, forwards = engine.model.hidden, []

    def forward(x, *given):
        forwards.append(len(x))
        if len(forwards) == 3:
            engine.cancel(dropped)
        return hidden(x, *given)

    monkeypatch.setattr(engine.model, "hidden", forward)
    for each in (dropped, job(engine, ended, transfer="even"), job(engine, ended, transfer="even")):
        each.config = replace(each.config, transfer="even")
        engine.submit(each)
    engine.start()
    until(lambda: len(ended) == 2)
    assert dropped.outcome is None
    assert forwards == [2] * 3 + [2] * 5 + [1] * 3
    engine.cancel(dropped)  # changes nothing
    assert engine.running == engine.waiting == 0


@pytest.mark.parametrize("method", ["_admit", "_drop_empty"], ids=["waiting", "running"])
def test_an_error_of_its_own_ends_jobs_and_not_the_thread(engine, monkeypatch, capfd, method):
    ended, first = [], job(engine, [])
    first.notify = lambda: monkeypatch.undo() or ended.append(first)
    monkeypatch.setattr(engine, method, lambda *_: {}["secret"])
    engine.submit(first)
    engine.start()
    until(lambda: len(ended) == 1)
    assert type(first.outcome) is KeyError
    engine.submit(job(engine, ended))
    until(lambda: len(ended) == 2)
    assert type(ended[1].outcome) is SampledRow
    until(lambda: engine.running == engine.waiting == 0)
    assert "KeyError: 'secret'" in capfd.readouterr().err


def test_a_client_that_cannot_be_woken_disturbs_no_other(engine, capfd):
    """Neither by a step, nor by its end, nor by the end of all jobs."""
    ended, broken = [], [job(engine, []) for _ in range(2)]
    for each in broken:
        each.notify, each.watched = None, True
    for each in (broken[0], job(engine, ended)):
        engine.submit(each)
    engine.start()
    until(lambda: len(ended) == 1)
    assert type(ended[0].outcome) is type(broken[0].outcome) is SampledRow
    engine.stop(ValueError("the end"))
    for each in (broken[1], job(engine, ended)):
        engine.submit(each)
    until(lambda: len(ended) == 2)
    assert engine.alive
    assert "TypeError" in capfd.readouterr().err


def test_an_unknown_error_of_settings_is_of_its_job_alone(engine, monkeypatch, capfd):
    ended = []
    monkeypatch.setattr(engine.tokenizer, "decode", None)
    engine.submit(job(engine, ended, stop=["a"]))
    engine.submit(job(engine, ended))
    engine.start()
    until(lambda: len(ended) == 2)
    assert [type(each.outcome) for each in ended] == [TypeError, SampledRow]
    assert "TypeError" in capfd.readouterr().err


def test_the_end(engine):
    """Stopping ends all jobs with the reason, closing ends the thread."""
    ended, reason = [], ValueError("the end")
    for _ in range(4):
        engine.submit(job(engine, ended, max_new_tokens=16))
    engine.stop(reason)
    engine.start()
    until(lambda: len(ended) == 4)
    assert {each.outcome for each in ended} == {reason}
    engine.submit(job(engine, ended))
    until(lambda: len(ended) == 5)
    engine.close()
    assert not engine.alive
    with pytest.raises(EngineEndedError):
        engine.submit(job(engine, ended))

"""One engine for all questions: order, interruptions that lose nothing, ranks that share the work, and refusals."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

from data import PlacedRow, prompt_ids
from data.config import TaskConfig
from data.tasks.choice import Choice
from data.tasks.infill import Infill
from diffllm import DiffLLM, new_model
from diffllm.answers import choose_options, fill_templates
from diffllm.generate import Response, generate, special_tokens
from diffllm.tokenizer import builtin_tokenizer
from sampling import SamplingConfig, Template, choose, infill_templates
from tests.conftest import small_shape
from tests.locks import held_elsewhere
from tests.trainer.runs import free_port, start_ranks
from trainer import evaluation
from trainer.distributed import Distributed, init_distributed
from trainer.evaluation import Answers, Question, answer_all, ask, finished, origin_of, questions_of

COUNT = 10


class StoppedError(Exception):
    pass


class Job:
    """Ten questions, three at once; draws, so that a wrong key would show."""

    def __init__(self, output: Path):
        self.output, self.directory = output, output.with_name(f"{output.name}.partial")
        self.tokenizer = builtin_tokenizer()
        self.config = SamplingConfig(max_new_tokens=12, steps=6, temperature=1.0, batch_size=3)
        self.origin, self.seed = {"task.name": "test"}, 0
        self.questions = [self.ask(f"Solve {i}x{'+1' * i} = {i}", i) for i in range(COUNT)]
        self.tasks, self.seen = {"test": self.questions}, []

    def ask(self, text: str, number: int) -> Question:
        row = PlacedRow({"question": text}, f"rows:{number}")
        return ask(row, [{"role": "user", "content": text}], self.tokenizer)

    def model(self) -> DiffLLM:
        return new_model(small_shape(), self.tokenizer, self.seed).eval()

    def run_on(self, distributed: Distributed, write: Callable[..., None]) -> None:
        model, settings = self.model(), self.config
        origin = self.origin | origin_of(self.tasks, settings, model, self.tokenizer)
        given = (self.tasks, model, self.tokenizer, settings, self.output, origin, distributed)
        answer_all(*given, write, self.so_far, samples=8)

    def so_far(self, name: str, response: Response) -> str:
        self.seen.append((name, response.row_id))
        return "…"

    def run_all(self) -> dict[str, Answers]:
        written, self.seen = [], []
        with init_distributed() as distributed:
            self.run_on(distributed, written.append)
        assert not self.directory.exists()
        return written[0]

    def run(self) -> Answers:
        return self.run_all()["test"]

    def done(self) -> dict[int, Response]:
        return finished(self.directory).get("test", {})

    def interrupt(self, rows: int, by: Callable = generate) -> None:
        """Run until so many rows are done by a function that the engine calls."""

        def cut(*arguments):
            yield from islice(by(*arguments), rows)
            raise StoppedError

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(evaluation, by.__name__, cut)
            with pytest.raises(StoppedError):
                self.run()


@pytest.fixture
def job(tmp_path) -> Job:
    return Job(tmp_path / "out")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> list[Response]:
    """Responses of a run without interruption."""
    responses, speed = Job(tmp_path_factory.mktemp("whole") / "out").run()
    assert speed > 0
    return responses


@pytest.fixture
def sampled(monkeypatch) -> list[int]:
    """Rows that have been given to the sampler."""
    row_ids = []

    def watched(*arguments):
        row_ids.extend(arguments[-1])
        return generate(*arguments)

    monkeypatch.setattr(evaluation, "generate", watched)
    return row_ids


def test_responses_are_in_order_and_as_if_sampled_alone(job, whole):
    assert [response.row_id for response in whole] == list(range(COUNT))
    for question, response in zip(job.questions, whole, strict=True):
        [alone] = generate(job.model(), job.tokenizer, [question.ids], job.config, [response.row_id])
        assert response == alone


@pytest.mark.parametrize("cut", [1, 2, 20], ids=["newline", "brace", "middle"])
def test_an_interrupted_run_resumes(job, whole, sampled, capsys, cut):
    """The last line has lost its end."""
    job.interrupt(5)
    file = job.directory / "test.rank0-of-1.jsonl"
    file.write_bytes(file.read_bytes()[:-cut])
    done = job.done()
    assert len(done) == 4
    job.config.batch_size = 2
    capsys.readouterr()
    responses, speed = job.run()
    assert f"{job.directory}: 4 of 10 rows are done" in capsys.readouterr().err
    assert sorted(sampled) == sorted(set(range(COUNT)) - done.keys())
    assert responses == whole
    assert speed > 0


def test_interrupted_again_and_again(job, whole, sampled):
    """One row a run; the end of each is cut away, but for what the next one needs to get on."""
    for done in range(1, COUNT):
        job.interrupt(1)
        with (job.directory / "test.rank0-of-1.jsonl").open("ab") as lines:
            lines.write(b'{"name": 0, "text": "\xc3')
        assert len(job.done()) == done
    assert job.run()[0] == whole
    assert len(sampled) == 1


def test_killed_between_the_last_row_and_the_output(job, whole, sampled):
    """No speed is measured if an earlier run sampled all rows."""
    job.interrupt(COUNT)
    assert job.run() == (whole, None)
    assert sampled == []


def test_two_ranks_share_the_rows_and_one_resumes_what_two_began(job, whole, tmp_path):
    """First both ranks answer all; then rank 1 is killed after 2 rows."""
    killed = tmp_path / "killed"
    with pytest.raises((mp.ProcessExitedException, mp.ProcessRaisedException)):  # its death, or that the other lost it
        start_ranks(_rank, (job.output, killed, free_port()), 2)
    assert [Response(**record) for record in json.loads(job.output.read_text())] == whole
    assert not job.directory.exists()
    job = Job(killed)
    assert len((job.directory / "test.rank1-of-2.jsonl").read_text().splitlines()) == 2
    done = job.done()
    assert 2 <= len(done) < COUNT - 1
    job.interrupt(1)
    assert len(job.done()) == len(done) + 1
    assert job.run()[0] == whole


def _rank(rank: int, output: Path, killed: Path, port: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}

    def kill(*arguments):
        yield from islice(generate(*arguments), 2)
        os.kill(os.getpid(), signal.SIGKILL)

    def write(answers: dict[str, Answers]) -> None:
        assert answers["test"].tokens_per_second > 0
        output.write_text(json.dumps([vars(response) for response in answers["test"].responses]))

    with init_distributed() as distributed:
        Job(output).run_on(distributed, write)
        if rank == 1:
            evaluation.generate = kill
        Job(killed).run_on(distributed, write)


def other_settings(job: Job) -> None:
    job.config.steps = 3


def other_prompt(job: Job) -> None:
    job.questions[3] = job.ask("Solve x", 3)


def fewer_rows(job: Job) -> None:
    job.questions.pop()


def other_weights(job: Job) -> None:
    job.seed = 1


def permuted_weights(job: Job) -> None:
    model = job.model()
    with torch.no_grad():
        weight = model.lm.lm_head.weight
        weight.copy_(weight.flip(0))
    job.model = lambda: model


def other_origin(job: Job) -> None:
    job.origin = {"task.name": "other"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (other_settings, "sampling.steps was 6 and is 3"),
        (other_prompt, "rows of test in tokens was 10 rows"),
        (fewer_rows, "and is 9 rows"),
        (other_weights, "the model's weights"),
        (permuted_weights, "the model's weights"),
        (other_origin, "task.name was test and is other"),
    ],
)
def test_another_run_does_not_resume_it(job, sampled, change: Callable[[Job], None], words: str):
    job.interrupt(4)
    change(job)
    with pytest.raises(ValueError, match="4 rows of an interrupted run with other settings") as refusal:
        job.run()
    assert str(job.directory) in str(refusal.value)
    assert words in str(refusal.value)
    assert sampled == []
    assert len(job.done()) == 4


@pytest.fixture
def kinds(job, tmp_path) -> Job:
    """Three questions of each kind; those to choose and to infill have different lengths."""
    texts = [f"Solve {n}x = {n * n}" for n in range(2, 5)]
    rows = {
        "choice": [{"question": text, "options": ["1", f"{text}0", text], "answer": 2} for text in texts],
        "infill": [
            {"prefix": text, "middle": "+1" * (n + 1), "suffix": "=", "slot": None if n else "1-3"}
            for n, text in enumerate(texts)
        ],
    }
    for name in rows:
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[name]))
    settings = TaskConfig(files={name: str(tmp_path / f"{name}.jsonl") for name in rows})
    for task in (Choice(settings=settings), Infill(settings=settings)):
        job.tasks[task.name] = questions_of(task, job.tokenizer, seed=0)
    del job.questions[3:]
    return job


def test_each_kind_of_question_is_answered_as_if_alone(kinds):
    answers, model = kinds.run_all(), kinds.model()
    assert {name: len(each.responses) for name, each in answers.items()} == {"test": 3, "choice": 3, "infill": 3}
    assert kinds.seen == [*dict.fromkeys(kinds.seen)]
    special = special_tokens(model, kinds.tokenizer, kinds.config)
    for question, response in zip(kinds.tasks["choice"], answers["choice"].responses, strict=True):
        prompt = prompt_ids(question.messages, kinds.tokenizer)
        options = [kinds.tokenizer(text + "<|endoftext|>")["input_ids"] for text in question.row.row["options"]]
        choice = choose(model, prompt, options, special, samples=8)
        assert response.details["best"] == choice.best
        assert response.details["best_per_token"] == choice.best_per_token
        assert response.details["nats"] == pytest.approx([score.mean for score in choice.scores], rel=1e-5)
        assert response.text == question.row.row["options"][choice.best]
        assert response.nfe == 3 + 8 + 8  # masks of "1" and its end, and those drawn
    assert answers["choice"].tokens_per_second is None
    for row_id, (question, response) in enumerate(zip(kinds.tasks["infill"], answers["infill"].responses, strict=True)):
        template = Template.parse(question.template)
        [alone] = infill_templates(
            model, kinds.tokenizer, [template], kinds.config, special, row_ids=[row_id], samples=8
        )
        assert (response.text, response.tokens, response.nfe) == (alone.slots[0], alone.length, alone.nfe)
    assert answers["infill"].tokens_per_second > 0


@pytest.mark.parametrize("by", [choose_options, fill_templates])
def test_an_interrupted_run_of_several_kinds_resumes(kinds, sampled, by):
    whole = kinds.run_all()
    kinds.interrupt(1, by)
    assert len(finished(kinds.directory)["choice" if by is choose_options else "infill"]) == 1
    kinds.config.batch_size = 2
    sampled.clear()
    resumed = kinds.run_all()
    assert sampled == []
    assert sorted(kinds.seen) == sorted((name, i) for name in kinds.tasks for i in range(3))
    for name, answers in whole.items():
        for one, other in zip(answers.responses, resumed[name].responses, strict=True):
            assert (one.text, one.nfe, one.tokens) == (other.text, other.nfe, other.tokens)


def test_rows_of_another_task_are_not_deleted(kinds):
    kinds.interrupt(2)
    del kinds.tasks["test"]
    with pytest.raises(ValueError, match=r"2 rows of an interrupted run .*: rows of test was 3 rows .* and is absent"):
        kinds.run_all()
    assert len(kinds.done()) == 2


@pytest.mark.parametrize("name", ["choice", "infill"])
def test_a_long_question_of_another_kind_is_named(kinds, sampled, name):
    question = kinds.tasks[name][1]
    if name == "choice":
        long = question._replace(options=[question.options[0]._replace(ids=[5] * 2048)])
    else:
        long = question._replace(ids=question.ids.repeat(1024))
    kinds.tasks[name][1] = long
    with pytest.raises(ValueError, match=rf"{name}\.jsonl:2: .* does not fit the model's context of 2048 tokens"):
        kinds.run_all()
    assert sampled == []


def test_a_directory_without_rows_is_taken_over(job, whole):
    settings, job.config = job.config, replace(job.config, steps=3)
    job.interrupt(0)
    job.config = settings
    assert job.run()[0] == whole


def test_a_directory_that_is_deleted_in_mid_run_is_an_error(job, monkeypatch):
    def deleting(*arguments):
        for count, response in enumerate(generate(*arguments)):
            if count == 2:
                shutil.rmtree(job.directory)
            yield response

    monkeypatch.setattr(evaluation, "generate", deleting)
    with pytest.raises(OSError, match=r"test\.rank0-of-1\.jsonl was deleted"):
        job.run()


NO_RESPONSES = [
    *("null", "[1, 2]", "{}", '{"name": 3}', '{"name": 1, "other": 2}'),
    '{"row_id": "1", "text": "a", "tokens": 1, "nfe": 1, "tokens_per_forward": 1.0}',
    '{"row_id": 1, "text": null, "tokens": 1, "nfe": 1, "tokens_per_forward": 1.0}',
]


def test_broken_files_of_an_interrupted_run_are_named(job):
    job.interrupt(3)
    file, record = job.directory / "test.rank0-of-1.jsonl", job.directory / "run.json"
    lines = file.read_text()
    for line in NO_RESPONSES:
        file.write_text(line + "\n" + lines)
        with pytest.raises(ValueError, match=r"test\.rank0-of-1\.jsonl.*delete that line"):
            job.run()
    file.write_text(lines + lines.splitlines(keepends=True)[-1].replace('"row_id": ', '"row_id": 4000'))
    with pytest.raises(ValueError, match=r"rows that do not exist: test 4000\d+; delete"):
        job.run()
    assert job.seen == []  # no judge is asked
    (job.directory / "other.rank0-of-1.jsonl").write_text(lines)
    file.write_text(lines)
    with pytest.raises(ValueError, match=r"rows that do not exist: other \d+"):
        job.run()
    (job.directory / "other.rank0-of-1.jsonl").unlink()
    file.write_text(lines)
    for content in ("", "null", "[1, 2]", "{"):
        record.write_text(content)
        with pytest.raises(ValueError, match=r"run\.json (cannot be read as JSON|is not a JSON object)"):
            job.run()


def test_two_runs_do_not_write_to_one_output(job):
    job.directory.mkdir()
    message = f"another run writes to {job.directory}"
    with held_elsewhere(job.directory / ".lock"), pytest.raises(ValueError, match=message):
        job.run()


def test_a_question_that_does_not_fit_is_named_before_anything_is_sampled(job, sampled):
    job.questions[7] = job.ask("Hi" * 1024, 7)
    with pytest.raises(ValueError, match=r"^rows:7: a prompt of 2\d+ tokens and .*=12 do not fit .* context of 2048"):
        job.run()
    assert sampled == []
    assert not job.directory.exists()


def test_an_output_is_no_link(job, tmp_path):
    job.output.symlink_to(tmp_path / "precious")
    with pytest.raises(ValueError, match=f"{job.output} is a symbolic link"):
        job.run()

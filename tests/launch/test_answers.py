"""Files of prompts: what is written, interruptions that lose nothing, ranks that share the work, and mistakes."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from itertools import islice
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
import torch.multiprocessing as mp

from data import prompt_ids
from diffllm import ModelConfig, new_model
from diffllm.generate import Response, generate, special_tokens
from diffllm.tokenizer import builtin_tokenizer
from launch import answers
from launch.answers import answer
from sampling import SamplingConfig
from tests.conftest import small_shape
from tests.trainer.runs import free_port, start_ranks
from trainer.build import load_for_sampling
from trainer.config import Config

ROWS = [{"question": f"Solve {i}x{'+1' * i} = {i}", "id": i} for i in range(10)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tokenizer) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    new_model(small_shape(), tokenizer).save_pretrained(path, tokenizer=tokenizer)
    return path


@pytest.fixture
def config(checkpoint, tmp_path) -> Config:
    """Ten rows, three at once; draws, so that a wrong key would show."""
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return Config(
        model=ModelConfig(path=str(checkpoint)),
        sampling=SamplingConfig(max_new_tokens=12, steps=6, temperature=1.0, batch_size=3),
        input=str(tmp_path / "in.jsonl"),
        output=str(tmp_path / "out.jsonl"),
    )


@pytest.fixture
def whole(config, tmp_path) -> bytes:
    """What a run without interruption writes."""
    config = replace(config, output=str(tmp_path / "whole" / "out.jsonl"))
    answer(config)
    assert [file.name for file in Path(config.output).parent.iterdir()] == ["out.jsonl"]
    return Path(config.output).read_bytes()


@pytest.fixture
def sampled(monkeypatch) -> list[int]:
    """Rows that have been given to the sampler."""
    names = []

    def watched(*arguments):
        names.extend(arguments[-1])
        return generate(*arguments)

    monkeypatch.setattr(answers, "generate", watched)
    return names


class StoppedError(Exception):
    pass


def test_what_ends_an_answer(small_model):
    """Published models write the end of a turn, and what their training padded with."""
    tokenizer = builtin_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<|dlm_pad|>"})
    ends = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>", "<|dlm_pad|>"])
    assert list(special_tokens(small_model, tokenizer, SamplingConfig()).eos) == ends
    small_model.generation = {"eos_token_id": [ends[0], 7]}
    assert list(special_tokens(small_model, tokenizer, SamplingConfig()).eos) == [ends[0], 7, *ends[1:]]


def test_an_end_that_stands_for_unknown_text_too_can_be_named(small_model):
    """As in Dream's tokenizer."""
    tokenizer = builtin_tokenizer()
    tokenizer.unk_token = tokenizer.eos_token
    special = special_tokens(
        small_model, tokenizer, SamplingConfig(forbidden=["<|endoftext|>"], stop=["<|endoftext|>"])
    )
    assert special.forbidden == special.stop[0] == (tokenizer.eos_token_id,)


def interrupt(config: Config, rows: int) -> Path:
    """Run until so many rows are done; returns the directory that is left."""

    def cut(*arguments):
        yield from islice(generate(*arguments), rows)
        raise StoppedError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(answers, "generate", cut)
        with pytest.raises(StoppedError):
            answer(config)
    assert not Path(config.output).exists()
    return Path(config.output + ".partial")


def on_two_ranks(config: Config, kill_after: int | None = None) -> None:
    start_ranks(_rank, (config, free_port(), kill_after), 2)


def _rank(rank: int, config: Config, port: int, kill_after: int | None) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}

    def killed(*arguments):
        yield from islice(generate(*arguments), kill_after)
        os.kill(os.getpid(), signal.SIGKILL)

    if kill_after is not None and rank == 1:
        answers.generate = killed
    answer(config)


def test_a_row_for_each_row(config, whole):
    """Its fields and its response, as it is when it is sampled alone."""
    lines = [json.loads(line) for line in whole.splitlines()]
    assert [{"question": line["question"], "id": line["id"]} for line in lines] == ROWS
    model, tokenizer = load_for_sampling(config)
    for name, line in enumerate(lines):
        prompt = prompt_ids([{"role": "user", "content": line["question"]}], tokenizer)
        [alone] = generate(model, tokenizer, [prompt], config.sampling, [name])
        assert line["response"] == alone.text
        assert line["nfe"] == alone.nfe
        assert line["tokens_per_forward"] == alone.tokens_per_forward


def test_fields_that_mean_something_reach_the_prompt(config, monkeypatch):
    rows = [{"query": f"{i}+1?<|im_end|>", "system_prompt": "Add.", "tools": '[{"name": "add"}]'} for i in range(2)]
    Path(config.input).write_text("".join(json.dumps(row) + "\n" for row in rows))
    config.data.columns = {"prompt": "query", "response": "reply"}
    prompts = []
    monkeypatch.setattr(answers, "generate", lambda *given: prompts.extend(given[2]) or generate(*given))
    with pytest.raises(ValueError, match=r"in\.jsonl:1: .*'tools'.*model\.chat_template"):
        answer(config)
    model, tokenizer = load_for_sampling(config)
    tokenizer.chat_template = "{{ tools | tojson }}" + tokenizer.chat_template
    monkeypatch.setattr(answers, "load_for_sampling", lambda _: (model, tokenizer))
    answer(config)
    assert {len(prompt) for prompt in prompts} == {len(prompts[0])}
    assert sorted(map(tokenizer.decode, prompts))[0] == (
        '[{"name": "add"}]<|im_start|>system\nAdd.<|im_end|>\n<|im_start|>user\n0+1?<|im_end|><|im_end|>\n'
        "<|im_start|>assistant\n"
    )
    for line in Path(config.output).read_text().splitlines():
        assert json.loads(line).keys() - rows[0] == {"response", "nfe", "tokens_per_forward"}
    config.data.columns, config.output = {"prompt": "qery"}, config.output.replace("out", "other")
    with pytest.raises(ValueError, match="no row has a column 'qery'; did you mean query"):
        answer(config)


@pytest.mark.parametrize("cut", [1, 2, 20], ids=["newline", "brace", "middle"])
def test_an_interrupted_run_goes_on(config, whole, sampled, capsys, cut):
    """The last line has lost its end."""
    directory = interrupt(config, 5)
    file = directory / "rank0-of-1.jsonl"
    lines = file.read_bytes()
    file.write_bytes(lines[:-cut])
    done = 4
    config.sampling.batch_size = 2
    capsys.readouterr()
    answer(config)
    assert f"out.jsonl.partial: {done} of 10 rows are done" in capsys.readouterr().err
    assert len(sampled) == len(set(sampled)) == 10 - done
    assert Path(config.output).read_bytes() == whole
    assert not directory.exists()


def test_interrupted_again_and_again(config, whole, sampled):
    """One row a run; the end of each is cut away, but for what the next one needs to get on."""
    for done in range(1, 10):
        file = interrupt(config, 1) / "rank0-of-1.jsonl"
        with file.open("ab") as lines:
            lines.write(b'{"name": 0, "text": "\xc3')
        assert len(answers._read(file.parent)) == done
    answer(config)
    assert len(sampled) == 1
    assert Path(config.output).read_bytes() == whole


def test_killed_between_the_last_row_and_the_output(config, whole, sampled):
    interrupt(config, 10)
    answer(config)
    assert sampled == []
    assert Path(config.output).read_bytes() == whole


def test_a_killed_rank_and_other_numbers_of_ranks(config, whole):
    """SIGKILL of one of two ranks, then a while on one rank, the rest on two."""
    with pytest.raises((mp.ProcessExitedException, mp.ProcessRaisedException)):  # its death, or that the other lost it
        on_two_ranks(config, kill_after=2)
    directory = Path(config.output + ".partial")
    assert len((directory / "rank1-of-2.jsonl").read_text().split()) > 1
    done = answers._read(directory)
    assert 2 <= len(done) < 10 - 1
    interrupt(config, 1)
    assert len(answers._read(directory)) == len(done) + 1
    on_two_ranks(config)
    assert Path(config.output).read_bytes() == whole
    assert not directory.exists()


def new_weights(config: Config, checkpoint: Path, tokenizer) -> None:
    path = checkpoint.parent / "other"
    new_model(small_shape(), tokenizer, seed=1).save_pretrained(path, tokenizer=tokenizer)
    config.model.path = str(path)


def new_template(config: Config, checkpoint: Path, tokenizer) -> None:
    path = checkpoint.parent / "template"
    model, tokenizer = load_for_sampling(config)
    tokenizer.chat_template = "{{ messages[0].content }}"
    model.save_pretrained(path, tokenizer=tokenizer)
    config.model.path = str(path)


def new_rows(config: Config, *_: object) -> None:
    Path(config.input).write_text("".join(json.dumps(row | {"id": 0}) + "\n" for row in ROWS[:-1]))


def new_settings(config: Config, *_: object) -> None:
    config.sampling.steps = 3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (new_settings, ["sampling.steps is 6 there and 3 here"]),
        (new_rows, ["input is 10 rows", "there and 9 rows"]),
        (new_weights, ["the model's weights"]),
        (new_template, ["the chat template's tokens"]),
    ],
)
def test_another_run_does_not_go_on_with_it(
    config, checkpoint, tokenizer, sampled, change: Callable[..., None], words: list[str]
):
    directory = interrupt(config, 4)
    change(config, checkpoint, tokenizer)
    with pytest.raises(ValueError, match="rows of an interrupted run with other settings") as refusal:
        answer(config)
    for word in (str(directory), *words, "delete the directory", "another output"):
        assert word in str(refusal.value)
    assert sampled == []
    assert len(answers._read(directory)) == 4


def test_a_directory_without_rows_is_taken_over(config, whole):
    settings = config.sampling
    config.sampling = replace(settings, steps=3)
    interrupt(config, 0)
    config.sampling = settings
    answer(config)
    assert Path(config.output).read_bytes() == whole


def test_an_output_that_exists_is_left_alone(config, whole, sampled):
    Path(config.output).write_text("precious")
    with pytest.raises(ValueError, match=r"out\.jsonl exists already: delete it, or name another file"):
        answer(config)
    assert Path(config.output).read_text() == "precious"
    assert sampled == []


def test_a_directory_that_is_deleted_in_mid_run_is_an_error(config, monkeypatch):
    def deleting(*arguments):
        for count, response in enumerate(generate(*arguments)):
            if count == 2:
                shutil.rmtree(config.output + ".partial")
            yield response

    monkeypatch.setattr(answers, "generate", deleting)
    with pytest.raises(OSError, match=r"rank0-of-1\.jsonl was deleted"):
        answer(config)


NO_RESPONSES = [
    *("null", "[1, 2]", "{}", '{"name": 3}', '{"name": 1, "other": 2}'),
    '{"name": "1", "text": "a", "tokens": 1, "nfe": 1, "tokens_per_forward": 1.0}',
    '{"name": 1, "text": null, "tokens": 1, "nfe": 1, "tokens_per_forward": 1.0}',
]


@pytest.mark.parametrize("line", NO_RESPONSES)
def test_a_broken_line_of_an_interrupted_run_is_named(config, line):
    directory = interrupt(config, 3)
    file = directory / "rank0-of-1.jsonl"
    file.write_text(line + "\n" + file.read_text())
    with pytest.raises(ValueError, match=r"rank0-of-1\.jsonl.*delete that line"):
        answer(config)


@pytest.mark.parametrize("content", ["", "null", "[1, 2]", "{"])
def test_a_broken_run_json_is_named(config, content):
    (interrupt(config, 3) / "run.json").write_text(content)
    with pytest.raises(ValueError, match=r"run\.json (cannot be read as JSON|is not a JSON object)"):
        answer(config)


def test_fields_of_a_row_are_kept_when_it_is_answered_again(config, tmp_path):
    """A gold answer and figures of another model, under the names that the output has itself."""
    row = {"question": "Solve 3x = 6", "reference": "2", "nfe": 7, "response": "5"}
    Path(config.input).write_text(json.dumps(row) + "\n")
    for turn in range(2):
        answer(config)
        Path(config.output).rename(tmp_path / f"{turn}.jsonl")
        config.input = str(tmp_path / f"{turn}.jsonl")
    first, second = (json.loads((tmp_path / f"{turn}.jsonl").read_text()) for turn in range(2))
    assert first["reference"] == second["reference"] == "2"
    assert (first["input_nfe"], first["input_reference"]) == (7, "5")
    assert second["input_input_reference"] == first["response"]
    assert (second["input_nfe"], second["input_input_nfe"]) == (7, first["nfe"])
    assert second["nfe"] == first["nfe"]


def test_own_fields_keep_their_order():
    """Also from one process to another, in which sets have other orders."""
    row = {"nfe": 1, "a": 2, "tokens_per_forward": 3, "response": "4"}
    added = {"response": "5", "nfe": 6, "tokens_per_forward": 7.0}
    names = ["a", "input_nfe", "input_tokens_per_forward", "reference", *added]
    assert list(answers.with_fields(row, added)) == names


HOLD = "import fcntl, sys; file = open(sys.argv[1], 'w'); fcntl.lockf(file, fcntl.LOCK_EX); print(flush=True); input()"


def test_two_runs_do_not_write_to_one_output(config):
    directory = Path(config.output + ".partial")
    directory.mkdir()
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", HOLD, directory / ".lock"], **pipes) as other:
        other.stdout.readline()
        with pytest.raises(ValueError, match=f"another run writes to {directory}"):
            answer(config)
        other.communicate(b"\n")


def test_ctrl_c_says_how_to_go_on(config, monkeypatch):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(answers, "generate", stopped)
    with pytest.raises(SystemExit, match="the same command goes on"):
        answer(config)


def test_mistakes_are_named_before_anything_is_sampled(config, sampled, tmp_path, monkeypatch):
    def refused(match: str, **changes) -> None:
        with pytest.raises(ValueError, match=match):
            answer(replace(config, **changes))
        assert sampled == []
        assert not Path(config.output + ".partial").exists()

    rows = tmp_path / "rows.jsonl"
    rows.write_text("")
    refused(r"rows\.jsonl: there are no rows in it", input=str(rows))
    rows.write_text('{"question": "Hi"}\n\n{"question": "' + "Hi" * 1024 + '"}\n')
    refused(r"rows\.jsonl:3: a prompt of 2\d+ tokens and .*=12 do not fit .* context of 2048", input=str(rows))
    rows.write_text('{"question": "Hi"}\n{"id": 1}\n')
    refused(r"rows\.jsonl:2: field 'question' is missing", input=str(rows))
    refused(r"output=out\.parquet: give output=FILE\.jsonl", output="out.parquet")
    refused("output=None: give output", output=None)
    refused(r"output=.*goes with input=FILE", input=None, prompt="Hi")
    refused("give one of prompt", prompt="Hi")
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused("prompt=… is for one rank, torchrun has started 2", input=None, output=None, prompt="Hi")


def test_a_row_that_json_cannot_hold(config, tmp_path):
    rows = {"question": ["Hi"], "when": [date(2025, 1, 1)]}
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "rows.parquet")
    config.input = str(tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match=r"rows\.parquet:1: cannot be written as JSON .*date.*: leave that field out"):
        answer(config)


def test_a_template_is_filled_in(config, capsys):
    answer(replace(config, input=None, output=None, template="3x<|mask:2|>=9, x=<|mask:1|>!"))
    text = capsys.readouterr().out
    assert text.startswith("3x")
    assert "=9, x=" in text
    assert text.endswith("!\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the response is empty: the model ended it at once\n"),
        (" ", "the response is white space only\n"),
        ("\n\t\n", "the response is white space only\n"),
        (" a\n", ""),
    ],
)
def test_a_response_in_which_nothing_is_seen(config, tokenizer, monkeypatch, capsys, text, message):
    monkeypatch.setattr(answers, "load_for_sampling", lambda config: (None, tokenizer))
    monkeypatch.setattr(answers, "generate", lambda *_: [Response(0, text, 1, 1, 1.0)])
    answer(replace(config, input=None, output=None, prompt="Hi"))
    assert capsys.readouterr() == (text + "\n", message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"template": "no slot", "output": None}, "the template has no slot: write"),
        ({"template": "<|mask:0|>", "output": None}, "slot <|mask:0|>: write"),
        ({"template": "<|mask:3000|>", "output": None}, "template: its 3000 tokens do not fit the model's context of"),
        ({"template": "<|mask:3|>"}, "goes with input=FILE; template=… is filled in on the terminal"),
        ({"template": "<|mask:3|>", "prompt": "a"}, "give one of prompt=…, template=… or input="),
    ],
)
def test_a_template_that_cannot_be_filled_in(config, changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        answer(replace(config, input=None, **changes))

"""A prompt, a template, files of prompts: what is written, and mistakes."""

import json
import re
from dataclasses import replace
from datetime import date
from itertools import islice
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from data import prompt_ids
from diffllm import ModelConfig, new_model
from diffllm.generate import Response, generate, special_tokens
from diffllm.tokenizer import builtin_tokenizer
from launch import answers
from launch.answers import answer, with_fields
from launch.cli import user_errors
from sampling import SamplingConfig, infill_templates
from tests.conftest import small_shape
from trainer import evaluation
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
    """Output of a run without interruption."""
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

    monkeypatch.setattr(evaluation, "generate", watched)
    return names


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
    monkeypatch.setattr(evaluation, "generate", lambda *given: prompts.extend(given[2]) or generate(*given))
    with pytest.raises(ValueError, match=r"in\.jsonl:1: .*'tools'.*model\.chat_template"):
        answer(config)
    model, tokenizer = load_for_sampling(config)
    tokenizer.chat_template = "{{ tools | tojson }}" + tokenizer.chat_template
    monkeypatch.setattr(answers, "load_for_sampling", lambda *_: (model, tokenizer))
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


def interrupted(*arguments):
    yield from islice(generate(*arguments), 4)
    raise KeyboardInterrupt


def test_ctrl_c_ends_in_one_line_and_the_same_command_goes_on(config, whole, monkeypatch, capsys):
    monkeypatch.setattr(evaluation, "generate", interrupted)
    with pytest.raises(SystemExit) as end, user_errors(debug=False):
        answer(config)
    assert end.value.code == 130
    assert capsys.readouterr().err.splitlines()[-1] == "stopped by SIGINT: run the same command to resume"
    assert not Path(config.output).exists()
    monkeypatch.undo()
    rows = Path(config.input).read_text()
    Path(config.input).write_text(rows.replace('"id": 9', '"id": 10'))
    with pytest.raises(ValueError, match="4 rows of an interrupted run with other settings: input was 10 rows"):
        answer(config)
    Path(config.input).write_text(rows)
    answer(config)
    assert Path(config.output).read_bytes() == whole
    assert not Path(config.output + ".partial").exists()


def test_an_output_that_exists_is_left_alone(config, whole, sampled):
    Path(config.output).write_text("precious")
    with pytest.raises(ValueError, match=r"out\.jsonl exists already: delete it, or name another file"):
        answer(config)
    assert Path(config.output).read_text() == "precious"
    assert sampled == []


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


@pytest.mark.parametrize("more", [{}, {"response": None}])
def test_a_completion_is_a_reference(more):
    row = {"prompt": "2+2?", "completion": "4", "id": 1} | more
    answered = with_fields(row, {"response": "5"})
    assert answered == {"prompt": "2+2?", "id": 1, "reference": "4", "response": "5"}


def test_own_fields_keep_their_order():
    """Also from one process to another, in which sets have other orders."""
    row = {"nfe": 1, "a": 2, "tokens_per_forward": 3, "response": "4"}
    added = {"response": "5", "nfe": 6, "tokens_per_forward": 7.0}
    names = ["a", "input_nfe", "input_tokens_per_forward", "reference", *added]
    assert list(answers.with_fields(row, added)) == names


def test_mistakes_are_named_before_anything_is_sampled(config, sampled, tmp_path, monkeypatch):
    def refused(match: str, **changes) -> None:
        with pytest.raises(ValueError, match=match):
            answer(replace(config, **changes))
        assert sampled == []
        assert not Path(config.output + ".partial").exists()

    rows = tmp_path / "rows.jsonl"
    rows.write_text("")
    refused(r"rows\.jsonl: it has no rows", input=str(rows))
    rows.write_text('{"question": "Hi"}\n\n{"question": "' + "Hi" * 1024 + '"}\n')
    refused(r"rows\.jsonl:3: a prompt of 2\d+ tokens and .*=12 do not fit .* context of 2048", input=str(rows))
    rows.write_text('{"question": "Hi"}\n{"id": 1}\n')
    refused(r"rows\.jsonl:2: field 'question' is missing", input=str(rows))
    refused(r"output=out\.parquet: give output=FILE\.jsonl", output="out.parquet")
    refused("output=None: give output", output=None)
    refused(r"output=.*goes with input=FILE", input=None, prompt="Hi")
    refused("give prompt", prompt="Hi")
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


@pytest.mark.parametrize("prompt", [None, "Solve 3x=9"])
def test_a_template_may_be_the_answer_to_a_prompt(config, monkeypatch, capsys, prompt):
    canvases = []

    def watched(model, tokenizer, templates, *given, **named):
        [template] = templates
        canvases.extend(template.canvases(tokenizer, tokenizer.mask_token_id))
        return infill_templates(model, tokenizer, templates, *given, **named)

    monkeypatch.setattr(answers, "infill_templates", watched)
    text = "<think>\n9/3=<|mask:1-2|>\n</think>\n<|mask:1|>"
    answer(replace(config, input=None, output=None, template=text, prompt=prompt))
    filled = capsys.readouterr().out
    assert filled.startswith("<think>\n9/3=")
    assert "</think>" in filled
    tokenizer = builtin_tokenizer()
    chat = prompt and tokenizer.decode(prompt_ids([{"role": "user", "content": prompt}], tokenizer))
    for canvas, length in zip(canvases, (1, 2), strict=True):
        masks = ["<|mask|>" * length, "<|mask|>"]
        whole = f"<think>\n9/3={masks[0]}\n</think>\n{masks[1]}"
        assert tokenizer.decode(canvas.tokens) == (f"{chat}{whole}<|endoftext|>" if prompt else whole)
        assert [tokenizer.decode(canvas.tokens[slot.start : slot.stop]) for slot in canvas.slots] == masks
        assert canvas.prompt_length == canvas.slots[0].start


@pytest.mark.parametrize("terminal", [True, False])
def test_stderr_shows_a_response_while_it_forms(config, small_model, tokenizer, monkeypatch, capsys, terminal):
    monkeypatch.setattr(answers, "load_for_sampling", lambda *_: (small_model, tokenizer))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)
    answer(replace(config, input=None, output=None, prompt="Hi"))
    prompt = prompt_ids([{"role": "user", "content": "Hi"}], tokenizer)
    [response] = generate(small_model, tokenizer, [prompt], config.sampling)
    out, err = capsys.readouterr()
    assert out == response.text + "\n"
    assert ("▒" in err) == terminal
    assert terminal or err.startswith("no end within sampling.max_new_tokens=12: ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the response is empty: the model ended it at once\n"),
        (" ", "the response is white space only\n"),
        ("\n\t\n", "the response is white space only\n"),
        (" a\n", ""),
    ],
)
def test_a_response_in_which_nothing_is_seen(config, small_model, tokenizer, monkeypatch, capsys, text, message):
    monkeypatch.setattr(answers, "load_for_sampling", lambda *_: (small_model, tokenizer))
    monkeypatch.setattr(answers, "respond", lambda *_: Response(0, text, 1, 1, 1.0, True))
    answer(replace(config, input=None, output=None, prompt="Hi"))
    assert capsys.readouterr() == (text + "\n", message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"template": "no slot", "output": None}, "the template has no slot: write"),
        ({"template": "<|mask:0|>", "output": None}, "slot <|mask:0|>: write"),
        ({"template": "<|mask:3000|>", "output": None}, "template: its 3000 tokens do not fit the model's context of"),
        ({"template": f"<|mask:{10**11}|>", "output": None}, f"template: its {10**11} tokens do not fit"),
        ({"prompt": "Hi", "output": None, "sampling": SamplingConfig(steps=10**11)}, "sampling.steps=100000000000"),
        ({"template": "<|mask:3|>"}, "goes with input=FILE; template=… is answered on the terminal"),
        ({"template": "<|mask:3|>", "prompt": " ", "output": None}, "prompt= is empty"),
        ({"template": "<|mask:3|>", "input": "a.jsonl"}, "give prompt=…, template=… or both, or input="),
    ],
)
def test_a_template_that_cannot_be_filled_in(config, changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        answer(replace(config, **{"input": None} | changes))

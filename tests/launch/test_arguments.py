"""Arguments of a command line: quoted, checked, and named if nothing reads them."""

import re

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

import evaluate
import sample
from launch.arguments import OTHER_NAMES, check_arguments, group_choices, quote_text, warn_of_unread
from trainer.schema import field_names, resolve

PARTS = ["\\", "$", "${", "{", "}", '"', "'", "a", " ", "\n", "\r", ":", "=", ",", "[", "#", "é"]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.sampled_from(PARTS), max_size=9).map("".join) | st.text())
@example("Solve 3x+5=20")
@example("a, b (c) [d] {e}?")
@example(r"a\${x}")
@example(r"\\${a}\\")
@example('"Hi," she said, "bye"')
@example("'")
@example("'quoted'")
@example("back\\\n")
@example("${oc.env:HOME}")
@pytest.mark.parametrize("name", ["prompt", "template"])
def test_a_prompt_is_any_text(name, text):
    value = OverridesParser.create().parse_override(quote_text(f"{name}={text}")).value()
    assume(text not in ("null", "???"))  # which are settings that are not given
    assert getattr(resolve(OmegaConf.create({name: value})), name) == text


@pytest.mark.parametrize(
    ("reads", "arguments", "unread"),
    [
        (evaluate.READS, ["optim.lr=1", "data.subset=9", "+data.packing=true", "~task"], "optim.lr, data.packing"),
        (evaluate.READS, ["data=s1k", "experiment=quickstart", "hydra/launcher=joblib", "hydra.verbose=true"], None),
        (evaluate.READS, ["diffusion=dream", "prompt=Hi"], "diffusion, prompt"),
        (sample.READS, ["seed=1", "sampling.seed=1", "data.columns={prompt: a}"], "seed"),
        (sample.READS, ["-m", "sampling.steps=9", "task=rows", "task.name=rows"], "task, task.name"),
    ],
)  # fmt: skip
def test_settings_without_a_reader_are_named(monkeypatch, capsys, reads, arguments, unread):
    assert {*reads} <= {*group_choices(), *field_names()}
    warn_of_unread("some.py", arguments, reads)
    assert capsys.readouterr().err == (f"warning: some.py does not read {unread}\n" if unread else "")
    monkeypatch.setenv("RANK", "1")
    warn_of_unread("some.py", arguments, reads)
    assert capsys.readouterr().err == ""


def test_a_mask_token_needs_no_quotes():
    override = OverridesParser.create().parse_override(quote_text("model.mask_token=<|fim_pad|>"))
    assert override.value() == "<|fim_pad|>"
    assert quote_text('model.mask_token="<|fim_pad|>"') == 'model.mask_token="<|fim_pad|>"'  # of a sweep
    assert quote_text("prompt=null") == "prompt=null"


@pytest.mark.parametrize(
    "arguments", [["optim.lr=1,2", "optim.lr=3"], ["optim.lr=1", "optim.lr=2,3"], ["optim.lr=1,2,1"]], ids=str
)
def test_a_sweep_names_each_value_once(arguments):
    with pytest.raises(ValueError, match=r"optim\.lr.* given twice"):
        check_arguments(arguments)


@pytest.mark.parametrize(("theirs", "ours"), OTHER_NAMES.items())
def test_names_of_other_frameworks(theirs, ours):
    assert ours in field_names()
    with pytest.raises(ValueError, match=rf"optim\.{theirs}=1: .* {re.escape(ours)}\?"):
        check_arguments([f"optim.{theirs}=1"])

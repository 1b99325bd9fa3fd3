"""A text of a million characters is gone over in seconds, whatever it is: no pattern takes quadratic time."""

import re

import pytest

from data.chat import to_chat
from data.convert import RAW_SETS, convert
from data.curation import words_of
from data.errors import BadRows
from data.files import HUB_ID, SHARD, SPLIT, UNREAD
from data.readers import PlacedRow, read_json, read_jsonl
from data.tasks.judge import is_right, stated
from data.tasks.rows import Rows
from launch.sweep import ERROR
from sampling.infill import Template
from tests.conftest import no_longer_than

SIZE = 2**20
SECONDS = 20  # an hour for what is quadratic
UNITS = ("<", "<<", "<<a", ">>", "<<>", "1", "1,", "1,111,", "$", "a", "train-", "-00000-of-", ".", "/", "a/", "_", "é")
UNITS += ("\\boxed{", "\\boxed{}", "answer is ", "#### a\n", "(A) ", "A ", "* ", "1 and ", "= ", "\\text{")
UNITS += (
    "<think>",
    "</think>",
    "<|mask",
    "<|mask:",
    "[",
    "[1,",
    '{"a":',
    '"',
    "\\",
    " ",
    "\n ",
    "#",
    "中",
    "error: a\n  ",
)


def prepare(text, tmp_path):
    convert(PlacedRow({"question": "a", "answer": f"{text}\n#### 4"}, "rows:1"), RAW_SETS["gsm8k"])


def read(text, tmp_path):
    (tmp_path / "a").write_text(text)
    for reader in (read_json, read_jsonl):
        list(reader(tmp_path / "a", BadRows()))


def match_names(text, tmp_path):
    for pattern in (HUB_ID, SHARD):
        pattern.fullmatch(text)
    for pattern in (SPLIT, UNREAD):
        pattern.search(text)


PARTS = {
    "gsm8k": prepare,
    "files": read,
    "names": match_names,
    "words": lambda text, _: words_of(text),
    "answer": lambda text, _: Rows().score(PlacedRow({"question": "a", "answer": text}, "rows:1"), text),
    "verdict": lambda text, _: (stated(text), is_right(text, "four")),
    "chat": lambda text, _: to_chat(PlacedRow({"question": text, "answer": f"<think>{text}</think>4"}, "rows:1")),
    "log": lambda text, _: ERROR.search(text),
    "template": lambda text, _: Template.parse(text),
}
SLOW = {"verdict": pytest.mark.slow}


@pytest.mark.parametrize("part", [pytest.param(part, marks=SLOW.get(part, ())) for part in PARTS])
def test_no_text_takes_quadratic_time(part, tmp_path):
    for unit in UNITS:
        try:
            with no_longer_than(SECONDS):
                PARTS[part]((unit * SIZE)[: SIZE - 100], tmp_path)
        except ValueError:
            pass


@pytest.mark.parametrize(
    "line", ["4+4=<<4+4=8>>8", "a<<b", "<<a>>b>>c", "<<a<<b>>c", "<<<>>>", "a>>b<<c", "<<a\nb>>", ""]
)
def test_the_marks_of_the_calculator(line):
    made = convert(PlacedRow({"question": "a", "answer": f"so {line} so\n#### 4"}, "rows:1"), RAW_SETS["gsm8k"])
    expected = re.sub("<<.*?>>", "", f"so {line} so")
    assert made["answer"] == f"<think>\n{expected}\n</think>\n4"

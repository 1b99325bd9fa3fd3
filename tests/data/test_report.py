"""Reports as text and JSON."""

import json

import numpy as np
import pytest

from data.report import PERCENTILES, Report, save
from tests.data.rows import prepared, row


def test_the_report_as_text_and_json(tokenizer, tmp_path):
    rows = [row(f"question {i}", thinking="a " * i, source=i % 3) for i in range(1, 41)]
    kept = "source > 0 or '$^$' in question"
    tokens, report = prepared(tokenizer, rows, filter=kept, max_length=80, truncation="right")
    text = report.text()
    assert text.startswith("training: 27 of 40 rows\n")
    assert "13 (32.5%) left out by data.filter=source > 0 or '$^$' in question" in text
    assert f"{report.cut.count} ({report.cut.count / 40:.1%}) responses cut, {report.answerless} of them" in text
    lengths = {
        "prompt": tokens.prompt_lengths,
        "response": tokens.response_lengths,
        "thinking": tokens.column("thinking_tokens"),
        "answer": tokens.column("answer_tokens"),
    }
    for part, values in lengths.items():
        expected = np.percentile(values, PERCENTILES, method="higher").tolist()
        assert list(report.tokens()[part].values()) == expected
    assert "rows:3 'question 3'" in text
    save([report], tmp_path)
    saved = json.loads((tmp_path / "data_report.json").read_text())["training"]
    assert saved["tokens"] == report.tokens()
    assert (saved["kept"], saved["dropped"][f"left out by data.filter={kept}"]["count"]) == (27, 13)
    assert Report.from_json(json.loads(json.dumps(report.to_json()))) == report


def test_a_subset_has_an_account_of_its_own(tokenizer):
    rows = [row(f"question {i}", thinking="a " * 50 * (i % 2)) for i in range(10)]
    tokens, report = prepared(tokenizer, rows, max_length=80, truncation="right")
    assert (report.cut.count, report.answerless) == (5, 5)
    kept = report.keep_only(tokens, np.array([0, 2, 3, 4]), "not in data.subset=4")
    assert (len(kept), report.kept, report.cut.count, report.cut.examples) == (4, 4, 1, ["rows:4"])
    assert report.dropped["not in data.subset=4"].examples == ["rows:2", "rows:6", "rows:7"]
    assert report.text().splitlines()[2:9] == [
        "  6 (60.0%) not in data.subset=4",
        "    rows:2",
        "    rows:6",
        "    rows:7",
        "    and 3 more",
        "  1 (10.0%) responses cut, 1 of them before the answer",
        "    rows:4",
    ]


@pytest.mark.parametrize("truncation", ["drop", "right"])
def test_many_rows_that_are_too_long_are_a_warning(tokenizer, truncation):
    rows = [row(f"question {i}", thinking="a " * (50 * i)) for i in range(1, 11)]
    _, report = prepared(tokenizer, rows, max_length=1000, truncation=truncation)
    lengths = [length for length, count in report.whole.items() for _ in range(count)]
    assert sum(length > 1000 for length in lengths) == 1
    assert report.warning() is None  # a tenth is not many
    _, report = prepared(tokenizer, rows, max_length=400, truncation=truncation)
    shares = [sum(length <= limit for length in lengths) / 10 for limit in (400, 800, 1600)]
    fate = {"drop": "dropped", "right": "cut"}[truncation]
    assert report.warning() == (
        f"WARNING: {1 - shares[0]:.0%} of the rows exceed data.max_length=400 and are {fate}; "
        f"800 would keep {shares[1]:.0%} whole, 1,600 would keep {shares[2]:.0%} whole"
    )
    assert report.warning() in report.text()
    assert "WARNING" not in json.dumps(report.to_json())

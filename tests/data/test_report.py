"""Reports as text, JSON and picture."""

import json

import numpy as np

from data.report import PERCENTILES, Report, save
from tests.data.rows import prepared, row


def test_the_report_as_text_json_and_picture(tokenizer, tmp_path, monkeypatch):
    monkeypatch.undo()
    rows = [row(f"question {i}", thinking="a " * i, source=i % 3) for i in range(1, 41)]
    kept = "source > 0 or '$^$' in question"  # no formula to be drawn
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
    files = save([report], tmp_path)
    saved = json.loads(files[0].read_text())["training"]
    assert saved["tokens"] == report.tokens()
    assert (saved["kept"], saved["dropped"][f"left out by data.filter={kept}"]["count"]) == (27, 13)
    assert files[1].read_bytes().startswith(b"\x89PNG")
    assert Report.from_json(json.loads(json.dumps(report.to_json()))) == report


def test_a_subset_has_an_account_of_its_own(tokenizer):
    rows = [row(f"question {i}", thinking="a " * 50 * (i % 2)) for i in range(10)]
    tokens, report = prepared(tokenizer, rows, max_length=80, truncation="right")
    assert (report.cut.count, report.answerless) == (5, 5)
    kept = report.keep_only(tokens, np.array([0, 2, 3, 4]), "not in data.subset=4")
    assert (len(kept), report.kept, report.cut.count, report.cut.examples) == (4, 4, 1, ["rows:4"])
    assert report.dropped["not in data.subset=4"].examples == ["rows:2", "rows:6", "rows:7"]
    assert report.text().splitlines()[1:8] == [
        "  6 (60.0%) not in data.subset=4",
        "    rows:2",
        "    rows:6",
        "    rows:7",
        "    and 3 more",
        "  1 (10.0%) responses cut, 1 of them before the answer",
        "    rows:4",
    ]

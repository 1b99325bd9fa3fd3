"""Recordings: read as written, and refused when they are damaged."""

import json
from dataclasses import replace

import pytest

from sampling.recording import Cell, Commit, Given, Header, Piece, Recording, Result, Step, read


def recording(**header) -> Recording:
    """Three positions to fill, of which one is masked again, and one is behind the end."""
    head = Header(
        diffllm="0.1.0",
        model="M",
        sampling={"seed": 0, "stop": ["</script>"]},
        prompt="Hi <b>",
        template=None,
        prompt_length=1,
        length=5,
        masked=4,
        ends=[9],
        given=[Given(0, "Hi <b>", 7)],
    )
    steps = [
        Step(0, 1, [Commit(1, "\ufffd", 3, 0.4, 0.5), Commit(3, "a\n", 4, 0.75, None)], [], [], []),
        Step(1, 2, [Commit(2, "", 5, 0.95, 0.1)], [3], [], [Piece(1, "é\x1b[31m")]),
        Step(3, 3, [Commit(3, "<|end|>", 9, 1.0, 0.0)], [], [4], []),
    ]
    return Recording(replace(head, **header), steps, Result("é\x1b[31m", 3, 3, 1.0, 0.25))


@pytest.fixture
def file(tmp_path):
    """A recording on disk."""
    path = tmp_path / "run.jsonl"
    path.write_text("".join(recording().lines()))
    return path


def test_a_recording_is_read_as_written(file):
    assert read(file) == recording()
    assert len(file.read_text().splitlines()) == 5


def test_the_canvas_after_each_step():
    start, first, second, third = recording().canvases()
    assert [cell.text for cell in start] == ["Hi <b>", None, None, None, None]
    assert [cell.text for cell in first] == ["Hi <b>", "\ufffd", None, "a\n", None]
    assert [cell.text for cell in second] == ["Hi <b>", "é\x1b[31m", "", None, None]
    assert second[3] == Cell(again=1)
    assert [cell.step for cell in third] == [None, 1, 2, 3, None]
    assert (third[3].again, third[3].commit.prob, third[4].unused) == (1, 1.0, True)


def change(number: int, **fields):
    """Changes fields of a line."""

    def changed(lines: list[str]) -> str:
        lines[number] = json.dumps(json.loads(lines[number]) | fields)
        return "\n".join(lines) + "\n"

    return changed


COMMIT = {"position": 1, "text": "a", "id": 3, "prob": 0.4, "entropy": None}


@pytest.mark.parametrize(
    ("damage", "place"),
    [
        (lambda lines: "", "run.jsonl'"),
        (lambda lines: "\x00\xff", "run.jsonl'"),
        (lambda lines: "[" * 10**5, "run.jsonl'"),
        (lambda lines: '{"question": "Hi"}\n', "run.jsonl'"),
        (change(0, version=2, diffllm="9\x1b"), r"version 2 .*'9\\x1b'.* version 1"),
        (lambda lines: "\n".join(lines[:3]) + "\n", "line 3: .* 2 steps"),
        (lambda lines: "\n".join(lines)[:-20], "line 5: .* 3 steps"),
        (lambda lines: lines[0] + "\n", "line 1: .* 0 steps"),
        (lambda lines: "\n".join([lines[0], "{", *lines[2:]]) + "\n", "line 2: .* step, nfe"),
        (change(0, given=None), "line 1: .* None .* list"),
        (change(0, length=6), "5 masks of 4"),
        (change(0, prompt_length=6), "4 masks of 4"),
        (change(1, nfe="1"), "line 2: .* '1' .* int"),
        (change(1, nfe=True), "line 2: .* True .* int"),
        (change(1, committed=[COMMIT | {"position": 5}]), "position 5 "),
        (change(1, committed=[COMMIT | {"position": -1}]), "position -1 "),
        (change(1, committed=[COMMIT | {"position": 0}]), "step 1 .* position 0"),
        (change(1, committed=[COMMIT | {"prob": 1.5}]), "step 1 .* position 1"),
        (change(1, committed=[COMMIT | {"prob": float("nan")}]), "line 2: "),
        (change(0, sampling={"eps": float("nan")}), "run.jsonl'"),
        (change(0, sampling={"eps": {"a": 1}}), "line 1: "),
        (change(0, length=10**9, masked=10**9 - 1), "canvas of 1000000000"),
        (change(0, length=10**30), "canvas of 1000000000"),
        (change(2, remasked=[0]), "step 2 .* position 0"),
        (change(3, extra=1), "line 4: "),
        (change(4, text=None), "line 5: .* None .* str"),
    ],
)
def test_what_is_no_recording(file, damage, place):
    """The error names the file and the place."""
    file.write_bytes(damage(file.read_text().splitlines()).encode("latin-1"))
    with pytest.raises(ValueError, match=place) as error:
        read(file)
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)

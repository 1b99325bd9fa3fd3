"""The page, the animation and the picture of a recording; the browser's side is in test_render_page.py."""

import io
import json
import re
from html import unescape
from unicodedata import category

import pytest
from PIL import Image

from data.terminal import printable
from sampling.render import __main__ as command
from sampling.render.page import asset, page
from sampling.render.picture import COLOURS, MASK, gif, png
from sampling.render.text import visible
from tests.sampling.test_recording import file, recording  # noqa: F401 — the first is a fixture


def test_a_page_loads_nothing():
    text = page(recording())
    assert not re.search(r"(src|href|url)\s*[=(]|@import|https?:", text)
    assert "default-src 'none'" in text
    assert text.count("</script>") == 2


def test_texts_of_a_page_are_text():
    text = page(recording(prompt="</title><script>alert(1)</script>\x1b\u202e\ud800", model="<img src=x>"))
    assert "<script>alert" not in text
    assert "<img" not in text
    assert "\x1b" not in text
    assert "\u202e" not in text
    text.encode()
    title = re.search("<title>(.*?)</title>", text)[1]
    assert unescape(title) == r"</title><script>alert(1)</script>\u001b\u202e\ud800"


def test_a_page_holds_the_recording():
    held = re.search(r'id="recording">(.*?)</script>', page(recording()))[1]
    lines = [json.loads(line) for line in recording().lines()]
    assert json.loads(held) == {"header": lines[0], "steps": lines[1:-1]}


def test_a_picture_has_the_colours_of_its_steps():
    image = Image.open(io.BytesIO(png(recording())))
    found = {colour for _, colour in image.getcolors(2**16)}
    rgb = {name: tuple(bytes.fromhex(name[1:])) for name in (*COLOURS, MASK)}
    assert {*rgb.values()} <= found
    wide = Image.open(io.BytesIO(png(recording(length=205, masked=204))))
    assert wide.height > image.height


def test_an_animation_has_a_frame_for_each_step_and_the_start():
    image = Image.open(io.BytesIO(gif(recording())))
    assert image.n_frames == 4


def test_a_recording_without_steps_is_drawn():
    nothing = recording(masked=0, length=1)
    nothing.steps.clear()
    assert Image.open(io.BytesIO(png(nothing))).width > 0
    assert Image.open(io.BytesIO(gif(nothing))).n_frames == 1
    assert "viewer" in page(nothing)


def test_terminals_pictures_and_pages_escape_the_same_characters():
    """Each has its own list: `data` and `sampling` do not import each other, and the browser imports neither."""
    [marks] = re.findall(r"text\.replace\(/\[\\p{Cc}\\p{Cs}(.*?)\]/gu", asset("canvas.js"))
    characters = [*map(chr, range(2**16))]
    of_pages = {each for each in characters if category(each) in ("Cc", "Cs") or re.match(f"[{marks}]", each)}
    assert of_pages - {*"\n\t"} == {each for each in characters if visible(each) != each}
    assert of_pages - {*"\n\t"} == {each for each in characters if printable(each) != each}


def test_visible():
    assert visible("a\n\t\x00\x9b\u2067é你\ud83d") == "a\n\t\\u0000\\u009b\\u2067é你\\ud83d"
    assert visible("a\n", keep="") == "a\\u000a"


@pytest.mark.parametrize("suffix", [".html", ".gif", ".png", ".HTML"])
def test_the_command_writes_a_file(file, tmp_path, suffix):  # noqa: F811
    output = tmp_path / f"out{suffix}"
    command.main([str(file), str(output)])
    assert output.stat().st_size > 1000
    output.write_text("precious")
    with pytest.raises(SystemExit, match="exists already"):
        command.main([str(file), str(output)])
    assert output.read_text() == "precious"


@pytest.mark.parametrize(
    ("source", "output", "message"),
    [
        ("run.jsonl", "out.svg", r"its suffix must be one of \.html, \.gif, \.png"),
        ("run.jsonl", "nowhere/out.html", "No such file or directory: .*nowhere/out.html"),
        ("none.jsonl", "out.html", "No such file or directory: .*none.jsonl"),
        (".", "out.html", "Is a directory"),
        ("other.jsonl", "out.html", "is not a recording"),
    ],
)
def test_mistakes_end_in_one_line(file, tmp_path, source, output, message):  # noqa: F811
    (tmp_path / "other.jsonl").write_text("{}\n")
    with pytest.raises(SystemExit, match=message) as end:
        command.main([str(tmp_path / source), str(tmp_path / output)])
    assert str(end.value.code).startswith("error: ")
    assert "\n" not in end.value.code
    assert not (tmp_path / output).exists()


def test_a_missing_package_is_named(file, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setitem(command.KINDS, ".png", lambda recording: (_ for _ in ()).throw(ImportError(name="matplotlib")))
    with pytest.raises(SystemExit, match=r"needs the package matplotlib: pip install 'diffllm\[plot\]'"):
        command.main([str(file), str(tmp_path / "out.png")])

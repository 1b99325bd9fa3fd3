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
from sampling.render import picture
from sampling.render.page import asset, page
from sampling.render.picture import COLOURS, HATCH, MASK, Picture, gif, png
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
    rgb = {name: tuple(bytes.fromhex(name[1:])) for name in (*COLOURS, MASK, HATCH)}
    assert {*rgb.values()} <= found
    wide = Image.open(io.BytesIO(png(recording(length=205, masked=204))))
    assert wide.height > image.height


def test_pictures_and_pages_look_the_same():
    """Light colours, bounds and labels of the legend."""
    light = dict(re.findall(r"--(\w+): (#\w+);", asset("canvas.css").split("@media")[0]))
    names = {"text": "TEXT", "quiet": "QUIET", "mask": "MASK", "hatch": "HATCH", "accent": "FRESH", "page": "PAGE"}
    assert {name: getattr(picture, constant) for name, constant in names.items()}.items() <= light.items()
    assert [light[f"p{i}"] for i in range(len(COLOURS))] == [*COLOURS]
    script = asset("canvas.js")
    assert json.loads(re.search(r"LEAST = (\[.*?\])", script)[1]) == [*picture.LEAST]
    for name in ("END", "UNUSED", "BREAK"):
        assert f'{name} = "{getattr(picture, name)}"' in script
    entries = re.findall(r'entry\("[^"]*", "([^"]*)"', script)
    assert len(entries) == 6
    assert [label for _, _, label in Picture(recording(), 32, 1).legend][len(COLOURS) :] == entries


def test_the_legend_is_as_wide_as_the_panels():
    narrow, wide = Picture(recording(), columns=32, panels=1), Picture(recording(), columns=32, panels=3)
    sizes = [drawn.draw([1]).size for drawn in (narrow, wide)]
    assert sizes[0][0] < sizes[1][0] < 3 * sizes[0][0]
    assert sizes[0][1] > sizes[1][1]


@pytest.mark.parametrize(("text", "short"), [("abc", "abc"), ("abcd", "ab…"), ("你b", "你b"), ("你好", "你…")])
def test_a_text_is_cut_to_columns(text, short):
    assert picture.shortened(text, 3) == short


def test_an_animation_is_laid_out_once(monkeypatch):
    calls, layout = [], picture._layout
    monkeypatch.setattr(picture, "_layout", lambda *given: calls.append(1) or layout(*given))
    gif(recording())
    assert len(calls) == 1


def test_settings_of_a_page_are_written_as_in_conf():
    text = page(recording(sampling={"steps": None, "scaled": True, "alg": "origin", "top_p": 0.9, "stop": ["a"]}))
    cells = dict(re.findall("<tr><td>(.*?)</td><td>(.*?)</td></tr>", text))
    written = {"steps": "null", "scaled": "true", "alg": "origin", "top_p": "0.9", "stop": "[&quot;a&quot;]"}
    assert written.items() <= cells.items()


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

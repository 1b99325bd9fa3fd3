"""A recording as one HTML file, without a server or other files."""

import json
from base64 import b64encode
from dataclasses import asdict
from hashlib import sha256
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from sampling.recording import Recording
from sampling.render.text import visible

FOLDER = Path(__file__).parent


def page(recording: Recording) -> str:
    """Return the page. Its policy allows its own style and script, and nothing else to be run or loaded."""
    header, result = recording.header, recording.result
    style, script = asset("canvas.css", "page.css"), asset("canvas.js", "page.js")
    settings = {"model": header.model, "diffllm": header.diffllm} | header.sampling
    return Template(asset("page.html")).substitute(
        policy=f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'",
        title=_text(title(recording)),
        facts=_text(
            f"{header.model} · {result.tokens} tokens · {result.nfe} forwards · {result.tokens_per_forward:.2f} tokens "
            f"a forward · {result.seconds:.2f} s"
        ),
        text=_text(result.text),
        settings="".join(
            f"<tr><td>{_text(name)}</td><td>{_text(_setting(value))}</td></tr>" for name, value in settings.items()
        ),
        recording=json.dumps({"header": asdict(header), "steps": [*map(asdict, recording.steps)]}).replace(
            "<", "\\u003c"
        ),
        style=style,
        script=script,
    )


def title(recording: Recording) -> str:
    """The prompt, or else the template."""
    return recording.header.prompt or recording.header.template or "A recording"


def asset(*names: str) -> str:
    """Text of files of this folder, one after the other."""
    return "\n".join((FOLDER / name).read_text(encoding="utf-8") for name in names)


def _setting(value: Any) -> str:
    """A value as the files of conf/ write it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _digest(text: str) -> str:
    return f"sha256-{b64encode(sha256(text.encode()).digest()).decode()}"


def _text(text: str) -> str:
    return escape(visible(text))

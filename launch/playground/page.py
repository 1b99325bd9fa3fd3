"""The page: controls, and the canvas while it fills."""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import gradio as gr
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from data.chat import Message
from launch.meanings import meanings
from launch.playground.fields import FIELDS, MAIN, changed, is_list, is_optional, kind, read, to_text
from launch.playground.runs import CHARACTERS, MODES, Playground, Request, Run, message_of
from sampling import SamplingConfig
from sampling.config import CHOICES
from sampling.render.page import asset
from sampling.render.text import visible

START = "as started"  # the settings of the command line, among the presets
TEXTS = ("mode", "prompt", "template", "system", "compare")  # of the page, before the settings
EXAMPLE = "<think>\n<|mask:5|>\n<|mask:5|>\n</think>\n<|mask:1|>"
EMPTY = {"turns": [], "runs": [], "message": "", "link": ""}
FOLDER = Path(__file__).parent


class Page:
    """The page of a playground.

    Args:
        presets: choices of `sampling`.
        preset: returns the settings of a choice.
    """

    def __init__(self, playground: Playground, presets: Sequence[str], preset: Callable[[str], SamplingConfig]):
        self.playground, self.presets, self.preset = playground, presets, preset
        self.config = playground.config.sampling
        # Of results: the browser ignores drafts of one that it has left. They rise when the server starts again, too.
        self._ids = itertools.count(time.time_ns() // 10**6)

    def build(self) -> gr.Blocks:
        """Return the page, ready to be launched."""
        with gr.Blocks(title="diffllm playground", analytics_enabled=False) as blocks:
            gr.HTML(
                html_template='<div class="diffusion results"><h1>diffllm playground</h1><p>${value}</p></div>',
                value=escape(visible(str(self.playground.config.model.path))),
            )
            with gr.Row(elem_id="columns"):
                with gr.Column(scale=5, min_width=340):
                    parts = self._question()
                with gr.Column(scale=3, min_width=300):
                    more, controls = self._settings()
            self._connect(blocks, parts | more, controls)
        return blocks

    def _question(self) -> dict[str, gr.components.Component]:
        """Make the inputs of a run and its result, by name."""
        slots = "<|mask:12|> is a slot of 12 tokens. With a prompt it is the whole answer, else raw text."
        if block := self.playground.model.block_length:
            slots += f" Slots do not see the text of later blocks; a block has {block} tokens."
        parts = {
            "mode": gr.Radio(
                [(name.capitalize(), name) for name in MODES], value="prompt", show_label=False, elem_id="mode"
            ),
            "prompt": _textbox("Prompt", "prompt", lines=3, max_lines=12, autofocus=True),
            "template": _textbox(
                "Template",
                "template",
                info=slots,
                value=EXAMPLE,
                lines=5,
                max_lines=20,
                visible=False,
            ),
        }
        with gr.Row():
            narrow = {"scale": 0, "min_width": 110}
            parts["run"] = gr.Button("Run", variant="primary", interactive=False, elem_id="run", **narrow)
            parts["stop"] = gr.Button("Stop", interactive=False, elem_id="stop", **narrow)
            parts["forget"] = gr.Button("New chat", visible=False, elem_id="forget", **narrow)
        parts["result"] = gr.HTML(
            value=EMPTY | {"id": 0},
            html_template="<div></div>",
            js_on_load=asset("canvas.js") + (FOLDER / "playground.js").read_text("utf-8"),
            status="",
            elem_id="result",
            apply_default_css=False,
        )
        return parts

    def _settings(self) -> tuple[dict[str, gr.components.Component], dict[str, gr.components.Component]]:
        """Make the other inputs of a run, and the controls of the settings, both by name."""
        parts = {
            "preset": gr.Dropdown(
                [START, *self.presets], value=START, label="Preset", info="settings of conf/sampling", elem_id="preset"
            )
        }
        controls = {name: _control(name, getattr(self.config, name)) for name in MAIN}
        changes = "changes, such as steps=6 alg=origin or sampling=fast; the same prompt and seed"
        parts["compare"] = _textbox("Compare with", "compare", info=changes)
        with gr.Accordion("More settings", open=False):
            parts["system"] = _textbox("System message", "system", max_lines=6)
            controls |= {name: _control(name, getattr(self.config, name)) for name in FIELDS if name not in MAIN}
        return parts, controls

    def _connect(
        self,
        blocks: gr.Blocks,
        parts: dict[str, gr.components.Component],
        controls: dict[str, gr.components.Component],
    ) -> None:
        """Connect buttons and choices with their functions."""
        turns, result, buttons = gr.State([]), parts["result"], [parts["run"], parts["stop"]]
        texts, settings = [parts[name] for name in TEXTS], [controls[name] for name in FIELDS]
        quiet = {"show_progress": "hidden", "api_visibility": "private"}
        sampled = gr.on(
            [parts["run"].click, parts["prompt"].submit],
            self.run,
            [turns, *texts, *settings],
            [result, turns, parts["prompt"], *buttons],
            concurrency_limit=None,  # the playground lets one sample, and the others wait
            **quiet,
        )
        ends = {"cancels": [sampled], "queue": False, **quiet}
        # playground.js shows at once that the run is left.
        parts["stop"].click(lambda: _buttons(False), None, buttons, **ends)
        left = [parts["forget"].click, parts["mode"].input]
        gr.on(left, lambda: ([], gr.HTML(status=""), *_buttons(False)), None, [turns, result, *buttons], **ends)
        parts["mode"].change(
            lambda name: (gr.Textbox(visible=name == "template"), gr.Button(visible=name == "chat")),
            parts["mode"],
            [parts["template"], parts["forget"]],
            queue=False,
            **quiet,
        )
        parts["preset"].input(self.choose, parts["preset"], [result, *settings], **quiet)
        blocks.load(self.load, None, [parts["run"], result, *texts, *settings], **quiet)

    def run(self, turns: list[Message], *inputs: Any) -> Iterator[list[Any]]:
        """Sample, and yield the outputs after each step. An error is shown, too."""
        view = EMPTY | {"id": next(self._ids)}
        written = gr.skip()  # the prompt stays
        try:
            texts, values = dict(zip(TEXTS, inputs, strict=False)), inputs[len(TEXTS) :]
            request = Request(texts["mode"], *(texts[name] or "" for name in ("prompt", "template", "system")), turns)
            first = _config(self.config, values)
            settings = [("", first)]
            if line := (texts["compare"] or "").strip():
                settings = [("these settings", first), (line, changed(first, line, self.preset))]
            view["link"] = self._link(texts, first)
            if request.mode == "chat":
                view["turns"] = [*turns, Message(role="user", content=request.prompt)]
            yield [gr.HTML(value=view, status=""), gr.skip(), written, *_buttons(True)]
            for runs in self.playground.run(request, settings):
                view = view | {"runs": [*map(_shown, runs)]}  # a new one: gradio sends what differs from the last
                # Drafts change nothing else: one that comes after Stop would undo it.
                yield [gr.HTML(value=view), *(gr.skip() for _ in ("turns", "prompt", "run", "stop"))]
            if request.mode == "chat":
                turns = [*view["turns"], Message(role="assistant", content=runs[0].result["text"])]
                written = ""
        except Exception as error:  # the page lives on
            view["message"] = f"error: {message_of(error)}"
        yield [gr.HTML(value=view), turns, written, *_buttons(False)]

    def choose(self, name: str) -> list[Any]:
        """Settings of a preset, for the controls."""
        try:
            config = self.config if name == START else replace(self.preset(name), seed=self.config.seed)
        except Exception as error:  # as in `run`
            return [gr.HTML(status=f"error: {message_of(error)}"), *(gr.skip() for _ in FIELDS)]
        return [gr.HTML(status=""), *_values(config)]

    def load(self, request: gr.Request) -> list[Any]:
        """The texts and settings of a link, for the controls. Run is enabled when they are there."""
        run = gr.Button(interactive=True)
        query, message = dict(request.query_params), ""
        if not query:  # a user may write already
            return [run, *(gr.skip() for _ in ("result", *TEXTS, *FIELDS))]
        texts = {"mode": "prompt", "prompt": "", "template": EXAMPLE, "system": "", "compare": ""}
        texts |= {name: query[name] for name in TEXTS if name in query}
        if texts["mode"] not in MODES:
            texts["mode"] = "prompt"
        config = self.config
        try:
            config = replace(config, **read({name: query[name] for name in FIELDS if name in query}))
        except ValueError as error:
            message = f"error: {message_of(error)}"
        return [run, gr.HTML(status=message), *(texts[name] for name in TEXTS), *_values(config)]

    def _link(self, texts: dict[str, str], config: SamplingConfig) -> str:
        """Query with the texts, and all settings: the server may have others when the link is opened."""
        kept = {name: text for name, text in texts.items() if text and (name != "template" or texts["mode"] == name)}
        return f"?{urlencode(kept | {name: to_text(name, getattr(config, name)) for name in FIELDS})}"


def serve_page(page: Page, host: str, port: int) -> gr.Blocks:
    """Serve the page in threads of this process. It reads no files of users, and asks no other host for anything."""
    blocks = page.build()
    blocks.launch(
        server_name=f"[{host}]" if ":" in host else host,  # as in an address of the browser
        server_port=port,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        allowed_paths=[],
        app_kwargs={"middleware": [Middleware(WithoutUploads)]},
        theme=_theme(),
        css=f"{asset('canvas.css')}\n{(FOLDER / 'playground.css').read_text('utf-8')}",
    )
    return blocks


class WithoutUploads:
    """ASGI middleware that refuses forms with files: gradio would keep them, and serve them to others."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        types = (value for name, value in scope.get("headers", ()) if name == b"content-type")
        refused = any(b"multipart" in value.lower() for value in types)
        app = PlainTextResponse("this page takes no files", 403) if refused else self.app
        await app(scope, receive, send)


def _theme() -> gr.themes.Base:
    """The look of the controls, with the colours of canvas.css. Its fonts are those of the system: none is fetched."""
    theme = gr.themes.Base(
        primary_hue="blue",
        neutral_hue="gray",
        radius_size="sm",
        spacing_size="sm",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "Menlo", "Consolas", "monospace"],
    )
    line, panel, accent = ("#d9dde2", "#343a42"), ("#ffffff", "#1c2026"), ("#1f5fa8", "#7db4f0")
    colours = {
        "body_background_fill": ("#ffffff", "#14171b"),
        "block_background_fill": ("transparent", "transparent"),
        "block_border_width": ("0px", "0px"),
        "border_color_primary": line,
        "block_info_text_color": ("#68707a", "#98a1ac"),
        "input_background_fill": panel,
        "input_background_fill_focus": panel,
        "input_border_width": ("1px", "1px"),
        "input_border_color": line,
        "input_border_color_focus": accent,
        "checkbox_label_background_fill": ("transparent", "transparent"),
        "checkbox_label_background_fill_hover": ("transparent", "transparent"),
        "checkbox_label_background_fill_selected": ("transparent", "transparent"),
        "button_primary_background_fill": ("#1f5fa8", "#1f5fa8"),
        "button_primary_background_fill_hover": ("#184e8c", "#2a6fbd"),
    }
    both = {name: light for name, (light, _) in colours.items()}
    return theme.set(
        block_padding="*spacing_lg 0", **both, **{f"{name}_dark": dark for name, (_, dark) in colours.items()}
    )


def _textbox(label: str, name: str, **given: Any) -> gr.Textbox:
    return gr.Textbox(label=label, elem_id=name, max_length=CHARACTERS, **given)


def _control(name: str, value: Any) -> gr.components.Component:
    """The control of a setting, with its help."""
    shown = {"label": name, "info": meanings(SamplingConfig)[name], "value": _value(name, value)}
    shown["elem_id"] = f"sampling_{name}"
    if name in CHOICES:
        return gr.Dropdown([*CHOICES[name]], **shown)
    if is_list(name):
        return gr.Textbox(**shown | {"info": f"{shown['info']}; one a line"}, lines=1, max_lines=6)
    if kind(name) is bool:
        return gr.Checkbox(**shown)
    if is_optional(name):  # an empty Number would show 0
        return gr.Textbox(**shown, placeholder="null", lines=1, max_lines=1)
    return gr.Number(**shown)


def _value(name: str, value: Any) -> Any:
    """The value of a setting in its control."""
    if is_optional(name):
        return "" if value is None else to_text(name, value)
    return to_text(name, value) if is_list(name) else value


def _values(config: SamplingConfig) -> list[Any]:
    return [_value(name, getattr(config, name)) for name in FIELDS]


def _config(config: SamplingConfig, values: Sequence[Any]) -> SamplingConfig:
    """The settings that the controls show. A client of the API may send values of other types.

    Raises:
        ValueError: a value is missing, or refused.
    """
    shown = ("" if value is None else str(value) for value in values)
    return replace(config, **read(dict(zip(FIELDS, shown, strict=True))))


def _buttons(running: bool) -> tuple[gr.Button, gr.Button]:
    """Run and Stop."""
    return gr.Button(interactive=not running), gr.Button(interactive=running)


def _shown(run: Run) -> dict[str, Any]:
    """A run for the page, which later steps do not change."""
    return vars(run) | {"steps": [*run.steps]}

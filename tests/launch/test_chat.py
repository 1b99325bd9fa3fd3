"""The chat, with lines that are written beforehand."""

import io
import re
from dataclasses import asdict

import pytest
from rich.console import Console

from data import prompt_ids
from data.terminal import printable
from diffllm.generate import Response, generate
from launch import chat as chat_module
from launch import drawing
from launch.chat import Conversation, chat
from sampling import SamplingConfig, StepEvent, fill
from tests.conftest import small_shape
from trainer.config import Config


class Talk(Conversation):
    """A chat whose lines are given; an exception among them is raised when its turn comes."""

    def __init__(self, model, tokenizer, config: SamplingConfig, terminal: bool = False):
        console = Console(file=io.StringIO(), width=100, force_terminal=terminal)
        super().__init__(model, tokenizer, config, console, self.next_line)

    def next_line(self) -> str:
        line = next(self.lines, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    def hear(self, *lines: str | BaseException) -> str:
        """Output of the chat for these lines."""
        self.lines = iter(lines)
        self.console.file.seek(0)
        self.console.file.truncate()
        self.run()
        return self.console.file.getvalue()


@pytest.fixture
def config() -> SamplingConfig:
    return SamplingConfig(max_new_tokens=12, steps=4, temperature=1.0)


@pytest.fixture
def talk(small_model, tokenizer, config) -> Talk:
    return Talk(small_model, tokenizer, config)


def response_to(talk: Talk, messages: list[tuple[str, str]], name: int) -> str:
    prompt = prompt_ids([{"role": role, "content": content} for role, content in messages], talk.tokenizer)
    [response] = generate(talk.model, talk.tokenizer, [prompt], talk.config, [name])
    return response.text


def test_turns_follow_each_other(talk):
    """Every response is that to the whole conversation, in the tokens of the chat template."""
    shown = talk.hear("Hi", "", "  And then?  ", "/system Be brief.", "Well?")
    messages = []
    for name, text in enumerate(("Hi", "And then?", "Well?")):
        messages.append(("user", text))
        system = [("system", "Be brief.")] if name == 2 else []
        messages.append(("assistant", response_to(talk, system + messages, name)))
        assert printable(messages[-1][1]) in shown
    assert [(message["role"], message["content"]) for message in talk.turns] == messages
    assert shown.count("12 tokens, NFE 4, 3.00 tokens a forward") == 3


def test_reset_forgets_what_was_said(talk):
    talk.hear("Hi")
    first = list(talk.turns)
    talk.hear("More", "/reset", "Hi")
    assert talk.turns == first


def test_the_system_message_can_be_taken_back(talk):
    talk.hear("/system Be brief.")
    assert talk.system == "Be brief."
    assert "no system message" in talk.hear("/system")
    assert talk.system == ""


@pytest.mark.parametrize("line", ["/set steps 2", "/set steps=2", "/set  sampling.steps = 2", "/set sampling.steps=2"])
def test_a_setting_is_changed(talk, config, line):
    shown = talk.hear(line, "Hi")
    assert "steps is 2" in shown
    assert "NFE 2" in shown
    assert asdict(talk.config) == asdict(config) | {"steps": 2}


def test_values_have_types(talk):
    talk.hear("/set top_p 0.5", "/set block_length 4", "/set block_length null", "/set alg low_confidence")
    talk.hear('/set stop ["a, b", "=c"]', "/set stop_at_eos false")
    assert talk.config.stop == ["a, b", "=c"]
    talk.hear(r"/set stop \n\n")
    assert talk.config.stop == ["\n\n"]
    talk.hear(r'/set stop ["\n\n", \\n, é]', "/set steps 3", r"/set forbidden \t")
    assert talk.config.top_p == 0.5
    assert talk.config.block_length is None
    assert talk.config.alg == "maskgit_plus"
    assert talk.config.stop == ["\n\n", r"\n", "é"]
    assert talk.config.forbidden == ["\t"]
    assert talk.config.stop_at_eos is False


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/set", ["/set NAME VALUE", "/set steps 128"]),
        ("/set steps", ["/set NAME VALUE", "/set steps 128"]),
        ("/set stepps 2", ["sampling.stepps: no such setting", "did you mean sampling.steps"]),
        ("/set steps 0", ["sampling.steps=0: must be at least 1"]),
        ("/set compile true", ["sampling.compile=true: is decided when the model is loaded"]),
        ("/set steps many", ["sampling.steps", "'many'", "Integer"]),
        ("/set steps [1", ["sampling.steps=[1"]),
        ("/set steps ${x}", ["sampling.steps", "'x'"]),
        ("/set alg entropi", ["sampling.alg=entropi: choose one of origin"]),
        ("/set forbidden [ab]", ["sampling.forbidden=['ab']", "not one token"]),
        ("/sett steps 2", ["/sett: no such command", "did you mean /set"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_mistakes_change_nothing(talk, config, line, words):
    [shown] = talk.hear(line).splitlines()
    assert shown.startswith("error: ")
    for word in words:
        assert word in shown
    assert talk.config == config
    assert "12 tokens" in talk.hear("Hi")


def test_settings_and_help(talk):
    shown = talk.hear("/settings").splitlines()
    settings = dict(line.split(maxsplit=1) for line in shown)
    assert {name: value.strip() for name, value in settings.items()} == {
        name: str(value) for name, value in asdict(talk.config).items()
    }
    shown = talk.hear("/help")
    for command in chat_module.COMMANDS:
        assert re.search(rf"(\n|, ){command}\b", f"\n{shown}")


@pytest.mark.parametrize("line", ["/quit", " /exit "])
def test_leaving(talk, line):
    assert talk.hear(line, "Hi") == ""
    assert talk.turns == []


def test_a_compiler_that_fails_ends_the_chat(talk, monkeypatch):
    """Each further line would fail alike."""

    def fail(*_, **__):
        raise ValueError("sampling.compile=true: compilation failed")

    monkeypatch.setattr(drawing, "fill", fail)
    with pytest.raises(ValueError, match=r"sampling\.compile=true"):
        talk.hear("/set steps 0", "Hi", "And then?")
    assert next(talk.lines) == "And then?"
    assert talk.turns == []


def test_a_chat_that_has_become_too_long(talk):
    talk.hear("Hi")
    said = list(talk.turns)
    [shown] = talk.hear("Hi" * 1024).splitlines()
    assert "error: a chat of 2" in shown
    assert (
        "context of 2048 tokens; lower sampling.max_new_tokens: not sent. /reset, or /set max_new_tokens to less"
        in shown
    )
    assert talk.turns == said
    assert "12 tokens" in talk.hear("Hi")


def test_ctrl_c_ends_a_response_and_not_the_chat(talk, monkeypatch):
    talk.hear("Hi")
    said = list(talk.turns)

    def interrupted(model, canvases, config, special, on_step):
        steps = 0

        def press(event: StepEvent) -> None:
            nonlocal steps
            on_step(event)
            steps += 1
            if steps == 2:
                raise KeyboardInterrupt

        return fill(model, canvases, config, special, on_step=press)

    with monkeypatch.context() as patch:
        patch.setattr(drawing, "fill", interrupted)
        assert talk.hear("Never mind").count("stopped: a turn without a complete response is not kept") == 1
    assert talk.turns == said
    shown = talk.hear(KeyboardInterrupt(), KeyboardInterrupt(), "And then?")
    assert shown.count("/quit or Ctrl-D leaves") == 2
    assert "12 tokens" in shown


def test_ctrl_c_twice(talk, monkeypatch):
    """The second comes while the first is answered."""
    show, impatient = talk.show, [False, False, True]

    def show_or_not(*arguments):
        if impatient.pop():
            raise KeyboardInterrupt
        show(*arguments)

    monkeypatch.setattr(talk, "show", show_or_not)
    shown = talk.hear(KeyboardInterrupt(), "Hi")
    assert "/quit or Ctrl-D leaves" in shown
    assert "12 tokens" in shown


def test_a_canvas_forms(small_model, tokenizer, monkeypatch):
    """Masks, what the last step committed and what stood before look different."""
    config = SamplingConfig(
        max_new_tokens=8, steps=8, transfer="even", alg="left_to_right", forbidden=["<|endoftext|>"]
    )
    talk = Talk(small_model, tokenizer, config, terminal=True)
    drafts = []
    draft = drawing.draft
    monkeypatch.setattr(drawing, "draft", lambda *given: drafts.append(draft(*given)) or drafts[-1])
    shown = talk.hear("Hi")
    assert "▒" in shown
    assert [text.plain.count("▒") for text in drafts] == [7, 6, 5, 4, 3, 2, 1, 0]
    styles = [[span.style for span in text.spans] for text in drafts]
    assert styles[0] == [drawing.COMMITTED, drawing.MASKED]
    assert styles[3] == [drawing.CLEAN, drawing.COMMITTED, drawing.MASKED]
    assert styles[-1] == [drawing.CLEAN, drawing.COMMITTED]


def test_a_pipe_sees_no_canvas(talk):
    shown = talk.hear("Hi")
    assert "▒" not in shown
    assert "\x1b" not in shown


def test_markup_in_messages_is_text(talk, monkeypatch):
    said = Response(0, "[bold]x[/bold] :smile: " + "word " * 50, 3, 1, 3.0, True)
    monkeypatch.setattr(chat_module, "respond", lambda *_: said)
    assert talk.hear("[red]Hi[/]").splitlines()[0] == said.text


def test_lines_of_a_pipe(small_model, tokenizer, config, monkeypatch, capsys):
    monkeypatch.setattr(chat_module, "load_for_sampling", lambda config: (small_model, tokenizer))
    monkeypatch.setattr("sys.stdin", io.StringIO("Hi\n/set steps 0\n/set steps 2\nAnd then?"))
    chat(Config(model=small_shape(), mode="chat", sampling=config))
    shown = capsys.readouterr().out
    assert shown.count("12 tokens") == 2
    assert "sampling.steps=0: must be at least 1" in shown
    assert "> " not in shown


def test_what_does_not_go_with_a_chat(monkeypatch):
    with pytest.raises(ValueError, match=r"mode=talk: choose one of answer, chat"):
        Config(mode="talk")
    with pytest.raises(ValueError, match=r"input=in\.jsonl: mode=chat does not read it"):
        chat(Config(mode="chat", input="in.jsonl"))
    with pytest.raises(ValueError, match=r"model\.path is not given"):
        chat(Config(mode="chat"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="mode=chat is for one rank, torchrun has started 2"):
        chat(Config(mode="chat"))

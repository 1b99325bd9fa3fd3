"""A chat on the terminal that shows every step of the canvas."""

import re
import readline  # noqa: F401 — gives `input` line editing and a history
import sys
from collections.abc import Callable
from dataclasses import asdict, replace

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase
from yaml import YAMLError

from data import prompt_ids
from data.chat import Message
from data.errors import nearest
from data.terminal import printable
from diffllm import DiffLLM
from diffllm.generate import check_context, special_tokens
from launch.drawing import respond
from launch.settings import refuse_one_answer
from sampling import SamplingConfig
from trainer.build import load_for_sampling
from trainer.config import Config
from trainer.distributed import check_alone
from trainer.schema import resolve

HELP = """\
/set NAME VALUE   change a setting of the sampler, such as /set steps 128
/settings         show them all
/system TEXT      give a system message; without TEXT, none
/reset            forget the conversation; the system message and the settings stay
/help             show this
/quit, /exit      leave, as Ctrl-D does; Ctrl-C stops a response"""
LEAVE = ("/quit", "/exit")
COMMANDS = ["/set", "/settings", "/system", "/reset", "/help", *LEAVE]


def chat(config: Config) -> None:
    """Chat with the checkpoint of `model.path` on the terminal, or answer the lines of a pipe.

    Raises:
        ValueError: see `refuse_one_answer`; several ranks, or no checkpoint.
    """
    refuse_one_answer("mode=chat", config)
    check_alone("mode=chat", "python sample.py")
    model, tokenizer = load_for_sampling(config)
    model.check_sampling(config.sampling)
    typed = sys.stdin.isatty()
    conversation = Conversation(model, tokenizer, config.sampling, Console(), (lambda: input("> ")) if typed else input)
    if typed:
        conversation.show("Say something, or /help.")
    conversation.run()
    if typed:
        print()  # Ctrl-D leaves the cursor behind the prompt


class Conversation:
    """A conversation of several turns.

    Args:
        console: shows it.
        read: returns the next line of the user; EOFError ends the chat.

    Attributes:
        config: settings of the next response.
        system: the system message, "" for none.
        turns: alternating messages of user and assistant.
    """

    def __init__(
        self,
        model: DiffLLM,
        tokenizer: PreTrainedTokenizerBase,
        config: SamplingConfig,
        console: Console,
        read: Callable[[], str],
    ):
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.console, self.read = console, read
        self.system = ""
        self.turns: list[Message] = []

    def run(self) -> None:
        """Read lines until /quit, /exit or the end of the input.

        Raises:
            ValueError: a response cannot be sampled: the compiler fails, and `sampling.compile=true`.
        """
        interrupted = False
        while True:
            try:
                if interrupted:  # printed in the try block, where another Ctrl-C does no harm
                    self.show("\nstopped: a turn without a complete response is not kept. /quit or Ctrl-D leaves")
                interrupted = False
                line = self.read().strip()
                if line in LEAVE:
                    return
                self.take(line)
            except EOFError:
                return
            except KeyboardInterrupt:
                interrupted = True

    def take(self, line: str) -> None:
        """Carry out a command or respond to a message. Print an error of the line."""
        if not line:
            return
        try:
            if line.startswith("/"):
                self.command(line)
                return
            user = Message(role="user", content=line)
            prompt = self.prompt(user)
        except ValueError as error:
            self.show(f"error: {error}", "red")
            return
        self.turn(user, prompt)

    def command(self, line: str) -> None:
        """Carry out a command.

        Raises:
            ValueError: an unknown command, or an error of the command.
        """
        name, _, argument = line.partition(" ")
        match name:
            case "/set":
                self.set(argument.strip())
            case "/settings":
                self.show_settings()
            case "/system":
                self.system = argument.strip()
                self.show("the system message is set" if self.system else "no system message")
            case "/reset":
                self.turns.clear()
                self.show("the conversation is forgotten")
            case "/help":
                self.show(HELP)
            case _:
                raise ValueError(f"{name}: no such command; {nearest(name, COMMANDS)}")

    def prompt(self, user: Message) -> list[int]:
        """Token ids of the conversation with a message of the user.

        Raises:
            ValueError: they do not fit the model's context.
        """
        system = [Message(role="system", content=self.system)] if self.system else []
        prompt = prompt_ids([*system, *self.turns, user], self.tokenizer)
        try:
            check_context(self.model, len(prompt), self.config, "a chat")
        except ValueError as error:
            raise ValueError(f"{error}: not sent. /reset, or /set max_new_tokens to less") from error
        return prompt

    def turn(self, user: Message, prompt: list[int]) -> None:
        """Respond to a message of the user. Keep both if the response is complete. The turn's number keys its draws."""
        response = respond(self.model, self.tokenizer, prompt, self.config, self.console, len(self.turns) // 2)
        self.console.out(printable(response.text), highlight=False)
        self.show(f"{response.tokens} tokens, NFE {response.nfe}, {response.tokens_per_forward:.2f} tokens a forward")
        self.turns += [user, Message(role="assistant", content=response.text)]

    def set(self, argument: str) -> None:
        """Change one field of the settings, written `NAME VALUE` or `sampling.NAME=VALUE`.

        Raises:
            ValueError: no such field, or a value that it refuses.
        """
        parts = re.fullmatch(r"(?:sampling\.)?(\w+)(?:\s*=\s*|\s+)(.+)", argument)
        if parts is None:
            raise ValueError("/set NAME VALUE needs both, such as /set steps 128")
        name, value = parts.groups()
        if name == "compile":
            raise ValueError(f"sampling.compile={value}: is decided when the model is loaded; give it at the start")
        # Lists of texts are left out: `resolve` would replace their escapes again.
        others = {key: value for key, value in asdict(self.config).items() if not isinstance(value, list)}
        try:
            change = OmegaConf.to_container(OmegaConf.from_dotlist([f"{name}={value}"]))
        except (OmegaConfBaseException, YAMLError) as error:
            raise ValueError(f"sampling.{name}={value}: {str(error).splitlines()[0]}") from error
        resolved = resolve(OmegaConf.create({"sampling": others | change}))
        config = replace(self.config, **{name: getattr(resolved.sampling, name)})
        special_tokens(self.model, self.tokenizer, config)
        self.model.check_sampling(config)
        self.config = config
        self.show(f"{name} is {getattr(config, name)}")

    def show_settings(self) -> None:
        table = Table.grid(padding=(0, 2))
        for name, value in asdict(self.config).items():
            table.add_row(name, Text(printable(value)))
        self.console.print(table)

    def show(self, text: str, style: str = "dim") -> None:
        """Print a message of the program in its own style."""
        self.console.print(Text(printable(text)), style=style, soft_wrap=True)

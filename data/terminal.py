"""What meets the user's terminal: text that cannot command it, and commands that end in one line."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# C0 but tab and newline, DEL and C1; bidirectional embeddings, overrides and isolates; surrogates, which have no bytes.
_ESCAPED = [*range(9), *range(11, 32), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
_ESCAPES = {code: f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" for code in [*_ESCAPED, *range(0xD800, 0xE000)]}


def printable(text: object) -> str:
    r"""Text in which characters that would command a terminal, or reorder what it shows, are written as `\x1b`."""
    return str(text).translate(_ESCAPES)


def for_stdout(text: str) -> str:
    """Text as it goes to stdout: printable on a terminal, exact into a file or a pipe."""
    return printable(text) if sys.stdout.isatty() else text


@contextmanager
def ending_in_one_line(stopped: str = "stopped by SIGINT") -> Iterator[None]:
    """Run a command: an error that explains itself ends it with one line and exit code 1, Ctrl-C with 130.

    Args:
        stopped: the line after Ctrl-C.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        sys.exit(printable(f"error: {error}"))
    except KeyboardInterrupt:
        print(stopped, file=sys.stderr, flush=True)
        sys.exit(128 + signal.SIGINT)

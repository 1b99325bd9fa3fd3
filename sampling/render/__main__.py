"""Show a recording of sample.py: `python -m sampling.render run.jsonl out.html`, or out.gif, or out.png.

The page shows the canvas after each step, and needs no server. The animation and the picture need the extra `plot`.
"""

import signal
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

from sampling.recording import read
from sampling.render.page import page
from sampling.render.picture import gif, png

KINDS = {".html": lambda recording: page(recording).encode(), ".gif": gif, ".png": png}


def render(recording: Path, output: Path) -> None:
    """Render a recording into a new file.

    Raises:
        ValueError: an unknown suffix, an output that exists, a package that is missing, or see `read`.
        OSError: the recording cannot be read, or the output not be written.
    """
    kind = KINDS.get(output.suffix.lower())
    if kind is None:
        raise ValueError(f"{str(output)!r}: its suffix must be one of {', '.join(KINDS)}")
    if output.exists():
        raise ValueError(f"{str(output)!r} exists already: delete it, or name another file")
    try:
        content = kind(read(recording))
    except ImportError as error:
        raise ValueError(f"{str(output)!r} needs the package {error.name}: pip install 'diffllm[plot]'") from error
    try:
        with output.open("xb") as file:
            file.write(content)
    except FileExistsError:
        raise
    except OSError:
        output.unlink(missing_ok=True)
        raise


def main(arguments: list[str] | None = None) -> None:
    """Run the command. An error ends it with one line and exit code 1."""
    parser = ArgumentParser(
        "python -m sampling.render", description=__doc__, formatter_class=RawDescriptionHelpFormatter
    )
    parser.add_argument("recording", type=Path, help="the .jsonl file")
    parser.add_argument("output", type=Path, help="a new file; its suffix chooses the kind")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        render(options.recording, options.output)
        print(f"wrote {options.output}")
    except (ValueError, OSError, MemoryError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("stopped by SIGINT", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    main()

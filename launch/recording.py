"""Record a response: decode the events of its steps for `sampling.recording`."""

from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from data.storage import whole_file, writing
from data.terminal import print_stderr
from sampling import Canvas, StepEvent, Tokens
from sampling.recording import Commit, Given, Header, Piece, Recording, Result, Step
from trainer.config import Config

REPLACEMENT = "\ufffd"  # decoded bytes that are no whole character


class Pieces:
    """Texts of the tokens of a canvas."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer, self.known = tokenizer, {}
        # Decoded after another token: SentencePiece drops the blank of a first one.
        self.before = tokenizer(".", add_special_tokens=False)["input_ids"]

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of tokens that follow each other."""
        key = tuple(tokens)
        if key not in self.known:
            whole, start = (
                self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
                for ids in ([*self.before, *key], self.before)
            )
            self.known[key] = whole[len(start) :]
        return self.known[key]

    def texts(self, tokens: Sequence[int], clean: Sequence[bool]) -> list[str]:
        """Text at each position; "" at masked ones.

        A character of several tokens is at the first of them as soon as all are clean.
        """
        texts = [self.decode([token]) if known else "" for token, known in zip(tokens, clean, strict=True)]
        for start in range(len(texts)):
            if REPLACEMENT not in texts[start]:
                continue
            for stop in range(start + 2, min(start + 4, len(texts)) + 1):
                if not all(clean[start:stop]):
                    break
                if REPLACEMENT not in (text := self.decode(tokens[start:stop])):
                    texts[start:stop] = [text, *[""] * (stop - start - 1)]
                    break
        return texts


class Recorder:
    """Records the sampling of a canvas.

    Args:
        config: gives model, sampling, prompt, template and the file.
        canvas: before the first step.
        prompt_length: tokens before the text that is shown.
    """

    def __init__(
        self,
        config: Config,
        tokenizer: PreTrainedTokenizerBase,
        canvas: Canvas,
        special: Tokens,
        prompt_length: int,
    ):
        tokens = np.array(canvas.tokens)
        self.config, self.pieces, self.steps = config, Pieces(tokenizer), []
        self.given = self.clean = tokens != special.mask
        self.texts = self.pieces.texts(tokens.tolist(), self.clean)
        self.header = Header(
            diffllm=version("diffllm"),
            model=str(config.model.path),
            sampling=asdict(config.sampling),
            prompt=config.prompt,
            template=config.template,
            prompt_length=prompt_length,
            length=len(tokens),
            masked=int((~self.clean).sum()),
            ends=list(special.eos),
            given=[Given(i, self.texts[i], int(tokens[i])) for i in np.flatnonzero(self.clean).tolist()],
        )

    def step(self, event: StepEvent) -> Step:
        """Record a step, and return its line."""
        unused = ~self.given
        unused[: event.end] = False
        clean = ~event.masked & ~unused
        texts = self.pieces.texts(event.tokens.tolist(), clean)
        entropies = [None] * len(event.committed) if event.entropies is None else _short(event.entropies)
        commits = zip(event.committed.tolist(), _short(event.probs), entropies, strict=True)
        changed = [i for i in np.flatnonzero(self.clean & clean).tolist() if texts[i] != self.texts[i]]
        self.steps.append(
            Step(
                step=event.step,
                nfe=event.nfe,
                committed=[  # a mask may be drawn, too
                    Commit(i, texts[i], int(event.tokens[i]), prob, entropy) for i, prob, entropy in commits if clean[i]
                ],
                remasked=event.remasked.tolist(),
                unused=np.flatnonzero(unused).tolist(),
                texts=[Piece(i, texts[i]) for i in changed if i not in event.committed],
            )
        )
        self.clean, self.texts = clean, texts
        return self.steps[-1]

    def recording(self, text: str, tokens: int, seconds: float) -> Recording:
        """Return the recording of a finished canvas.

        Args:
            text: that the canvas decodes to.
            tokens: up to and including the one that ends the response.
            seconds: that the sampling took.
        """
        nfe = self.steps[-1].nfe if self.steps else 0
        return Recording(self.header, self.steps, Result(text, nfe, tokens, tokens / max(nfe, 1), seconds))

    def save(self, text: str, tokens: int, seconds: float) -> None:
        """Write the recording to `record`, whole or not at all, and say how it is shown. See `recording`.

        Raises:
            OSError: it cannot be written.
        """
        path = Path(self.config.record)
        with whole_file(path) as file:
            file.writelines(self.recording(text, tokens, seconds).lines())
        print_stderr(f"recorded {len(self.steps)} steps; python -m sampling.render {path} {path.with_suffix('.html')}")


def check_record(path: Path) -> None:
    """Refuse a file that cannot be a new recording, before anything is sampled. Make its directory.

    Raises:
        ValueError: it is no .jsonl file, or exists.
        OSError: the directory cannot be made.
    """
    if path.suffix != ".jsonl":
        raise ValueError(f"record={path}: give record=FILE.jsonl")
    if path.exists():
        raise ValueError(f"record={path} exists already: delete it, or name another file")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)


def _short(values: np.ndarray) -> list[float]:
    """Six digits of each, without which a recording has twice its size."""
    return [float(f"{value:.6g}") for value in values]

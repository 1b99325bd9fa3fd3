"""Events of the reverse process: displays, recordings and rewards read them, never the sampler's own state."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class StepEvent:
    """One step of one row. Its arrays never change later. A step that changes nothing has no event."""

    row_id: int  # of the canvas
    step: int  # number among the row's steps, from 0
    tokens: np.ndarray  # [L] canvas after the step
    masked: np.ndarray  # [L] bool, positions that are still masked
    prompt_length: int  # tokens before the response
    committed: np.ndarray  # [n] positions
    probs: np.ndarray  # [n] probability of each committed token
    entropies: np.ndarray | None  # [n] nats; None if neither `alg` nor `transfer` rates by entropy
    remasked: np.ndarray  # [m] positions masked again
    nfe: int  # forwards of the model so far
    end: int | None = None  # position after the response, if a rule about ends found it: the rest is filled in

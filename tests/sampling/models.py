"""A model made up for tests of the reverse process."""

import torch

from sampling import Tokens, Visibility

V, MASK, PAD, EOS = 12, 11, 10, 9
SPECIAL = Tokens(mask=MASK, eos=(EOS,))


def unpadded(x):
    """Positions and visibility of rows [B, L] without padding."""
    return torch.arange(x.shape[1]).expand_as(x), Visibility()


class MockDenoiser:
    """Logits from a hash of the row's attended tokens and the position counted from the right; counts its calls."""

    device, vocab_size = torch.device("cpu"), V

    def __init__(self):
        self.calls = 0

    def hidden(self, x_t, position_ids, visibility, row, column, cache=None):
        self.calls += 1
        attended = torch.ones_like(x_t) if visibility.attended is None else visibility.attended
        L = x_t.shape[1]
        from_right = torch.arange(L, 0, -1)
        state = ((x_t + 1) * attended * from_right).sum(-1)  # [B]
        seed = state[row][:, None] * 31 + from_right[column][:, None] * 17 + torch.arange(V) * 7
        logits = torch.sin(seed.double()).float() * 4
        logits[..., MASK] = -50.0
        return logits

    def head(self, hidden):
        return hidden.clone()

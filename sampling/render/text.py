"""Texts of models and files as they can be shown."""

import unicodedata

_MARKS = {*"\u061c\u200e\u200f", *map(chr, range(0x202A, 0x202F)), *map(chr, range(0x2066, 0x206A))}  # of direction


def visible(text: str, keep: str = "\n\t") -> str:
    r"""Escape control characters, marks of direction and surrogates, as `\u001b`.

    Args:
        keep: control characters that stay.
    """

    def shown(character: str) -> str:
        hidden = unicodedata.category(character) in ("Cc", "Cs") or character in _MARKS
        return f"\\u{ord(character):04x}" if hidden and character not in keep else character

    return "".join(map(shown, text))

"""Compare an answer with the expected one strictly.

The expected one decides how: numbers are compared exactly, choices by letter, lists and sets by element, all else as
text. A doubtful answer is wrong: a hedge ("5 or 6"), a number inside a formula ("5x"), another unit.
"""

import re
from fractions import Fraction
from typing import Literal, NamedTuple

LONGEST = 1000  # characters of an answer that may be more than text
SIGNS = str.maketrans(
    {"−": "-", "–": "-", "×": "*", "·": "*", "÷": "/", "⁄": "/", "≈": "=", "²": "^2", "³": "^3", "π": r"\pi "}
    | {"½": " 1/2", "¼": " 1/4", "¾": " 3/4", "∞": r"\infty ", "∪": r"\cup ", "≤": r"\le ", "≥": r"\ge "}
)
REWRITES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r",\\! ?(?=\d{3})", ","),  # 1,\! 000
        (r"\\(?:text(?:bf|it|rm)?|math(?:bf|it|rm)|mbox) ?\{([^{}]*)\}", r" \1 "),
        (r"\\(?:left|right|displaystyle)(?![A-Za-z])|\\!", ""),
        (r"\{,\}(?=\d)", ","),  # 1{,}000
        (r"(?<!\\)\\[,;: ]|~|\\q?quad(?![A-Za-z])", " "),
        (r"\\[dt]frac(?![A-Za-z])", r"\\frac"),
        (r"\\frac ?(\d) ?(\d)", r"\\frac{\1}{\2}"),
        (r"\\(?:times|cdot)(?![A-Za-z])", "*"),
        (r"\\(le|ge)q(?![A-Za-z])", r"\\\1"),
        (r"\\approx(?![A-Za-z])", "="),
        (r"\^ ?(?:\{ ?\\circ ?\}|\\circ(?![A-Za-z]))|°", " degrees"),
        (r" ?(?:\\?%|\bpercent\b)", "%"),
        (r"\\?\$|(?<!\\)\\[()\[\]]|`", ""),  # ends of formulas, the dollar, code
        (r"(?<=[\w)])\*\*(?=[\w(])", "^"),
        # Emphasis, unlike a product, has no digit or bracket beside it.
        (r"(?<![^\s(])(?<![\d)] )(\*\*?)(?=[^\s*])([^*]*[^\s*])\1(?! ?[\d(])(?![\w*])", r"\2"),
        (r"(?<=[^\s*])\*\*(?=[\s.,:;!?]|$)(?! ?[\d(])", ""),
        (r"(?<=[A-Za-z]) \^(?=\d|\{\d\})", "^"),  # \text{ cm}^2
        (r"(?<=\d) and a half\b", " 1/2"),
        (r"(?<![\\A-Za-z])sqrt ?\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"(?<![\\A-Za-z])pi(?![A-Za-z])", r"\\pi "),
        (r"(?<=[_^])\{(\w)\}(?!\w)", r"\1"),
        (r"\s+", " "),
        (r"(?<=[({\[]) | (?=[)}\]])|(?<=\}) (?=\{)", ""),
    )
]

DIGITS = r"(?:(?:[1-9]\d{0,2}(?:,\d{3})+|[1-9]\d{0,2}(?: \d{3})+|\d+)(?:\.\d+)?|\.\d+)"
NUMBER = re.compile(
    r"(?P<minus>(?:- ?|minus |negative )?)\+?[€£¥₹]?"
    rf"(?:(?P<whole>\d+) (?P<top>\d+)/(?P<bottom>\d+)|(?P<number>{DIGITS}(?:e[-+]?\d\d?)?)(?:/(?P<by>\d+))?)"
    r"(?P<after>(?![\d.]|/\d|,(?! [A-Za-z]{3})).*)",
    re.ASCII | re.DOTALL,
)
BEGIN = re.compile(r"(?:^- |-|minus |negative )?[€£¥₹]?(?:\\frac|\.?\d)", re.ASCII)  # of a number
SCALES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
SCALES |= {"lakh": 10**5, "crore": 10**7, "mln": 10**6, "bln": 10**9}
POWERS = {"square": 2, "cubic": 3}
UNIT_WORDS = 2  # of an expected number, as in "18 square feet"; a longer text is no number
ATTACHED = re.compile("mm|cm|km|mg|kg|ml|mL|ft|lbs?|oz|hrs|min|am|pm|mph|st|nd|rd|th|USD")
SHORT = re.compile(rf"{ATTACHED.pattern}|[mgshLlI]|in|yd|mi|hr|an?|as|at|by|he|is|it|of|on|to|we")
# Words that make another number, or none, of the one beside them.
CHANGES = re.compile(
    "above|below|between|cannot|cos|cubed|except|exp|factorial|half|halves|log|minus|negative|never|not|over|plus|root|"
    r"sin|sqrt|squared|tan|than|thirds|twice|under|without|\w+n't|(?:four|fif|six|seven|eigh|nin|ten)ths|"
    rf"(?:{'|'.join(SCALES)})(?:ths)?",
    re.IGNORECASE,
)

EXPECTED_CHOICE = re.compile(r"([A-Z])|([A-Z])[).]|\(([A-Z])\)(?: .+)?", re.DOTALL)
CHOICE = re.compile(
    r"(?:(?:[Oo]ption|[Cc]hoice|[Ll]etter) )?(?:\(([A-Za-z])\)|([A-Z])(?=[).:]|$| \())[).:]*(?: (.+))?", re.DOTALL
)
OTHER_CHOICE = re.compile(r"\([A-Za-z]\)|\b(?:and|or) [A-Z]\b")

# A remark after a number: 18 (9 eggs at 2 each), 64 for 16 glasses. One without a word may be a factor.
ASIDE = re.compile(r"(?<=[\w%]) (?:\([^()]*[A-Za-z]{3}[^()]*\)|for (?:the )?\d+ [A-Za-z ]+)$")
NO_ASIDE = re.compile(rf"\b(?:or|either|{CHANGES.pattern})\b", re.IGNORECASE)
REPEATING = re.compile(r"(\d*)\.(\d*)\\(?:overline|bar) ?\{ ?(\d+) ?\}", re.ASCII)
NAME = re.compile(r" *[A-Za-z](?:_\w)?(?:\([^()]*\))? *")
VARIABLE = re.compile(r"(?<![A-Za-z\\])[A-Za-z](?![A-Za-z])|\\(?:alpha|beta|gamma|lambda|mu|omega|phi|theta)(?![a-z])")
NO_EQUATION = re.compile(r"\b(?:and|or)\b|,(?!\d{3})|[<>!]")  # several, or an inequality
MEMBER = re.compile(r"^[A-Za-z] ?(?:\\in(?![a-z])|∈) ?")  # x ∈ of an interval
JOINED = re.compile(r",? (?:and|or) ")
UNORDERED = ("", "{}")  # brackets of lists whose order does not count
ENVIRONMENT = re.compile(r"\\(?:begin|end) ?\{[a-z]*\}")
WORD = re.compile(
    r"(?<![\\A-Za-z])(?!(?:sin|cos|tan|cot|log|exp)(?![A-Za-z]))[A-Za-z]{3}|\b(?:and|if|is|no|of|or)\b|^[A-Za-z]{2}$"
)
UNIT = re.compile(r"(?<=[\w})])(?: [A-Za-z]{3,}| (?:mm|cm|km|ft|in|mi|yd))+(?:\^\d)?$")


SHORT_UNITS = (
    "feet=foot ft=foot in=inch hr=hour h=hour min=minute sec=second s=second cm=centimeter m=meter km=kilometer"
)
UNIT_NAMES = dict(each.split("=") for each in f"{SHORT_UNITS} g=gram kg=kilogram lb=pound sq=square".split())


class Number(NamedTuple):
    value: Fraction
    unit: str  # without a plural's s, such as foot^2; may be empty
    by: str = ""  # the unit after / or "per"


class Items(NamedTuple):
    brackets: str  # as in "(]"; may be empty
    texts: list[str]


def clean(text: str) -> str:
    """Write signs, spaces, LaTeX and emphasis in one way, without changing what a formula means."""
    text = text.translate(SIGNS)
    for pattern, replacement in REWRITES:
        text = pattern.sub(replacement, text)
    text = text.lstrip(" ,:;").rstrip(" .,:;")
    unmatched = "," not in text and text.count("(") != text.count(")")
    return text.strip("() " if unmatched else " ")


def is_same(answer: str, expected: str) -> bool:
    """Whether an answer is the expected one."""
    if max(len(answer), len(expected)) > LONGEST:
        return answer.strip() == expected.strip()
    answer, expected = clean(answer), clean(expected)
    if answer == expected:
        return bool(answer)
    if "=" in answer and "=" in expected:
        (name, _, value), (expected_name, _, expected_value) = answer.partition("="), expected.partition("=")
        return _joined(name) == _joined(expected_name) and is_same(value, expected_value)
    expected = _value(expected)
    if number := _number(expected, UNIT_WORDS):
        return _are_equal(_stated_number(answer), number)
    if letter := _expected_choice(expected):
        return _choice(answer) == letter
    answer = _value(answer)
    if items := _items(expected):
        return _are_items(_items(JOINED.sub(", ", answer)), items)
    return _joined(answer) == _joined(expected)


def kind_of_answer(expected: str) -> Literal["number", "choice", "expression", "text"]:
    """Return what an expected answer is. An expression has no words, except for a unit at its end."""
    if len(expected) > LONGEST:
        return "text"
    text = _value(clean(expected))
    if _number(text, UNIT_WORDS):
        return "number"
    if _expected_choice(text):
        return "choice"
    return "text" if not text or WORD.search(UNIT.sub("", ENVIRONMENT.sub("", text))) else "expression"


def formulas(answer: str, expected: str) -> tuple[str, str] | None:
    """Return an answer and the expected one as LaTeX for computer algebra, or None if `is_same` knows better.

    It does for words, choices and two numbers; and for differences that algebra would overlook: units, indices as in
    52_8, the brackets of lists, and repeated elements. An inequality has no brackets and may be an interval.
    """
    kinds = kind_of_answer(answer), kind_of_answer(expected)
    if not {*kinds} <= {"number", "expression"} or kinds == ("number", "number"):
        return None
    answer, expected = clean(answer), clean(expected)
    if "=" not in answer or "=" not in expected:
        answer, expected = _value(answer), _value(expected)
    units = {unit[0] for text in (answer, expected) if (unit := UNIT.search(text))}
    lists = [_items(text) or Items("", []) for text in (answer, expected)]
    has_relation = re.search(r"\\[lg]e(?![A-Za-z])|[<>]", answer + expected)
    if len(units) > 1 or re.search(r"\d_", answer + expected) or ("=" in answer and "=" not in expected):
        return None
    if (lists[0].brackets != lists[1].brackets and not has_relation) or any(map(_repeats, lists)):
        return None
    return UNIT.sub("", answer), UNIT.sub("", expected)


def _repeats(items: Items) -> bool:
    """Whether an element occurs twice where order does not count."""
    return items.brackets in UNORDERED and len({*map(str.strip, items.texts)}) < len(items.texts)


def _joined(text: str) -> str:
    """Text without spaces, except between words and numbers."""
    return re.sub(r" (?![0-9A-Za-z])|(?<![0-9A-Za-z]) ", "", text)


def _value(text: str) -> str:
    """Return the right side of an equation with a name, words or numbers on the left, or of x ∈; else the text."""
    *left, right = MEMBER.sub("", text).split("=")
    if NO_EQUATION.search("=".join(left)) or not all(
        NAME.fullmatch(side) or not VARIABLE.search(side) for side in left
    ):
        return text
    if len(left) == 1 and NAME.fullmatch(right) and not VARIABLE.search(left[0]):  # 5 = x
        return left[0].strip()
    return right.strip()


def _number(text: str, unit_words: int | None = None) -> Number | None:
    """Return the number that a text is, with at most so many words of a unit; None stands for any number of words."""
    text = text[1:-1] if re.fullmatch(r"\([^()]*\)", text) else text
    text = REPEATING.sub(_fraction, re.sub(r"(?<=\d)(?=\\frac)", " ", text))
    text = re.sub(r"\\frac ?\{ ?(-?\d+) ?\} ?\{ ?(\d+) ?\}", r"\1/\2", text)
    found = NUMBER.fullmatch(re.sub(r"(?<=\d) ?/ ?(?=\d)", "/", text))
    if not found or not (found["bottom"] or found["by"] or "1").strip("0"):
        return None
    after, scale = found["after"], 1
    if (word := re.match(r" ([a-z]+)", after)) and word[1] in SCALES:
        after, scale = after[word.end() :], SCALES[word[1]]
    unit = _unit(after, unit_words)
    if unit is None:
        return None
    by = re.search(r"(?:/| per )([A-Za-z]+)", after)
    if found["whole"]:
        value = int(found["whole"]) + Fraction(int(found["top"]), int(found["bottom"]))
    else:
        value = Fraction(re.sub("[, ]", "", found["number"])) / int(found["by"] or 1)
    return Number((-value if found["minus"] else value) * scale, unit, _singular(by[1]) if by else "")


def _fraction(repeating: re.Match[str]) -> str:
    r"""Write 0.1\overline{6} as 15/90."""
    whole, digits, period = repeating.groups()
    return f"{int(whole + digits + period) - int(whole + digits or 0)}/{'9' * len(period)}{'0' * len(digits)}"


def _unit(after: str, most: int | None) -> str | None:
    """Return the unit in the text after a number, or None if that text is more than a unit and words."""
    rest = after.removeprefix("%")
    words = rest.split()
    if not words:
        return after
    if most is not None and (len(words) > most or "," in rest):
        return None
    is_apart = rest[0] in " ,-" or ATTACHED.fullmatch(words[0]) or re.match("/[a-z]{3}", rest)
    if not is_apart or not _are_words(rest):
        return None
    if after != rest:
        return "%"
    unit, *following = (_singular(word) for word in words)
    return f"{following[0]}^{POWERS[unit]}" if unit in POWERS and following else unit


def _singular(word: str) -> str:
    """A unit without what follows / in it, and without a plural's s."""
    word, power, exponent = word.partition("/")[0].strip("(),").lower().partition("^")
    word = re.sub("(?<=ss|sh|ch|.x)es$|(?<=[a-rt-z])s$", "", word)
    return UNIT_NAMES.get(word, word) + power + exponent


def _are_words(text: str) -> bool:
    """Whether a text has only words and units, without those of CHANGES."""
    text = re.sub(r"(?<=[A-Za-z])\^-?\d\b", "", text)
    words = filter(None, (word.strip("()'\"") for word in re.split(r"[\s,:;/-]+", text)))
    return all(re.fullmatch(r"[A-Za-z']{3,}|" + SHORT.pattern, word) and not CHANGES.fullmatch(word) for word in words)


def _stated_number(answer: str) -> Number | None:
    """Return the only number in an answer, which may begin with a choice, a name or words."""
    choice = CHOICE.fullmatch(answer)
    answer = choice[3] if choice and choice[3] else answer
    if (aside := ASIDE.search(answer)) and not NO_ASIDE.search(aside[0]):
        answer = answer[: aside.start()]
    answer = _value(answer)
    begin = BEGIN.search(answer)
    before = answer[: begin.start()] if begin else ""
    if not re.search(r"[-/] *$", before) and _are_words(re.sub(r"\b[A-Za-z] (?=is |equals )", "", before)):
        return _number(answer) or _number(answer[len(before) :])
    return _number(answer)


def _are_equal(number: Number | None, expected: Number) -> bool:
    """Whether two numbers are equal. One of them may lack the unit; 18% is 18, and 0.18 too."""
    if number is None:
        return False
    units = {number.unit, expected.unit} - {""}
    if number.value != expected.value and units == {"%"}:
        return number.value / 100 ** (number.unit == "%") == expected.value / 100 ** (expected.unit == "%")
    return number.value == expected.value and (
        "" in (number.unit, expected.unit) or (number.unit, number.by) == (expected.unit, expected.by)
    )


def _expected_choice(text: str) -> str | None:
    found = EXPECTED_CHOICE.fullmatch(text)
    return found and (found[1] or found[2] or found[3])


def _choice(answer: str) -> str | None:
    """Return the letter of an answer that is one choice, alone or with its text."""
    found = CHOICE.fullmatch(answer)
    if not found or OTHER_CHOICE.search(found[3] or ""):
        return None
    return (found[1] or found[2]).upper()


def _items(text: str) -> Items | None:
    """Return a list with a comma outside inner brackets, or None."""
    text = re.sub(r"\\([{}])", r"\1", text)
    outer = text[:1] + text[-1:]
    if len(text) > 1 and outer[0] in "([{" and outer[1] in ")]}" and (texts := _split(text[1:-1])):
        return Items(outer, texts)
    return Items("", texts) if (texts := _split(text)) else None


def _split(text: str) -> list[str] | None:
    """Split a text at its commas outside brackets; None without such a comma or if brackets do not match."""
    texts, depth = [""], 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if depth < 0:
            return None
        if character == "," and not depth:
            texts.append("")
        else:
            texts[-1] += character
    return texts if len(texts) > 1 and not depth and all(map(str.strip, texts)) else None


def _are_items(answer: Items | None, expected: Items) -> bool:
    """Whether two lists have the same brackets and elements, in any order in sets and without brackets."""
    if answer is None or answer.brackets != expected.brackets or len(answer.texts) != len(expected.texts):
        return False
    if expected.brackets not in UNORDERED:
        return all(map(is_same, answer.texts, expected.texts))
    left = answer.texts
    for text in expected.texts:
        found = next((i for i, each in enumerate(left) if is_same(each, text)), None)
        if found is None:
            return False
        left = left[:found] + left[found + 1 :]
    return True

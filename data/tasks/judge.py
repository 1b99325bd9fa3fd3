r"""Find the final answer of a response, as people read it, and judge it.

The final answer is the last `\boxed{}`, else the words after the last "answer is", "answer:" or "####", else the last
number or choice. The thinking is no part of it.
"""

import re
from collections.abc import Callable

from data.chat import THINK, final_answer
from data.tasks.normal import CHANGES, LONGEST, SCALES, clean, is_same, kind_of_answer

BOX = re.compile(r"\\(?:boxed|fbox)\s*(?:\{|(?=\d))")
BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
MARK = re.compile(r"(?:\banswer[*_ ]*(?:is\b(?!\s+not\b)|:)|答案[是为：:]+)[*_:\s]*", re.IGNORECASE)
HASHES = re.compile(r"####[ \t]*([^\n]+)")
FENCE = re.compile(r"\\[\[\]()]|\$\$|```\w*")  # around formulas and code
CLAUSE_END = re.compile(
    r"(?<!\\)[.!?;](?=\s|$)|。|,\s+(?:as|not|so|when|where)\s|,?\s+(?:because|but|since|which)\s", re.IGNORECASE
)
CHOICE = re.compile(r"\([A-Z]\)|(?<![^\s*$])[A-Z](?=[.)\s*$]*$)")  # anywhere, or at the end
CHOICE_LINE = re.compile(r"(?:\([A-Z]\)|[A-Z][).])\s+\S")
OPERATOR = re.compile(r"[-+*/=^<>]+")
ELEMENT = re.compile(r"[-+(\[{]*[.,/]*\d[\d.,/]*|.*\d.*,", re.ASCII)  # before another one of a list
AFFIX = re.compile(rf".*[-+*/=^<>]|{CHANGES.pattern}", re.IGNORECASE)  # changes the number after it
NEGATED = re.compile(r"(?:cannot|not|never|\w+n't) (?:be|equal)", re.IGNORECASE)
JOINED = re.compile(r".*\d.* (?:and|or)", re.ASCII)
DIGIT = re.compile("[0-9]")
MORE = re.compile(r"[-+*/=^<>\\]|[B-HJ-Zb-z]$|" + "|".join(SCALES))  # continues a formula


def is_right(response: str, expected: str, same: Callable[[str, str], bool] = is_same) -> bool:
    """Whether a response has the expected answer: as its final answer or, if that is no number, as all of its text.

    Args:
        same: compares an answer with the expected one.
    """
    answers = [extract(response)]
    if kind_of_answer(expected) in ("expression", "text"):
        answers.append(plain(response))
    return any(answer is not None and same(answer, expected) for answer in answers)


def extract(response: str) -> str | None:
    r"""Return the final answer of a response, or None.

    None if its thinking or its last `\boxed{}` does not end, or if it has neither a number nor another form of answer.
    """
    text = final_answer(response)
    if THINK in text:
        return None
    answer = _boxed_or_marked(text)
    return _last(text) if answer is None else answer or None


def plain(response: str) -> str | None:
    r"""Return all of the text after the thinking, or None if that has a `\boxed{}`, is empty or does not begin."""
    text = final_answer(response)
    return None if THINK in text or _boxed(text) is not None else text or None


def stated(reference: str) -> str | None:
    r"""Return the answer that a reference states, or None for free text.

    It is the last `\boxed{}`, the words after the last "answer is", "answer:" or "####", or all of a reference that is
    one number, choice or expression.
    """
    text = final_answer(reference)
    answer = _boxed_or_marked(text)
    if answer is None and "\n" not in text and kind_of_answer(text) != "text":
        return text
    return answer or None


def _boxed_or_marked(text: str) -> str | None:
    answer = _boxed(text)
    return _marked(text) if answer is None else answer


def _boxed(text: str) -> str | None:
    r"""Return the content of the last `\boxed{}` that is not empty; an empty text if it does not end."""
    for box in reversed([*BOX.finditer(text)]):
        if not box[0].endswith("{"):  # \boxed 5
            return re.compile(r"[\d.,]*\d").match(text, box.end())[0]
        depth = 1
        for brace in BRACE.finditer(text, box.end()):
            depth += {"{": 1, "}": -1}.get(brace[0], 0)
            if not depth:
                break
        else:
            return ""
        if content := text[box.end() : brace.start()].strip():
            return content
    return None


def _marked(text: str) -> str | None:
    """Return the clause after the last mark of an answer."""
    places = [mark.end() for mark in MARK.finditer(text)]
    *_, line = [None, *HASHES.finditer(text)]
    # Other lines with #### are headings.
    if line and (not text[line.end() :].strip() or kind_of_answer(line[1]) != "text"):
        places.append(line.start(1))
    for place in sorted(places, reverse=True):
        rest = FENCE.sub(" ", text[place : place + LONGEST]).strip()
        if clause := CLAUSE_END.split(rest.partition("\n")[0], maxsplit=1)[0].strip(" *`"):
            return clause
    return None


def _last(text: str) -> str | None:
    """Return the last number or choice, with the list or formula around it."""
    last_line = text.rpartition("\n")[2].strip(" *")
    if CHOICE_LINE.match(last_line):
        return last_line
    digit = max(map(text.rfind, "0123456789½¼¾"))
    *_, choice = [None, *CHOICE.finditer(text)]
    if choice and choice.start() > digit:
        return choice[0]
    if digit < 0:
        return None
    begin, end = text.rfind("\n", 0, digit) + 1, text.find("\n", digit)
    line = text[max(begin, digit - LONGEST) : min(end if end >= 0 else len(text), digit + LONGEST)]
    return _around_number(clean(line).split())


def _around_number(tokens: list[str]) -> str:
    """Return the last token with a digit, and the tokens beside it that belong to its list or formula."""
    first = last = max(i for i, token in enumerate(tokens) if DIGIT.search(token))
    while first:
        token, before, pair = tokens[first], tokens[first - 1], " ".join(tokens[max(first - 2, 0) : first])
        is_list = "=" not in tokens[first : last + 1]
        if OPERATOR.fullmatch(before) or NEGATED.fullmatch(pair) or (is_list and JOINED.fullmatch(pair)):
            first = max(first - 2, 0)
        elif (is_list and ELEMENT.fullmatch(before)) or AFFIX.fullmatch(before) or OPERATOR.match(token.lstrip("-")):
            first -= 1
        else:
            break
    while last + 1 < len(tokens) and not tokens[last].endswith((".", ",", ":", ";", "!", "?")):
        if not MORE.match(tokens[last + 1]) and not OPERATOR.fullmatch(tokens[last]):
            break
        last += 1
    return " ".join(tokens[first : last + 1]).rstrip(".,:;!?")

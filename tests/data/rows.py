"""Rows for tests."""

import json

from data import DataConfig, PlacedRow, rows_of

MESSAGES = (
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "3+3?"},
    {"role": "assistant", "content": "6"},
)


def row(question="Hi", thinking="a", answer="b", **fields):
    return {"question": question, "answer": f"<think>{thinking}</think>{answer}", **fields}


def write(path, *rows):
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    return str(path)


def prepared(tokenizer, rows, **settings):
    placed = [PlacedRow(each, f"rows:{number}") for number, each in enumerate(rows, start=1)]
    return rows_of({"rows": placed}, DataConfig(**settings), tokenizer)


def questions(tokens, tokenizer):
    return [
        tokenizer.decode(tokens.ids(i)[: tokens.prompt_lengths[i]]).split("user\n")[1].split("<|im_end|>")[0]
        for i in range(len(tokens))
    ]

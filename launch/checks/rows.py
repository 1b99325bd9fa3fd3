"""Checks of the tokenizer and the rows."""

from collections.abc import Iterator
from contextlib import suppress

from data import Batch, PlacedRow, Prepared, prompt_ids
from data.chat import Chat, Columns, Message, to_chat
from data.errors import BadRows
from data.files import iterate
from data.packing import single_rows
from data.report import MANY, Report
from data.tasks import tasks_of
from data.template import texts_of
from diffllm.tokenizer import check_tokenizer
from launch.checks.base import NOT_SAMPLED, Result, Run, fail, ok, skip, warn
from trainer.config import check_rows
from trainer.distributed import Distributed
from trainer.preview import token_table
from trainer.validation import ValSamples


def tokenizer(run: Run) -> Iterator[Result]:
    """The mask is a token of its own, all tokens have embeddings, and the chat template writes a chat."""
    tokenizer, mask = run.tokenizer, run.tokenizer.mask_token_id
    check_tokenizer(tokenizer, mask, run.shape.vocab_size)
    read = tokenizer(tokenizer.mask_token, add_special_tokens=False)["input_ids"]
    prompt_ids([Message(role="user", content="Hi")], tokenizer)
    other = "name an unused special token, or a new one, by model.mask_token"
    if mask == tokenizer.unk_token_id:
        yield fail(f"the mask {tokenizer.mask_token} is the unknown token too: texts hold it", other)
    elif read != [mask]:
        yield fail(f"the mask {tokenizer.mask_token} is token {mask}, but its text is read as {read}", other)
    else:
        yield ok(
            f"{len(tokenizer):,} tokens, {run.shape.vocab_size:,} embeddings; mask {tokenizer.mask_token} ({mask}), "
            f"end {tokenizer.eos_token} ({tokenizer.eos_token_id})"
        )


def rows(run: Run) -> Iterator[Result]:
    """The rows are read and converted; how many are dropped, cut, or too long."""
    for _, report in run.prepared.values():
        yield ok(_counts(report))
        yield from _losses(report)
    if "training" not in run.prepared:
        yield ok("training: data.streaming=true, rows are read while training; `batch` reads the first ones")
    elif len(run.prepared["training"].rows) < run.layout.global_batch_size:
        text = f"fewer training rows than data.train_batch_size={run.layout.global_batch_size}"
        yield fail(text, "lower it, or give more rows")


def _counts(report: Report) -> str:
    dropped = [f"{noted.count:,} {reason}" for reason, noted in report.dropped.items() if noted.count]
    lengths = ", ".join(f"{found['p95']:,} {part}" for part, found in report.tokens().items())
    text = f"{report.name}: {report.kept:,} of {report.read:,} rows; 95 % have at most {lengths} tokens"
    return "; ".join([text, *dropped])


def _losses(report: Report) -> Iterator[Result]:
    """Warnings on rows that are lost."""
    if warning := report.warning():
        yield warn(warning.removeprefix("WARNING: "), "raise data.max_length if memory allows")
    if (bad := report.dropped.get("cannot be used")) and bad.count:
        yield warn(f"{bad.count:,} rows cannot be used, such as {bad.examples[0]}", "correct them")
    if report.answerless > MANY * report.kept:
        text = f"{report.answerless:,} responses are cut before their answer: the model learns not to answer"
        yield warn(text, "raise data.max_length, or set data.truncation=drop")


def texts(run: Run) -> Iterator[Result]:
    """The texts of a row survive the tokenizer; how many rows have control tokens in their texts."""
    for text in texts_of(_first_chat(run)):
        back = run.tokenizer.decode(run.tokenizer(text, add_special_tokens=False)["input_ids"])
        if back.strip() != text.strip():
            pairs = enumerate(zip(text, back, strict=False))
            at = next((place for place, (a, b) in pairs if a != b), min(len(text), len(back)))
            around = slice(max(0, at - 20), at + 20)
            changed = f"{text[around]!r} comes back as {back[around]!r}"
            yield warn(f"the tokenizer changes a text: {changed}", "use the tokenizer that the checkpoint came with")
            break
    else:
        yield ok("the texts of the first row come back from the tokenizer unchanged")
    for _, report in run.prepared.values():
        if noted := report.control_tokens.count:
            example = report.control_tokens.examples[0]
            text = f"{noted:,} {report.name} rows have control tokens in their texts, read as text: {example}"
            yield warn(text, "take them out of the rows if they were to end a turn: the chat template writes its own")


def _first_chat(run: Run) -> Chat:
    """The first row that can be used."""
    columns = Columns(run.config.data.columns)
    for placed in _training_rows(run):
        with suppress(ValueError):
            named = columns(placed)
            return to_chat(named, used=named.row)
    raise ValueError("no row can be used")


def _training_rows(run: Run) -> Iterator[PlacedRow]:
    data = run.config.data
    for name in data.train_files:
        yield from iterate(name, BadRows(), data.streaming)
    if not data.train_files:
        for task in tasks_of(data, run.config.task):
            yield from task.rows("train")


def validation(run: Run) -> Iterator[Result]:
    """There are validation rows, and none of their prompts is trained on."""
    held_out, trained = run.prepared.get("validation"), run.prepared.get("training")
    check_rows(run.config, run.steps or 0, held_out is not None)
    ValSamples(run.shape, run.tokenizer, held_out, run.config, Distributed(0, run.ranks, run.device))
    if held_out is None:
        advice = "data.val_split=0.02 holds out training rows, data.val_files=FILE names others"
        yield warn("no validation rows: overfitting will not show", advice)
    elif trained is None:
        yield skip("data.streaming=true: the rows that are trained on are not known yet")
    else:
        known, prompts = {*_prompts(trained)}, list(_prompts(held_out))
        if both := sum(prompt in known for prompt in prompts):
            text = f"{both:,} of {len(prompts):,} validation prompts are trained on: val/elbo will be too low"
            yield warn(text, "hold out rows by data.val_split, or name data.val_files in data.decontaminate_files too")
        else:
            yield ok(f"{len(prompts):,} rows, none of their prompts is trained on")


def _prompts(prepared: Prepared) -> Iterator[bytes]:
    rows = prepared.rows
    return (rows.ids(row)[:length].tobytes() for row, length in enumerate(rows.prompt_lengths))


def batch(run: Run) -> Iterator[Result]:
    """A row of the first step, token by token: its role, whether it is trained on, whether it is masked."""
    row = row_of(run)
    details = token_table(row, run.tokenizer, run.tokens)
    if not any(batch["masked"].any() for batch in run.micro_batches):
        yield fail("the first rows have no masked token", "give longer responses", details=details)
    elif any((batch["masked"] & ~batch["maskable"]).any() for batch in run.micro_batches):
        text = f"diffusion.objective={run.config.diffusion.objective} masks tokens that are not trained on"
        yield fail(text, "correct its `corrupt`", details=details)
    else:
        masked, trained = int((row["x_t"] != row["input_ids"]).sum()), int(row["maskable"].sum())
        yield ok(f"{masked} of {trained} trained tokens are masked in this draw", details=details)


def row_of(run: Run) -> Batch:
    """The middle one of few rows: the first have few masks, the last many."""
    singles = [row for batch in run.micro_batches for row in single_rows(batch)]
    return singles[len(singles) // 2]


def canvas(run: Run) -> Iterator[Result]:
    """The canvas that responses are sampled on is as long as the responses of the rows."""
    if run.config.diffusion.causal:
        yield NOT_SAMPLED
        return
    report = next((run.prepared[name].report for name in ("validation", "training") if name in run.prepared), None)
    if report is None:
        yield skip("data.streaming=true: the rows are not read yet")
        return
    lengths, size = report.lengths["response"], run.config.sampling.max_new_tokens
    longer = sum(count for length, count in lengths.items() if length > size) / report.kept
    text = f"sampling.max_new_tokens={size}"
    if longer > MANY:
        advice = f"sampling.max_new_tokens={report.tokens()['response']['p95']} holds 95 %"
        yield warn(f"{text}: {longer:.0%} of the responses are longer", advice)
    elif size > run.config.data.max_length:
        advice = f"sampling.max_new_tokens={run.config.data.max_length} or less"
        yield warn(f"{text}: longer than any row that is trained on", advice)
    else:
        yield ok(f"{text}, responses have up to {max(lengths)} tokens")

"""`diffusion_generate` with streamers, logits processors and stopping criteria of Transformers."""

import pytest
import torch
from transformers import (
    EosTokenCriteria,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteriaList,
    SuppressTokensLogitsProcessor,
    TextDiffusionStreamer,
)
from transformers.generation.streamers import BaseStreamer

PROMPT = torch.tensor([[70, 71, 72]])
SETTINGS = {"max_new_tokens": 8, "steps": 8, "alg": "entropy", "transfer": "even"}


class Recorder(BaseStreamer):
    def __init__(self):
        self.seen = []

    def put(self, value):
        self.seen.append(("put", value.squeeze().tolist()))

    def put_draft(self, value):
        self.seen.append(("draft", value))

    def end(self):
        self.seen.append(("end", None))


def test_a_streamer_gets_the_prompt_every_draft_and_the_response(small_model):
    streamer = Recorder()
    sequences = small_model.diffusion_generate(PROMPT, streamer=streamer, **SETTINGS)
    kinds = [kind for kind, _ in streamer.seen]
    assert kinds == ["put", *["draft"] * 8, "put", "end"]
    assert streamer.seen[0][1] == PROMPT[0].tolist()
    masks = [int((draft == small_model.mask_token_id).sum()) for kind, draft in streamer.seen if kind == "draft"]
    assert masks == [7, 6, 5, 4, 3, 2, 1, 0]
    assert streamer.seen[-2][1] == sequences[0, 3:].tolist()


def test_the_streamer_of_transformers_shows_drafts_and_leaves_the_response(small_model, tokenizer, capsys):
    streamer = TextDiffusionStreamer(tokenizer, skip_prompt=True)
    sequences = small_model.diffusion_generate(PROMPT, streamer=streamer, **SETTINGS)
    shown = capsys.readouterr().out
    assert shown.count("\033[33m") == 8
    assert shown.rstrip("\n").endswith(tokenizer.decode(sequences[0, 3:]))


def test_a_streamer_shows_one_row(small_model):
    with pytest.raises(ValueError, match="streamer: shows one row, input_ids has 2"):
        small_model.diffusion_generate(PROMPT.repeat(2, 1), streamer=Recorder(), **SETTINGS)


def test_logits_processors(small_model):
    free = small_model.diffusion_generate(PROMPT, **SETTINGS)[0, 3:]
    suppressed = LogitsProcessorList([SuppressTokensLogitsProcessor(free.unique().tolist())])
    other = small_model.diffusion_generate(PROMPT, logits_processor=suppressed, **SETTINGS)[0, 3:]
    assert not torch.isin(other, free).any()


@pytest.mark.parametrize("criterion", ["length", "token"])
def test_stopping_criteria_see_the_clean_tokens_one_by_one(small_model, criterion):
    whole = small_model.diffusion_generate(PROMPT, **SETTINGS)[0].tolist()
    end = 7 if criterion == "length" else next(i for i in range(3, 11) if whole[i] == whole[6]) + 1
    criteria = {"length": MaxLengthCriteria(max_length=7), "token": EosTokenCriteria(whole[6])}[criterion]
    output = small_model.diffusion_generate(
        PROMPT, stopping_criteria=StoppingCriteriaList([criteria]), return_dict_in_generate=True, **SETTINGS
    )
    assert output.sequences[0].tolist() == whole[:end] + [small_model.eos_token_id] * (11 - end)
    assert output.nfe[0] <= 8


def test_empty_lists_are_none(small_model):
    plain = small_model.diffusion_generate(PROMPT, **SETTINGS)
    empty = {"logits_processor": LogitsProcessorList(), "stopping_criteria": StoppingCriteriaList()}
    assert torch.equal(small_model.diffusion_generate(PROMPT, **empty, **SETTINGS), plain)


def test_a_prompt_longer_than_the_context(small_model):
    with pytest.raises(ValueError, match="a prompt of 3 tokens and max_new_tokens=2046 do not fit the model's context"):
        small_model.diffusion_generate(PROMPT, **SETTINGS | {"max_new_tokens": 2046})


@pytest.mark.parametrize("field", ["stop", "forbidden"])
def test_texts_need_a_tokenizer(small_model, field):
    with pytest.raises(ValueError, match="give stopping_criteria and logits_processor"):
        small_model.diffusion_generate(PROMPT, **SETTINGS, **{field: ["a"]})


def test_masks_in_a_prompt_that_begins_with_one_are_filled_like_alone(small_model):
    """The first token has no left neighbour to be predicted from, whatever padding stands there."""
    mask = small_model.mask_token_id
    alone = small_model.diffusion_generate(torch.tensor([[mask, 70]]), **SETTINGS)
    padded = torch.tensor([[60, 61, 62, 63], [5, 5, mask, 70]])
    attention_mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    together = small_model.diffusion_generate(padded, attention_mask, **SETTINGS)
    assert together[1, 2:].tolist() == alone[0].tolist()
    assert together[1, :2].tolist() == [5, 5]

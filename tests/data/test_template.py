"""Templates write all of a chat, and the same on every day."""

import copy

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from data import prompt_ids, turn_end
from diffllm.tokenizer import CHAT_TEMPLATES, builtin_tokenizer
from tests.data.rows import MESSAGES, prepared, row


class TestSeveralTurns:
    # as in some checkpoints: the template begins the next answer even without add_generation_prompt
    UNASKED = CHAT_TEMPLATES["llama3"].replace("{% if add_generation_prompt %}", "{{ '").replace("{% endif %}", "' }}")

    @pytest.fixture(params=["chatml", "llama3", "llada", "unasked"])
    def templated(self, request):
        tokenizer = builtin_tokenizer()
        marks = ["<|startoftext|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
        tokenizer.add_special_tokens({"extra_special_tokens": [*marks, "<|im_start|>", "<|im_end|>"]})
        tokenizer.chat_template = CHAT_TEMPLATES.get(request.param, self.UNASKED)
        return tokenizer

    def trained(self, tokenizer, loss_on):
        tokens, _ = prepared(tokenizer, [{"messages": list(MESSAGES)}], loss_on=loss_on)
        ids = tokens.ids(0).tolist()
        learnt = [i >= tokens.prompt_lengths[0] for i in range(len(ids))]
        for start, end in tokens.context(0):
            learnt[start:end] = [False] * (end - start)
        return ids, learnt

    def test_all_answers(self, templated):
        ids, learnt = self.trained(templated, "all")
        whole = templated.apply_chat_template(list(MESSAGES[:-1]), add_generation_prompt=True, tokenize=False)
        assert ids == [*templated(whole + "6")["input_ids"], templated.eos_token_id]
        end = "<|im_end|>" if "<|im_start|>" in whole else "<|eot_id|>"
        assert templated.convert_ids_to_tokens([i for i, yes in zip(ids, learnt, strict=True) if yes]) == [
            "4",
            end,
            "6",
            "<|endoftext|>",
        ]
        assert turn_end(templated) == templated.convert_tokens_to_ids(end)

    def test_the_last_answer(self, templated):
        ids, learnt = self.trained(templated, "last")
        assert ids == self.trained(templated, "all")[0]
        assert learnt == [False] * (len(ids) - 2) + [True] * 2

    def test_a_template_that_rewrites_earlier_answers(self, tokenizer):
        hiding = builtin_tokenizer()
        hiding.chat_template = (
            "{% for m in messages %}{{ m['role'] }}:{% if m['role'] != 'assistant' or loop.last %}{{ m['content'] }}"
            "{% endif %}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
        )
        with pytest.raises(ValueError, match=r"rows:1: the chat template rewrites message 3.*data\.loss_on=last"):
            self.trained(hiding, "all")
        assert any(self.trained(hiding, "last")[1])

    @pytest.mark.parametrize(
        ("template", "message"),
        [
            ("{{ messages[0]['content'] }}>", "leaves out or rewrites message 2"),
            ("{{ messages[1]['content'] + 1 }}", "refuses messages of system, user"),
            ("{{ messages | map(attribute='content') | join }}<think>\n", "writes <think> before the answer"),
        ],
    )
    def test_a_template_that_loses_or_doubles_text(self, template, message):
        tokenizer = builtin_tokenizer()
        tokenizer.chat_template = template
        rows = [{"messages": [*MESSAGES[:2], {"role": "assistant", "content": "<think>a</think>b"}]}]
        with pytest.raises(ValueError, match=f"rows:1: .*the chat template {message}|rows:1: the chat .*{message}"):
            prepared(tokenizer, rows)

    @pytest.mark.parametrize(
        "template",
        [
            None,
            "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}",
            "{{ messages[0]['content'] }}<|im_end|>",
            "{{ raise_exception('too many') if messages[1:] else messages[0]['content'] }}",
        ],
    )
    def test_a_template_that_ends_no_answer_with_a_token(self, template):
        tokenizer = builtin_tokenizer()
        tokenizer.chat_template = template
        assert turn_end(tokenizer) is None

    def test_a_template_that_writes_the_date(self):
        dated = builtin_tokenizer()
        dated.chat_template = "{{ strftime_now('%d %b %Y, %H:%M') }} {{ messages[0]['content'] }}:"
        tokens, _ = prepared(dated, [row()])
        assert dated.decode(tokens.ids(0)).startswith("01 Jan 2026, 00:00 Hi:")

    def test_no_template(self):
        tokenizer = builtin_tokenizer()
        tokenizer.chat_template = None
        with pytest.raises(ValueError, match=r"^tokenizer .* has no chat template: name one by model\.chat_template$"):
            prepared(tokenizer, [row()] * 3)

    def test_a_tokenizer_that_begins_each_text_with_a_space(self):
        metaspace = Tokenizer(models.BPE({"▁": 0, "a": 1, "b": 2, ":": 3, "<eos>": 4}, merges=[]))
        metaspace.pre_tokenizer, metaspace.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=metaspace, eos_token="<eos>", chat_template="{{ messages[0]['content'] }}:"
        )
        assert len(prepared(tokenizer, [{"prompt": "a", "response": "b"}])[0]) == 1
        with pytest.raises(ValueError, match=r"data\.loss_on=all:"):
            prepared(tokenizer, [{"prompt": "a", "response": "b"}], loss_on="all")

    @pytest.mark.parametrize(
        ("roles", "message"),
        [
            (["user", "user", "assistant"], "message 2 of 'messages' has role 'user', expected 'assistant'"),
            (["assistant"], "message 1 .* expected 'user'"),
            (["user", "system", "assistant"], "message 2 .* has role 'system'"),
            (["user", "assistant", "user"], "the last of 'messages' must be the assistant's, it is the user's"),
            ([], "must be a non-empty list"),
        ],
        ids=str,
    )
    def test_roles_out_of_order(self, tokenizer, roles, message):
        with pytest.raises(ValueError, match=f"rows:1: .*{message}"):
            prepared(tokenizer, [{"messages": [{"role": role, "content": "x"} for role in roles]}])


def test_a_template_that_refuses_a_role(tokenizer):
    refusing = copy.deepcopy(tokenizer)
    refusing.chat_template = "{{ raise_exception('system role not supported') }}"
    with pytest.raises(ValueError, match="the prompt: the chat template refuses messages of system: system role not"):
        prompt_ids([{"role": "system", "content": "Be brief."}], refusing)

"""How `generate` and `route` read prompts, and which tokens they make of them."""

from __future__ import annotations

import io
import json
import re

import pytest
from datasets import Dataset

from dylora_moe.base.tiny import byte_tokenizer
from dylora_moe.cli import prompts
from dylora_moe.data.documents import read_documents
from dylora_moe.errors import UsageError

from ..support.data import chat_tokenizer


def given(text: str) -> list[prompts.Prompt]:
    return prompts.read_prompts(io.StringIO(text))


def test_standard_input_is_a_text_or_json_lines():
    assert [prompt.text for prompt in given("def f(x):\n\treturn {x}\n")] == ["def f(x):\n\treturn {x}"]
    assert [prompt.text for prompt in given('{"a": 1}\n')] == ['{"a": 1}']  # no prompt in it: a text
    lines = '{"text": "a"}\n\n{"prompt": "b"}\n{"messages": [{"from": "human", "value": "c"}]}\n'
    assert [(p.text, p.kind) for p in given(lines)] == [("a", "text"), ("b", "prompt"), ("c", "messages")]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "standard input: expected a text, found nothing"),
        (
            '\n{"text": "a"}\n{"txt": "b"}',
            "standard input, line 3: expected a JSON object with text, prompt or messages",
        ),
        ('{"prompt": "a"}\nb', "standard input, line 2: expected a JSON object"),
        ('{"prompt": " "}', "standard input, line 1: expected a text, found nothing"),
        ('{"text": 1.5}', "standard input, line 1: the column text must hold text, found float"),
        ('{"messages": []}', "standard input, line 1: expected messages, found none"),
        ('{"messages": [{"role": "x", "content": "y"}]}', "message 1: the role must be one of"),
    ],
)
def test_bad_standard_input(text, problem):
    with pytest.raises(UsageError, match=re.escape(problem)):
        given(text)


@pytest.mark.parametrize("tokenizer", [chat_tokenizer(), byte_tokenizer()], ids=["template", "none"])
def test_a_prompt_has_the_tokens_that_training_has_before_the_answer(tokenizer):
    turns = ["Hello?", "Hi.", "Who are you?", "A mixture."]
    messages = [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
    (document,) = read_documents(Dataset.from_list([{"messages": messages}]), tokenizer, "here").items
    for asked in (messages[:1], messages[:3]):
        ids = prompts.encode(given(json.dumps({"messages": asked}))[0], tokenizer, raw=False)
        assert document.ids[: len(ids)].tolist() == ids
        answer = tokenizer(messages[len(asked)]["content"], add_special_tokens=False)["input_ids"]
        assert document.ids[len(ids) :][: len(answer)].tolist() == answer


def test_raw_and_text_are_taken_as_they_are():
    tokenizer = chat_tokenizer()
    for prompt, raw, end in (
        ("Hi", True, "Hi"),
        ('{"text": "Hi"}', False, "Hi"),
        ("Hi", False, "user\nHi<|im_end|>\n<|im_start|>assistant\n"),
    ):
        text = tokenizer.decode(prompts.encode(given(prompt)[0], tokenizer, raw))
        assert text == end if end == "Hi" else text.endswith(end)


def test_what_a_tokenizer_refuses_is_one_message():
    tokenizer = chat_tokenizer("{{ raise_exception('no') }}")
    with pytest.raises(UsageError, match=r"chat template refuses this chat \(roles: user\): no"):
        prompts.encode(given("Hi")[0], tokenizer, raw=False)
    (prompt,) = prompts.of_words(["a\udc80b"], "--prompt")  # not UTF-8 on the command line
    assert tokenizer.decode(prompts.encode(prompt, tokenizer, raw=True)) == "a?b"

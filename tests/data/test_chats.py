"""What of a chat reaches the text, what of it is learned, and what is said of the rest."""

import json

import datasets
import pytest

from dylora_moe.base.tiny import byte_tokenizer
from dylora_moe.data.documents import read_documents
from dylora_moe.data.sources import read_rows
from dylora_moe.errors import UsageError

from ..support.data import CHATML, chat_tokenizer, write_rows

# As Qwen3 and others: tools in a system turn, thoughts before the answer, calls behind it. It reads no name of a
# message, although the word stands in it.
TOOLS = (
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }} {{ c.function.arguments | tojson }}</call>"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TWO_ROLES = (
    "{% for m in messages %}{% if m.role in ('user', 'assistant') %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SCHEMA = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}


def user(content="Hi", **more):
    return {"role": "user", "content": content, **more}


def answer(content="Hello", **more):
    return {"role": "assistant", "content": content, **more}


def called(arguments, name="look"):
    return {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": name, "arguments": arguments}}]}


def documents(tmp_path, rows, template=TOOLS):
    """(text, learned text) of each row, and the documents."""
    tokenizer = chat_tokenizer(template) if template else byte_tokenizer()
    if isinstance(rows, list):
        rows = read_rows(str(write_rows(tmp_path / "a.jsonl", rows))).dataset
    read = read_documents(rows, tokenizer, "a.jsonl")
    return [(tokenizer.decode(d.ids), tokenizer.decode(d.ids[d.learned])) for d in read.items], read


def chat(*messages, **columns):
    return {"messages": list(messages), **columns}


@pytest.mark.parametrize("as_table", [False, True], ids=["json", "table"])
def test_the_whole_message_goes_to_the_template(tmp_path, as_table):
    """In a table, as in Parquet files, all messages have the keys that one of them has."""
    rows = [
        chat(user(), answer(reasoning_content="Be kind.")),
        chat(user("Where?"), called({"city": "Rome"}), {"role": "tool", "content": "42"}, answer("At 42.")),
        chat(user("When?"), called({"day": "2024-01-05"}), {"role": "tool", "content": "1"}, answer("Now.")),
    ]
    (thought, first, second), read = documents(tmp_path, datasets.Dataset.from_list(rows) if as_table else rows)
    assert thought[1] == "<think>Be kind.</think>Hello<|im_end|>"
    assert first[1] == '<call>look {"city": "Rome"}</call><|im_end|>At 42.<|im_end|>'
    assert "<|im_start|>tool\n42<|im_end|>" in first[0]
    assert '<call>look {"day": "2024-01-05"}</call>' in second[1], "no key of another row, no time"
    assert (read.unread, read.unused_columns) == ([], [])


def test_what_looks_like_times_all_over_a_chat(tmp_path):
    rows = [chat(user("2024-01-01"), answer("2024-01-02", reasoning_content="2024-01-03"))] * 2
    assert documents(tmp_path, rows)[0][0][1] == "<think>2024-01-03</think>2024-01-02<|im_end|>"
    rows = [{"prompt": "When?", "completion": [called({"day": "2024-01-04"})]}] * 2
    assert documents(tmp_path, rows)[0][0][1] == '<call>look {"day": "2024-01-04"}</call><|im_end|>'


@pytest.mark.parametrize("given", [[SCHEMA], json.dumps([SCHEMA])], ids=["list", "text"])
def test_tools_and_calls_as_openai_writes_them(tmp_path, given):
    rows = [chat(user(), called('{"n": 1}'), {"role": "function", "content": "2"}, answer(), tools=given)] * 2
    ((text, learned), _), read = documents(tmp_path, rows)
    assert text.startswith(f"<|im_start|>system\n{json.dumps(SCHEMA)}\n<|im_end|>")
    assert "<|im_start|>tool\n2<|im_end|>" in text
    assert learned == '<call>look {"n": 1}</call><|im_end|>Hello<|im_end|>'
    assert (read.unread, read.unused_columns) == ([], [])


def test_a_template_that_wants_the_arguments_of_calls_as_text(tmp_path):
    joined = TOOLS.replace("{{ c.function.arguments | tojson }}", "{{ 'with ' + c.function.arguments }}")
    for system in ([], [{"role": "system", "content": "Be"}]):
        row = chat(*system, user(), called({"where": "Köln"}), {"role": "tool", "content": "2"}, answer())
        ((_, learned), _), _ = documents(tmp_path, [row] * 2, joined)
        assert learned == '<call>look with {"where": "Köln"}</call><|im_end|>Hello<|im_end|>'


def test_tools_beside_a_prompt(tmp_path):
    rows = [{"prompt": "Hi", "completion": "Hello", "tools": [SCHEMA]}] * 2
    assert documents(tmp_path, rows)[0][0][0].startswith(f"<|im_start|>system\n{json.dumps(SCHEMA)}")


def test_what_nothing_reads_is_told(tmp_path):
    rows = [chat(user(name="Ann"), answer(reasoning_content="Be kind.", id=7), tools=[SCHEMA])] * 2
    assert documents(tmp_path, rows)[1].unread == ["id", "name"]
    assert documents(tmp_path, rows, CHATML)[1].unread == ["id", "name", "reasoning_content", "tools"]
    read = documents(tmp_path, rows, None)[1]
    assert (read.unread, read.unused_columns) == (["id", "name", "reasoning_content"], ["tools"])
    rows = [chat({"role": "system", "content": "Be"}, user(), answer(), {"role": "tool", "content": "1"}, answer())] * 2
    assert documents(tmp_path, rows)[1].unread == []
    assert documents(tmp_path, rows, TWO_ROLES)[1].unread == [
        "messages of the role system",
        "messages of the role tool",
    ]


def test_a_field_that_is_read_in_some_rows_is_read(tmp_path):
    late = TOOLS.replace("{% if m.reasoning_content %}", "{% if m.reasoning_content and loop.last %}")
    thought = answer(reasoning_content="Be kind.")
    rows = [chat(user(), thought, user(), answer()), chat(user(), thought)]
    assert documents(tmp_path, rows, late)[1].unread == []
    assert documents(tmp_path, rows[:1] * 2, late)[1].unread == ["reasoning_content"]


@pytest.mark.parametrize("template", [CHATML, None], ids=["template", "none"])
def test_an_answer_of_which_nothing_is_rendered_is_refused(tmp_path, template):
    with pytest.raises(
        UsageError, match=r"a\.jsonl, row 2: an answer has no content but tool_calls, which .* does not"
    ):
        documents(tmp_path, [chat(user(), answer()), chat(user(), called({}), answer())], template)
    blank = chat(user(), answer("", id=7), user(), answer())
    assert len(documents(tmp_path, [chat(user(), answer()), blank], template)[0]) == 2, "its id is no answer"


@pytest.mark.parametrize("template", [TOOLS, None], ids=["template", "none"])
@pytest.mark.parametrize("flag", [{"weight": 0}, {"train": False}, {"training": False}], ids=str)
def test_turns_that_are_not_to_be_learned(tmp_path, template, flag):
    rows = [chat(user(), answer("Ah", **flag), user(), answer("Oh", weight=1), user(), answer("Eh", **flag))] * 2
    ((text, learned), _), read = documents(tmp_path, rows, template)
    assert learned == ("Oh<|im_end|>" if template else "Oh<eos>")
    assert "Ah" in text and "Eh" not in text, "nothing is learned behind the last answer"
    assert (read.unread, read.skipped_rows) == ([], 0)
    assert documents(tmp_path, [*rows, chat(user(), answer(**flag))], template)[1].skipped_rows == 1


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (answer(weight=0.5), "the weight must be 0 .not learned. or 1, found 0.5"),
        (answer(train="no"), "train must be true or false, found 'no'"),
        (user(train=True), "has train: true, but only answers are learned, and its role is user"),
        ({"role": "User ", "content": 1.5}, "the column content must hold text, found float"),
        ({"role": ["user"], "content": "x"}, "the role must be one of .*found .'user'."),
        (answer(tool_calls="look"), "tool_calls must be a list of .*found 'look'"),
    ],
)
def test_a_message_that_cannot_be_read(tmp_path, message, text):
    with pytest.raises(UsageError, match=rf"a\.jsonl, row 1, message 1: {text}"):
        documents(tmp_path, [chat(message, answer())])


def test_roles_in_other_words(tmp_path):
    given = [("Developer", "Be"), ("User", "1"), ("Assistant", "2"), ("human", "3"), ("GPT", "4")]
    rows = [{"conversation": [{"from": role, "value": text} for role, text in given]}] * 2
    ((text, learned), _), _ = documents(tmp_path, rows)
    roles = ["system", "user", "assistant", "user", "assistant"]
    assert text == "\n".join(
        f"<|im_start|>{role}\n{content}<|im_end|>" for role, (_, content) in zip(roles, given, strict=True)
    )
    assert learned == "2<|im_end|>4<|im_end|>"
    knows = TOOLS + "{# developer #}"
    assert documents(tmp_path, rows, knows)[0][0][0].startswith("<|im_start|>developer\nBe<|im_end|>")


def test_thoughts_inside_the_content(tmp_path):
    """Templates such as that of Qwen3 take them out of the content and write them in their own way."""
    own_way = TOOLS.replace(
        "{{ m.content }}",
        "{% set p = m.content.split('</think>') %}{% if p | length > 1 %}<t>{% endif %}{{ p[-1] | trim }}",
    )
    rows = [chat(user(), answer("<think>\nhm\n</think>\n\nYes"))] * 2
    assert documents(tmp_path, rows, own_way)[0][0][1] == "<t>Yes<|im_end|>"


def test_a_template_that_takes_no_part_of_the_chat(tmp_path):
    whole = "{% if messages[-1].role != 'assistant' or messages | length < 4 %}{{ raise_exception('no') }}{% endif %}"
    rows = [chat(user(), answer("Ah"), user(), answer("Oh"))] * 2
    with pytest.raises(UsageError, match="row 1: the answer cannot be found"):
        documents(tmp_path, rows, whole + TOOLS)


# ---- what is learned, and what is not ----

# As Mistral: the generation prompt is ignored, a call is written without a content, and a system message is left out
# once an answer follows.
MISTRAL_LIKE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST] "
    "{% if messages[0]['role'] == 'system' and loop.last %}{{ messages[0]['content'] }}\n\n{% endif %}"
    "{{ m['content'] }} [/INST]{% elif m['role'] == 'assistant' %}"
    "{% if m['tool_calls'] %}[CALLS]{{ m['tool_calls'] | tojson }}{% else %} {{ m['content'] }}{% endif %}<|im_end|>"
    "{% elif m['role'] == 'tool' %}[RESULT]{{ m['content'] }}{% endif %}{% endfor %}"
)
# As Phi: where there is no generation prompt, the EOS is written in its place.
PHI_LIKE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}: {{ m['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant: {% else %}{{ eos_token }}{% endif %}"
)


@pytest.mark.parametrize("template", [CHATML, None], ids=["template", "none"])
def test_answers_in_a_prompt_are_not_learned(tmp_path, template):
    row = {"prompt": [user("one"), answer("first"), user("two")], "completion": [answer("second")]}
    (text,) = learned(tmp_path, [row], template)
    assert "second" in text and "first" not in text
    with pytest.raises(UsageError, match="without an answer to learn"):
        learned(tmp_path, [row | {"completion": [answer("")]}], template)


@pytest.mark.parametrize("template", [CHATML, None], ids=["template", "none"])
@pytest.mark.parametrize("place", [1, 3, 5])
def test_an_empty_answer_in_a_chat_is_not_learned(tmp_path, template, place):
    messages = [user("one"), answer("first"), user("two"), answer("second"), user("three"), answer("third")]
    messages[place] = answer("")
    (text,) = learned(tmp_path, [chat(*messages)], template)
    assert [word for word in ("first", "second", "third") if word in text] == [
        message["content"] for message in messages[1::2] if message["content"]
    ]
    assert text.count("<|im_end|>" if template else "<eos>") == 2


def test_calls_are_learned_where_the_template_ignores_the_generation_prompt(tmp_path):
    call = answer("", tool_calls=[{"type": "function", "function": {"name": "look", "arguments": {"at": "it"}}}])
    found = chat(user(), call, {"role": "tool", "content": "42"}, answer("It is 42"))
    (text,) = learned(tmp_path, [found], MISTRAL_LIKE)
    assert "look" in text and "It is 42" in text and "Hi" not in text and "RESULT" not in text
    (text,) = learned(tmp_path, [chat(user(), call)], MISTRAL_LIKE)
    assert "look" in text


def test_a_system_message_that_the_template_drops_goes_to_the_user(tmp_path):
    found = [chat({"role": "system", "content": "Be brief"}, user(), answer())]
    ((text, answered),) = documents(tmp_path, found, MISTRAL_LIKE)[0]
    assert "[INST] Be brief\n\nHi [/INST] Hello" in text and answered.strip() == "Hello<|im_end|>"


def test_a_template_that_ends_a_chat_with_the_end_of_the_sequence(tmp_path):
    (text,) = learned(tmp_path, [chat(user("one"), answer("first"), user("two"), answer("second"))], PHI_LIKE)
    assert text == "first<end>second<end><|im_end|>"


@pytest.mark.parametrize("name", ["system", "system_prompt"])
def test_the_system_column_of_a_chat(tmp_path, name):
    rows = [chat(user(), answer(), **{name: "Be brief"}), chat({"role": "system", "content": "Own"}, user(), answer())]
    found = [text for text, _ in documents(tmp_path, rows, CHATML)[0]]
    assert "system\nBe brief<|im_end|>" in found[0]
    assert "Own" in found[1] and "Be brief" not in found[1]


def learned(tmp_path, rows, template) -> list[str]:
    """The learned text of each document."""
    return [text for _, text in documents(tmp_path, rows, template)[0]]

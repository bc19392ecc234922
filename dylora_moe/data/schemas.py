"""The schemas of a data set: which columns are read, and what is learned of them.

| columns | what is learned |
|---|---|
| `messages` ({role, content}) or `conversations` ({from, value}) | every assistant turn, with its end token |
| `prompt` + `completion` | the completion |
| `instruction`, `prompt`, `question` + `output`, `response`, `completion`, `answer` | the answer and its end token |
| `text` or `content` | everything |

An `input` or `context` is appended to an instruction or question after an empty line. A `system` or `system_prompt`
becomes the system message.
"""

from __future__ import annotations

from ..errors import UsageError, listed

CHAT_COLUMNS = ("messages", "conversations")
PROMPT_COLUMNS = ("instruction", "prompt", "question")
ANSWER_COLUMNS = ("output", "response", "completion", "answer")
INPUT_COLUMNS = ("input", "context")
SYSTEM_COLUMNS = ("system", "system_prompt")
TEXT_COLUMNS = ("text", "content")
READ_COLUMNS = (*CHAT_COLUMNS, *PROMPT_COLUMNS, *ANSWER_COLUMNS, *INPUT_COLUMNS, *SYSTEM_COLUMNS, *TEXT_COLUMNS)
KNOWN_SCHEMAS = [
    "messages: a list of {role, content}",
    "conversations: a list of {from, value}",
    f"one of {', '.join(PROMPT_COLUMNS)} with one of {', '.join(ANSWER_COLUMNS)}",
    "text or content: plain text",
]


def detect_schema(columns: list[str], where: str) -> tuple[str, list[str]]:
    """Return the name of the schema and the columns that it reads, prompt and answer first. Raises UsageError."""

    def first(names: tuple[str, ...]) -> str | None:
        return next((name for name in names if name in columns), None)

    if chat := first(CHAT_COLUMNS):
        return "chat", [chat]
    prompt, answer = first(PROMPT_COLUMNS), first(ANSWER_COLUMNS)
    if prompt and answer:
        more = [first(SYSTEM_COLUMNS), first(INPUT_COLUMNS) if prompt != "prompt" else None]
        return f"{prompt} + {answer}", [prompt, answer, *(name for name in more if name)]
    if text := first(TEXT_COLUMNS):
        return "text", [text]
    raise UsageError(
        f"{where}: the columns are none that can be trained on; found {', '.join(sorted(columns)) or 'none'}; "
        f"rename them to one of:\n{listed(KNOWN_SCHEMAS)}"
    )

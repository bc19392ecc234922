"""The schemas of a data set: which columns are read, and what is learned of them.

| columns | what is learned |
|---|---|
| `messages`, `conversations`, `conversation`: {role, content} or {from, value} | every assistant turn, with its end |
| `prompt` + `completion` | the completion |
| `instruction`, `prompt`, `question`, `query`, `input` + `output`, `response`, `completion`, `answer` | the answer |
| `text` or `content` | everything |

An `input` or `context` is appended to an instruction or question after an empty line. A `system` or `system_prompt`
becomes the system message. The `tools` that a chat may call go to the chat template. Capitals in the names of columns
make no difference.
"""

from __future__ import annotations

from ..errors import UsageError, listed

CHAT_COLUMNS = ("messages", "conversations", "conversation")
PROMPT_COLUMNS = ("instruction", "prompt", "question", "query", "input")
ANSWER_COLUMNS = ("output", "response", "completion", "answer")
INPUT_COLUMNS = ("input", "context")
SYSTEM_COLUMNS = ("system", "system_prompt")
TEXT_COLUMNS = ("text", "content")
TOOLS_COLUMN = "tools"
READ_COLUMNS = {
    *CHAT_COLUMNS, *PROMPT_COLUMNS, *ANSWER_COLUMNS, *INPUT_COLUMNS, *SYSTEM_COLUMNS, *TEXT_COLUMNS, TOOLS_COLUMN
}  # fmt: skip
KNOWN_SCHEMAS = [
    "messages: a list of {role, content}",
    "conversations: a list of {from, value}",
    f"one of {', '.join(PROMPT_COLUMNS)} with one of {', '.join(ANSWER_COLUMNS)}",
    "text or content: plain text",
]


def plain_name(column: str) -> str:
    """Return the name of a column without capitals and without spaces around it, by which it is known."""
    return column.strip().lower()


def renamed_columns(columns: list[str]) -> dict[str, str]:
    """Return the columns that are read under a plainer name, and that name: `Response` is read as `response`."""
    renamed: dict[str, str] = {}
    for name in columns:
        plain = plain_name(name)
        if plain in READ_COLUMNS and plain not in columns and plain not in renamed.values():
            renamed[name] = plain
    return renamed


def detect_schema(columns: list[str], where: str) -> tuple[str, list[str]]:
    """Return the name of the schema and the columns that it reads, prompt and answer first. Raises UsageError."""

    def first(names: tuple[str, ...], *others: str) -> str | None:
        return next((name for name in names if name in columns and name not in others), None)

    tools = first((TOOLS_COLUMN,))
    if chat := first(CHAT_COLUMNS):
        return "chat", [chat, *(name for name in (first(SYSTEM_COLUMNS), tools) if name)]
    prompt, answer = first(PROMPT_COLUMNS), first(ANSWER_COLUMNS)
    if prompt and answer:
        more = [first(SYSTEM_COLUMNS), first(INPUT_COLUMNS, prompt) if prompt != "prompt" else None, tools]
        return f"{prompt} + {answer}", [prompt, answer, *(name for name in more if name)]
    if text := first(TEXT_COLUMNS):
        return "text", [text]
    raise UsageError(
        f"{where}: the columns are none that can be trained on; found {', '.join(sorted(columns)) or 'none'}; "
        f"rename them to one of:\n{listed(KNOWN_SCHEMAS)}"
    )

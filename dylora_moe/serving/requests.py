"""What a client of the gateway asks for: read from the body of its request, and written for the server behind it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..constants import EXPERT_PREFIX, expert_name
from ..data.chat import Message, read_messages
from ..errors import UsageError

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
MOST_TOKEN = 2**31  # above every vocabulary

Text = str | list[int] | list[Message]  # a prompt as text, as tokens, or a chat


class Refused(Exception):
    """A request that is not forwarded, or not answered, with what OpenAI's API says then."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status = status
        kind = "invalid_request_error" if status < 500 else "server_error"
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


@dataclass(frozen=True)
class Asked:
    """A request that can be forwarded.

    Args:
        body: what the client has sent.
        text: what the router reads.
        expert: which expert the client has named, None if the router is to choose.
    """

    body: dict[str, Any]
    text: Text
    expert: int | None


def vllm(body: dict[str, Any], expert: int, experts: int) -> dict[str, Any]:
    """Return the body of a request for vLLM, which knows an adapter as a model."""
    return body | {"model": expert_name(expert)}


def llama_cpp(body: dict[str, Any], expert: int, experts: int) -> dict[str, Any]:
    """Return the body of a request for llama.cpp's server, which has a scale for each adapter."""
    return body | {"lora": [{"id": i, "scale": float(i == expert)} for i in range(experts)]}


ENGINES: dict[str, Callable[[dict[str, Any], int, int], dict[str, Any]]] = {"vllm": vllm, "llama.cpp": llama_cpp}


def read(path: str, content: bytes, experts: int) -> Asked:
    """Return what a request asks for. Raises Refused if it is broken, or names an expert that is not there."""
    body = _object(content)
    model = body.get("model")
    if not isinstance(model, str | None):
        raise _wrong("model", "a string", model)
    if not isinstance(body.get("stream"), bool | None):
        raise _wrong("stream", "true or false", body["stream"])
    return Asked(body, _chat(body) if path == CHAT else _prompt(body), _named(model, experts))


def _object(content: bytes) -> dict[str, Any]:
    try:
        body = json.loads(content, parse_constant=_finite, parse_float=_finite)
    except (ValueError, RecursionError):
        raise Refused(400, "the body of the request is not JSON") from None
    if not isinstance(body, dict):
        raise Refused(400, f"the body of the request must be a JSON object, found {_kind(body)}")
    return body


def _finite(number: str) -> float:
    """Return a number. Raises ValueError for infinities and NaN, which JSON does not have."""
    if not math.isfinite(value := float(number)):
        raise ValueError(number)
    return value


def _named(model: str | None, experts: int) -> int | None:
    """Return the expert of that name. Every other name leaves the choice to the router."""
    if model is None or not re.fullmatch(EXPERT_PREFIX + "[0-9]+", model):
        return None
    for expert in range(experts):
        if model == expert_name(expert):
            return expert
    last = expert_name(experts - 1)
    raise Refused(404, f"there is no {model}; the experts are {expert_name(0)} to {last}", "model", "model_not_found")


def _chat(body: dict[str, Any]) -> list[Message]:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise _wrong("messages", "a list of messages", messages)
    try:
        return read_messages([_with_text(one) for one in messages], "messages")
    except UsageError as error:
        raise Refused(400, str(error), "messages") from None
    except RecursionError:
        raise Refused(400, "messages: nested too deeply", "messages") from None


def _with_text(message: Any) -> Any:
    """Return a message with the text of its parts as its content: the router reads nothing else."""
    if not isinstance(message, dict) or not isinstance(message.get("content"), list):
        return message
    parts = [part for part in message["content"] if isinstance(part, dict) and part.get("type") == "text"]
    if not all(isinstance(part.get("text"), str) for part in parts):
        raise Refused(400, "the text of a part of a message must be a string", "messages")
    return message | {"content": "".join(part["text"] for part in parts)}


def _prompt(body: dict[str, Any]) -> str | list[int]:
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    elif isinstance(prompt, list) and prompt and all(isinstance(one, str | list) for one in prompt):
        raise Refused(400, "expected one prompt: each may go to another expert. Send them one by one", "prompt")
    if isinstance(prompt, str) and prompt:
        return prompt
    if isinstance(prompt, list) and prompt and all(type(one) is int and 0 <= one < MOST_TOKEN for one in prompt):
        return prompt
    raise _wrong("prompt", "a text, or a list of tokens", prompt)


def _wrong(name: str, wanted: str, found: Any) -> Refused:
    return Refused(400, f"{name} must be {wanted}, found {_kind(found)}", name)


def _kind(value: Any) -> str:
    """Name the kind of a value in the words of JSON."""
    if value is None:
        return "nothing"
    kinds = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    return f"an empty {kinds[type(value)].partition(' ')[2]}" if value in ("", []) else kinds[type(value)]

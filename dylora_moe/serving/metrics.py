"""What the gateway has done, in Prometheus' text format."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

from ..constants import expert_name

TAIL = 16 * 1024  # bytes at the end of an answer, where its usage is
_NUMBERS = {kind: re.compile(rb'"%b_tokens"\s*:\s*(\d{1,12})' % kind.encode()) for kind in ("prompt", "completion")}


class Metrics:
    """Counts of requests, tokens and errors since the start."""

    def __init__(self, experts: int):
        self.requests = Counter({expert_name(i): 0 for i in range(experts)})
        self.tokens: Counter[tuple[str, str]] = Counter()  # by expert, and "prompt" or "completion"
        self.errors: Counter[int] = Counter()  # by HTTP status
        self.in_flight = 0

    def text(self) -> str:
        """Return the page /metrics."""
        requests = ((f'{{expert="{name}"}}', count) for name, count in self.requests.items())
        tokens = ((f'{{expert="{name}",kind="{kind}"}}', count) for (name, kind), count in sorted(self.tokens.items()))
        errors = ((f'{{status="{status}"}}', count) for status, count in sorted(self.errors.items()))
        lines = [
            *_family("requests_total", "counter", "Requests that were forwarded, by expert.", requests),
            *_family("tokens_total", "counter", "Tokens, by expert, as the upstream server counts them.", tokens),
            *_family("errors_total", "counter", "Answers that report an error or were cut, by HTTP status.", errors),
            *_family("requests_in_flight", "gauge", "Requests that are being answered.", [("", self.in_flight)]),
        ]
        return "\n".join([*lines, ""])


def _family(name: str, kind: str, summary: str, values: Iterable[tuple[str, int]]) -> list[str]:
    name = f"dylora_moe_{name}"
    return [f"# HELP {name} {summary}", f"# TYPE {name} {kind}", *(f"{name}{label} {n}" for label, n in values)]


class Usage:
    """Finds how many tokens an answer has while it passes.

    The server says so at the end of an answer. Of a stream it does only if the request asks for it; then each event
    counts as a token of the answer.
    """

    def __init__(self, stream: bool):
        self._stream = stream
        self._tail = b""
        self._events = 0

    def add(self, piece: bytes) -> None:
        self._events += (self._tail[-1:] + piece).count(b"\n\n")  # JSON has no line breaks in its texts
        self._tail = (self._tail + piece)[-TAIL:]

    def counts(self, prompt: int | None) -> dict[str, int]:
        """Return the numbers of tokens of the "prompt" and the "completion", of those that are known.

        Args:
            prompt: tokens of the prompt, where the server does not say it; None if that is not known either.
        """
        found = {kind: pattern.findall(self._tail) for kind, pattern in _NUMBERS.items()}
        counts = {kind: int(numbers[-1]) for kind, numbers in found.items() if numbers}
        if self._stream:
            counts.setdefault("completion", self._events)
        return counts if prompt is None else {"prompt": prompt} | counts

"""An OpenAI-compatible proxy that lets the router choose the expert of each request.

The server behind it, vLLM or llama.cpp's, has the base model and every expert as a LoRA adapter. Neither prompts nor
keys are logged, and nothing of one request is kept for the next.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from http import HTTPStatus

import anyio
import anyio.to_thread
import httpx2
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from ..constants import expert_name
from ..errors import UsageError
from .metrics import Metrics, Usage
from .requests import CHAT, COMPLETION, ENGINES, Asked, Refused, Text, read

EXPERT_HEADER = b"x-dylora-moe-expert"  # of an answer
CONNECT_SECONDS, BODY_SECONDS, HEALTH_SECONDS = 5.0, 30.0, 2.0
KEPT_SECONDS = 2.0  # an idle connection to the server; servers close theirs after 5
# What belongs to one connection, or to the body as the client has sent it.
_CONNECTION = {
    *(b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"proxy-connection", b"te"),
    *(b"trailer", b"transfer-encoding", b"upgrade"),
}
_OF_REQUEST = {
    *_CONNECTION,
    b"host",
    b"content-length",
    b"content-type",
    b"content-encoding",
    b"accept-encoding",
    b"expect",
}
_OF_ANSWER = {*_CONNECTION, b"date", b"server"}

Headers = list[tuple[bytes, bytes]]
_Expert = tuple[str, int | None]  # its name, and how many tokens the prompt has if that is known


@dataclass(frozen=True)
class Settings:
    """What a gateway is told.

    Args:
        upstream: the URL of the server, without "/v1".
        engine: a key of `ENGINES`.
        experts: how many there are.
        max_body: of a request, in bytes.
        max_requests: that are answered at the same time.
        timeout: seconds that the server, or a client that reads its answer, may be silent.
    """

    upstream: str
    engine: str
    experts: int
    max_body: int = 4 * 2**20
    max_requests: int = 256
    timeout: float = 300.0


class Gateway:
    """Answers the requests.

    Args:
        choose: returns the expert for a prompt and the number of its tokens. It is called in another thread, once at a
            time. A UsageError of it is the client's error.
        log: takes a line for each request that was forwarded.
    """

    def __init__(self, settings: Settings, choose: Callable[[Text], tuple[int, int]], log: Callable[[str], None]):
        self.settings = settings
        self.metrics = Metrics(settings.experts)
        self._choose, self._log = choose, log
        self._one_at_a_time = anyio.CapacityLimiter(1)
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=KEPT_SECONDS)
        # The transport, not the client: that would keep the cookies of one request for the next, and follow redirects.
        self._upstream = httpx2.AsyncHTTPTransport(limits=limits, trust_env=False)

    def app(self) -> Starlette:
        """Return the ASGI application."""

        @asynccontextmanager
        async def lifespan(app: Starlette) -> AsyncIterator[None]:
            async with self._upstream:
                yield

        routes = [
            *(Route(path, _Asgi(self._completions), methods=["POST"]) for path in (CHAT, COMPLETION)),
            Route("/v1/models", _Asgi(self._models), methods=["GET"]),
            Route("/health", self._health, methods=["GET"]),
            Route("/metrics", self._metrics, methods=["GET"]),
        ]
        return Starlette(routes=routes, exception_handlers={HTTPException: self._not_served}, lifespan=lifespan)

    async def _not_served(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        self.metrics.errors[error.status_code] += 1
        refused = Refused(error.status_code, f"{request.method} {request.url.path} is not served", None, "not_found")
        return JSONResponse(refused.body, error.status_code, headers=error.headers)

    async def _metrics(self, request: Request) -> Response:
        return PlainTextResponse(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def _health(self, request: Request) -> Response:
        try:
            async with self._opened("GET", "/health", [], b"", HEALTH_SECONDS) as answer:
                problem = None if answer.status_code == 200 else f"the upstream server answers {answer.status_code}"
        except Refused as error:
            problem = str(error)
        return JSONResponse({"status": problem or "ok"}, 503 if problem else 200)

    async def _models(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def forward() -> int:
            return await self._forward(send, "/v1/models", _passed(scope["headers"], _OF_REQUEST))

        await self._guarded(forward, receive, send)

    async def _completions(self, scope: Scope, receive: Receive, send: Send) -> None:
        began, path, expert = time.monotonic(), scope["path"], "no expert"

        async def forward() -> int:
            nonlocal expert
            number, tokens = await self._expert(asked)
            expert = expert_name(number)
            self.metrics.requests[expert] += 1
            headers = [*_passed(scope["headers"], _OF_REQUEST), (b"content-type", b"application/json")]
            body = ENGINES[self.settings.engine](asked.body, number, self.settings.experts)
            return await self._forward(send, path, headers, json.dumps(body).encode(), (expert, tokens))

        if self.metrics.in_flight >= self.settings.max_requests:
            error = Refused(503, "the gateway answers as many requests as it may; try again", None, "overloaded")
            return await self._refuse(error, scope, receive, send)
        self.metrics.in_flight += 1
        try:
            asked = read(path, await self._body(Request(scope, receive)), self.settings.experts)
            status = await self._guarded(forward, receive, send)
            self._log(f"POST {path} {expert}: {status}, {time.monotonic() - began:.3f} s")
        except Refused as error:
            await self._refuse(error, scope, receive, send)
        except ClientDisconnect:
            pass
        finally:
            self.metrics.in_flight -= 1

    async def _body(self, request: Request) -> bytes:
        """Read the body of a request, in bounded memory and time."""
        most = self.settings.max_body
        too_large = Refused(413, f"the body of the request has more than {most:,} bytes", None, "request_too_large")
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise Refused(415, "expected the header Content-Type: application/json")
        length = request.headers.get("content-length", "0")
        if not length.isdecimal() or int(length[:20]) > most:
            raise too_large
        content = bytearray()
        with anyio.move_on_after(BODY_SECONDS):
            async for piece in request.stream():
                content += piece
                if len(content) > most:
                    raise too_large
            return bytes(content)
        raise Refused(408, f"the body of the request took more than {BODY_SECONDS:.0f} s")

    async def _expert(self, asked: Asked) -> tuple[int, int | None]:
        """Return the expert for a request, and how many tokens its prompt has if that is known."""
        if asked.expert is not None:
            return asked.expert, None
        try:
            return await anyio.to_thread.run_sync(self._choose, asked.text, limiter=self._one_at_a_time)
        except UsageError as error:
            raise Refused(400, str(error)) from None

    async def _guarded(self, forward: Callable, receive: Receive, send: Send) -> int:
        """Run `forward` until it has answered or the client hangs up; return the status, 499 for the latter.

        Every error becomes an answer: no traceback may show what is in a request.
        """
        status = 499  # as nginx calls it

        async def listen() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            group.cancel_scope.cancel()

        async with anyio.create_task_group() as group:
            group.start_soon(listen)
            try:
                status = await forward()
            except Refused as error:
                status = error.status
                await _send_error(send, error)
            except Exception as error:
                status = 500
                self._log(f"an error in the gateway: {type(error).__name__}")
                await _send_error(send, Refused(500, "an error in the gateway"))
            group.cancel_scope.cancel()
        if status >= 400:
            self.metrics.errors[status] += 1
        return status

    async def _refuse(self, error: Refused, scope: Scope, receive: Receive, send: Send) -> None:
        self.metrics.errors[error.status] += 1
        await JSONResponse(error.body, error.status)(scope, receive, send)

    async def _forward(
        self,
        send: Send,
        path: str,
        headers: Headers,
        content: bytes = b"",
        expert: _Expert | None = None,
    ) -> int:
        """Send a request to the server and hand its answer on as it comes; return its status.

        Args:
            expert: which one it goes to; None if it is not for an expert.
        """
        async with self._opened("POST" if content else "GET", path, headers, content, self.settings.timeout) as answer:
            passed = _passed(answer.headers.raw, _OF_ANSWER)
            passed += [(EXPERT_HEADER, expert[0].encode())] if expert else []
            await send({"type": "http.response.start", "status": answer.status_code, "headers": passed})
            stream = answer.headers.get("content-type", "").startswith("text/event-stream")
            usage = Usage(stream)
            try:
                async for piece in answer.stream:  # type: ignore[union-attr]  # of an asynchronous transport
                    usage.add(piece)
                    await self._send_piece(send, piece)
            except httpx2.TransportError as error:
                return await self._cut(send, error, stream)
            finally:
                if expert is not None and answer.status_code < 400:
                    for kind, count in usage.counts(expert[1]).items():
                        self.metrics.tokens[expert[0], kind] += count
            await send({"type": "http.response.body"})
            return answer.status_code

    async def _send_piece(self, send: Send, piece: bytes) -> None:
        with anyio.move_on_after(self.settings.timeout) as scope:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        if scope.cancelled_caught:
            raise httpx2.WriteTimeout("the client does not read its answer")

    async def _cut(self, send: Send, error: httpx2.TransportError, stream: bool) -> int:
        """Show the client that its answer is not whole: the last chunk of the body is never sent."""
        refused = _explained(error)
        if stream and not isinstance(error, httpx2.WriteTimeout):
            event = f"\n\ndata: {json.dumps(refused.body)}\n\n".encode()
            await self._send_piece(send, event)
        return refused.status

    @asynccontextmanager
    async def _opened(
        self, method: str, path: str, headers: Headers, content: bytes, seconds: float
    ) -> AsyncIterator[httpx2.Response]:
        """Send a request to the server, and close its answer at the end. Raises Refused if none begins."""
        timeout = httpx2.Timeout(seconds, connect=min(CONNECT_SECONDS, seconds))
        request = httpx2.Request(
            method,
            self.settings.upstream + path,
            headers=[*headers, (b"accept-encoding", b"identity")],
            content=content,
            extensions={"timeout": timeout.as_dict()},
        )
        try:
            answer = await self._upstream.handle_async_request(request)
        except httpx2.TransportError as error:
            raise _explained(error) from None
        try:
            yield answer
        finally:
            with anyio.CancelScope(shield=True), suppress(httpx2.TransportError):
                await answer.aclose()


class _Asgi:
    """A function as an ASGI application, as which Starlette takes no plain function."""

    def __init__(self, function: Callable):
        self._function = function

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._function(scope, receive, send)


def _passed(headers: Iterable[tuple[bytes, bytes]], without: set[bytes]) -> Headers:
    """Return the headers that go on to the other side."""
    pairs = [(name.lower(), value) for name, value in headers]
    of_connection = {
        word.strip().lower() for name, value in pairs if name == b"connection" for word in value.split(b",")
    }
    return [(name, value) for name, value in pairs if name not in without | of_connection]


def _explained(error: httpx2.TransportError) -> Refused:
    if isinstance(error, httpx2.TimeoutException) and not isinstance(error, httpx2.ConnectTimeout):
        return Refused(504, "the upstream server is too slow", None, "upstream_timeout")
    if isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout):
        return Refused(502, "the upstream server cannot be reached", None, "upstream_unreachable")
    return Refused(502, "the upstream server has closed the connection", None, "upstream_closed")


async def _send_error(send: Send, error: Refused) -> None:
    """Answer with an error. After the beginning of an answer, which the server's own code refuses, it is cut."""
    content = json.dumps(error.body).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    reason = HTTPStatus(error.status)
    with suppress(RuntimeError):
        await send({"type": "http.response.start", "status": reason.value, "headers": headers})
        await send({"type": "http.response.body", "body": content})

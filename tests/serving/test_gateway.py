"""The gateway between a client and a server that plays vLLM or llama.cpp, over real connections."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import httpx2
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from dylora_moe.data.chat import Message
from dylora_moe.errors import UsageError
from dylora_moe.serving import gateway as module
from dylora_moe.serving.gateway import Gateway, Settings

from ..support.scripts import ROOT

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
KEY, SECRET = "Bearer sk-never-log-me", "a secret prompt"
EVENTS = [f'data: {{"choices": [{{"delta": {{"content": "{i}"}}}}]}}\n\n'.encode() for i in range(5)]
JSON = {"content-type": "application/json"}
DONE = b"data: [DONE]\n\n"
PARTS = [{"type": "text", "text": "four"}, {"type": "image_url"}]
USAGE = {"usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}}


class Upstream:
    """What the server was asked, and how it plays: each request says that by `play`."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, str], dict]] = []
        self.hung_up, self.go_on = threading.Event(), threading.Event()

    async def complete(self, request: Request) -> Response:
        body = await request.json()
        self.asked.append((request.url.path, dict(request.headers), body))
        play = body.get("play")
        if play == "error":
            return JSONResponse({"error": {"message": "slow down"}}, 429, {"retry-after": "3", "set-cookie": "a=b"})
        if play == "hang":
            while not await request.is_disconnected():
                await asyncio.sleep(0.01)
            self.hung_up.set()
            return Response()
        if body.get("stream"):
            return StreamingResponse(self.events(play), media_type="text/event-stream")
        return JSONResponse({"choices": [{"text": '"completion_tokens": 99'}]} | USAGE, headers={"set-cookie": "a=b"})

    async def events(self, play: str | None):
        try:
            for number, event in enumerate(EVENTS):
                if number == 2 and play == "cut":
                    raise RuntimeError("cut in the middle")
                while number == 2 and play == "wait" and not self.go_on.is_set():
                    await asyncio.sleep(0.005)
                if play == "slow":
                    await asyncio.sleep(0.02)
                yield event
            yield DONE
        except asyncio.CancelledError:
            self.hung_up.set()
            raise

    async def models(self, request: Request) -> Response:
        self.asked.append((request.url.path, dict(request.headers), {}))
        return JSONResponse({"data": [{"id": "expert_0"}]})

    async def health(self, request: Request) -> Response:
        return Response()

    def app(self) -> Starlette:
        posts = [Route(path, self.complete, methods=["POST"]) for path in (CHAT, COMPLETION)]
        return Starlette(routes=[*posts, Route("/v1/models", self.models), Route("/health", self.health)])


@contextmanager
def served(app: Starlette) -> Iterator[str]:
    """The URL of an application that is served in a thread."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, log_level="critical", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    thread.join()


def choose(asked) -> tuple[int, int]:
    """Plays the router: the length of the text decides."""
    if isinstance(asked, str):
        if asked == "unknown":
            raise UsageError("the tokenizer makes no token of the prompt")
        if asked == "broken":
            raise RuntimeError(SECRET)
        return len(asked) % 3, 11
    if isinstance(asked[0], Message):
        return sum(len(message.content) for message in asked) % 3, 11
    return len(asked) % 3, len(asked)


class Place:
    """A gateway in front of a server."""

    def __init__(self, url: str, upstream: Upstream):
        self.upstream, self.lines = upstream, []
        self.settings = Settings(url, "vllm", 3, max_body=100_000, max_requests=60)
        self.gateway = Gateway(self.settings, choose, self.lines.append)
        self.url = ""

    def post(self, body: object, path: str = CHAT, **options) -> httpx2.Response:
        options = {"timeout": 5, "verify": False} | options
        content = json.dumps(body).encode() if isinstance(body, dict | list) else body
        headers = JSON | options.pop("headers", {})
        return httpx2.post(self.url + path, content=content, headers=headers, **options)

    def other(self, **settings) -> Gateway:
        return Gateway(replace(self.settings, **settings), choose, self.lines.append)


@pytest.fixture(scope="module")
def everything() -> Iterator[Place]:
    upstream = Upstream()
    with served(upstream.app()) as url:
        place = Place(url, upstream)
        with served(place.gateway.app()) as place.url:
            yield place


@pytest.fixture
def place(everything) -> Place:
    upstream = everything.upstream
    upstream.asked.clear()
    upstream.hung_up.clear()
    upstream.go_on.clear()
    everything.lines.clear()
    return everything


def chat(text: str = "four", **fields) -> dict:
    return {"model": "auto", "messages": [{"role": "user", "content": text}], **fields}


def asked_of(gateway: Gateway, *bodies: dict, path: str = CHAT, together: bool = False) -> list[httpx2.Response]:
    """Ask a gateway that is not served."""

    async def ask() -> list[httpx2.Response]:
        transport = httpx2.ASGITransport(gateway.app())
        async with httpx2.AsyncClient(transport=transport, base_url="http://gateway") as client:
            posts = [client.post(path, content=json.dumps(body), headers=JSON) for body in bodies]
            return await asyncio.gather(*posts) if together else [await post for post in posts]

    return asyncio.run(ask())


def wait_for(condition) -> None:
    end = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.mark.parametrize(
    ("path", "body", "expert"),
    [
        (CHAT, chat("four"), 1),
        (CHAT, chat("fives"), 2),
        (CHAT, chat("four", model="expert_2"), 2),
        (
            CHAT,
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "four"}, {"type": "image_url"}]}]},
            1,
        ),
        (COMPLETION, {"prompt": "fives", "temperature": 0.5}, 2),
        (COMPLETION, {"prompt": [[1, 2, 3, 4]], "model": "base"}, 1),
        (COMPLETION, {"prompt": ["\ud800"], "model": "expert_one"}, 1),
    ],
)
def test_the_request_goes_to_the_expert_that_the_router_or_the_client_has_chosen(place, path, body, expert):
    answer = place.post(body, path)
    assert (answer.status_code, answer.headers["x-dylora-moe-expert"]) == (200, f"expert_{expert}")
    assert answer.json()["usage"] == USAGE["usage"]
    assert [(where, sent) for where, _, sent in place.upstream.asked] == [(path, body | {"model": f"expert_{expert}"})]

    assert asked_of(place.other(engine="llama.cpp"), body, path=path)[0].status_code == 200
    scales = [{"id": i, "scale": float(i == expert)} for i in range(3)]
    assert place.upstream.asked[1][::2] == (path, body | {"lora": scales})


def test_headers_are_handed_on_and_keys_and_prompts_are_not_logged(place):
    headers = {"authorization": KEY, "x-request-id": "7", "connection": "x-mine", "x-mine": "1", "cookie": "c=d"}
    for _ in range(2):
        assert place.post(chat(SECRET), headers=headers | {"content-encoding": "br"}).headers["set-cookie"] == "a=b"
    assert httpx2.get(place.url + "/v1/models", headers=headers, verify=False).json() == {"data": [{"id": "expert_0"}]}
    assert len(place.upstream.asked) == 3
    for _, sent, _ in place.upstream.asked:
        assert (sent["authorization"], sent["x-request-id"], sent["cookie"]) == (KEY, "7", "c=d")
        assert "x-mine" not in sent and "content-encoding" not in sent
    wait_for(lambda: len(place.lines) == 2)
    assert re.fullmatch(rf"POST {CHAT} expert_0: 200, \d\.\d+ s", place.lines[0])
    assert not [line for line in place.lines if KEY in line or SECRET in line]


def nested(depth: int) -> list:
    found: list = []
    for _ in range(depth):
        found = [found]
    return found


@pytest.mark.parametrize(
    ("path", "body", "status", "param", "told"),
    [
        (CHAT, b"{", 400, None, "not JSON"),
        (CHAT, b'{"messages": [], "temperature": NaN}', 400, None, "not JSON"),
        (CHAT, b'{"messages": [], "temperature": 1e999}', 400, None, "not JSON"),
        (CHAT, b"[" * 50_000, 400, None, "not JSON"),
        (CHAT, b"\xff", 400, None, "not JSON"),
        (CHAT, [], 400, None, "object, found an empty list"),
        (CHAT, {}, 400, "messages", "found nothing"),
        (CHAT, {"prompt": "a"}, 400, "messages", "found nothing"),
        (CHAT, {"messages": "hello"}, 400, "messages", "found a string"),
        (CHAT, {"messages": [1]}, 400, "messages", "message 1"),
        (CHAT, {"messages": [{"role": "king", "content": "a"}]}, 400, "messages", "role"),
        (CHAT, {"messages": [{"role": "user", "content": 1.5}]}, 400, "messages", "text"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, 400, "messages", "string"),
        (
            CHAT,
            {"messages": [{"role": "user", "content": "a", "x": nested(600)}]},
            400,
            "messages",
            "nested too deeply",
        ),
        (CHAT, chat(model=1), 400, "model", "found a number"),
        (CHAT, chat(stream="yes"), 400, "stream", "found a string"),
        (CHAT, chat(model="expert_3"), 404, "model", "expert_0 to expert_2"),
        (CHAT, chat(model="expert_" + "9" * 5000), 404, "model", "expert_0 to expert_2"),
        (COMPLETION, {}, 400, "prompt", "found nothing"),
        (COMPLETION, {"prompt": ""}, 400, "prompt", "found an empty string"),
        (COMPLETION, {"prompt": ["a", "b"]}, 400, "prompt", "one by one"),
        (COMPLETION, {"prompt": [1, True]}, 400, "prompt", "found a list"),
        (COMPLETION, {"prompt": [2**31]}, 400, "prompt", "found a list"),
        (COMPLETION, {"prompt": "unknown"}, 400, None, "no token"),
        (COMPLETION, {"prompt": "broken"}, 500, None, "an error in the gateway"),
        ("/v1/embeddings", {}, 404, None, "not served"),
        ("/health", {}, 405, None, "not served"),
    ],
)
def test_a_broken_request_gets_an_error_of_openai_and_goes_no_further(place, path, body, status, param, told):
    answer = place.post(body, path)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["param"] == param and told in error["message"]
    assert error["type"] == ("invalid_request_error" if status < 500 else "server_error")
    assert place.upstream.asked == [] and SECRET not in "".join([answer.text, *place.lines])


def test_a_browser_that_posts_a_form_is_refused(place):
    assert place.post(chat(), headers={"content-type": "text/plain"}).status_code == 415


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_is_too_large_is_refused(place, chunked):
    large = json.dumps(chat("a" * 10_000_000)).encode()
    pieces = (large[i : i + 100_000] for i in range(0, len(large), 100_000))
    answer = place.post(pieces if chunked else large)
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")
    assert place.upstream.asked == []
    assert place.post(chat("a" * 99_000)).status_code == 200


def test_a_stream_is_passed_on_as_it_comes(place):
    with httpx2.stream(
        "POST", place.url + CHAT, json=chat(stream=True, play="wait"), timeout=5, verify=False
    ) as answer:
        pieces, found = answer.iter_raw(), b""
        while found != EVENTS[0] + EVENTS[1]:
            found += next(pieces)
        assert not place.upstream.go_on.is_set()  # the rest is not written yet
        place.upstream.go_on.set()
        assert found + b"".join(pieces) == b"".join([*EVENTS, DONE])
    assert answer.headers["content-type"].startswith("text/event-stream")


def test_fifty_streams_at_once_lose_nothing(place):
    async def one(client: httpx2.AsyncClient, number: int) -> tuple[bytes, str]:
        body = chat("a" * number, stream=True, play="slow")
        answer = await client.post(place.url + CHAT, json=body)
        return answer.content, answer.headers["x-dylora-moe-expert"]

    async def all_of_them():
        async with httpx2.AsyncClient(verify=False, timeout=10, limits=httpx2.Limits()) as client:
            return await asyncio.gather(*(one(client, number) for number in range(50)))

    whole = b"".join([*EVENTS, DONE])
    assert asyncio.run(all_of_them()) == [(whole, f"expert_{number % 3}") for number in range(50)]
    wait_for(lambda: place.gateway.metrics.in_flight == 0)


def test_more_requests_at_once_than_allowed_are_refused(place):
    gateway, body = place.other(max_requests=1), chat(stream=True, play="slow")
    assert sorted(answer.status_code for answer in asked_of(gateway, body, body, together=True)) == [200, 503]
    assert [answer.status_code for answer in asked_of(place.other(max_requests=1), body, body)] == [200, 200]


def test_errors_of_the_server_are_passed_on_as_they_are(place):
    answer = place.post(chat(play="error"))
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "3")
    assert answer.json() == {"error": {"message": "slow down"}}


def test_a_server_that_is_gone_or_slow_is_told(place):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
    gone = place.other(upstream=url)
    (answer,) = asked_of(gone, chat())
    assert (answer.status_code, answer.json()["error"]["code"]) == (502, "upstream_unreachable")
    (answer,) = asked_of(place.other(timeout=0.1), chat(play="hang"))
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "upstream_timeout")
    assert httpx2.get(place.url + "/health", verify=False).json() == {"status": "ok"}

    async def health():
        transport = httpx2.ASGITransport(gone.app())
        async with httpx2.AsyncClient(transport=transport, base_url="http://gateway") as client:
            return await client.get("/health")

    assert asyncio.run(health()).status_code == 503


def test_a_stream_that_is_cut_is_not_taken_for_a_whole_one(place):
    found = b""
    with (
        pytest.raises(httpx2.RemoteProtocolError),
        httpx2.stream("POST", place.url + CHAT, json=chat(stream=True, play="cut"), timeout=5, verify=False) as answer,
    ):
        for piece in answer.iter_raw():
            found += piece
    assert found.startswith(EVENTS[0] + EVENTS[1])
    (event,) = re.findall(rb"\n\ndata: (\{\"error\".*)\n\n$", found)
    assert json.loads(event)["error"]["code"] == "upstream_closed"


@pytest.mark.parametrize("body", [chat(play="hang"), chat(stream=True, play="wait")])
def test_a_client_that_hangs_up_ends_the_request_of_the_server(place, body):
    before = place.gateway.metrics.errors[499]
    with pytest.raises(httpx2.ReadTimeout):
        place.post(body, timeout=0.1)
    assert place.upstream.hung_up.wait(5)
    wait_for(lambda: place.gateway.metrics.errors[499] == before + 1)


def test_the_metrics_count_requests_tokens_and_errors(place):
    gateway = place.other()
    asked_of(gateway, chat("four"), chat("fives", stream=True), {"messages": 1}, chat("fives", play="error"))
    lines = gateway.metrics.text().splitlines()
    assert [line for line in lines if not line.startswith("#")] == [
        'dylora_moe_requests_total{expert="expert_0"} 0',
        'dylora_moe_requests_total{expert="expert_1"} 1',
        'dylora_moe_requests_total{expert="expert_2"} 2',
        'dylora_moe_tokens_total{expert="expert_1",kind="completion"} 3',
        'dylora_moe_tokens_total{expert="expert_1",kind="prompt"} 7',
        'dylora_moe_tokens_total{expert="expert_2",kind="completion"} 6',  # events
        'dylora_moe_tokens_total{expert="expert_2",kind="prompt"} 11',
        'dylora_moe_errors_total{status="400"} 1',
        'dylora_moe_errors_total{status="429"} 1',
        "dylora_moe_requests_in_flight 0",
    ]
    page = httpx2.get(place.url + "/metrics", verify=False)
    assert page.text.startswith("# HELP dylora_moe_requests_total") and page.text.endswith("\n")
    assert page.headers["content-type"].startswith("text/plain; version=0.0.4")


def test_a_body_that_comes_too_slowly_is_refused(place, monkeypatch):
    monkeypatch.setattr(module, "BODY_SECONDS", 0.05)
    host, port = place.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n"
        connection.sendall(head.encode())
        assert connection.recv(1000).startswith(b"HTTP/1.1 408")


SERVE = """
import sys
from dylora_moe.cli.commands.gateway import _listener, _serve
from dylora_moe.serving.gateway import Settings
listener = _listener("127.0.0.1", 0)
print(listener.getsockname()[1], flush=True)
_serve(None, Settings(sys.argv[1], "vllm", 3), listener)
print("ended", "torch" in sys.modules)
"""


def test_sigterm_lets_a_stream_end_first(place):
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, place.settings.upstream], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        url = f"http://127.0.0.1:{int(process.stdout.readline())}"
        body = chat(model="expert_0", stream=True, play="wait")
        with httpx2.stream("POST", url + CHAT, json=body, timeout=10, verify=False) as answer:
            pieces = answer.iter_raw()
            found = next(pieces)
            os.kill(process.pid, signal.SIGTERM)

            def refused() -> bool:
                try:
                    return httpx2.get(url + "/metrics", timeout=5, verify=False) is None
                except httpx2.TransportError:
                    return True

            wait_for(refused)
            place.upstream.go_on.set()
            assert found + b"".join(pieces) == b"".join([*EVENTS, DONE])
        out, _ = process.communicate(timeout=10)
    finally:
        process.kill()
    assert process.returncode == 0
    assert out.splitlines()[1:] == ["ended False"]

"""What the gateway adds to the answer of a server: of one request after another, and of many streams at once.

python -m benchmarks.gateway
python -m benchmarks.gateway --json benchmarks/results/gateway.json

The server, a process of its own, answers at once. The gateway is compared with the client's request to the server
itself, and with the least that a proxy of the same packages does: a bare one reads no request and chooses nothing. All
share the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx2

from dylora_moe.base.preserve import fresh_base

from . import common, models
from .common import Case, Result

EXPERTS, R = 4, 8
ROUNDS, QUICK_ROUNDS = 40, 2
REQUESTS = 5  # of one repetition
STREAMS = 50  # at once
PIECES = 20  # of a stream
ADDED_LIMIT = 2.0  # ms, in the median
PROMPT = "The quick brown fox jumps over the lazy dog. "
PROMPTS = {"64 tokens": 6, "1,000 tokens": 100}  # how often the prompt has the sentence
DIRECT, BARE, NAMED = "without the gateway", "through a bare proxy", "expert named by the client"
# Both programs listen on a port that is free, and print it.
SERVE = """
import socket, uvicorn
listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
print(listener.getsockname()[1], flush=True)
uvicorn.Server(uvicorn.Config(app, log_level="critical", http="h11", lifespan="off")).run(sockets=[listener])
"""
# A server that answers every completion at once.
SERVER = f"""
import json
from starlette.applications import Starlette
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route
PIECE = b"data: " + json.dumps({{"choices": [{{"text": "word"}}]}}).encode() + b"\\n\\n"
async def stream():
    for _ in range({PIECES}):
        yield PIECE
    yield b"data: [DONE]\\n\\n"
async def answer(request):
    if (await request.json()).get("stream"):
        return StreamingResponse(stream(), media_type="text/event-stream")
    return JSONResponse({{"choices": [{{"text": "words"}}], "usage": {{"prompt_tokens": 4, "completion_tokens": 1}}}})
app = Starlette(routes=[Route("/v1/completions", answer, methods=["POST"])])
{SERVE}"""
# A proxy that hands every request on as it is.
PROXY = f"""
import sys, httpx2
upstream = httpx2.AsyncHTTPTransport(trust_env=False)
async def app(scope, receive, send):
    message = await receive()
    body = message["body"]
    while message["more_body"]:
        message = await receive()
        body += message["body"]
    request = httpx2.Request(scope["method"], sys.argv[1] + scope["path"], headers=scope["headers"], content=body)
    answer = await upstream.handle_async_request(request)
    headers = [(name, value) for name, value in answer.headers.raw if name.lower() not in (b"date", b"server")]
    await send({{"type": "http.response.start", "status": answer.status_code, "headers": headers}})
    async for piece in answer.stream:
        await send({{"type": "http.response.body", "body": piece, "more_body": True}})
    await send({{"type": "http.response.body"}})
    await answer.aclose()
{SERVE}"""


def main(argv: Sequence[str] | None = None) -> int:
    return common.run("gateway", __doc__, measure, argv, models.add_model_flags)


def measure(args: argparse.Namespace, result: Result) -> None:
    rounds = args.rounds or (QUICK_ROUNDS if args.quick else ROUNDS)
    with tempfile.TemporaryDirectory(prefix="dylora_benchmark_") as name:
        folder = Path(name)
        base, _ = models.saved_base(args, folder / "base", result.settings)
        model = models.build_ours(fresh_base(base), EXPERTS, R)
        model.mark_mature()
        checkpoint = model.save_checkpoint(folder / "checkpoint-1", step=1)
        with (
            program(SERVER) as upstream,
            program(PROXY, upstream) as bare,
            gateway(checkpoint, folder / "base", upstream) as proxy,
        ):
            one_by_one(upstream, bare, proxy, rounds, result)
            streams({DIRECT: upstream, BARE: bare, "through the gateway": proxy}, args.quick, result)


# ---- the processes ----


@contextmanager
def program(code: str, *arguments: str) -> Iterator[str]:
    with process([sys.executable, "-c", code, *arguments]) as running:
        yield f"http://127.0.0.1:{int(running.stdout.readline())}"


@contextmanager
def gateway(checkpoint: Path, base: Path, upstream: str, engine: str = "vllm") -> Iterator[str]:
    words = ["gateway", str(checkpoint), "--base", str(base), "--upstream", upstream, "--engine", engine, "--port", "0"]
    with process([sys.executable, "-m", "dylora_moe", *words]) as running:
        yield running.stdout.readline().split()[1].removesuffix("/v1")


@contextmanager
def process(command: list[str]) -> Iterator[subprocess.Popen]:
    running = subprocess.Popen(command, cwd=common.ROOT, stdout=subprocess.PIPE, text=True)
    try:
        yield running
    finally:
        running.terminate()
        running.communicate()


# ---- what is measured ----


def body(repeats: int, model: str = "mixture", **options: object) -> dict:
    return {"model": model, "prompt": PROMPT * repeats, "max_tokens": 1, **options}


def one_by_one(upstream: str, bare: str, proxy: str, rounds: int, result: Result) -> None:
    with httpx2.Client(trust_env=False) as client:
        cases = {DIRECT: request(client, upstream, body(1)), BARE: request(client, bare, body(1))}
        cases[NAMED] = request(client, proxy, body(1, "expert_1"))
        cases |= {f"routed, {name}": request(client, proxy, body(count)) for name, count in PROMPTS.items()}
        timings = common.interleaved(cases, rounds)
    title = f"One request after another, median of {rounds} times {REQUESTS}"
    table = result.table("requests", title, ["", "an answer", "added", "beyond a bare proxy"])
    took = {name: timing.median * 1000 for name, timing in timings.items()}  # ms
    for name in timings:
        added = "" if name == DIRECT else f"{took[name] - took[DIRECT]:.2f} ms"
        beyond = "" if name in (DIRECT, BARE) else f"{took[name] - took[BARE]:.2f} ms"
        table.add(name, f"{took[name]:.2f} ms", added, beyond)
    for name in (NAMED, f"routed, {next(iter(PROMPTS))}"):
        result.claim(f"added to an answer, {name}", took[name] - took[DIRECT], ADDED_LIMIT, "ms")


def request(client: httpx2.Client, url: str, content: dict) -> Case:
    """Seconds of one of several requests, their median."""

    def run() -> float:
        seconds = []
        for _ in range(REQUESTS):
            started = time.perf_counter()
            client.post(f"{url}/v1/completions", json=content, timeout=60).raise_for_status()
            seconds.append(time.perf_counter() - started)
        return statistics.median(seconds)

    return Case(run)


def streams(urls: dict[str, str], quick: bool, result: Result) -> None:
    count = 4 if quick else STREAMS
    table = result.table(
        "streams", f"{count} streams at once, {PIECES} pieces each", ["", "first piece", "last piece", "pieces lost"]
    )
    for name, url in urls.items():
        found = asyncio.run(read_streams(url, count))
        first, last = (statistics.median(seconds[i] for seconds in found) for i in (0, 1))
        lost = count * PIECES - sum(int(seconds[2]) for seconds in found)
        table.add(name, common.seconds(first), common.seconds(last), str(lost))
        result.check(f"pieces lost, {name}", lost, 0)


async def read_streams(url: str, count: int) -> list[tuple[float, float, float]]:
    """Seconds to the first and to the last piece of each stream, and the number of its pieces."""
    limits = httpx2.Limits(max_connections=None)
    async with httpx2.AsyncClient(trust_env=False, limits=limits, timeout=60) as client:

        async def read() -> tuple[float, float, float]:
            started, moments = time.perf_counter(), []
            async with client.stream("POST", f"{url}/v1/completions", json=body(6, stream=True)) as answer:
                async for line in answer.aiter_lines():
                    if line.startswith("data: {") and json.loads(line[6:])["choices"][0]["text"] == "word":
                        moments.append(time.perf_counter() - started)
            return moments[0], moments[-1], float(len(moments))

        return await asyncio.gather(*(read() for _ in range(count)))


if __name__ == "__main__":
    raise SystemExit(main())

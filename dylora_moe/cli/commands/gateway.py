"""`dylora-moe gateway`: an OpenAI-compatible proxy in front of vLLM or llama.cpp that chooses each request's expert."""

from __future__ import annotations

import argparse
import re
import signal
import socket
from argparse import Namespace
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from ...constants import MIB
from ...errors import UsageError
from ...system.command_line import PASSED, number, path, say, text
from ..colours import named
from ..flags import add_base_flag
from ..prompts import Prompt, chat, clean, encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ...serving.gate_table import GateTable
    from ...serving.gateway import Settings
    from ...serving.requests import Text

ENGINES = ("vllm", "llama.cpp")
INSTALL = "dylora-moe gateway needs more packages; install them with\n    pip install -r requirements-gateway.txt"


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Answers as the OpenAI API does: the router chooses an expert for each prompt, and the request goes to a "
        "server that has the experts as adapters, which `dylora-moe export` writes. A request whose model is expert_0, "
        "expert_1 and so on gets that one. Of the base model, only the input embeddings are read."
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=path)
    parser.add_argument("--upstream", metavar="URL", required=True, type=_url, help="as in http://127.0.0.1:8000")
    parser.add_argument("--engine", choices=ENGINES, default="vllm", help="which server it is (default: vllm)")
    parser.add_argument("--host", default="127.0.0.1", type=text, help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", default=8080, type=number(int, 0, 65535), help="0 for any that is free (8080)")
    parser.add_argument("--max-body", metavar="MIB", default=4, type=number(float, above=0), help="of a request (4)")
    parser.add_argument(
        "--max-requests", metavar="N", default=256, type=number(int, 1), help="answered at the same time (256)"
    )
    parser.add_argument(
        "--timeout",
        metavar="SECONDS",
        default=300,
        type=number(float, above=0),
        help="that the server may be silent, and that answers may take to end after SIGTERM (300)",
    )
    add_base_flag(parser)


def run(args: Namespace) -> int:
    try:
        import httpx2  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ModuleNotFoundError:
        raise UsageError(INSTALL) from None
    listener = _listener(args.host, args.port)

    from ...serving.gateway import Settings

    with listener:
        chooser = load_chooser(args)
        experts = chooser.gate.num_experts
        settings = Settings(
            args.upstream, args.engine, experts, int(args.max_body * MIB), args.max_requests, args.timeout
        )
        host = f"[{args.host}]" if ":" in args.host else args.host
        say(f"gateway: http://{host}:{listener.getsockname()[1]}/v1 for {args.upstream} ({args.engine})")
        say(f"experts: {', '.join(named(expert, chooser.skills) for expert in range(experts))}")
        _serve(chooser.choose, settings, listener)
    say("gateway: ended")
    return PASSED


def _serve(choose: Callable[[Text], tuple[int, int]], settings: Settings, listener: socket.socket) -> None:
    """Serve until SIGTERM or Ctrl-C, and until the answers that have begun are complete."""
    import uvicorn

    from ...serving.gateway import Gateway

    def log(line: str) -> None:
        with suppress(OSError):  # whoever read standard output may have gone
            say(line)

    config = uvicorn.Config(
        Gateway(settings, choose, log).app(),
        log_config=None,
        log_level="critical",  # the gateway says itself what goes wrong
        access_log=False,
        server_header=False,
        proxy_headers=False,
        http="h11",
        ws="none",
        limit_concurrency=2 * settings.max_requests + 64,  # connections
        timeout_graceful_shutdown=max(1, round(settings.timeout)),
    )
    # uvicorn raises the signal again once it has ended: it has done what it was for.
    before = [(one, signal.signal(one, lambda number, frame: None)) for one in (signal.SIGTERM, signal.SIGINT)]
    try:
        uvicorn.Server(config).run(sockets=[listener])
    finally:
        for one, handler in before:
            signal.signal(one, handler)


@dataclass(frozen=True)
class Chooser:
    """What is left of a mixture to choose experts by.

    Args:
        skills: the names of those of each expert.
    """

    tokenizer: PreTrainedTokenizerBase
    gate: GateTable
    skills: list[str]

    def choose(self, asked: Text) -> tuple[int, int]:
        """Return the expert that an answer begins with, and the number of tokens of the prompt.

        Raises:
            UsageError: if the chat template refuses the chat, or there is no token that the base model knows.
        """
        from ..mixtures import check_known

        if isinstance(asked, str):
            ids = encode(Prompt(clean(asked), "text"), self.tokenizer, raw=True)
        elif isinstance(asked[0], int):
            ids = asked
            if max(ids) >= self.gate.tokens:
                raise UsageError(
                    f"prompt: found the token {max(ids)}; the vocabulary of the base model ends at {self.gate.tokens}"
                )
        else:
            prompt = chat([one.but(content=clean(one.content)) for one in asked])
            ids = encode(prompt, self.tokenizer, raw=False)
        check_known(ids, self.gate.tokens)
        return self.gate.expert(ids), len(ids)


def load_chooser(args: Namespace) -> Chooser:
    from ...serving.gate_table import GateTable  # torch takes seconds to import
    from ..mixtures import load_router

    loaded = load_router(args)
    return Chooser(loaded.tokenizer, GateTable(loaded.model), loaded.skills)


def _url(value: str) -> str:
    """An argparse type for the URL of a server, with or without /v1."""
    value = text(value).rstrip("/").removesuffix("/v1")
    try:
        parts = urlsplit(value)
        sound = (
            parts.scheme in ("http", "https") and re.fullmatch(r"[\w.:%-]+", parts.hostname or "") and parts.port != 0
        )
    except ValueError:
        sound = False
    if not sound or parts.username or parts.password or parts.query or parts.fragment:
        # Without the value, since it may hold a password.
        raise argparse.ArgumentTypeError("expected a URL such as http://127.0.0.1:8000, without a password or a query")
    return value


def _listener(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=2048)
        # Its connections inherit it. Without it, the second piece of an answer waits 40 ms for the client's ACK.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listener
    except OSError as error:
        raise UsageError(
            f"cannot listen on {host}, port {port} ({error.strerror or error}); say another --host or --port"
        ) from None

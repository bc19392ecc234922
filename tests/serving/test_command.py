"""`dylora-moe gateway`: its flags, and the expert that it chooses, which is that of `dylora-moe route`."""

from __future__ import annotations

import io
import json
import socket
import sys

import pytest
import torch

from dylora_moe import DyLoRAMoE, RouterConfig
from dylora_moe.cli.commands import gateway
from dylora_moe.cli.main import main
from dylora_moe.data.chat import Message
from dylora_moe.errors import UsageError
from dylora_moe.serving.gate_table import GateTable
from dylora_moe.stages.measure import routing_weights

from ..support.runs import material
from ..support.tiny import random_ids, randomise, tiny_base, tiny_mixture

URL = "http://127.0.0.1:9"
TEXTS = ["the router sends each token", "def f(x):\n    return x", "1 2 3 4", "zzz", "!", "SELECT a FROM b"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    model = randomise(
        DyLoRAMoE.from_base(str(material() / "base"), 3, router=RouterConfig(decay=0.5, prior_tokens=2.0))
    )
    model.mark_mature()
    return model.save_checkpoint(tmp_path_factory.mktemp("run") / "checkpoint-1", step=1)


@pytest.fixture
def started(checkpoint, monkeypatch, capsys):
    """What `_serve` is given by the command, and what that prints."""
    given = []
    monkeypatch.setattr(gateway, "_serve", lambda *all_of_them: given.extend(all_of_them))
    code = main(["gateway", str(checkpoint), "--upstream", f"{URL}/v1/", "--port", "0", "--max-body", "0.5"])
    out, err = capsys.readouterr()
    assert code == 0, err
    return (*given, out)


def test_the_command_tells_where_it_listens_and_what_it_serves(started):
    _, settings, listener, out = started
    assert (settings.upstream, settings.engine, settings.experts, settings.max_body) == (URL, "vllm", 3, 2**19)
    first, second, last = out.splitlines()
    assert first.startswith("gateway: http://127.0.0.1:") and first.endswith(f"/v1 for {URL} (vllm)")
    assert (second, last) == ("experts: expert_0, expert_1, expert_2", "gateway: ended")
    assert listener.fileno() == -1  # closed


def test_it_chooses_as_route_does(started, checkpoint, capsys, monkeypatch):
    choose, *_ = started
    lines = [{"text": text} for text in TEXTS] + [{"messages": [{"role": "user", "content": text}]} for text in TEXTS]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(map(json.dumps, lines))))
    assert main(["route", str(checkpoint), "--json", "-"]) == 0
    expected = [(one["expert"], one["tokens"]) for one in json.loads(capsys.readouterr().out)["texts"]]
    asked = [*TEXTS, *([Message({"role": "user", "content": text})] for text in TEXTS)]
    assert [choose(one) for one in asked] == expected
    assert len({expert for expert, _ in expected}) > 1

    ids = choose.__self__.tokenizer(TEXTS[0])["input_ids"]
    assert choose(ids) == expected[0]
    with pytest.raises(UsageError, match=r"prompt: found the token .*vocabulary of the base model ends"):
        choose([1, 2**30])


@pytest.mark.parametrize("kind", ["llama", "gemma"])  # the latter scales its embeddings
def test_the_table_routes_as_the_mixture_does(kind):
    model = tiny_mixture(kind, router=RouterConfig(decay=0.9, prior_tokens=3.0, temperature=0.7))
    table = GateTable(model)
    for length in (1, 2, 40, 300):
        ids = random_ids(length).tolist()
        weights = routing_weights(model, {"input_ids": ids})[-1]
        torch.testing.assert_close(torch.from_numpy(table.logits(ids)).softmax(-1), weights, rtol=0, atol=1e-5)
    other = [*ids[:-1], ids[-1] - 1]
    assert abs(table.logits(other) - table.logits(ids)).max() > 1e-3


def test_an_expert_that_was_not_trained_is_not_chosen():
    model = DyLoRAMoE(tiny_base(), 3)
    with torch.no_grad():
        model.router.prior.copy_(torch.tensor([1.0, 2.0, 3.0]))
        assert GateTable(model).expert([1]) == 2  # none was
        for expert in (0, 1):
            for tensor in model.expert_tensors(expert).values():
                tensor.fill_(0.1)
    assert GateTable(model).expert([1]) == 1


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--upstream", "localhost:8000"], "expected a URL such as"),
        (["--upstream", "http://me:secret@host"], "expected a URL such as"),
        (["--upstream", "http://host:99999999"], "expected a URL such as"),
        (["--upstream", "http://a b"], "expected a URL such as"),
        (["--upstream", URL, "--engine", "ollama"], "invalid choice"),
        (["--upstream", URL, "--max-requests", "0"], "at least 1"),
        (["--upstream", URL, "--host", "256.1.1.1"], "cannot listen on 256.1.1.1"),
        ([], "--upstream"),
    ],
)
def test_flags_that_are_wrong_are_told(flags, told, capsys):
    assert main(["gateway", "nowhere", *flags]) == 2
    error = capsys.readouterr().err
    assert told in error and "secret" not in error


def test_pieces_of_answers_do_not_wait():
    def delays(listener: socket.socket) -> bool:
        with listener, socket.create_connection(listener.getsockname()), listener.accept()[0] as accepted:
            return not accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)

    assert not delays(gateway._listener("127.0.0.1", 0))
    assert delays(socket.create_server(("127.0.0.1", 0)))


def test_a_port_that_is_taken_and_packages_that_are_missing_are_told(capsys, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["gateway", "nowhere", "--upstream", URL, "--port", port]) == 2
    assert f"cannot listen on 127.0.0.1, port {port}" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "starlette", None)
    assert main(["gateway", "nowhere", "--upstream", URL]) == 2
    assert "pip install -r requirements-gateway.txt" in capsys.readouterr().err

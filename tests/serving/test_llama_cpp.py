"""The gateway in front of a real llama.cpp server, on SmolLM2 with random experts."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import gguf
import httpx2
import numpy as np
import pytest
import torch
from gguf.quants import dequantize

from benchmarks.gateway import gateway, process
from dylora_moe import DyLoRAMoE, MoELoraConfig
from dylora_moe.base.preserve import seeded
from dylora_moe.cli.main import main
from dylora_moe.editing.export import export_for_llama_cpp

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("xllamacpp") is None, reason="needs llama.cpp: pip install -r requirements-slow.txt"
    ),
]
EXPERTS, TOP, LENGTH = 3, 20, 12
CHATS = [
    [{"role": "user", "content": 9 * text}]
    for text in (
        "How do I sort a list?",
        "Name a colour.",
        "int main(void) {",
        "Wer ist da?",
        "2 + 2 =",
        "The king said:",
    )
]
# Its address is its first line.
SERVER = """
import sys, threading, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel, params.port, params.warmup = sys.argv[1], 1024, 1, 0, False
params.lora_init_without_apply = True
params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(path, 0.0) for path in sys.argv[2:]]
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
threading.Event().wait()
"""


@dataclass(frozen=True)
class Place:
    model: DyLoRAMoE
    checkpoint: Path
    server: str  # URLs
    gateway: str


@pytest.fixture(scope="module")
def place(smollm_gguf, tmp_path_factory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("llama")
    lora = MoELoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules="all-linear")
    model = DyLoRAMoE.from_base(str(smollm_gguf), EXPERTS, lora=lora, dtype="float32").eval()
    with seeded(0), torch.no_grad():
        for name, parameter in model.trained_parameters().items():
            if "lora_B" in name:
                parameter.normal_(std=0.08)
        model.router.gate.weight.normal_(std=0.5)
    model.mark_mature()
    checkpoint = model.save_checkpoint(folder / "checkpoint-1", step=1)
    adapters = export_for_llama_cpp(checkpoint, folder / "served").adapters.values()
    base = in_float32(smollm_gguf, folder / "base.gguf")
    with process([sys.executable, "-c", SERVER, str(base), *adapters]) as running:
        server = running.stdout.readline().strip()
        with gateway(checkpoint, smollm_gguf, server, "llama.cpp") as proxy:
            yield Place(model, checkpoint, server, proxy)


def in_float32(source: Path, path: Path) -> Path:
    """Write a GGUF file without quantization: llama.cpp rounds what it multiplies with a quantized weight, too."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(path, reader.get_field("general.architecture").contents())
    for field in reader.fields.values():
        if field.name != "general.architecture" and not field.name.startswith("GGUF."):
            item = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            value = 0 if field.name == "general.file_type" else field.contents()
            writer.add_key_value(field.name, value, field.types[0], sub_type=item)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def ask(url: str, path: str = "/v1/chat/completions", **body: object) -> httpx2.Response:
    answer = httpx2.post(url + path, json={"temperature": 0, "max_tokens": LENGTH} | body, timeout=120)
    return answer.raise_for_status()


def said(answer: httpx2.Response) -> str:
    return answer.json()["choices"][0]["message"]["content"]


def scales(expert: int) -> list[dict]:
    return [{"id": i, "scale": float(i == expert)} for i in range(EXPERTS)]


@torch.no_grad()
def test_an_expert_says_what_it_says_in_the_mixture(place):
    ids = torch.randint(100, 40_000, (1, 48), generator=torch.Generator().manual_seed(1))
    own = [place.model(ids, expert=i).logits[0, -1].log_softmax(-1) for i in range(EXPERTS)]
    for expert in range(EXPERTS):
        body = {"prompt": ids[0].tolist(), "n_probs": TOP, "logprobs": TOP, "max_tokens": 1, "temperature": 1}
        answer = ask(place.gateway, "/v1/completions", model=f"expert_{expert}", **body)
        assert answer.headers["x-dylora-moe-expert"] == f"expert_{expert}"
        top = answer.json()["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        found = {one["id"]: one["logprob"] for one in top}
        assert len(found) == TOP
        off = [max(abs(logprobs[i].item() - value) for i, value in found.items()) for logprobs in own]
        assert off.pop(expert) < 0.01 and min(off) > 0.2, off


def test_the_router_chooses_who_answers(place, capsys):
    chosen, told = [], []
    for chat in CHATS:
        answer = ask(place.gateway, messages=chat)
        chosen.append(int(answer.headers["x-dylora-moe-expert"].removeprefix("expert_")))
        told.append([said(ask(place.server, messages=chat, lora=scales(i))) for i in range(EXPERTS)])
        assert said(answer) == told[-1][chosen[-1]]
    assert len(set(chosen)) > 1 and len(set(zip(*told, strict=True))) == EXPERTS
    assert main(["route", str(place.checkpoint), CHATS[0][0]["content"], "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["texts"][0]["expert"] == chosen[0]


def test_a_stream_says_the_same_and_errors_are_passed_on(place):
    whole = said(ask(place.gateway, messages=CHATS[0]))
    body = {"messages": CHATS[0], "temperature": 0, "max_tokens": LENGTH, "stream": True}
    with httpx2.stream("POST", f"{place.gateway}/v1/chat/completions", json=body, timeout=120) as answer:
        events = [line[6:] for line in answer.iter_lines() if line.startswith("data: ")]
    assert events.pop() == "[DONE]"
    deltas = [choice["delta"] for event in events for choice in json.loads(event)["choices"]]
    assert len(deltas) > 3 and "".join(delta.get("content") or "" for delta in deltas) == whole

    wrong = {"messages": CHATS[0], "response_format": {"type": "nothing"}}
    answers = [httpx2.post(f"{url}/v1/chat/completions", json=wrong) for url in (place.server, place.gateway)]
    assert answers[0].status_code == answers[1].status_code >= 400 and answers[0].json() == answers[1].json()

"""What vLLM answers with the plugin, held against what DyLoRA-MoE computes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from typing import Any

import pytest
from dylora_moe_vllm.checkpoint import BASE_VARIABLE

from .conftest import Run, engine, greedy, largest_difference, on_the_hub, prompt_logprobs

TOLERANCE = 2e-4  # of a log-probability in float32
SEEN = 0.5  # what wrong weights of the experts change at the least
KINDS = ("llama", "one_expert", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3")


@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_mixture(runs: dict[str, Run], kind: str) -> None:
    """Prompts of 1 to 400 tokens in one batch, computed at most 64 tokens at a time, and once more from the cache."""
    reference = runs[kind].reference
    prompts = reference["prompts"]
    for wrong in ("expert_0", "uniform") if kind != "one_expert" else ("expert_0",):
        assert largest_difference(reference[wrong], reference["routed"]) > SEEN
    with engine(runs[kind].checkpoint, max_num_batched_tokens=64, max_num_seqs=8, enable_prefix_caching=True) as llm:
        assert largest_difference(prompt_logprobs(llm, prompts), reference["routed"]) < TOLERANCE
        llm.reset_prefix_cache()
        for known in (False, True):
            ids, values, cached = greedy(llm, prompts, len(reference["greedy"][0]))
            assert ids == reference["greedy"]
            assert largest_difference(values, reference["greedy_logprobs"]) < TOLERANCE
            assert cached[4] == (96 if known else 0)


def test_compiled_and_with_another_router(runs: dict[str, Run]) -> None:
    """torch.compile, prompts in one piece; then a router that does not prefer any expert."""
    run = runs["llama"]
    reference = run.reference
    prompts = reference["prompts"]
    with engine(run.checkpoint, enforce_eager=False, max_num_batched_tokens=2048, enable_prefix_caching=False) as llm:
        assert largest_difference(prompt_logprobs(llm, prompts), reference["routed"]) < TOLERANCE
        assert llm.apply_model(_is_compiled) == [True]
        llm.apply_model(_forget_router)
        found = prompt_logprobs(llm, prompts)
        assert largest_difference(found, reference["uniform"]) < TOLERANCE
        assert largest_difference(found, reference["routed"]) > SEEN


def test_weights_in_bfloat16(runs: dict[str, Run]) -> None:
    """The KV cache holds the router's state in the dtype of the model. All experts of this checkpoint take part."""
    run = runs["gemma2"]
    prompt, expected = run.reference["prompts"][5], run.reference["probabilities"][5]
    with engine(run.checkpoint, dtype="bfloat16", max_num_batched_tokens=512) as llm:
        prompt_logprobs(llm, [prompt])
        found = llm.apply_model(_weights)[0][: len(prompt)].tolist()
    assert largest_difference(found, expected) < 0.02
    assert largest_difference(found[1:], expected[:-1]) > 0.1


def test_from_the_hub(runs: dict[str, Run], monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint in the cache of the Hub."""
    run = runs["qwen3"]
    on_the_hub(run.folder, "mixture")
    with pytest.raises(ValueError, match=BASE_VARIABLE), engine("user/mixture"):
        pass
    monkeypatch.setenv(BASE_VARIABLE, str(run.folder / "base"))
    with engine("user/mixture") as llm:
        found = prompt_logprobs(llm, run.reference["prompts"])
    assert largest_difference(found, run.reference["routed"]) < TOLERANCE


def test_served(runs: dict[str, Run]) -> None:
    """The server of vLLM, in a process of its own. It finds the tokenizer in the run folder."""
    run = runs["llama"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", f"--model={run.checkpoint}"]
    command += ["--dtype=float32", "--enforce-eager", "--host=127.0.0.1", f"--port={port}"]
    server = subprocess.Popen(command, env=os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"})
    try:
        found = _ask(server, port, run)
    finally:
        server.terminate()
        server.wait(60)
    reference = run.reference
    assert found["token_logprobs"][:8] == pytest.approx(reference["greedy_logprobs"][2], abs=TOLERANCE)


def _ask(server: subprocess.Popen, port: int, run: Run) -> dict[str, Any]:
    """Ask for the tokens after a prompt, as soon as the server is up."""
    body = {"model": run.checkpoint, "prompt": run.reference["prompts"][2], "max_tokens": 8, "temperature": 0}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions",
        json.dumps(body | {"logprobs": 0, "ignore_eos": True}).encode(),
        {"Content-Type": "application/json"},
    )
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(request) as answer:
                return json.loads(answer.read())["choices"][0]["logprobs"]
        except urllib.error.URLError as error:
            if isinstance(error, urllib.error.HTTPError):
                raise
            time.sleep(1)
    raise AssertionError(f"the server has ended with {server.poll()}, or was not up in time")


def _is_compiled(model: Any) -> bool:
    return not model.base.model.do_not_compile and model.base.model.compiled


def _forget_router(model: Any) -> None:
    for buffer in (model.route.gate, model.route.bias, model.route.prior):
        buffer.zero_()


def _weights(model: Any) -> Any:
    return model.weights.clone()

"""The tests run in an environment with vLLM; the project's own one makes their checkpoints and references."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
PYTHON = os.environ.get("DYLORA_PYTHON", str(ROOT / ".venv/bin/python"))

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine runs in this process, where tests can look into it
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_CI_ENV": "1",  # a compiled model is traced, and not turned into C++, which takes minutes
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_HOME": tempfile.mkdtemp(prefix="dylora_moe_vllm_"),
}


@dataclass(frozen=True)
class Run:
    """A run folder of make_models.py."""

    folder: Path

    @property
    def checkpoint(self) -> str:
        return str(self.folder / "checkpoint")

    @property
    def reference(self) -> dict[str, Any]:
        return json.loads((self.folder / "reference.json").read_text())


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """The run folders by the kind of base model."""
    folder = tmp_path_factory.mktemp("models")
    script = Path(__file__).with_name("make_models.py")
    subprocess.run([PYTHON, str(script), str(folder)], check=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    return {path.name: Run(path) for path in sorted(folder.iterdir())}


def on_the_hub(run: Path, name: str) -> Path:
    """Put the checkpoint of a run folder into the cache of the Hub as user/name, and return its folder there."""
    repository, revision = Path(os.environ["HF_HOME"]) / f"hub/models--user--{name}", "0" * 40
    folder = shutil.copytree(run / "checkpoint", repository / "snapshots" / revision)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(revision)
    return Path(folder)


@contextmanager
def engine(checkpoint: str, **options: Any) -> Iterator[Any]:
    """An engine that serves a checkpoint inside the block."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    defaults = {"dtype": "float32", "max_model_len": 480, "block_size": 32, "enforce_eager": True}
    llm = LLM(checkpoint, skip_tokenizer_init=True, seed=0, **defaults | options)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()


def prompt_logprobs(llm: Any, prompts: list[list[int]]) -> list[list[float]]:
    """The log-probability of each token of a prompt but the first, all prompts in one batch."""
    outputs = _generate(llm, prompts, max_tokens=1, prompt_logprobs=0)
    return [
        [values[token].logprob for values, token in zip(output.prompt_logprobs[1:], prompt[1:], strict=True)]
        for output, prompt in zip(outputs, prompts, strict=True)
    ]


def greedy(llm: Any, prompts: list[list[int]], tokens: int) -> tuple[list[list[int]], list[list[float]], list[int]]:
    """The tokens after each prompt, their log-probabilities, and how many tokens of the prompt were in the cache."""
    outputs = _generate(llm, prompts, max_tokens=tokens, logprobs=0)
    ids = [list(output.outputs[0].token_ids) for output in outputs]
    found = []
    for output, tokens_of in zip(outputs, ids, strict=True):
        found.append([v[t].logprob for v, t in zip(output.outputs[0].logprobs, tokens_of, strict=True)])
    return ids, found, [output.num_cached_tokens for output in outputs]


def _generate(llm: Any, prompts: list[list[int]], **options: Any) -> list[Any]:
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, ignore_eos=True, detokenize=False, **options)
    return llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)


def largest_difference(found: list[list[float]], expected: list[list[float]]) -> float:
    assert list(map(len, found)) == list(map(len, expected))
    largest = max(abs(a - b) for x, y in zip(found, expected, strict=True) for a, b in zip(x, y, strict=True))
    print(f"largest difference: {largest:.1e}")
    return largest

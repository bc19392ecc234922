"""Training runs of a tiny model, in this process, and what two of them have in common."""

from __future__ import annotations

import atexit
import functools
import json
import random
import shutil
import signal
import tempfile
from pathlib import Path

import train
from dylora_moe.base.preserve import seeded
from dylora_moe.base.tiny import byte_tokenizer
from dylora_moe.store import run_folder

TEXT = "the router sends each token of a text to experts that know its kind and learns from what they make of it"


@functools.cache
def material() -> Path:
    """A folder with a tiny base model with a tokenizer of bytes (`base`), and two data sets."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = Path(tempfile.mkdtemp(prefix="dylora_test_runs_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    tokenizer = byte_tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=64, initializer_range=0.1, **sizes, **ids)
    with seeded(0):
        LlamaForCausalLM(config).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    for name, seed in (("one", 1), ("two", 2)):
        draw = random.Random(seed)
        texts = [" ".join(draw.choices(TEXT.split(), k=20)) for _ in range(6)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


def arguments(run_dir: Path, *more: str, steps: int = 12) -> list[str]:
    """Flags of a run of half a second, in which 5 steps are an epoch."""
    folder = material()
    fixed = f"--experts 2 --lora-r 4 --lora-dropout 0.1 --block-size 32 --batch-size 8 --max-steps {steps} --device cpu"
    steps_flags = "--save-steps 4 --logging-steps 5 --learning-rate 5e-3"
    data = ["--data", f"{folder / 'one.jsonl'}=2", "--data", str(folder / "two.jsonl")]
    words = ["--model", str(folder / "base"), *data, *fixed.split(), *steps_flags.split()]
    return [*words, "--output-dir", str(run_dir), *more]


def steps(run_dir: Path) -> list[int]:
    return [found.step for found in run_folder.checkpoints(run_dir)]


def newest(run_dir: Path) -> Path:
    return run_folder.latest(run_dir).path


def states(checkpoint: Path) -> list[str]:
    return [expert["state"] for expert in json.loads((checkpoint / "config.json").read_text())["experts"]]


def trainer_state(checkpoint: Path) -> dict:
    return json.loads((checkpoint / "trainer_state.json").read_text())


def contents(checkpoint: Path) -> dict[str, bytes]:
    return {str(p.relative_to(checkpoint)): p.read_bytes() for p in checkpoint.rglob("*") if p.is_file()}


# What differs where a signal has kept the last held-out losses from being measured: --resume measures them.
UNMEASURED = ("manifest.json", "skill_library.safetensors")


def assert_same(one: Path, other: Path, but: tuple[str, ...] = ()) -> None:
    """Every file of two checkpoints, but those, has the same bytes; there is no clock time in any."""
    a, b = contents(one), contents(other)
    assert sorted(a) == sorted(b)
    different = [name for name in a if a[name] != b[name] and name not in but]
    assert different == [], different


def signal_at(monkeypatch, event: str, step: int, number: int = signal.SIGTERM) -> None:
    """Send this process a signal, once, at an event of the Trainer while `step` steps are done."""
    sent = []

    def send(self, args, state, control, **kwargs):
        if state.global_step == step and not sent:
            sent.append(step)
            signal.raise_signal(number)

    monkeypatch.setattr(train.PeftCheckpointCallback, event, send, raising=False)

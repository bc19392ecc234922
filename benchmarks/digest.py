"""Digests of what the package computes and writes, to compare two versions of the code with each other.

python -m benchmarks.digest --json before.json       in a checkout of the version before
python -m benchmarks.digest --against before.json    in a checkout of the version after: exit code 1 where they differ

For five tiny model families: the logits in evaluation, the gradients of one training pass, the losses of six training
steps, and every file of the checkpoint that these leave. The digests depend on the processor and on the versions of
torch and Transformers, so that only those from one machine can be compared.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedConfig,
    Qwen2Config,
    TrainingArguments,
)

from dylora_moe import DyLoRAMoE, MoELoraConfig, MoETrainer, PeftCheckpointCallback, RouterConfig

from .common import RIGHT, WRONG

STEPS, ROWS, TOKENS, VOCABULARY = 6, 4, 48, 97
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
HEADS = {"num_attention_heads": 4, "max_position_embeddings": 64}
# Family: its config, the number of experts (many enough to be dispatched in one of them), gradient checkpointing.
FAMILIES: dict[str, tuple[PreTrainedConfig, int, bool]] = {
    "gemma": (GemmaConfig(**SIZES, **IDS, **HEADS, num_key_value_heads=2, head_dim=8), 3, False),
    "llama": (LlamaConfig(**SIZES, **IDS, **HEADS, num_key_value_heads=2), 16, False),
    "qwen2": (Qwen2Config(**SIZES, **IDS, **HEADS, num_key_value_heads=2), 4, True),
    "gpt2": (GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=3, n_head=4, n_positions=64, **IDS), 3, False),
    "gpt_neox": (GPTNeoXConfig(**SIZES, **IDS, **HEADS), 1, False),
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--json", type=Path, help="write the digests to this file")
    parser.add_argument("--against", type=Path, help="compare with the digests in this file")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    found = {family: digests_of(*parts) for family, parts in FAMILIES.items()}
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if args.against is None:
        return RIGHT
    differences = list(compare(json.loads(args.against.read_text(encoding="utf-8")), found))
    for line in differences:
        print(line)
    compared = sum(len(family) for family in found.values())
    print(f"{compared} digests compared, {len(differences)} differ")
    return WRONG if differences else RIGHT


def compare(before: dict[str, dict], after: dict[str, dict]) -> Iterable[str]:
    """A line for each digest that is not the same."""
    for family in sorted(before.keys() | after.keys()):
        old, new = before.get(family, {}), after.get(family, {})
        for name in sorted(old.keys() | new.keys()):
            if old.get(name) != new.get(name):
                yield f"{family}: {name}: {old.get(name, 'nothing')} before, {new.get(name, 'nothing')} after"


def digests_of(config: PreTrainedConfig, experts: int, gradient_checkpointing: bool) -> dict[str, str]:
    """Every digest of one family, by a name that says what it is of."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config).eval()
    model = DyLoRAMoE(base, experts, lora=MoELoraConfig(r=16, lora_dropout=0.1), router=RouterConfig())
    with torch.no_grad():
        for parameter in model.trained_parameters().values():
            parameter.normal_(std=0.1)
    model.mark_mature()
    rows = torch.randint(3, VOCABULARY, (STEPS * ROWS, TOKENS), generator=torch.Generator().manual_seed(1))
    found = dict(_evaluation(model, rows[:ROWS]))
    if gradient_checkpointing:
        model.gradient_checkpointing_enable()
    found |= dict(_gradients(model, rows[:ROWS]))
    return found | dict(_training(model, rows))


def _evaluation(model: DyLoRAMoE, ids: torch.Tensor) -> Iterable[tuple[str, str]]:
    model.eval()
    with torch.no_grad():
        yield "logits, routed", _digest([model(ids).logits])
        yield "logits, one token", _digest([model(ids[:1, :1]).logits])
        for expert in range(model.num_experts):
            yield f"logits, expert {expert} alone", _digest([model(ids, expert=expert).logits])
    yield "tokens, generated", _digest([model.generate(ids[:1, :8], max_new_tokens=8, do_sample=False)])


def _gradients(model: DyLoRAMoE, ids: torch.Tensor) -> Iterable[tuple[str, str]]:
    model.train()
    torch.manual_seed(2)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    yield "loss", repr(loss.item())
    yield "gradients", _digest(p.grad for p in model.parameters() if p.grad is not None)
    model.zero_grad()


def _training(model: DyLoRAMoE, rows: torch.Tensor) -> Iterable[tuple[str, str]]:
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            output_dir=folder, max_steps=STEPS, per_device_train_batch_size=ROWS, learning_rate=1e-2, logging_steps=1,
            save_strategy="steps", save_steps=STEPS, report_to="none", use_cpu=True, seed=3,
            remove_unused_columns=False, label_names=["labels"], disable_tqdm=True, dataloader_pin_memory=False,
            log_level="error",
        )  # fmt: skip
        data = [{"input_ids": row, "labels": row} for row in rows]
        trainer = MoETrainer(
            model=model, args=settings, train_dataset=data, eval_dataset=data[:2], callbacks=[PeftCheckpointCallback()]
        )
        trainer.callback_handler.callbacks = [
            callback for callback in trainer.callback_handler.callbacks if "Progress" not in type(callback).__name__
        ]
        trainer.train()
        for entry in trainer.state.log_history:
            if "loss" in entry:
                yield f"loss, step {entry['step']}", repr((entry["loss"], entry["grad_norm"]))
        checkpoint = Path(folder, f"checkpoint-{STEPS}")
        for path in sorted(checkpoint.rglob("*")):
            if path.is_file() and path.name not in ("manifest.json", "trainer_state.json"):  # times, and their hash
                yield path.relative_to(checkpoint).as_posix(), hashlib.sha256(path.read_bytes()).hexdigest()


def _digest(tensors: Iterable[torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(str(tuple(tensor.shape)).encode() + tensor.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


if __name__ == "__main__":
    raise SystemExit(main())

"""The trainers of TRL train a mixture: experts and router move, and the callback saves what was trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from dylora_moe import DyLoRAMoE, MoELoraConfig, PeftCheckpointCallback, UsageError
from dylora_moe.base.preserve import seeded

from ..support.data import chat_tokenizer
from ..support.tiny import randomise

trl = pytest.importorskip("trl")
pytestmark = pytest.mark.slow

CHATS = [
    {
        "prompt": [{"role": "user", "content": f"what is {n}?"}],
        "chosen": [{"role": "assistant", "content": f"it is {n}"}],
        "rejected": [{"role": "assistant", "content": "no"}],
    }
    for n in range(8)
]
TEXTS = Dataset.from_list([{"messages": row["prompt"] + row["chosen"]} for row in CHATS])
PAIRS = Dataset.from_list(CHATS)


@pytest.fixture
def base_folder(tmp_path) -> Path:
    """A folder with a Llama that has all tokens of the tests' tokenizer, and that tokenizer."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    with seeded(0):
        base = LlamaForCausalLM(LlamaConfig(vocab_size=264, **sizes, max_position_embeddings=256))
    base.save_pretrained(tmp_path / "base")
    chat_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def mixture_on(folder: Path) -> DyLoRAMoE:
    return DyLoRAMoE.from_base(str(folder), 2, lora=MoELoraConfig(r=4))


def settings(kind, tmp_path: Path, **more):
    return kind(
        tmp_path / "run", max_steps=3, per_device_train_batch_size=2, learning_rate=0.01, save_strategy="no",
        report_to=[], disable_tqdm=True, logging_steps=1, bf16=False, **more,
    )  # fmt: skip


def moved(model: DyLoRAMoE, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}


def copies(model: DyLoRAMoE) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_experts_and_router_are_trained_and_saved(kind, base_folder, tmp_path):
    model = mixture_on(base_folder)
    before = copies(model)
    if kind == "sft":
        trainer = trl.SFTTrainer(model, settings(trl.SFTConfig, tmp_path), train_dataset=TEXTS,
                                 processing_class=chat_tokenizer(), callbacks=[PeftCheckpointCallback()])  # fmt: skip
    else:
        trainer = trl.DPOTrainer(model, args=settings(trl.DPOConfig, tmp_path), train_dataset=PAIRS,
                                 processing_class=chat_tokenizer(), callbacks=[PeftCheckpointCallback()])  # fmt: skip
    assert trainer.args.gradient_checkpointing
    trainer.train()
    assert moved(model, before) == set(model.trained_parameters())
    assert any(name.startswith("router") for name in model.trained_parameters())
    if kind == "sft":
        assert all(entry["aux_loss"] > 0 for entry in trainer.state.log_history if "loss" in entry)
    loaded = DyLoRAMoE.from_pretrained(tmp_path / "run")
    assert moved(loaded, copies(model)) == set()
    assert loaded.expert_states == ["mature", "mature"]


def test_the_peft_model_alone_is_refused(base_folder, tmp_path):
    model = mixture_on(base_folder)
    trainer = trl.SFTTrainer(model.peft_model, settings(trl.SFTConfig, tmp_path), train_dataset=TEXTS,
                             processing_class=chat_tokenizer())  # fmt: skip
    with pytest.raises(UsageError, match="Hand the mixture to the trainer"):
        trainer.train()


@pytest.mark.parametrize("load", [DyLoRAMoE.from_pretrained, DyLoRAMoE.from_checkpoint])
def test_the_reference_of_a_loaded_mixture_is_that_mixture(base_folder, tmp_path, load):
    """TRL loads it again, by the class that the config names."""
    model = load(randomise(mixture_on(base_folder)).save_pretrained(tmp_path / "mixture"))
    trainer = trl.DPOTrainer(model, args=settings(trl.DPOConfig, tmp_path), train_dataset=PAIRS)
    assert isinstance(trainer.ref_model, DyLoRAMoE) and trainer.ref_model is not model
    assert moved(trainer.ref_model, copies(model)) == set() != moved(mixture_on(base_folder), copies(model))

"""The PEFT model that a mixture is on, changed by PEFT's own methods: noticed, or without an effect on the mixture."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig

from dylora_moe import DyLoRAMoE, MoELoraConfig, UsageError
from dylora_moe.mixture.experts import Injector
from dylora_moe.store.lock import LOCK

from ..support.tiny import random_ids, tiny_base, tiny_mixture


def changed(model, change):
    peft = model.peft_model
    changes = {
        "merge_and_unload": peft.merge_and_unload,
        "unload": peft.unload,
        "merge_adapter": peft.merge_adapter,
        "delete_adapter": lambda: peft.delete_adapter("expert_1"),
        "add_adapter": lambda: peft.add_adapter("mine", LoraConfig(r=2, target_modules=["down_proj"])),
        "add_weighted_adapter": lambda: peft.add_weighted_adapter(["expert_0", "expert_1"], [1.0, 1.0], "mine"),
    }
    changes[change]()


CHANGES = {
    "merge_and_unload": "experts were unloaded from it, or merged",
    "unload": "experts were unloaded from it, or merged",
    "merge_adapter": r"merged into the base model: unmerge_adapter\(\)",
    "delete_adapter": r"experts were deleted from it \(expert_1\)",
    "add_adapter": r"other adapters \(mine\): delete_adapter removes them",
    "add_weighted_adapter": r"other adapters \(mine\)",
}


@pytest.mark.parametrize("change", CHANGES)
def test_it_is_noticed_before_anything_is_computed_or_written(change, tmp_path):
    model, ids = tiny_mixture(), random_ids(1, 4)
    changed(model, change)
    uses = {
        "forward": lambda: model(ids),
        "generate": lambda: model.generate(ids, max_new_tokens=1),
        "save": lambda: model.save_checkpoint(tmp_path / "checkpoint-1"),
        "export": lambda: model.export_expert(0, tmp_path / "lora"),
        "add_expert": model.add_expert,
    }
    for use, call in uses.items():
        with pytest.raises(UsageError, match=f"changed behind it:\n.*{CHANGES[change]}"):
            call()
        assert {path.name for path in tmp_path.iterdir()} <= {LOCK}, use


@pytest.mark.parametrize("change", ["merge_adapter", "add_adapter", "add_weighted_adapter"])
def test_what_the_message_advises_helps(change):
    model, ids = tiny_mixture(), random_ids(1, 4)
    expected = model(ids).logits
    changed(model, change)
    model.peft_model.unmerge_adapter() if change == "merge_adapter" else model.peft_model.delete_adapter("mine")
    assert torch.allclose(model(ids).logits, expected, atol=1e-5)


def test_without_the_check_an_empty_adapter_would_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr(Injector, "check", lambda self, training=False: None)
    model = tiny_mixture()
    model.peft_model.merge_and_unload()
    model.export_expert(0, tmp_path / "lora")
    assert model.expert_tensors(0) == {}


def test_adapters_that_are_disabled_are_not_trained():
    """Outside of training, PEFT's disable_adapter shows the base model, as users of PEFT know it."""
    model, ids = tiny_mixture(), random_ids(1, 4)
    with model.peft_model.disable_adapter():
        assert torch.equal(model(ids).logits, tiny_base()(ids).logits)
        with pytest.raises(UsageError, match="its adapters are disabled"):
            model.train()(ids, labels=ids)
    model(ids, labels=ids)


def test_which_adapter_is_active_has_no_effect_on_what_is_computed_or_saved(tmp_path):
    model, ids = tiny_mixture(), random_ids(1, 4)
    expected = model(ids).logits
    model.peft_model.set_adapter("expert_1")
    assert torch.equal(model(ids).logits, expected)
    model.save_checkpoint(tmp_path / "a")
    assert torch.equal(DyLoRAMoE.from_checkpoint(tmp_path / "a", tiny_base())(ids).logits, expected)


# ---- the base stays frozen ----


def frozen(model):
    return [name for name, p in model.base.named_parameters() if p.requires_grad and "lora_" not in name] == []


def test_nothing_thaws_the_base(tmp_path):
    model = tiny_mixture("gpt2", experts=2, lora=MoELoraConfig(r=2, target_modules=["c_attn"]))
    model.save_checkpoint(tmp_path / "a")
    model.add_expert(MoELoraConfig(r=2, target_modules=["c_fc"]))  # wraps layers, whose parameters have new names
    assert frozen(model)
    assert sorted(name for name, p in model.named_parameters() if p.requires_grad) == sorted(model.trained_parameters())
    model.peft_model.set_adapter("expert_0")
    model.add_expert()
    trains = [any(p.requires_grad for p in model.expert_tensors(i).values()) for i in range(4)]
    assert frozen(model) and trains == [True, False, False, True]
    model.requires_grad_(True)
    assert not frozen(model)
    model.train_all_experts()
    assert frozen(model)
    model.base.resize_token_embeddings(103)
    assert frozen(model)
    assert frozen(DyLoRAMoE.from_checkpoint(tmp_path / "a", tiny_base("gpt2").requires_grad_(True)))


def test_an_optimizer_with_more_than_experts_and_router_is_refused():
    model = tiny_mixture()
    message = r"(?s)would change the base model, which is frozen; .*\n  - .*embed_tokens"
    for more in (model.parameters(), [*model.trained_parameters().values(), model.get_input_embeddings().weight]):
        with pytest.raises(UsageError, match=message):
            model.check_optimizer(torch.optim.AdamW(more))
    model.check_optimizer(torch.optim.AdamW(model.trained_parameters().values()))
    alone = tiny_mixture(experts=1)
    gate = alone.router.gate.weight  # which has no effect with one expert
    alone.check_optimizer(torch.optim.AdamW([*alone.trained_parameters().values(), gate]))

"""Several experts in one: the exact sum, the nearest of a smaller rank, and the sum in the base model's weights."""

from __future__ import annotations

import pytest
import torch
from peft.tuners.lora import LoraLayer
from transformers.pytorch_utils import Conv1D

from dylora_moe import DyLoRAMoE, MoELoraConfig, UsageError
from dylora_moe.stages.merging import combined

from ..support.tiny import random_ids, randomise, tiny_base, tiny_mixture

WEIGHTS = [0.5, 0.3, 0.2]


def updates(model: DyLoRAMoE, weights: list[float]) -> dict[str, torch.Tensor]:
    """The weighted sum of the experts' updates (d_out, d_in) in float64, by layer."""
    found = {}
    for path, layer in model.routed_layers():
        parts = [
            weight * layer.scaling[name] * layer.lora_B[name].weight.double() @ layer.lora_A[name].weight.double()
            for weight, name in zip(weights, [f"expert_{i}" for i in range(len(weights))], strict=True)
            if name in layer.lora_A
        ]
        found[path] = sum(parts) if parts else None
    return found


def configs() -> list[MoELoraConfig]:
    """Of three experts that differ in rank, scaling and layers."""
    some = {"lora_dropout": 0.0}
    return [
        MoELoraConfig(r=4, lora_alpha=8, **some),
        MoELoraConfig(r=2, lora_alpha=3, use_rslora=True, **some),
        MoELoraConfig(r=3, lora_alpha=8, target_modules=["q_proj", "down_proj"], **some),
    ]


@torch.no_grad()
def test_one_lora_of_all_ranks_is_the_exact_sum():
    model = randomise(DyLoRAMoE(tiny_base(), configs()))
    one = model.collapse(WEIGHTS, rank=99)
    there, here = updates(model, WEIGHTS), updates(one, [1.0])
    assert there.keys() == here.keys() and len(here) == 3 * 5
    for path in there:
        assert (there[path] - here[path]).abs().max() < 1e-6, path
    assert one.expert_configs[0].r == 9  # q_proj has all three
    other = updates(model.collapse([0.5, 0.2, 0.3], rank=99), [1.0])
    assert max((there[path] - other[path]).abs().max() for path in there) > 1e-3


@torch.no_grad()
def test_a_smaller_rank_is_the_nearest():
    model = tiny_mixture(experts=3)
    there, (expert, held) = updates(model, WEIGHTS), combined(model, dict(enumerate(WEIGHTS)))
    here = updates(model.collapse(WEIGHTS), [1.0])
    kept = whole = 0.0
    for path, update in there.items():
        u, s, v = torch.linalg.svd(update)
        assert (here[path] - (u[:, :4] * s[:4]) @ v[:4]).abs().max() < 1e-6, path
        kept, whole = kept + s[:4].square().sum().item(), whole + s.square().sum().item()
    assert expert.config.r == 4 and 0.3 < held < 0.99
    assert held == pytest.approx(kept / whole)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_base_with_the_sum_in_its_weights(kind):
    model, ids = tiny_mixture(kind, experts=3), random_ids(2, 9)
    before = model(ids).logits
    merged = model.merge_and_unload(WEIGHTS)
    assert type(merged) is type(tiny_base(kind)) and not any(isinstance(m, LoraLayer) for m in merged.modules())
    assert any(isinstance(m, Conv1D) for m in merged.modules()) == (kind == "gpt2")
    exact = model.collapse(WEIGHTS, rank=99)(ids).logits
    assert (merged(ids).logits - exact).abs().max() < 1e-4
    assert (merged(ids).logits - tiny_base(kind)(ids).logits).abs().max() > 1e-2
    assert torch.equal(model(ids).logits, before)  # the mixture is as it was


@torch.no_grad()
def test_one_expert_in_the_weights_is_what_peft_makes_of_it(tmp_path):
    from peft import PeftModel

    model, ids = tiny_mixture(experts=2), random_ids(2, 9)
    model.export_expert(1, tmp_path / "one")
    stock = PeftModel.from_pretrained(tiny_base(), tmp_path / "one").merge_and_unload()
    assert (model.merge_and_unload([0, 1])(ids).logits - stock(ids).logits).abs().max() < 1e-5


@torch.no_grad()
def test_experts_that_were_never_trained_have_no_part():
    model = tiny_mixture(experts=2)
    for name, tensor in model.expert_tensors(1).items():
        if ".lora_B." in name:
            tensor.zero_()
    ids = random_ids(2, 9)
    assert (model.collapse()(ids).logits - model(ids, expert=0).logits).abs().max() < 1e-5
    with pytest.raises(UsageError, match="no expert of this mixture was trained"):
        DyLoRAMoE(tiny_base(), 2).merge_and_unload()


def test_what_merging_costs_is_measured():
    model = tiny_mixture(experts=2)
    documents = [random_ids(12, seed=seed).tolist() for seed in range(3)] + [[5], []]
    cost = model.merge_cost(documents)
    losses = []
    for each in (model, model.collapse(rank=99)):
        with torch.no_grad():
            parts = [each(torch.tensor([ids]), labels=torch.tensor([ids])).lm_loss.item() for ids in documents[:3]]
        losses.append(sum(parts) / 3)
    assert cost == pytest.approx(losses, rel=1e-5)
    assert abs(cost.mixture - cost.merged) > 1e-3
    assert model.merge_cost(documents, [1, 0]) != cost
    with pytest.raises(UsageError, match="there is no document of two tokens"):
        model.merge_cost([[5]])


@pytest.mark.parametrize("weights", [[1.0], [0, 0], [1, float("nan")], []])
def test_weights_that_do_not_fit(weights):
    with pytest.raises(UsageError, match="expected a weight for each of the 2 experts"):
        tiny_mixture(experts=2).collapse(weights)


def test_a_base_that_cannot_take_them_up(monkeypatch):
    model = tiny_mixture(experts=2)
    monkeypatch.setattr("dylora_moe.stages.merging.quantization", lambda base: {"load_in_4bit": True})
    with pytest.raises(UsageError, match=r"quantized: its weights cannot .* collapse\(\)"):
        model.merge_and_unload()
    with pytest.raises(UsageError, match="no weights here"):
        DyLoRAMoE(tiny_base().to("meta"), 2).merge_and_unload([1, 1])

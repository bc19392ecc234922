"""Plain LoRA training, the same for every method that benchmarks.learning compares.

AdamW with a linear schedule, one learning rate for all; the experts differ in which rows they are trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dylora_moe import DyLoRAMoE, MoELoraConfig
from dylora_moe.base.preserve import fresh_base, seeded

WARMUP = 0.03  # of the steps
CLIP = 1.0  # norm of the gradient


@dataclass(frozen=True)
class Recipe:
    """What is the same for every method.

    Args:
        rank: of one expert; alpha is twice as much.
        rows: of a batch.
        rate: the peak learning rate.
        trunk: the share of a skill's rows that the trunk is trained on.
    """

    rank: int = 8
    rows: int = 4
    rate: float = 1e-3
    trunk: float = 0.5

    def lora(self, times: int = 1) -> MoELoraConfig:
        rank = self.rank * times
        return MoELoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules="all-linear")


def mixture(base, experts: int, recipe: Recipe, seed: int, times: int = 1) -> DyLoRAMoE:
    """A mixture on a base whose tensors are shared; each expert has `times` the recipe's rank."""
    with seeded(seed):
        return DyLoRAMoE(fresh_base(base), experts, lora=recipe.lora(times))


def train(model: DyLoRAMoE, expert: int, batches: Sequence[torch.Tensor], recipe: Recipe) -> list[float]:
    """Train one expert, one step for each batch (B, T); return the losses before each step."""
    parameters = list(model.expert_tensors(expert).values())
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.0)
    warmup = max(1, round(WARMUP * len(batches)))
    losses = []
    model.train()
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate * min((step + 1) / warmup, 1 - step / len(batches))
        loss = model(batch, labels=batch, expert=expert).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        model.zero_grad(set_to_none=True)  # of the other experts, too: a forced expert gives them zeros
        losses.append(loss.item())
    model.eval()
    return losses


def mixed(pools: Sequence[torch.Tensor], rows: int) -> list[torch.Tensor]:
    """Batches of rows of all skills in turns."""
    return list(torch.stack(pools, 1).flatten(0, 1).split(rows))


def copy_expert(model: DyLoRAMoE, source: int, target: int) -> None:
    pairs = zip(model.expert_tensors(source).values(), model.expert_tensors(target).values(), strict=True)
    with torch.no_grad():
        for theirs, own in pairs:
            own.copy_(theirs)


# ---- the methods ----


def jointly(base, pools: dict[str, torch.Tensor], recipe: Recipe, seed: int) -> DyLoRAMoE:
    """One LoRA of all experts' parameters, trained on everything at once."""
    model = mixture(base, 1, recipe, seed, times=len(pools))
    train(model, 0, mixed(list(pools.values()), recipe.rows), recipe)
    return model


def in_turn(base, pools: dict[str, torch.Tensor], recipe: Recipe, seed: int) -> DyLoRAMoE:
    """One LoRA of all experts' parameters, trained on one skill after the other."""
    model = mixture(base, 1, recipe, seed, times=len(pools))
    for pool in pools.values():
        train(model, 0, pool.split(recipe.rows), recipe)
    return model


def specialise(model: DyLoRAMoE, pools: dict[str, torch.Tensor], recipe: Recipe) -> None:
    """A trunk on everything, its copy in each expert, and then each expert on its own skill."""
    cut = {name: round(len(pool) * recipe.trunk / recipe.rows) * recipe.rows for name, pool in pools.items()}
    train(model, 0, mixed([pool[: cut[name]] for name, pool in pools.items()], recipe.rows), recipe)
    for expert in range(1, len(pools)):
        copy_expert(model, 0, expert)
    for expert, (name, pool) in enumerate(pools.items()):
        train(model, expert, pool[cut[name] :].split(recipe.rows), recipe)


def grow(model: DyLoRAMoE, nearest: int, pool: torch.Tensor, recipe: Recipe) -> int:
    """Add an expert that begins as a copy of the nearest one, and train it on its skill."""
    expert = model.add_expert()
    copy_expert(model, nearest, expert)
    train(model, expert, pool.split(recipe.rows), recipe)
    return expert

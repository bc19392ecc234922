"""The methods that benchmarks.learning compares: training by train.py itself, and plain LoRAs on the same blocks."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, get_scheduler

from dylora_moe import DyLoRAMoE, MoELoraConfig, RouterConfig
from dylora_moe.base.preserve import fresh_base, seeded
from dylora_moe.checkpoint.formats import SKILLS
from dylora_moe.data.blocks import load_blocks
from dylora_moe.data.sources import DataSpec
from dylora_moe.skills.features import collect
from dylora_moe.skills.fit import fit_router
from dylora_moe.skills.library import Skill, SkillLibrary
from dylora_moe.stages.batches import BlockCollator
from dylora_moe.stages.setup import sizes_of
from dylora_moe.system.interrupts import handled
from dylora_moe.training.run import execute
from dylora_moe.training.settings import TrainSettings

from .texts import Corpus

WARMUP = 0.03  # of the steps; like the other settings here, train.py's default
CLIP = 1.0  # norm of the gradient
Batch = dict[str, Any]  # as BlockCollator makes it


@dataclass(frozen=True)
class Recipe:
    """What is the same for every method.

    Args:
        steps: for each skill.
        rank: of one expert; alpha is twice as much.
        rows: of a batch.
        length: of a row, in tokens.
        rate: the peak learning rate.
    """

    steps: int
    rank: int = 8
    rows: int = 4
    length: int = 128
    rate: float = 1e-3


@dataclass(frozen=True)
class Task:
    """What is to be learned.

    Args:
        base: the base model, and `folder` where it is saved.
        data: the training file of each skill.
        held_out: a file of one held-out document, which train.py must have; it is not measured on.
    """

    base: PreTrainedModel
    tokenizer: Any
    folder: Path
    data: dict[str, Path]
    held_out: dict[str, Path]
    recipe: Recipe
    seed: int

    @property
    def skills(self) -> list[str]:
        return list(self.data)

    def mixture(self, rank: int) -> DyLoRAMoE:
        """A mixture of one expert on the base, whose tensors are shared."""
        lora = MoELoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules="all-linear")
        with seeded(self.seed):
            return DyLoRAMoE(fresh_base(self.base), 1, lora=lora)


def write_data(folder: Path, found: dict[str, Corpus], tokenizer: Any, recipe: Recipe, seed: int) -> tuple[dict, dict]:
    """Write as much of each skill as its steps take; return the files of the training and of the held-out texts."""
    data, held_out = {}, {}
    for name, corpus in found.items():
        documents, left, texts = list(corpus.train), recipe.steps * recipe.rows * recipe.length, []
        random.Random(f"{seed} {name}").shuffle(documents)
        while left > 0:
            for document in documents:
                ids = tokenizer(document, add_special_tokens=False)["input_ids"]
                texts.append(document if len(ids) < left else tokenizer.decode(ids[:left]))
                left -= len(ids) + 1
                if left <= 0:
                    break
        data[name] = _write(folder / f"{name}.jsonl", texts)
        held_out[name] = _write(folder / "held_out" / f"{name}.jsonl", corpus.held_out[:1])
    return data, held_out


def _write(path: Path, texts: Sequence[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


# ---- plain LoRAs ----


def read_pools(task: Task) -> dict[str, list[dict]]:
    """The blocks of each skill, those that train.py makes of the files."""
    specs = {name: DataSpec.parse(str(path)) for name, path in task.data.items()}
    held_out = [DataSpec.parse(str(path)) for path in task.held_out.values()]
    recipe, pools = task.recipe, {}
    for name, spec in specs.items():
        blocks = load_blocks(
            [spec], task.tokenizer, block_size=recipe.length, seed=task.seed, mixing="proportional", eval_specs=held_out
        )
        pools[name] = list(blocks.train)[: recipe.steps * recipe.rows]
    return pools


def jointly(task: Task, experts: int) -> DyLoRAMoE:
    """One LoRA with the parameters of so many experts, trained on everything at once."""
    model, pools = task.mixture(task.recipe.rank * experts), read_pools(task)
    mixed = [block for blocks in zip(*pools.values(), strict=False) for block in blocks]
    train(model, batches(mixed, task.recipe.rows), task.recipe.rate)
    return model


def in_turn(task: Task) -> DyLoRAMoE:
    """One LoRA of all experts' parameters, trained on one skill after the other."""
    model = task.mixture(task.recipe.rank * len(task.data))
    for blocks in read_pools(task).values():
        train(model, batches(blocks, task.recipe.rows), task.recipe.rate)
    return model


def batches(blocks: Sequence[dict], rows: int) -> list[Batch]:
    return [BlockCollator()(blocks[start : start + rows]) for start in range(0, len(blocks), rows)]


def train(model: DyLoRAMoE, found: Sequence[Batch], rate: float) -> list[float]:
    """Train the only expert of a mixture, one step for each batch; return the loss before each step."""
    parameters = list(model.trained_parameters().values())
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    warmup = max(1, round(WARMUP * len(found)))
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=warmup, num_training_steps=len(found))
    losses = []
    model.train()
    for batch in found:
        loss = model(**batch, expert=0).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


# ---- mixtures ----


@dataclass(frozen=True)
class Trained:
    """A mixture that train.py has trained. `experts`: of each skill, but for those that were taken for known ones."""

    model: DyLoRAMoE
    experts: dict[str, int]


def specialised(task: Task, run_dir: Path, say: Callable[[str], None]) -> Trained:
    """A mixture with an expert for each skill, all of which are known from the beginning."""
    return _trained(task, run_dir, task.skills, say)


def grown(task: Task, run_dir: Path, first: int, say: Callable[[str], None]) -> Iterator[Trained]:
    """A mixture that begins with some skills and gets the others one after another; after each stage, the mixture."""
    yield _trained(task, run_dir, task.skills[:first], say)
    for name in task.skills[first:]:
        yield _trained(task, run_dir, [name], say, grow=True)


def refitted(task: Task, run_dir: Path) -> Iterator[Trained]:
    """The mixtures of a run's checkpoints, the oldest first, with a router fitted anew to their skills' text."""
    pools = read_pools(task)
    for path in sorted(run_dir.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2])):
        model = DyLoRAMoE.from_checkpoint(path, base=fresh_base(task.base)).eval()
        model.router.config = RouterConfig(top_k=model.router.config.top_k)
        sizes = sizes_of(model, 0)._replace(states=1)  # states are not for the router
        library, experts = SkillLibrary(), {skill.name: skill.expert for skill in SkillLibrary.load(path / SKILLS)}
        for name, expert in experts.items():
            library.update(Skill(name, expert, features=collect(model, pools[name], sizes).features), sizes)
        fit_router(model.router, library)
        yield Trained(model, experts)


def _trained(
    task: Task, run_dir: Path, skills: Sequence[str], say: Callable[[str], None], grow: bool = False
) -> Trained:
    recipe = task.recipe
    fresh: dict[str, Any] = {
        "model": str(task.folder),
        "experts": len(skills),
        "lora_r": recipe.rank,
        "lora_alpha": 2 * recipe.rank,
        "lora_dropout": 0.0,
        "targets": ("all-linear",),
    }
    settings = TrainSettings(
        data=tuple(str(task.data[name]) for name in skills),
        mixing="proportional",
        eval_data=tuple(str(task.held_out[name]) for name in skills),
        eval_blocks=1,
        block_size=recipe.length,
        learning_rate=recipe.rate,
        batch_size=recipe.rows,
        max_steps=recipe.steps * len(skills),
        seed=task.seed,
        device="cpu",
        save_steps=0,
        output_dir=str(run_dir),
        grow=grow,
        **({} if grow else fresh),
    )
    with handled():
        result = execute(settings, say, say)
    if result.saved is None:
        raise RuntimeError(f"{run_dir}: training has saved nothing")
    model = DyLoRAMoE.from_checkpoint(result.saved, base=fresh_base(task.base)).eval()
    library = SkillLibrary.load(result.saved / SKILLS)
    return Trained(model, {skill.name: skill.expert for skill in library})

"""A small checkpoint with experts and skills, for the tests of what is made of it."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from pathlib import Path

import torch

from dylora_moe import DyLoRAMoE, MoELoraConfig, SkillLibrary
from dylora_moe.checkpoint.read import read_skills
from dylora_moe.checkpoint.verify import open_checkpoint
from dylora_moe.skills.fit import fit_router
from dylora_moe.skills.library import Skill
from dylora_moe.stages.setup import Trained, add_skill, sizes_of

from .runs import material
from .tiny import randomise

SKILLS = ("one", "two", "three")
WIDTH = 60  # ids of each skill's tokens


def base_name() -> str:
    return str(material() / "base")


def text_of(skill: int, seed: int = 0, documents: int = 16) -> list[list[int]]:
    """Documents of tokens that only this skill has."""
    generator = torch.Generator().manual_seed(seed)
    first = 3 + WIDTH * skill
    return torch.randint(first, first + WIDTH, (documents, 60), generator=generator).tolist()


def some_ids(seed: int = 0) -> torch.Tensor:
    """(2, 9) token ids of all skills."""
    return torch.randint(3, 3 + 3 * WIDTH, (2, 9), generator=torch.Generator().manual_seed(seed))


@functools.cache
def checkpoint() -> Path:
    """A checkpoint of step 7 with three mature experts, each with a skill."""
    folder = Path(tempfile.mkdtemp(prefix="dylora_test_edits_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    lora = MoELoraConfig(r=4, lora_alpha=8, lora_dropout=0.0)
    model = randomise(DyLoRAMoE.from_base(base_name(), 3, lora=lora))
    library = SkillLibrary()
    for index, name in enumerate(SKILLS):
        add_skill(model, library, Trained(name, index), [{"input_ids": ids} for ids in text_of(index)])
        library.update(Skill(name, loss=1.0 + index), sizes_of(model, index))
    fit_router(model.router, library)
    model.mark_mature([0, 1, 2])
    return model.save_checkpoint(folder / "run" / "checkpoint-7", step=7, skills=library)


@functools.cache
def joint() -> Path:
    """A checkpoint as after --route joint, of two experts without skills of their own; the second was never trained."""
    folder = checkpoint().parent.parent / "joint" / "checkpoint-1"
    model = randomise(DyLoRAMoE.from_base(base_name(), 2, lora=MoELoraConfig(r=4, lora_dropout=0.0)))
    with torch.no_grad():
        for name, tensor in model.expert_tensors(1).items():
            if ".lora_B." in name:
                tensor.zero_()
    return model.save_checkpoint(folder)


@functools.cache
def old_model() -> DyLoRAMoE:
    return DyLoRAMoE.from_checkpoint(checkpoint())


def skills(folder: Path) -> dict[str, tuple[int | None, float | None]]:
    """Each skill's expert and loss."""
    return {skill.name: (skill.expert, skill.loss) for skill in read_skills(open_checkpoint(folder))}


@torch.no_grad()
def logits(model: DyLoRAMoE, expert: int | None = None) -> torch.Tensor:
    return model(some_ids(), expert=expert).logits

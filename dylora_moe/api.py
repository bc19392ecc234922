"""`DyLoRAMoE`: the mixture as users know it, built on a base model by name, read from checkpoints and saved to them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from .base.find import find_base
from .base.load import load_base
from .base.preserve import seeded
from .checkpoint.read import load_mixture
from .checkpoint.write import export_expert, save_checkpoint
from .mixture.config import MoELoraConfig, RouterConfig
from .mixture.model import Mixture
from .skills.library import SkillLibrary
from .skills.novelty import Verdict
from .stages.growth import grow_by


class DyLoRAMoE(Mixture):
    """A mixture of LoRA experts on a frozen causal LM, with one trainable router.

    `DyLoRAMoE(base, experts)` takes a base model that is loaded, with the arguments of `Mixture`; `from_base` loads
    one by name, and `from_checkpoint` reads what was saved.
    """

    @classmethod
    def from_base(
        cls,
        model: str,
        experts: int | Sequence[MoELoraConfig] = 2,
        *,
        lora: MoELoraConfig | None = None,
        router: RouterConfig | None = None,
        label_smoothing: float = 0.0,
        weights: str = "auto",
        dtype: str | torch.dtype | None = None,
        device: str | torch.device = "cpu",
        token: str | None = None,
        revision: str | None = None,
        seed: int = 0,
    ) -> DyLoRAMoE:
        """Load a base model (hub id, folder, GGUF file or preset) and put fresh experts, seeded by `seed`, on it.

        Raises:
            UsageError: if the base model is not available, or experts and base do not fit each other.
        """
        source, weights = find_base(model, weights=weights, token=token, revision=revision)
        base = load_base(source, weights, dtype=dtype, device=device, seed=seed)
        with seeded(seed):
            mixture = cls(base, experts, lora=lora, router=router, label_smoothing=label_smoothing)
        mixture.base_revision = source.revision
        if source.note:
            mixture.notes.append(source.note)
        return mixture

    @classmethod
    def from_checkpoint(
        cls, folder: str | Path, base: PreTrainedModel | str | os.PathLike | None = None, **options: Any
    ) -> DyLoRAMoE:
        """Read a checkpoint into a fresh mixture.

        Args:
            base: the base model, or the name of one to load; by default the one that the checkpoint names is loaded.
            options: those of `checkpoint.read.load_mixture`.

        Raises:
            CheckpointError: with every problem, before anything is built.
            UsageError: if the base model is not available.
        """
        return load_mixture(folder, base, kind=cls, **options)

    def save_checkpoint(self, folder: str | Path, *, step: int = 0, skills: SkillLibrary | None = None) -> Path:
        """Publish a checkpoint at `folder`, whole or not at all, and return its path.

        Raises:
            UsageError: if there is a checkpoint already, which is left as it is, or if it cannot be written; nothing
                is left behind.
        """
        return save_checkpoint(folder, self, step=step, skills=skills)

    def grow(self, skills: SkillLibrary, name: str, documents: Sequence[Sequence[int]]) -> tuple[Verdict, int]:
        """Add an expert for a text that brings something new, as `train.py --grow` does.

        If no skill of the library has it, the new expert begins as a copy of the nearest skill's, the library gets the
        skill, the router is fitted again, and the new expert is the only one that is trained from here on. Otherwise
        nothing changes.

        Args:
            skills: the library of this mixture, as `SkillLibrary.load` reads it from a checkpoint.
            name: of the skill.
            documents: token ids of the text, of 256 tokens or more in all.

        Returns:
            The verdict, and the index of the expert that has the skill.

        Raises:
            UsageError: if an expert has no skill, or there is too little text.
        """
        return grow_by(self, skills, name, documents)

    def export_expert(self, expert: int, folder: str | Path) -> None:
        """Write one expert to a new folder as a plain LoRA: `adapter_config.json` and `adapter_model.safetensors`.

        Raises:
            UsageError: if there is no such expert, or the folder exists already or cannot be written.
        """
        export_expert(self, expert, folder)

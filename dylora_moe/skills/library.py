"""The skill library: what is known of each skill, and which expert has it.

library = SkillLibrary()
library.update(Skill("python", expert=0, tokens=81_920, loss=1.9, features=..., states=...), sizes)
library.save("skill_library.safetensors")
library = SkillLibrary.load("skill_library.safetensors")
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as deserialize
from safetensors.torch import save as serialize

from ..constants import NO_EXPERT
from ..errors import CheckpointError, UsageError
from ..store.whole_files import replace_file
from .samples import Sample
from .sizes import NAME_BYTES, NO_LOSS, SampleSizes

SAMPLES = ("features", "states")
PARTS = ("keys", "values", "scales", "counts")  # of a sample


@dataclass(frozen=True, eq=False)
class Skill:
    """What is kept of one skill.

    Args:
        name: 1 to 32 bytes in UTF-8, without NUL.
        expert: the index of the expert that has the skill; None if that is not known.
        tokens: how many of its tokens have been trained on.
        loss: its held-out loss in nats per token when it was last trained; None if that is not known.
        features: what the router is fitted to: (K, D) sums of input embeddings, and how many tokens each sums up.
        states: what novelty is judged by: (K, H) mean last hidden states, and how many tokens each is the mean of.

    Raises:
        UsageError: if one of them is out of range.
    """

    name: str
    expert: int | None = None
    tokens: int = 0
    loss: float | None = None
    features: Sample = field(default_factory=Sample)
    states: Sample = field(default_factory=Sample)

    def __post_init__(self) -> None:
        raw = self.name.encode("utf-8", "surrogatepass")
        if not 1 <= len(raw) <= NAME_BYTES or "\0" in self.name or not _is_text(self.name):
            raise UsageError(
                f"a skill's name has 1 to {NAME_BYTES} bytes in UTF-8 and no NUL, got {self.name!r} ({len(raw)})"
            )
        if self.expert is not None and self.expert < 0:
            raise UsageError(f"a skill's expert is an index from 0, got {self.expert}")
        if self.tokens < 0:
            raise UsageError(f"a skill's tokens are a number from 0, got {self.tokens}")
        if self.loss is not None and not (math.isfinite(self.loss) and self.loss >= 0):
            raise UsageError(f"a skill's loss is a finite number from 0, got {self.loss}")
        if self.loss is not None:  # as the file holds it, so that a library that was read is equal to the one saved
            object.__setattr__(self, "loss", torch.tensor(self.loss, dtype=torch.float32).item())


def _is_text(name: str) -> bool:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


class SkillLibrary:
    """Skills by name, in the order in which they were added."""

    def __init__(self) -> None:
        self._skills: dict[str, Skill] = {}

    @property
    def names(self) -> list[str]:
        return list(self._skills)

    def __len__(self) -> int:
        return len(self._skills)

    def __iter__(self) -> Iterator[Skill]:
        return iter(list(self._skills.values()))

    def __contains__(self, name: object) -> bool:
        return name in self._skills

    def __getitem__(self, name: str) -> Skill:
        if name not in self._skills:
            raise UsageError(f"there is no skill {name!r}; the library has {', '.join(self.names) or 'none'}")
        return self._skills[name]

    def add(self, skill: Skill) -> None:
        """Add a skill.

        Raises:
            UsageError: if there is one of that name, or its samples have another width than those that are there.
        """
        if skill.name in self._skills:
            raise UsageError(f"there is a skill {skill.name!r} already; update it, or choose another name")
        self._put(skill)

    def update(self, skill: Skill, sizes: SampleSizes) -> None:
        """Add what was seen of a skill to what is kept of it; it becomes a new one if there is none of its name.

        Tokens are added up and samples merged. Expert and loss are replaced where the new ones are known.

        Args:
            sizes: how many rows of each sample are kept.
        """
        old = self._skills.get(skill.name, Skill(skill.name))
        merged = replace(
            skill,
            expert=old.expert if skill.expert is None else skill.expert,
            tokens=old.tokens + skill.tokens,
            loss=old.loss if skill.loss is None else skill.loss,
        )
        self._check_widths(merged)
        features = old.features.merged(skill.features, sizes.features)
        self._put(replace(merged, features=features, states=old.states.merged(skill.states, sizes.states)))

    def remove(self, name: str) -> None:
        """Remove a skill. Raises UsageError if there is none of that name."""
        del self._skills[self[name].name]

    def _put(self, skill: Skill) -> None:
        self._check_widths(skill)
        self._skills[skill.name] = skill

    def _check_widths(self, skill: Skill) -> None:
        for kind in SAMPLES:
            here = getattr(skill, kind)
            for other in self:
                there = getattr(other, kind)
                if len(here) and len(there) and here.width != there.width:
                    raise UsageError(
                        f"the {kind} of skill {skill.name!r} have {here.width} numbers a row, those of {other.name!r} "
                        f"have {there.width}: they come from different base models"
                    )

    # ---- its file ----

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, whole or not at all; a file that is there is replaced.

        Raises:
            UsageError: if it cannot be written.
        """
        replace_file(path, self.to_bytes())

    def to_bytes(self) -> bytes:
        """Return the bytes of the file.

        Of n skills it holds names (n, 32) uint8, experts (n,) int64 (-1: not known), tokens (n,) int64, losses (n,)
        float32 (-1: not known), and of each sample the rows of all skills, one after the other:
        KIND.rows (n,) int64, KIND.keys (R,) int64, KIND.values (R, W) int8, KIND.scales and KIND.counts (R,) float32.
        """
        return serialize(self._tensors(), metadata={"format": "pt"})

    def _tensors(self) -> dict[str, torch.Tensor]:
        skills = list(self)
        names = torch.zeros(len(self), NAME_BYTES, dtype=torch.uint8)
        for row, skill in zip(names, skills, strict=True):
            raw = skill.name.encode("utf-8")
            row[: len(raw)] = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
        tensors = {
            "names": names,
            "experts": torch.tensor([NO_EXPERT if s.expert is None else s.expert for s in skills], dtype=torch.int64),
            "tokens": torch.tensor([skill.tokens for skill in skills], dtype=torch.int64),
            "losses": torch.tensor([NO_LOSS if s.loss is None else s.loss for s in skills], dtype=torch.float32),
        }
        for kind in SAMPLES:
            samples = [getattr(skill, kind) for skill in skills]
            tensors[f"{kind}.rows"] = torch.tensor([len(sample) for sample in samples], dtype=torch.int64)
            filled = [sample for sample in samples if len(sample)] or [Sample()]
            for part, found in zip(PARTS, zip(*(sample.tensors() for sample in filled), strict=True), strict=True):
                tensors[f"{kind}.{part}"] = torch.cat(found)
        return tensors

    @classmethod
    def load(cls, path: str | Path) -> SkillLibrary:
        """Read a file that `save` has written.

        Raises:
            CheckpointError: if it is not such a file.
        """
        try:
            return cls._of(deserialize(Path(path).read_bytes()))
        except OSError as error:
            raise CheckpointError(path, [f"cannot be read ({error.strerror or error}); check its path"]) from None
        except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                path, [f"is not a skill library: {error}; save it again with SkillLibrary.save"]
            ) from None

    @classmethod
    def _of(cls, tensors: dict[str, torch.Tensor]) -> SkillLibrary:
        library = cls()
        samples = {kind: _split(tensors, kind) for kind in SAMPLES}
        facts = zip(*(tensors[name].tolist() for name in ("names", "experts", "tokens", "losses")), strict=True)
        for index, (raw, expert, tokens, loss) in enumerate(facts):
            library.add(
                Skill(
                    name=bytes(raw).rstrip(b"\0").decode("utf-8"),
                    expert=None if expert == NO_EXPERT else expert,
                    tokens=tokens,
                    loss=None if loss == NO_LOSS else loss,
                    **{kind: found[index] for kind, found in samples.items()},
                )
            )
        return library


def _split(tensors: dict[str, torch.Tensor], kind: str) -> list[Sample]:
    """Return the sample of each skill."""
    dtypes = (torch.int64, torch.int8, torch.float32, torch.float32)
    parts = [tensors[f"{kind}.{part}"] for part in PARTS]
    if tuple(part.dtype for part in parts) != dtypes:
        raise ValueError(f"dtypes of {kind}: {[str(part.dtype) for part in parts]}")
    rows = tensors[f"{kind}.rows"].tolist()
    samples = [Sample(*some) for some in zip(*(part.split(rows) for part in parts), strict=True)]
    return [sample if len(sample) else Sample() for sample in samples]

"""What a checkpoint tells of its skills, without loading torch."""

from __future__ import annotations

from dataclasses import dataclass

from ..checkpoint import formats
from ..checkpoint.safetensors_file import read_array, read_header
from ..checkpoint.verify import SoundCheckpoint
from ..skills.sizes import NO_LOSS


@dataclass(frozen=True)
class SkillFacts:
    """What a checkpoint's skill library tells of a skill, besides its samples."""

    name: str
    expert: int | None
    tokens: int
    loss: float | None


def skills_of(checkpoint: SoundCheckpoint) -> list[SkillFacts]:
    """Return the skills of a checkpoint, without loading torch."""
    path = checkpoint.folder / formats.SKILLS
    with checkpoint.held_still():
        tensors = read_header(path)[1]
        parts = [read_array(path, name, tensors[name]) for name in ("names", "experts", "tokens", "losses")]
    return [
        SkillFacts(
            name=raw.tobytes().rstrip(b"\0").decode("utf-8"),
            expert=None if expert < 0 else int(expert),
            tokens=int(tokens),
            loss=None if loss == NO_LOSS else float(loss),
        )
        for raw, expert, tokens, loss in zip(*parts, strict=True)
    ]

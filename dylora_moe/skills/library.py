"""The skill library: what each expert is good at, as named directions in embedding space."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialize
from torch.nn import functional as F

from ..constants import NO_EXPERT
from ..errors import CheckpointError, UsageError
from ..store.files import explained

EMBEDDING_DIM = 64
NAME_BYTES = 32


@dataclass(frozen=True)
class Skill:
    """A skill, the expert that has it (None if that is not known), and its cosine similarity to what was looked for."""

    name: str
    expert: int | None
    similarity: float


class SkillLibrary:
    """Named directions in embedding space, each with an expert.

    Every skill takes 296 bytes: a name of at most 32 bytes in UTF-8, a unit vector (64,) in float32, and the index of
    an expert in int64.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self.experts: list[int] = []
        self.embeddings = torch.empty(0, EMBEDDING_DIM)

    def __len__(self) -> int:
        return len(self.names)

    def add(self, name: str, embedding: torch.Tensor, expert: int | None = None) -> None:
        """Add a skill, or replace the one with the same name.

        Args:
            embedding: (64,), of any norm but zero.
            expert: the index of the expert that has the skill; None if that is not known.

        Raises:
            UsageError: if the name is empty, too long or contains NUL, or the embedding has another shape, is zero or
                is not finite.
        """
        raw = name.encode("utf-8")
        if not 1 <= len(raw) <= NAME_BYTES or "\0" in name:
            raise UsageError(
                f"a skill's name has 1 to {NAME_BYTES} bytes in UTF-8 and no NUL, got {name!r} ({len(raw)})"
            )
        if expert is not None and expert < 0:
            raise UsageError(f"a skill's expert is an index from 0, got {expert}")
        embedding = embedding.detach().to("cpu", torch.float32)
        if embedding.shape != (EMBEDDING_DIM,):
            raise UsageError(f"a skill's embedding has shape ({EMBEDDING_DIM},), got {tuple(embedding.shape)}")
        length = embedding.norm()
        if not torch.isfinite(length) or length == 0:
            raise UsageError(f"the embedding of skill {name!r} must be finite and not zero")
        if name in self.names:
            index = self.names.index(name)
        else:
            index = len(self.names)
            self.names.append(name)
            self.experts.append(NO_EXPERT)
            self.embeddings = torch.cat([self.embeddings, torch.zeros(1, EMBEDDING_DIM)])
        self.embeddings[index] = embedding / length
        self.experts[index] = NO_EXPERT if expert is None else expert

    def nearest(self, embedding: torch.Tensor, k: int = 1) -> list[Skill]:
        """Return the k skills (or all) with the largest cosine to an embedding (64,), the most similar first."""
        if not self.names:
            return []
        cosine = F.normalize(embedding.detach().to("cpu", torch.float32), dim=0) @ self.embeddings.T  # (n,)
        order = sorted(range(len(self)), key=lambda i: (-float(cosine[i]), self.names[i]))
        return [Skill(self.names[i], self.expert_of(self.names[i]), float(cosine[i])) for i in order[:k]]

    def expert_of(self, name: str) -> int | None:
        """Return the expert of a skill, or None if it is not known."""
        expert = self.experts[self.names.index(name)]
        return None if expert == NO_EXPERT else expert

    def save(self, path: str | Path) -> None:
        """Write a safetensors file: names (n, 32) uint8, embeddings (n, 64) float32 and experts (n,) int64."""
        names = torch.zeros(len(self), NAME_BYTES, dtype=torch.uint8)
        for row, name in zip(names, self.names, strict=True):
            raw = name.encode("utf-8")
            row[: len(raw)] = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
        tensors = {
            "names": names,
            "embeddings": self.embeddings.contiguous(),
            "experts": torch.tensor(self.experts, dtype=torch.int64),
        }
        with explained("write", path), open(path, "wb") as file:
            file.write(serialize(tensors, metadata={"format": "pt"}))

    @classmethod
    def load(cls, path: str | Path) -> SkillLibrary:
        """Read a file that `save` has written.

        Raises:
            CheckpointError: if it is not such a file.
        """
        try:
            tensors = load_file(path)
            names, embeddings, experts = tensors["names"], tensors["embeddings"], tensors["experts"]
            n = len(names)
            shapes = [tuple(t.shape) for t in (names, embeddings, experts)]
            if shapes != [(n, NAME_BYTES), (n, EMBEDDING_DIM), (n,)]:
                raise ValueError(f"shapes {shapes}")
            library = cls()
            for raw, embedding, expert in zip(names, embeddings, experts.tolist(), strict=True):
                name = bytes(raw.tolist()).rstrip(b"\0").decode("utf-8")
                library.add(name, embedding, None if expert == NO_EXPERT else expert)
            library.embeddings = embeddings.clone()  # `add` may change a bit by normalising them again
            return library
        except OSError as error:
            raise CheckpointError(path, [f"cannot be read ({error.strerror or error}); check its path"]) from None
        except (SafetensorError, KeyError, ValueError) as error:
            raise CheckpointError(
                path, [f"is not a skill library: {error}; save it again with SkillLibrary.save"]
            ) from None

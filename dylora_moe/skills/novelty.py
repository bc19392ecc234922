"""Novelty: whether a text is one of the skills that the library knows.

    detector = NoveltyDetector(model, library)
    verdict = detector.judge(collect(model, blocks, sizes).states.rows())
    verdicts = detector.judge_documents(documents)  # lists of token ids

A text is described by the mean of the base model's last hidden states, without experts, over four windows of 128
tokens. Its distance to a skill is the Mahalanobis distance to the mean of the skill's windows, with one covariance of
all skills (https://huggingface.co/papers/1807.03888), shrunk as by Ledoit and Wolf
(https://doi.org/10.1016/S0047-259X(03)00096-4).

The threshold of a skill is the geometric mean of two distances to it: the one within which 90 % of its own text lies,
and the one beyond which 90 % of the nearest other skill lies. Both are cross-validated in four folds, because a skill's
own windows are far too near to a mean and a covariance that were computed from them. Where there is one skill only, the
base model's reading of random tokens stands for another one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from ..errors import UsageError
from ..mixture.expert_matrices import weight_of
from ..mixture.model import Mixture
from .features import read_states, windows_of
from .library import SkillLibrary

GROUP = 4  # windows that are judged together
FOLDS = 4
OWN, OTHER = 0.9, 0.1  # quantiles of the distances to a skill


class Verdict(NamedTuple):
    """Whether a text is known, the nearest skill, the distance to it, and up to which distance it would be known."""

    known: bool
    skill: str
    distance: float
    threshold: float


class NoveltyDetector:
    """Judges text by the skills of a library that have states.

    Raises:
        UsageError: if there is none.
    """

    def __init__(self, model: Mixture, library: SkillLibrary):
        self.model = model
        self.states = {skill.name: skill.states.rows().double() for skill in library if len(skill.states) >= 2 * FOLDS}
        if not self.states:
            raise UsageError(
                "novelty cannot be judged: no skill of the library has text; add one by SkillLibrary.update with what "
                "skills.features.collect finds in its training blocks"
            )
        self._background = None if len(self.states) > 1 else background(model).double()
        self._metric = Metric(list(self.states.values()))
        self._thresholds: dict[int, dict[str, float]] = {}

    def judge(self, states: torch.Tensor) -> Verdict:
        """Judge a text by the states (K, H) of its windows. With more than four, the median of groups of four counts.

        Raises:
            UsageError: if there is no state, or of another width.
        """
        groups = _groups(states.double())
        verdicts = [self._judge(group) for group in groups]
        return sorted(verdicts, key=lambda v: v.distance / v.threshold)[(len(verdicts) - 1) // 2]

    def judge_documents(self, documents: Sequence[Sequence[int]]) -> list[Verdict | None]:
        """Judge each document by four windows of it, evenly spaced; None where it has less than 32 tokens."""
        found: list[Verdict | None] = []
        for ids in documents:
            windows = windows_of(np.asarray(ids, dtype=np.int32))
            chosen = [windows[i * len(windows) // min(GROUP, len(windows))] for i in range(min(GROUP, len(windows)))]
            found.append(self.judge(read_states(self.model, chosen)) if len(ids) >= 32 else None)
        return found

    def _judge(self, group: torch.Tensor) -> Verdict:
        thresholds = self._thresholds_for(len(group))
        distances = self._metric.distances(group.mean(0, keepdim=True))[0]  # (S,)
        pairs = zip(self.states, distances.tolist(), strict=True)
        name, distance = min(pairs, key=lambda pair: pair[1] / thresholds[pair[0]])
        return Verdict(distance <= thresholds[name], name, distance, thresholds[name])

    def _thresholds_for(self, size: int) -> dict[str, float]:
        if size not in self._thresholds:
            self._thresholds[size] = self._calibrate(size)
        return self._thresholds[size]

    def _calibrate(self, size: int) -> dict[str, float]:
        """The threshold of each skill for texts of `size` windows."""
        skills = list(self.states.values())
        found: list[list[torch.Tensor]] = [[] for _ in skills]  # distances (G, S) of held-out groups of each skill
        for fold in range(FOLDS):
            train = [states[torch.arange(len(states)) % FOLDS != fold] for states in skills]
            metric = Metric(train)
            for index, states in enumerate(skills):
                held = states[fold::FOLDS]
                found[index].append(metric.distances(_means(held, size)))
            if self._background is not None:
                others = metric.distances(_means(self._background, size))
        distances = [torch.cat(some) for some in found]
        thresholds = {}
        for index, name in enumerate(self.states):
            own = distances[index][:, index].quantile(OWN)
            away = [d[:, index].quantile(OTHER) for i, d in enumerate(distances) if i != index]
            nearest = min(away) if away else others[:, index].quantile(OTHER)
            thresholds[name] = float((own * nearest).sqrt())
        return thresholds


class Metric:
    """Mahalanobis distances to the means of some groups of states, with the covariance within the groups."""

    def __init__(self, groups: Sequence[torch.Tensor]):
        self.means = torch.stack([group.mean(0) for group in groups])  # (S, H)
        within = torch.cat([group - group.mean(0) for group in groups])  # (K, H)
        self.precision = torch.linalg.inv(ledoit_wolf(within))  # (H, H)

    def distances(self, states: torch.Tensor) -> torch.Tensor:
        """(K, H) -> (K, S)"""
        apart = states.unsqueeze(1) - self.means  # (K, S, H)
        return ((apart @ self.precision) * apart).sum(-1).clamp(min=0).sqrt()


def ledoit_wolf(centred: torch.Tensor) -> torch.Tensor:
    """Return the covariance (H, H) of centred rows (K, H), shrunk towards a multiple of the identity."""
    number, width = centred.shape
    covariance = centred.T @ centred / number
    scale = covariance.diagonal().mean()
    target = scale * torch.eye(width, dtype=centred.dtype)
    # The mean squared distance of x x^T, of a row x, from the covariance: how far off this is with so few rows.
    noise = (centred.square().sum(1).square().mean() - covariance.square().sum()) / number
    share = (noise / (covariance - target).square().sum().clamp(min=1e-30)).clamp(0, 1)
    return (1 - share) * covariance + (share + 1e-9) * target  # invertible in any case


def _groups(states: torch.Tensor) -> list[torch.Tensor]:
    if not len(states):
        raise UsageError("text cannot be judged: there are less than two tokens")
    whole = [states[start : start + GROUP] for start in range(0, len(states) - GROUP + 1, GROUP)]
    return whole or [states]


def _means(states: torch.Tensor, size: int) -> torch.Tensor:
    """Means of `size` states each, (G, H): as many groups as there are, each state in several of them."""
    rolled = [states.roll(shift, 0) for shift in range(min(size, len(states)))]
    return torch.stack(rolled).mean(0)


def background(model: Mixture) -> torch.Tensor:
    """Return the states (32, H) of windows of random tokens, the same on every machine."""
    generator = np.random.Generator(np.random.PCG64(0))
    vocabulary = weight_of(model.get_input_embeddings()).shape[0]
    return read_states(model, generator.integers(0, vocabulary, (32, 128)).astype(np.int32))

"""Novelty: whether a text is one of the skills that the library knows.

    detector = NoveltyDetector(model, library)
    verdict = detector.judge(collect(model, blocks, sizes).states.rows())
    verdicts = detector.judge_documents(documents)  # lists of token ids

A text is described by the mean of the base model's last hidden states, without experts, over some windows of 128
tokens. Its distance to a skill is the Mahalanobis distance to the mean of the skill's windows, with one covariance of
all skills (https://huggingface.co/papers/1807.03888), shrunk as by Ledoit and Wolf
(https://doi.org/10.1016/S0047-259X(03)00096-4).

The threshold of a skill is the geometric mean of two distances to it: the one within which 90 % of texts of as many
windows of it lie, and the median one of its single windows. The more windows of a text are averaged, the nearer it
comes to its skill, while one of another kind stays about as far away as single windows are. Both are cross-validated in
four folds, because a skill's own windows are far too near to a mean and a covariance that were computed from them. No
other skill is needed, so that one skill is enough, and a skill that resembles another does not become narrower.

The windows of one document resemble each other, so that their mean is farther from that of the skill than the mean of
as many windows of several documents. A document by itself is therefore allowed a little more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from ..errors import UsageError, counted
from ..mixture.model import Mixture
from .features import LEAST_WINDOW, WINDOW, evenly, read_states, windows_of
from .library import SkillLibrary

FOLDS = 4
LEAST_WINDOWS = 2 * FOLDS  # of a skill: its thresholds are computed from these
DOCUMENT_WINDOWS = 4  # by which a single document is judged
DOCUMENT_ALLOWANCE = 1.1  # by which the thresholds are multiplied for a single document
OWN = 0.9  # quantile of the distances to a skill of its own texts


class Verdict(NamedTuple):
    """Whether a text is known, the nearest skill, the distance to it, and up to which distance it would be known."""

    known: bool
    skill: str
    distance: float
    threshold: float


class NoveltyDetector:
    """Judges text by the skills of a library of whose text enough is known: at least 8 windows.

    Attributes:
        left_out: the names of the other skills, which no text is compared with.

    Raises:
        UsageError: if there is no such skill.
    """

    def __init__(self, model: Mixture, library: SkillLibrary):
        self.model = model
        self.states = {s.name: s.states.rows().double() for s in library if len(s.states) >= LEAST_WINDOWS}
        self.left_out = [name for name in library.names if name not in self.states]
        if not self.states:
            found = ", ".join(f"{counted(len(skill.states), 'window')} of {skill.name}" for skill in library)
            raise UsageError(
                f"it cannot be told what is new: expected a skill with at least {LEAST_WINDOWS} windows of text, of "
                f"{WINDOW} tokens each, found {found or 'no skills'}; train on more text first"
            )
        self._prepare()

    def add(self, name: str, states: torch.Tensor) -> None:
        """Compare with one more skill from now on, of whose text these are the states (K, H) of windows.

        It is left out, as those of the library, if there are less than 8.
        """
        if len(states) < LEAST_WINDOWS:
            self.left_out.append(name)
            return
        self.states[name] = states.double()
        self._prepare()

    def _prepare(self) -> None:
        self._metric = Metric(list(self.states.values()))
        self._thresholds: dict[int, dict[str, float]] = {}  # by the number of windows

    def judge(self, states: torch.Tensor) -> Verdict:
        """Judge a text by the states (K, H) of its windows, which should come from several of its documents.

        Raises:
            UsageError: if there is no state, or of another width.
        """
        return self._judge(states, 1.0)

    def judge_documents(self, documents: Sequence[Sequence[int]]) -> list[Verdict | None]:
        """Judge each document by four windows of it, evenly spaced; None where it has less than 32 tokens."""
        found: list[Verdict | None] = []
        for ids in documents:
            windows = windows_of(np.asarray(ids, dtype=np.int32))
            chosen = [windows[i] for i in evenly(len(windows), DOCUMENT_WINDOWS)]
            long = len(ids) >= LEAST_WINDOW
            found.append(self._judge(read_states(self.model, chosen), DOCUMENT_ALLOWANCE) if long else None)
        return found

    def _judge(self, states: torch.Tensor, allowance: float) -> Verdict:
        if not len(states):
            raise UsageError("text cannot be judged: there are less than two tokens")
        if states.shape[1] != self._metric.means.shape[1]:
            raise UsageError(
                f"text cannot be judged: its states have {states.shape[1]} numbers, those of the skills have "
                f"{self._metric.means.shape[1]}: they come from different base models"
            )
        thresholds = self._thresholds_for(len(states))
        distances = self._metric.distances(states.double().mean(0, keepdim=True))[0]  # (S,)
        distance, name = min(zip(distances.tolist(), self.states, strict=True))
        threshold = allowance * thresholds[name]
        return Verdict(distance <= threshold, name, distance, threshold)

    def _thresholds_for(self, size: int) -> dict[str, float]:
        if size not in self._thresholds:
            self._thresholds[size] = self._calibrate(size)
        return self._thresholds[size]

    def _calibrate(self, size: int) -> dict[str, float]:
        """The threshold of each skill for texts of `size` windows, or a fourth of its own if those are fewer."""
        texts, windows = self._held_out(size), self._held_out(1)
        return {
            name: float((own.quantile(OWN) * single.median()).sqrt())
            for name, own, single in zip(self.states, texts, windows, strict=True)
        }

    def _held_out(self, size: int) -> list[torch.Tensor]:
        """Of each skill, the distances (G,) to it of means of `size` of its states, which are not in the metric."""
        skills = list(self.states.values())
        found: list[list[torch.Tensor]] = [[] for _ in skills]
        for fold in range(FOLDS):
            metric = Metric([states[torch.arange(len(states)) % FOLDS != fold] for states in skills])
            for index, states in enumerate(skills):
                means = _means(states[fold::FOLDS], min(size, len(states) // FOLDS))
                found[index].append(metric.distances(means)[:, index])
        return [torch.cat(distances) for distances in found]


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


def _means(states: torch.Tensor, size: int) -> torch.Tensor:
    """Means of `size` states each, (G, H): as many groups as there are, each state in several of them."""
    rolled = [states.roll(shift, 0) for shift in range(size)]
    return torch.stack(rolled).mean(0)

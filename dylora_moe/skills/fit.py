"""Fits the router to what the skill library keeps.

On the samples of a library the router is a linear softmax classifier of experts: of a row with the sum s (D) and the
number of tokens n, the logits are gate.weight s / (n + n0) + gate.bias n / (n + n0) + prior. It is fitted by logistic
regression, where the rows of each expert weigh the same in all. Nothing is drawn at random, and skills are taken in the
order of their names, so that the same library gives the same bits.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from ..constants import expert_name
from ..errors import UsageError
from ..mixture.router import Router
from .library import SkillLibrary

STRENGTH = 2e-2  # of the L2 penalty, for features of a mean square of 1
STEPS = 200  # the most of L-BFGS


def fit_router(router: Router, library: SkillLibrary) -> None:
    """Set the router's `gate.weight`, `gate.bias` and `prior` by the features of a library.

    Raises:
        UsageError: if an expert has no skill with features, or a skill an expert that is not there.
    """
    num_experts = router.num_experts
    rows, counts, experts = _data(library, num_experts, router.gate.in_features)
    prior_tokens, temperature = router.config.prior_tokens, router.config.temperature
    per_expert = torch.bincount(experts, minlength=num_experts)
    weights = 1.0 / (num_experts * per_expert[experts])  # (R,), they sum to 1
    evidence = (counts + prior_tokens).unsqueeze(1)  # (R, 1)
    centre = weights @ (rows / counts.unsqueeze(1))  # (D,)
    features = (rows - counts.unsqueeze(1) * centre) / evidence  # (R, D)
    scale = (weights @ features.square()).mean().sqrt().clamp(min=1e-12)
    weight, prior = _logistic_regression(features / scale, experts, weights, num_experts)
    if num_experts > 1 and not weight.any():
        raise UsageError(
            "the router cannot be fitted: all skills have the same text, so that nothing tells them apart; give each "
            "data set text of its own, or one data set only"
        )
    weight = weight / scale * temperature
    with torch.no_grad():
        router.gate.weight.copy_(weight)
        router.gate.bias.copy_(-weight @ centre)
        router.prior.copy_(prior)


def _data(library: SkillLibrary, num_experts: int, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the features of all skills that have an expert: sums (R, D), counts (R,) and experts (R,)."""
    skills = sorted((s for s in library if s.expert is not None and len(s.features)), key=lambda skill: skill.name)
    beyond = [s.name for s in skills if s.expert is not None and s.expert >= num_experts]
    if beyond:
        raise UsageError(
            f"the router cannot be fitted: {', '.join(beyond)}: skills of experts beyond {num_experts - 1}"
        )
    without = sorted(set(range(num_experts)) - {skill.expert for skill in skills if skill.expert is not None})
    if without:
        raise UsageError(
            f"the router cannot be fitted: no skill with text is known of {', '.join(map(expert_name, without))}; "
            "add one by SkillLibrary.update with what skills.features.collect finds in its training blocks"
        )
    wrong = [s.name for s in skills if s.features.width != width]
    if wrong:
        raise UsageError(
            f"the router cannot be fitted: the features of {', '.join(wrong)} do not have the {width} numbers a row of "
            "the base model's input embeddings; they come from another base model"
        )
    rows = torch.cat([skill.features.rows() for skill in skills])
    counts = torch.cat([skill.features.counts for skill in skills])
    experts = torch.tensor([s.expert for s in skills for _ in range(len(s.features))], dtype=torch.int64)
    return rows, counts, experts


def _logistic_regression(
    features: torch.Tensor, classes: torch.Tensor, weights: torch.Tensor, num_classes: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the weight (C, D) and the intercept (C,) of a linear softmax classifier.

    Args:
        features: (R, D) float32.
        classes: (R,) int64.
        weights: (R,), of the rows; they sum to 1.
    """
    weight = torch.zeros(num_classes, features.shape[1], requires_grad=True)
    intercept = torch.zeros(num_classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, intercept], max_iter=STEPS, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        errors = F.cross_entropy(F.linear(features, weight, intercept), classes, reduction="none")
        value = weights @ errors + STRENGTH / 2 * weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    return weight.detach(), intercept.detach()

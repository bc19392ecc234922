"""The results of a run in words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..errors import counted
from .results import Decision, Results, SkillLoss
from .sections import last_changes, measured_stage

FORGOTTEN = 0.005  # relative rise of a skill's loss that counts as forgetting
MOST_NAMES = 8


def percent(share: float) -> str:
    """Return a change with its sign, as in "+0.3 %"."""
    text = f"{100 * share:+.1f}".replace("-", "\u2212")
    return ("0.0" if text[1:] == "0.0" else text) + "\u00a0%"


def names(items: Sequence[str]) -> str:
    """Return names as in "a, b and c"; those beyond `MOST_NAMES` as their number."""
    shown = list(items[:MOST_NAMES])
    if len(items) > MOST_NAMES:
        shown.append(f"{len(items) - MOST_NAMES} more")
    return " and ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)


def summary(results: Results) -> list[str]:
    """Return a paragraph in sentences."""
    skills = [skill.name for skill in results.skills]
    steps = sum(stage.last_step - stage.first_step for stage in results.stages)
    how = {
        "specialised": "Each expert was trained on its own skill, and the router was fitted to all of them.",
        "joint": "The experts and the router were trained together, so that no expert belongs to one skill.",
    }
    grown = sum(stage.kind == "grow" for stage in results.stages)
    growth = f", {grown} of which added to what was there" if grown else ""
    return [
        f"{results.base_model} stayed frozen, and {counted(results.experts, 'expert')} on it learned "
        f"{counted(len(skills), 'skill')}{': ' + names(skills) if skills else ''}.",
        how[results.route],
        f"Training took {counted(steps, 'step')} in {counted(len(results.stages), 'stage')}{growth}.",
        *_loss_sentences(results),
        *_forgetting_sentences(results),
    ]


def _loss_sentences(results: Results) -> Iterator[str]:
    measured = measured_stage(results)
    if measured is None:
        yield (
            "Nothing was held out of a skill's text, so the loss on text that was not trained on is not known. Text of "
            "--eval-data tells it where it goes by the name of the skill."
        )
        return
    losses = list(measured[1].evaluation.items())
    base, own, routed = (_mean([_value(loss, kind) for _, loss in losses]) for kind in ("base", "own", "routed"))
    subject = "The mean held-out loss of the skills" if len(losses) > 1 else "Its held-out loss"
    if base is not None and routed is not None:
        verb = "fell" if routed < base else "rose"
        change = percent(routed / base - 1) if base else "no base to compare with"
        yield f"{subject} {verb} from {base:.3f} nats per token without experts to {routed:.3f} with them ({change})."
    elif routed is not None:
        yield f"{subject} is {routed:.3f} nats per token."
    if own and routed is not None:
        cost = percent(routed / own - 1)
        yield f"If every text went to its skill's own expert, it would be {own:.3f}; the routed loss differs by {cost}."
    worse = [
        name for name, loss in losses if loss.base is not None and loss.routed is not None and loss.routed >= loss.base
    ]
    if worse:
        yield f"The experts do not help with {names(worse)}."


def _value(loss: SkillLoss, kind: str) -> float | None:
    return getattr(loss, kind)


def _mean(values: Sequence[float | None]) -> float | None:
    """Return the mean, or None if any value is missing."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def _forgetting_sentences(results: Results) -> Iterator[str]:
    changes = last_changes(results)
    if not changes:
        return
    lost = sorted((name for name, change in changes.items() if change > FORGOTTEN), key=lambda name: -changes[name])
    most = max(changes, key=lambda name: changes[name])
    if lost:
        told = names([f"{name} ({percent(changes[name])})" for name in lost])
        yield f"Forgotten since they were learned, by the rise of the loss: {told}."
    else:
        yield (
            f"Nothing was forgotten: no skill's loss rose by more than {100 * FORGOTTEN:g} % since it was learned "
            f"(the largest change is that of {most}, {percent(changes[most])})."
        )


def decision_words(decision: Decision) -> str:
    """Say what a novelty decision was based on."""
    verdict = "known" if decision.known else "new"
    if decision.nearest is None or decision.distance is None:
        text = f"It is {verdict}: there was no skill to compare it with."
    else:
        text = f"It is {verdict}: the nearest skill is {decision.nearest}, at a distance of {decision.distance:.2f}"
        if decision.threshold is not None:
            side = "within" if decision.distance <= decision.threshold else "beyond"
            text += f", {side} the threshold of {decision.threshold:.2f}"
        text += "."
    if decision.documents_new and decision.documents_known:
        new, known = counted(decision.documents_new, "document"), f"{decision.documents_known:,}"
        text += f" It is mixed: {new} would be new, {known} known."
    return text

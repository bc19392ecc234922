"""`dylora-moe inspect`: what is in a checkpoint or a run folder, and what the last run said of it. Imports no torch."""

from __future__ import annotations

import argparse
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...checkpoint import formats
from ...checkpoint.config import CheckpointConfig
from ...checkpoint.findings import Contents
from ...checkpoint.verify import checkpoint_folder, inspect_facts
from ...constants import MIB, expert_name
from ...errors import CheckpointError, counted, shown
from ...reporting.results import RESULTS, Results, SkillLoss, read_results, results_of
from ...reporting.sections import measured_stage, weights_text
from ...reporting.sentences import summary
from ...store import run_folder
from ...store.manifest import first_reason
from ...system import command_line
from ...system.command_line import PASSED, say
from ..output import add_json_flag, people, write_json
from ..wording import needed, table


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="CHECKPOINT_OR_RUN", type=command_line.path)
    add_json_flag(parser)


def run(args: Namespace) -> int:
    """Print what is there. Only config.json and the skill library are read of a checkpoint; `verify` reads all."""
    run_dir, checkpoint, results = _found(Path(args.path))
    value: dict[str, Any] = {"run": run_dir and str(run_dir), "checkpoint": checkpoint and str(checkpoint)}
    lines = [f"{run_dir}: no complete checkpoint"] if checkpoint is None else []
    if checkpoint is not None:
        with needed():
            contents = inspect_facts(checkpoint)
            if contents.config is None or contents.problems:
                raise CheckpointError(checkpoint, contents.problems)
        reason = first_reason(checkpoint)
        lines += [*_checkpoint_lines(contents, contents.config, reason), ""]
        lines += [*_expert_lines(contents, contents.config), "", *_skill_lines(contents, results)]
        value |= _checkpoint_json(contents, contents.config, reason)
    if results is not None:
        lines += [*_result_lines(results)]
    value["results"] = None if results is None else _results_json(results)
    for line in lines:
        say(shown(line, most=None), people(args))
    write_json(args, value)
    return PASSED


def _found(path: Path) -> tuple[Path | None, Path | None, Results | None]:
    """Return the run folder that was named, the checkpoint, and the results that are of this checkpoint."""
    newest = run_folder.latest(path) if path.is_dir() else None
    if newest is not None or (path / RESULTS).exists():
        results = read_results(path) if (path / RESULTS).exists() else None
        return path, None if newest is None else newest.path, results
    checkpoint = checkpoint_folder(path)
    return None, checkpoint, results_of(checkpoint)


# ---- for people ----


def _checkpoint_lines(contents: Contents, config: CheckpointConfig, reason: str | None) -> Iterator[str]:
    verdict = "complete" if reason is None else f"incomplete: {reason}"
    size = f"{contents.total_bytes / MIB:.1f} MB in {counted(len(contents.files), 'file')}"
    trained = ", with its training state" if formats.TRAINER_STATE in contents.files else ""
    yield f"{contents.folder}: step {config.step}, {verdict}, {size}{trained}"
    base, router = config.base_model, config.router
    kind = f"{base.architecture.model_type}, {base.dtype}{', quantized' if base.quantization else ''}"
    yield f"base model: {base.located(contents.folder) or 'not named'} ({kind})"
    top = min(router.top_k or 2, config.num_experts)
    numbers = f"decay {router.decay:g}, temperature {router.temperature:g}"
    yield f"router: {top} of {counted(config.num_experts, 'expert')} for each token, {numbers}"
    yield f"written by: {', '.join(f'{name} {version}' for name, version in sorted(config.versions.items()))}"


def _expert_lines(contents: Contents, config: CheckpointConfig) -> list[str]:
    rows = []
    for index, expert in enumerate(config.experts):
        skills = ", ".join(skill.name for skill in contents.skills if skill.expert == index)
        numbers = [
            f"{expert.r}",
            f"{expert.lora_alpha:g}",
            f"{expert.parameters:,}",
            f"{4 * expert.parameters / MIB:.1f}",
        ]
        rows.append([expert.name, expert.state, *numbers, ", ".join(expert.target_modules), skills])
    return table(["expert", "state", "rank", "alpha", "parameters", "MB", "layers", "skills"], rows)


def _skill_lines(contents: Contents, results: Results | None) -> list[str]:
    if not contents.skills:
        return ["no skills: the experts were not trained on data sets of their own"]
    usage = {} if results is None else {skill.name: skill.usage for skill in results.skills}
    rows = []
    for skill in contents.skills:
        expert = "-" if skill.expert is None else expert_name(skill.expert)
        rows.append([skill.name, expert, f"{skill.tokens:,}", _loss(skill.loss), _shares(usage.get(skill.name, []))])
    return table(["skill", "expert", "tokens", "held-out loss", "goes to experts"], rows)


def _result_lines(results: Results) -> Iterator[str]:
    measured = measured_stage(results)
    if measured is not None:
        rows = [
            [name, _loss(loss.base), _loss(loss.routed), _loss(loss.own), _best(loss)]
            for name, loss in measured[1].evaluation.items()
        ]
        yield ""
        yield from table(["held-out loss", "base", "routed", "own expert", "best expert alone"], rows)
    yield ""
    for name, sources in ((skill.name, skill.data) for skill in results.skills if skill.data):
        yield f"{name}: from {', '.join(sources)}"
    yield from (_plain(sentence) for sentence in summary(results))


def _loss(loss: float | None) -> str:
    return "-" if loss is None else f"{loss:.4f}"


def _best(loss: SkillLoss) -> str:
    return "-" if loss.best_expert is None else f"{_loss(loss.best)} ({loss.best_expert})"


def _shares(usage: Sequence[float]) -> str:
    return _plain(weights_text(usage)) if usage else "-"


def _plain(text: str) -> str:
    return text.replace("\u00a0", " ").replace("\u2212", "-")


# ---- for other programs ----


def _checkpoint_json(contents: Contents, config: CheckpointConfig, reason: str | None) -> dict[str, Any]:
    skills = [asdict(skill) for skill in contents.skills]
    size = {"total_bytes": contents.total_bytes, "files": len(contents.files)}
    return {"complete": reason is None, "reason": reason} | size | asdict(config) | {"skills": skills}


def _results_json(results: Results) -> dict[str, Any]:
    """Return results.json without its texts and curves, which are for the report."""
    measured = measured_stage(results)
    return {
        "step": results.step,
        "stopped_by": results.stopped_by,
        "route": results.route,
        "parameters": results.parameters,
        "evaluation": {} if measured is None else {n: asdict(loss) for n, loss in measured[1].evaluation.items()},
        "skills": [{"name": s.name, "expert": s.expert, "usage": s.usage, "data": s.data} for s in results.skills],
        "summary": [_plain(sentence) for sentence in summary(results)],
    }

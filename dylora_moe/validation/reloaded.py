"""The checks of a checkpoint that is loaded again: into a fresh instance, and what that instance then computes.

The input is that of the checkpoint's probe. The experts of a comparison share a forward pass, one for each row of the
batch, which on a CPU is hardly slower than a pass of one row. Only the comparison with stock PEFT, which must agree to
the bit, takes two passes for each expert.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from ..base.fingerprint import same_weights
from ..base.preserve import untouched
from ..checkpoint import formats
from ..checkpoint.findings import SAVE_AGAIN
from ..checkpoint.probe import (
    ROWS,
    beside,
    changed_tensors,
    logits_alone,
    max_abs_difference,
    probe_difference,
    probe_facts,
    probe_tolerance,
    read_probe,
)
from ..checkpoint.read import build_mixture, load_into
from ..checkpoint.tensors import input_embeddings
from ..checkpoint.verify import SoundCheckpoint
from ..constants import NEW, expert_name
from ..errors import CheckpointError
from ..mixture.model import Mixture
from .report import CheckResult
from .saved import compare_tensors

TOLERANCE = 1e-5
NOT_APPLICABLE = "not applicable"


def logits(model: Mixture, input_ids: torch.Tensor, expert: int | None = None) -> torch.Tensor:
    """Return the logits (T, vocabulary) of input_ids (1, T), in the base's dtype; the model is left as found."""
    with untouched(model):
        return model(beside(model, input_ids), expert=expert, use_cache=False).logits[0]


# ---- load ----


@dataclass(frozen=True)
class Loaded:
    """A mixture read from a checkpoint into a fresh instance, and what that instance computed before."""

    checkpoint: SoundCheckpoint
    model: Mixture
    probe: tuple[dict[str, torch.Tensor], dict[str, str]] | None  # tensors and facts
    input_ids: torch.Tensor  # (1, T)
    before: torch.Tensor  # (T, vocabulary) logits of the fresh instance


def check_load(checkpoint: SoundCheckpoint, base: PreTrainedModel) -> CheckResult:
    """Check that every tensor and every state of a checkpoint arrives in a fresh instance.

    If it could be loaded, the result's `value` is a `Loaded`.
    """
    result = CheckResult("load")
    try:
        model = build_mixture(checkpoint, base)
        probe, input_ids = _read_probe(checkpoint, input_embeddings(model).num_embeddings)
        before = logits(model, input_ids)
        skills = load_into(checkpoint, model)
    except CheckpointError as error:
        result.problems = error.problems
        return result
    states = checkpoint.config.states
    compared, result.problems = compare_tensors(checkpoint.folder, checkpoint.files, model)
    if model.expert_states != states:
        found = ", ".join(model.expert_states)
        result.problems.append(f"the experts are {found} after loading, expected {', '.join(states)}")
    result.measures["tensors_compared"] = compared
    result.notes.append(f"{model.num_experts} experts ({', '.join(sorted(set(states)))}), router, {len(skills)} skills")
    result.value = Loaded(checkpoint, model, probe, input_ids, before)
    return result


def _read_probe(checkpoint: SoundCheckpoint, vocabulary_size: int) -> tuple[tuple | None, torch.Tensor]:
    """Return the probe, or None if there is none, and the input (1, 16) for which everything is computed.

    Raises:
        CheckpointError: if the probe is for another vocabulary.
    """
    probe = read_probe(checkpoint)
    if probe is None:
        return None, (torch.arange(formats.PROBE_TOKENS) * 7919 + 13).unsqueeze(0) % vocabulary_size
    input_ids = probe[0]["input_ids"]
    least, most = int(input_ids.min()), int(input_ids.max())
    if least < 0 or most >= vocabulary_size:
        found = f"expected tokens from 0 to {vocabulary_size - 1}, found {least} to {most}"
        raise CheckpointError(checkpoint.folder, [f"{formats.PROBE}: tensor input_ids: {found}; {SAVE_AGAIN}"])
    return probe, input_ids


# ---- consistency ----


@dataclass
class Differences:
    """The largest absolute differences of logits, of the routed mixture and of each expert alone."""

    routed: float | None = None
    experts: list[float] = field(default_factory=list)

    def named(self) -> list[tuple[str, float]]:
        routed = [] if self.routed is None else [("routed", self.routed)]
        return routed + [(f"expert_{index}", difference) for index, difference in enumerate(self.experts)]

    @property
    def largest(self) -> float:
        return max(difference for _, difference in self.named())


def check_consistency(loaded: Loaded, *, saved: Mixture | None, weights: str) -> CheckResult:
    """Check that the loaded mixture computes what the saved one does, and that a spoiled one would not.

    Both are compared routed and for each expert alone.

    Args:
        saved: the mixture that was saved; None if there is only its checkpoint, whose probe is then all there is to
            compare with.
        weights: "pretrained" or "random", the kind of weights that the base has.
    """
    result = CheckResult("consistency")
    model, ids = loaded.model, loaded.input_ids
    to_probe = _compare_probe(loaded, weights, result)
    routed = logits(model, ids)
    before = max_abs_difference(loaded.before, routed)
    to_saved = Differences(None if saved is None else max_abs_difference(logits(saved, ids), routed))
    spoiled: dict[str, float | str] = {}
    for start in range(0, model.num_experts, ROWS):
        experts = range(start, min(start + ROWS, model.num_experts))
        alone = logits_alone(model, ids, experts)  # (rows, T, vocabulary)
        if saved is not None:
            to_saved.experts += _differences(logits_alone(saved, ids, experts), alone)
        spoiled |= _spoil_experts(model, ids, experts, alone)
    spoiled["router"] = _spoil_router(model, ids, routed)

    # A control must change more than loading did; of a young expert that may be less than the tolerance.
    noise = min(max((difference for _, difference in to_saved.named()), default=0.0), TOLERANCE)
    _report_before(result, before, loaded, noise)
    _report_loaded(result, to_saved, to_probe)
    _report_stock(result, _compare_stock(loaded))
    _report_spoiled(result, spoiled, noise)
    return result


def _differences(a: torch.Tensor, b: torch.Tensor) -> list[float]:
    """Return the largest absolute difference in each row of (rows, T, vocabulary)."""
    return [max_abs_difference(mine, yours) for mine, yours in zip(a, b, strict=True)]


def _compare_stock(loaded: Loaded) -> Differences:
    """Compare each expert alone, as this package computes it, with stock PEFT's loading of its files."""
    model, ids = loaded.model, loaded.input_ids
    stock = stock_peft_logits(loaded.checkpoint, model.fresh_base(), beside(model, ids))
    return Differences(None, [max_abs_difference(there, logits(model, ids, i)) for i, there in enumerate(stock)])


def _compare_probe(loaded: Loaded, weights: str, result: CheckResult) -> Differences:
    """Return no value if nothing can be compared, which a note or a problem of `result` then says."""
    if loaded.probe is None:
        result.notes.append("probe: none in this checkpoint (saved without base weights); not checked")
        return Differences()
    tensors, there = loaded.probe
    for name in changed_tensors(loaded.model, tensors):
        result.problems.append(f"probe: the tensors of {name} are not to the bit those that were saved; {SAVE_AGAIN}")
    here = probe_facts(loaded.model)
    if there.get("dtype") != here["dtype"]:
        text = f"probe: was computed in {there.get('dtype')}, this base is in {here['dtype']}; not checked"
        result.notes.append(text)
        return Differences()
    if not same_weights(there["base_weights"], here["base_weights"]):
        text = "probe: was computed with other base weights"
        if weights == "pretrained":
            text += ", so that these are not those it was trained on; load the right base model"
            result.problems.append(text)
        else:
            result.notes.append(f"{text}; not checked under random weights")
        return Differences()
    tolerance = probe_tolerance(there, here, tensors)
    found = probe_difference(loaded.model, tensors)
    differences = Differences(found.routed, found.experts)
    elsewhere = "on another machine or device, or computed in another way"
    where = elsewhere if tolerance else "on the machine that saved it"
    result.measures["max_abs_diff_probe"] = differences.largest
    result.notes.append(f"probe: differs by {differences.largest:.3g} (tolerance {tolerance:g}, {where})")
    for name, value in differences.named():
        if not value <= tolerance:
            text = f"probe: {name} differs by {value:.3g} from what the saving process computed, expected at most"
            cause = "a tensor was changed after the save, or belongs to another checkpoint"
            result.problems.append(f"{text} {tolerance:g}: {cause}")
    return differences


def _report_before(result: CheckResult, before: float, loaded: Loaded, noise: float) -> None:
    result.measures["max_abs_diff_before_load"] = before
    note = f"before loading the fresh instance differs by {before:.3g}"
    if set(loaded.checkpoint.config.states) == {NEW}:
        result.notes.append(f"{note} (all experts are new: they have no effect yet)")
        return
    result.notes.append(note)
    if not before > noise:
        result.problems.append(f"loading made no difference ({before:.3g}): the checkpoint has no effect")


def _report_loaded(result: CheckResult, to_saved: Differences, to_probe: Differences) -> None:
    measured = to_probe if to_saved.routed is None else to_saved
    result.measures["max_abs_diff"] = measured.routed
    result.measures["max_abs_diff_per_expert"] = measured.experts or None
    if to_saved.routed is None:
        return
    text = f"routed {to_saved.routed:.3g}, experts alone {max(to_saved.experts):.3g} (tolerance {TOLERANCE:g})"
    result.notes.append(f"after loading: {text}")
    for name, value in to_saved.named():
        if not value <= TOLERANCE:
            text = f"{name}: logits differ by {value:.3g} after loading, expected at most {TOLERANCE:g}"
            result.problems.append(text)


def _report_stock(result: CheckResult, to_stock: Differences) -> None:
    result.measures["max_abs_diff_stock_peft"] = to_stock.experts
    result.notes.append(f"each expert against stock PEFT: {max(to_stock.experts):.3g}")
    for name, value in to_stock.named():
        if not value <= TOLERANCE:
            text = f"{name}: stock PEFT computes logits that differ by {value:.3g}, expected at most {TOLERANCE:g}"
            result.problems.append(text)


# ---- negative controls ----


def _spoil_experts(
    model: Mixture, input_ids: torch.Tensor, experts: range, alone: torch.Tensor
) -> dict[str, float | str]:
    """Return what it changes for each expert alone when its B are negated: a row of the pass sees only its expert."""
    tensors = [
        tensor
        for index in experts
        for name, tensor in model.expert_tensors(index).items()
        if name.endswith("lora_B.weight")
    ]
    new = [model.expert_states[index] == NEW for index in experts]  # its B are zero: nothing to negate
    with _negated(tensors):
        differences = _differences(logits_alone(model, input_ids, experts), alone)
    return {f"expert_{i}": NOT_APPLICABLE if n else d for i, n, d in zip(experts, new, differences, strict=True)}


def _spoil_router(model: Mixture, input_ids: torch.Tensor, routed: torch.Tensor) -> float | str:
    """Return what it changes for the routed mixture when the gate is negated."""
    if model.expert_states.count(NEW) >= model.num_experts - 1:
        return NOT_APPLICABLE  # at most one expert has an effect, and its weight is 1 whatever the gate computes
    with _negated([model.router.gate.weight]):
        return max_abs_difference(logits(model, input_ids), routed)


@contextmanager
def _negated(tensors: Sequence[torch.Tensor]) -> Iterator[None]:
    """Negate tensors inside the block. A sign is changed, and changed back, without rounding."""

    def negate() -> None:
        with torch.no_grad():
            for tensor in tensors:
                tensor.neg_()

    negate()
    try:
        yield
    finally:
        negate()


def _report_spoiled(result: CheckResult, spoiled: dict[str, float | str], noise: float) -> None:
    result.measures["spoiled"] = spoiled
    for name, difference in spoiled.items():
        if isinstance(difference, str):
            result.notes.append(f"negative control, {name} spoiled: {NOT_APPLICABLE}")
            continue
        result.notes.append(f"negative control, {name} spoiled: differs by {difference:.3g}")
        if not difference > noise:
            result.problems.append(f"spoiling {name} was not seen ({difference:.3g}): this comparison could not fail")


def stock_peft_logits(
    checkpoint: SoundCheckpoint, base: PreTrainedModel, input_ids: torch.Tensor
) -> Iterator[torch.Tensor]:
    """Yield what stock PEFT computes with each expert as a plain LoRA: logits (T, vocabulary) of input_ids (1, T).

    Args:
        base: a base model without adapters, whose layers PEFT wraps.
    """
    model = None
    for index in range(checkpoint.config.num_experts):
        name = expert_name(index)
        path = checkpoint.folder / checkpoint.adapter_folder(index)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)  # PEFT calls a deprecated name of Transformers
            if model is None:
                model = PeftModel.from_pretrained(base, path, adapter_name=name).eval()
            else:
                model.load_adapter(path, name)
        model.set_adapter(name)
        with torch.no_grad():
            yield model(input_ids=input_ids, use_cache=False).logits[0]

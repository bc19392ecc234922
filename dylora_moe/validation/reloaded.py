"""The checks of a checkpoint that is loaded again: into a fresh instance, and what that instance then computes.

On a CPU the forward passes are nearly all of the cost, and more rows in one are nearly free. So each pass is made once
and serves every comparison that needs it (`Forwards`), and the experts of a comparison go together, one for each
row of a batch. The input is that of the checkpoint's probe. For N experts, up to 8, these are: 2 passes while saving,
1 before loading, 2 after it, 2 negative controls, and 2 N to hold `expert=i` against stock PEFT to the bit.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from ..base.preserve import untouched
from ..checkpoint import formats
from ..checkpoint.findings import SAVE_AGAIN
from ..checkpoint.probe import (
    PROBE_TOLERANCE,
    ROWS,
    beside,
    changed_tensors,
    logits_alone,
    max_abs_difference,
    probe_difference,
    probe_facts,
    read_probe,
)
from ..checkpoint.read import _adapter_folder, build_mixture, load_into
from ..checkpoint.verify import inspect_config
from ..constants import expert_name
from ..errors import CheckpointError
from ..mixture.model import Mixture
from .report import CheckResult
from .saved import compare_tensors

TOLERANCE = 1e-5
KEPT_BYTES = 256 << 20  # of logits that a Forwards keeps; what is beyond is computed again
NOT_APPLICABLE = "not applicable"


# ---- forward passes ----


def logits(model: Mixture, input_ids: torch.Tensor, expert: int | None = None) -> torch.Tensor:
    """(T, vocabulary) logits of input_ids (1, T), in the base's dtype; the model is left as found."""
    with untouched(model):
        return model(beside(model, input_ids), expert=expert, use_cache=False).logits[0]


class Forwards:
    """What a mixture computes for an input: taken from the passes that were made inside the block, otherwise computed.

    Saving makes for its probe, and comparing with a probe makes, the very passes that the other comparisons need.
    """

    def __init__(self, model: Mixture):
        self.model = model
        self._routed: tuple[torch.Tensor, torch.Tensor] | None = None  # (1, T) and (T, vocabulary)
        self._alone: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._room = KEPT_BYTES

    def __enter__(self) -> Forwards:
        self._hook = self.model.register_forward_hook(self._keep, with_kwargs=True)
        return self

    def __exit__(self, *_) -> None:
        self._hook.remove()

    def _keep(self, model, args: tuple, kwargs: dict, output) -> None:
        ids, expert = args[0] if args else kwargs.get("input_ids"), kwargs.get("expert")
        wanted = len(ids) == 1 if expert is None and ids is not None else isinstance(expert, Sequence)
        if not wanted or not self._fits(output.logits):
            return
        if expert is None:
            self._routed = ids, output.logits[0].detach()
        else:
            rows = zip(expert, ids.unsqueeze(1), output.logits.detach(), strict=True)
            self._alone |= {index: (row, logits) for index, row, logits in rows}

    def _fits(self, tensor: torch.Tensor) -> bool:
        self._room -= tensor.numel() * tensor.element_size()
        return self._room >= 0

    def routed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """(T, vocabulary) logits of input_ids (1, T)."""
        if self._routed is not None and _same(self._routed[0], input_ids):
            return self._routed[1]
        return logits(self.model, input_ids)

    def alone(self, input_ids: torch.Tensor, experts: range) -> torch.Tensor:
        """(len(experts), T, vocabulary) logits of input_ids (1, T) for each of the experts alone."""

        kept = [self._alone.get(expert) for expert in experts]
        if all(found is not None and _same(found[0], input_ids) for found in kept):
            return torch.stack([found[1] for found in kept])
        return logits_alone(self.model, input_ids, experts)


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:

    return torch.equal(a.cpu(), b.cpu())


# ---- load ----


@dataclass
class Loaded:
    """A mixture read from a checkpoint into a fresh instance, and what that instance computed before."""

    model: Mixture
    probe: tuple[dict[str, torch.Tensor], dict[str, str]] | None  # tensors and facts
    input_ids: torch.Tensor  # (1, T)
    before: torch.Tensor  # (T, vocabulary) logits of the fresh instance
    states: list[str]  # of the experts, as the checkpoint has them


def check_load(folder: Path, base: PreTrainedModel) -> tuple[CheckResult, Loaded | None]:
    """The checkpoint goes into a fresh instance completely: every tensor, and every expert's state."""
    result = CheckResult("load")
    try:
        model = build_mixture(folder, base)
        probe, input_ids = _read_probe(folder, base.get_input_embeddings().num_embeddings)
        before = logits(model, input_ids)
        skills = load_into(folder, model)
    except CheckpointError as error:
        result.problems = error.problems
        return result, None
    states = [expert["state"] for expert in inspect_config(folder)["experts"]]
    compared, result.problems = compare_tensors(folder, model)
    if model.expert_states != states:
        found = ", ".join(model.expert_states)
        result.problems.append(f"the experts are {found} after loading, expected {', '.join(states)}")
    result.measures["tensors_compared"] = compared
    result.notes.append(f"{model.num_experts} experts ({', '.join(sorted(set(states)))}), router, {len(skills)} skills")
    return result, Loaded(model, probe, input_ids, before, states)


def _read_probe(folder: Path, vocabulary_size: int) -> tuple[tuple | None, torch.Tensor]:
    """The probe, None where there is none; and the input (1, 16) that all is computed for.

    Raises:
        CheckpointError: where the probe is for another vocabulary.
    """

    probe = read_probe(folder)
    if probe is None:
        return None, (torch.arange(formats.PROBE_TOKENS) * 7919 + 13).unsqueeze(0) % vocabulary_size
    input_ids = probe[0]["input_ids"]
    least, most = int(input_ids.min()), int(input_ids.max())
    if least < 0 or most >= vocabulary_size:
        found = f"expected tokens from 0 to {vocabulary_size - 1}, found {least} to {most}"
        raise CheckpointError(folder, [f"{formats.PROBE}: tensor input_ids: {found}; {SAVE_AGAIN}"])
    return probe, input_ids


# ---- consistency ----


@dataclass
class Differences:
    """Largest absolute differences of logits: routed, and per expert alone."""

    routed: float | None = None
    experts: list[float] = field(default_factory=list)

    def named(self) -> list[tuple[str, float]]:
        routed = [] if self.routed is None else [("routed", self.routed)]
        return routed + [(f"expert_{index}", difference) for index, difference in enumerate(self.experts)]

    @property
    def largest(self) -> float:
        return max(difference for _, difference in self.named())


def check_consistency(loaded: Loaded, folder: Path, *, saved: Forwards | None, weights: str) -> CheckResult:
    """The loaded mixture computes what the saved one does, routed and for each expert alone; and spoiling is seen.

    Args:
        saved: of the mixture that was saved; None where the checkpoint is somebody else's and only its probe can speak.
        weights: "pretrained" or "random", what the base's are.
    """
    result = CheckResult("consistency")
    model, ids = loaded.model, loaded.input_ids
    with Forwards(model) as here:
        to_probe = _compare_probe(loaded, weights, result)
    routed = here.routed(ids)
    before = _difference(loaded.before, routed)
    to_saved = Differences(None if saved is None else _difference(saved.routed(ids), routed))
    spoiled: dict[str, float | str] = {}
    for start in range(0, model.num_experts, ROWS):
        experts = range(start, min(start + ROWS, model.num_experts))
        alone = here.alone(ids, experts)  # (rows, T, vocabulary)
        if saved is not None:
            to_saved.experts += _differences(saved.alone(ids, experts), alone)
        spoiled |= _spoil_experts(model, ids, experts, alone)
    spoiled["router"] = _spoil_router(model, ids, routed)

    # A control must change more than loading did; of a young expert that may be less than the tolerance.
    noise = min(max((difference for _, difference in to_saved.named()), default=0.0), TOLERANCE)
    _report_before(result, before, loaded, noise)
    _report_loaded(result, to_saved, to_probe)
    _report_stock(result, _compare_stock(model, folder, ids))
    _report_spoiled(result, spoiled, noise)
    return result


def _difference(a: torch.Tensor, b: torch.Tensor) -> float:

    return max_abs_difference(a, b)


def _differences(a: torch.Tensor, b: torch.Tensor) -> list[float]:
    """Of each row of (rows, T, vocabulary)."""
    return [_difference(mine, yours) for mine, yours in zip(a, b, strict=True)]


def _compare_stock(model: Mixture, folder: Path, input_ids: torch.Tensor) -> Differences:
    """Each expert as this package computes it alone, against stock PEFT's loading of its files."""
    stock = stock_peft_logits(folder, model.num_experts, model.fresh_base(), beside(model, input_ids))
    return Differences(None, [_difference(theirs, logits(model, input_ids, i)) for i, theirs in enumerate(stock)])


def _compare_probe(loaded: Loaded, weights: str, result: CheckResult) -> Differences:
    """Without a value where nothing can be compared, which `result` then says, as a problem or as a note."""
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
    if there.get("base_weights") != here["base_weights"]:
        text = "probe: was computed with other base weights"
        if weights == "pretrained":
            text += ", so that these are not those it was trained on; load the right base model"
            result.problems.append(text)
        else:
            result.notes.append(f"{text}; not checked under random weights")
        return Differences()
    same = there.get("machine") == here["machine"] and there.get("device_type") == here["device_type"]
    tolerance = 0.0 if same else PROBE_TOLERANCE.get(here["dtype"], 0.25)
    found = probe_difference(loaded.model, tensors)
    differences = Differences(found.routed, found.experts)
    where = "on the machine that saved it" if same else "on another machine or device, or computed in another way"
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
    if set(loaded.states) == {"new"}:
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
    """What it changes for each of the experts alone when its B are negated. One row does not see another's expert."""
    tensors = [
        tensor
        for index in experts
        for name, tensor in model.expert_tensors(index).items()
        if name.endswith("lora_B.weight")
    ]
    new = [model.expert_states[index] == "new" for index in experts]  # nothing to negate
    with _negated(tensors):
        differences = _differences(logits_alone(model, input_ids, experts), alone)
    return {f"expert_{i}": NOT_APPLICABLE if n else d for i, n, d in zip(experts, new, differences, strict=True)}


def _spoil_router(model: Mixture, input_ids: torch.Tensor, routed: torch.Tensor) -> float | str:
    """What it changes for the routed mixture when the gate is negated."""
    if model.expert_states.count("new") >= model.num_experts - 1:
        return NOT_APPLICABLE  # at most one expert has an effect, and its weight is 1 whatever the gate says
    with _negated([model.router.gate.weight]):
        return _difference(logits(model, input_ids), routed)


@contextmanager
def _negated(tensors: list[torch.Tensor]) -> Iterator[None]:
    """The sign is exact to change and to change back."""

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
        if difference == NOT_APPLICABLE:
            result.notes.append(f"negative control, {name} spoiled: {NOT_APPLICABLE}")
            continue
        result.notes.append(f"negative control, {name} spoiled: differs by {difference:.3g}")
        if not difference > noise:
            result.problems.append(f"spoiling {name} was not seen ({difference:.3g}): this comparison could not fail")


def stock_peft_logits(folder: str | Path, experts: int, base: PreTrainedModel, input_ids: torch.Tensor) -> Iterator:
    """What stock PEFT computes with each expert as a LoRA of its own: logits (T, vocabulary) of input_ids (1, T).

    Args:
        base: a base model without adapters; PEFT wraps its layers.
    """
    folder = Path(folder)
    model = None
    for index in range(experts):
        name = expert_name(index)
        path = folder / _adapter_folder(folder, name)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)  # PEFT asks Transformers by a name that is going
            if model is None:
                model = PeftModel.from_pretrained(base, path, adapter_name=name).eval()
            else:
                model.load_adapter(path, name)
        model.set_adapter(name)
        with torch.no_grad():
            yield model(input_ids=input_ids, use_cache=False).logits[0]

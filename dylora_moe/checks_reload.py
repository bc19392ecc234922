"""The checks of a checkpoint that is loaded again: into a fresh instance, and what that instance then computes.

On a CPU the forward passes are nearly all of the cost, so each is made once and serves every comparison that needs it.
The input is that of the checkpoint's probe: what the saving process computed for the probe is kept (`Recorder`), and
the forwards of the loaded instance are held against that, against the probe and against stock PEFT. For N experts
there are N + 1 while saving, 1 before loading, N + 1 after it, N by stock PEFT and N + 1 negative controls.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from . import formats, verify
from .checks import CheckResult, compare_tensors

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from .model import DyLoRAMoE

TOLERANCE = 1e-5
INPUT_TOKENS = 16
KEPT_BYTES = 64 << 20  # of logits that a Recorder keeps; what is beyond is computed again
NOT_APPLICABLE = "not applicable"


# ---- forwards ----


def logits(model: DyLoRAMoE, input_ids: torch.Tensor, expert: int | None = None) -> torch.Tensor:
    """(T, vocabulary) logits of input_ids (1, T), in the base's dtype; the model is left as found."""
    from .model import untouched

    device = model.base.get_input_embeddings().weight.device
    with untouched(model):
        return model(input_ids.to(device), expert=expert, use_cache=False).logits[0]


class Recorder:
    """What a mixture computes for an input: taken from the forwards made inside the block, otherwise computed.

    Saving needs the same forwards for its probe, and a forward costs more than all that is written.
    """

    def __init__(self, model: DyLoRAMoE):
        self.model = model
        self._kept: dict[int | None, tuple[torch.Tensor, torch.Tensor]] = {}
        self._room = KEPT_BYTES

    def __enter__(self) -> Recorder:
        self._hook = self.model.register_forward_hook(self._keep, with_kwargs=True)
        return self

    def __exit__(self, *_) -> None:
        self._hook.remove()

    def _keep(self, model, args: tuple, kwargs: dict, output) -> None:
        size = output.logits.numel() * output.logits.element_size()
        if len(args) == 1 and len(args[0]) == 1 and size <= self._room:
            self._room -= size
            self._kept[kwargs.get("expert")] = (args[0], output.logits[0].detach())

    def logits(self, input_ids: torch.Tensor, expert: int | None = None) -> torch.Tensor:
        """(T, vocabulary) logits of input_ids (1, T)."""
        import torch

        seen, kept = self._kept.pop(expert, (None, None))
        if seen is not None and torch.equal(seen.cpu(), input_ids.cpu()):
            return kept
        return logits(self.model, input_ids, expert)


# ---- load ----


@dataclass
class Loaded:
    """A mixture read from a checkpoint into a fresh instance, and what that instance computed before."""

    model: DyLoRAMoE
    probe: Probe | None
    input_ids: torch.Tensor  # (1, T)
    before: torch.Tensor  # (T, vocabulary) logits of the fresh instance
    states: list[str]  # of the experts, as the checkpoint has them


@dataclass
class Probe:
    """What the saving process computed: for positions T and the entries V of the vocabulary."""

    facts: dict
    input_ids: torch.Tensor  # (1, T)
    vocabulary: torch.Tensor  # (V,)
    routed: torch.Tensor  # (T, V)
    experts: torch.Tensor  # (N, T, V)

    def entries(self, logits: torch.Tensor) -> torch.Tensor:
        """(T, V) of logits (T, vocabulary), as the probe has them."""
        return logits.index_select(-1, self.vocabulary.to(logits.device)).float().cpu()


def check_load(folder: Path, base: PreTrainedModel) -> tuple[CheckResult, Loaded | None]:
    """The checkpoint goes into a fresh instance completely: every tensor, and every expert's state."""
    from . import checkpoint
    from .errors import CheckpointError

    result = CheckResult("load")
    try:
        model = checkpoint.build(folder, base)
        probe = _read_probe(folder, base.get_input_embeddings().num_embeddings)
        input_ids = fixed_input(base) if probe is None else probe.input_ids
        before = logits(model, input_ids)
        skills = checkpoint.load_into(folder, model)
    except CheckpointError as error:
        result.problems = error.problems
        return result, None
    states = [expert["state"] for expert in verify.inspect_config(folder)["experts"]]
    compared, result.problems = compare_tensors(folder, model)
    if model.expert_states != states:
        found = ", ".join(model.expert_states)
        result.problems.append(f"the experts are {found} after loading, expected {', '.join(states)}")
    result.measures["tensors_compared"] = compared
    result.notes.append(f"{model.num_experts} experts ({', '.join(sorted(set(states)))}), router, {len(skills)} skills")
    return result, Loaded(model, probe, input_ids, before, states)


def fixed_input(base: PreTrainedModel) -> torch.Tensor:
    """(1, 16) token ids, where there is no probe."""
    import torch

    return (torch.arange(INPUT_TOKENS) * 6151 + 29).unsqueeze(0) % base.get_input_embeddings().num_embeddings


def _read_probe(folder: Path, vocabulary_size: int) -> Probe | None:
    """The probe of a checkpoint in which verify.py finds no problem; None where it has none.

    Raises:
        CheckpointError: where its facts or its ids are not what they must be; its dtypes and shapes are.
    """
    from . import checkpoint
    from .errors import CheckpointError

    try:
        found = checkpoint.read_probe(folder)
    except json.JSONDecodeError as error:
        raise CheckpointError(folder, [f"{formats.PROBE}: its facts are not JSON ({error})"]) from None
    if found is None:
        return None
    tensors, facts = found
    if not isinstance(facts, dict):
        raise CheckpointError(folder, [f"{formats.PROBE}: expected its facts as an object, found {facts!r:.80}"])
    problems = []
    for name in ("input_ids", "vocabulary"):
        least, most = int(tensors[name].min()), int(tensors[name].max())
        if least < 0 or most >= vocabulary_size:
            found = f"expected numbers from 0 to {vocabulary_size - 1}, found {least} to {most}"
            problems.append(f"{formats.PROBE}: tensor {name}: {found}; {verify.SAVE_AGAIN}")
    if problems:
        raise CheckpointError(folder, problems)
    return Probe(facts, **{name: tensors[name] for name in ("input_ids", "vocabulary", "routed", "experts")})


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


def check_consistency(loaded: Loaded, folder: Path, *, saved: Recorder | None, weights: str) -> CheckResult:
    """The loaded mixture computes what the saved one does, routed and for each expert alone; and spoiling is seen.

    Args:
        saved: of the mixture that was saved; None where the checkpoint is somebody else's and only its probe can speak.
        weights: "pretrained" or "random", what the base's are.
    """
    from .checkpoint import stock_peft_logits

    result = CheckResult("consistency")
    model, ids = loaded.model, loaded.input_ids
    probe = Comparison.of(loaded, weights, result)
    to_saved, to_probe, to_stock = Differences(), Differences(), Differences()
    spoiled: dict[str, float | str] = {}

    routed = logits(model, ids)
    before = _difference(loaded.before, routed)
    if saved is not None:
        to_saved.routed = _difference(saved.logits(ids), routed)
    if probe is not None:
        to_probe.routed = _difference(probe.probe.entries(routed), probe.probe.routed)

    stock = stock_peft_logits(folder, model.num_experts, model.fresh_base(), ids.to(routed.device))
    for index, theirs in enumerate(stock):
        alone = logits(model, ids, index)
        to_stock.experts.append(_difference(theirs, alone))
        if saved is not None:
            to_saved.experts.append(_difference(saved.logits(ids, index), alone))
        if probe is not None:
            to_probe.experts.append(_difference(probe.probe.entries(alone), probe.probe.experts[index]))
        spoiled[f"expert_{index}"] = _spoil_expert(model, ids, index, alone)
    spoiled["router"] = _spoil_router(model, ids, routed)

    _report_before(result, before, loaded)
    _report_loaded(result, to_saved, to_probe, probe)
    _report_stock(result, to_stock)
    _report_spoiled(result, spoiled)
    return result


def _difference(a: torch.Tensor, b: torch.Tensor) -> float:
    from .checkpoint import max_abs_difference

    return max_abs_difference(a, b)


@dataclass
class Comparison:
    """A probe that can be compared here: how far it may be off, and why so far."""

    probe: Probe
    tolerance: float
    where: str

    @classmethod
    def of(cls, loaded: Loaded, weights: str, result: CheckResult) -> Comparison | None:
        """None where nothing can be compared, which `result` then says, as a problem or as a note."""
        from . import checkpoint

        if loaded.probe is None:
            result.notes.append("probe: none in this checkpoint (saved without base weights); not checked")
            return None
        there, here = loaded.probe.facts, checkpoint.probe_facts(loaded.model)
        if there.get("dtype") != here["dtype"]:
            text = f"probe: was computed in {there.get('dtype')}, this base is in {here['dtype']}; not checked"
            result.notes.append(text)
            return None
        if there.get("base_weights") != here["base_weights"]:
            text = "probe: was computed with other base weights"
            if weights == "pretrained":
                text += ", so that these are not those it was trained on; load the right base model"
                result.problems.append(text)
            else:
                result.notes.append(f"{text}; not checked under random weights")
            return None
        if there.get("machine") == here["machine"] and there.get("device_type") == here["device_type"]:
            return cls(loaded.probe, 0.0, "on the machine that saved it")
        tolerance = checkpoint.PROBE_TOLERANCE.get(here["dtype"], 0.25)
        return cls(loaded.probe, tolerance, "on another machine, device or number of threads")


def _report_before(result: CheckResult, before: float, loaded: Loaded) -> None:
    result.measures["max_abs_diff_before_load"] = before
    note = f"before loading the fresh instance differs by {before:.3g}"
    if set(loaded.states) == {"new"}:
        result.notes.append(f"{note} (all experts are new: they have no effect yet)")
        return
    result.notes.append(note)
    if not before > TOLERANCE:
        result.problems.append(f"loading made no difference ({before:.3g}): the checkpoint has no effect")


def _report_loaded(result: CheckResult, to_saved: Differences, to_probe: Differences, probe: Comparison | None) -> None:
    measured = to_probe if to_saved.routed is None else to_saved
    result.measures["max_abs_diff"] = measured.routed
    result.measures["max_abs_diff_per_expert"] = measured.experts or None
    if to_saved.routed is not None:
        alone = max(to_saved.experts)
        text = f"routed {to_saved.routed:.3g}, experts alone {alone:.3g} (tolerance {TOLERANCE:g})"
        result.notes.append(f"after loading: {text}")
        for name, value in to_saved.named():
            if not value <= TOLERANCE:
                text = f"{name}: logits differ by {value:.3g} after loading, expected at most {TOLERANCE:g}"
                result.problems.append(text)
    if probe is None:
        return
    result.measures["max_abs_diff_probe"] = to_probe.largest
    result.notes.append(f"probe: differs by {to_probe.largest:.3g} (tolerance {probe.tolerance:g}, {probe.where})")
    for name, value in to_probe.named():
        if not value <= probe.tolerance:
            text = f"probe: {name} differs by {value:.3g} from what the saving process computed, expected at most"
            cause = "a tensor was changed after the save, or belongs to another checkpoint"
            result.problems.append(f"{text} {probe.tolerance:g}: {cause}")


def _report_stock(result: CheckResult, to_stock: Differences) -> None:
    result.measures["max_abs_diff_stock_peft"] = to_stock.experts
    result.notes.append(f"each expert against stock PEFT: {max(to_stock.experts):.3g}")
    for name, value in to_stock.named():
        if not value <= TOLERANCE:
            text = f"{name}: stock PEFT computes logits that differ by {value:.3g}, expected at most {TOLERANCE:g}"
            result.problems.append(text)


# ---- negative controls ----


def _spoil_expert(model: DyLoRAMoE, input_ids: torch.Tensor, index: int, alone: torch.Tensor) -> float | str:
    """What it changes for expert `index` alone when its B are negated."""
    if model.expert_states[index] == "new":
        return NOT_APPLICABLE
    tensors = [t for name, t in model.expert_tensors(index).items() if name.endswith("lora_B.weight")]
    with _negated(tensors):
        return _difference(logits(model, input_ids, index), alone)


def _spoil_router(model: DyLoRAMoE, input_ids: torch.Tensor, routed: torch.Tensor) -> float | str:
    """What it changes for the routed mixture when the gate is negated."""
    if model.expert_states.count("new") >= model.num_experts - 1:
        return NOT_APPLICABLE  # at most one expert has an effect, and its weight is 1 whatever the gate says
    with _negated([model.router.gate.weight]):
        return _difference(logits(model, input_ids), routed)


@contextmanager
def _negated(tensors: list[torch.Tensor]) -> Iterator[None]:
    """The sign is exact to change and to change back."""
    import torch

    def negate() -> None:
        with torch.no_grad():
            for tensor in tensors:
                tensor.neg_()

    negate()
    try:
        yield
    finally:
        negate()


def _report_spoiled(result: CheckResult, spoiled: dict[str, float | str]) -> None:
    result.measures["spoiled"] = spoiled
    for name, difference in spoiled.items():
        if difference == NOT_APPLICABLE:
            result.notes.append(f"negative control, {name} spoiled: {NOT_APPLICABLE}")
            continue
        result.notes.append(f"negative control, {name} spoiled: differs by {difference:.3g}")
        if not difference > TOLERANCE:
            result.problems.append(f"spoiling {name} was not seen ({difference:.3g}): this comparison could not fail")

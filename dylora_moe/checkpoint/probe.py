"""The probe of a checkpoint: what the saving process computed for a fixed input, and digests of the tensors it saved.

A checkpoint whose manifest was rewritten to fit other tensors is sound in itself, but contradicts its probe.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import transformers
from safetensors import safe_open

from .. import __version__
from ..base.fingerprint import same_weights, weights_fingerprint
from ..base.hankel import HankelMatrix
from ..base.preserve import untouched
from ..constants import expert_name
from ..errors import CheckpointError
from ..mixture.model import Mixture
from ..system import machine
from . import formats
from .tensors import dtype_name, input_embeddings, tensor_digests
from .verify import SoundCheckpoint

PROBE_ENTRIES = 32
ROWS = 8  # experts that share a forward pass, one for each row of the batch
# Matmuls round differently on another machine or device, or with another number of threads. These allow for about four
# bits of the dtype's precision, for logits of up to LARGE_LOGIT; for larger ones, in proportion, as their digits are.
PROBE_TOLERANCE = {"float32": 1e-3, "float64": 1e-6, "bfloat16": 0.25, "float16": 0.05}
LARGE_LOGIT = 16.0
TF32 = "products in TF32"


@dataclass(frozen=True)
class ProbeDifference:
    """The largest absolute difference of logits between a model and the probe of a checkpoint."""

    routed: float
    experts: list[float]

    @property
    def largest(self) -> float:
        return max([self.routed, *self.experts])


Outputs = tuple[dict[str, torch.Tensor], dict[str, str]]  # tensors and facts


def make_probe(
    model: Mixture, digests: Sequence[str] | None = None, outputs: Outputs | None = None
) -> tuple[dict[str, torch.Tensor], dict[str, str]] | None:
    """Compute the probe of a mixture: its tensors, and the facts under which they can be compared.

    input_ids (1, 16) and vocabulary (32,) int64; routed (16, 32) and experts (N, 16, 32) float32, the logits of those
    vocabulary entries; sha256 (N + 1, 32) uint8, of the file of each expert and of the router.

    Args:
        digests: the SHA-256 of those files, if they are known already.
        outputs: what `probe_outputs` has returned, if it was called already.

    Returns:
        None if the base has no weights, or if its logits overflow their dtype.
    """
    outputs = outputs or probe_outputs(model)
    if outputs is None:
        return None
    tensors, facts = outputs
    if not (tensors["routed"].isfinite().all() and tensors["experts"].isfinite().all()):
        return None
    raw = b"".join(map(bytes.fromhex, digests or tensor_digests(model)))
    return tensors | {"sha256": torch.frombuffer(bytearray(raw), dtype=torch.uint8).reshape(-1, 32)}, facts


def probe_outputs(model: Mixture) -> Outputs | None:
    """Compute the part of a probe that takes forward passes, finite or not; None if the base has no weights.

    If the base is sharded, every rank must call it, and the one that saves hands the result to `save_checkpoint`.
    """
    if not model.has_base_weights:
        return None
    size = input_embeddings(model).num_embeddings
    size = min(size, getattr(model.base.config.get_text_config(), "vocab_size", None) or size)
    input_ids = (torch.arange(formats.PROBE_TOKENS).unsqueeze(0) * 7919 + 13) % size
    vocabulary = torch.arange(PROBE_ENTRIES) * size // PROBE_ENTRIES
    routed, experts = _probe_logits(model, input_ids, vocabulary)
    tensors = {"input_ids": input_ids, "vocabulary": vocabulary, "routed": routed, "experts": experts}
    return tensors, probe_facts(model)


def probe_facts(model: Mixture) -> dict[str, str]:
    """Return the facts that decide how a model rounds: if they are equal, the logits must be equal to the bit."""
    return {
        "dtype": dtype_name(model),
        "device_type": model.device.type,
        "base_weights": weights_fingerprint(model.base),
        "machine": ", ".join([arithmetic(model.device), *_computed(model)]),
    }


def _computed(model: Mixture) -> Iterator[str]:
    """Yield what about a model, rather than the machine, decides how it rounds."""
    attention = getattr(model.base.config, "_attn_implementation", None)
    if attention is not None:
        yield f"{attention} attention"
    if _is_compact(model):
        yield "compact random weights"


def probe_tolerance(there: Mapping[str, str], here: Mapping[str, str], probe: Mapping[str, torch.Tensor]) -> float:
    """Return by how much logits may differ between what two descriptions (`probe_facts`) of the same dtype say."""
    if all(there.get(key) == here[key] for key in ("machine", "device_type")):
        return 0.0
    in_tf32 = here["dtype"] == "float32" and any(TF32 in facts.get("machine", "") for facts in (there, here))
    # TF32 has as many digits as float16.
    tolerance = PROBE_TOLERANCE.get("float16" if in_tf32 else here["dtype"], PROBE_TOLERANCE["bfloat16"])
    largest = max(float(probe[name].abs().max()) for name in ("routed", "experts"))
    return tolerance * max(1.0, largest / LARGE_LOGIT)


def saved_on(facts: Mapping[str, str], model: Mixture) -> bool:
    """Return whether the base's weights are those of a probe's facts.

    True as well if it cannot be told: for weights of another dtype, on the meta device, or offloaded.
    """
    return (
        not model.has_base_weights
        or facts.get("dtype") != dtype_name(model)
        or same_weights(facts["base_weights"], weights_fingerprint(model.base))
    )


def _is_compact(model: Mixture) -> bool:
    """Whether the base has compact random weights, whose products round differently from those of full matrices."""
    return any(isinstance(parameter, HankelMatrix) for parameter in model.base.parameters())


def read_probe(checkpoint: SoundCheckpoint) -> tuple[dict[str, torch.Tensor], dict[str, str]] | None:
    """Return the tensors and the facts of a checkpoint's probe, or None if it has none."""
    if not checkpoint.config.probe:
        return None
    with safe_open(checkpoint.folder / formats.PROBE, framework="pt") as file:
        return file.get_tensors(), json.loads(file.metadata()["probe"])


def probe_difference(model: Mixture, probe: dict[str, torch.Tensor]) -> ProbeDifference:
    """Compare what this model computes with what the saving process computed.

    Raises:
        CheckpointError: if the probe is of a mixture of another shape.
    """
    _check_shape(model, probe)
    routed, experts = _probe_logits(model, probe["input_ids"], probe["vocabulary"])
    differences = [max_abs_difference(a, b) for a, b in zip(experts, probe["experts"], strict=True)]
    differences.append(max_abs_difference(routed, probe["routed"]))
    return ProbeDifference(routed=differences[-1], experts=differences[:-1])


def changed_tensors(model: Mixture, probe: dict[str, torch.Tensor]) -> list[str]:
    """Return the names of the experts, or "router", whose tensors are not to the bit those that were saved.

    The logits need not show it: in bfloat16 a small change of one weight is rounded away. No base weights are needed.

    Raises:
        CheckpointError: if the probe is of a mixture of another shape.
    """
    _check_shape(model, probe)
    names = [*map(expert_name, range(model.num_experts)), "router"]
    digests = zip(names, probe["sha256"], tensor_digests(model), strict=True)
    return [name for name, there, here in digests if bytes(there.tolist()).hex() != here]


def _check_shape(model: Mixture, probe: dict[str, torch.Tensor]) -> None:
    size = input_embeddings(model).num_embeddings
    most = max(int(probe["input_ids"].max()), int(probe["vocabulary"].max()))
    if len(probe["experts"]) != model.num_experts or most >= size:
        expected = f"expected one of {model.num_experts} experts and {size} tokens"
        found = f"found {len(probe['experts'])} and a token {most}"
        raise CheckpointError(
            formats.PROBE, [f"{formats.PROBE}: {expected}, {found}; load the checkpoint it is part of"]
        )


def max_abs_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return max |a - b|, which is infinite if it is NaN."""
    difference = (a.cpu().double() - b.cpu().double()).abs().max().item()  # MPS has no float64
    return float("inf") if difference != difference else difference


def _probe_logits(
    model: Mixture, input_ids: torch.Tensor, vocabulary: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits of the routed mixture (16, n) and of each expert alone (N, 16, n)."""
    experts = range(model.num_experts)
    with untouched(model):
        runs = [model(beside(model, input_ids), use_cache=False).logits]
    runs += [logits_alone(model, input_ids, experts[start : start + ROWS]) for start in experts[::ROWS]]
    columns = [run.index_select(-1, vocabulary.to(run.device)).float().cpu() for run in runs]  # (rows, 16, n)
    return columns[0][0], torch.cat(columns[1:])


def logits_alone(model: Mixture, input_ids: torch.Tensor, experts: Sequence[int]) -> torch.Tensor:
    """Return the logits (len(experts), T, vocabulary) of input_ids (1, T), of each expert alone, from one pass."""
    rows = beside(model, input_ids).expand(len(experts), -1)  # (len(experts), T)
    with untouched(model):
        return model(rows, expert=experts, use_cache=False).logits


def beside(model: Mixture, input_ids: torch.Tensor) -> torch.Tensor:
    """Return the tokens on the device of the base's embeddings."""
    return input_ids.to(input_embeddings(model).weight.device)


def arithmetic(device: torch.device) -> str:
    """Describe what rounding depends on: two processes of the same description compute the same bits.

    These are the processor, its vector instructions, the number of threads, the name of another device, and the
    versions of the libraries, since another version may add in another order.
    """
    parts = [machine.cpu_name(), torch.backends.cpu.get_cpu_capability(), f"{torch.get_num_threads()} threads"]
    parts += [f"torch {torch.__version__}", f"transformers {transformers.__version__}", f"dylora_moe {__version__}"]
    if device.type == "cuda":
        parts.append(torch.cuda.get_device_name(device))
        if torch.backends.cuda.matmul.fp32_precision == "tf32":
            parts.append(TF32)
    elif device.type != "cpu":
        parts.append(str(device.type))
    return ", ".join(parts)

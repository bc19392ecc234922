"""The proof that a checkpoint carries: what the saving process computed for a fixed input, and a digest of its tensors.

A checkpoint whose manifest was rewritten to fit other tensors is sound in itself; against the probe it is not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import load_file

from .. import __version__
from ..base.hankel import HankelMatrix
from ..base.preserve import untouched
from ..base.structure import weights_fingerprint
from ..constants import expert_name
from ..errors import CheckpointError, UsageError
from ..mixture.model import Mixture
from ..system import machine
from . import formats
from .safetensors_file import hash_tensors
from .verify_tensors import read_facts

PROBE_ENTRIES = 32
ROWS = 8  # experts of one forward pass
# Between machines, devices or numbers of threads matmuls round differently; about four bits of the dtype's precision.
PROBE_TOLERANCE = {"float32": 1e-3, "float64": 1e-6, "bfloat16": 0.25, "float16": 0.05}


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
    """What this model computes for a fixed input, and the facts under which that can be compared.

    input_ids (1, 16) and vocabulary (32,) int64; routed (16, 32) and experts (N, 16, 32) float32, the logits of those
    vocabulary entries; sha256 (N + 1, 32) uint8, of each expert's tensors and the router's. None where the base has no
    weights, and where it overflows its dtype.

    Args:
        digests: those SHA-256, where they are known already.
        outputs: of `probe_outputs`, likewise.
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
    """The part of a probe that takes forward passes, finite or not; None where the base has no weights.

    Of a sharded base every rank must ask for it, and the one that saves gives it to `checkpoint.save`.
    """
    if not model.has_base_weights:
        return None
    size = model.base.get_input_embeddings().num_embeddings
    size = min(size, getattr(model.base.config.get_text_config(), "vocab_size", None) or size)
    input_ids = (torch.arange(formats.PROBE_TOKENS).unsqueeze(0) * 7919 + 13) % size
    vocabulary = torch.arange(PROBE_ENTRIES) * size // PROBE_ENTRIES
    routed, experts = _probe_logits(model, input_ids, vocabulary)
    tensors = {"input_ids": input_ids, "vocabulary": vocabulary, "routed": routed, "experts": experts}
    return tensors, probe_facts(model)


def probe_facts(model: Mixture) -> dict[str, str]:
    """Where these are equal, so must the logits be to the bit; another machine or device rounds differently."""
    return {
        "dtype": dtype_name(model),
        "device_type": model.device.type,
        "base_weights": weights_fingerprint(model.base),
        "machine": arithmetic(model.device) + (", compact random weights" if _is_compact(model) else ""),
    }


def saved_on(facts: Mapping[str, str], model: Mixture) -> bool:
    """Whether the base's weights are those of a probe's facts; true as well where it cannot be told: for weights of
    another dtype, on the meta device, or kept elsewhere."""
    return (
        not model.has_base_weights
        or facts.get("dtype") != dtype_name(model)
        or facts.get("base_weights") == weights_fingerprint(model.base)
    )


def _is_compact(model: Mixture) -> bool:
    """Whether products with the base's matrices are computed in another way than with a matrix of full size."""
    return any(isinstance(parameter, HankelMatrix) for parameter in model.base.parameters())


def dtype_name(model: Mixture) -> str:
    """The dtype of the base's weights, such as "bfloat16"."""
    weight = model.base.get_input_embeddings().weight
    return str(weight.dtype).removeprefix("torch.")


def read_probe(folder: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, str]] | None:
    """The tensors and facts of a sound checkpoint's probe; None where it carries none."""
    path = Path(folder) / formats.PROBE
    return (load_file(path), read_facts(path)) if path.exists() else None


def probe_difference(model: Mixture, probe: dict[str, torch.Tensor]) -> ProbeDifference:
    """How far this model is from what the saving process computed.

    Raises:
        CheckpointError: where the probe is of a mixture of another shape.
    """
    _check_shape(model, probe)
    routed, experts = _probe_logits(model, probe["input_ids"], probe["vocabulary"])
    differences = [max_abs_difference(a, b) for a, b in zip(experts, probe["experts"], strict=True)]
    differences.append(max_abs_difference(routed, probe["routed"]))
    return ProbeDifference(routed=differences[-1], experts=differences[:-1])


def changed_tensors(model: Mixture, probe: dict[str, torch.Tensor]) -> list[str]:
    """The experts, and "router", whose tensors are not to the bit those that were saved.

    The logits need not show it: in bfloat16 a small change of one weight is rounded away. And it needs no base weights.

    Raises:
        CheckpointError: where the probe is of a mixture of another shape.
    """
    _check_shape(model, probe)
    names = [*map(expert_name, range(model.num_experts)), "router"]
    digests = zip(names, probe["sha256"], tensor_digests(model), strict=True)
    return [name for name, there, here in digests if bytes(there.tolist()).hex() != here]


def _check_shape(model: Mixture, probe: dict[str, torch.Tensor]) -> None:
    size = model.base.get_input_embeddings().num_embeddings
    most = max(int(probe["input_ids"].max()), int(probe["vocabulary"].max()))
    if len(probe["experts"]) != model.num_experts or most >= size:
        expected = f"expected one of {model.num_experts} experts and {size} tokens"
        found = f"found {len(probe['experts'])} and a token {most}"
        raise CheckpointError(
            formats.PROBE, [f"{formats.PROBE}: {expected}, {found}; load the checkpoint it is part of"]
        )


def max_abs_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """max |a - b|; NaN counts as infinitely far."""
    difference = (a.double() - b.double()).abs().max().item()
    return float("inf") if difference != difference else difference


def as_arrays(tensors: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """The same values on the CPU, in float32 where they were rounded further; not copied where they are that already.

    Raises:
        UsageError: for float64, of which float32 would hold others.
    """
    return {name: _as_saved(name, tensor).contiguous().numpy() for name, tensor in tensors.items()}


def _as_saved(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dtype == torch.float64:
        raise UsageError(f"{name} is in float64, experts and router are saved in float32: cast the mixture to it first")
    return tensor.detach().to("cpu", torch.float32 if tensor.is_floating_point() else tensor.dtype)


def tensor_digests(model: Mixture) -> list[str]:
    """The SHA-256 of the file that each expert, and then the router, is written to."""
    parts = [*expert_tensors(model), gate_tensors(model)]
    return [hash_tensors(as_arrays(part)) for part in parts]


def expert_tensors(model: Mixture) -> list[dict[str, torch.Tensor]]:
    """`model.expert_tensors` of every expert, in one walk over the modules, of which each expert brings more."""
    found: list[dict[str, torch.Tensor]] = [{} for _ in range(model.num_experts)]
    for path, layer in model.routed_layers():
        for index, tensors in enumerate(found):
            name = expert_name(index)
            if name in layer.lora_A:
                tensors[f"base_model.model.{path}.lora_A.weight"] = layer.lora_A[name].weight
                tensors[f"base_model.model.{path}.lora_B.weight"] = layer.lora_B[name].weight
    return found


def gate_tensors(model: Mixture) -> dict[str, torch.Tensor]:
    return {formats.GATE: model.router.gate.weight}


def _probe_logits(model: Mixture, input_ids: torch.Tensor, vocabulary: torch.Tensor) -> tuple:
    """Routed (16, n) and each expert alone (N, 16, n)."""
    experts = range(model.num_experts)
    with untouched(model):
        runs = [model(beside(model, input_ids), use_cache=False).logits]
    runs += [logits_alone(model, input_ids, experts[start : start + ROWS]) for start in experts[::ROWS]]
    columns = [run.index_select(-1, vocabulary.to(run.device)).float().cpu() for run in runs]  # (rows, 16, n)
    return columns[0][0], torch.cat(columns[1:])


def logits_alone(model: Mixture, input_ids: torch.Tensor, experts: Sequence[int]) -> torch.Tensor:
    """(len(experts), T, vocabulary) logits of input_ids (1, T) for each of the experts alone, in one pass."""
    rows = beside(model, input_ids).expand(len(experts), -1)  # (len(experts), T)
    with untouched(model):
        return model(rows, expert=experts, use_cache=False).logits


def beside(model: Mixture, input_ids: torch.Tensor) -> torch.Tensor:
    """On the device that takes them."""
    return input_ids.to(model.base.get_input_embeddings().weight.device)


def arithmetic(device) -> str:
    """What rounding depends on: two processes with the same text compute the same bits for the same input.

    Processor, vector instructions, number of threads, for another device its name too, and the versions of what
    computes: another one may add up in another order.
    """
    parts = [machine.cpu_name(), torch.backends.cpu.get_cpu_capability(), f"{torch.get_num_threads()} threads"]
    parts += [f"torch {torch.__version__}", f"transformers {transformers.__version__}", f"dylora_moe {__version__}"]
    if device.type == "cuda":
        parts.append(torch.cuda.get_device_name(device))
    elif device.type != "cpu":
        parts.append(str(device.type))
    return ", ".join(parts)

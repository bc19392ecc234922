"""What the scripts check: the base model, the mixture or an existing checkpoint, and whether they fit this machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..base.find import DEFAULT_MODEL, find_base
from ..base.fingerprint import architecture
from ..base.load import compact_random_bytes, load_base, parameter_bytes, resolve_device, resolve_dtype
from ..base.preserve import seeded
from ..base.source import Base
from ..checkpoint import formats
from ..checkpoint.config import BaseModelEntry, CheckpointConfig
from ..checkpoint.probe import ROWS
from ..errors import UsageError
from ..mixture.config import MoELoraConfig, RouterConfig
from ..mixture.model import Mixture
from ..mixture.targets import adapter_parameters
from ..system import machine
from . import workspace
from .flags import DEFAULTS, QUICK, Script, ScriptSettings, cheaper
from .saved import fill_experts

SMALL_FILES = 1 << 20  # more than everything in a checkpoint but adapters and the probe of many experts
# Bytes for each token and entry of the vocabulary: for the mixture's logits and their comparison in float64, and for
# each expert of a forward pass. Fitted to the peaks of 1 to 16 experts on CodeGemma-2B in float32.
MIXTURE_LOGITS, EXPERT_LOGITS = 48, 14


def check_device(args: ScriptSettings) -> None:
    """Raise UsageError for a --device or a --dtype that there is not."""
    resolve_device(args.device)
    resolve_dtype(args.dtype)


def base_of(
    script: Script, args: ScriptSettings, name: str | None = None, revision: str | None = None
) -> tuple[Base, str]:
    """Return the base model, found but not loaded, and which of its weights are used."""
    weights = args.weights
    if weights == "auto" and not script.reloads:
        weights = "none"
    name = name or args.model or DEFAULT_MODEL
    return find_base(name, weights=weights, token=args.hf_token or None, revision=revision)


def base_weights_of(args: ScriptSettings, source: Base, weights: str, dtype: str | None = None) -> PreTrainedModel:
    """Load the base model, in the dtype of --dtype or else in `dtype`."""
    return load_base(source, weights, dtype=args.dtype or dtype, device=args.device, seed=args.seed, compact=True)


def build_mixture(args: ScriptSettings, source: Base, weights: str) -> Mixture:
    """Build a mixture as the flags ask for it, with experts and a gate that are not zero."""
    base = base_weights_of(args, source, weights)
    lora = MoELoraConfig(r=setting(args, "lora_r"), lora_alpha=setting(args, "lora_alpha"))
    with seeded(args.seed):
        model = Mixture(base, setting(args, "experts"), lora=lora, router=RouterConfig())
    model.base_revision = source.revision
    fill_experts(model, args.seed)
    return model


def setting(args: ScriptSettings, name: str) -> Any:
    """Return a flag or its default. Flags have none of their own: with --checkpoint, only those given count."""
    given = getattr(args, name)
    return DEFAULTS[name] if given is None else given


# ---- disk and memory ----


def check_room_to_save(script: Script, args: ScriptSettings, source: Base, weights: str) -> None:
    """Estimate disk and memory before anything large is written or allocated.

    Raises:
        UsageError: if there is too little; it says what is needed, what is there and what to run instead.
    """
    experts = setting(args, "experts")
    per_expert = 4 * adapter_parameters(source.config, setting(args, "lora_r"))
    instead = f"python {QUICK.file}"
    folder = Path(args.output_dir) if args.output_dir else workspace.temporary_root()
    machine.need_disk(experts * per_expert + SMALL_FILES, folder, f"a checkpoint of {experts} experts", instead)
    what = f"{experts} experts on {source.name} with {weights} weights"
    mixtures = 3 if script.reloads else 1  # the saved one, the loaded one and stock PEFT's
    needed = base_bytes(source, weights, args.dtype, experts, args.device) + (mixtures * experts + 2) * per_expert
    machine.need_memory(needed, what, cheaper=cheaper(args) if script.reloads else instead)


def check_room_to_load(args: ScriptSettings, source: Base, weights: str, config: CheckpointConfig) -> None:
    """Like `check_room_to_save`, for an existing checkpoint."""
    sizes = [4 * expert.parameters for expert in config.experts]
    dtype = args.dtype or config.base_model.dtype
    needed = base_bytes(source, weights, dtype, len(sizes), args.device) + 2 * sum(sizes) + 2 * max(sizes)
    what = f"{len(sizes)} experts on {source.name} with {weights} weights"
    machine.need_memory(needed, what, cheaper=cheaper(args))


def base_bytes(source: Base, weights: str, dtype: str | None, experts: int, device: str = "cpu") -> int:
    """Estimate the memory for the base's weights and for the logits of the few tokens of a probe.

    Those of a GPU are not counted: weights are read into its memory tensor by tensor.
    """
    if weights == "none" or resolve_device(device).type == "cuda":
        return 0
    size_of: Callable = parameter_bytes if weights == "pretrained" else compact_random_bytes
    vocabulary = source.config.get_text_config().vocab_size
    logits = (MIXTURE_LOGITS + EXPERT_LOGITS * min(experts, ROWS)) * formats.PROBE_TOKENS * vocabulary
    return size_of(source.config, dtype) + logits


# ---- an existing checkpoint ----


def check_architecture(source: Base, trained_on: BaseModelEntry, asked: str | None) -> None:
    """Check that a base model is the one that the checkpoint was trained on.

    Args:
        asked: what --model names, if it is given.

    Raises:
        UsageError: which says in what they differ.
    """
    found = trained_on.architecture.differences(architecture(source.config))
    if not found:
        return
    remedy = "leave --model out, or name that one." if asked else "restore it, or say with --model where it is."
    raise UsageError(
        f"{source.name} is not what the checkpoint was trained on, {trained_on.name or 'another model'} "
        f"({', '.join(found)}): {remedy}"
    )

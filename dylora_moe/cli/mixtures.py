"""What the commands load: a mixture with its tokenizer, or only what routing a text needs. Imports torch."""

from __future__ import annotations

import sys
import warnings
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..base.find import find_base
from ..base.load import load_base, load_embeddings, load_tokenizer, resolve_device, resolve_dtype
from ..checkpoint import formats
from ..checkpoint.read import build_mixture, load_into, load_mixture, named_base
from ..checkpoint.verify import open_checkpoint
from ..constants import NEW
from ..errors import UsageError, shown
from ..mixture.model import Mixture
from ..skills.library import SkillLibrary
from ..stages.batches import known_tokens
from ..stages.measure import routing_weights
from ..system.command_line import say
from .wording import needed


@dataclass(frozen=True)
class Loaded:
    """A mixture, the tokenizer of its base model, and the skills of its checkpoint."""

    model: Mixture
    tokenizer: PreTrainedTokenizerBase
    library: SkillLibrary

    @property
    def skills(self) -> list[str]:
        """The names of the skills of each expert, as in "python, prose"; "" if it has none."""
        experts = range(self.model.num_experts)
        return [", ".join(skill.name for skill in self.library if skill.expert == expert) for expert in experts]

    def weights(self, ids: Sequence[int]) -> torch.Tensor:
        """Return the weight of each expert for each token, (T, N) in float32. As in the mixture, new ones have none."""
        return self.of_trained(routing_weights(self.model, {"input_ids": list(ids)}))

    def of_trained(self, weights: torch.Tensor) -> torch.Tensor:
        """Return weights (T, N) that sum to 1 over the experts that were trained, unless none was."""
        trained = torch.tensor([state != NEW for state in self.model.expert_states])
        if not trained.any():
            return weights
        weights = weights * trained
        return weights / weights.sum(-1, keepdim=True)

    def check_vocabulary(self, ids: Sequence[int]) -> None:
        """Raise UsageError for a token that the base model does not know."""
        check_known(ids, known_tokens(self.model.base))


def check_known(ids: Sequence[int], known: int | None) -> None:
    """Raise UsageError for a token of the tokenizer that a base model of so many tokens does not know."""
    beyond = [i for i in ids if known is not None and i >= known]
    if beyond:
        raise UsageError(
            f"the tokenizer makes the token {beyond[0]}, but the vocabulary of the base model ends at {known}; say "
            "with --base which model the tokenizer belongs to"
        )


def load(args: Namespace) -> Loaded:
    """Load the mixture of --checkpoint, on --base, --device and in --dtype if they are given, and its tokenizer.

    Raises:
        UsageError: if something is not available, or the checkpoint is not sound.
    """
    options: dict[str, Any] = {"device": resolve_device(args.device)}
    if args.dtype is not None:
        options["dtype"] = resolve_dtype(args.dtype)
    with needed(), _warnings_told():
        model = load_mixture(args.checkpoint, args.base, **options)
        library = SkillLibrary.load(Path(args.checkpoint) / formats.SKILLS)
    source, _ = find_base(model.base.config._name_or_path, weights="none", revision=model.base_revision)
    for note in model.notes:
        say(shown(note, most=None), sys.stderr)
    return Loaded(model, load_tokenizer(source), library)


def load_router(args: Namespace) -> Loaded:
    """Load the mixture of a checkpoint with no more of its base model than the input embeddings, and the tokenizer.

    Raises:
        UsageError: as `load`.
    """
    with needed():
        checkpoint = open_checkpoint(args.checkpoint)
        trained_on = checkpoint.config.base_model
        revision = None if args.base else trained_on.revision
        source, weights = find_base(
            args.base or named_base(checkpoint, "--base"), weights="pretrained", revision=revision
        )
        if trained_on.quantization:
            source = replace(source, quantization=trained_on.quantization)
            base = load_base(source, weights, dtype=trained_on.dtype)
        else:
            base = load_embeddings(source, dtype=trained_on.dtype)
        model = build_mixture(checkpoint, base)
        library = load_into(checkpoint, model)
    return Loaded(model.eval(), load_tokenizer(source), library)


@contextmanager
def _warnings_told() -> Iterator[None]:
    """Print the warnings of the block as lines for the user."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", UserWarning)
        yield
    for warning in found:
        say(shown(f"warning: {warning.message}", most=None), sys.stderr)

"""Finding the tokenizer of a checkpoint, for `AutoTokenizer` of Transformers."""

from __future__ import annotations

import os
from typing import Any, cast

from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from ..base import hub
from ..base.find import find_base
from ..base.load import has_tokenizer, load_tokenizer
from ..checkpoint import formats
from ..checkpoint.verify_config import inspect_config
from ..errors import UsageError
from ..store import run_folder
from .pull import find_checkpoint

# Arguments of `AutoTokenizer.from_pretrained` that are not for the class of a tokenizer: of the Hub, and its own.
_HUB = ("revision", "token", "cache_dir", "force_download", "local_files_only")
_OWN = ("proxies", "subfolder", "_commit_hash", "_from_auto")


class CheckpointTokenizer:
    """Stands for the tokenizer of a checkpoint without one: `AutoTokenizer` takes it from the run folder or the base.

    A checkpoint of a run has its tokenizer in the run folder; for any other one, it is that of the base model.
    """

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike, *inputs: Any, **options: Any) -> PreTrainedTokenizerBase:
        """Load the tokenizer of a checkpoint.

        Args:
            name: a folder, or the id of a repository on the Hub.
            options: as those of `AutoTokenizer.from_pretrained`.

        Raises:
            UsageError: if there is no such checkpoint, or its base model has no tokenizer or is not available.
        """
        found = {key: options.pop(key) for key in _HUB if options.get(key) is not None}
        options = {key: value for key, value in options.items() if key not in (*_HUB, *_OWN)}
        revision, token = found.pop("revision", None), found.pop("token", None)
        with hub.using(**found):
            return cls._find(name, revision, token, *inputs, **options)

    @classmethod
    def _find(
        cls, name: str | os.PathLike, revision: str | None, token: str | None, *inputs: Any, **options: Any
    ) -> PreTrainedTokenizerBase:
        folder = find_checkpoint(name, revision=revision, token=token)
        config = inspect_config(folder)
        if config is None:
            raise UsageError(f"{folder / formats.CONFIG} is not sound: `dylora-moe verify` lists what is wrong")
        for place in (folder, run_folder.run_of(folder)):
            if place is not None and has_tokenizer(place):
                # Without a config, AutoTokenizer would ask this class again.
                kind = cast(Any, PreTrainedConfig)(model_type=config.base_model.architecture.model_type)
                return AutoTokenizer.from_pretrained(str(place), *inputs, config=kind, local_files_only=True, **options)
        base = config.base_model.located(folder)
        if not base:
            raise UsageError(f"{folder / formats.CONFIG} names no base model, and there is no tokenizer in {folder}")
        source, _ = find_base(base, weights="none", token=token, revision=config.base_model.revision)
        return load_tokenizer(source, token, **options)

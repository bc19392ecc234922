"""`DyLoRAMoE`: the mixture as users know it, built on a base model by name, read from checkpoints and saved to them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.models.auto import modeling_auto

from .base import hub
from .base.find import find_base
from .base.fingerprint import NOT_COMPUTED
from .base.load import load_base
from .base.preserve import seeded
from .base.source import quantized
from .checkpoint.read import load_mixture
from .checkpoint.write import export_expert, save_checkpoint
from .constants import MODEL_TYPE
from .data.documents import Document
from .errors import UsageError
from .mixture.config import MoELoraConfig, RouterConfig
from .mixture.model import Mixture
from .pretrained.config import DyLoRAMoEConfig
from .sharing.pull import find_checkpoint
from .sharing.push import push
from .sharing.tokenizer import CheckpointTokenizer
from .skills.library import SkillLibrary
from .skills.novelty import Verdict
from .stages.growth import grow_by
from .stages.merging import Cost, checked_weights, combined, cost, merged_into_base, rebuilt, rows_of
from .system.command_line import say

# Arguments of `from_pretrained`, by what they are for.
_HUB = ("cache_dir", "force_download", "local_files_only")
_NEEDLESS = (
    "_from_auto", "trust_remote_code", "use_safetensors", "low_cpu_mem_usage", "weights_only", "adapter_kwargs",
    "tqdm_class",
)  # fmt: skip
_OWN_WAYS = ("dtype", "transformers_version")  # of a config, what does not reach the model through it


class DyLoRAMoE(Mixture):
    """A mixture of LoRA experts on a frozen causal LM, with one trainable router.

    `DyLoRAMoE(base, experts)` takes a base model that is loaded, with the arguments of `Mixture`; `from_base` loads
    one by name, and `from_checkpoint` reads what was saved.
    """

    @classmethod
    def from_base(
        cls,
        model: str,
        experts: int | Sequence[MoELoraConfig] = 2,
        *,
        lora: MoELoraConfig | None = None,
        router: RouterConfig | None = None,
        label_smoothing: float = 0.0,
        weights: str = "auto",
        dtype: str | torch.dtype | None = None,
        device: str | torch.device = "cpu",
        token: str | None = None,
        revision: str | None = None,
        quantize: str = "none",
        seed: int = 0,
    ) -> DyLoRAMoE:
        """Load a base model (hub id, folder, GGUF file or preset) and put fresh experts, seeded by `seed`, on it.

        quantize: "none", or "nf4" or "int8" for a base model that bitsandbytes quantizes as it is loaded.

        Raises:
            UsageError: if the base model is not available, or experts and base do not fit each other.
        """
        source, weights = find_base(model, weights=weights, token=token, revision=revision)
        source = quantized(source, quantize)
        base = load_base(source, weights, dtype=dtype, device=device, seed=seed)
        with seeded(seed):
            mixture = cls(base, experts, lora=lora, router=router, label_smoothing=label_smoothing)
        mixture.base_revision = source.revision
        if source.note:
            mixture.notes.append(source.note)
        return mixture

    @classmethod
    def from_checkpoint(
        cls, folder: str | Path, base: PreTrainedModel | str | os.PathLike | None = None, **options: Any
    ) -> DyLoRAMoE:
        """Read a checkpoint into a fresh mixture.

        Args:
            base: the base model, or the name of one to load; by default the one that the checkpoint names is loaded.
            options: those of `checkpoint.read.load_mixture`.

        Raises:
            CheckpointError: with every problem, before anything is built.
            UsageError: if the base model is not available.
        """
        model = load_mixture(folder, base, kind=cls, **options)
        # By it, TRL loads the mixture again as a reference model.
        model.name_or_path = model.config.name_or_path = os.fspath(folder)
        return model

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        name: str | os.PathLike,
        *,
        revision: str | None = None,
        token: str | None = None,
        base: PreTrainedModel | str | os.PathLike | None = None,
        dtype: str | torch.dtype | None = None,
        device_map: Any = None,
        attn_implementation: str | None = None,
        config: Any = None,
        **options: Any,
    ) -> DyLoRAMoE:
        """Read a checkpoint from a folder, a run folder or the Hub, as every model of Transformers is read.

        `AutoModelForCausalLM.from_pretrained` does the same. The mixture is in evaluation mode.

        Args:
            name: a checkpoint, a run folder, of which the newest checkpoint is read, or the id of a repository on the
                Hub, such as "user/repo".
            revision: a branch, tag or commit of that repository.
            base: as in `from_checkpoint`.
            dtype: of the base model; None and "auto" for that of the checkpoint.
            device_map: a device, or "auto" for the best one. A mixture is on one device.
            config: what `AutoConfig` has made of the checkpoint, with other settings that change no logits, such as
                `use_cache` and `output_hidden_states`.
            options: `cache_dir` and `local_files_only`, as in Transformers, for the base model, too; `force_download`,
                for the checkpoint alone.

        Raises:
            CheckpointError: with every problem of the checkpoint.
            UsageError: if the checkpoint or its base model is not available, or for options that cannot be honoured.
        """
        dtype = options.pop("torch_dtype", dtype)
        found = {key: options.pop(key) for key in _HUB if key in options}
        refused = sorted(key for key, value in options.items() if key not in _NEEDLESS and value not in (None, ""))
        if refused:
            raise UsageError(f"DyLoRAMoE.from_pretrained has no option {', '.join(refused)}: leave it out")
        chosen = {"dtype": None if dtype == "auto" else dtype, "device": _device(device_map)}
        if not isinstance(base, PreTrainedModel):
            chosen["token"] = token
        loading = {key: value for key, value in chosen.items() if value is not None}
        with hub.using(**found):
            folder = find_checkpoint(name, revision=revision, token=token)
            changed = _changed(config, folder)
            model = load_mixture(folder, base, kind=cls, **loading)
        model.name_or_path = model.config.name_or_path = os.fspath(name)
        attention = attn_implementation or getattr(config, "_attn_implementation", None)
        if attention is not None:
            model.set_attn_implementation(attention)
        for each in (model.config, model.base.config, model.base.config.get_text_config()):
            for key in [key for key in changed if hasattr(each, key)]:
                setattr(each, key, changed[key])
        return model.eval()

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | os.PathLike,
        *,
        push_to_hub: bool = False,
        skills: SkillLibrary | None = None,
        **options: Any,
    ) -> Path:
        """Publish a checkpoint at `save_directory`, as `save_checkpoint` does; no base weights are written.

        Args:
            push_to_hub: whether to push it to the Hub as well.
            options: those of `push_to_hub`, with `repo_id`; by default the name of the folder.

        Raises:
            UsageError: as `save_checkpoint` and `push_to_hub` do.
        """
        # Arguments by which the Trainer and others call this method, and which make no difference here.
        for key in ("is_main_process", "state_dict", "safe_serialization", "save_function", "max_shard_size"):
            options.pop(key, None)
        if options and not push_to_hub:
            raise UsageError(f"save_pretrained has no option {', '.join(sorted(options))} without push_to_hub=True")
        folder = self.save_checkpoint(Path(save_directory), skills=skills)
        if push_to_hub:
            push(folder, options.pop("repo_id", folder.name), **options)
        return folder

    def push_to_hub(  # type: ignore[override]
        self, repo_id: str, *, skills: SkillLibrary | None = None, **options: Any
    ) -> str:
        """Push the mixture to a repository on the Hub, which is made if need be, with a model card.

        Args:
            repo_id: such as "user/repo".
            options: `base_model`, the id of the base on the Hub if it was loaded from a folder; `token`, `private`,
                `revision`, `commit_message` and `create_pr`, as in Transformers.

        Returns:
            The URL of the commit.

        Raises:
            UsageError: if the Hub refuses, or the base model is known by a local path only.
        """
        with TemporaryDirectory(prefix="dylora_push_") as folder:
            return push(self.save_checkpoint(Path(folder, "checkpoint"), skills=skills), repo_id, **options)

    def save_checkpoint(self, folder: str | Path, *, step: int = 0, skills: SkillLibrary | None = None) -> Path:
        """Publish a checkpoint at `folder`, whole or not at all, and return its path.

        Raises:
            UsageError: if there is a checkpoint already, which is left as it is, or if it cannot be written; nothing
                is left behind.
        """
        return save_checkpoint(folder, self, step=step, skills=skills)

    def grow(self, skills: SkillLibrary, name: str, documents: Sequence[Sequence[int]]) -> tuple[Verdict, int]:
        """Add an expert for a text that brings something new, as `train.py --grow` does.

        If no skill of the library has it, the new expert begins as a copy of the nearest skill's, the library gets the
        skill, the router is fitted again, and the new expert is the only one that is trained from here on. Otherwise
        nothing changes.

        Args:
            skills: the library of this mixture, as `SkillLibrary.load` reads it from a checkpoint.
            name: of the skill.
            documents: token ids of the text, of 256 tokens or more in all.

        Returns:
            The verdict, and the index of the expert that has the skill.

        Raises:
            UsageError: if an expert has no skill, or there is too little text.
        """
        return grow_by(self, skills, name, documents)

    def export_expert(self, expert: int, folder: str | Path) -> None:
        """Write one expert to a new folder as a plain LoRA: `adapter_config.json` and `adapter_model.safetensors`.

        Raises:
            UsageError: if there is no such expert, or the folder exists already or cannot be written.
        """
        export_expert(self, expert, folder)

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Return the number of parameters that are trained, and of all, those of the base included."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad), sum(self.parameter_counts().values())

    def print_trainable_parameters(self) -> None:
        """Print what `get_nb_trainable_parameters` returns, as PEFT does."""
        trained, total = self.get_nb_trainable_parameters()
        say(f"trainable params: {trained:,d} || all params: {total:,d} || trainable%: {100 * trained / total:.4f}")

    def collapse(self, weights: Sequence[float] | None = None, rank: int | None = None) -> DyLoRAMoE:
        """Return a mixture of one expert, the weighted sum of all, on the same base model: one plain LoRA.

        This mixture stays as it is. `merge_cost` tells what is lost, and `export_expert(0, folder)` writes the LoRA.

        Args:
            weights: one for each expert, such as the `shares()` of `usage()`. By default all experts that were trained
                have the same weight, and the weights sum to 1.
            rank: the most that the LoRA may have; by default the largest of the experts. The sum of theirs makes it
                exact.

        Raises:
            UsageError: if the weights do not fit, or no expert was trained.
        """
        return rebuilt(self, [combined(self, checked_weights(self, weights), rank)[0]])

    def merge_and_unload(self, weights: Sequence[float] | None = None) -> PreTrainedModel:
        """Return the base model with the weighted sum of all experts in its weights, as a plain Transformers model.

        The router is gone: every token gets the same sum. `merge_cost` tells what that costs. Unlike in PEFT, the
        mixture stays as it is; the matrices that experts are on are copied.

        Args:
            weights: as those of `collapse`.

        Raises:
            UsageError: if the weights do not fit, or the base model is quantized or sharded, or has no weights.
        """
        return merged_into_base(self, checked_weights(self, weights))

    def merge_cost(
        self, documents: Sequence[Sequence[int]], weights: Sequence[float] | None = None, rank: int | None = None
    ) -> Cost:
        """Measure the loss of this mixture, and of what `merge_and_unload` makes of it, on some held-out text.

        Args:
            documents: token ids of the text.
            weights: as those of `collapse`.
            rank: measure the LoRA of this rank that `collapse` makes; by default the exact sum.

        Returns:
            `mixture` and `merged`, in nats per token.

        Raises:
            UsageError: if the weights do not fit, or there is too little text.
        """
        used = checked_weights(self, weights)
        exact = sum(self.expert_configs[index].r for index in used)
        items = [Document(np.asarray(ids, dtype=np.int32), np.ones(len(ids), dtype=bool)) for ids in documents]
        return cost(self, rebuilt(self, [combined(self, used, rank or exact)[0]]), rows_of(items, self))


def _changed(config: Any, folder: Path) -> dict[str, Any]:
    """Return the settings of a config that are not those of a checkpoint. Raises UsageError for those that compute."""
    if not isinstance(config, DyLoRAMoEConfig):
        return {}
    here, there = _flat(config), _flat(cast(DyLoRAMoEConfig, DyLoRAMoEConfig.from_pretrained(folder)))
    changed = {key: value for key, value in here.items() if value != there.get(key) and key not in _OWN_WAYS}
    refused = sorted(changed.keys() - NOT_COMPUTED)
    if refused:
        raise UsageError(
            f"{', '.join(refused)} cannot be changed when a mixture is loaded: its experts were trained on the base "
            "model as it is; leave it out of the arguments and of config="
        )
    return changed


def _flat(config: DyLoRAMoEConfig) -> dict[str, Any]:
    """Return the settings of a mixture and of its text model."""
    text = {} if config.base_config is None else config.base_config.get_text_config().to_dict()
    own = {key: value for key, value in config.to_dict().items() if key != "base_config"}
    return {key: value for key, value in {**text, **own}.items() if not key.startswith("_")}


def _device(device_map: Any) -> Any:
    """Return the one device that a device map names; None if it is not given."""
    if isinstance(device_map, dict):
        places = set(device_map.values())
        if len(places) != 1:
            raise UsageError(f"a mixture is on one device, device_map names {len(places)}: give one of them")
        device_map = places.pop()
    if isinstance(device_map, str) and device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        return "auto"
    return device_map


# The Trainer shifts labels where it smooths them for the classes that it finds here.
modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[MODEL_TYPE] = DyLoRAMoE.__name__
AutoModelForCausalLM.register(DyLoRAMoEConfig, DyLoRAMoE, exist_ok=True)
AutoTokenizer.register(DyLoRAMoEConfig, CheckpointTokenizer, exist_ok=True)

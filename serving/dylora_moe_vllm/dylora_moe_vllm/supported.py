"""What vLLM can be asked to do that a mixture cannot: refused by name, before anything is loaded.

It is also where the tokenizer and the defaults of sampling are found, since a checkpoint has none of its own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from vllm.model_executor.models import ModelRegistry
from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

from .checkpoint import Mixture
from .config import mixture_of

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
GENERATION = "generation_config.json"
LOAD_FORMATS = ("auto", "hf", "safetensors", "fastsafetensors", "pt")


class SupportedConfig(VerifyAndUpdateConfig):
    """vLLM asks it when the settings are known, in the process that was started."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Take from the base model what a checkpoint does not have.

        That is `generation_config.json`, which says how to sample, and without `--tokenizer` the tokenizer: that of the
        checkpoint, of its run folder or of the base model.
        """
        mixture, folders = mixture_of(model_config.hf_config), _folders(model_config)
        if model_config.generation_config == "auto" and not (folders[0] / GENERATION).is_file():
            model_config.generation_config = _generation_of(mixture)
        if model_config.tokenizer != model_config.model:
            return
        for folder in folders:
            if any((folder / name).is_file() for name in TOKENIZER_FILES):
                if os.path.isdir(model_config.model):
                    model_config.tokenizer = str(folder)
                return
        model_config.tokenizer, model_config.tokenizer_revision = mixture.base, mixture.revision

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Raise ValueError with everything that is not supported."""
        problems = [*_settings(vllm_config), *_base(vllm_config.model_config)]
        if problems:
            raise ValueError("a DyLoRA-MoE mixture cannot be served like this:\n  " + "\n  ".join(problems))


def _generation_of(mixture: Mixture) -> str:
    """Return the folder with the generation config of the base model: vLLM would take that of another revision."""
    if os.path.isdir(mixture.base):
        return mixture.base
    return snapshot_download(mixture.base, revision=mixture.revision, allow_patterns=[GENERATION])


def _folders(model_config: Any) -> list[Path]:
    """Return the folder of a checkpoint, and where its tokenizer may be as well, beside that of the base model."""
    if os.path.isdir(model_config.model):
        checkpoint = Path(model_config.model).resolve()
        return [checkpoint, checkpoint.parent]
    patterns = [*TOKENIZER_FILES, GENERATION]
    return [Path(snapshot_download(model_config.model, revision=model_config.revision, allow_patterns=patterns))]


def _settings(config: Any) -> Iterator[str]:
    parallel, model = config.parallel_config, config.model_config
    for flag, value in (
        ("tensor-parallel-size", parallel.tensor_parallel_size),
        ("pipeline-parallel-size", parallel.pipeline_parallel_size),
        ("prefill-context-parallel-size", getattr(parallel, "prefill_context_parallel_size", 1)),
    ):
        if value > 1:
            yield f"--{flag} {value}: the router and all experts are on one device"
    if getattr(parallel, "enable_dbo", False):
        yield "--enable-dbo: the weights of the experts are those of one batch at a time"
    if config.lora_config is not None:
        yield "--enable-lora: the experts are LoRAs already; serve one of them alone with the base model as the model"
    if config.speculative_config is not None:
        yield "--speculative-config: not supported"
    if config.cache_config.cache_dtype not in ("auto", str(model.dtype).removeprefix("torch.")):
        yield f"--kv-cache-dtype {config.cache_config.cache_dtype}: the router's state needs the model's own dtype"
    if model.runner_type != "generate":
        yield f"--runner {model.runner_type}: a mixture generates text, and nothing else"
    if model.quantization is not None:
        yield f"--quantization {model.quantization}: the experts were trained on the base model as it is"
    if getattr(model, "enable_prompt_embeds", False):
        yield "--enable-prompt-embeds: the router reads tokens"
    if config.load_config.load_format not in LOAD_FORMATS:
        yield f"--load-format {config.load_config.load_format}: expected one of {', '.join(LOAD_FORMATS)}"


def _base(model: Any) -> Iterator[str]:
    mixture, name = mixture_of(model.hf_config), model.hf_config.dylora_moe["architectures"][0]
    if mixture.quantization is not None:
        yield "the base model was quantized as it was loaded, with bitsandbytes: serve one that is not quantized"
    if name not in ModelRegistry.get_supported_archs():
        yield f"the base model is a {name}, which vLLM does not have"
        return
    info, _ = ModelRegistry.inspect_model_cls(name, model)
    special = info.is_hybrid or info.is_attention_free or info.has_inner_state or model.use_mla
    if info.supports_multimodal or special or name in MODELS_CONFIG_MAP:
        yield (
            f"the base model is a {name}: only text models whose layers have plain attention are supported, such as "
            "Llama, Mistral, Qwen 2 and 3, and Gemma 1 to 3"
        )

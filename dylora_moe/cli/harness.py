"""The model `dylora_moe` of lm-eval, which `dylora-moe run lm_eval` registers. Imports torch and lm_eval."""

from __future__ import annotations

from typing import Any

import torch
from lm_eval.models.huggingface import HFLM

from ..constants import expert_name
from ..errors import UsageError
from ..mixture.experts import check_expert

# Arguments of HFLM that a mixture cannot honour -> what to do instead.
REFUSED = {
    "parallelize": "a mixture is on one device",
    "tp_plan": "a mixture is on one device",
    "peft": "the experts of the checkpoint are its adapters; expert= chooses one",
    "delta": "the base model of a mixture stays as it is",
    "autogptq": "the checkpoint says how its base model is quantized",
    "gptqmodel": "the checkpoint says how its base model is quantized",
    "gguf_file": "the checkpoint names its base model",
    "subfolder": "name the folder of the checkpoint",
    "mixed_precision_dtype": "say dtype= for the base model",
}


class MixtureLM(HFLM):
    """A mixture, routed or with one expert for every token.

    Args:
        pretrained: a checkpoint's folder, or its repository on the Hub.
        expert: the number or the name of an expert, as in 1 or expert_1.
        options: those of lm-eval's model `hf`.

    Raises:
        UsageError: if there is no such checkpoint or expert, or for options that cannot be honoured.
    """

    def __init__(self, pretrained: str, expert: int | str | None = None, **options: Any):
        for name, remedy in REFUSED.items():
            if options.get(name):
                raise UsageError(f"lm-eval's model dylora_moe has no {name}=: {remedy}")
        if options.get("backend", "causal") not in ("causal", "default"):
            raise UsageError(f"backend={options['backend']}: a mixture is a causal LM; leave it out")
        super().__init__(pretrained, **options | {"backend": "causal"})
        self.expert = _number(expert, self.model.num_experts)

    def _model_call(self, inps: torch.Tensor, attn_mask: Any = None, labels: Any = None) -> torch.Tensor:
        """Return the logits (B, T, V) of token ids (B, T)."""
        with torch.no_grad():
            return self.model(inps, expert=self.expert).logits

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **options: Any) -> torch.Tensor:
        return super()._model_generate(context, max_length, stop, **options, expert=self.expert)


def _number(expert: int | str | None, experts: int) -> int | None:
    if isinstance(expert, str):
        known = {name: index for index in range(experts) for name in (str(index), expert_name(index))}
        if expert not in known:
            raise UsageError(f"expert={expert}: expected {expert_name(0)} to {expert_name(experts - 1)}, or a number")
        return known[expert]
    check_expert(expert, experts)
    return expert

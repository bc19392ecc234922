"""What is told of a base model: its decoder layers, and whether it can be a base."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from transformers import AutoModelForCausalLM

from dylora_moe import DyLoRAMoE
from dylora_moe.base.find import find_base
from dylora_moe.base.fingerprint import architecture, weights_fingerprint
from dylora_moe.base.load import load_base
from dylora_moe.base.structure import decoder_layers

from ..support.base_folders import FAMILIES, config_only, error_of, folder_of, tiny_folder


@pytest.mark.parametrize("family", FAMILIES)
def test_decoder_layers_and_fingerprint_see_through_peft(family, tmp_path):
    base, _ = find_base(folder_of(family, tmp_path), weights="none")
    expected = architecture(base.config)
    plain = load_base(base, "random")
    before = weights_fingerprint(plain)
    injected = inject_adapter_in_model(LoraConfig(target_modules="all-linear"), load_base(base, "random"))
    wrapped = get_peft_model(load_base(base, "random"), LoraConfig(target_modules="all-linear"))
    for model in (plain, injected, wrapped):
        assert len(decoder_layers(model)) == 3
        assert architecture(model) == expected
        assert weights_fingerprint(model) == before


def test_decoder_layers_that_cannot_be_told():
    model = AutoModelForCausalLM.from_config(FAMILIES["llama"])
    model.config.num_hidden_layers = 7
    assert "expected one ModuleList of 7" in error_of(decoder_layers, model)


class Wrapped(torch.Tensor):
    """Stands for the tensor classes of torchao and quanto."""


def quantized(how):
    model = AutoModelForCausalLM.from_config(copy.deepcopy(FAMILIES["llama"]))
    layer = model.model.layers[1].mlp.up_proj
    if how == "config":
        model.config.quantization_config = {"quant_method": "gptq", "bits": 4}
    elif how == "int8":
        layer.weight = torch.nn.Parameter(layer.weight.data.char(), requires_grad=False)
    else:
        layer.weight = torch.nn.Parameter(layer.weight.data.as_subclass(Wrapped), requires_grad=False)
    return model


@pytest.mark.parametrize(
    ("how", "named"),
    [
        ("config", "(quantization_config, gptq)"),
        ("int8", "(model.layers.1.mlp.up_proj.weight is a Tensor of torch.int8)"),
        ("subclass", "(model.layers.1.mlp.up_proj.weight is a Wrapped of torch.float32)"),
    ],
)
def test_a_quantized_base_is_refused_before_anything_is_trained(how, named):
    assert named in error_of(DyLoRAMoE, quantized(how), 2)
    DyLoRAMoE(AutoModelForCausalLM.from_config(FAMILIES["llama"]), 2)


def test_a_gguf_file_that_was_unpacked_is_not_quantized():
    """Transformers keeps the config of the file on both, so that the tensors decide."""
    for how in ("float", "int8"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(FAMILIES["llama"])) if how == "float" else quantized(how)
        model.config.quantization_config = {"quant_method": "gguf"}
        if how == "float":
            DyLoRAMoE(model, 2)
        else:
            assert "torch.int8" in error_of(DyLoRAMoE, model, 2)


def test_mask_buffers_that_would_exhaust_the_machine(tmp_path):
    config = {"model_type": "gpt_neo", "num_layers": 2, "attention_types": [[["global"], 2]]}
    folder = config_only(tmp_path / "base", {**config, "max_position_embeddings": 1 << 20})
    assert "max_position_embeddings" in error_of(lambda: load_base(*find_base(folder, weights="none")))


def test_a_lack_of_memory_is_no_fault_of_the_config(tmp_path, monkeypatch):
    def fails(text):
        def from_config(*args, **kwargs):
            raise RuntimeError(text)

        return from_config

    base, _ = find_base(tiny_folder(tmp_path), weights="none")
    monkeypatch.setattr(AutoModelForCausalLM, "from_config", fails("heads do not divide"))
    assert "cannot build this llama architecture" in error_of(load_base, base, "none")
    monkeypatch.setattr(AutoModelForCausalLM, "from_config", fails("DefaultCPUAllocator: can't allocate memory"))
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        load_base(base, "none")

"""What is told of a base model: its decoder layers, and fingerprints that PEFT, dtype and device do not change."""

import pytest
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from transformers import AutoModelForCausalLM, LlamaConfig

from dylora_moe.base.find import find_base
from dylora_moe.base.load import load_base
from dylora_moe.base.structure import architecture, decoder_layers, weights_fingerprint

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


def test_fingerprint_of_another_shape_differs():
    other = LlamaConfig(**{**FAMILIES["llama"].to_dict(), "intermediate_size": 56})
    assert architecture(other)["fingerprint"] != architecture(FAMILIES["llama"])["fingerprint"]


def test_weights_fingerprint_sees_each_parameter_and_separates_dtype(tmp_path):
    base, weights = find_base(tiny_folder(tmp_path))
    model = load_base(base, weights, dtype="bf16")
    before = weights_fingerprint(model)
    wide = weights_fingerprint(model.float())
    assert (before.split(":")[0], wide.split(":")[0]) == ("bfloat16", "float32")
    assert before.split(":")[1] == wide.split(":")[1]
    for name, parameter in model.named_parameters():
        parameter.data.view(-1)[0] += 1
        assert weights_fingerprint(model) != wide, name
        parameter.data.view(-1)[0] -= 1
    assert "meta device" in error_of(weights_fingerprint, load_base(base, "none"))


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

"""What is told of a base model: its decoder layers, and fingerprints that PEFT, dtype and device do not change."""

import pytest
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from transformers import AutoModelForCausalLM, LlamaConfig

from dylora_moe import bases

from .base_folders import FAMILIES, config_only, error_of, folder_of, tiny_folder


@pytest.mark.parametrize("family", FAMILIES)
def test_decoder_layers_and_fingerprint_see_through_peft(family, tmp_path):
    base, _ = bases.find_base(folder_of(family, tmp_path), weights="none")
    expected = bases.architecture(base.config)
    plain = bases.load_base(base, "random")
    before = bases.weights_fingerprint(plain)
    injected = inject_adapter_in_model(LoraConfig(target_modules="all-linear"), bases.load_base(base, "random"))
    wrapped = get_peft_model(bases.load_base(base, "random"), LoraConfig(target_modules="all-linear"))
    for model in (plain, injected, wrapped):
        assert len(bases.decoder_layers(model)) == 3
        assert bases.architecture(model) == expected
        assert bases.weights_fingerprint(model) == before


def test_decoder_layers_that_cannot_be_told():
    model = AutoModelForCausalLM.from_config(FAMILIES["llama"])
    model.config.num_hidden_layers = 7
    assert "expected one ModuleList of 7" in error_of(bases.decoder_layers, model)


def test_fingerprint_of_another_shape_differs():
    other = LlamaConfig(**{**FAMILIES["llama"].to_dict(), "intermediate_size": 56})
    assert bases.architecture(other)["fingerprint"] != bases.architecture(FAMILIES["llama"])["fingerprint"]


def test_weights_fingerprint_sees_each_parameter_and_separates_dtype(tmp_path):
    base, weights = bases.find_base(tiny_folder(tmp_path))
    model = bases.load_base(base, weights, dtype="bf16")
    before = bases.weights_fingerprint(model)
    wide = bases.weights_fingerprint(model.float())
    assert (before.split(":")[0], wide.split(":")[0]) == ("bfloat16", "float32")
    assert before.split(":")[1] == wide.split(":")[1]
    for name, parameter in model.named_parameters():
        parameter.data.view(-1)[0] += 1
        assert bases.weights_fingerprint(model) != wide, name
        parameter.data.view(-1)[0] -= 1
    assert "meta device" in error_of(bases.weights_fingerprint, bases.load_base(base, "none"))


def test_mask_buffers_that_would_exhaust_the_machine(tmp_path):
    config = {"model_type": "gpt_neo", "num_layers": 2, "attention_types": [[["global"], 2]]}
    folder = config_only(tmp_path / "base", {**config, "max_position_embeddings": 1 << 20})
    assert "max_position_embeddings" in error_of(lambda: bases.load_base(*bases.find_base(folder, weights="none")))


def test_a_lack_of_memory_is_no_fault_of_the_config(tmp_path, monkeypatch):
    def fails(text):
        def from_config(*args, **kwargs):
            raise RuntimeError(text)

        return from_config

    base, _ = bases.find_base(tiny_folder(tmp_path), weights="none")
    monkeypatch.setattr(AutoModelForCausalLM, "from_config", fails("heads do not divide"))
    assert "cannot build this llama architecture" in error_of(bases.load_base, base, "none")
    monkeypatch.setattr(AutoModelForCausalLM, "from_config", fails("DefaultCPUAllocator: can't allocate memory"))
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        bases.load_base(base, "none")

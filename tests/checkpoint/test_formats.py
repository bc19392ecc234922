"""Names: what is a merged model, what belongs to training, where an expert's files are."""

from __future__ import annotations

import pytest

from dylora_moe.checkpoint import formats

MERGED = [
    "model.safetensors",
    "pytorch_model.bin",
    "tf_model.h5",
    "flax_model.msgpack",
    "model-00001-of-00002.safetensors",
    "pytorch_model-00001-of-00002.bin",
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
    "model.fp16.safetensors",
    "model.safetensors.index.fp16.json",
    "consolidated.00.pth",
    "consolidated.safetensors",
    "MODEL.SAFETENSORS",
    "pytorch_model.pt",
    "merged_model.safetensors",
    "merged.safetensors",
    "model_merged.bin",
    "weights.bin",
    "weights.pt",
    "diffusion_pytorch_model.bin",
    "codegemma-2b.Q4_K_M.gguf",
    "model.onnx",
    "epoch=1.ckpt",
    "pytorch_model_fsdp.bin",
    "model_state.pt",
    "model.npz",
    "adapter_model.merged.safetensors",
    "__0_0.distcp",
]
OURS = [
    "adapter_model.safetensors",
    "adapter_model.bin",
    "adapter_config.json",
    "router.safetensors",
    "router.pt",
    "config.json",
    "skill_library.safetensors",
    "probe.safetensors",
    "manifest.json",
    "optimizer.pt",
    "scheduler.pt",
    "scaler.pt",
    "rng_state.pth",
    "rng_state_0.pth",
    "trainer_state.json",
    "training_args.bin",
    "tokenizer.json",
    "README.md",
]


@pytest.mark.parametrize("name", MERGED)
def test_row_29_a_merged_model_is_known_by_any_of_its_names(name):
    assert formats.is_merged_model(name)


@pytest.mark.parametrize("name", OURS)
def test_what_is_no_model_is_not_taken_for_one(name):
    assert not formats.is_merged_model(name)


def test_training_files():
    assert all(map(formats.is_training_file, ["optimizer.pt", "scaler.pt", "rng_state.pth", "rng_state_12.pth"]))
    assert not any(map(formats.is_training_file, ["rng_state_.pth", "rng_state_01.pth", "x/optimizer.pt", "router.pt"]))


def test_row_24_expert_1_and_expert_10_never_mix():
    files = {"peft_adapters/expert_10/adapter_config.json", "peft_adapters/expert_1/expert_1/adapter_config.json"}
    assert formats.adapter_folder(files, "expert_10") == "peft_adapters/expert_10"
    assert formats.adapter_folder(files, "expert_1") == "peft_adapters/expert_1/expert_1"


def test_an_expert_is_nested_unless_only_the_flat_form_is_there():
    nested, flat = "peft_adapters/expert_0/expert_0", "peft_adapters/expert_0"
    assert formats.adapter_folder(set(), "expert_0") == nested
    assert formats.adapter_folder({f"{flat}/adapter_model.safetensors"}, "expert_0") == flat
    both = {f"{flat}/adapter_model.safetensors", f"{nested}/adapter_config.json"}
    assert formats.adapter_folder(both, "expert_0") == nested

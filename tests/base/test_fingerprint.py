"""What tells one base model from another: every value that changes what it computes, and every byte of its weights."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoConfig, LlamaConfig

from dylora_moe import DyLoRAMoE
from dylora_moe.base import fingerprint
from dylora_moe.base.find import find_base
from dylora_moe.base.fingerprint import architecture, same_weights, weights_fingerprint
from dylora_moe.base.load import load_base
from dylora_moe.base.preserve import fresh_base
from dylora_moe.checkpoint.config import ArchitectureEntry

from ..support.base_folders import FAMILIES, LLAMA, SIZES, error_of, folder_of, tiny_folder

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 64}


def differences(there, here):
    return ArchitectureEntry(**architecture(there)).differences(architecture(here))


# ---- architecture ----


def test_fingerprint_of_another_shape_differs():
    other = LlamaConfig(**{**LLAMA, "intermediate_size": 56})
    assert architecture(other)["fingerprint"] != architecture(FAMILIES["llama"])["fingerprint"]
    assert differences(FAMILIES["llama"], other) == ["intermediate_size: 48 there, 56 here"]


@pytest.mark.parametrize(
    ("kind", "before", "after", "line"),
    [
        ("llama", {}, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "rope_parameters.rope_theta"),
        (
            "llama",
            {},
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
            "rope_parameters.rope_type",
        ),
        (
            "llama",
            {"rope_parameters": YARN},
            {"rope_parameters": {**YARN, "beta_fast": 16}},
            "rope_parameters.beta_fast",
        ),
        ("llama", {}, {"rms_norm_eps": 1e-5}, "rms_norm_eps: 1e-06 there, 1e-05 here"),
        ("llama", {}, {"hidden_act": "gelu"}, "hidden_act: 'silu' there, 'gelu' here"),
        ("llama", {}, {"attention_dropout": 0.1}, "attention_dropout"),
        ("gemma2", {}, {"attn_logit_softcapping": 30.0}, "attn_logit_softcapping"),
        ("gemma2", {}, {"final_logit_softcapping": None}, "final_logit_softcapping"),
        ("gemma2", {}, {"query_pre_attn_scalar": 64}, "query_pre_attn_scalar"),
        ("gemma2", {}, {"sliding_window": 8}, "sliding_window"),
        ("gpt_neox", {}, {"use_parallel_residual": False}, "use_parallel_residual"),
        ("mamba2", {"state_size": 8}, {"state_size": 8, "time_step_limit": (0.0, 1.0)}, "time_step_limit"),
    ],
)
def test_every_value_that_changes_what_is_computed_is_a_difference(kind, before, after, line):
    sizes = {**SIZES, "num_heads": 4, "head_dim": 16} if kind == "mamba2" else SIZES
    there, here = (AutoConfig.for_model(kind, **{**sizes, **values}) for values in (before, after))
    found = differences(there, here)
    assert any(text.startswith(line) for text in found)
    assert differences(there, copy.deepcopy(there)) == []


def test_values_that_change_nothing_and_rounding_are_no_differences():
    names = {"_name_or_path": "elsewhere", "architectures": ["Other"], "eos_token_id": 3, "use_cache": False}
    other = LlamaConfig(
        **{**LLAMA, **names, "dtype": "bfloat16", "rms_norm_eps": 9.99999974e-07, "other_tool": "was here"}
    )
    assert differences(FAMILIES["llama"], other) == []


def test_what_another_version_of_transformers_adds_is_no_difference():
    entry = ArchitectureEntry(**architecture(FAMILIES["llama"]))
    here = architecture(FAMILIES["llama"])
    here["settings"] |= {"new_default": 1, "rope_parameters": {**here["settings"]["rope_parameters"], "new": 1}}
    assert entry.differences(here) == ["rope_parameters.new: None there, 1 here"]
    here["settings"]["transformers_version"] = "6.0.0"
    assert entry.differences(here) == []
    here["settings"]["rope_parameters"]["rope_theta"] = 1.0
    assert entry.differences(here) == ["rope_parameters.rope_theta: 10000.0 there, 1.0 here"]


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_random_weights_that_layers_share_are_counted_in_each_and_tied_ones_once(family, tmp_path):
    base, _ = find_base(folder_of(family, tmp_path), weights="none")
    expected = sum(parameter.numel() for parameter in load_base(base, "none").parameters())
    for weights in ("random", "none"):
        assert DyLoRAMoE(load_base(base, weights), 2).parameter_counts()["base"] == expected


# ---- weights ----


def test_weights_fingerprint_sees_each_parameter_and_separates_dtype(tmp_path):
    base, weights = find_base(tiny_folder(tmp_path))
    model = load_base(base, weights, dtype="bf16")
    before = weights_fingerprint(model)
    wide = weights_fingerprint(model.float())
    assert (before.split(":")[0], wide.split(":")[0]) == ("bfloat16", "float32")
    assert before.split(":")[1] == wide.split(":")[1]
    for name, parameter in model.named_parameters():
        parameter.data.view(-1)[0] += 1
        assert not same_weights(weights_fingerprint(model), wide), name
        parameter.data.view(-1)[0] -= 1
    assert weights_fingerprint(model) == wide
    assert "meta device" in error_of(weights_fingerprint, load_base(base, "none"))


def llama(tmp_path):
    return load_base(*find_base(tiny_folder(tmp_path)))


def unsampled(tensor):
    """The first index that the sample of a tensor does not have."""
    sampled = fingerprint._sample(torch.arange(tensor.numel()).view(tensor.shape)).flatten().tolist()
    return next(index for index in range(tensor.numel()) if index not in sampled)


@pytest.mark.parametrize("where", ["lm_head.weight", "model.layers.1.mlp.down_proj.weight", "scale"])
def test_every_byte_of_parameters_and_persistent_buffers_counts(where, tmp_path):
    model = llama(tmp_path)
    model.register_buffer("scale", torch.ones(700))
    before = weights_fingerprint(model)
    tensor = model.state_dict(keep_vars=True)[where]
    index = unsampled(tensor)
    with torch.no_grad():
        tensor.view(-1)[index] *= -4
    after = weights_fingerprint(model)
    assert before.split(":")[:2] == after.split(":")[:2]
    assert not same_weights(before, after)
    assert same_weights(":".join(before.split(":")[:2]), after)  # a sample cannot tell
    with torch.no_grad():
        tensor.view(-1)[index] /= -4
    assert weights_fingerprint(model) == before


def test_bytes_are_read_once_and_again_where_they_changed(tmp_path, monkeypatch):
    read = []
    sha256 = fingerprint._sha256
    monkeypatch.setattr(fingerprint, "_sha256", lambda part: read.append(part.numel()) or sha256(part))
    model = llama(tmp_path)
    first = weights_fingerprint(model)
    assert sum(read) == sum(parameter.numel() for parameter in model.parameters())
    read.clear()
    assert weights_fingerprint(model) == weights_fingerprint(fresh_base(model)) == first
    assert read == []
    model.lm_head.weight.data = model.lm_head.weight.data.clone()
    with torch.no_grad():
        model.model.norm.weight.neg_()
    assert weights_fingerprint(model) != first
    assert sorted(read) == sorted([model.lm_head.weight.numel(), model.model.norm.weight.numel()])


def test_large_tensors_are_hashed_in_parts_and_every_part_counts(monkeypatch):
    def digest(tensor):
        return fingerprint._digest(tensor, tensor, b"")

    values = torch.arange(1000.0)
    monkeypatch.setattr(fingerprint, "PART_BYTES", 256)
    digests = {digest(values.clone()), digest(nn.Parameter(values))}
    assert len(digests) == 1
    for index in (0, 63, 64, 999):
        changed = values.clone()
        changed[index] += 1
        digests.add(digest(changed))
    assert len(digests) == 5

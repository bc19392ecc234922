"""A base model that bitsandbytes has quantized is loaded again as it was, and never a float one in its place."""

from __future__ import annotations

import importlib.util
import json
import shutil
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import test_checkpoint_save_load
import train
from dylora_moe import DyLoRAMoE
from dylora_moe.base.find import find_base
from dylora_moe.base.source import QUANTIZATIONS
from dylora_moe.base.source import quantized as quantized_as
from dylora_moe.checkpoint.verify import find_problems
from dylora_moe.errors import CheckpointError, UsageError

from ..support.mutations import edit_json, rewrite_manifest
from ..support.runs import arguments, assert_same, newest, signal_at
from ..support.tiny import random_ids, randomise, tiny_base

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="needs the package bitsandbytes"
)
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
INT8 = {"load_in_8bit": True}


@pytest.fixture
def folder(tmp_path):
    tiny_base().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def quantized(folder, how):
    config = BitsAndBytesConfig(**how)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)


@needs_bitsandbytes
@pytest.mark.parametrize("how", [NF4, INT8])
def test_a_quantized_base_is_loaded_again_as_it_was(folder, tmp_path, how, capsys):
    model = randomise(DyLoRAMoE(quantized(folder, how), 2))
    assert model.parameter_counts()["base"] == DyLoRAMoE(tiny_base(), 2).parameter_counts()["base"]
    model.save_checkpoint(tmp_path / "checkpoint")
    assert json.loads((tmp_path / "checkpoint/config.json").read_text())["base_model"]["quantization"] == how
    ids = random_ids(2, 9)
    model.eval()
    with torch.no_grad():
        expected = model(ids).logits
        for found in (
            DyLoRAMoE.from_checkpoint(tmp_path / "checkpoint"),
            DyLoRAMoE.from_checkpoint(tmp_path / "checkpoint", quantized(folder, how)),
        ):
            assert torch.equal(found(ids).logits, expected)
    assert test_checkpoint_save_load.main(["--checkpoint", str(tmp_path / "checkpoint")]) == 0, capsys.readouterr()
    with pytest.raises(CheckpointError, match=r"quantization: {.*} there, None here"):
        DyLoRAMoE.from_checkpoint(tmp_path / "checkpoint", tiny_base())
    with pytest.raises(UsageError, match="random weights cannot be"):
        DyLoRAMoE.from_checkpoint(tmp_path / "checkpoint", weights="random")
    randomise(DyLoRAMoE(tiny_base(), 2)).save_checkpoint(tmp_path / "plain")
    with pytest.raises(CheckpointError, match=r"quantization: None there, {.*} here"):
        DyLoRAMoE.from_checkpoint(tmp_path / "plain", quantized(folder, how))


@needs_bitsandbytes
def test_a_quantized_base_is_loaded_on_the_device_that_is_asked_for(folder, monkeypatch):
    """By itself, bitsandbytes takes a GPU where there is one."""
    asked, load = [], AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *a, **k: asked.append(k) or load(*a, **k))
    DyLoRAMoE.from_base(str(folder), 2, quantize="nf4", device="cpu")
    assert [options["device_map"] for options in asked] == [{"": torch.device("cpu")}]


@needs_bitsandbytes
def test_weights_in_4_bits_keep_their_layout(folder):
    """On CPUs with AVX512-BF16, bitsandbytes would change it in the first pass, with scales that do not come back."""
    base = quantized(folder, NF4)
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = True
    model = randomise(DyLoRAMoE(base, 2)).eval()
    before = {name: tensor.clone() for name, tensor in model.base.state_dict().items()}
    with torch.no_grad():
        model(random_ids(2, 9))
    packed = [m for m in model.modules() if hasattr(m, "support_avx512bf16_for_cpu")]
    assert packed and not any(module.support_avx512bf16_for_cpu for module in packed)
    after = model.base.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    model.train()
    model(random_ids(2, 9), labels=random_ids(2, 9)).loss.backward()


@needs_bitsandbytes
@pytest.mark.parametrize("how", ["nf4", pytest.param("int8", marks=pytest.mark.slow)])
def test_train_quantizes_and_resumes_to_the_byte(how, tmp_path, capsys, monkeypatch):
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    assert train.main(arguments(whole, "--quantize", how, steps=6)) == 0, capsys.readouterr()
    with monkeypatch.context() as patch:
        signal_at(patch, "on_step_end", 3)
        assert train.main(arguments(stopped, "--quantize", how, steps=6)) == 143
    assert train.main(arguments(stopped, "--quantize", how, "--resume", steps=6)) == 0, capsys.readouterr()
    assert_same(newest(stopped), newest(whole))
    found = json.loads((newest(whole) / "config.json").read_text())["base_model"]["quantization"]
    assert found == QUANTIZATIONS[how]
    shutil.rmtree(newest(stopped))
    assert train.main(arguments(stopped, "--resume", "--accept-changes", steps=6)) == 2
    assert "quantization" in capsys.readouterr().err


def test_what_cannot_be_quantized_is_refused(folder):
    with pytest.raises(UsageError, match="Unknown quantization 'int4'"):
        DyLoRAMoE.from_base(str(folder), 2, quantize="int4")
    gguf = replace(find_base(str(folder))[0], kind="gguf")
    with pytest.raises(UsageError, match="is a GGUF file, which bitsandbytes does not quantize"):
        quantized_as(gguf, "nf4")


def test_a_quantized_base_needs_its_library_and_is_never_replaced_by_a_float_one(folder, tmp_path, monkeypatch):
    randomise(DyLoRAMoE.from_base(str(folder), 2)).save_checkpoint(tmp_path / "checkpoint")
    edit_json(tmp_path / "checkpoint/config.json", lambda config: config["base_model"].update(quantization=NF4))
    rewrite_manifest(tmp_path / "checkpoint")
    assert find_problems(tmp_path / "checkpoint") == []
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find_spec(name))
    with pytest.raises(UsageError, match="pip install bitsandbytes"):
        DyLoRAMoE.from_checkpoint(tmp_path / "checkpoint")
    edit_json(tmp_path / "checkpoint/config.json", lambda c: c["base_model"].update(quantization={"auto_map": "x.py"}))
    rewrite_manifest(tmp_path / "checkpoint")
    assert (
        "base_model.quantization: expected arguments of BitsAndBytesConfig" in find_problems(tmp_path / "checkpoint")[0]
    )

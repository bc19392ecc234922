"""A base model that bitsandbytes has quantized is loaded again as it was, and never a float one in its place."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import test_checkpoint_save_load
from dylora_moe import DyLoRAMoE
from dylora_moe.checkpoint.verify import find_problems
from dylora_moe.errors import CheckpointError, UsageError

from ..support.mutations import edit_json, rewrite_manifest
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

"""Experts for other programs: flat LoRAs for PEFT and vLLM, GGUF files for llama.cpp, read back and compared."""

from __future__ import annotations

import json
import math
import warnings

import gguf
import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM
from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

from dylora_moe import DyLoRAMoE, MoELoraConfig, UsageError
from dylora_moe.checkpoint.config import ArchitectureEntry
from dylora_moe.editing.export import export_for_llama_cpp, export_for_vllm, export_one
from dylora_moe.editing.gguf_lora import heads_of

from ..support.edits import base_name, checkpoint, logits, old_model, some_ids
from ..support.runs import contents
from ..support.tiny import randomise, tiny_base, tiny_mixture

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def nested(folder, index):
    return folder / "peft_adapters" / f"expert_{index}" / f"expert_{index}"


def test_one_expert_is_what_stock_peft_loads(tmp_path):
    before = contents(checkpoint())
    folder = export_one(checkpoint(), 2, tmp_path / "a" / "lora")
    assert sorted(path.name for path in folder.iterdir()) == [CONFIG, WEIGHTS]
    assert (folder / WEIGHTS).read_bytes() == (nested(checkpoint(), 2) / WEIGHTS).read_bytes()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_name()), folder).eval()
        assert torch.equal(stock(some_ids()).logits, logits(old_model(), 2))
    with pytest.raises(UsageError, match="exists already"):
        export_one(checkpoint(), 1, folder)
    with pytest.raises(UsageError, match="has no expert_3"):
        export_one(checkpoint(), 3, tmp_path / "b")
    with pytest.raises(UsageError, match="is inside the checkpoint"):
        export_one(checkpoint(), 1, checkpoint() / "b")
    assert contents(checkpoint()) == before and [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_base_that_was_moved_with_its_run_is_named_where_it_is(tmp_path):
    tiny_base().save_pretrained(tmp_path / "run" / "base")
    DyLoRAMoE.from_base(str(tmp_path / "run" / "base"), 1).save_checkpoint(tmp_path / "run" / "checkpoint-1")
    (tmp_path / "run").rename(tmp_path / "moved")
    folder = export_one(tmp_path / "moved" / "checkpoint-1", 0, tmp_path / "lora")
    found = json.loads((folder / CONFIG).read_text())
    assert found["base_model_name_or_path"] == str(tmp_path / "moved" / "base")


def test_for_vllm_each_expert_has_a_folder_and_the_command_names_them(tmp_path):
    made = export_for_vllm(checkpoint(), tmp_path / "served")
    for index in range(3):
        folder = made.folder / f"expert_{index}"
        assert made.adapters[f"expert_{index}"] == str(folder)
        assert (folder / WEIGHTS).read_bytes() == (nested(checkpoint(), index) / WEIGHTS).read_bytes()
    assert made.command == (
        f"vllm serve {base_name()} --enable-lora --max-loras 3 --max-lora-rank 8 --lora-modules "
        + " ".join(f"expert_{i}={made.folder}/expert_{i}" for i in range(3))
    )


def test_a_rank_that_vllm_does_not_serve(tmp_path):
    lora = MoELoraConfig(r=600, target_modules=["q_proj"])
    folder = DyLoRAMoE.from_base(base_name(), 1, lora=lora).save_checkpoint(tmp_path / "checkpoint-1")
    with pytest.raises(UsageError, match="vLLM serves LoRAs of at most rank 512, found one of 600"):
        export_for_vllm(folder, tmp_path / "served")
    assert not (tmp_path / "served").exists()


def read_gguf(path):
    reader = gguf.GGUFReader(path)
    facts = {key: field.contents() for key, field in reader.fields.items() if "." in key}
    return facts, {tensor.name: np.array(tensor.data) for tensor in reader.tensors}


def saved(tmp_path, kind, **settings):
    """A checkpoint of one expert on a tiny base model, and the tensors of the expert by their names in a PEFT file."""
    lora = MoELoraConfig(r=4, lora_alpha=6, lora_dropout=0.0, **settings)
    model = randomise(DyLoRAMoE(tiny_base(kind), 1, lora=lora))
    folder = model.save_checkpoint(tmp_path / "checkpoint-1")
    return folder, load_file(nested(folder, 0) / WEIGHTS)


LAYERS = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma"])
def test_a_gguf_file_has_the_tensors_under_the_names_of_llama_cpp(kind, tmp_path):
    folder, there = saved(tmp_path, kind, target_modules="all-linear")
    made = export_for_llama_cpp(folder, tmp_path / "served")
    facts, here = read_gguf(made.adapters["expert_0"])
    assert facts["general.architecture"] == kind and facts["general.type"] == "adapter"
    assert facts["adapter.type"] == "lora" and facts["adapter.lora.alpha"] == 6
    assert len(here) == len(there) == 2 * 3 * len(LAYERS)
    back = LlamaTensorProcessor({"num_attention_heads": 4, "num_key_value_heads": 2})
    permuted = 0
    for block in range(3):
        for name, layer in LAYERS.items():
            a, b = (there[f"base_model.model.model.layers.{block}.{name}.lora_{side}.weight"] for side in "AB")
            full = f"blk.{block}.{layer}.weight"
            assert np.array_equal(here[f"{full}.lora_a"], a), name
            found = here[f"{full}.lora_b"]
            if kind == "llama":  # what Transformers does to read the base model's weight gives the rows of PEFT
                permuted += not np.array_equal(found, b)
                found = back.process(found, full).weights
            assert np.array_equal(found, b), name
    assert permuted == (6 if kind == "llama" else 0)  # q and k


def test_the_rows_of_q_are_those_of_neighbours(tmp_path):
    """Of a head of 8 rows, row 0 is followed by row 4, which Transformers rotates with it."""
    folder, there = saved(tmp_path, "llama")
    _, here = read_gguf(export_for_llama_cpp(folder, tmp_path / "served").adapters["expert_0"])
    b, found = (
        there["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"],
        here["blk.0.attn_q.weight.lora_b"],
    )
    assert np.array_equal(found[:8], b[[0, 4, 1, 5, 2, 6, 3, 7]])
    assert np.array_equal(found[8:16], b[[8, 12, 9, 13, 10, 14, 11, 15]])


def test_a_rank_stabilized_lora_is_scaled_as_in_peft(tmp_path):
    folder, _ = saved(tmp_path, "llama", use_rslora=True)
    facts, here = read_gguf(export_for_llama_cpp(folder, tmp_path / "served").adapters["expert_0"])
    rank = here["blk.0.attn_q.weight.lora_b"].shape[1]
    assert facts["adapter.lora.alpha"] / rank == pytest.approx(6 / math.sqrt(4))


def test_the_command_for_llama_cpp(tmp_path):
    made = export_for_llama_cpp(checkpoint(), tmp_path / "served")
    assert sorted(path.name for path in made.folder.iterdir()) == [f"expert_{i}.gguf" for i in range(3)]
    loras = " ".join(f"--lora {made.folder}/expert_{i}.gguf" for i in range(3))
    assert made.command == f"llama-server -m BASE.gguf --lora-init-without-apply {loras}"


def test_what_llama_cpp_cannot_be_given(tmp_path):
    folder = tiny_mixture("gpt_neox", 1).save_checkpoint(tmp_path / "checkpoint-1")
    with pytest.raises(UsageError, match=r"of the type gpt_neox cannot be written for llama\.cpp, those on llama, "):
        export_for_llama_cpp(folder, tmp_path / "served")
    assert not (tmp_path / "served").exists()
    entry = ArchitectureEntry("llama", 8, 1, 2, 8, 9, "", settings=None)  # as version 0.2.1 had it
    with pytest.raises(UsageError, match=r"config\.json does not say how many attention heads"):
        heads_of(entry, "here")

"""A checkpoint that version 0.2.1 wrote verifies, loads and resumes.

Its texts are literal, as that version wrote them for the tiny Llama of these tests; the tensors around them are made
here. Of the manifest, sizes and hashes are those of the files.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import torch
from transformers import TrainingArguments

from dylora_moe import DyLoRAMoE
from dylora_moe.base.preserve import seeded
from dylora_moe.checkpoint import formats
from dylora_moe.checkpoint.read import load_mixture
from dylora_moe.checkpoint.verify import find_problems, open_checkpoint
from dylora_moe.training.batches import BlockCollator
from dylora_moe.training.checkpoint_callback import PeftCheckpointCallback
from dylora_moe.training.trainer import MoETrainer

from ..support.mutations import CONFIG_0, CONFIG_1, edit_json, files_of
from ..support.tiny import random_ids, tiny_base

CONFIG = """\
{
  "base_model": {
    "architecture": {
      "fingerprint": "63529f9a0320b7138d384a715c05920d93b86ac585256f8b38098abebd556c05",
      "hidden_size": 32,
      "intermediate_size": 48,
      "model_type": "llama",
      "num_attention_heads": 4,
      "num_hidden_layers": 3,
      "vocab_size": 97
    },
    "dtype": "float32",
    "name": null,
    "revision": null
  },
  "experts": [
    {
      "layout": "db26b98edb75b1fea9f92af14283c08932795114ac02010dda237f2c870df339",
      "lora_alpha": 32,
      "name": "expert_0",
      "parameters": 10752,
      "r": 16,
      "state": "immature",
      "target_modules": [
        "k_proj",
        "o_proj",
        "q_proj",
        "v_proj"
      ],
      "tensors": 24,
      "use_rslora": false
    },
    {
      "layout": "db26b98edb75b1fea9f92af14283c08932795114ac02010dda237f2c870df339",
      "lora_alpha": 32,
      "name": "expert_1",
      "parameters": 10752,
      "r": 16,
      "state": "immature",
      "target_modules": [
        "k_proj",
        "o_proj",
        "q_proj",
        "v_proj"
      ],
      "tensors": 24,
      "use_rslora": false
    }
  ],
  "format_version": 1,
  "model_type": "dylora-moe",
  "num_experts": 2,
  "probe": true,
  "router": {
    "balance_coefficient": 0.01,
    "hidden_size": 32,
    "temperature": 1.0,
    "top_k": null
  },
  "step": 2,
  "versions": {
    "dylora_moe": "0.2.1",
    "peft": "0.21.2",
    "safetensors": "0.8.0",
    "torch": "2.14.1",
    "transformers": "5.23.0"
  }
}
"""

ADAPTER_CONFIG = """\
{
  "alora_invocation_tokens": null,
  "alpha_pattern": {},
  "arrow_config": null,
  "auto_mapping": null,
  "base_model_name_or_path": null,
  "bias": "none",
  "corda_config": null,
  "ensure_weight_tying": false,
  "eva_config": null,
  "exclude_modules": null,
  "fan_in_fan_out": false,
  "inference_mode": true,
  "init_lora_weights": true,
  "kasa_config": null,
  "layer_replication": null,
  "layers_pattern": null,
  "layers_to_transform": null,
  "loftq_config": {},
  "lora_alpha": 32,
  "lora_bias": false,
  "lora_dropout": 0.05,
  "lora_ga_config": null,
  "megatron_config": null,
  "megatron_core": "megatron.core",
  "modules_to_save": null,
  "monteclora_config": null,
  "peft_type": "LORA",
  "peft_version": "0.21.2",
  "qalora_group_size": 16,
  "r": 16,
  "rank_pattern": {},
  "revision": null,
  "target_modules": [
    "k_proj",
    "o_proj",
    "q_proj",
    "v_proj"
  ],
  "target_parameters": null,
  "task_type": "CAUSAL_LM",
  "trainable_token_indices": null,
  "use_bdlora": null,
  "use_dora": false,
  "use_qalora": false,
  "use_rslora": false,
  "velora_config": null
}
"""

MANIFEST_HEAD = """\
{
 "format_version": 1,
 "files": {
"""
MANIFEST_ENTRY = """\
  "NAME": {
   "bytes": BYTES,
   "sha256": "SHA256"
  }"""
MANIFEST_TAIL = """
 }
}
"""


def trainer(folder: Path) -> MoETrainer:
    """4 steps of 4 rows; a checkpoint after 2 of them."""
    ids = random_ids(16, 12).tolist()
    rows = [{"input_ids": row, "labels": row, "position_ids": list(range(12))} for row in ids]
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=4, save_steps=2, learning_rate=1e-2, per_device_train_batch_size=4,
        use_cpu=True, remove_unused_columns=False, label_names=["labels"], report_to="none",
    )  # fmt: skip
    with seeded(0):
        model = DyLoRAMoE(tiny_base(), 2)
    return MoETrainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        data_collator=BlockCollator(),
        callbacks=[PeftCheckpointCallback()],
    )


def as_version_0_2_1_wrote_it(checkpoint: Path, folder: Path) -> Path:
    """The tensors and the training state of a checkpoint, between the texts of that version."""
    shutil.copytree(checkpoint, folder)
    for name in (formats.OPTIMIZER, "rng_state.pth"):  # which named no step
        state = torch.load(folder / name, weights_only=True)
        del state["global_step"]
        torch.save(state, folder / name)
    edit_json(folder / formats.TRAINER_STATE, without_new_sums)
    (folder / formats.CONFIG).write_text(CONFIG)
    for name in (CONFIG_0, CONFIG_1):
        (folder / name).write_text(ADAPTER_CONFIG)
    (folder / "manifest.json").unlink()
    entries = [
        MANIFEST_ENTRY.replace("NAME", name)
        .replace("BYTES", str(len(data)))
        .replace("SHA256", hashlib.sha256(data).hexdigest())
        for name, data in files_of(folder).items()
    ]
    (folder / "manifest.json").write_text(MANIFEST_HEAD + ",\n".join(entries) + MANIFEST_TAIL)
    return folder


def without_new_sums(state: dict) -> None:
    (sums,) = state["stateful_callbacks"]["MoETrainer"]["attributes"]["by_rank"]
    del sums["first_step"], sums["optimizer_steps"]


def test_a_checkpoint_of_version_0_2_1_verifies_loads_and_resumes(tmp_path):
    through = trainer(tmp_path / "through")
    through.train()
    old = as_version_0_2_1_wrote_it(tmp_path / "through" / "checkpoint-2", tmp_path / "old" / "checkpoint-2")
    assert find_problems(old) == []
    content = json.loads(open_checkpoint(old).config.to_json())
    assert content.pop("format_version") == 2 and content["base_model"]["architecture"].pop("settings") is None
    assert content["base_model"].pop("quantization") is None
    assert content | {"format_version": 1} == json.loads(CONFIG)

    loaded = load_mixture(old, tiny_base())
    there = load_mixture(tmp_path / "through" / "checkpoint-2", tiny_base())
    assert loaded.expert_states == ["immature", "immature"]
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), there.parameters(), strict=True))

    resumed = trainer(tmp_path / "old")
    resumed.train(resume_from_checkpoint=str(old))
    assert resumed.state.global_step == 4
    expected = through.mixture.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in resumed.mixture.state_dict().items())
    assert not torch.equal(
        next(iter(loaded.expert_tensors(0).values())), next(iter(resumed.mixture.expert_tensors(0).values()))
    )

"""A checkpoint that version 0.2.1 wrote is refused, and converted.

Its texts are literal, as that version wrote them for the tiny Llama of these tests; the tensors around them are made
here. Of the manifest, sizes and hashes are those of the files.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save

import test_checkpoint_minimal as minimal
import test_checkpoint_save_load as full
from dylora_moe import DyLoRAMoE
from dylora_moe.base.preserve import seeded
from dylora_moe.checkpoint import formats
from dylora_moe.checkpoint.read import load_mixture
from dylora_moe.checkpoint.verify import find_problems
from dylora_moe.checkpoint.write import save_checkpoint
from dylora_moe.cli.main import main
from dylora_moe.errors import CheckpointError
from dylora_moe.mixture.config import RouterConfig
from dylora_moe.training.resume import check

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


@pytest.fixture
def old(tmp_path) -> Path:
    """A checkpoint between the texts of that version, with gates that read every layer."""
    folder = tmp_path / "old" / "checkpoint-2"
    with seeded(0):
        save_checkpoint(folder, trained(DyLoRAMoE(tiny_base(), 2)), step=2)
    gates = {f"gates.{layer}.weight": torch.ones(2, 32) for layer in range(3)}
    (folder / formats.ROUTER).write_bytes(save(gates, metadata={"format": "pt"}))
    (folder / formats.CONFIG).write_text(CONFIG)
    for name in (CONFIG_0, CONFIG_1):
        (folder / name).write_text(ADAPTER_CONFIG)
    write_manifest(folder)
    return folder


def trained(model: DyLoRAMoE) -> DyLoRAMoE:
    with torch.no_grad():
        for index in range(model.num_experts):
            for tensor in model.expert_tensors(index).values():
                tensor.normal_(std=0.1)
    return model


def write_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    entries = [
        MANIFEST_ENTRY.replace("NAME", name)
        .replace("BYTES", str(len(data)))
        .replace("SHA256", hashlib.sha256(data).hexdigest())
        for name, data in files_of(folder).items()
    ]
    (folder / "manifest.json").write_text(MANIFEST_HEAD + ",\n".join(entries) + MANIFEST_TAIL)


def test_it_is_refused_with_the_command_that_converts_it(old, capsys):
    convert = f"dylora-moe convert {old} NEW_FOLDER"
    (problem,) = find_problems(old)
    assert problem.startswith("config.json: format_version: expected 2, found 1; it is of DyLoRA-MoE 0.2.1")
    assert problem.endswith(convert)
    with pytest.raises(CheckpointError, match=convert):
        load_mixture(old, tiny_base())
    for weights_only in (False, True):  # on resume
        with pytest.raises(CheckpointError, match=convert):
            check(old, {}, DyLoRAMoE(tiny_base(), 2), weights_only, accept_changes=True)
    assert (full.main(["--checkpoint", str(old)]), minimal.main(["--checkpoint", str(old)])) == (1, 1)
    assert capsys.readouterr().out.count(convert) == 2


def test_it_is_converted(old, tmp_path, capsys):
    before, new = files_of(old), tmp_path / "new"
    assert main(["convert", str(old), str(new)]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"✓ {new}: converted from {old}, 2 experts (immature)\n")
    assert "nearly the same weight until the router is trained" in out
    assert files_of(old) == before and sorted(path.name for path in tmp_path.glob("[!.]*")) == ["new", "old"]
    after = files_of(new)
    adapters = {name: data for name, data in before.items() if name.startswith(formats.ADAPTERS)}
    assert len(adapters) == 4 and {name: data for name, data in after.items() if name in adapters} == adapters
    assert set(after) - set(adapters) == {"config.json", "manifest.json", "router.safetensors", formats.SKILLS}
    assert main(["verify", str(new)]) == 0

    model = load_mixture(new, tiny_base())
    there = load_file(new / CONFIG_0.replace("adapter_config.json", "adapter_model.safetensors"))
    assert all(torch.equal(tensor, there[name]) for name, tensor in model.expert_tensors(0).items())
    assert model.router.config == RouterConfig(top_k=2)
    with torch.no_grad(), model._routing.run(record=True) as state:
        model.base(random_ids(4, 12))
    shares = state.probabilities  # (4, 12, 2)
    assert 0 < (shares - 0.5).abs().max() < 0.01


def rewritten(change) -> Callable[[Path], None]:
    def spoil(old: Path) -> None:
        edit_json(old / formats.CONFIG, change)
        write_manifest(old)

    return spoil


def flip(old: Path) -> None:
    path = old / CONFIG_0.replace("adapter_config.json", "adapter_model.safetensors")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


# What is wrong with the old checkpoint; the new one, in the old one's parent; exit code; message.
REFUSED = {
    "corrupt": (flip, "new", 1, r"expert_0/adapter_model\.safetensors: expected .*its content was changed"),
    "no such folder": (shutil.rmtree, "new", 2, "expected a checkpoint folder, found nothing"),
    "new exists": (lambda old: (old.parent / "new").mkdir(), "new", 2, "new exists already: name a new folder"),
    "new inside": (lambda old: None, "checkpoint-2/new", 2, "is inside the old checkpoint"),
    "of today": (rewritten(lambda c: c.update(format_version=2)), "new", 2, "has format version 2 already"),
    "of tomorrow": (rewritten(lambda c: c.update(format_version=3)), "new", 1, "format_version: expected 1, found 3"),
    "no base": (rewritten(lambda c: c.pop("base_model")), "new", 1, "base_model.dtype: expected float32"),
    "too wide": (rewritten(lambda c: c["router"].update(hidden_size=1 << 30)), "new", 1, "expected the sizes of"),
    "another rank": (rewritten(lambda c: c["experts"][1].update(r=8)), "new", 1, "r: expected 8"),
    "base beside": (rewritten(lambda c: c["base_model"].update(name="../x")), "../new", 2, "name a new folder in"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_converted(old, capsys, case):
    spoil, name, code, text = REFUSED[case]
    spoil(old)
    before = set(old.parent.parent.rglob("*"))
    assert main(["convert", str(old), str(old.parent / name)]) == code
    assert re.search(text, capsys.readouterr().err)
    assert set(old.parent.parent.rglob("*")) == before

"""What the README's table says of each family of base models: it trains, resumes, generates and is exported."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel

import train
from dylora_moe import DyLoRAMoE
from dylora_moe.base.tiny import byte_tokenizer
from dylora_moe.cli.main import main
from dylora_moe.editing.export import export_for_vllm
from dylora_moe.editing.gguf_lora import LLAMA_LIKE, OTHERS

from ..support.runs import arguments, assert_same, newest, signal_at
from ..support.scripts import ROOT
from ..support.tiny import FAMILIES, random_ids, tiny_base

QUANTIZED = FAMILIES


def base_of(kind: str) -> torch.nn.Module:
    return tiny_base(kind, vocabulary=len(byte_tokenizer()))


def readme_table() -> dict[str, list[str]]:
    """The cells of the table of families, by the model type in the first one."""
    rows = re.findall(r"^\| [^|]*\(`(\w+)`\)[^|]*\|(.*)\|$", (ROOT / "README.md").read_text(encoding="utf-8"), re.M)
    return {kind: [cell.strip() for cell in cells.split("|")] for kind, cells in rows}


def test_the_readme_says_what_is_tested():
    """Trained and resumed, generates, in PEFT, for llama.cpp (tests/editing/test_export.py), quantized."""
    written = LLAMA_LIKE | OTHERS
    expected = {
        kind: ["yes", "yes", "yes", *("yes" if kind in some else "no" for some in (written, QUANTIZED))]
        for kind in FAMILIES
    }
    assert {kind: cells[1:] for kind, cells in readme_table().items()} == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "quantize"), [*((kind, "none") for kind in FAMILIES), *((kind, "nf4") for kind in QUANTIZED)]
)
def test_a_family_trains_resumes_generates_and_is_exported(kind, quantize, tmp_path, monkeypatch, capsys):
    if quantize != "none":
        pytest.importorskip("bitsandbytes")
    base_of(kind).save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    flags = ("--model", str(tmp_path / "base"), "--max-steps", "8", "--quantize", quantize)
    assert train.main(arguments(tmp_path / "whole", *flags)) == 0, capsys.readouterr()
    with monkeypatch.context() as patch:
        signal_at(patch, "on_step_begin", 5)
        assert train.main(arguments(tmp_path / "run", *flags)) == 143
    assert train.main(arguments(tmp_path / "run", *flags, "--resume")) == 0, capsys.readouterr()
    assert_same(newest(tmp_path / "whole"), newest(tmp_path / "run"))

    checkpoint = newest(tmp_path / "run")
    model, ids = DyLoRAMoE.from_checkpoint(checkpoint), byte_tokenizer()("def f(", return_tensors="pt")["input_ids"]
    said = model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
    capsys.readouterr()
    flags = ("--prompt", "def f(", "--temperature", "0", "--max-new-tokens", "6", "--json", "-")
    assert main(["generate", str(checkpoint), *flags]) == 0
    (answer,) = json.loads(capsys.readouterr().out)["answers"]
    assert answer["text"] == byte_tokenizer().decode(said, skip_special_tokens=True)
    if quantize == "none":
        check_export(kind, model, checkpoint, tmp_path / "served")


def check_export(kind: str, model: DyLoRAMoE, checkpoint: Path, folder: Path) -> None:
    """What is exported for vLLM is what stock PEFT loads, each expert with its own logits."""
    ids, found = random_ids(2, 9), []
    for index, adapter in enumerate(export_for_vllm(checkpoint, folder).adapters.values()):
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            found.append(PeftModel.from_pretrained(base_of(kind), adapter).eval()(ids).logits)
            assert (found[-1] - model(ids, expert=index).logits).abs().max() < 1e-5
    assert len(found) == 2 and (found[0] - found[1]).abs().max() > 1e-4

"""By how much a probe may differ: by nothing where it was computed in the same way, otherwise by the dtype's digits."""

from __future__ import annotations

import pytest
import torch

from dylora_moe import DyLoRAMoE
from dylora_moe.checkpoint.probe import TF32, max_abs_difference, probe_facts, probe_tolerance

from ..support.tiny import tiny_base


def probe(largest: float) -> dict[str, torch.Tensor]:
    return {"routed": torch.tensor([-largest, 1.0]), "experts": torch.tensor([0.5])}


def facts(dtype: str = "float32", machine: str = "this one") -> dict[str, str]:
    return {"dtype": dtype, "machine": machine, "device_type": "cpu"}


def test_the_same_way_allows_for_nothing():
    assert probe_tolerance(facts(), facts(), probe(100)) == 0


@pytest.mark.parametrize(
    ("dtype", "largest", "tolerance"),
    [("bfloat16", 8, 0.25), ("bfloat16", 128, 2.0), ("float16", 64, 0.2), ("float32", 1, 1e-3), ("float32", 32, 2e-3)],
)
def test_large_logits_have_coarser_digits(dtype, largest, tolerance):
    elsewhere = facts(dtype, "another one")
    assert probe_tolerance(elsewhere, facts(dtype), probe(largest)) == pytest.approx(tolerance)
    spacing = torch.finfo(getattr(torch, dtype)).eps * largest
    assert 2 * spacing <= tolerance


def test_products_in_tf32_have_the_digits_of_float16():
    assert probe_tolerance(facts(machine=f"a GPU, {TF32}"), facts(machine="a GPU"), probe(1)) == 0.05


def test_another_attention_rounds_otherwise():
    base = tiny_base()
    model = DyLoRAMoE(base, 2)
    before = probe_facts(model)["machine"]
    assert "sdpa attention" in before
    base.set_attn_implementation("eager")
    assert probe_facts(model)["machine"] == before.replace("sdpa", "eager")


def test_a_difference_that_is_no_number_is_the_largest():
    assert max_abs_difference(torch.tensor([1.0, float("nan")]), torch.tensor([1.0, 2.0])) == float("inf")

"""The gate's arithmetic, the balance loss and the usage statistics."""

import math

import pytest
import torch

from dylora_moe import Router, RouterConfig
from dylora_moe.mixture.router import Usage, balance_loss, balance_statistics

HIDDEN = 8


def router(experts=3, **settings):
    torch.manual_seed(0)
    return Router(HIDDEN, experts, RouterConfig(**settings))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logits_are_the_gate_on_the_normalised_state(dtype):
    gate = router(temperature=2.0)
    hidden = (torch.randn(2, 5, HIDDEN) * 100).to(dtype)
    x = hidden.double() / (hidden.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    expected = x @ gate.gate.weight.double().T / 2
    logits = gate.logits(hidden)
    assert logits.dtype == torch.float32
    assert torch.allclose(logits.double(), expected, atol=1e-5)
    assert torch.allclose(gate.logits(hidden, (2, 0)), logits[..., [2, 0]], atol=1e-6)


def test_a_hidden_state_of_zeros_has_logits_of_zero():
    assert torch.equal(router().logits(torch.zeros(1, 1, HIDDEN)), torch.zeros(1, 1, 3))


def test_autocast_leaves_the_router_in_float32():
    gate, hidden = router(), torch.randn(2, 5, HIDDEN)
    expected = gate.logits(hidden)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(gate.logits(hidden), expected)


def test_top_is_renormalised_and_none_where_it_is_all():
    logits = torch.tensor([[1.0, 3.0, 2.0, -1.0]])
    index, weights = router(4, top_k=2).top(logits)
    assert index.tolist() == [[1, 2]]
    assert torch.allclose(weights, torch.tensor([[math.e, 1.0]]) / (math.e + 1))
    assert router(2).top(logits[:, :2]) is None
    assert router(4, top_k=9).top(logits) is None


def test_growing_keeps_the_rows_that_were_there():
    gate = router()
    before = gate.gate.weight.detach().clone()
    gate.grow()
    assert gate.num_experts == 4
    assert torch.equal(gate.gate.weight[:3], before)
    assert gate.gate.weight.requires_grad


def loss_of(probs, mask, tokens=None):
    first, total = balance_statistics(probs, mask)
    return balance_loss(first, total, mask.sum() if tokens is None else tokens)


def test_balance_is_one_for_an_even_load_and_the_number_of_experts_for_one_that_takes_all():
    even = torch.eye(4).repeat(1, 1, 3, 1)  # (1, 1, 12, 4)
    all_on_one = torch.eye(4)[:1].expand(1, 1, 12, 4)
    mask = torch.ones(1, 12, dtype=torch.bool)
    assert loss_of(even, mask) == pytest.approx(1)
    assert loss_of(all_on_one, mask) == pytest.approx(4)


def test_tokens_that_do_not_count_change_nothing():
    probs = torch.randn(3, 2, 6, 4).softmax(-1)
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]]).bool()
    other = torch.where(mask[None, :, :, None], probs, torch.randn(3, 2, 6, 4).softmax(-1))
    assert torch.equal(loss_of(probs, mask), loss_of(other, mask))


def test_balance_loss_of_a_batch_is_the_sum_over_its_micro_batches():
    probs = torch.randn(3, 4, 6, 4).softmax(-1)
    mask = torch.rand(4, 6) < 0.7
    parts = sum(loss_of(probs[:, i : i + 1], mask[i : i + 1], mask.sum()) for i in range(4))
    assert torch.allclose(loss_of(probs, mask), parts)


def test_a_batch_without_any_token_has_a_balance_of_zero():
    mask = torch.zeros(2, 6, dtype=torch.bool)
    assert loss_of(torch.randn(3, 2, 6, 4).softmax(-1), mask, torch.tensor(1.0)) == 0


def test_usage():
    usage = Usage(first=torch.tensor([3.0, 1.0]), total=torch.tensor([2.5, 1.5]))
    assert usage.shares() == pytest.approx([0.625, 0.375])
    assert usage.balance() == pytest.approx(2 * (0.75 * 0.625 + 0.25 * 0.375))
    nothing = Usage(torch.zeros(2), torch.zeros(2))
    assert nothing.shares() == [0.0, 0.0]
    assert nothing.balance() == 0

"""The router's arithmetic, the balance loss and the usage statistics."""

import math

import pytest
import torch

from dylora_moe import Router, RouterConfig
from dylora_moe.mixture.router import Tokens, Usage, balance_loss, balance_statistics, count_tokens

WIDTH = 8


def router(experts=3, **settings):
    torch.manual_seed(0)
    made = Router(WIDTH, experts, RouterConfig(**settings))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_()
    return made


def tokens(counted, begins=None):
    counted = torch.tensor(counted).bool()
    begins = torch.zeros_like(counted) if begins is None else torch.tensor(begins).bool()
    return Tokens(counted & ~begins, begins)


def by_the_book(gate, embeddings, counted, begins):
    """The definition in float64, token by token."""
    settings, parameters = gate.config, {name: p.detach().double() for name, p in gate.named_parameters()}
    x = embeddings.double() / (embeddings.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    rows = []
    for row in range(len(x)):
        sums, count, found = torch.zeros(gate.num_experts).double(), 0.0, []
        for t in range(x.shape[1]):
            if begins[row][t]:
                sums, count = torch.zeros_like(sums), 0.0
            elif counted[row][t]:
                seen = parameters["gate.weight"] @ x[row, t] + parameters["gate.bias"]
                sums, count = settings.decay * sums + seen, settings.decay * count + 1
            found.append(sums / (count + settings.prior_tokens) / settings.temperature + parameters["prior"])
        rows.append(torch.stack(found))
    return torch.stack(rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("decay", [0.95, 1.0, 0.01])
def test_logits_are_the_forgetting_mean_of_the_gate(dtype, decay, monkeypatch):
    """Over several chunks, documents and padding."""
    monkeypatch.setattr("dylora_moe.mixture.router.CHUNK", 4)
    gate = router(temperature=2.0, decay=decay, prior_tokens=1.5)
    embeddings = (torch.randn(2, 11, WIDTH) * 10).to(dtype)
    counted = [[0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 0, 1, 1, 0, 0]]
    begins = [[0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0], [1, 0, 0, 0, 0, 1, 0, 0, 1, 0, 0]]
    sums = gate.sums(embeddings, tokens(counted, begins))
    assert sums.dtype == torch.float32
    logits = gate.logits(sums)
    assert torch.allclose(logits.double(), by_the_book(gate, embeddings, counted, begins), atol=1e-5)
    some = gate.logits(gate.sums(embeddings, tokens(counted, begins), (2, 0)), (2, 0))
    assert torch.allclose(some, logits[..., [2, 0]], atol=1e-6)
    added = gate.contributions(embeddings, tokens(counted, begins))
    assert torch.allclose(added.sum(1) + gate.prior, logits[:, -1], atol=1e-5)
    of_last_document = [[False] * 8 + [True] * 3, [False] * 11]
    assert (added != 0).all(-1).tolist() == of_last_document


def test_what_came_before_is_gone_on_from():
    gate, embeddings = router(), torch.randn(2, 9, WIDTH)
    whole = tokens([[1] * 9] * 2, [[1] + [0] * 8, [1, 0, 0, 0, 0, 0, 1, 0, 0]])
    sums = gate.sums(embeddings, whole)
    first = gate.sums(embeddings[:, :4], Tokens(*(part[:, :4] for part in whole)))
    then = gate.sums(embeddings[:, 4:], Tokens(*(part[:, 4:] for part in whole)), before=first[:, -1])
    assert torch.allclose(torch.cat([first, then], 1), sums, atol=1e-6)


def test_the_first_token_of_a_document_is_routed_by_the_prior():
    gate = router(temperature=3.0)
    found = count_tokens((1, 5), None, torch.tensor([[0, 1, 2, 0, 1]]), torch.zeros(1, dtype=torch.bool))
    logits = gate.logits(gate.sums(torch.randn(1, 5, WIDTH), found))
    assert torch.equal(logits[0, 0], gate.prior) and torch.equal(logits[0, 3], gate.prior)
    assert not torch.allclose(logits[0, 1], gate.prior)


@pytest.mark.parametrize(
    ("mask", "positions", "seen", "counted", "begins"),
    [
        (None, None, False, [0, 1, 1, 1], [1, 0, 0, 0]),
        (None, None, True, [1, 1, 1, 1], [0, 0, 0, 0]),
        ([0, 0, 1, 1], None, False, [0, 0, 0, 1], [0, 0, 1, 0]),  # padding on the left
        ([0, 0, 1, 1], [1, 1, 0, 1], False, [0, 0, 0, 1], [0, 0, 1, 0]),  # as Transformers numbers it
        ([1, 1, 0, 0], [0, 1, 2, 3], False, [0, 1, 0, 0], [1, 0, 0, 0]),  # on the right
        ([1, 1, 1, 1, 1, 1], None, True, [1, 1, 1, 1], [0, 0, 0, 0]),  # of the cache and of these tokens
        (None, [0, 1, 0, 1], False, [0, 1, 0, 1], [1, 0, 1, 0]),  # two documents
        ([[[[1] * 4] * 4]], [7, 8, 9, 10], False, [0, 1, 1, 1], [1, 0, 0, 0]),  # a mask of another form
        (None, [[[0, 1, 2, 0]], [[5, 5, 5, 5]], [[0, 0, 0, 0]]], False, [0, 1, 1, 0], [1, 0, 0, 1]),  # of three axes
        ([0, 0, 0, 0], [1, 1, 1, 1], False, [0, 0, 0, 0], [0, 0, 0, 0]),
    ],
)
def test_which_tokens_count(mask, positions, seen, counted, begins):
    mask = None if mask is None else torch.tensor(mask if isinstance(mask[0], list) else [mask])
    positions = None if positions is None else torch.tensor(positions)
    positions = positions if positions is None or positions.dim() == 3 else positions.unsqueeze(0)
    found = count_tokens((1, 4), mask, positions, torch.tensor([seen]))
    assert found.counted[0].int().tolist() == counted
    assert found.begins[0].int().tolist() == begins


@pytest.mark.parametrize("by_kind", [False, True])
@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("cached", [0, 3])
def test_padding_is_told_by_what_a_base_has_made_of_the_mask(by_kind, additive, cached):
    seen = torch.zeros(2, dtype=torch.bool)
    mask = torch.tensor([[1] * cached + [1, 1, 1, 1], [0] * cached + [0, 0, 1, 1]])
    whole = mask[:, None, None].bool() & torch.ones(4, cached + 4).tril(cached).bool()  # (2, 1, 4, cached + 4)
    whole = torch.where(whole, 0.0, torch.finfo(torch.float32).min) if additive else whole
    found = count_tokens((2, 4), {"sliding_attention": whole} if by_kind else whole, None, seen)
    assert all(map(torch.equal, found, count_tokens((2, 4), mask, None, seen)))
    assert not torch.equal(found.counted, count_tokens((2, 4), None, None, seen).counted)


def test_autocast_leaves_the_router_in_float32():
    gate, embeddings, all_of = router(), torch.randn(2, 5, WIDTH), tokens([[1] * 5] * 2)
    expected = gate.sums(embeddings, all_of)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(gate.sums(embeddings, all_of), expected)


def test_top_is_renormalised_and_none_where_it_is_all():
    logits = torch.tensor([[1.0, 3.0, 2.0, -1.0]])
    index, weights = router(4, top_k=2).top(logits)
    assert index.tolist() == [[1, 2]]
    assert torch.allclose(weights, torch.tensor([[math.e, 1.0]]) / (math.e + 1))
    assert router(2).top(logits[:, :2]) is None
    assert router(4, top_k=9).top(logits) is None


def test_growing_keeps_what_was_there():
    gate, embeddings, all_of = router(), torch.randn(1, 5, WIDTH), tokens([[1] * 5])
    before = gate.sums(embeddings, all_of), gate.logits(gate.sums(embeddings, all_of))
    gate.grow()
    assert gate.num_experts == 4
    sums = gate.sums(embeddings, all_of, (0, 1, 2))
    assert torch.equal(sums, before[0]) and torch.equal(gate.logits(sums, (0, 1, 2)), before[1])
    assert all(p.requires_grad for p in gate.parameters())


def loss_of(probs, mask, tokens=None):
    first, total = balance_statistics(probs, mask)
    return balance_loss(first, total, mask.sum() if tokens is None else tokens)


def test_balance_is_one_for_an_even_load_and_the_number_of_experts_for_one_that_takes_all():
    even = torch.eye(4).repeat(1, 3, 1)  # (1, 12, 4)
    all_on_one = torch.eye(4)[:1].expand(1, 12, 4)
    mask = torch.ones(1, 12, dtype=torch.bool)
    assert loss_of(even, mask) == pytest.approx(1)
    assert loss_of(all_on_one, mask) == pytest.approx(4)


def test_tokens_that_do_not_count_change_nothing():
    probs = torch.randn(2, 6, 4).softmax(-1)
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]]).bool()
    other = torch.where(mask[:, :, None], probs, torch.randn(2, 6, 4).softmax(-1))
    assert torch.equal(loss_of(probs, mask), loss_of(other, mask))


def test_balance_loss_of_a_batch_is_the_sum_over_its_micro_batches():
    probs = torch.randn(4, 6, 4).softmax(-1)
    mask = torch.rand(4, 6) < 0.7
    parts = sum(loss_of(probs[i : i + 1], mask[i : i + 1], mask.sum()) for i in range(4))
    assert torch.allclose(loss_of(probs, mask), parts)


def test_a_batch_without_any_token_has_a_balance_of_zero():
    mask = torch.zeros(2, 6, dtype=torch.bool)
    assert loss_of(torch.randn(2, 6, 4).softmax(-1), mask, torch.tensor(1.0)) == 0


def test_usage():
    usage = Usage(first=torch.tensor([3.0, 1.0]), total=torch.tensor([2.5, 1.5]))
    assert usage.shares() == pytest.approx([0.625, 0.375])
    assert usage.balance() == pytest.approx(2 * (0.75 * 0.625 + 0.25 * 0.375))
    nothing = Usage(torch.zeros(2), torch.zeros(2))
    assert nothing.shares() == [0.0, 0.0]
    assert nothing.balance() == 0

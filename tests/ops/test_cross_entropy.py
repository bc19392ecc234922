"""The loss of a language model is what F.cross_entropy makes of it, with one tensor of the logits' size."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from dylora_moe import UsageError
from dylora_moe.constants import IGNORED_LABEL
from dylora_moe.ops.cross_entropy import summed_cross_entropy

from ..support.tiny import random_ids, tiny_mixture

TOKENS, VOCABULARY = 11, 37


@pytest.fixture(autouse=True)
def chunks_of_three_tokens(monkeypatch):
    monkeypatch.setattr("dylora_moe.ops.cross_entropy.CHUNK_BYTES", {"cpu": 4 * VOCABULARY * 3})


def made(dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(TOKENS, VOCABULARY, generator=generator) * 4).to(dtype).requires_grad_()
    targets = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
    targets[[0, 4, 10]] = IGNORED_LABEL
    return logits, targets


def reference(logits, targets, smoothing=0.0) -> torch.Tensor:
    options = {"reduction": "sum", "ignore_index": IGNORED_LABEL, "label_smoothing": smoothing}
    return F.cross_entropy(logits.float(), targets, **options)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_loss_and_gradient_are_those_of_torch(dtype, smoothing):
    logits, targets = made(dtype)
    loss, expected = summed_cross_entropy(logits, targets, smoothing), reference(logits, targets, smoothing)
    assert loss.dtype == torch.float32 and torch.allclose(loss, expected, rtol=1e-6)
    (found,) = torch.autograd.grad(loss / 7, logits)
    (wanted,) = torch.autograd.grad(expected / 7, logits)
    assert found.dtype == dtype and wanted.abs().max() > 0.1
    torch.testing.assert_close(found, wanted, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-7)


def test_tokens_left_out_change_neither_the_loss_nor_a_gradient():
    logits, targets = made()
    (gradient,) = torch.autograd.grad(summed_cross_entropy(logits, targets, 0.1), logits)
    assert (gradient.abs().sum(1) == 0).tolist() == (targets == IGNORED_LABEL).tolist()
    nothing = torch.full_like(targets, IGNORED_LABEL)
    loss = summed_cross_entropy(logits, nothing)
    assert loss.item() == 0 and not torch.autograd.grad(loss, logits)[0].any()


def test_nothing_but_the_logits_is_kept_for_the_backward_pass():
    logits, targets = made(torch.bfloat16)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        summed_cross_entropy(logits, targets)
    assert {t.data_ptr() for t in kept if t.numel() > TOKENS} == {logits.data_ptr()}


def test_a_logit_that_is_ruled_out_and_no_tokens_at_all():
    logits, targets = made()
    with torch.no_grad():
        logits[:, :3] = -torch.inf
        targets[targets < 3] = 3
    loss = summed_cross_entropy(logits, targets)
    assert torch.allclose(loss, reference(logits, targets), rtol=1e-6) and loss.isfinite()
    (found,) = torch.autograd.grad(loss, logits)
    assert found.isfinite().all() and not found[:, :3].any()
    nothing = logits.detach()[:0].requires_grad_()
    assert torch.autograd.grad(summed_cross_entropy(nothing, targets[:0]), nothing)[0].shape == (0, VOCABULARY)


def test_large_logits_lose_no_digits():
    """What is divided by is kept beside the largest logit: their sum as one number would be rounded to its size."""
    logits, targets = made()
    logits = (logits.detach() + 3000).requires_grad_()
    wanted = F.cross_entropy(logits.double(), targets, ignore_index=IGNORED_LABEL, reduction="sum")
    loss = summed_cross_entropy(logits, targets)
    assert abs(loss - wanted) < 1e-4
    (found,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(found, torch.autograd.grad(wanted, logits)[0], rtol=1e-5, atol=1e-6)


def test_logits_in_any_layout():
    logits, targets = made()
    turned = logits.detach().t().contiguous().t().requires_grad_()
    (found,) = torch.autograd.grad(summed_cross_entropy(turned, targets), turned)
    (wanted,) = torch.autograd.grad(reference(logits, targets), logits)
    assert not turned.is_contiguous() and torch.allclose(found, wanted, atol=1e-6)


def test_gradient_can_be_differentiated_again():
    logits, targets = made()
    direction = torch.linspace(-1, 1, logits.numel()).view_as(logits)
    products = []
    for loss in (summed_cross_entropy(logits, targets, 0.1), reference(logits, targets, 0.1)):
        (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
        products.append(torch.autograd.grad((gradient * direction).sum(), logits)[0])
    assert torch.allclose(*products, atol=1e-6) and products[1].abs().max() > 0.01


def test_per_token_gradients_by_torch_func():
    logits, targets = made()

    def loss(row, target):
        return summed_cross_entropy(row[None], target[None])

    found = torch.func.vmap(torch.func.grad(loss))(logits.detach()[1:4], targets[1:4])
    (wanted,) = torch.autograd.grad(reference(logits, targets), logits)
    assert torch.allclose(found, wanted[1:4], atol=1e-6)


def test_target_that_the_vocabulary_lacks_is_refused():
    logits, targets = made()
    targets[5] = VOCABULARY
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        summed_cross_entropy(logits, targets)


def test_compiled_it_is_one_operation_which_a_compiler_fuses():
    logits, targets = made()
    graphs = []
    backend = lambda graph, inputs: graphs.append(graph) or graph.forward  # noqa: E731
    compiled = torch.compile(summed_cross_entropy, fullgraph=True, backend=backend)
    assert torch.allclose(compiled(logits, targets), reference(logits, targets), rtol=1e-6)
    called = [node.target for graph in graphs for node in graph.graph.nodes if node.op == "call_function"]
    assert called.count(F.cross_entropy) == 1


@pytest.mark.parametrize("shape", [(1, TOKENS - 1), (1, 1), (TOKENS - 1,)])
def test_targets_for_other_tokens_are_refused(shape):
    with pytest.raises(UsageError, match="each label needs the logits of its place"):
        summed_cross_entropy(made()[0], torch.zeros(shape, dtype=torch.long))


@pytest.mark.parametrize("labelled", [0, 1, 8])
def test_nothing_is_computed_for_tokens_without_a_label(labelled, monkeypatch):
    """Neither in the forward pass nor in the backward pass."""
    logits, targets = made()
    targets[(targets != IGNORED_LABEL).nonzero()[labelled:]] = IGNORED_LABEL
    seen = {"cross_entropy": 0, "softmax": 0}
    for owner, name in ((F, "cross_entropy"), (torch, "softmax")):
        function = getattr(owner, name)

        def count(rows, *args, name=name, function=function, **kwargs):
            seen[name] += len(rows)
            return function(rows, *args, **kwargs)

        monkeypatch.setattr(owner, name, count)
    summed_cross_entropy(logits, targets).backward()
    assert seen == {"cross_entropy": labelled, "softmax": labelled}


def test_the_last_hidden_state_may_be_changed_after_the_loss():
    model, ids = tiny_mixture().train(), random_ids(2, 9)
    output = model(ids, labels=ids, output_hidden_states=True)
    output.hidden_states[-1].mul_(0.5)
    output.loss.backward()

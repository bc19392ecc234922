"""The loss of a language model is what F.cross_entropy makes of it, with one tensor of the logits' size or none."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dylora_moe import RouterConfig, UsageError
from dylora_moe.constants import IGNORED_LABEL
from dylora_moe.mixture.cross_entropy import _buffer, _gradient, summed_cross_entropy, watched_head

from ..support.tiny import ARCHITECTURES, random_ids, tiny_mixture

TOKENS, VOCABULARY, WIDTH = 11, 37, 5


@pytest.fixture(autouse=True)
def chunks_of_three_tokens(monkeypatch):
    monkeypatch.setattr("dylora_moe.mixture.cross_entropy.CHUNK_BYTES", {"cpu": 4 * VOCABULARY * 3})


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


# ---- past the logits ----


@pytest.fixture
def detours(monkeypatch):
    """The gradients of logits that were made."""
    made, gradient = [], _gradient
    monkeypatch.setattr(
        "dylora_moe.mixture.cross_entropy._gradient", lambda *args: made.append(gradient(*args)) or made[-1]
    )
    return made


def headed(dtype=torch.float32, bias=False) -> tuple[nn.Linear, torch.Tensor, torch.Tensor]:
    """A frozen head, its input (1, TOKENS, WIDTH) and the targets."""
    targets = made()[1].unsqueeze(0)
    generator = torch.Generator().manual_seed(1)
    head = nn.Linear(WIDTH, VOCABULARY, bias=bias, dtype=dtype).requires_grad_(False)
    for parameter in head.parameters():
        parameter.normal_(generator=generator)
    return head, torch.randn(1, TOKENS, WIDTH, generator=generator).to(dtype).requires_grad_(), targets


def headed_loss(layer, hidden, targets, smoothing=0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits and the loss."""
    with watched_head(layer) as head:
        logits = layer(hidden)
    return logits, summed_cross_entropy(logits, targets, smoothing, head)


def wanted_loss(layer, hidden, targets, smoothing=0.0) -> torch.Tensor:
    return reference(layer(hidden).flatten(0, 1), targets.flatten(), smoothing)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_past_the_logits_loss_and_gradient_are_those_of_torch(dtype, bias, smoothing, detours):
    layer, hidden, targets = headed(dtype, bias)
    logits, loss = headed_loss(layer, hidden, targets, smoothing)
    expected = wanted_loss(layer, hidden, targets, smoothing)
    assert loss.dtype == torch.float32 and torch.allclose(loss, expected, rtol=1e-5)
    assert torch.equal(loss, summed_cross_entropy(logits, targets, smoothing)), "one loss, whatever its gradient"
    (wanted,) = torch.autograd.grad(expected / 7, hidden)
    (loss / 7).backward()
    assert not detours
    assert hidden.grad.dtype == dtype and wanted.abs().max() > 0.1
    rtol, atol = (2e-2, 1e-2) if dtype == torch.bfloat16 else (1e-5, 1e-6)
    torch.testing.assert_close(hidden.grad, wanted, rtol=rtol, atol=atol)
    assert not hidden.grad[targets == IGNORED_LABEL].any()


def test_past_the_logits_a_gradient_can_be_differentiated_again():
    layer, leaf, targets = headed(bias=True)
    direction = torch.linspace(-1, 1, leaf.numel()).view_as(leaf)
    products = []
    for ours in (True, False):
        hidden = leaf * 2
        loss = headed_loss(layer, hidden, targets, 0.1)[1] if ours else wanted_loss(layer, hidden, targets, 0.1)
        (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
        products.append(torch.autograd.grad((gradient * direction).sum(), leaf)[0])
    assert torch.allclose(*products, atol=1e-5) and products[1].abs().max() > 0.01


def test_nothing_is_scaled_in_half_precision():
    """A GradScaler's factor is more than float16 can hold."""
    layer, hidden, targets = headed(torch.float16)
    layer.weight.mul_(2.0**-9)
    (found,) = torch.autograd.grad(headed_loss(layer, hidden, targets)[1] * 2.0**17, hidden)
    (wanted,) = torch.autograd.grad(wanted_loss(layer, hidden, targets) * 2.0**9, hidden)
    assert found.isfinite().all() and found.abs().max() > 1
    torch.testing.assert_close(found / 2**8, wanted, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_the_default_dtype_has_no_say(default):
    layer, hidden, targets = headed()
    expected = headed_loss(layer, hidden, targets)[1]
    (wanted,) = torch.autograd.grad(expected, hidden)
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        logits, loss = headed_loss(layer, hidden, targets)
        (found,) = torch.autograd.grad(loss, hidden)
        with torch.no_grad():
            assert torch.equal(summed_cross_entropy(logits, targets), expected)
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(loss, expected) and torch.equal(found, wanted)


def test_a_buffer_is_no_larger_than_the_logits(monkeypatch):
    monkeypatch.setattr("dylora_moe.mixture.cross_entropy.CHUNK_BYTES", {})
    logits, targets = made()
    assert _buffer(logits).numel() == logits.numel()
    assert torch.allclose(summed_cross_entropy(logits, targets), reference(logits, targets))


@pytest.mark.parametrize("shape", [(1, TOKENS - 1), (1, 1), (TOKENS,)])
def test_targets_for_other_tokens_are_refused(shape):
    layer, hidden, _ = headed()
    with pytest.raises(UsageError, match="each label needs the logits of its place"):
        headed_loss(layer, hidden, torch.zeros(shape, dtype=torch.long))


def test_a_sharded_head_is_gathered_and_not_kept(monkeypatch, detours):
    gathered, kept, seen = [], [], []
    gather = lambda t: gathered.append(t.clone()) or gathered[-1]  # noqa: E731
    monkeypatch.setattr(torch.Tensor, "full_tensor", gather, raising=False)
    layer, hidden, targets = headed()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        headed_loss(layer, hidden, targets)
    assert len(gathered) == 1 and not {t.data_ptr() for t in kept} & {gathered[0].data_ptr()}
    logits, loss = headed_loss(layer, hidden, targets)
    logits.register_hook(seen.append)  # as FSDP2 does, to get the weights of the backward pass
    (found,) = torch.autograd.grad(loss, hidden)
    (wanted,) = torch.autograd.grad(wanted_loss(layer, hidden, targets), hidden)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert not detours and seen == [None]


@pytest.mark.parametrize("how", ["a hook", "a hook before the loss", "retain_grad", "autograd.grad"])
def test_who_wants_the_gradient_of_the_logits_gets_it(how, detours):
    layer, leaf, targets = headed()
    seen = []
    hidden = leaf * 2
    with watched_head(layer) as head:
        logits = layer(hidden)
        if how == "a hook before the loss":
            logits.register_hook(lambda g: seen.append(g) or g / 2)
    loss = summed_cross_entropy(logits, targets, 0.0, head)
    if how == "a hook":
        logits.register_hook(lambda g: seen.append(g) or g / 2)
    elif how == "retain_grad":
        logits.retain_grad()
    if how == "autograd.grad":
        seen += torch.autograd.grad(loss, logits)
    else:
        loss.backward()
        seen += [logits.grad] if how == "retain_grad" else []
        (wanted,) = torch.autograd.grad(wanted_loss(layer, leaf * 2, targets), leaf)
        torch.testing.assert_close(leaf.grad, wanted / (2 if "hook" in how else 1), rtol=1e-5, atol=1e-6)
    again = layer(hidden)
    (wanted,) = torch.autograd.grad(reference(again.flatten(0, 1), targets.flatten()), again)
    torch.testing.assert_close(seen[0], wanted, rtol=1e-5, atol=1e-6)
    assert len(detours) == 1


ELSEWHERE = {
    "the head is trained": lambda layer: layer.requires_grad_(True),
    "a hook": lambda layer: layer.register_forward_hook(lambda *args: None),
    "a pre-hook": lambda layer: layer.register_forward_pre_hook(lambda *args: None),
    "a backward hook": lambda layer: layer.register_full_backward_hook(lambda *args: None),
    "a backward pre-hook": lambda layer: layer.register_full_backward_pre_hook(lambda *args: None),
    "a forward of its own": lambda layer: setattr(layer, "forward", functools.partial(nn.Linear.forward, layer)),
}


@pytest.mark.parametrize("what", ELSEWHERE)
def test_a_head_that_must_see_its_gradient_does(what, detours):
    layer, hidden, targets = headed()
    ELSEWHERE[what](layer)
    with watched_head(layer) as head:
        logits = layer(hidden)
    assert head is None
    summed_cross_entropy(logits, targets, 0.0, head).backward()
    assert len(detours) == 1


OTHERWISE = ("scaled", "scaled in place", "called twice", "in another dtype", "a weight made of others", "no gradients")


@pytest.mark.parametrize("what", OTHERWISE)
def test_logits_that_are_not_what_the_head_returned_get_their_gradient(what, detours):
    layer, hidden, targets = headed()
    if what == "a weight made of others":
        weight = layer.weight.detach().clone().requires_grad_()
        del layer.weight
        layer.weight = weight * 1
    with watched_head(layer) as head:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=what == "in another dtype"):
            logits = layer(hidden.detach() if what == "no gradients" else hidden)
        if what == "called twice":
            layer(hidden)
        if what == "scaled":
            logits = logits * 2
        if what == "scaled in place":
            logits *= 2
    if what == "no gradients":
        logits.requires_grad_()
    summed_cross_entropy(logits, targets, 0.0, head).backward()
    assert len(detours) == 1 and detours[0].abs().sum() > 0
    assert not layer._forward_hooks, "nothing is left behind"


def test_a_loss_without_gradients_has_none():
    layer, hidden, targets = headed()
    with watched_head(layer) as head, torch.no_grad():
        logits = layer(hidden)
    assert not summed_cross_entropy(logits, targets, 0.0, head).requires_grad


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_in_training_a_mixture_has_the_gradients_that_it_has_in_evaluation(kind, detours):
    router = RouterConfig(balance_coefficient=0.0)  # of training alone
    model, ids = tiny_mixture(kind, router=router), random_ids(2, 9)
    found = []
    for training in (False, True):
        detours.clear()
        model.train(training).zero_grad()
        model(ids, labels=ids).loss.backward()
        assert len(detours) == (not training)
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and len(found[0]) > 6
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-6)
    assert not model.base.get_output_embeddings()._forward_hooks


def test_the_last_hidden_state_may_be_changed_after_the_loss():
    model, ids = tiny_mixture().train(), random_ids(2, 9)
    output = model(ids, labels=ids, output_hidden_states=True)
    output.hidden_states[-1].mul_(0.5)
    output.loss.backward()


def test_a_pass_that_fails_leaves_no_hook():
    model, ids = tiny_mixture().train(), random_ids(2, 9)
    handle = model.base.register_forward_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(ids, labels=ids)
    handle.remove()
    assert not model.base.lm_head._forward_hooks

"""The backward pass of frozen linear layers of a small dtype, in float32."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dylora_moe.mixture import frozen_linear
from dylora_moe.mixture.frozen_linear import Float32Backward, _FrozenLinear, float32_backward

from ..support.tiny import random_ids, tiny_mixture

LOW = [torch.bfloat16, torch.float16]


@pytest.fixture(params=[True, False])
def slow(request, monkeypatch):
    """Whether this CPU is taken for one that is slow."""
    monkeypatch.setattr(frozen_linear, "is_slow", lambda dtype: request.param)
    monkeypatch.setattr(frozen_linear, "CHUNK", 3 * 32)  # three rows of the tiny models' matrices
    return request.param


def layer_and_input(dtype: torch.dtype, bias: bool = True) -> tuple[nn.Linear, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(7, 11, bias=bias).requires_grad_(False)
    for parameter in layer.parameters():
        parameter.normal_(generator=generator)
    return layer.to(dtype), torch.randn(2, 5, 7, generator=generator).to(dtype).requires_grad_()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", LOW)
def test_the_output_has_its_bits_and_the_gradient_is_that_of_float32(dtype, bias, monkeypatch):
    monkeypatch.setattr(frozen_linear, "CHUNK", 21)
    layer, x = layer_and_input(dtype, bias)
    with Float32Backward():
        out = layer(x)
    assert torch.equal(out, layer(x)) and "_FrozenLinear" in type(out.grad_fn).__name__
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    (found,) = torch.autograd.grad(out, x, direction)
    assert found.dtype == dtype
    torch.testing.assert_close(found, (direction.float() @ layer.weight.float()).to(dtype))


def test_the_gradient_can_be_differentiated_again():
    layer, x = layer_and_input(torch.bfloat16)
    with Float32Backward():
        out = layer(x)
    direction = torch.ones_like(out).requires_grad_()
    (gradient,) = torch.autograd.grad(out, x, direction, create_graph=True)
    (found,) = torch.autograd.grad(gradient.float().sum(), direction)
    torch.testing.assert_close(found, F.linear(torch.ones_like(x), layer.weight))


@pytest.mark.parametrize("what", ["a trained weight", "a trained bias", "float32", "no gradients", "an input without"])
def test_other_layers_are_left_alone(what):
    layer, x = layer_and_input(torch.float32 if what == "float32" else torch.bfloat16)
    layer.weight.requires_grad_(what == "a trained weight")
    layer.bias.requires_grad_(what == "a trained bias")
    x = x.detach() if what == "an input without" else x
    with Float32Backward(), torch.set_grad_enabled(what != "no gradients"):
        assert "_FrozenLinear" not in type(layer(x).grad_fn).__name__


def test_where_it_would_not_be_faster_nothing_is_done(slow):
    weights = [torch.ones(2, 2, dtype=dtype) for dtype in (*LOW, torch.float32)]
    assert [type(float32_backward(weight)) is Float32Backward for weight in weights] == [slow, slow, False]
    with torch.no_grad():
        assert not any(type(float32_backward(weight)) is Float32Backward for weight in weights)


def test_speed_is_measured_once():
    frozen_linear.is_slow.cache_clear()
    assert frozen_linear.is_slow(torch.bfloat16) in (True, False)
    frozen_linear.is_slow(torch.bfloat16)
    assert frozen_linear.is_slow.cache_info().misses == 1


@pytest.mark.parametrize("checkpointed", [False, True])
def test_every_frozen_linear_layer_of_a_base_is_covered(slow, checkpointed, monkeypatch):
    """Those without experts and the head, too, and in a layer that gradient checkpointing runs again."""
    applied, apply = [], _FrozenLinear.apply
    monkeypatch.setattr(_FrozenLinear, "apply", lambda *args: applied.append(args[1]) or apply(*args))
    model, ids = tiny_mixture("qwen2", dtype=torch.bfloat16).train(), random_ids(2, 6)
    if checkpointed:
        model.gradient_checkpointing_enable()
    model(ids, labels=ids).loss.backward()
    frozen = [m.weight for m in model.base.modules() if type(m) is nn.Linear and not m.weight.requires_grad]
    assert len(frozen) == 3 * 7 + 1
    first = set() if checkpointed else {id(weight) for weight in frozen[:3]}  # q, k and v, whose input has no gradient
    assert {id(weight) for weight in applied} == ({id(weight) for weight in frozen} - first if slow else set())
    gradients = [p.grad for p in model.trained_parameters().values()]
    model.zero_grad()
    monkeypatch.setattr(frozen_linear, "is_slow", lambda dtype: False)
    model(ids, labels=ids).loss.backward()
    for found, parameter in zip(gradients, model.trained_parameters().values(), strict=True):
        assert (found - parameter.grad).norm() <= 0.05 * parameter.grad.norm()

"""Training a base of a small dtype with products in float32."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dylora_moe.ops import frozen_linear
from dylora_moe.ops.frozen_linear import Float32Products, _FrozenLinear, float32_products

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
def test_output_and_gradient_are_those_of_float32(dtype, bias, monkeypatch):
    monkeypatch.setattr(frozen_linear, "CHUNK", 21)
    layer, x = layer_and_input(dtype, bias)
    with Float32Products():
        out = layer(x)
    exact = F.linear(x.float(), layer.weight.float(), layer.bias.float() if bias else None)
    assert torch.equal(out, exact.to(dtype)) and "_FrozenLinear" in type(out.grad_fn).__name__
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    (found,) = torch.autograd.grad(out, x, direction)
    assert found.dtype == dtype
    torch.testing.assert_close(found, (direction.float() @ layer.weight.float()).to(dtype))


def test_the_gradient_can_be_differentiated_again():
    layer, x = layer_and_input(torch.bfloat16)
    with Float32Products():
        out = layer(x)
    direction = torch.ones_like(out).requires_grad_()
    (gradient,) = torch.autograd.grad(out, x, direction, create_graph=True)
    (found,) = torch.autograd.grad(gradient.float().sum(), direction)
    torch.testing.assert_close(found, F.linear(torch.ones_like(x), layer.weight))


@pytest.mark.parametrize("what", ["a trained weight", "a trained bias", "float32"])
def test_other_layers_are_left_alone(what):
    layer, x = layer_and_input(torch.float32 if what == "float32" else torch.bfloat16)
    layer.weight.requires_grad_(what == "a trained weight")
    layer.bias.requires_grad_(what == "a trained bias")
    with Float32Products():
        assert "_FrozenLinear" not in type(layer(x).grad_fn).__name__


@pytest.mark.parametrize("causal", [True, False])
def test_attention_is_computed_in_float32(causal):
    query = torch.randn(1, 2, 5, 8, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16).requires_grad_()
    mask = None if causal else torch.zeros(5, 5, dtype=torch.bfloat16)

    def attend(q):
        eager = (q @ q.transpose(2, 3)).softmax(-1) @ q
        return eager, F.scaled_dot_product_attention(q, q, q, attn_mask=mask, is_causal=causal)

    def gradient(outputs):
        return torch.autograd.grad(sum(out.float().sum() for out in outputs), query, retain_graph=True)[0]

    with Float32Products():
        found = attend(query)
    assert all(out.dtype == torch.bfloat16 for out in found)
    assert torch.equal(found[1], F.scaled_dot_product_attention(*[query.float()] * 3, is_causal=causal).bfloat16())
    assert "ToCopy" in str(found[0].grad_fn)
    torch.testing.assert_close(gradient(found), gradient(attend(query)), atol=0.1, rtol=0.1)


def test_linear_layers_of_gpt2_are_covered(slow, monkeypatch):
    """Conv1D, whose weight is stored the other way round."""
    applied, apply = [], _FrozenLinear.apply
    monkeypatch.setattr(_FrozenLinear, "apply", lambda *args: applied.append(args[1]) or apply(*args))
    model, ids = tiny_mixture("gpt2", dtype=torch.bfloat16).train(), random_ids(2, 6)
    loss = model(ids, labels=ids).loss
    assert len(applied) == (3 * 4 + 1 if slow else 0)
    monkeypatch.setattr(frozen_linear, "is_slow", lambda dtype: False)
    assert torch.allclose(model(ids, labels=ids).loss, loss, rtol=0.01)


def test_where_it_would_not_be_faster_nothing_is_done(slow):
    weights = [torch.ones(2, 2, dtype=dtype) for dtype in (*LOW, torch.float32)]
    assert [type(float32_products(weight)) is Float32Products for weight in weights] == [slow, slow, False]


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
    assert {id(weight) for weight in applied} == ({id(weight) for weight in frozen} if slow else set())
    gradients = [p.grad for p in model.trained_parameters().values()]
    model.zero_grad()
    monkeypatch.setattr(frozen_linear, "is_slow", lambda dtype: False)
    model(ids, labels=ids).loss.backward()
    for found, parameter in zip(gradients, model.trained_parameters().values(), strict=True):
        assert (found - parameter.grad).norm() <= 0.15 * parameter.grad.norm()  # bfloat16


def test_logits_alone_have_the_bits_of_the_base(monkeypatch):
    applied = []
    monkeypatch.setattr(frozen_linear, "is_slow", lambda dtype: True)
    monkeypatch.setattr(_FrozenLinear, "apply", lambda *args: applied.append(args[1]) or F.linear(*args))
    model, ids = tiny_mixture(dtype=torch.bfloat16), random_ids(1, 5)
    model(ids)
    assert not applied
    with torch.no_grad():
        model(ids, labels=ids)  # a held-out loss may differ in the last bit
    assert applied

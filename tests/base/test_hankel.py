"""Hankel matrices: the same numbers as the matrix of full size, in the memory and time of its few numbers."""

import copy

import pytest
import torch
from torch.nn import functional as F

from dylora_moe.base.hankel import ROWS, HankelMatrix, fast_length, hankel_matrix

SHAPES = [(64, 32), (32, 64), (33, 31), (200, 3), (3, 200), (1, 7), (7, 1), (1, 1)]


def numbers(shape, dtype=torch.float32):
    return torch.randn(sum(shape) - 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def of_full_size(shape, dtype=torch.float32):
    given = numbers(shape, dtype)
    return torch.stack([given[row : row + shape[1]] for row in range(shape[0])])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 1e-4), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)],
)
def test_products_are_those_of_the_full_matrix(shape, dtype, tolerance):
    weight, dense = hankel_matrix(numbers(shape, dtype), shape), of_full_size(shape, dtype)
    assert torch.equal(weight, dense)
    x = torch.randn(2, ROWS + 3, shape[1], dtype=torch.float64).to(dtype)  # more than are transformed at once
    bias = torch.randn(shape[0], dtype=torch.float64).to(dtype)
    expected = F.linear(x.double(), dense.double(), bias.double())
    found = F.linear(x, weight, bias)
    assert found.dtype == dtype and found.shape == expected.shape and type(found) is torch.Tensor
    assert (found.double() - expected).abs().max() <= tolerance * expected.abs().max()
    without = F.linear(x, weight)
    assert (without.double() - (expected - bias.double())).abs().max() <= tolerance * expected.abs().max()
    assert torch.equal(F.linear(x, weight, bias), found)  # to the bit
    assert F.linear(x[0, 0], weight).shape == (shape[0],) and F.linear(x[:0], weight).shape == (0, ROWS + 3, shape[0])


def test_it_takes_the_memory_of_its_numbers():
    shape = (10_000, 1_000)
    weight = hankel_matrix(numbers(shape, torch.bfloat16), shape)
    assert weight.untyped_storage().nbytes() == 2 * (sum(shape) - 1)  # of full size 20 MB
    assert F.linear(torch.ones(3, 1_000, dtype=torch.bfloat16), weight).shape == (3, 10_000)
    assert weight.shape == shape and not weight.requires_grad


def test_products_are_transforms_and_a_copy_of_full_size_is_multiplied_by_as_usual(monkeypatch):
    weight, x = hankel_matrix(numbers((64, 32)), (64, 32)), torch.randn(5, 32)
    expected, calls = F.linear(x, weight), []
    transform = torch.fft.irfft
    monkeypatch.setattr(torch.fft, "irfft", lambda *args, **options: calls.append(args) or transform(*args, **options))
    assert torch.equal(F.linear(x, weight), expected) and len(calls) == 1
    for other in (weight.detach().contiguous(), copy.deepcopy(weight), weight.double().float()):
        assert torch.equal(F.linear(x, other), F.linear(x, of_full_size((64, 32))))
    assert len(calls) == 1


def test_an_embedding_takes_it_and_gradients_go_through_it():
    weight, dense = hankel_matrix(numbers((64, 32)), (64, 32)), of_full_size((64, 32))
    ids = torch.tensor([[3, 0, 63]])
    assert torch.equal(F.embedding(ids, weight), F.embedding(ids, dense))
    gradients = []
    for matrix in (weight, dense):
        x = torch.ones(2, 32, requires_grad=True)
        F.linear(x, matrix).square().sum().backward()
        gradients.append(x.grad)
    assert torch.allclose(*gradients, rtol=1e-4)
    layer = torch.nn.Linear(32, 64)
    layer.weight = weight
    assert isinstance(layer.weight, HankelMatrix) and list(layer.state_dict()) == ["weight", "bias"]


def test_too_few_or_scattered_numbers_are_refused():
    for given in (numbers((64, 32))[1:], torch.zeros(95, 2)[:, 0]):
        with pytest.raises(ValueError, match="takes 95 numbers"):
            hankel_matrix(given, (64, 32))


def test_fast_lengths():
    assert [fast_length(n) for n in (1, 2, 3, 7, 9, 11, 17, 18_431, 258_047)] == [
        1,
        2,
        3,
        8,
        9,
        12,
        18,
        18_432,
        262_144,
    ]
    assert all(n <= fast_length(n) <= 2 * n for n in range(1, 3000))

"""Norms and inner products of float32 tensors on the CPU, which are added up in blocks, against float64."""

import math

import pytest
import torch

from fairseq_sam.core import descent
from fairseq_sam.core.norms import BLOCK, tensor_norms, vector_norm

ORDERS = (2.0, math.inf, 3.0)


@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("size", [1, 7, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, 1_000_003])
def test_as_in_float64(size, p):
    torch.manual_seed(size)
    tensor = torch.randn(size)
    (found,) = tensor_norms([tensor], p)
    assert found.dtype == torch.float64 and found.dim() == 0
    expected = float(torch.linalg.vector_norm(tensor.double(), p))
    assert float(found) == pytest.approx(expected, rel=2e-7)


def test_an_error_of_float32_does_not_grow():
    """Ten million equal numbers, which a float32 sum would be far from."""
    tensor = torch.full((10_000_000,), 0.1)
    expected = float(torch.tensor(0.1).double()) * math.sqrt(1e7)
    assert float(vector_norm([tensor], 2.0)) == pytest.approx(expected, rel=2e-7)


@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("size", [1e-42, 1e-25, 1e-19, 1e-11, 1e-9, 1e14, 1e16, 1e25, 3e38])
def test_any_size(size, p):
    tensor = torch.randn(BLOCK + 5, generator=torch.Generator().manual_seed(1)).clamp(-1, 1) * size
    expected = float(torch.linalg.vector_norm(tensor.double(), p))
    assert float(vector_norm([tensor], p)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("p", [2.0, math.inf])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_numbers_that_are_not_finite(value, p):
    for place in (0, BLOCK + 2):
        tensor = torch.ones(BLOCK + 5)
        tensor[place] = value
        assert str(float(vector_norm([tensor], p))) == str(abs(value))


@pytest.mark.parametrize("p", ORDERS)
def test_other_types_strides_and_shapes(p):
    """In their order, whatever way each is computed."""
    torch.manual_seed(0)
    tensors = [
        torch.randn(70, 80), torch.randn(50, 120).half(), torch.randn(90, 70).T, torch.randn(3, 5000).double(),
        torch.randn(64, 64, 2)[:, :, 0], torch.randn(()), torch.zeros(9), torch.randn(6000).bfloat16(),
    ]  # fmt: skip
    expected = [float(torch.linalg.vector_norm(tensor.double(), p)) for tensor in tensors]
    assert [float(norm) for norm in tensor_norms(tensors, p)] == pytest.approx(expected, rel=1e-6)
    assert tensor_norms([], p) == []


@pytest.mark.parametrize("size", [1e-42, 1e-25, 1e-19, 1e-11, 1.0, 1e14, 1e19, 1e25])
def test_inner_products_of_any_size(size):
    """Over several blocks, tensors of any shape, and missing ones."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(descent.BLOCK + 5,), None, (3, 7, 11), (descent.BLOCK, 2), (1,)]
    first = [None if s is None else torch.randn(s, generator=generator).clamp(-1, 1) * size for s in shapes]
    second = [
        None if f is None else 0.5 * f + torch.randn(f.shape, generator=generator).clamp(-1, 1) * size for f in first
    ]
    second[1], second[4] = torch.ones(3), None
    pairs = [(f, s) for f, s in zip(first, second, strict=True) if f is not None and s is not None]
    expected = sum(float((f.double() * s.double()).sum()) for f, s in pairs)
    assert float(descent.dot(first, second)) == pytest.approx(expected, rel=1e-5)
    assert float(descent.dot(first, [None] * 5)) == 0.0

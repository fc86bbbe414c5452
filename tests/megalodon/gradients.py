"""Compare two functions by their values and all their gradients."""

import torch
from torch import Tensor


def flatten(result):
    """The tensors of a nested result, in order."""
    if isinstance(result, Tensor):
        return [result]
    if result is None:
        return []
    return [tensor for part in result for tensor in flatten(part)]


def values_and_gradients(function, inputs):
    """Outputs of a function, and the gradients of a fixed random projection of all of them."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    outputs = [t for t in flatten(function(*leaves)) if t.is_floating_point()]
    generator = torch.Generator().manual_seed(1)
    total = torch.zeros((), dtype=torch.float64)
    for output in outputs:
        weight = torch.randn(output.shape, generator=generator, dtype=torch.float64)
        total = total + (output.double() * weight).sum()
    gradients = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
    return [output.detach() for output in outputs], list(gradients)


def assert_same(function, reference, inputs, tolerance):
    """Values and gradients agree with the reference in float64 on the same inputs, each to
    `tolerance` times its own largest entry (at least 1)."""
    values, gradients = values_and_gradients(function, inputs)
    expected, expected_gradients = values_and_gradients(reference, [x.double() for x in inputs])
    assert len(values) == len(expected)
    assert_close(values + gradients, expected + expected_gradients, tolerance)


def assert_close(found, expected, tolerance):
    """Each tensor agrees with its float64 one to `tolerance` times that one's largest entry (at
    least 1)."""
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape
        scale = max(1.0, theirs.abs().max().item())
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=tolerance * scale)

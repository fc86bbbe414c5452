import pytest
import torch

from megalodon.ops.elementwise import rms_norm, rms_norm_reference, swiglu, swiglu_reference

from .gradients import assert_same

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_swiglu_equals_its_reference(dtype):
    torch.manual_seed(0)
    inputs = [torch.randn(2, 5, 7, dtype=dtype) * 3 for _ in range(2)]
    assert_same(swiglu, swiglu_reference, inputs, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", [(2, 5, 7), (2, 5, 3, 7), (1, 1, 1)])
def test_rms_norm_equals_its_reference(shape, dtype):
    torch.manual_seed(0)
    inputs = [torch.randn(shape, dtype=dtype), torch.randn(shape[-1], dtype=dtype)]
    if len(shape) == 4:  # as queries and keys have it
        inputs.pop()

    def run(operation):
        return lambda x, weight=None: operation(x, weight, 1e-5, x.dtype)

    assert_same(run(rms_norm), run(rms_norm_reference), inputs, TOLERANCE[dtype])


def test_without_gradients_the_results_are_the_same():
    gate, value, weight = torch.randn(2, 5, 7), torch.randn(2, 5, 7), torch.randn(7)
    expected = swiglu(gate, value), rms_norm(gate, weight, 1e-5, torch.float32)
    given = [t.clone() for t in (gate, value, weight)]
    with torch.no_grad():
        found = swiglu(gate, value), rms_norm(gate, weight, 1e-5, torch.float32)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    torch.testing.assert_close([gate, value, weight], given, rtol=0, atol=0)


@pytest.mark.parametrize("operation", ["swiglu", "rms_norm"])
def test_backward_keeps_the_inputs_only(operation):
    x, other = torch.randn(2, 64, 32, requires_grad=True), torch.randn(2, 64, 32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        if operation == "swiglu":
            swiglu(x, other)
        else:
            rms_norm(x, other[0, 0], 1e-5, torch.float32)
    sizes = sum(t.nbytes for t in kept if t.data_ptr() not in (x.data_ptr(), other.data_ptr()))
    assert sizes <= x.nbytes / 32  # a row's scale at most

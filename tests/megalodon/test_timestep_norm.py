import pytest
import torch

from megalodon.ops.segments import Segments
from megalodon.ops.timestep_norm import (
    TimestepNormState,
    initial_state,
    timestep_norm,
    timestep_norm_reference,
)

from .gradients import assert_close, assert_same

LENGTHS = [1, 7, 8, 9, 24, 31]
# float32 inputs: statistics are float64 in both, the normalisation is float32 in one of them.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def some_state(batch, groups):
    return TimestepNormState(
        torch.tensor([5, 1000])[:batch],
        torch.randn(batch, groups, dtype=torch.float64),
        torch.rand(batch, groups, dtype=torch.float64) + 0.1,
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("slow_on", ["cpu", ""])
def test_fast_form_equals_step_by_step(monkeypatch, slow_on, length, with_state, dtype):
    """With the statistics of a step as a CPU takes them, and as a GPU does."""
    monkeypatch.setattr("megalodon.ops.timestep_norm.SLOW_VAR_MEAN_ON", slow_on)
    torch.manual_seed(0)
    batch, dim, groups = 2, 12, 3
    x = torch.randn(batch, length, dim, dtype=dtype) * 2 + 1
    weight, bias = torch.randn(dim, dtype=dtype), torch.randn(dim, dtype=dtype)
    count, *rest = some_state(batch, groups)

    def run(operation):
        def function(x, weight, bias, *state):
            given = TimestepNormState(count, *state) if state else None
            return operation(x, weight, bias, groups, 1e-5, given)

        return function

    inputs = [x, weight, bias, *(rest if with_state else [])]
    assert_same(run(timestep_norm), run(timestep_norm_reference), inputs, TOLERANCE[dtype])


def test_first_step_is_group_norm():
    x = torch.randn(4, 1, 12, dtype=torch.float64)
    y, _ = timestep_norm(x, torch.zeros(12), torch.zeros(12), 3)
    expected = torch.nn.functional.group_norm(x[:, 0], 3)
    torch.testing.assert_close(y[:, 0], expected)


@pytest.mark.parametrize("piece", [100_000, 9_999, 500])
def test_right_at_100_000_steps_with_a_large_mean(piece):
    """Mean 100 and spread 1, in float32: a sum of squares would have lost the variance."""
    torch.manual_seed(0)
    x = torch.randn(1, 100_000, 8) + 100.0
    zeros = torch.zeros(8)
    state, outputs = initial_state(x, 2), []
    for part in x.split(piece, dim=1):
        y, state = timestep_norm(part, zeros, zeros, 2, state=state)
        outputs.append(y)
    assert state.steps.tolist() == [100_000]
    scalars = x.double().view(100_000, 2, 4).permute(1, 0, 2).flatten(1)
    torch.testing.assert_close(state.mean[0], scalars.mean(-1), rtol=0, atol=1e-6)
    torch.testing.assert_close(state.var[0], scalars.var(-1, correction=0), rtol=0, atol=1e-6)
    wide, _ = timestep_norm(x.double(), zeros.double(), zeros.double(), 2)
    # One float32 step at 100 is 7.6e-6, which the subtraction of the mean brings to the front.
    error = (torch.cat(outputs, dim=1).double() - wide).abs()
    assert error[:, 10:].max() < 5e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_comes_out_of_padding_and_no_gradient_gets_there(dtype):
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, :4], mask[1, 3:5] = False, False
    border = torch.zeros(2, 9, dtype=torch.bool)
    border[1, 6] = True
    segments = Segments(mask, border, torch.zeros(2, dtype=torch.long), block=4, chunk=4)
    x = torch.randn(2, 9, 12).to(dtype).requires_grad_()
    y = timestep_norm(x, torch.randn(12), torch.randn(12), 3, segments=segments)[0]
    y.backward(torch.randn_like(y))
    assert x.grad is not None
    for found in (y, x.grad):
        assert not found[~mask].any()
        assert found[mask].all()


def test_steps_are_right_with_a_large_mean():
    torch.manual_seed(0)
    x, zeros = torch.randn(2, 2_000, 8) + 100.0, torch.zeros(8)
    state, outputs = initial_state(x, 2), []
    for token in x.split(1, dim=1):
        y, state = timestep_norm(token, zeros, zeros, 2, state=state)
        outputs.append(y)
    expected, final = timestep_norm(x.double(), zeros.double(), zeros.double(), 2)
    torch.testing.assert_close(state.mean, final.mean, rtol=0, atol=1e-6)
    torch.testing.assert_close(state.var, final.var, rtol=0, atol=1e-6)
    # The outputs are rounded to float32, after statistics and differences in float64.
    assert_close([torch.cat(outputs, dim=1)], [expected], 1e-6)


def test_gradient_is_right_with_a_large_mean():
    torch.manual_seed(0)
    x = torch.randn(1, 2_000, 8) + 100.0
    grads = []
    for dtype in (torch.float32, torch.float64):
        leaf = x.to(dtype).detach().clone().requires_grad_()
        y, _ = timestep_norm(leaf, torch.zeros(8, dtype=dtype), torch.zeros(8, dtype=dtype), 2)
        (y * torch.linspace(-1, 1, y.numel(), dtype=dtype).view_as(y).sin()).sum().backward()
        assert leaf.grad is not None
        grads.append(leaf.grad.double())
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=1e-4)


def test_autocast_does_not_reach_the_statistics():
    x, zeros = torch.randn(2, 50, 12), torch.zeros(12)
    expected = timestep_norm(x, zeros, zeros, 3)
    with torch.autocast("cpu", torch.bfloat16):
        found = timestep_norm(x, zeros, zeros, 3)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)

import pytest
import torch
from torch import Tensor

from megalodon.ops import cema_blocks
from megalodon.ops.cema import (
    BLOCK,
    CEMACoefficients,
    cema,
    cema_coefficients,
    cema_pieces,
    cema_reference,
    cema_steps,
)
from megalodon.ops.cema_blocks import _cema_blocks
from megalodon.ops.scan import GROUP

from .gradients import assert_close, assert_same

LENGTHS = [1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, 3 * BLOCK + 7, GROUP * BLOCK + 1]
# float32 is held to the reference in float64. A phase rounded to 2^-24 turns is off by
# 200 * 2 pi * 2^-24 = 7.5e-5 rad after 200 steps, and so are the outputs, relatively.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}


def parameters(dim, order, dtype):
    torch.manual_seed(0)
    shapes = [(dim, order), (dim, order), (dim,), (dim, order, 2), (dim,)]
    tensors = [torch.randn(shape, dtype=dtype) for shape in shapes]
    tensors[1] = tensors[1] - 2.0  # slow decay, so that states matter
    return tensors


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("length", LENGTHS)
def test_fast_form_equals_recurrence(length, with_state, dtype):
    batch, dim, order = 2, 3, 4
    inputs = [torch.randn(batch, length, dim, dtype=dtype), *parameters(dim, order, dtype)]
    if with_state:
        inputs.append(torch.randn(batch, dim, order, 2, dtype=dtype))

    def run(operation):
        def function(x, a, d, t, g, o, *state):
            return operation(x, cema_coefficients(a, d, t, g, o), *state)

        return function

    assert_same(run(cema), run(cema_reference), inputs, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("keep", "sizes"), [(cema_steps, [1] * 75), (cema_pieces, [2, BLOCK, 11, BLOCK - 2])]
)
def test_steps_and_short_pieces_equal_the_recurrence(keep, sizes, dtype):
    coefficients = cema_coefficients(*parameters(3, 4, dtype))
    x, state = torch.randn(2, 75, 3, dtype=dtype), torch.randn(2, 3, 4, 2, dtype=dtype)
    wide = CEMACoefficients(*(t.double() for t in coefficients))
    expected, final = cema_reference(x.double(), wide, state.double())
    kept, outputs = keep(coefficients), []
    for piece in x.split(sizes, dim=1):
        y, state = kept(piece, state)
        outputs.append(y)
    found = torch.cat(outputs, dim=1)
    assert found.dtype == state.dtype == dtype
    assert_close([found, state], [expected, final], TOLERANCE[dtype])


def test_gradients_of_the_state_alone_equal_the_recurrence():
    inputs = [torch.randn(2, BLOCK + 5, 3, dtype=torch.float64), *parameters(3, 4, torch.float64)]

    def run(operation):
        return lambda x, *given: operation(x, cema_coefficients(*given))[1]

    assert_same(run(cema), run(cema_reference), inputs, 1e-10)


def test_autocast_does_not_reach_the_backward():
    coefficients = parameters(3, 4, torch.float32)
    x = torch.randn(2, 3 * BLOCK, 3)
    gradients = []
    for enabled in (False, True):
        leaves = [t.clone().requires_grad_() for t in (x, *coefficients)]
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y, _ = cema(leaves[0], cema_coefficients(*leaves[1:]))
            y.square().sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=0)


def test_autograd_meets_no_complex_tensor():
    seen = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            seen.extend(t for t in (result if isinstance(result, tuple) else [result]))
            return result

    with Watch():
        coefficients = cema_coefficients(*parameters(3, 4, torch.float32))
        cema(torch.randn(1, 200, 3), coefficients, torch.randn(1, 3, 4, 2))
    assert len(seen) > 20
    assert not any(isinstance(t, Tensor) and t.is_complex() for t in seen)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_decay_that_rounds_to_zero_keeps_outputs_and_gradients_finite(dtype):
    alpha = torch.tensor([[50.0, 17.0]], dtype=dtype, requires_grad=True)
    theta, gamma = torch.zeros(1, dtype=dtype), torch.ones(1, 2, 2, dtype=dtype)
    c = cema_coefficients(alpha, alpha.detach(), theta, gamma, theta)
    x = torch.randn(1, 40, 1, dtype=dtype)
    y = cema(x, c)[0]
    torch.testing.assert_close(y, x * 2**0.5, rtol=1e-5, atol=1e-5)  # of each step itself alone
    y.sum().backward()
    assert alpha.grad is not None
    assert alpha.grad.isfinite().all()


def test_angles_stay_exact_over_a_long_text():
    """With almost no decay, an error in the phase would show after 100,000 steps."""
    order = 4
    turns = torch.tensor([0.1, 0.23, 0.37, 0.49]).double()
    wide = CEMACoefficients(
        p=torch.full((1, order), 0.5, dtype=torch.float64),
        log_q=torch.stack([torch.full((order,), -1e-6).double(), turns], dim=-1).unsqueeze(0),
        g=torch.ones(1, order, 2, dtype=torch.float64),
        omega=torch.zeros(1, dtype=torch.float64),
    )
    narrow = CEMACoefficients(*(t.float() for t in wide))
    x = torch.zeros(1, 100_000, 1, dtype=torch.float64)
    x[:, 0] = 1.0
    expected, _ = cema(x, wide)
    found, _ = cema(x.float(), narrow)
    # Angles inside a block are rounded to 2^-24 of up to 16 turns: about 6e-6 rad.
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("length", [BLOCK + 5, GROUP * BLOCK, GROUP * BLOCK + 40])
@pytest.mark.parametrize("with_state", [False, True])
def test_bfloat16_products_stay_close_to_float64(length, with_state):
    """The products of a bfloat16 input are taken in bfloat16; scan and state stay float32. One
    rounding to bfloat16 is off by 0.0017 in root mean square, relative to the norm; inputs,
    matrices, states and outputs are rounded once each: 0.0068 if no two errors cancel."""
    torch.manual_seed(0)
    inputs = [torch.randn(4, length, 16), *parameters(16, 8, torch.float32)]
    inputs[0] = inputs[0].bfloat16()
    if with_state:
        inputs.append(torch.randn(4, 16, 8, 2))
    direction = torch.randn(4, length, 16).bfloat16()

    def run(*given):
        leaves = [t.detach().clone().requires_grad_() for t in given]
        x, *coefficients = leaves[:6]
        y, state = cema(x, cema_coefficients(*coefficients), *leaves[6:])
        (y * direction.to(y.dtype)).sum().backward()
        assert state is not None
        return [y, state, *(t.grad for t in leaves if t.grad is not None)]

    found, expected = run(*inputs), run(*(t.double() for t in inputs))
    assert [t.dtype for t in found[:3]] == [torch.bfloat16, torch.float32, torch.bfloat16]
    for result, exact in zip(found, expected, strict=True):
        error = (result.double() - exact).norm() / exact.norm()
        assert error < 0.0068


@pytest.mark.parametrize(
    ("length", "dtype", "has_state", "has_documents"),
    [
        (7, torch.float32, True, False),
        (GROUP * BLOCK + 3, torch.float32, False, False),
        (7, torch.float64, False, False),
        (GROUP * BLOCK + 3, torch.float64, True, True),
    ],
)
def test_the_compiler_is_told_the_truth_about_the_operation(
    length, dtype, has_state, has_documents
):
    """Shapes, strides and gradients that torch.compile works with."""
    c = cema_coefficients(*parameters(3, 4, dtype))
    coefficients = [t.detach().contiguous().requires_grad_() for t in c]
    x = torch.randn(2, length, 3, dtype=dtype, requires_grad=True)
    state = torch.randn(2, 3, 4, 2, dtype=dtype, requires_grad=True) if has_state else None
    block = min(BLOCK, length)
    document = (torch.rand(2, -(-length // block)) < 0.3).cumsum(1) if has_documents else None
    torch.library.opcheck(_cema_blocks, (x, coefficients, state, document, block))


@pytest.mark.parametrize("length", [1, 31, 32, 100])
def test_one_copy_and_two_lay_out_the_same_blocks(monkeypatch, length):
    x = torch.randn(2, length, 6)
    layouts = []
    for device in ("cpu", ""):
        monkeypatch.setattr(cema_blocks, "TWO_COPIES_ON", device)
        u = cema_blocks.by_channel(x, 32)
        layouts.append(u)
        assert torch.equal(cema_blocks.by_time(u, 2, length), x)
    padded = torch.zeros(2, 128, 6)[:, : -(-length // 32) * 32]
    padded[:, :length] = x
    assert all(torch.equal(u, padded.flatten(0, 1).t().reshape(6, -1, 32)) for u in layouts)

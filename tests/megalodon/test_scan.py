import pytest
import torch

from megalodon.ops.scan import (
    GROUP,
    block_scan,
    block_scan_reference,
    complex_power,
    group_blocks,
)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("with_first", [False, True])
@pytest.mark.parametrize("with_through", [False, True])
@pytest.mark.parametrize("blocks", [1, 2, GROUP, GROUP + 1, 3 * GROUP + 5, GROUP**2 + GROUP + 3])
def test_grouped_scan_equals_the_recurrence(
    blocks: int, with_through: bool, with_first: bool, reverse: bool
) -> None:
    torch.manual_seed(0)
    size, groups = group_blocks(blocks)
    assert blocks <= size * groups < blocks + GROUP
    s = torch.randn(size, groups, 2, 3, 4, dtype=torch.complex128)
    first = torch.randn(2, 3, 4, dtype=torch.complex128) if with_first else None
    through = (torch.rand(size, groups, 2) < 0.8).double() if with_through else None
    log_rho = -torch.rand(3, 4, dtype=torch.float64) * 0.02
    turns = torch.rand(3, 4, dtype=torch.float64)
    arguments = (s, first, log_rho, turns, 32, through)
    found = block_scan(*arguments, reverse=reverse)
    expected = block_scan_reference(*arguments, reverse=reverse)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("exponent", [1, 7, 32])
@pytest.mark.parametrize("scale", [1, 32, 2**20])
def test_powers_are_exact_in_float32_for_large_scales(scale: int, exponent: int) -> None:
    turns = torch.rand(50)
    log_rho = -torch.rand(50) / (scale * exponent)
    re, im = complex_power(log_rho, turns, torch.tensor(exponent), scale)
    q = torch.polar(
        (log_rho.double() * scale * exponent).exp(),
        (turns.double() * scale * exponent) % 1 * 2 * torch.pi,
    )
    # An angle of up to `exponent` turns is rounded to 2^-24 of itself.
    tolerance = 2e-6 * exponent
    torch.testing.assert_close(re.double(), q.real, rtol=0, atol=tolerance)
    torch.testing.assert_close(im.double(), q.imag, rtol=0, atol=tolerance)

import pytest
import torch

from megalodon.ops.scan import (
    GROUP,
    block_scan,
    block_scan_reference,
    complex_power,
    q_powers,
    scan_jumps,
)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("with_documents", [False, True])
@pytest.mark.parametrize(
    "blocks", [*range(1, GROUP + 2), 3 * GROUP, 3 * GROUP + 5, GROUP**2 + GROUP + 3]
)
def test_scan_equals_the_recurrence(blocks, with_documents, reverse):
    torch.manual_seed(0)
    s = torch.randn(3, 2, blocks, 4, dtype=torch.complex128)
    document = (torch.rand(2, blocks) < 0.2).cumsum(1) if with_documents else None
    log_rho = -torch.rand(3, 4, dtype=torch.float64) * 0.02
    log_q = torch.stack([log_rho, torch.rand(3, 4, dtype=torch.float64)], dim=-1)
    powers = q_powers(log_q, 32, scan_jumps(blocks))
    q = powers[0]
    if reverse:
        q, powers = q.conj(), powers.flip(0).conj()
    expected = block_scan_reference(s, q, document, reverse=reverse)
    block_scan(s, log_q, 32, powers, document, reverse=reverse)
    torch.testing.assert_close(s, expected, rtol=0, atol=1e-10)


def test_powers_of_q_are_exact_in_float32():
    """Angles of up to 32 turns, and behind a jump of up to 15, are rounded to 2^-24 of themselves;
    an angle of jumps that were not reduced would be off by a thousand times as much."""
    jump = 2**15
    log_q = torch.stack([-torch.rand(5, 4) / (15 * jump), torch.rand(5, 4)], dim=-1)
    found = q_powers(log_q, jump, 15, 32)
    exponents = torch.cat([torch.arange(1, 16) * jump, torch.arange(33)]).double().view(-1, 1, 1)
    log_rho, turns = log_q.double().unbind(-1)
    exact = torch.polar((log_rho * exponents).exp(), turns * exponents % 1 * 2 * torch.pi)
    torch.testing.assert_close(found.to(exact.dtype), exact, rtol=0, atol=2e-5)


@pytest.mark.parametrize("exponent", [1, 7, 32])
@pytest.mark.parametrize("scale", [1, 32, 2**20])
def test_powers_are_exact_in_float32_for_large_scales(scale, exponent):
    turns = torch.rand(50)
    log_rho = -torch.rand(50) / (scale * exponent)
    log_q = torch.stack([log_rho, turns], dim=-1)
    re, im = complex_power(log_q, torch.tensor(exponent), scale)
    q = torch.polar(
        (log_rho.double() * scale * exponent).exp(),
        (turns.double() * scale * exponent) % 1 * 2 * torch.pi,
    )
    # An angle of up to `exponent` turns is rounded to 2^-24 of itself.
    tolerance = 2e-6 * exponent
    torch.testing.assert_close(re.double(), q.real, rtol=0, atol=tolerance)
    torch.testing.assert_close(im.double(), q.imag, rtol=0, atol=tolerance)

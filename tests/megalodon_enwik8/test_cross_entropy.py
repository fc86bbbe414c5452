import pytest
import torch
import torch.nn.functional as F

from megalodon_enwik8 import models as loss
from megalodon_enwik8.models import cross_entropy


@pytest.mark.parametrize("rows", [1, 7, 8, 50])
def test_equals_pytorchs_in_values_and_gradients(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "ELEMENTS_AT_A_TIME", 8 * 5)  # eight rows of five at a time
    torch.manual_seed(0)
    targets, weights = torch.randint(0, 5, (rows,)), torch.randn(rows, dtype=torch.float64)
    results = []
    for function in (cross_entropy, lambda x, t: F.cross_entropy(x, t, reduction="none")):
        logits = torch.randn(
            rows, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
        ).requires_grad_()
        losses = function(logits, targets)
        (losses * weights).sum().backward()
        results.append((losses.detach(), logits.grad))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-12)


def test_bfloat16_logits_are_summed_in_float32_and_kept_as_they_are() -> None:
    logits = (torch.randn(64, 256) * 5).bfloat16().requires_grad_()
    targets = torch.randint(0, 256, (64,))
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        found = cross_entropy(logits, targets)
    expected = F.cross_entropy(logits.float(), targets, reduction="none")
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    found.sum().backward()
    assert logits.grad is not None
    assert logits.grad.dtype == torch.bfloat16
    assert not [t for t in kept if t.dtype == torch.float32 and t.numel() > 64]

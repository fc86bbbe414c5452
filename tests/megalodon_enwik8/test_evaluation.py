"""The loss on fixed text counts every byte once, however it is cut into batches."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from megalodon_enwik8 import evaluation
from megalodon_enwik8.evaluation import evaluate, full_validation
from megalodon_enwik8.models import build_model, summed_loss


@pytest.fixture
def model(make_tiny: Any, model_name: str) -> Any:
    return build_model(make_tiny(model_name, attention_dropout=0.5)).train()


def test_batches_of_any_size_give_the_mean_over_windows(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    windows = torch.randint(256, (7, 25))
    model.eval()
    with torch.no_grad():
        each = [summed_loss(model, window[None]).item() / 24 for window in windows]
    for tokens in (1, 60, 8192):
        monkeypatch.setattr(evaluation, "TOKENS_PER_BATCH", tokens)
        assert evaluate(model, windows, use_autocast=False) == pytest.approx(np.mean(each))


def test_evaluation_leaves_the_model_training_and_the_generator_alone(model: Any) -> None:
    before = torch.get_rng_state()
    windows = torch.randint(256, (2, 25), generator=torch.Generator())
    first = evaluate(model, windows, use_autocast=True)
    assert evaluate(model, windows, use_autocast=True) == first
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("length", [2, 24, 25, 26, 49, 60, 100])
def test_full_validation_predicts_each_byte_but_the_first_once(model: Any, length: int) -> None:
    text = np.random.default_rng(7).integers(256, size=length, dtype=np.uint8)
    model.eval()
    total = 0.0
    with torch.no_grad():
        for start in range(0, length - 1, 24):
            piece = torch.from_numpy(text[start : start + 25].astype(np.int64))
            total += summed_loss(model, piece[None]).item()
    loss = full_validation(model, text, seq_len=24, use_autocast=False)
    assert loss == pytest.approx(total / (length - 1))

"""The loss of a model on fixed text."""

from __future__ import annotations

import numpy as np
import torch
from transformers import PreTrainedModel

from megalodon_enwik8.models import summed_loss
from megalodon_enwik8.utils import autocast

# Windows are evaluated so many tokens at a time: enough to fill the cores, small in memory, and
# independent of the training batch so that every run evaluates in the same way.
TOKENS_PER_BATCH = 8192


@torch.no_grad()
def evaluate(model: PreTrainedModel, windows: torch.Tensor, *, use_autocast: bool) -> float:
    """Mean loss in nats per byte over `windows` (count, L + 1) int64; the first byte is given.

    Dropout is off, the model's mode is restored, and compiled layers run eagerly: their few
    extra seconds here are less than compiling for one more shape.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    total = torch.zeros((), dtype=torch.float64)
    length = windows.size(1) - 1
    with torch.compiler.set_stance("force_eager"):
        for rows in windows.split(max(1, TOKENS_PER_BATCH // length)):
            with autocast(device, use_autocast):
                total += summed_loss(model, rows.to(device)).double().cpu()
    model.train(was_training)
    return total.item() / (windows.size(0) * length)


def full_validation(
    model: PreTrainedModel, text: np.ndarray, *, seq_len: int, use_autocast: bool
) -> float:
    """Mean loss in nats per byte over all of `text` but its first byte, each byte counted once.

    Consecutive windows of `seq_len` predictions; the last may be shorter.
    text: uint8 (T,), T >= 2.
    """
    tokens = torch.from_numpy(np.asarray(text, dtype=np.int64))
    predicted = len(tokens) - 1
    whole = predicted // seq_len * seq_len
    total = 0.0
    if whole:
        windows = tokens.unfold(0, seq_len + 1, seq_len)
        total += whole * evaluate(model, windows, use_autocast=use_autocast)
    if predicted > whole:
        rest = tokens[None, whole:]
        total += (predicted - whole) * evaluate(model, rest, use_autocast=use_autocast)
    return total / predicted

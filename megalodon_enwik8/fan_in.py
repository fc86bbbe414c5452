"""An initialisation that either model can have, whatever its own is."""

from __future__ import annotations

import math

from torch import nn


def draw_by_fan_in(model: nn.Module, layers: int, outputs: tuple[str, ...]) -> None:
    """Draw every matrix anew from N(0, 1 / fan_in), in place, and the embedding as if it were the
    output matrix. Those of a layer's projections whose names end in `outputs`, onto the residual
    stream, get that divided by sqrt(2 layers), as in GPT-2 (Radford et al. 2019, section 2.3).
    Biases stay as they are."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=module.embedding_dim**-0.5)
        elif isinstance(module, nn.Linear):
            depth = 2 * layers if name.endswith(outputs) else 1
            nn.init.normal_(module.weight, std=1 / math.sqrt(module.in_features * depth))

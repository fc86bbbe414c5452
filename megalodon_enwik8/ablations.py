"""Megalodons with a part left out or exchanged, to see what it brings. They live here, in the
experiment: the library has the model as it is.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from megalodon import MegalodonConfig, MegalodonForCausalLM
from megalodon.layout import Layout
from megalodon.modules import MegalodonLayerNorm
from megalodon.ops.timestep_norm import TimestepNormState, initial_state


class NoCEMA(nn.Module):
    """In the place of a MegalodonCEMA: hands its input on."""

    def __init__(self, config: MegalodonConfig) -> None:
        super().__init__()
        self.order = config.cema_ndim

    def forward(
        self, x: Tensor, state: Tensor | None, layout: Layout
    ) -> tuple[Tensor, Tensor | None]:
        if state is None and layout.return_state:
            state = x.new_zeros(x.shape[0], x.shape[2], self.order, 2, dtype=torch.float32)
        return x, state


class LayerNormInstead(MegalodonLayerNorm):
    """In the place of a MegalodonTimestepNorm, with parameters of the same shapes: normalises over
    the channels of one step alone. Its state only counts."""

    def __init__(self, config: MegalodonConfig) -> None:
        super().__init__(config)
        self.num_groups = config.norm_num_groups

    def forward(  # type: ignore[override]
        self, x: Tensor, state: TimestepNormState | None, layout: Layout
    ) -> tuple[Tensor, TimestepNormState]:
        state = initial_state(x, self.num_groups) if state is None else state
        if layout.segments is None:
            steps = state.steps + x.shape[1]
        else:
            steps = layout.segments.final_count(state.steps)
        return super().forward(x), state._replace(steps=steps)


def ablate(model: MegalodonForCausalLM, ablation: Literal["none", "no_cema", "layer_norm"]) -> None:
    """Make a freshly initialised model one without a part; its other weights stay as they are."""
    if ablation == "no_cema":
        for layer in model.model.layers:
            layer.cema = NoCEMA(model.config)
    elif ablation == "layer_norm":
        for layer in model.model.layers:
            layer.timestep_norm = LayerNormInstead(model.config)
        model.model.final_norm = LayerNormInstead(model.config)

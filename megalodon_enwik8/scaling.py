"""What several processes cost, on paper: the bytes that each sends in a step, and its arithmetic.

Bytes are counted as collectives send them that go round a ring: where all N processes together
hold W bytes, an all-gather or a reduce-scatter has each send (N - 1) / N of W, and an all-reduce,
which is one after the other, twice that. Weights and gradients travel in float32. What a step
sends besides is a few numbers (the loss, the gradient's norm, signals), and is not counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch

from megalodon import MegalodonConfig, MegalodonForCausalLM
from megalodon.ops.cema import BLOCK

FLOAT, DOUBLE = 4, 8  # bytes


class Sent(NamedTuple):
    """Bytes that a process sends in a step: for one layer, and for all of the model."""

    layer: float
    step: float


class Device(NamedTuple):
    """A process's device: how much it computes, how much it sends, and how long it may send."""

    flops: float  # a second
    link: float  # bytes a second
    share: float  # of the time in which it computes, above which sending no longer pays


class Costs:
    """Of a step of a Megalodon."""

    def __init__(self, config: MegalodonConfig) -> None:
        self.config = config
        with torch.device("meta"):
            named = list(MegalodonForCausalLM(config).named_parameters())
        self.layer = [p.shape for name, p in named if name.startswith("model.layers.0.")]
        self.rest = [p.shape for name, p in named if not name.startswith("model.layers.")]

    @property
    def parameters(self) -> int:
        return self.config.num_layers * _elements(self.layer) + _elements(self.rest)

    def data_parallel(self, processes: int) -> Sent:
        """DDP: one all-reduce of the gradient a step."""
        sent = 2 * (processes - 1) / processes * FLOAT
        return Sent(sent * _elements(self.layer), sent * self.parameters)

    def sharded(self, processes: int, micro_batches: int = 1) -> Sent:
        """FSDP2: for each micro-batch an all-gather of a layer's weights before its forward and
        another before its backward, and one of all others; one reduce-scatter of the gradient a
        step. A tensor's first dimension is filled up to a multiple of N."""
        layer, rest = (
            FLOAT * (processes - 1) * _elements(shapes, processes) // processes
            for shapes in (self.layer, self.rest)
        )
        layer, rest = layer * (2 * micro_batches + 1), rest * (micro_batches + 1)
        return Sent(layer, self.config.num_layers * layer + rest)

    def along_time(self, processes: int, sequences: int = 1) -> Sent:
        """chunk_parallel: an all-gather of the shape, and one of each TimestepNorm's statistics
        and of each CEMA's summary; in the backward as large ones of what their gradients come to.
        Of `sequences` in one micro-batch; of any length."""
        config = self.config
        statistics = 2 * config.norm_num_groups * DOUBLE  # mean and variance
        summary = 2 * config.model_dim * config.cema_ndim * FLOAT  # a complex number
        layer, final = (2 * sequences * part for part in (statistics + summary, statistics))
        total = config.num_layers * layer + final + 3 * DOUBLE
        return Sent((processes - 1) * layer, (processes - 1) * total)

    def flops(self, tokens: int) -> int:
        """Of forward and backward: 6 for each weight and token, and three times what
        attention takes within chunks, of which it sees one half, and CEMA in blocks."""
        config = self.config
        lookup = 0 if config.tie_word_embeddings else config.vocab_size * config.model_dim
        attention = config.chunk_size * (config.z_dim + config.value_dim)
        cema = config.model_dim * (2 * BLOCK + 8 * config.cema_ndim)
        weights = 2 * (self.parameters - lookup)
        return 3 * tokens * (weights + config.num_layers * (attention + cema))

    def least_tokens(self, sent: Sent, device: Device) -> int:
        """The fewest tokens of a step in each process with which it pays to send that much."""
        computing = sent.step / device.link / device.share  # seconds
        return math.ceil(computing * device.flops / self.flops(1))

    def most_along_time(self, tokens: int, device: Device) -> int:
        """The most processes, a power of two, that it pays to share a sequence out to."""
        parts = 1
        while tokens % (2 * parts * self.config.chunk_size) == 0 and self.least_tokens(
            self.along_time(2 * parts), device
        ) <= tokens // (2 * parts):
            parts *= 2
        return parts


def _elements(shapes: Iterable[torch.Size], multiple: int = 1) -> int:
    """Of tensors whose first dimension is filled up to a multiple."""
    return sum(-(-shape[0] // multiple) * multiple * shape[1:].numel() for shape in shapes)

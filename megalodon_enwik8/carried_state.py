"""Training with carried state: truncated backpropagation through time.

Each sequence of a step goes on where the same sequence of the step before ended, from the state
that the model was in there; gradients stop at the border (Williams & Peng 1990).
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from megalodon_enwik8.models import new_state


class CarriedState:
    """The states of the streams between two steps.

    caches: one for each micro-batch, holding its rows.
    """

    def __init__(self, model: PreTrainedModel, streams: int, batch_size: int) -> None:
        self._model = model
        self._streams, self._batch_size = streams, batch_size
        self.begin()

    def begin(self) -> None:
        """Forget the text so far: every stream begins anew."""
        count = -(-self._streams // self._batch_size)
        self.caches = [new_state(self._model, truncated=True) for _ in range(count)]

    def state_dict(self) -> dict[str, Any]:
        """The states of all streams, for a checkpoint, however the batch is split."""
        if self.caches[0].lengths is None:
            return self.caches[0].state_dict()
        return self.caches[0].concatenate(self.caches).state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`. Raises ValueError for a state that does not fit."""
        cache = new_state(self._model, truncated=True).load_state_dict(state)
        if cache.lengths is None:
            self.begin()
            return
        if cache.batch_size != self._streams:
            raise ValueError(f"it holds {cache.batch_size} streams, this run has {self._streams}")
        device = next(self._model.parameters()).device
        self.caches = cache.map(lambda tensor: tensor.to(device)).split(self._batch_size)

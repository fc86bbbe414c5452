"""The state of a Megalodon: fixed in size, whatever the length of the text."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from transformers import Cache

from .configuration_megalodon import SIZES, MegalodonConfig
from .ops.cema import BLOCK, KeptSteps
from .ops.chunk_attention import AttentionState
from .ops.timestep_norm import TimestepNormState

Kept = dict[tuple[nn.Module, bool], KeptSteps]
"""How single steps (True) and short pieces are taken, by each CEMA that has read one."""


class LayerState(NamedTuple):
    """What one block carries from token to token."""

    norm: TimestepNormState
    cema: Tensor  # (B, D, N, 2)
    attention: AttentionState  # the current chunk's keys and values


State = TypeVar("State")


def map_state(function: Callable[[Tensor], Tensor], state: State) -> State:
    """Apply a function to every tensor of a nested state."""
    if isinstance(state, Tensor):
        return function(state)  # type: ignore[return-value]
    return type(state)(*(map_state(function, part) for part in state))  # type: ignore[attr-defined]


class MegalodonCache(Cache):
    """Per-layer states, and how much text each row has behind it.

    Pass the cache of one call as ``cache`` of the next, with the tokens that follow.
    The model fills the same object.

    While single tokens are decoded, or up to `BLOCK` at a time, without gradients, the cache also
    keeps what CEMA multiplies with at each call, which takes longer to compute than the call does.
    Any other call drops it, and so do :meth:`reset`, :meth:`map` and copying: weights must not
    change between two such calls of one cache, unless one of these lies between.

    Averages have no way back. What :meth:`crop` is to take away must therefore be recorded: after
    :meth:`activate_past_recording` the cache holds a copy of the states, and the arguments of all
    calls from there on. A crop returns to that copy, and the next call first reads again what was
    kept, or, where that is little, reads it together with its own tokens. That is exact.

    Args:
        config: the model's.

    Attributes:
        states: one :class:`LayerState` a layer, empty before the first call.
        final_norm: state of the last TimestepNorm.
        lengths: (B,) int64, tokens of each row's document so far, without padding.
        is_uniform: whether each row's document has all positions behind it.
        positions: positions seen, padding included.
        kept: see :data:`Kept`.
        is_croppable: whether calls are recorded.
    """

    _start: "MegalodonCache | None"  # the states where the recording begins
    _calls: list[dict[str, Tensor]]  # arguments (B, L, ...) of MegalodonModel.forward since
    _cropped: bool  # whether the states are those at the start again, and the calls yet to be made

    def __init__(self, config: MegalodonConfig) -> None:
        super().__init__(layers=[])
        self.sizes = {key: getattr(config, key) for key in SIZES if key != "vocab_size"}
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.states: list[LayerState] = []
        self.final_norm: TimestepNormState | None = None
        self.lengths: Tensor | None = None
        self.is_uniform = True
        self.positions = 0
        self.kept: Kept = {}
        self._start, self._calls, self._cropped = None, [], False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "kept": {}}  # whose keys would be copied too: parts of a model

    def check(self, config: MegalodonConfig, batch_size: int) -> None:
        """Raise ValueError if the cache is another model's or another batch's."""
        for key, held in self.sizes.items():
            if getattr(config, key) != held:
                raise ValueError(
                    f"the cache comes from another model: its {key} is {held}, this model's is "
                    f"{getattr(config, key)}; start with a new cache"
                )
        if self.lengths is not None and self.batch_size != batch_size:
            raise ValueError(
                f"the cache holds {self.batch_size} rows and the input has {batch_size}; "
                "pass as many rows as the cache holds, or start with a new cache"
            )

    def advance(
        self,
        states: list[LayerState],
        final_norm: TimestepNormState,
        positions: int,
        uniform: bool,
    ) -> None:
        """Take in the states after `positions` more positions; uniform says whether every row
        took all of them, without padding or borders."""
        self.states = states
        self.final_norm = final_norm
        self.lengths = final_norm.steps
        self.is_uniform = self.is_uniform and uniform
        self.positions += positions

    def map(self, function: Callable[[Tensor], Tensor]) -> "MegalodonCache":
        """Apply a function to every tensor, in place of the old ones. Returns the cache."""
        self.kept = {}  # may belong on another device
        return self._map_states(function)

    def _map_states(self, function: Callable[[Tensor], Tensor]) -> "MegalodonCache":
        if self.final_norm is not None:
            self.states = [map_state(function, state) for state in self.states]
            self.final_norm = map_state(function, self.final_norm)
            self.lengths = self.final_norm.steps
        if self._start is not None:
            self._start._map_states(function)
        self._calls = [{key: function(t) for key, t in call.items()} for call in self._calls]
        return self

    def detach(self) -> "MegalodonCache":
        """Cut the states off from the graph that made them, for truncated backpropagation."""
        return self.map(Tensor.detach)

    def leave_inference_mode(self) -> None:
        """Copy states that were made under torch.inference_mode, once outside of it: there nobody
        may write to them, nor keep them for a backward. Compiled, which cannot ask, leave them."""
        if torch.compiler.is_compiling():
            return
        made_there = self.lengths is not None and self.lengths.is_inference()
        if made_there and not torch.is_inference_mode_enabled():
            self.map(torch.clone)

    @property
    def nbytes(self) -> int:
        """Size of the state in bytes; the same at position ten and at ten million."""
        tensors = [t for state in self.states for t in (*state.norm, state.cema, *state.attention)]
        return sum(t.nbytes for t in (*tensors, *(self.final_norm or ())))

    @property
    def batch_size(self) -> int:
        """Rows, or -1 before the first call."""
        return -1 if self.lengths is None else self.lengths.shape[0]

    def __len__(self) -> int:
        return len(self.states)

    def __repr__(self) -> str:
        return f"MegalodonCache(positions={self.positions}, nbytes={self.nbytes})"

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.positions

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def has_previous_state(
        self, layer_idx: int | None = None, state_idx: int | None = None
    ) -> bool:
        return self.positions > 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map_states(lambda t: t.index_select(0, indices.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map_states(lambda t: t.repeat_interleave(repeats, dim=0))

    def activate_past_recording(self) -> None:
        """From here on, record what :meth:`crop` needs to come back as far as here."""
        if not self._cropped:  # else it records already
            self.stop_recording()
            self._start = copy.copy(self).map(torch.clone)  # single steps write to their state

    def stop_recording(self) -> None:
        """Forget what was recorded. Raises ValueError between a crop and the next call."""
        if self._cropped:
            raise ValueError("stop_recording() after a crop: let the model read something first")
        self._start, self._calls = None, []

    @property
    def is_croppable(self) -> bool:
        return self._start is not None

    def record(self, **arguments: Tensor | None) -> None:
        """Take in the arguments (B or 1, L, ...) of a call that was made, if calls are recorded."""
        if self._start is not None:
            if self._cropped:  # what the crop kept was read with this call
                self._calls, self._cropped = [], False
            given = {key: t for key, t in arguments.items() if t is not None}
            rows = self.batch_size
            self._calls.append({key: t.expand(rows, *t.shape[1:]) for key, t in given.items()})

    def crop(self, tokens_to_remove: int) -> None:
        """Take away the last positions of every row, given as a negative number, as transformers
        does. Up to the next call the states are those at the start of the recording, which then
        begins anew behind what is kept.

        Raises:
            ValueError: for a positive number, and for more positions than were recorded.
        """
        sizes = [next(iter(call.values())).shape[1] for call in self._calls]
        keep = sum(sizes) + tokens_to_remove
        if tokens_to_remove > 0 or keep < 0:
            raise ValueError(
                f"crop({tokens_to_remove}): the number must be negative, and {sum(sizes)} "
                "positions are recorded; call activate_past_recording() before those that may "
                "have to go"
            )
        if self._start is not None and tokens_to_remove:
            start, calls = self._start, []
            self.states, self.final_norm = start.states, start.final_norm
            self.lengths, self.is_uniform = start.lengths, start.is_uniform
            self.positions += tokens_to_remove
            for call, size in zip(self._calls, sizes, strict=True):
                if keep > 0:
                    calls.append({key: t[:, :keep] for key, t in call.items()})
                keep -= size
            self._calls, self._cropped = calls, bool(calls)
        if self._start is not None:
            self.activate_past_recording()

    def read_again(
        self, forward: Callable[..., Any], input_ids: Tensor | None = None
    ) -> Tensor | None:
        """See to what a crop kept before the next call: make those calls again, with
        MegalodonModel's forward, and return ``None``; or, where they had ids alone, few of them,
        and so has the next, `input_ids` (B, L), return the ids of all, to be read in one call."""
        if self._start is None or not self._cropped:
            return None
        calls, self.positions = self._calls, self._start.positions
        ids = [call["input_ids"] for call in calls if call.keys() == {"input_ids"}]
        few = sum(each.shape[1] for each in ids) <= BLOCK
        if input_ids is not None and few and len(ids) == len(calls):
            return torch.cat([*ids, input_ids], dim=1)
        self._cropped = False
        self.stop_recording()
        for call in calls:
            forward(**call, cache=self, use_cache=True)
        self.activate_past_recording()
        return None

    @property
    def is_linear(self) -> list[bool]:
        return [False]  # it counts positions, by which `generate` knows what of a text is new

    @property
    def is_initialized(self) -> bool:
        return self.positions > 0

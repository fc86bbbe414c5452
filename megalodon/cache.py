"""The state of a Megalodon: fixed in size, whatever the length of the text."""

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from transformers import Cache

from .configuration_megalodon import MegalodonConfig
from .ops.chunk_attention import AttentionState
from .ops.timestep_norm import TimestepNormState


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


def _tensors(state: Any) -> list[Tensor]:
    if isinstance(state, Tensor):
        return [state]
    return [tensor for part in state for tensor in _tensors(part)]


class MegalodonCache(Cache):
    """Per-layer states, and how much text each row has behind it.

    Pass the cache of one call as ``cache`` of the next, with the tokens that follow.
    The model fills the same object.

    Args:
        config: the model's.
        truncated: for truncated backpropagation through time: whether states come cut off from
            the graph that made them. Cheaper than :meth:`detach` where blocks are compiled.

    Attributes:
        states: one :class:`LayerState` a layer, empty before the first call.
        final_norm: state of the last TimestepNorm.
        lengths: (B,) int64, tokens of each row's document so far, without padding.
        uniform_length: the same as a number where all rows agree, else ``None``.
        positions: positions seen, padding included.
    """

    def __init__(self, config: MegalodonConfig, *, truncated: bool = False) -> None:
        super().__init__(layers=[])
        self.signature = _signature(config)
        self.truncated = truncated
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.states: list[LayerState] = []
        self.final_norm: TimestepNormState | None = None
        self.lengths: Tensor | None = None
        self.uniform_length: int | None = 0
        self.positions = 0

    def check(self, config: MegalodonConfig, batch_size: int) -> None:
        """Raise ValueError if the cache is another model's or another batch's."""
        wanted = _signature(config)
        for key, value in wanted.items():
            if self.signature[key] != value:
                raise ValueError(
                    f"the cache comes from another model: its {key} is "
                    f"{self.signature[key]}, this model's is {value}; start with a new cache"
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
        self.final_norm = map_state(Tensor.detach, final_norm) if self.truncated else final_norm
        self.lengths = final_norm.steps
        if uniform and self.uniform_length is not None:
            self.uniform_length += positions
        else:
            self.uniform_length = None
        self.positions += positions

    def map(self, function: Callable[[Tensor], Tensor]) -> "MegalodonCache":
        """Apply a function to every tensor, in place of the old ones. Returns the cache."""
        if self.final_norm is not None:
            self.states = [map_state(function, state) for state in self.states]
            self.final_norm = map_state(function, self.final_norm)
            self.lengths = self.final_norm.steps
        return self

    def detach(self) -> "MegalodonCache":
        """Cut the states off from the graph that made them, for truncated backpropagation."""
        return self.map(Tensor.detach)

    def leave_inference_mode(self) -> None:
        """Copy states that were made under torch.inference_mode, once outside of it: there nobody
        may write to them, nor keep them for a backward."""
        made_there = self.lengths is not None and self.lengths.is_inference()
        if made_there and not torch.is_inference_mode_enabled():
            self.map(torch.clone)

    def split(self, rows: int) -> list["MegalodonCache"]:
        """Caches of so many rows each, the last of what remains. They share this cache's memory,
        which is not to be used afterwards. Raises ValueError for an empty cache."""
        if self.lengths is None:
            raise ValueError("an empty cache has no rows to split: make new caches in its place")
        parts = zip(*(tensor.split(rows) for tensor in self._flat()), strict=True)
        caches = []
        for tensors in parts:
            caches.append(copy.copy(self))
            caches[-1]._unflatten(tensors)
        return caches

    @staticmethod
    def concatenate(caches: Sequence["MegalodonCache"]) -> "MegalodonCache":
        """One cache with the rows of all. Raises ValueError where one is empty, comes from another
        model or has seen another number of positions."""
        first = caches[0]
        for cache in caches:
            if cache.lengths is None:
                raise ValueError("an empty cache has no rows to concatenate")
            if (cache.signature, cache.positions) != (first.signature, first.positions):
                raise ValueError("only caches of one model at one position can be concatenated")
        together = [torch.cat(parts) for parts in zip(*(c._flat() for c in caches), strict=True)]
        result = copy.copy(first)
        result._unflatten(together)
        if any(cache.uniform_length != first.uniform_length for cache in caches):
            result.uniform_length = None
        return result

    def state_dict(self) -> dict[str, Any]:
        """A copy of the cache as plain numbers and tensors, which torch.load reads with
        weights_only=True."""
        return {
            "signature": dict(self.signature),
            "positions": self.positions,
            "uniform_length": self.uniform_length,
            "tensors": [tensor.detach().clone() for tensor in self._flat()],
        }

    def load_state_dict(self, state: dict[str, Any]) -> "MegalodonCache":
        """Become what :meth:`state_dict` was taken of, in tensors of its own. Returns the cache.

        Raises ValueError for the state of another model, or a damaged one.
        """
        if not isinstance(state, dict) or not state.keys() >= self.state_dict().keys():
            raise ValueError("this is not the state of a MegalodonCache")
        sizes = state["signature"]
        if not isinstance(sizes, dict) or not all(type(size) is int for size in sizes.values()):
            raise ValueError("this state is damaged: its signature holds no sizes")
        if sizes != self.signature:
            raise ValueError(
                f"this state is of another model: {sizes}, this model has {self.signature}"
            )
        tensors, positions, length = (
            state[key] for key in ("tensors", "positions", "uniform_length")
        )
        counts = [positions] if length is None else [positions, length]
        if not all(type(count) is int and count >= 0 for count in counts):
            raise ValueError("this state is damaged: its counts are no whole numbers")
        if not isinstance(tensors, list) or not all(isinstance(t, Tensor) for t in tensors):
            raise ValueError("this state is damaged: it holds no list of tensors")
        if not tensors:
            self.reset()
            return self
        rows = tensors[0].shape
        if len(rows) != 1 or [t.shape for t in tensors] != [(*rows, *s) for s in self._shapes()]:
            raise ValueError("this state is damaged: its tensors have the wrong shapes")
        counters = [t for t in tensors if t.dtype == torch.int64]
        if len(counters) != self.signature["num_layers"] + 1 or not all(
            t.is_floating_point() or t.dtype == torch.int64 for t in tensors
        ):
            raise ValueError("this state is damaged: its tensors have the wrong types")
        # Of its own: decoding writes to the state in place.
        self._unflatten([tensor.detach().clone() for tensor in tensors])
        self.positions, self.uniform_length = positions, length
        return self

    def _flat(self) -> list[Tensor]:
        """All tensors in a fixed order: norm, CEMA and attention of each layer, the last norm."""
        return [] if self.final_norm is None else _tensors((*self.states, self.final_norm))

    def _unflatten(self, tensors: Sequence[Tensor]) -> None:
        """The inverse of :meth:`_flat`, for at least the tensors of one row."""
        rest = iter(tensors)

        def norm() -> TimestepNormState:
            return TimestepNormState(next(rest), next(rest), next(rest))

        self.states = [
            LayerState(norm(), next(rest), AttentionState(next(rest), next(rest)))
            for _ in range(self.signature["num_layers"])
        ]
        self.final_norm = norm()
        self.lengths = self.final_norm.steps

    def _shapes(self) -> list[tuple[int, ...]]:
        """The shapes of :meth:`_flat`, without the rows."""
        c = self.signature
        groups, heads = (c["norm_num_groups"],), c["num_heads"]
        norm = [(), groups, groups]
        attention = [(c["chunk_size"], heads, c[key] // heads) for key in ("z_dim", "value_dim")]
        layer = [*norm, (c["model_dim"], c["cema_ndim"], 2), *attention]
        return layer * c["num_layers"] + norm

    @property
    def nbytes(self) -> int:
        """Size of the state in bytes; the same at position ten and at ten million."""
        return sum(t.nbytes for t in self._flat())

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
        return self.lengths is not None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.map(lambda t: t.index_select(0, indices.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.map(lambda t: t.repeat_interleave(repeats, dim=0))

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise ValueError(
                "a MegalodonCache cannot be cropped: its averages have no way back; keep a "
                "copy.deepcopy of the cache at the place to return to"
            )

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_croppable(self) -> bool:
        return False

    @property
    def is_linear(self) -> list[bool]:
        return [False]  # it counts positions, by which `generate` knows what of a text is new

    @property
    def is_initialized(self) -> bool:
        return self.lengths is not None


def _signature(config: MegalodonConfig) -> dict[str, int]:
    keys = ["num_layers", "model_dim", "num_heads", "z_dim", "value_dim"]
    keys += ["cema_ndim", "chunk_size", "norm_num_groups"]
    return {key: getattr(config, key) for key in keys}

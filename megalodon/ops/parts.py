"""A sequence in several parts along time, each held by a process that runs beside the others."""

from typing import Protocol

from torch import Tensor


class Parts(Protocol):
    """All parts of a sequence, of one length, of which this process holds the `rank`-th."""

    rank: int

    def gather(self, x: Tensor) -> Tensor:
        """x of each part, in order: (...) -> (parts, ...). Not differentiable: an operation's
        backward gathers in its own right."""
        ...

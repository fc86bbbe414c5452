"""Keep autocast out of the operations: they choose the dtype of each product themselves."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def without_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """Run an operation with autocast off for the device of its first argument, a tensor."""

    @wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        first = args[0]
        assert isinstance(first, torch.Tensor)
        with torch.autocast(first.device.type, enabled=False):
            return function(*args, **kwargs)

    return wrapper

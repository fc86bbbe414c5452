"""Which dtype to compute in, how to keep autocast out of the operations, and what a GPU rounds."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def without_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """Run an operation with autocast off for the device of its first argument, a tensor.

    A compiler's cache on disk keeps no code that switches autocast: compiled, what is wrapped must
    be such that autocast makes no difference to inputs as a block gives them.
    """

    @wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        first = args[0]
        assert isinstance(first, Tensor)
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        with autocast_off(first.device.type):
            return function(*args, **kwargs)

    return wrapper


def autocast_acts(device: str) -> bool:
    """Whether autocast is on for a type of device, which "meta" cannot be asked."""
    return device != "meta" and torch.is_autocast_enabled(device)


def autocast_off(device: str) -> AbstractContextManager[Any]:
    """Autocast switched off for a type of device, where it is on."""
    return torch.autocast(device, enabled=False) if autocast_acts(device) else nullcontext()


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a linear layer applied to x computes in: autocast's where it acts on x."""
    device = x.device.type
    if autocast_acts(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype


def wide_dtype(x: Tensor) -> torch.dtype:
    """float32, or float64 where x is."""
    return torch.promote_types(x.dtype, torch.float32)


def configure_precision(
    *, allow_tf32: bool | None = True, allow_bf16_reduced_precision_reduction: bool | None = None
) -> None:
    """Set two of PyTorch's switches for matrix products on NVIDIA GPUs, for the whole process; the
    library sets neither. None leaves one as it is, other devices know neither.

    allow_tf32: float32 products may round their factors to ten bits, those of the moving average
        and its state included. allow_bf16_reduced_precision_reduction: sums in bfloat16 products.
    """
    switches = torch.backends.cuda.matmul
    if allow_tf32 is not None:
        switches.allow_tf32 = allow_tf32
    if allow_bf16_reduced_precision_reduction is not None:
        switches.allow_bf16_reduced_precision_reduction = allow_bf16_reduced_precision_reduction

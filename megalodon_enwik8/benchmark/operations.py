"""What code asks of a device: the operations that it dispatches, and the kernels that a compiler
makes of it. Counts are what small batches cost on a GPU, and need none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch._library.custom_ops import OPDEFS  # the one way to what a custom operator does inside
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DTYPE_COPY = "dtype copy"
COPIES = ("aten::_to_copy", "aten::copy_")

KERNEL_NAMES = {"TORCHINDUCTOR_CPP_ENABLE_KERNEL_PROFILE": "1"}
"""The environment in which the compiler's kernels tell a profiler their names."""


class Operations(TorchDispatchMode):
    """Counts the operations that the CPU is asked for while the block runs: `found`, by name.

    Of a custom operator (`torch.library.custom_op`) what it does inside is counted, forward and
    backward. A copy to another dtype is a DTYPE_COPY. Left out is what launches nothing: views,
    memory without content, numbers that Python reads.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        custom = OPDEFS.get(func.name())
        if custom is not None:
            with self:
                return custom._init_fn(*args, **kwargs)
        if not func.has_kernel_for_dispatch_key(torch._C.DispatchKey.CPU):
            with self:  # inside a custom operator, where autograd has not taken it apart
                made = func.decompose(*args, **kwargs)
            if made is not NotImplemented:
                return made
        result = func(*args, **kwargs)
        given, made = _tensors((args, kwargs)), _tensors(result)
        if func._schema.is_mutable or (
            _memory(made) - _memory(given) and "empty" not in func.name()
        ):
            copies = func.name() in COPIES and len({tensor.dtype for tensor in given + made}) > 1
            self.found[DTYPE_COPY if copies else str(func)] += 1
        return result


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _memory(tensors: list[torch.Tensor]) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


def kernels(function: Callable[[], Any]) -> Counter[str]:
    """How often each of the compiler's kernels runs in a call, by name; in a process that began in
    the environment KERNEL_NAMES, on code that is compiled already."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        function()
    names = {event.key: event.count for event in seen.key_averages() if "cpp_fused" in event.key}
    return Counter({name[name.index("cpp_fused") :]: count for name, count in names.items()})

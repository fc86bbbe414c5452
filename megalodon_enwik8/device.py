"""The machine: which device to use, its memory, and what it calls itself."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from pathlib import Path

import torch

from megalodon_enwik8.safety import UserError

if sys.platform == "darwin":
    import resource


def choose_device() -> torch.device:
    """The device named by FORCE_DEVICE, else the first of CUDA, MPS and CPU that is there.

    Raises UserError for one that is not.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    available = [name for name in there if there[name]] + ["cpu"]
    name = os.environ.get("FORCE_DEVICE", "").strip().lower() or available[0]
    if name not in available:
        raise UserError(
            f"FORCE_DEVICE={name}: PyTorch {torch.__version__} finds no such device here; "
            f"use {' or '.join(available)}"
        )
    return torch.device(name)


def autocast(device: torch.device, enabled: bool | str) -> torch.autocast:
    """bfloat16 autocast; auto: where it is fast. float16 is not served: it overflows in Megalodon's
    cumulative norm."""
    wanted = has_bfloat16(device) if enabled == "auto" else bool(enabled)
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=wanted)


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device has instructions for products in bfloat16. On an x86 processor without
    AVX-512 a training step of the protocol takes 20 times as long in it as in float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    older = torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2")
    return not (device.type == "cpu" and x86 and older)


def keep_freed_memory() -> None:
    """Have glibc, where that is the allocator, keep freed memory for the next allocation.

    A training step frees and takes the same gigabyte every time. Given back to the system in
    between, each page of it costs a fault and is zeroed anew.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # malloc.h
        for name, value in ((trim_threshold, 2**31 - 1), (top_pad, 2**28), (mmap_threshold, 2**30)):
            mallopt(name, value)


def peak_memory_bytes(device: torch.device) -> int | None:
    """The most memory held so far: by tensors on a CUDA device, else by the whole process.

    None where the system does not tell.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # getrusage would report the parent's peak where that was higher: exec does not reset it.
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    return int(status.read_text().partition("VmHWM:")[2].split()[0]) * 1024


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether Python, the CPU's or the GPU's allocator says so; each has its own way."""
    known = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, known) or "can't allocate memory" in str(error)


def lost_another_process(error: BaseException) -> bool:
    """Whether a collective operation says so; gloo has no type of its own for it."""
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    if device.type == "cpu":
        return f"cpu ({torch.get_num_threads()} of {os.cpu_count()} cores)"
    return device.type


def processor_name() -> str:
    """What the CPU calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if "model name" in line]
    return names[0] if names else platform.processor()

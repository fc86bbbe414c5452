"""One measurement of one model at one context, in a process of its own: what
:mod:`megalodon_enwik8.benchmark_context` asks for.

python -m megalodon_enwik8.context_probe '{"kind": "train", ...}' prints one JSON object.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from megalodon.compat import CACHE_NAME
from megalodon_enwik8.config import ExperimentConfig, make_config
from megalodon_enwik8.description import device_name
from megalodon_enwik8.errors import run_main
from megalodon_enwik8.models import (
    build_model,
    compile_layers,
    decoder_layers,
    keeps_a_state,
    new_state,
)
from megalodon_enwik8.training import make_optimizer, train_step
from megalodon_enwik8.utils import choose_device, keep_freed_memory, peak_memory_bytes

PREFILL_SEGMENT = 65_536
"""A Megalodon reads a prompt so many tokens at a time, which bounds its memory."""


@dataclass(frozen=True)
class Task:
    """What to measure. Lengths are in bytes.

    kind: "train": steps on `tokens` bytes in rows of `context`. "decode": reading a prompt of
    `context` bytes, then writing on. "parts": forward passes over `context` bytes, plain and with
    the state, and what they consist of; Megalodon only.
    seconds: no further repetition begins after so many.
    """

    kind: str
    model: str
    context: int
    layers: int
    chunk_size: int
    tokens: int
    repetitions: int
    seconds: float
    new_tokens: int
    use_autocast: bool
    compile: bool
    gradient_checkpointing: bool

    def config(self) -> ExperimentConfig:
        """The widths of the comparison, with other depth and lengths."""
        values: dict[str, Any] = {
            "run_dir": "unused",
            "model": self.model,
            "seq_len": self.context,
            "batch_size": max(1, self.tokens // self.context),
            "grad_accum_every": 1,
            "use_autocast": self.use_autocast,
            "compile": self.compile,
            "gradient_checkpointing": self.gradient_checkpointing,
        }
        if self.model == "megalodon":
            values |= {"num_layers": self.layers, "chunk_size": self.chunk_size}
        else:
            values |= {"depth": self.layers, "ffn_dim_multiplier": 2.67}
        return make_config(values, "the benchmark")


def measure(task: Task) -> dict[str, Any]:
    """The figures that `task` asks for, and where they were taken."""
    keep_freed_memory()
    device = choose_device()
    config = task.config()
    model = build_model(config)
    model.to(device)  # type: ignore[arg-type]
    figures = {"train": _train, "decode": _decode, "parts": _parts}[task.kind](task, config, model)
    return {
        **asdict(task),
        **figures,
        "peak_memory_bytes": peak_memory_bytes(device),
        "device": device_name(device),
        "torch": torch.__version__,
    }


def _train(task: Task, config: ExperimentConfig, model: PreTrainedModel) -> dict[str, Any]:
    """The fastest of some steps; a machine's other work can only make a step slower."""
    device = next(model.parameters()).device
    model.train()
    compile_layers(model, config, task.repetitions)
    optimizer = make_optimizer(model, config)
    batch = torch.randint(256, (config.sequences_per_step, config.seq_len + 1), device=device)
    times = _repeat(lambda: train_step(model, optimizer, batch, config), task, device)
    return {
        "rows": len(batch),
        "step_seconds": min(times),
        "steps": len(times),
        "tokens_per_second": batch[:, 1:].numel() / min(times),
    }


@torch.no_grad()
def _decode(task: Task, config: ExperimentConfig, model: PreTrainedModel) -> dict[str, Any]:
    """Reading a prompt and writing greedily, in float32 as inference.py does, one row."""
    device = next(model.parameters()).device
    model.eval()
    prompt = torch.randint(256, (1, task.context), device=device)
    cache: Any = None

    def prefill() -> None:
        nonlocal cache
        cache = new_state(model) if keeps_a_state(model) else None
        size = PREFILL_SEGMENT if keeps_a_state(model) else task.context
        for piece in prompt.split(size, dim=1):
            output = model(piece, use_cache=True, logits_to_keep=1, **{CACHE_NAME: cache})
            cache = output[CACHE_NAME]

    times = _repeat(prefill, task, device)
    token = prompt[:, -1:]
    steps = []
    warm_up = 0
    if task.compile:
        warm_up = 8  # among them one for a first size, and one for all others
        for layer in decoder_layers(model):
            layer.compile()
    for _ in range(warm_up + task.new_tokens):
        began = time.perf_counter()
        output = model(token, use_cache=True, logits_to_keep=1, **{CACHE_NAME: cache})
        token = output.logits[:, -1:].argmax(-1)
        token.cpu()  # waits for the device
        steps.append(time.perf_counter() - began)
    return {
        "prefill_seconds": min(times),
        "prefill_tokens_per_second": task.context / min(times),
        "decode_seconds": statistics.median(steps[warm_up:]),
        "decode_tokens_per_second": 1 / statistics.median(steps[warm_up:]),
        "state_bytes": _state_bytes(cache),
    }


def _state_bytes(cache: Any) -> int:
    if hasattr(cache, "nbytes"):
        return int(cache.nbytes)
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


@torch.no_grad()
def _parts(task: Task, config: ExperimentConfig, model: PreTrainedModel) -> dict[str, Any]:
    """A Megalodon's forward pass over one row in float32, without and with the state; its
    products with weight matrices alone; one layer's CEMA, and its literal recurrence.

    By turns, so that they meet the same machine.
    """
    from megalodon.modules import MegalodonCEMA
    from megalodon.ops.cema import cema, cema_coefficients, cema_reference

    device = next(model.parameters()).device
    model.eval()
    prompt = torch.randint(256, (1, task.context), device=device)
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
    inputs = {
        width: torch.randn(task.context, width, device=device)
        for width in {weight.shape[1] for weight in weights}
    }
    average = next(m for m in model.modules() if isinstance(m, MegalodonCEMA))
    c = cema_coefficients(average.alpha, average.delta, average.theta, average.gamma, average.omega)
    x = torch.randn(1, task.context, average.omega.shape[0], device=device)
    narrow = x.bfloat16()
    functions: dict[str, Callable[[], Any]] = {
        "forward_seconds": lambda: model(prompt, use_cache=False),
        "forward_with_state_seconds": lambda: model(prompt, use_cache=True),
        "matrix_products_seconds": lambda: [F.linear(inputs[w.shape[1]], w) for w in weights],
        "cema_seconds": lambda: cema(x, c, return_state=True),
        "cema_bfloat16_seconds": lambda: cema(narrow, c, return_state=True),
        "cema_reference_seconds": lambda: cema_reference(x, c),
    }
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(task.repetitions + 1):  # the first is the warm-up
        for name, function in functions.items():
            times[name].append(_seconds(function, device))
    return {name: min(seconds[1:]) for name, seconds in times.items()}


def _repeat(function: Callable[[], Any], task: Task, device: torch.device) -> list[float]:
    """Seconds of each call; where the first one compiles, there is a second in any case."""
    times: list[float] = []
    least = 1 + task.compile
    while len(times) < least or (len(times) <= task.repetitions and sum(times) < task.seconds):
        times.append(_seconds(function, device))
    return times


def _seconds(function: Callable[[], Any], device: torch.device) -> float:
    _wait(device)
    began = time.perf_counter()
    function()
    _wait(device)
    return time.perf_counter() - began


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def main(argv: Sequence[str]) -> int:
    print(json.dumps(measure(Task(**json.loads(argv[0])))))
    return 0


if __name__ == "__main__":
    run_main(lambda: main(sys.argv[1:]))

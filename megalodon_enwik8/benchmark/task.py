"""One task of the benchmark: what to measure, in a process of its own, and how."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any, Literal
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from megalodon.compat import CACHE_NAME
from megalodon.ops import chunk_attention
from megalodon_enwik8 import device as machine
from megalodon_enwik8.benchmark.operations import KERNEL_NAMES, Operations, kernels
from megalodon_enwik8.config import MODELS, ExperimentConfig, make_config
from megalodon_enwik8.distributed import World, join
from megalodon_enwik8.models import (
    build_model,
    byte_losses,
    compile_layers,
    decoder_layers,
    keeps_a_state,
    new_state,
)
from megalodon_enwik8.safety import UserError
from megalodon_enwik8.training import make_optimizer, train_step

PROCESSES = 2  # of `scale`

# A Megalodon reads a prompt so many tokens at a time, which bounds its memory.
PREFILL_PIECE = 65_536

Figures = dict[str, Any]
Step = Callable[[], Any]


@dataclass(frozen=True)
class Task:
    """What to measure. Lengths are in bytes.

    kind: "turns": steps of both models by turns, and the products of each. "train": the first
    step and the fastest. "decode": reading a prompt of `context` bytes, then writing on. "scale":
    steps of one process and of PROCESSES by turns, in which `chunk_parallel` share each sequence.
    "count": operations, and kernels of compiled code, on the CPU.
    tokens: in a step, in sequences of `context`, at least one; `micro_batch` of them at a time.
    repetitions: after a first one; in "train" and "decode", none begins after so many `seconds`.
    """

    kind: str
    model: str  # "both" for turns
    context: int
    tokens: int
    repetitions: int
    seconds: float = 60
    micro_batch: int | None = None  # None: all
    layers: int | None = None  # None: the comparison's
    chunk_size: int | None = None  # None: the comparison's
    new_tokens: int = 0
    use_autocast: bool = True
    compile: bool | Literal["graphs"] = False
    gradient_checkpointing: bool = False
    chunk_parallel: int | None = None

    def config(self, model: str) -> ExperimentConfig:
        """The widths of the comparison, with the task's depth and lengths."""
        sequences = max(1, self.tokens // self.context)
        micro_batch = self.micro_batch or sequences
        values: dict[str, Any] = {
            "run_dir": "unused",
            "model": model,
            "seq_len": self.context,
            "batch_size": micro_batch,
            "grad_accum_every": sequences // micro_batch,
            "use_autocast": self.use_autocast,
            "compile": self.compile,
            "gradient_checkpointing": self.gradient_checkpointing,
        }
        if model == "megalodon":
            values |= {"num_layers": self.layers, "chunk_size": self.chunk_size}
            values["chunk_parallel"] = self.chunk_parallel
        else:
            values |= {"depth": self.layers, "ffn_dim_multiplier": 2.67}
        given = {key: value for key, value in values.items() if value is not None}
        return make_config(given, "the benchmark")


def measure_apart(task: Task, limit: float, cache: str) -> Figures:
    """The task's figures, taken by a fresh process; or, under "failed", why there are none.

    limit: in seconds; cache: a folder for compiled code, in place of the user's own.
    """
    environment = {
        **os.environ,
        "TORCHINDUCTOR_CACHE_DIR": cache,
        "TRITON_CACHE_DIR": f"{cache}/triton",
    }
    launch: list[str] = []
    if task.kind == "scale":
        launch = ["torch.distributed.run", "--standalone", f"--nproc_per_node={PROCESSES}", "-m"]
        environment["OMP_NUM_THREADS"] = "1"
    if task.kind == "count":
        environment |= {"FORCE_DEVICE": "cpu", **KERNEL_NAMES}
    module = [*launch, "megalodon_enwik8.benchmark"]
    command = [sys.executable, "-m", *module, "task", json.dumps(asdict(task))]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            stdout, stderr = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            process.terminate()  # not kill: torchrun has processes of its own to end
            return {"failed": f"took more than {limit:g} s"}
    if process.returncode < 0:
        hint = ", as the system does when memory runs out" if process.returncode == -9 else ""
        return {"failed": f"killed by signal {-process.returncode}{hint}"}
    if process.returncode:
        lines = stderr.strip().splitlines() or [f"exit code {process.returncode}"]
        said = [line for line in lines if line.startswith("error: ")]  # torchrun says more behind
        return {"failed": [*lines, *said][-1].removeprefix("error: ")}
    figures: Figures = json.loads(stdout.splitlines()[-1])
    return figures


def measure(task: Task) -> Figures:
    """The task's figures, taken by this process. Raises UserError where memory runs out."""
    machine.keep_freed_memory()
    device = machine.choose_device()
    kinds = {"turns": _turns, "train": _train, "decode": _decode, "scale": _scale, "count": _count}
    try:
        figures = kinds[task.kind](task, device)
    except Exception as error:
        if machine.ran_out_of_memory(error):
            raise UserError("out of memory") from None
        raise
    return {
        **figures,
        "peak_memory_bytes": machine.peak_memory_bytes(device),
        "device": machine.device_name(device),
        "torch": torch.__version__,
    }


def _turns(task: Task, device: torch.device) -> Figures:
    """Of each model a step, and its products, which bound it; and the ratio of the models."""
    steps, products = [], []
    for name in MODELS:
        config = task.config(name)
        model = _build(config, device)
        steps.append(_stepper(model, config))
        products.append(_matrix_products(model, config))
    # In this order the steps are next to each other, and each is next to its products.
    times = by_turns([products[0], *steps, products[1]], task.repetitions, device)
    figures: Figures = {"time": ratio(times[1], times[2])}
    for name, step, bound in zip(MODELS, times[1:3], times[::3], strict=True):
        figures[name] = {
            "step_seconds": median(step),
            "step_seconds_least": min(step),
            "tokens_per_second": task.tokens / median(step),
            "matrix_products_seconds": median(bound),
            "step_over_matrix_products": ratio(step, bound),
        }
    return figures


def by_turns(functions: Sequence[Step], rounds: int, device: torch.device) -> list[list[float]]:
    """Seconds of each function's calls; one round more, first, is not counted."""
    times = [[_seconds(function, device) for function in functions] for _ in range(rounds + 1)]
    return [list(column) for column in zip(*times[1:], strict=True)]


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The median over neighbouring pairs."""
    return median(a / b for a, b in zip(ours, theirs, strict=True))


def _train(task: Task, device: torch.device) -> Figures:
    """The first step and the fastest: a machine's other work can only make a step slower."""
    config = task.config(task.model)
    times = _repeat(_stepper(_build(config, device), config), task, device)
    return {
        "rows": config.sequences_per_step,
        "first_step_seconds": times[0],
        "compile_seconds": max(0.0, times[0] - times[1]) if task.compile else None,
        "step_seconds": min(times),
        "steps": len(times),
        "tokens_per_second": config.sequences_per_step * task.context / min(times),
    }


def _scale(task: Task, device: torch.device) -> Figures:
    """The same step of one process, of all by data and of all along time, as far as they can."""
    config = task.config("megalodon")
    with join(device) as every:

        def whole_step(world: World) -> Step:
            step = _stepper(_build(config, device), config, world)

            def function() -> None:
                if world.size > 1 or every.is_main:  # who waits computes nothing
                    step()
                every.wait()

            return function

        worlds = {"alone": World(device)}
        if config.sequences_per_step % every.size == 0:
            worlds = {"data": World(device, every.rank, every.size), **worlds}
        if config.chunk_parallel > 1:
            worlds["time"] = World(device, every.rank, every.size, config.chunk_parallel)
        # In this order each is next to the one that is alone.
        steps = [whole_step(world) for world in worlds.values()]
        times = dict(zip(worlds, by_turns(steps, task.repetitions, device), strict=True))
        figures: Figures = {"processes": every.size}
        for way, seconds in times.items():
            efficiency = ratio(times["alone"], seconds) / worlds[way].size
            figures[way] = {"step_seconds": median(seconds), "efficiency": efficiency}
        return figures


@torch.no_grad()
def _decode(task: Task, device: torch.device) -> Figures:
    """Reading a prompt and writing greedily, in float32 as inference.py does, one row."""
    model = _build(task.config(task.model), device).eval()
    prompt = torch.randint(256, (1, task.context), device=device)
    token = prompt[:, -1:]
    cache: Any = None

    def read() -> None:
        nonlocal cache
        cache = new_state(model) if keeps_a_state(model) else None
        for piece in prompt.split(PREFILL_PIECE if keeps_a_state(model) else task.context, dim=1):
            output = model(piece, use_cache=True, logits_to_keep=1, **{CACHE_NAME: cache})
            cache = output[CACHE_NAME]

    def write() -> None:
        nonlocal token
        output = model(token, use_cache=True, logits_to_keep=1, **{CACHE_NAME: cache})
        token = output.logits[:, -1:].argmax(-1)

    reading = min(_repeat(read, task, device))
    if task.compile:
        for layer in decoder_layers(model):
            layer.compile()
        for _ in range(8):  # among them one for a first size, and one for all others
            write()
    writing = median(_seconds(write, device) for _ in range(task.new_tokens))
    if keeps_a_state(model):
        state_bytes = cache.nbytes
    else:
        state_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    return {
        "prefill_seconds": reading,
        "prefill_tokens_per_second": task.context / reading,
        "decode_seconds": writing,
        "decode_tokens_per_second": 1 / writing,
        "state_bytes": state_bytes,
    }


def _count(task: Task, device: torch.device) -> Figures:
    """By name: a block's operations and kernels, forward and backward, and a whole step's."""
    with as_on_a_gpu():
        config = task.config(task.model)
        step = _stepper(_build(config, device), config)
        step()  # makes the optimizer's moments
        with Operations() as whole:
            step()
        forward, backward = _passes(replace(task, layers=1, compile=True))
        figures = {
            **block_operations(task),
            "step": whole.found,
            "kernels_forward": kernels(forward),
            "kernels_backward": kernels(backward),
        }
    return {part: dict(found.most_common()) for part, found in figures.items()}


def block_operations(task: Task) -> dict[str, Counter[str]]:
    """Of one more layer, where there is one."""
    counts = []
    for layers in (1, 2):
        passes = _passes(replace(task, layers=layers))
        for run_pass in passes:
            with Operations() as counter:
                run_pass()
            counts.append(counter.found)
    return {"forward": counts[2] - counts[0], "backward": counts[3] - counts[1]}


def as_on_a_gpu() -> AbstractContextManager[Any]:
    """While the block runs, attention is one operation, as it is on a GPU."""
    return patch.object(chunk_attention, "SCORES_LIMIT", 0)


def _passes(task: Task) -> tuple[Step, Step]:
    """Forward and backward of a model that has made the first ones."""
    config = task.config(task.model)
    model = build_model(config)
    compile_layers(model, config)
    batch = torch.zeros(config.batch_size, config.seq_len + 1, dtype=torch.int64)
    losses: list[torch.Tensor] = []

    def forward() -> None:
        with machine.autocast(batch.device, config.use_autocast):
            losses.append(byte_losses(model, batch).sum())

    def backward() -> None:
        losses.pop().backward()

    forward()
    backward()
    model.zero_grad()
    return forward, backward


def _build(config: ExperimentConfig, device: torch.device) -> PreTrainedModel:
    model = build_model(config)
    model.to(device)  # type: ignore[arg-type]
    return model


def _stepper(model: PreTrainedModel, config: ExperimentConfig, world: World | None = None) -> Step:
    """A function that trains the model for one step of random bytes: all, or the world's share."""
    device = next(model.parameters()).device
    world = world or World(device)
    compile_layers(model.train(), config)
    learner = world.distribute(model, config)
    optimizer = make_optimizer(model, config)
    shape = (len(world.sequences(config.sequences_per_step)), config.seq_len + 1)
    batch = world.part(torch.randint(256, shape, device=device))

    def step() -> None:
        with world.sharing_time(model):
            train_step(learner, optimizer, batch, config, world)

    return step


def _matrix_products(model: nn.Module, config: ExperimentConfig) -> Step:
    """A step's products with weight matrices alone, in its precision: forward, three times over.

    A backward pass has two products of the same size for each. Attention, the moving average,
    and everything that is not a product with a weight matrix are left out.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    dtype = torch.bfloat16 if config.use_autocast else torch.float32
    weights = [layer.weight.detach().to(dtype) for layer in layers]
    widths = {weight.shape[1] for weight in weights}
    rows = config.batch_size * config.seq_len
    x = {width: torch.randn_like(weights[0].new_empty(rows, width)) for width in widths}

    def products() -> None:
        for _ in range(3 * config.grad_accum_every):
            for weight in weights:
                F.linear(x[weight.shape[1]], weight)

    return products


def _repeat(function: Step, task: Task, device: torch.device) -> list[float]:
    """Seconds of each call; where the first one compiles, there is a second in any case."""
    times: list[float] = []
    least = 1 + bool(task.compile)
    while len(times) < least or (len(times) <= task.repetitions and sum(times) < task.seconds):
        times.append(_seconds(function, device))
    return times


def _seconds(function: Step, device: torch.device) -> float:
    wait = getattr(torch, device.type).synchronize
    wait()
    began = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - began

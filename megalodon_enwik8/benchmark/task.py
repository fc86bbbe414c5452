"""One task of the benchmark: what to measure, in a process of its own, and how."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from megalodon.compat import CACHE_NAME
from megalodon.ops import cema_blocks, chunk_attention, timestep_norm
from megalodon_enwik8 import device as machine
from megalodon_enwik8.benchmark.operations import DTYPE_COPY, KERNEL_NAMES, Operations, kernels
from megalodon_enwik8.config import MODELS, ExperimentConfig, has_key, make_config
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
WAYS = ("one process", "data parallel", "along time")  # to make its step
BOTH = "both"
RATIO = "megalodon / llama"
NEW_BYTES = 100  # that `decode` writes
PATIENCE_S = 60  # a process begins no further call after so long

# A Megalodon reads a prompt so many tokens at a time, which bounds its memory.
PREFILL_PIECE = 65_536

Figures = dict[str, dict[str, Any]]
"""What was measured, by its title, of each model (or way to spread a step over processes)."""
Step = Callable[[], Any]


@dataclass(frozen=True)
class Task:
    """What to measure.

    kind: "steps": of both models by turns, with the products of each. "first": a model's first
    step; "second": the same on the compiled code that was left. "train": its fastest step.
    "decode": reading a prompt of seq_len bytes, then writing on. "scale": steps of one process and
    of PROCESSES by turns. "count": operations, and kernels of compiled code, on the CPU.
    model: BOTH for steps.
    settings: keys of a config, those that a model lacks left out; and step_bytes, in a step, in
    sequences of seq_len, at least one, batch_size of them at a time or all.
    rounds: calls after a first one, which is not counted where rounds are by turns.
    """

    kind: str
    model: str
    settings: dict[str, Any]
    rounds: int = 1

    def config(self, model: str) -> ExperimentConfig:
        """Of a run of a model with the settings. Raises UserError where there can be none."""
        own = {key: value for key, value in self.settings.items() if has_key(model, key)}
        own |= {"run_dir": "unused", "model": model, "grad_accum_every": 1}
        if model == "llama":
            own.setdefault("ffn_dim_multiplier", 2.67)  # the comparison's
        step_bytes = own.pop("step_bytes")
        if type(step_bytes) is not int or step_bytes < 1:
            raise UserError(f"command line: step_bytes={step_bytes}: must be a whole number >= 1")
        whole = make_config(own, "command line")
        if whole.use_autocast == "auto":
            raise UserError("command line: use_autocast=auto: say true or false, for a row to tell")
        sequences = max(1, step_bytes // whole.seq_len)
        size = min(whole.batch_size, sequences)
        if sequences % size:
            raise UserError(f"batch_size={size}: does not divide {sequences} sequences a step")
        own |= {"batch_size": size, "grad_accum_every": sequences // size}
        return make_config(own, "command line")


def measure_apart(task: Task, limit: float, cache: str) -> dict[str, Any]:
    """Figures, taken by a fresh process; or, under "failed", why there are none.

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
    """Figures, taken by this process. Raises UserError where memory runs out."""
    machine.keep_freed_memory()
    device = machine.choose_device()
    kinds = {
        "steps": _steps, "first": _first, "second": _first, "train": _train,
        "decode": _decode, "scale": _scale, "count": _count,
    }  # fmt: skip
    try:
        return kinds[task.kind](task, device)
    except Exception as error:
        if machine.ran_out_of_memory(error):
            raise UserError("out of memory") from None
        raise


def _steps(task: Task, device: torch.device) -> Figures:
    """Of each model a step, and its products, which bound it; and the ratio of the models."""
    steps, products = [], []
    for name in MODELS:
        config = task.config(name)
        model = build_model(config, device)
        steps.append(_stepper(model, config))
        products.append(_matrix_products(model, config))
    # In this order the steps are next to each other, and each is next to its products.
    times = by_turns([products[0], *steps, products[1]], task.rounds, device)
    figures: Figures = {
        name: {
            "step, s": median(step),
            "bytes/s": task.config(name).tokens_per_step / median(step),
            "step / its matrix products": ratio(step, bound),
        }
        for name, step, bound in zip(MODELS, times[1:3], times[::3], strict=True)
    }
    return {**figures, RATIO: {"step, s": ratio(times[1], times[2])}}


def by_turns(functions: Sequence[Step], rounds: int, device: torch.device) -> list[list[float]]:
    """Seconds of each function's calls; one round more, first, is not counted."""
    times = [[_seconds(function, device) for function in functions] for _ in range(rounds + 1)]
    return [list(column) for column in zip(*times[1:], strict=True)]


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The median over neighbouring pairs."""
    return median(a / b for a, b in zip(ours, theirs, strict=True))


def _first(task: Task, device: torch.device) -> Figures:
    """In a fresh process."""
    config = task.config(task.model)
    seconds = _seconds(_stepper(build_model(config, device), config), device)
    if task.kind == "second":
        return {task.model: {"the second time, s": seconds}}
    return {task.model: {"first step, s": seconds, **_peak(device)}}


def _train(task: Task, device: torch.device) -> Figures:
    """The fastest step: a machine's other work can only make one slower."""
    config = task.config(task.model)
    seconds = min(_repeat(_stepper(build_model(config, device), config), task, device))
    return {task.model: {"bytes/s": config.tokens_per_step / seconds, **_peak(device)}}


def _peak(device: torch.device) -> dict[str, float]:
    """Nothing where the system does not tell."""
    peak = machine.peak_memory_bytes(device)
    return {} if peak is None else {"peak memory, MB": peak / 1e6}


def _scale(task: Task, device: torch.device) -> Figures:
    """The same step of one process, of all by data and of all along time, as far as they can."""
    config = task.config("megalodon")
    with join(device) as every:

        def whole_step(world: World) -> Step:
            step = _stepper(build_model(config, device), config, world)

            def function() -> None:
                if world.size > 1 or every.is_main:  # who waits computes nothing
                    step()
                every.wait()

            return function

        alone, data, time = WAYS
        worlds = {alone: World(device)}
        worlds[time] = World(device, every.rank, every.size, config.chunk_parallel)
        if config.sequences_per_step % every.size == 0:
            worlds = {data: World(device, every.rank, every.size), **worlds}
        # In this order each is next to the one that is alone.
        steps = [whole_step(world) for world in worlds.values()]
        times = dict(zip(worlds, by_turns(steps, task.rounds, device), strict=True))
        return {
            way: {
                "step, s": median(times[way]),
                "efficiency": ratio(times[alone], times[way]) / worlds[way].size,
            }
            for way in WAYS
            if way in times
        }


@torch.no_grad()
def _decode(task: Task, device: torch.device) -> Figures:
    """Reading a prompt and writing greedily, in float32 as inference.py does, one row."""
    config = task.config(task.model)
    model = build_model(config, device).eval()
    prompt = torch.randint(256, (1, config.seq_len), device=device)
    token = prompt[:, -1:]
    cache: Any = None

    def read() -> None:
        nonlocal cache
        cache = new_state(model) if keeps_a_state(model) else None
        for piece in prompt.split(PREFILL_PIECE if keeps_a_state(model) else len(prompt[0]), dim=1):
            output = model(piece, use_cache=True, logits_to_keep=1, **{CACHE_NAME: cache})
            cache = output[CACHE_NAME]

    def write() -> None:
        nonlocal token
        output = model(token, use_cache=True, logits_to_keep=1, **{CACHE_NAME: cache})
        token = output.logits[:, -1:].argmax(-1)

    reading = min(_repeat(read, task, device))
    if config.compile:
        for layer in decoder_layers(model):
            layer.compile()
        for _ in range(8):  # among them one for a first size, and one for all others
            write()
    writing = median(_seconds(write, device) for _ in range(NEW_BYTES))
    if keeps_a_state(model):
        state_bytes = cache.nbytes
    else:
        state_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    figures = {
        "prompt bytes/s": config.seq_len / reading,
        "new bytes/s": 1 / writing,
        "state, MB": state_bytes / 1e6,
    }
    return {task.model: figures | _peak(device)}


def _count(task: Task, device: torch.device) -> Figures:
    """Of a block, forward and backward, and of a whole step; the block's also by name."""
    with as_on_a_gpu():
        config = task.config(task.model)
        step = _stepper(build_model(config, device), config)
        step()  # makes the optimizer's moments
        with Operations() as whole:
            step()
        by_name = block_operations(task)
        figures: dict[str, Any] = {}
        for part, names in by_name.items():
            figures[f"operations {part}"] = names.total()
            figures[f"dtype copies {part}"] = names[DTYPE_COPY]
        figures["operations of a step"] = whole.found.total()
        compiled = replace(task, settings=task.settings | layers(1) | {"compile": True})
        for part, run_pass in zip(by_name, _passes(compiled), strict=True):
            figures[f"compiled kernels {part}"] = kernels(run_pass).total()
    return {
        task.model: figures | {"by_name": {k: dict(v.most_common()) for k, v in by_name.items()}}
    }


def block_operations(task: Task) -> dict[str, Counter[str]]:
    """Of one more layer, where there is one."""
    counts = []
    for depth in (1, 2):
        for run_pass in _passes(replace(task, settings=task.settings | layers(depth))):
            with Operations() as counter:
                run_pass()
            counts.append(counter.found)
    return {"forward": counts[2] - counts[0], "backward": counts[3] - counts[1]}


def layers(depth: int) -> dict[str, int]:
    """The settings for so many, of either model."""
    return {"num_layers": depth, "depth": depth}


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """While the block runs, attention, a transposition, and mean and variance of a step are one
    operation each, as on a GPU."""
    with (
        patch.object(chunk_attention, "SCORES_LIMIT", 0),
        patch.object(cema_blocks, "TWO_COPIES_ON", ""),
        patch.object(timestep_norm, "SLOW_VAR_MEAN_ON", ""),
    ):
        yield


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


def _stepper(model: PreTrainedModel, config: ExperimentConfig, world: World | None = None) -> Step:
    """A function that trains the model for one step of random bytes: all, or the world's share."""
    device = next(model.parameters()).device
    world = world or World(device)
    compile_layers(model.train(), config, world.size)
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
    """Seconds of each call, at least two: the first one may compile."""
    times = [_seconds(function, device) for _ in range(2)]
    while len(times) <= task.rounds and sum(times) < PATIENCE_S:
        times.append(_seconds(function, device))
    return times


def _seconds(function: Step, device: torch.device) -> float:
    wait = getattr(torch, device.type).synchronize
    wait()
    began = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - began

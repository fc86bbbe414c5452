"""Training steps of both models of the comparison, alternating in one process.

Machines are noisy: what counts are the ratios of steps that ran next to each other.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from megalodon_enwik8.config import ExperimentConfig, make_config
from megalodon_enwik8.description import device_name
from megalodon_enwik8.errors import UserError
from megalodon_enwik8.files import atomic_write, make_folder
from megalodon_enwik8.models import build_model, compile_layers
from megalodon_enwik8.training import make_optimizer, train_step
from megalodon_enwik8.utils import choose_device, keep_freed_memory, peak_memory_bytes

SEQUENCES = 16
"""Sequences in a step, as the protocol has it."""

MODELS = ("megalodon", "llama")


def run(options: Namespace) -> int:
    """Measure as asked, print the table, and write train.json and train.md."""
    for size in options.micro_batches:
        if SEQUENCES % size:
            raise UserError(f"--micro-batches {size}: must divide {SEQUENCES}, a step's sequences")
    keep_freed_memory()
    if options.probe:
        print(json.dumps(_probe(options)))
        return 0
    device = choose_device()
    if options.profile:
        print(_profile(options, device))
        return 0
    folder = Path(options.out)
    make_folder(folder, "--out")
    report: dict[str, Any] = {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "sequences": SEQUENCES,
        "seq_len": options.seq_len,
        "dtype": "bfloat16 autocast",
        "timed_steps": options.steps,
        "rows": [],
        "ratios": [],
    }
    total = len(options.micro_batches) * (1 + 2 * len(options.modes))
    with tqdm(total=total, unit="measurement", disable=None) as bar:
        for size in options.micro_batches:
            _measure(report, size, options, device, bar)
    text = _table(report)
    print(text)
    for name, content in (("train.json", json.dumps(report, indent=2) + "\n"), ("train.md", text)):
        with atomic_write(folder / name) as file:
            file.write(content.encode())
    print(f"written: {folder / 'train.json'}, {folder / 'train.md'}")
    return 0


def _measure(
    report: dict[str, Any], size: int, options: Namespace, device: torch.device, bar: tqdm
) -> None:
    """One micro-batch size: all models and modes by turns, then each in a fresh process."""
    bar.set_postfix_str(f"micro-batch {size}")
    steps = {
        (name, mode): _stepper(name, mode, size, options.seq_len, device)
        for mode in options.modes
        for name in MODELS
    }
    bounds = {name: _matrix_products(name, size, options.seq_len, device) for name in MODELS}
    times = _alternate({**steps, **bounds}, options.steps, device)
    tokens = SEQUENCES * options.seq_len
    bar.update()
    for mode in options.modes:
        for name in MODELS:
            step, bound = times[name, mode], times[name]
            report["rows"].append(
                {
                    "model": name,
                    "mode": mode,
                    "micro_batch": size,
                    "step_seconds": statistics.median(step),
                    "step_seconds_least": min(step),
                    "tokens_per_second": tokens / statistics.median(step),
                    "matrix_products_seconds": statistics.median(bound),
                    "step_over_matrix_products": _ratio(step, bound),
                    **_ask_fresh_process(name, mode, size, options),
                }
            )
            bar.update()
        memory = {row["model"]: row["peak_memory_bytes"] for row in report["rows"][-2:]}
        report["ratios"].append(
            {
                "mode": mode,
                "micro_batch": size,
                "time": _ratio(times["megalodon", mode], times["llama", mode]),
                "memory": memory["megalodon"] / memory["llama"],
            }
        )


def _ratio(ours: list[float], theirs: list[float]) -> float:
    """The median over neighbouring pairs."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def _config(name: str, size: int, seq_len: int, *, compiled: bool = False) -> ExperimentConfig:
    """The sizes of the comparison."""
    sizes = {"ffn_dim_multiplier": 2.67} if name == "llama" else {}
    return make_config(
        {
            **sizes,
            "run_dir": "runs/benchmark",
            "model": name,
            "batch_size": size,
            "grad_accum_every": SEQUENCES // size,
            "seq_len": seq_len,
            "compile": compiled,
        },
        "the benchmark",
    )


def _stepper(
    name: str, mode: str, size: int, seq_len: int, device: torch.device
) -> Callable[[], Any]:
    """A function that trains a fresh model for one step of random bytes."""
    config = _config(name, size, seq_len, compiled=mode == "compiled")
    model = build_model(config).train()
    model.to(device)
    compile_layers(model, config, config.num_batches)
    optimizer = make_optimizer(model, config)
    batch = torch.randint(0, 256, (SEQUENCES, seq_len + 1), device=device)
    return lambda: train_step(model, optimizer, batch, config)


def _matrix_products(
    name: str, size: int, seq_len: int, device: torch.device
) -> Callable[[], None]:
    """The bound: a step's products with weight matrices, forward, three times over.

    A backward pass has two products of the same size for each. Attention, the moving average,
    and everything that is not a product with a weight matrix are left out.
    """
    model = build_model(_config(name, size, seq_len))
    shapes = [m.weight.shape for m in model.modules() if isinstance(m, nn.Linear)]
    weights = [torch.randn(shape, device=device, dtype=torch.bfloat16) for shape in shapes]
    inputs = {
        width: torch.randn(size * seq_len, width, device=device, dtype=torch.bfloat16)
        for width in {shape[1] for shape in shapes}
    }

    def products() -> None:
        for _ in range(3 * (SEQUENCES // size)):
            for weight in weights:
                F.linear(inputs[weight.shape[1]], weight)

    return products


def _alternate(
    functions: dict[Any, Callable[[], Any]], rounds: int, device: torch.device
) -> dict[Any, list[float]]:
    """Seconds of each function, called by turns; one round more, first, is not counted."""
    times: dict[Any, list[float]] = {key: [] for key in functions}
    for counted in [False] + [True] * rounds:
        for key, function in functions.items():
            seconds = _seconds(function, device)
            if counted:
                times[key].append(seconds)
    return times


def _seconds(function: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def _ask_fresh_process(name: str, mode: str, size: int, options: Namespace) -> dict[str, Any]:
    """Peak memory and first step of one model in a process, and a compiler cache, of its own."""
    command = [sys.executable, "-m", "megalodon_enwik8.benchmark", "train"]
    command += ["--probe", f"{name},{mode}", "--micro-batches", str(size)]
    command += ["--seq-len", str(options.seq_len)]
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or [f"exit {result.returncode}"])[-1]
        raise UserError(f"measuring {name}, {mode}, micro-batch {size} failed: {reason}")
    answer: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return answer


def _probe(options: Namespace) -> dict[str, Any]:
    """What :func:`_ask_fresh_process` asks for."""
    device = choose_device()
    name, mode = options.probe.split(",")
    step = _stepper(name, mode, options.micro_batches[0], options.seq_len, device)
    first, second = _seconds(step, device), _seconds(step, device)
    return {
        "first_step_seconds": first,
        "compile_seconds": max(0.0, first - second) if mode == "compiled" else None,
        "peak_memory_bytes": peak_memory_bytes(device),
    }


def _profile(options: Namespace, device: torch.device) -> str:
    """Where one Megalodon step's time goes, by operation and by input shapes."""
    step = _stepper(
        "megalodon", options.modes[0], options.micro_batches[0], options.seq_len, device
    )
    step()
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, record_shapes=True) as profile:
        step()
    order = f"self_{device.type}_time_total"
    by_operation = profile.key_averages().table(sort_by=order, row_limit=25)
    by_shape = profile.key_averages(group_by_input_shape=True).table(sort_by=order, row_limit=25)
    return f"{by_operation}\n{by_shape}"


def _table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    lines = [
        f"{report['sequences']} x {report['seq_len']} bytes a step, {report['dtype']}, "
        f"{report['device']}, {report['threads']} threads, PyTorch {report['torch']}.",
        "",
        "| model | mode | micro-batch | step s | bytes/s | step / its matrix products "
        "| peak MB | first step s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        memory = row["peak_memory_bytes"]
        lines.append(
            f"| {row['model']} | {row['mode']} | {row['micro_batch']} | {row['step_seconds']:.3f} "
            f"| {row['tokens_per_second']:,.0f} | {row['step_over_matrix_products']:.2f} "
            f"| {memory / 1e6:,.0f} | {row['first_step_seconds']:.1f} |"
        )
    lines += ["", "| Megalodon / Llama | micro-batch | time | memory |", "|---|---|---|---|"]
    for row in report["ratios"]:
        lines.append(
            f"| {row['mode']} | {row['micro_batch']} | {row['time']:.2f} | {row['memory']:.2f} |"
        )
    lines += ["", "Each model at its own best micro-batch:", ""]
    for mode in dict.fromkeys(row["mode"] for row in report["rows"]):
        ours, theirs = (_best(report["rows"], name, mode) for name in MODELS)
        lines.append(
            f"- {mode}: Megalodon {ours['step_seconds']:.3f} s at {ours['micro_batch']}, Llama "
            f"{theirs['step_seconds']:.3f} s at {theirs['micro_batch']}: "
            f"{ours['step_seconds'] / theirs['step_seconds']:.2f}"
        )
    return "\n".join(lines) + "\n"


def _best(rows: list[dict[str, Any]], model: str, mode: str) -> dict[str, Any]:
    """The row of a model's own best micro-batch."""
    mine = [row for row in rows if (row["model"], row["mode"]) == (model, mode)]
    return min(mine, key=lambda row: float(row["step_seconds"]))

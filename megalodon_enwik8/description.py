"""What a run is, for its reader at the start and for its folder."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import PreTrainedModel

from megalodon_enwik8.config import ExperimentConfig
from megalodon_enwik8.data import Corpus
from megalodon_enwik8.models import count_parameters, decoder_layers


def summarize(
    config: ExperimentConfig,
    model: PreTrainedModel,
    corpus: Corpus,
    device: torch.device,
    compiled: str,
) -> str:
    """The lines that open a run's output."""
    layers = decoder_layers(model)
    in_layers = sum(count_parameters(layer) for layer in layers)
    total = count_parameters(model)
    precision = "bfloat16 autocast" if config.use_autocast else "float32"
    rows = {
        "model": f"{config.model}, {total:,} parameters",
        "": f"{len(layers)} layers x {count_parameters(layers[0]):,} + {total - in_layers:,}",
        "corpus": f"{corpus.name}: {len(corpus.train):,} bytes to train on, "
        f"{len(corpus.val):,} to validate",
        "step": f"{config.sequences_per_step} sequences x {config.seq_len} bytes "
        f"({config.batch_size} at a time), {config.num_batches} steps"
        + (", each from the state before" if config.carry_state else ""),
        "device": f"{device_name(device)}, {precision}",
        "compile": compiled,
        "folder": config.run_dir,
    }
    return "\n".join(f"{name:<8}{text}" for name, text in rows.items())


def environment(model: PreTrainedModel, corpus: Corpus) -> dict[str, Any]:
    """What stays the same through a run, for environment.json."""
    return {
        "corpus": {
            "name": corpus.name,
            "sha256": corpus.sha256,
            "train_bytes": len(corpus.train),
            "val_bytes": len(corpus.val),
        },
        "parameters": count_parameters(model),
    }


def session(device: torch.device, compiled: str, start: int) -> dict[str, Any]:
    """What may differ each time a run is resumed, for environment.json."""
    return {
        "began": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "from_step": start,
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "compile": compiled,
    }


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    if device.type == "cpu":
        return f"cpu ({torch.get_num_threads()} of {os.cpu_count()} cores)"
    return device.type


def _processor() -> str:
    """What the CPU calls itself."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in text.splitlines() if "model name" in line]
    return names[0] if names else platform.processor()


def _commit() -> str | None:
    """The commit of this source tree, with `+` when files differ from it; None outside git."""
    folder = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ("git", "-C", str(folder), *arguments),
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None

"""Checkpoints: data, not code; written whole, and known to be whole when read.

A checkpoint is what torch.save makes of a plain dict, so torch.load(..., weights_only=True)
reads it anywhere. Such a file is a zip archive with a CRC-32 for every record: checking these
first recognises any truncated or damaged file.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch
from pydantic import NonNegativeInt
from pydantic.dataclasses import dataclass

from megalodon_enwik8.config import ExperimentConfig, make_config
from megalodon_enwik8.safety import UserError, atomic_write

KIND = {"format": "megalodon-enwik8 checkpoint", "version": 2}


@dataclass(frozen=True, config={"strict": True})
class Checkpoint:
    """A run after `step` training steps.

    There is no generator state and no position in the data: batches, dropout and samples are
    pure functions of (seed, step).
    """

    config: ExperimentConfig
    step: NonNegativeInt
    corpus_sha256: str
    progress: dict[str, Any]  # what the loop counts: see training.Progress
    model_state: dict[str, Any]
    optimizer_state: dict[str, Any] | None  # None: for use, not for resuming
    path: Path = Path()  # where it was read from


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write aside, flush to disk, rename. Raises UserError when a number in it is not finite; an
    old file at `path` stays."""
    moments = (checkpoint.optimizer_state or {"state": {}})["state"].values()
    for tensors in (checkpoint.model_state, *moments):
        if not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
            raise UserError(
                f"step {checkpoint.step}: a weight is not finite, nothing was saved; start again "
                "with a lower learning_rate"
            )
    content = {**vars(checkpoint), "config": checkpoint.config.used(), **KIND}
    del content["path"]
    with atomic_write(path) as file:
        torch.save(content, file)


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint onto the CPU. Nothing in the file is executed.

    Raises UserError for a file that is missing, truncated, damaged, of another kind or version.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint; train.py writes them into run_dir")
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise ValueError(f"{damaged} has another CRC")
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        for name, value in KIND.items():
            found = content.pop(name)
            # The type first: a tensor's comparison is as long as the tensor says that it is.
            if type(found) is not type(value) or found != value:
                raise ValueError(f"its {name} is not {value!r}")
        content["config"] = make_config(content["config"], "its config")
        return Checkpoint(**content, path=path)
    except Exception as error:  # zipfile and pickle raise whatever the damage leads them to
        raise UserError(
            f"{path}: truncated, damaged, of another version or not a checkpoint of train.py: it "
            f"was not loaded; name another .pt file of the run folder ({error})"
        ) from error

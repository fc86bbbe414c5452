"""Checkpoints: data, not code; written whole, and known to be whole when read.

A checkpoint is what torch.save makes of a plain dict, so torch.load(..., weights_only=True)
reads it anywhere. Such a file is a zip archive with a CRC-32 for every record: checking these
first recognises any truncated or damaged file.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from megalodon_enwik8.config import ExperimentConfig, make_config
from megalodon_enwik8.safety import UserError, atomic_write

FORMAT = "megalodon-enwik8 checkpoint"
VERSION = 2


@dataclass(frozen=True)
class Checkpoint:
    """A run after `step` training steps.

    There is no generator state and no position in the data: batches, dropout and samples are
    pure functions of (seed, step).
    """

    config: dict[str, Any]
    step: int
    corpus_sha256: str
    progress: dict[str, Any]  # what the loop counts: see training.Progress
    model_state: dict[str, Any]
    optimizer_state: dict[str, Any] | None  # None: for use, not for resuming

    def experiment(self, path: str | Path) -> ExperimentConfig:
        """The config of the run; a UserError names `path`."""
        return make_config(self.config, str(path))


KINDS = {"config": dict, "step": int, "corpus_sha256": str, "progress": dict, "model_state": dict}


def save_checkpoint(path: str | Path, checkpoint: Checkpoint) -> None:
    """Write aside, flush to disk, rename. Raises UserError when a number in it is not finite; an
    old file at `path` stays."""
    content = {field.name: getattr(checkpoint, field.name) for field in fields(checkpoint)}
    if not all(torch.isfinite(tensor).all() for tensor in _tensors(content)):
        raise UserError(
            f"step {checkpoint.step}: a weight is not finite, nothing was saved; start again with "
            "a lower learning_rate"
        )
    with atomic_write(path) as file:
        torch.save({"format": FORMAT, "version": VERSION, **content}, file)


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint onto the CPU. Nothing in the file is executed.

    Raises UserError for a file that is missing, truncated, damaged, of another kind or of a
    newer version.
    """
    path = Path(path)
    if not path.is_file():
        folder = path if path.is_dir() else path.parent
        beside = ", ".join(sorted(other.name for other in folder.glob("*.pt"))[-4:])
        there = f"{folder} holds {beside or 'none'}"
        raise UserError(f"{path}: no such checkpoint: {there}; train.py writes them into run_dir")
    path.open("rb").close()  # what the system has against reading it
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise ValueError(f"{damaged} has another CRC")
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        if content["format"] != FORMAT or content["version"] > VERSION:
            raise ValueError(f"{content['format']}, version {content['version']}")
        values = {field.name: content[field.name] for field in fields(Checkpoint)}
        fit = all(isinstance(values[name], kind) for name, kind in KINDS.items())
        if not fit or values["step"] < 0:
            raise TypeError("a field has the wrong type")
    except Exception as error:  # zipfile and pickle raise whatever the damage leads them to
        raise UserError(
            f"{path}: truncated, damaged, of a newer version or not a checkpoint of train.py: it "
            "was not loaded; name another .pt file of the run folder"
        ) from error
    config = values["config"]
    scale = config.get("ffn_dim_multiplier")
    if content["version"] == 1 and config.get("model") == "llama":
        # There it scaled a width of 2.67 dim.
        config["ffn_dim_multiplier"] = 2.67 * (scale if isinstance(scale, float) else 1.0)
    if content["version"] == 1:
        for key in ("carry_state", "carry_steps"):  # left the course of the weights alone if false
            if config.pop(key, None):
                raise UserError(f"{path}: trained with {key}, which is not served any more")
    return Checkpoint(**values)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """All tensors in nested dicts and lists."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (dict, list)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors(part)

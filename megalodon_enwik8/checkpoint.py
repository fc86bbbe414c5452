"""Checkpoints: data, not code; written whole, and known to be whole when read.

A checkpoint is what torch.save makes of a plain dict, so torch.load(..., weights_only=True)
reads it anywhere. Such a file is a zip archive with a CRC-32 for every record: checking these
first recognises any truncated or damaged file.
"""

from __future__ import annotations

import os
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megalodon_enwik8.config import ExperimentConfig, make_config
from megalodon_enwik8.errors import UserError, explain_os_error
from megalodon_enwik8.files import atomic_write

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
    carried_state: dict[str, Any] | None = None  # with carry_state: see CarriedState

    def experiment(self, path: str | Path) -> ExperimentConfig:
        """The config of the run; a UserError names `path`."""
        return make_config(self.config, str(path))


def save_checkpoint(path: str | Path, checkpoint: Checkpoint) -> None:
    """Write aside, flush to disk, rename.

    Raises UserError when the disk is full or not writable (an old file at `path` stays), or
    when a number in it is not finite.
    """
    content = {name: getattr(checkpoint, name) for name in _FIELDS}
    for name, tensor in _tensors(content):
        if not torch.isfinite(tensor).all():
            raise UserError(
                f"step {checkpoint.step}: {name} is not finite, nothing was saved; "
                f"start again with a lower learning_rate"
            )
    with atomic_write(path) as file:
        torch.save({"format": FORMAT, "version": VERSION, **content}, file)


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint onto the CPU. Nothing in the file is executed.

    Raises UserError for a file that is missing, truncated, damaged, of another kind or of a
    newer version, and for one whose numbers are not finite.
    """
    try:
        _check_archive(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns on its way to refusing odd files
            content = torch.load(path, map_location="cpu", weights_only=True)
        _check_tensors(content, path)
    except FileNotFoundError:
        raise _missing(Path(path)) from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder; name a checkpoint in it, as final.pt") from None
    except UserError:
        raise
    except Exception as error:
        explained = explain_os_error(error, path) if isinstance(error, OSError) else None
        raise explained or UserError(
            f"{path}: not a checkpoint, or it holds more than data: it was not loaded"
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path}: not a checkpoint of train.py")
    version = content.get("version")
    if not isinstance(version, int):
        raise UserError(f"{path}: damaged: its version is missing or of the wrong kind")
    if version > VERSION:
        raise UserError(
            f"{path}: written in format {version}, this program reads up to {VERSION}; update it"
        )
    values: dict[str, Any] = {name: content.get(name) for name in _FIELDS}
    for name, kinds in _FIELDS.items():
        if not isinstance(values[name], kinds):
            raise UserError(f"{path}: damaged: {name} is missing or of the wrong kind")
    if isinstance(values["step"], bool) or values["step"] < 0:
        raise UserError(f"{path}: damaged: step is {values['step']}")
    config = values["config"]
    scale = config.get("ffn_dim_multiplier")
    if version == 1 and config.get("model") == "llama" and isinstance(scale, (float, type(None))):
        # There it scaled a width of 2.67 dim.
        config["ffn_dim_multiplier"] = 2.67 * (1.0 if scale is None else scale)
    return Checkpoint(**values)


def _missing(path: Path) -> UserError:
    """Says what there is instead."""
    beside = sorted(other.name for other in path.parent.glob("*.pt"))
    if beside:
        more = f" and {len(beside) - 4} more" if len(beside) > 4 else ""
        remedy = f"the folder holds {', '.join(beside[-4:])}{more}"
    elif path.parent.is_dir():
        remedy = "the folder holds none; train.py writes them into run_dir"
    else:
        remedy = f"nor is there a folder {path.parent}; train.py makes one at run_dir"
    return UserError(f"{path}: no such checkpoint: {remedy}")


_FIELDS: dict[str, tuple[type, ...]] = {
    "config": (dict,),
    "step": (int,),
    "corpus_sha256": (str,),
    "progress": (dict,),
    "model_state": (dict,),
    "optimizer_state": (dict, type(None)),
    "carried_state": (dict, type(None)),
}


def _check_archive(path: str | Path) -> None:
    """Raise UserError unless `path` is an undamaged zip archive of uncompressed records."""
    if Path(path).is_dir():
        raise IsADirectoryError
    if Path(path).exists() and not Path(path).is_file():  # opening a pipe could wait for ever
        raise UserError(f"{path}: is not a regular file; name a checkpoint")
    damaged = UserError(
        f"{path}: truncated, damaged or not a checkpoint; name another .pt file of the run folder"
    )
    try:
        with zipfile.ZipFile(path) as archive:
            # torch.save does not compress; a record that claims to be is a bomb or a stranger.
            if any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist()):
                raise damaged
            if archive.testzip() is not None:
                raise damaged
    except (OSError, UserError):
        raise
    except Exception as error:
        # zipfile raises whatever the damage leads it to: BadZipFile, struct.error, KeyError ...
        raise damaged from error


def _check_tensors(content: Any, path: str | Path) -> None:
    """Raise UserError unless all tensors are dense, finite, and no larger than the file."""
    size = 0
    for name, tensor in _tensors(content):
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
            raise UserError(f"{path}: {name} is not a plain tensor: it was not loaded")
        size += tensor.numel() * tensor.element_size()
        # Tied weights are stored once under two names. A tensor that repeats a few numbers would
        # make a small file ask for any amount of memory.
        if size > 2 * os.path.getsize(path):
            raise UserError(f"{path}: {name} claims more than the file holds: it was not loaded")
        if not torch.isfinite(tensor).all():
            raise UserError(f"{path}: {name} is not finite: it was not loaded; use an earlier one")


def _tensors(content: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors in nested dicts, lists and tuples, in order, with the keys that lead there."""
    waiting: list[tuple[str, Any]] = [("", content)]
    seen: set[int] = set()  # a container may hold itself, or one many times
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, torch.Tensor):
            yield name, value
        elif isinstance(value, (dict, list, tuple)) and id(value) not in seen:
            seen.add(id(value))
            items = value.items() if isinstance(value, dict) else enumerate(value)
            before = f"{name}." if name else ""
            waiting += reversed([(f"{before}{key}", item) for key, item in items])

"""What runs leave, to compare, and how they are cut off."""

from pathlib import Path

import torch

from megalodon_enwik8.checkpoint import load_checkpoint
from megalodon_enwik8.run_folder import read_metrics

MEASURED = {"tokens_per_second", "seconds", "peak_memory_bytes"}


def ending(config):
    """What a run leaves, without what a clock or the machine decides."""
    folder = Path(config.run_dir)
    rows = [
        {key: value for key, value in row.items() if key not in MEASURED}
        for row in read_metrics(folder / "metrics.jsonl")
    ]
    return rows, load_checkpoint(folder / "final.pt").model_state


def assert_same_ending(one, other):
    (rows, weights), (other_rows, other_weights) = ending(one), ending(other)
    assert rows == other_rows
    assert list(weights) == list(other_weights)
    for name, weight in weights.items():
        assert torch.equal(weight, other_weights[name]), name


def checkpoints_of(config):
    """The checkpoints to resume from, oldest first."""
    return sorted(Path(config.run_dir).glob("checkpoint_*.pt"))


class Crash(Exception):
    pass

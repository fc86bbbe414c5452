"""`tracker: tensorboard`: what metrics.jsonl says, for who watches many runs at once."""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megalodon_enwik8.safety import UserError

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


def check_tracker(tracker: str) -> None:
    """Raise UserError if the tracker's package is not installed."""
    if tracker != "none" and find_spec(tracker) is None:
        raise UserError(f'tracker={tracker}: is not installed: pip install -e ".[track]"')


def open_board(folder: Path) -> SummaryWriter:
    """A new, empty board in the place of the one in `folder`, which said what metrics.jsonl did."""
    from torch.utils.tensorboard import SummaryWriter

    shutil.rmtree(folder, ignore_errors=True)
    # purge_step: a TensorBoard that is looking forgets what it saw of the old one.
    return SummaryWriter(folder, purge_step=0, flush_secs=30)


def show(board: SummaryWriter, row: dict[str, Any]) -> None:
    """Show a row of metrics.jsonl: its numbers as curves over the steps, its texts as texts."""
    for name, value in row.items():
        if isinstance(value, str):
            board.add_text(name, value, row["step"])
        elif value is not None and name != "step":
            board.add_scalar(name, value, row["step"])

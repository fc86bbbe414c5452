"""Pictures: matplotlib, an extra, is asked for only where one is wanted."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from megalodon_enwik8.errors import UserError
from megalodon_enwik8.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg", ".pdf")


def check_can_draw(path: str | Path) -> None:
    """Raise UserError unless a picture can be written to a file of this name: before the hours of
    work of which it is to be a picture."""
    if Path(path).suffix not in FORMATS:
        raise UserError(f"{path}: a picture's name must end in {', '.join(FORMATS)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError(f'{path}: drawing needs matplotlib: pip install -e ".[report]"')


def save_picture(figure: Figure, path: str | Path) -> None:
    """Write a figure, whole or not at all, with nothing in it that changes from day to day."""
    import matplotlib

    kind = Path(path).suffix.removeprefix(".")
    dates = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
    with matplotlib.rc_context({"svg.hashsalt": ""}), atomic_write(path) as file:
        figure.savefig(file, format=kind, metadata=dates.get(kind), bbox_inches="tight", dpi=150)

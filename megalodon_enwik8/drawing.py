"""Pictures: matplotlib, an extra, is asked for only where one is wanted."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

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
    """Write a figure, whole or not at all, with nothing in it that changes from day to day.

    An SVG's description is a digest of its lines and titles: it tells whether two pictures show
    the same, whichever version of matplotlib drew them.
    """
    import matplotlib

    kind = Path(path).suffix.removeprefix(".")
    metadata = {
        "svg": {"Date": None, "Description": _digest(figure)},
        "pdf": {"CreationDate": None},
    }
    with matplotlib.rc_context({"svg.hashsalt": ""}), atomic_write(path) as file:
        figure.savefig(file, format=kind, metadata=metadata.get(kind), bbox_inches="tight", dpi=150)


def _digest(figure: Figure) -> str:
    shown: list[object] = [figure.get_suptitle()]
    for axes in figure.axes:
        shown += [axes.get_title(), axes.get_xlabel(), axes.get_ylabel()]
        for line in axes.get_lines():
            points = np.column_stack(line.get_data()).tolist()
            shown += [line.get_label(), [[f"{value:.6g}" for value in point] for point in points]]
    return hashlib.sha256(repr(shown).encode()).hexdigest()

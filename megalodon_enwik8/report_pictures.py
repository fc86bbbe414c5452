"""The report's pictures. matplotlib is imported where one is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from megalodon_enwik8.drawing import save_picture
from megalodon_enwik8.report_runs import Group
from megalodon_enwik8.report_statistics import Point
from megalodon_enwik8.utils import bits_per_byte

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Told apart by every kind of eye (Okabe and Ito).
_COLORS = {
    "Megalodon": "#0072b2",
    "Llama": "#d55e00",
    "Megalodon with carried state": "#009e73",
}


def draw_curves(
    groups: Mapping[str, Group], title: str, path: Path, *, seconds: bool = True
) -> None:
    """BPC against steps and against seconds: a thin line for each seed, a thick one for the mean.

    groups: runs by name, with the same steps; seconds: whether theirs compare, and are drawn. The
    height is that of the last three quarters.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9 if seconds else 4.5, 3.8))
    panels = {"step": "steps", "seconds": "seconds of training"}
    if not seconds:
        del panels["seconds"]
    all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    by_step = all_axes[0]
    for name, group in groups.items():
        runs = [run.points for run in group.values()]
        common = set.intersection(*({point.step for point in points} for points in runs))
        runs = [[p for p in points if p.step in common] for points in runs]
        mean = [
            Point(same[0].step, fmean(p.seconds for p in same), fmean(p.loss for p in same))
            for same in zip(*runs, strict=True)
        ]
        for axes, coordinate in zip(all_axes, panels, strict=True):
            if len(runs) > 1:
                for points in runs:
                    _plot(axes, points, coordinate, color=_COLORS[name], linewidth=0.7, alpha=0.5)
            _plot(axes, mean, coordinate, color=_COLORS[name], marker="o", markersize=3, label=name)
    # The first steps would take the height that the differences at the end need.
    late = [
        point.loss
        for group in groups.values()
        for run in group.values()
        for point in run.points
        if point.step >= run.steps / 4
    ]
    low, high = bits_per_byte(min(late)), bits_per_byte(max(late))
    margin = 0.05 * (high - low) or 0.1
    by_step.set_ylim(low - margin, high + margin)
    by_step.set(ylabel="BPC on the validation windows")
    for axes, label in zip(all_axes, panels.values(), strict=True):
        axes.set(xlabel=label)
        axes.grid(alpha=0.3)
        axes.set_xlim(left=0)
    by_step.legend()
    figure.suptitle(title, fontsize="medium")
    figure.tight_layout()
    save_picture(figure, path)


def _plot(axes: Axes, points: Sequence[Point], coordinate: str, **style: object) -> None:
    axes.plot(
        [getattr(point, coordinate) for point in points],
        [bits_per_byte(point.loss) for point in points],
        **style,  # type: ignore[arg-type]
    )

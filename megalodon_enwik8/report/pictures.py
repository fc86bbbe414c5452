"""Pictures of runs and of benchmarks. matplotlib, an extra, is imported where one is drawn."""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megalodon_enwik8.config import MODELS, bits_per_byte
from megalodon_enwik8.report.runs import Group, group_names, timed
from megalodon_enwik8.report.tables import common_steps
from megalodon_enwik8.safety import UserError, atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg", ".pdf")
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#f0e442", "#000000")
"""Told apart by every kind of eye (Okabe and Ito)."""


def check_can_draw(path: str | Path, formats: Sequence[str] = FORMATS) -> None:
    """Raise UserError unless a picture can be written to a file of this name: before the hours of
    work of which it is to be a picture."""
    if Path(path).suffix not in formats:
        raise UserError(f"{path}: a picture's name must end in {', '.join(formats)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError(f'{path}: drawing needs matplotlib: pip install -e ".[report]"')
    if not Path(path).parent.is_dir():
        raise UserError(f"{path}: there is no folder {Path(path).parent}: make it first")


def save_picture(figure: Figure, path: str | Path) -> None:
    """Write a figure, whole or not at all, with nothing in it that changes from day to day.

    An SVG's description is a digest of its lines and titles: it tells whether two pictures show
    the same, whichever version of matplotlib drew them.
    """
    import matplotlib

    kind = Path(path).suffix.removeprefix(".")
    metadata = {
        "svg": {"Date": None, "Description": digest(figure)},
        "pdf": {"CreationDate": None},
    }
    with matplotlib.rc_context({"svg.hashsalt": ""}), atomic_write(path) as file:
        figure.savefig(file, format=kind, metadata=metadata.get(kind), bbox_inches="tight", dpi=150)


def digest(figure: Figure) -> str:
    shown: list[object] = [figure.get_label()]
    for axes in figure.axes:
        shown += [axes.get_title(), axes.get_xlabel(), axes.get_ylabel()]
        for line in axes.get_lines():
            points = np.column_stack(line.get_data()).tolist()
            shown += [line.get_label(), [[f"{value:.6g}" for value in point] for point in points]]
    return hashlib.sha256(repr(shown).encode()).hexdigest()


def digest_of(path: Path) -> str | None:
    """That of an SVG on the disk; None if there is none."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    found = re.search("<dc:description>([0-9a-f]{64})<", text)
    return found[1] if found else None


def draw_curves(groups: Sequence[Group], timing: dict[str, Any] | None = None) -> Figure:
    """BPC against steps and, with a benchmark, seconds: a thin line for each run, a thick one for
    the mean. The height is that of the last three quarters of the runs."""
    groups = timed(groups, timing)
    names = group_names(groups)
    panels = ["steps", "seconds of training"] if timing else ["steps"]
    figure, all_axes = new_figure(1, len(panels), 3.8)
    figure.set_label(f"BPC of {' and '.join(names)} against {' and '.join(panels)}")
    late: list[float] = []  # the first steps would take the height that the end needs
    for name, group, color in zip(names, groups, itertools.cycle(COLORS), strict=False):
        steps = common_steps([group])
        y = np.array([[bits_per_byte(run.losses[step]) for step in steps] for run in group])
        late += y[:, [step >= steps[-1] / 4 for step in steps]].ravel().tolist()
        x_of_panels = [list(map(float, steps))]
        if timed_alike := group[0].timing:
            x_of_panels.append(list(map(timed_alike.seconds, steps)))
        for axes, x in zip(all_axes, x_of_panels, strict=True):
            if len(group) > 1:
                axes.plot(x, y.T, color=color, linewidth=0.7, alpha=0.5)
            axes.plot(x, y.mean(0), color=color, marker="o", markersize=3, label=name)
    margin = 0.05 * (max(late) - min(late)) or 0.1
    for axes, label in zip(all_axes, panels, strict=True):
        axes.set(xlabel=label, ylim=(min(late) - margin, max(late) + margin))
        axes.set_xlim(left=0)
    all_axes[0].set_ylabel("BPC on the validation windows")
    return with_legend(figure)


def draw_contexts(measured: Mapping[str, Any]) -> Figure:
    """What `benchmark context` measured: throughput (above) and memory (below) against the length
    of the context."""
    from matplotlib.ticker import EngFormatter, LogLocator

    panels = [
        ("train", "bytes/s", "training, bytes/s"),
        ("decode", "prompt bytes/s", "reading a prompt, bytes/s"),
        ("decode", "new bytes/s", "writing, bytes/s"),
        ("train", "peak memory, MB", "training, peak memory, MB"),
        ("decode", "peak memory, MB", "reading and writing, peak memory, MB"),
        ("decode", "state, MB", "state kept, MB"),
    ]
    figure, all_axes = new_figure(2, 3, 5.4)
    figure.set_label("Throughput and memory against the length of the context")
    for axes, (kind, key, title) in zip(all_axes, panels, strict=True):
        for model, color in zip(MODELS, COLORS, strict=False):
            points = sorted(
                (row["seq_len"], row[model][key])
                for row in measured["rows"]
                if row["kind"] == kind and key in row.get(model, {})
            )
            if points:
                x, y = zip(*points, strict=True)
                axes.plot(x, y, color=color, marker="o", markersize=4, label=model.title())
        axes.set(xscale="log", yscale="log", xlabel="context, bytes")
        axes.set_title(title, fontsize="medium")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(EngFormatter(sep=""))
            axis.set_minor_formatter("")
    return with_legend(figure)


def draw_distances(results: Sequence[Mapping[str, Any]]) -> Figure:
    """BPC by how many bytes the model saw before the byte that it predicts: a line for each JSON
    file of `python -m megalodon_enwik8.evaluation`."""
    figure, (axes,) = new_figure(1, 1, 4)
    figure.set_label("BPC by how many bytes were seen before")
    for result, color in zip(results, itertools.cycle(COLORS), strict=False):
        most = result["reading"].get("context", math.inf)
        x = [min(row["to"], most) for row in result["by_distance"]]
        y = [row["bpc"] for row in result["by_distance"]]
        run = Path(result["checkpoint"]).parent.name
        reading = ", ".join(f"{key} {value}" for key, value in result["reading"].items())
        label = f"{run}, {reading}: {result['bpc']:.3f} BPC"
        axes.plot(x, y, color=color, marker="o", label=label)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="bytes seen before, up to", ylabel="BPC")
    return with_legend(figure)


def draw_recall(results: Sequence[Mapping[str, Any]]) -> Figure:
    """What `python -m megalodon_enwik8.recall` measured, of each model at its better rate: a thin
    line for each seed, a thick one for the mean."""
    figure, (axes,) = new_figure(1, 1, 4)
    figure.set_label("Values recalled by their keys, against the gap between")
    found: dict[str, dict[float, list[list[float]]]] = {}
    for row in results:
        made = {"steps": row["steps"], "sequences": row["sequences"], **row["given"]}
        name = ", ".join([row["model"].title(), *(f"{key} {made[key]}" for key in made)])
        rates = found.setdefault(name, {})
        rates.setdefault(row["learning_rate"], []).append(list(row["accuracy"].values()))
        gaps = [int(gap) for gap in row["accuracy"]]
    for (name, rates), color in zip(found.items(), COLORS, strict=False):
        rate, seeds = max(rates.items(), key=lambda found: np.mean(found[1]))
        if len(seeds) > 1:
            axes.plot(gaps, np.transpose(seeds), color=color, linewidth=0.7, alpha=0.5)
        label = f"{name}, learning rate {rate:g}"
        axes.plot(gaps, np.mean(seeds, axis=0), color=color, marker="o", label=label)
    axes.axvline(results[0]["chunk"], color="gray", linestyle=":")
    axes.set_xscale("log", base=2)
    axes.set(xlabel="tokens between (dotted: a chunk)", ylabel="share of values said right")
    axes.set_ylim(-0.03, 1.03)
    return with_legend(figure)


def new_figure(rows: int, columns: int, height: float) -> tuple[Figure, list[Axes]]:
    """As wide as a page shows it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9 if columns > 1 else 6, height), layout="constrained")
    all_axes = figure.subplots(rows, columns, squeeze=False, sharey=rows == 1).ravel().tolist()
    for axes in all_axes:
        axes.grid(alpha=0.3)
    return figure, all_axes


def with_legend(figure: Figure) -> Figure:
    """One for all panels, above them."""
    lines, labels = figure.axes[0].get_legend_handles_labels()
    if lines:
        longest = max(map(len, labels))
        columns = max(1, int(figure.get_figwidth() * 11) // (longest + 8))
        figure.legend(lines, labels, loc="outside upper center", ncols=columns)
        figure.set_figheight(figure.get_figheight() + 0.2 * (len(labels) // columns))
    return figure

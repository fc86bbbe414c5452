"""Markdown tables of groups of runs, of a search, of benchmarks and of the cost model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import attrgetter
from typing import Any

import numpy as np

from megalodon_enwik8.config import bits_per_byte
from megalodon_enwik8.report.runs import (
    Group,
    Run,
    check_comparable,
    differing_keys,
    group_names,
    timed,
)
from megalodon_enwik8.safety import UserError

NONE = "–"

Quantity = Callable[[Run], float]
"""A number of a run; nan where it has none."""


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def signed(value: float, digits: int) -> str:
    """A number with its sign, which zero has not."""
    text = f"{abs(value):,.{digits}f}"
    if not text.strip("0.,"):
        return text
    return ("−" if value < 0 else "+") + text


def spread(values: Sequence[float], digits: int) -> str:
    """Mean ± standard deviation, which a number that is always the same has not."""
    mean, deviation = np.mean(values), np.std(values, ddof=1) if len(values) > 1 else 0.0
    if math.isnan(mean):
        return NONE
    text = f"{mean:,.{digits}f}"
    return f"{text} ± {deviation:,.{digits}f}" if deviation > 0 else text


def half_width(values: Sequence[float]) -> float:
    """Of the mean's 95 % interval, by Student's t; nan for one value."""
    if len(values) == 1:
        return math.nan
    try:  # here, since tables of benchmarks do without
        from scipy.stats import sem, t  # type: ignore[import-untyped]
    except ImportError:
        raise UserError('intervals need scipy: pip install -e ".[report]"') from None
    return float(t.ppf(0.975, len(values) - 1) * sem(values))


# Tables of runs


def quantities(groups: Sequence[Group]) -> dict[str, tuple[Quantity, int]]:
    """What a table of these groups shows: by title, the quantity and its digits.

    Raises UserError for groups that cannot stand in one table.
    """
    check_comparable(groups)
    step = common_steps(groups)[-1]
    found: dict[str, tuple[Quantity, int]] = {
        "parameters": (attrgetter("parameters"), 0),
        f"loss after {step:,} steps": (loss_at(step), 4),
        f"BPC after {step:,} steps": (bpc_at(step), 4),
    }
    if len({group[0].steps for group in groups}) == 1:
        found["BPC of the whole split"] = (attrgetter("full_val_bpc"), 4)
    runs = [run for group in groups for run in group]
    if all(run.timing for run in runs):
        found["a step, s"] = (attrgetter("timing.step"), 3)
    if len({run.device for run in runs}) == 1 or all(run.timing for run in runs):
        found["peak memory, MB"] = (attrgetter("peak_megabytes"), 0)
    return found


def loss_at(step: int) -> Quantity:
    return lambda run: run.losses[step]


def bpc_at(step: int) -> Quantity:
    return lambda run: bits_per_byte(run.losses[step])


def bpc_after(seconds: float) -> Quantity:
    """Of a run that is timed."""
    return lambda run: bits_per_byte(loss_after(run.losses, run.timing.steps(seconds)))  # type: ignore[union-attr]


def common_steps(groups: Iterable[Group]) -> list[int]:
    """The steps after which all runs were validated."""
    runs = [run for group in groups for run in group]
    steps = set.intersection(*(set(run.losses) for run in runs))
    if not steps:
        raise UserError(f"{runs[0].path} and others: no step after which all were validated")
    return sorted(steps)


def with_same_seeds(ours: Group, theirs: Group) -> tuple[Group, Group]:
    """The runs whose seed the other group has too: differences are taken seed by seed."""
    both = {run.seed for run in ours} & {run.seed for run in theirs}
    a, b = (tuple(run for run in group if run.seed in both) for group in (ours, theirs))
    return a, b


def pair_up(ours: Group, theirs: Group) -> tuple[Group, Group]:
    """Likewise. Raises UserError where there are none."""
    pair = with_same_seeds(ours, theirs)
    if not pair[0]:
        raise UserError(f"{ours[0].path} and {theirs[0].path}: no seed is in both groups")
    return pair


def cell(group: Group, quantity: Quantity, digits: int) -> str:
    return spread([quantity(run) for run in group], digits)


def gap_cells(ours: Group, theirs: Group, quantity: Quantity, digits: int) -> list[str]:
    """The difference, its interval, and the difference in percent of theirs."""
    a, b = (np.array([quantity(run) for run in group]) for group in (ours, theirs))
    gap, half = float(np.mean(a - b)), half_width(a - b)
    if math.isnan(gap):
        return [NONE] * 3
    sure = f"{signed(gap - half, digits)} to {signed(gap + half, digits)}" if half > 0 else NONE
    return [signed(gap, digits), sure, f"{signed(100 * gap / np.mean(b), 2)} %"]


def row(title: str, ours: Group, theirs: Group, quantity: Quantity, digits: int) -> list[str]:
    cells = [cell(group, quantity, digits) for group in (ours, theirs)]
    return [title, *cells, *gap_cells(ours, theirs, quantity, digits)]


def seeds(group: Group) -> str:
    return ", ".join(str(run.seed) for run in group)


def compare(ours: Group, theirs: Group, timing: dict[str, Any] | None = None) -> str:
    """Two groups at equal steps, at equal seconds and in what they take; then step by step."""
    pair = pair_up(*timed([ours, theirs], timing))
    names = group_names(pair)
    head = [*names, "difference", "95 % interval", "relative"]
    rows = [row(title, *pair, *quantity) for title, quantity in quantities(pair).items()]
    if timing:
        rows.append(same_seconds("BPC", pair, timing))
    for unit in ("steps", "seconds") if timing else ("steps",):
        reached = [_reach(unit, *pair), _reach(unit, *reversed(pair))]
        rows.append([f"{unit} to the other's final loss", *reached, NONE, NONE, NONE])
    each = [
        row(f"{step:,}", *pair, loss_at(step), 4) + [cell(group, bpc_at(step), 4) for group in pair]
        for step in common_steps(pair)
    ]
    by_step = table(["loss after steps", *head, *(f"{name}, BPC" for name in names)], each)
    rows = [cells for cells in rows if set(cells[1:]) != {NONE}]
    return "\n\n".join([table([f"seeds {seeds(pair[0])}", *head], rows), by_step])


def machine(group: Group, timing: dict[str, Any]) -> str:
    """Whose seconds a group has: the device's, and in which precision where not in bfloat16."""
    in_float32 = any(run.timing and not run.timing.in_bfloat16 for run in group)
    return f"{timing['device']}{', in float32' if in_float32 else ''}"


def same_seconds(title: str, pair: tuple[Group, Group], timing: dict[str, Any]) -> list[str]:
    """BPC after as much training as the faster group took, on the benchmark's device."""
    ends = [run.timing.seconds(run.steps) for group in pair for run in group if run.timing]
    title = f"{title} after {min(ends):,.0f} s of training on {machine(pair[0], timing)}"
    return row(title, *pair, bpc_after(min(ends)), 4)


def loss_after(losses: Mapping[int, float], steps: float) -> float:
    """On the straight line between two validations; beyond the ends, theirs."""
    return float(np.interp(steps, list(losses), list(losses.values())))


def first_reach(losses: Mapping[int, float], loss: float) -> float | None:
    """Steps after which the loss is first as low as `loss`; None if it never is."""
    steps = list(losses)
    after = next((i for i, step in enumerate(steps) if losses[step] <= loss), None)
    if after is None:
        return None
    ends = [steps[after], steps[max(0, after - 1)]]
    return float(np.interp(loss, [losses[step] for step in ends], ends))


def _reach(unit: str, ours: Group, theirs: Group) -> str:
    """Steps or seconds that a run needs for the loss with which the other of its seed ends."""
    found = [
        (run, first_reach(run.losses, other.losses[other.steps]))
        for run, other in zip(ours, theirs, strict=True)
    ]
    reached = [
        run.timing.seconds(steps) if unit == "seconds" and run.timing else steps
        for run, steps in found
        if steps is not None
    ]
    missing = len(found) - len(reached)
    return f"not reached by {missing} of {len(found)}" if missing else spread(reached, 0)


def headline(*arguments: Any) -> str:
    """A row for each title, group and group: their BPC at the end of what all of the two did. With
    a benchmark behind them also the parameters of the first two, BPC after the same seconds, and
    what a step takes, if it is another than that of the pair before."""
    *pairs, timing = arguments if len(arguments) % 3 else (*arguments, None)
    rows: list[tuple[tuple[Group, Group], list[str]]] = []
    taken: list[str] = []
    for title, *groups in zip(pairs[::3], pairs[1::3], pairs[2::3], strict=True):
        pair = pair_up(*timed(groups, timing))
        shown = quantities(pair)
        if timing and not rows:
            rows.append((pair, row("parameters", *pair, *shown["parameters"])))
        rows.append((pair, row(title, *pair, bpc_at(common_steps(pair)[-1]), 4)))
        if timing:
            rows.append((pair, same_seconds(f"{title},", pair, timing)))
            costs = [row("", *pair, *shown[key]) for key in ("a step, s", "peak memory, MB")]
            both = [f"{step}; {memory}" for step, memory in zip(*costs, strict=True)]
            if taken != (taken := [*both[1:4], NONE, both[5]]):
                what = f"a step, s; peak memory, MB, on {machine(pair[0], timing)}"
                rows.append((pair, [what, *taken]))
    names = [group[0].model for group in rows[0][0]]
    head = ["BPC", "seeds", *names, "difference", "95 % interval", "relative"]
    return table(head, [[cells[0], seeds(pair[0]), *cells[1:]] for pair, cells in rows])


def runs(groups: Sequence[Group]) -> str:
    """A line for each group: the keys in which they differ, the quantities, and the difference from
    the first at the last step after which all were validated. Empty columns are left out."""
    keys, last = differing_keys(groups), loss_at(common_steps(groups)[-1])
    gaps = [[NONE] * 3]
    for pair in (with_same_seeds(group, groups[0]) for group in groups[1:]):
        gaps.append(gap_cells(*pair, last, 4) if pair[0] else gaps[0])
    columns: dict[str, list[str]] = {
        "model": [group[0].model for group in groups],
        **{key: [str(group[0].recipe.get(key, NONE)) for group in groups] for key in keys},
        "seeds": [seeds(group) for group in groups],
        **{
            title: [cell(group, *quantity) for group in groups]
            for title, quantity in quantities(groups).items()
        },
        "loss − the first's": [gap[0] for gap in gaps],
        "95 % interval": [gap[1] for gap in gaps],
        "relative": [gap[2] for gap in gaps],
    }
    columns = {name: cells for name, cells in columns.items() if set(cells) != {NONE}}
    return table(list(columns), zip(*columns.values(), strict=True))


def sample(group: Group) -> str:
    """The first 300 characters of what the first run of a group wrote at its end."""
    text = " ".join(group[0].sample.split())[:300].replace("~~~~", "~~~ ")
    return f"~~~~text\n{''.join(c if c.isprintable() else '?' for c in text)}\n~~~~"


# Tables of files that other programs write


def search(found: Sequence[Mapping[str, Any]]) -> str:
    """The lines of a search: the settings that vary, with each model's best in bold."""
    settings = [row["settings"] for row in found]
    keys = [
        key
        for key in dict.fromkeys(key for each in settings for key in each)
        if len({repr(each[key]) for each in settings if key in each}) > 1
    ]
    lines = []
    for model in dict.fromkeys(row["model"] for row in found):
        mine = [row for row in found if row["model"] == model]
        best = min(row["val_loss"] for row in mine)
        for row in mine:
            loss, bold = row["val_loss"], "**" if row["val_loss"] == best else ""
            values = [str(row["settings"].get(key, NONE)) for key in keys]
            lines.append(
                [model.title(), *values, f"{bold}{loss:.4f}{bold}", f"{bits_per_byte(loss):.4f}"]
            )
    return table(["model", *keys, "loss", "BPC"], lines)


def measured_tables(measured: Mapping[str, Any]) -> str:
    """What a benchmark measured: for each kind of row a table, in which each model, or way to take
    a step, has a line. What does not vary stands above."""
    parts = [_said({key: value for key, value in measured.items() if key != "rows"})]
    for kind in dict.fromkeys(row["kind"] for row in measured["rows"]):
        rows = [row for row in measured["rows"] if row["kind"] == kind]
        settings = [key for key, value in rows[0].items() if not isinstance(value, dict)]
        varied = [key for key in settings if len({repr(row[key]) for row in rows}) > 1]
        lines: list[dict[str, Any]] = []
        given_up: list[str] = []
        for row in rows:
            shown = [_shown(row[key]) for key in varied]
            for what, reason in row.get("failed", {}).items():
                given_up.append(f"Given up: {', '.join([*shown, what])}: {reason}.")
            for name in row:
                if name not in ("failed", *settings):
                    lines.append({key: row[key] for key in varied} | {"of": name} | row[name])
        titles = dict.fromkeys([*varied, "of", *(title for line in lines for title in line)])
        titles.pop("by_name", None)
        cells = [[_shown(line.get(title)) for title in titles] for line in lines]
        said = {key: rows[0][key] for key in settings if key not in varied}
        parts += [_said(said), table([*titles], cells), *given_up]
    return "\n\n".join(parts)


def _said(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {_shown(value)}" for key, value in values.items()) + ":"


def _shown(value: Any) -> str:
    if value is None:
        return NONE
    if isinstance(value, str | bool):
        return str(value)
    return f"{value:,.0f}" if value >= 100 or isinstance(value, int) else f"{value:#.3g}"


# Tables of the cost model

RELEASED = ("mega200m", "mega1_3b", "mega1_3b_pg19", "mega7_1b", "mega7_3b")
LAYOUTS = ("DDP", "FSDP2", "along time")
WORLD_SIZES = (8, 64, 1024)
LENGTHS = {f"{kibi}k": kibi * 1024 for kibi in (4, 16, 64, 256)} | {"1M": 1024**2}


def scaling(numbers: str) -> str:
    """What the released models send and compute in several processes, and how far each way pays.
    numbers: of a Device, with spaces between. Raises ValueError for others."""
    # Here, since all other tables do without PyTorch, which takes seconds to load.
    from megalodon import MegalodonConfig
    from megalodon_enwik8.scaling import Costs, Device

    device = Device(*map(float, numbers.split(maxsplit=2)))
    if not all(0 < number < math.inf for number in device):
        raise ValueError(numbers)
    sent, work, ends = [], [], []
    for name in RELEASED:
        costs = Costs(getattr(MegalodonConfig, name)())
        ways = (costs.data_parallel, costs.sharded, costs.along_time)
        for count in WORLD_SIZES:
            megabytes = [f"{number / 1e6:,.1f}" for way in ways for number in way(count)]
            sent.append([name, f"{count:,}", *megabytes])
        flops = [f"{costs.flops(tokens) / 1e12:,.0f}" for tokens in LENGTHS.values()]
        work.append([name, f"{costs.parameters:,}", *flops])
        least = [costs.least_tokens(way(n), device) for way in ways[:2] for n in WORLD_SIZES[::2]]
        most = [costs.most_along_time(tokens, device) for tokens in LENGTHS.values()]
        ends.append([name, *(f"{number:,}" for number in [*least, *most])])
    each = [f"{way}, {unit}" for way in LAYOUTS for unit in ("layer", "step")]
    fewest = [f"{way}, N = {n:,}" for way in LAYOUTS[:2] for n in WORLD_SIZES[::2]]
    parts = [
        "Sent by each of N processes, in MB; along time for each sequence, of any length:",
        table(["model", "N", *each], sent),
        "Computed for a sequence of so many tokens, in Tflop:",
        table(["model", "parameters", *LENGTHS], work),
        f"At {device.flops / 1e12:g} Tflop/s, {device.link / 1e9:g} GB/s and a share of "
        f"{device.share:g}: the fewest tokens of a step that each process must have, and the most "
        "processes along time for a sequence of so many tokens:",
        table(["model", *fewest, *(f"K at {length}" for length in LENGTHS)], ends),
    ]
    return "\n\n".join(parts)

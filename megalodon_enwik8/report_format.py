"""Numbers, lists and tables as RESULTS.md has them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from megalodon_enwik8.report_statistics import Summary

NONE = "–"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def signed(value: float, digits: int) -> str:
    """A number with its sign, which zero has not."""
    text = f"{abs(value):,.{digits}f}"
    if not text.strip("0.,"):
        return text
    return ("−" if value < 0 else "+") + text


def spread(summary: Summary, digits: int = 4) -> str:
    """Mean ± standard deviation, or the one value."""
    text = f"{summary.mean:,.{digits}f}"
    return text if summary.count == 1 else f"{text} ± {summary.deviation:,.{digits}f}"


def interval(summary: Summary, digits: int = 4) -> str:
    """The 95 % interval of a difference."""
    if summary.count == 1:
        return NONE
    return f"{signed(summary.low, digits)} to {signed(summary.high, digits)}"


def listed(items: Iterable[object], last: str = "and") -> str:
    """As in a sentence: a, b and c."""
    *first, end = map(str, items)
    return f"{', '.join(first)} {last} {end}" if first else end


def duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02} m" if minutes >= 60 else f"{minutes} m"


def in_a_sentence(name: str) -> str:
    return f"the {name}" if name.startswith("Llama") else name


def beginning(text: str) -> str:
    return text[:1].upper() + text[1:]


def seeds_text(seeds: Sequence[int]) -> str:
    return f"seed{'s' if len(seeds) > 1 else ''} {listed(seeds)}"


def shown(path: Path) -> str:
    """A path as seen from the current folder, or its name alone if it lies elsewhere."""
    whole = path.resolve()
    here = Path.cwd().resolve()
    return whole.relative_to(here).as_posix() if whole.is_relative_to(here) else whole.name

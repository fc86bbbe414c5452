"""The section at equal wall-clock."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import fmean

from megalodon_enwik8.report_format import (
    NONE,
    beginning,
    in_a_sentence,
    interval,
    listed,
    signed,
    spread,
    table,
)
from megalodon_enwik8.report_groups import figures, hardware, timing_differences
from megalodon_enwik8.report_runs import Group
from megalodon_enwik8.report_statistics import (
    first_reach,
    leader,
    loss_after,
    paired,
    summarize,
)
from megalodon_enwik8.utils import bits_per_byte

_SHARES = (0.25, 0.5, 0.75, 1.0)  # of the time of the shortest run


def shared_seconds(groups: Iterable[Group]) -> float:
    """The time after which the fastest of the runs had ended."""
    return min(run.seconds for group in groups for run in group.values())


def after_seconds(group: Group, seconds: float) -> dict[int, float]:
    """BPC of each run after so many seconds."""
    return figures(group, lambda run: bits_per_byte(loss_after(run.points, seconds)))


def at_equal_seconds(ours: Group, theirs: Group, our_name: str, their_name: str) -> str:
    """The plain statement of who is ahead at equal wall-clock."""
    unlike = timing_differences((ours, theirs))
    if unlike:
        return f"At equal wall-clock nothing can be said: the runs differ in {listed(unlike)}."
    seconds = shared_seconds((ours, theirs))
    a, b = (after_seconds(group, seconds) for group in (ours, theirs))
    gap = paired(a, b)
    (low, lower), (high, higher) = sorted(
        (fmean(values.values()), in_a_sentence(name))
        for values, name in ((a, our_name), (b, their_name))
    )
    where = f"at equal wall-clock on {hardware((ours, theirs))}"
    fastest = in_a_sentence(our_name if seconds == shared_seconds([ours]) else their_name)
    first = f"the fastest run, one of {fastest}," if gap.count > 1 else fastest
    when = f"after {seconds:,.0f} s of training, when {first} was done"
    if leader(gap, our_name, their_name):
        if gap.count == 1:
            sure = "with the one seed tried, so without an interval"
        else:
            near, far = sorted((abs(gap.low), abs(gap.high)))
            sure = (
                f"a difference of {high - low:.4f} with a 95 % interval of {near:.4f} to {far:.4f}"
            )
        return (
            f"{beginning(where)}, {lower} is ahead: {low:.4f} against {high:.4f} bits per byte "
            f"{when}, {sure}."
        )
    return (
        f"{beginning(where)}, it is undecided who is ahead: {lower} has {low:.4f} and {higher} "
        f"{high:.4f} bits per byte {when}, and the 95 % interval of the difference is "
        f"{interval(gap)}."
    )


def equal_seconds(ours: Group, theirs: Group, our_name: str, their_name: str) -> str:
    """BPC at shared times, the statement, and what each needs to reach the other."""
    parts = []
    compares = not timing_differences((ours, theirs))
    if compares:
        last = shared_seconds((ours, theirs))
        rows = []
        for share in _SHARES:
            seconds = share * last
            a, b = after_seconds(ours, seconds), after_seconds(theirs, seconds)
            gap = paired(a, b)
            rows.append(
                [
                    f"{seconds:,.0f}",
                    *(spread(summarize(list(each.values()))) for each in (a, b)),
                    signed(gap.mean, 4),
                    interval(gap),
                    leader(gap, our_name, their_name) or "undecided",
                ]
            )
        header = ["seconds", f"{our_name}, BPC", f"{their_name}, BPC"]
        parts.append(table([*header, "difference", "95 % interval", "ahead"], rows))
    parts.append(at_equal_seconds(ours, theirs, our_name, their_name))
    rows = [
        [our_name, in_a_sentence(their_name), *_reach(ours, theirs)],
        [their_name, in_a_sentence(our_name), *_reach(theirs, ours)],
    ]
    if not compares:
        rows = [[*row[:-1], NONE] for row in rows]
    header = ["", "to reach the final validation loss of", "steps", "seconds"]
    parts.append(table(header, rows))
    return "\n\n".join(parts)


def _reach(ours: Group, theirs: Group) -> list[str]:
    """Steps and seconds that ours need, seed by seed, to reach what theirs end with."""
    found = [first_reach(run.points, theirs[seed].loss) for seed, run in sorted(ours.items())]
    reached = [pair for pair in found if pair is not None]
    if len(reached) < len(found):
        if not reached:
            return ["not reached", "not reached"]
        return [f"not reached with {len(found) - len(reached)} of {len(found)} seeds"] * 2
    return [spread(summarize(values), 0) for values in zip(*reached, strict=True)]

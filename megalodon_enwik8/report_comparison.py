"""The two models of the protocol: the headline, and the sections at equal steps and equal time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from statistics import fmean

from megalodon_enwik8.report_format import (
    NONE,
    in_a_sentence,
    interval,
    listed,
    seeds_text,
    shown,
    signed,
    spread,
    table,
)
from megalodon_enwik8.report_runs import MODELS, NAMES, PROTOCOL, Group, Run
from megalodon_enwik8.report_statistics import (
    Summary,
    first_reach,
    loss_after,
    paired,
    summarize,
)
from megalodon_enwik8.report_study import Study
from megalodon_enwik8.utils import bits_per_byte

_SHARES = (0.25, 0.5, 0.75, 1.0)  # of the time of the shortest run


def settings_text(study: Study) -> str:
    """The experiment in a sentence."""
    run = study.first
    devices = {
        session.hardware
        for group in study.protocol.values()
        for run in group.values()
        for session in run.environment.sessions
    }
    return (
        f"{run.steps:,} steps of {run.sequences} sequences of {run.settings.seq_len} bytes, Adam "
        f"with learning rate {PROTOCOL['learning_rate']:g}, bfloat16 autocast, "
        f"{seeds_text(study.seeds)}; on {listed(sorted(devices))}"
    )


def figures(group: Group, figure: Callable[[Run], float]) -> dict[int, float]:
    """A figure of each run, by seed."""
    return {seed: figure(run) for seed, run in sorted(group.items())}


def common_steps(groups: Iterable[Group]) -> list[int]:
    """The steps, hundreds and the end, after which all runs were validated."""
    runs = [run for group in groups for run in group.values()]
    common = set.intersection(*({point.step for point in run.points} for run in runs))
    return sorted(step for step in common if step % 100 == 0 or step == runs[0].steps)


def loss_at(step: int) -> Callable[[Run], float]:
    """The figure: validation loss after so many steps, after which all runs were validated."""

    def figure(run: Run) -> float:
        loss = run.loss_at(step)
        assert loss is not None
        return loss

    return figure


def bpc_at(step: int) -> Callable[[Run], float]:
    return lambda run: bits_per_byte(loss_at(step)(run))


def seconds_compare(groups: Iterable[Group]) -> bool:
    """Whether all runs were made on one kind of device with one number of threads."""
    sessions = [
        session
        for group in groups
        for run in group.values()
        for session in run.environment.sessions
    ]
    return len({(session.hardware, session.threads) for session in sessions}) == 1


def shared_seconds(groups: Iterable[Group]) -> float:
    """The time after which the fastest of the runs had ended."""
    return min(run.seconds for group in groups for run in group.values())


def after_seconds(group: Group, seconds: float) -> dict[int, float]:
    """BPC of each run after so many seconds."""
    return figures(group, lambda run: bits_per_byte(loss_after(run.points, seconds)))


def text_of(run: Run) -> str:
    """What the corpus is, for a sentence that goes on after it."""
    corpus = run.environment.corpus
    if corpus.name == "sample":
        return f"the sample ({corpus.size / 1e6:.1f} MB of English Wikipedia, not enwik8)"
    if corpus.name == "enwik8":
        return f"the first {corpus.size:,} bytes of enwik8"
    return f"the text {corpus.name}"


def headline(study: Study) -> str:
    """Who is ahead at equal steps, by how much and how surely, and who at equal wall-clock."""
    ours, theirs = (study.protocol[model] for model in MODELS)
    pair = (ours, theirs, NAMES["megalodon"], NAMES["llama"])
    return f"On {text_of(study.first)}, {at_equal_steps(*pair)} {at_equal_seconds(*pair)}"


def leader(gap: Summary, our_name: str, their_name: str) -> str | None:
    """Who has the lower loss, where `gap` is ours minus theirs; None if that is undecided."""
    if gap.mean == 0 or (gap.count > 1 and not gap.sign):
        return None
    return our_name if gap.mean < 0 else their_name


def at_equal_steps(ours: Group, theirs: Group, our_name: str, their_name: str) -> str:
    """The plain statement of who is ahead after the same steps, to go on after a comma."""
    steps = next(iter(ours.values())).steps
    a, b = (figures(group, bpc_at(steps)) for group in (ours, theirs))
    gap = paired(a, b)
    (low, lower), (high, higher) = sorted(
        (fmean(values.values()), in_a_sentence(name))
        for values, name in ((a, our_name), (b, their_name))
    )
    percent = f"{100 * (high - low) / high:.2f} % lower"
    if gap.count == 1:
        result = f"{percent} with the one seed tried, so without an interval"
    elif leader(gap, our_name, their_name):
        near, far = sorted((abs(gap.low), abs(gap.high)))
        result = (
            f"{percent}, a difference of {high - low:.4f} with a 95 % interval of {near:.4f} to "
            f"{far:.4f} over {gap.count} seeds"
        )
    else:
        result = (
            f"undecided, since the 95 % interval of the difference over {gap.count} seeds is "
            f"{interval(gap)}"
        )
    return (
        f"after {steps:,} steps on the same data, {lower} reaches {low:.4f} bits per byte and "
        f"{higher} {high:.4f}: {result}."
    )


def at_equal_seconds(ours: Group, theirs: Group, our_name: str, their_name: str) -> str:
    """The plain statement of who is ahead at equal wall-clock."""
    if not seconds_compare((ours, theirs)):
        return (
            "At equal wall-clock nothing can be said: the runs were made on different devices or "
            "numbers of threads."
        )
    seconds = shared_seconds((ours, theirs))
    a, b = (after_seconds(group, seconds) for group in (ours, theirs))
    gap = paired(a, b)
    (low, lower), (high, higher) = sorted(
        (fmean(values.values()), in_a_sentence(name))
        for values, name in ((a, our_name), (b, their_name))
    )
    fastest = our_name if seconds == shared_seconds([ours]) else their_name
    when = (
        f"after {seconds:,.0f} s of training, in which {in_a_sentence(fastest)} had made all its "
        "steps"
    )
    if leader(gap, our_name, their_name):
        but = ", with the one seed tried" if gap.count == 1 else ""
        return (
            f"At equal wall-clock {lower} is ahead{but}: {low:.4f} against {high:.4f} bits per "
            f"byte {when}."
        )
    return (
        f"At equal wall-clock it is undecided who is ahead: {lower} has {low:.4f} and {higher} "
        f"{high:.4f} bits per byte {when}, and the 95 % interval of the difference is "
        f"{interval(gap)}."
    )


def how_sure(study: Study) -> str:
    ours, theirs = (study.protocol[model] for model in MODELS)
    a, b = (figures(group, lambda run: run.loss) for group in (ours, theirs))
    gap = paired(a, b)
    if gap.count == 1:
        return (
            f"One run of each model, with seed {study.seeds[0]}: there is no interval, and "
            "another seed may change a small difference, or its sign."
        )
    mine, other = summarize(list(a.values())), summarize(list(b.values()))
    touch = "touch" if mine.touches(other) else "do not touch"
    zero = "excludes zero" if gap.sign else "contains zero"
    return (
        f"Figures are means over {gap.count} seeds ± the sample standard deviation. Differences "
        "are taken seed by seed, since the two models of a seed see the same data in the same "
        "order; their 95 % intervals are those of Student's t with "
        f"{gap.count - 1} degree{'s' if gap.count > 2 else ''} of freedom. The intervals of the "
        f"two mean losses at the end, {mine.low:.4f} to {mine.high:.4f} and {other.low:.4f} to "
        f"{other.high:.4f}, {touch}; that of the difference, {interval(gap)}, {zero}. They tell "
        "what another seed may change, not what another text, size or length of training would."
    )


def equal_steps(study: Study) -> str:
    """The main table."""
    groups = [study.protocol[model] for model in MODELS]
    steps = common_steps(groups)
    marks = [step for step in (*steps[:-1][-1:], steps[-1]) if step > 0]
    rows = [
        _row("parameters", groups, lambda run: run.environment.parameters, 0, constant=True),
    ]
    for step in marks:
        rows.append(_row(f"validation loss at {step}", groups, loss_at(step)))
    for step in marks:
        rows.append(_row(f"BPC at {step}", groups, bpc_at(step)))
    rows += [
        _row("BPC of the whole validation split", groups, full_bpc),
        _row("wall-clock of the training, s", groups, lambda run: run.seconds, 0),
        _row("bytes (tokens) per second", groups, lambda run: run.bytes_per_second, 0),
        _row("peak memory, MiB", groups, peak_mebibytes, 0),
    ]
    header = ["", *NAMES.values(), "Megalodon − Llama", "95 % interval", "relative"]
    skipped = [run for group in groups for run in group.values() if run.end.skipped_steps]
    notes = "".join(
        f"\n\n{shown(run.path)} skipped {run.end.skipped_steps} steps whose loss or gradient was "
        "not finite."
        for run in skipped
    )
    memory = (
        "\n\nPeak memory is that of tensors on a CUDA device, and of the whole process elsewhere."
    )
    return table(header, rows) + memory + notes


def _row(
    name: str,
    groups: Sequence[Group],
    figure: Callable[..., float | None],
    digits: int = 4,
    *,
    constant: bool = False,
) -> list[str]:
    """A figure of both models and its difference; dashes for a model that lacks it in a run."""
    values = [{seed: figure(run) for seed, run in sorted(group.items())} for group in groups]
    known = [{seed: value for seed, value in each.items() if value is not None} for each in values]
    whole = [len(each) == len(group) for each, group in zip(known, groups, strict=True)]
    if constant:
        known = [dict(list(each.items())[:1]) for each in known]
    cells = [
        spread(summarize(list(each.values())), digits) if ok else NONE
        for each, ok in zip(known, whole, strict=True)
    ]
    if not all(whole):
        return [name, *cells, NONE, NONE, NONE]
    gap = paired(*known)
    relative = 100 * gap.mean / summarize(list(known[1].values())).mean
    return [
        name,
        *cells,
        signed(gap.mean, digits),
        interval(gap, digits),
        f"{signed(relative, 2)} %",
    ]


def full_bpc(run: Run) -> float | None:
    return None if run.full_loss is None else bits_per_byte(run.full_loss)


def streamed_bpc(run: Run) -> float | None:
    return None if run.streamed_loss is None else bits_per_byte(run.streamed_loss)


def peak_mebibytes(run: Run) -> float | None:
    return None if run.peak_memory_bytes is None else run.peak_memory_bytes / 2**20


def every_hundred_steps(study: Study) -> str:
    groups = [study.protocol[model] for model in MODELS]
    rows = []
    for step in common_steps(groups):
        losses = [figures(group, loss_at(step)) for group in groups]
        gap = paired(*losses)
        summaries = [summarize(list(each.values())) for each in losses]
        rows.append(
            [
                f"{step:,}",
                *(spread(each) for each in summaries),
                signed(gap.mean, 4),
                interval(gap),
                *(f"{bits_per_byte(each.mean):.4f}" for each in summaries),
            ]
        )
    header = ["step", "Megalodon, loss", "Llama, loss", "difference", "95 % interval"]
    return table([*header, "Megalodon, BPC", "Llama, BPC"], rows)


def equal_seconds(ours: Group, theirs: Group, our_name: str, their_name: str) -> str:
    """BPC at shared times, the statement, and what each needs to reach the other."""
    parts = []
    if seconds_compare((ours, theirs)):
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
    parts.append(
        table(
            ["", "to reach the final validation loss of", "steps", "seconds"],
            [
                [our_name, in_a_sentence(their_name), *_reach(ours, theirs)],
                [their_name, in_a_sentence(our_name), *_reach(theirs, ours)],
            ],
        )
    )
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

"""The two models of the protocol: the headline, and the section at equal steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
from megalodon_enwik8.report_groups import (
    bpc_at,
    common_steps,
    figures,
    full_bpc,
    hardware,
    loss_at,
    peak_megabytes,
    summary_of,
    timing_differences,
)
from megalodon_enwik8.report_runs import MODELS, NAMES, PROTOCOL, Contender, Group, Run
from megalodon_enwik8.report_statistics import leader, paired, summarize
from megalodon_enwik8.report_study import Study
from megalodon_enwik8.report_wall_clock import at_equal_seconds
from megalodon_enwik8.utils import bits_per_byte


def settings_text(study: Study) -> str:
    """The experiment in a sentence."""
    settings = study.first.settings
    return (
        f"{settings.num_batches:,} steps of {settings.sequences} sequences of {settings.seq_len} "
        f"bytes, Adam with learning rate {PROTOCOL['learning_rate']:g}, bfloat16 autocast, "
        f"{seeds_text(study.seeds)}; on {hardware(study.protocol.values())}"
    )


def text_of(run: Run) -> str:
    """What the corpus is, for a sentence that goes on after it."""
    corpus = run.environment.corpus
    if corpus.name == "sample":
        return f"the sample ({corpus.size / 1e6:.1f} MB of English Wikipedia, not enwik8)"
    if corpus.name == "enwik8":
        return f"the first {corpus.size:,} bytes of enwik8"
    return f"the text {corpus.name}"


def headline(study: Study) -> str:
    """Who is ahead at equal steps, by how much and how surely, who at equal wall-clock, and at
    what size and memory; and who at the best settings of each."""
    ours, theirs = (study.protocol[model] for model in MODELS)
    names = (NAMES["megalodon"], NAMES["llama"])
    sentences = [
        f"On {text_of(study.first)}, {at_equal_steps(ours, theirs, *names)}",
        at_equal_seconds(ours, theirs, *names),
        size_and_memory(ours, theirs),
    ]
    if study.tuned is not None and study.tuned.entrants:
        plain = [study.tuned.entrants[Contender(model, False)].group for model in MODELS]
        best = "the best settings tried" if study.tuned.grid else "settings of its own"
        tuned = at_equal_steps(plain[0], plain[1], *names)
        sentences.append(f"With {best} for each, {tuned}")
    return " ".join(sentences)


def size_and_memory(ours: Group, theirs: Group) -> str:
    """Which model is the smaller, and which takes the more memory to train."""
    sizes = [float(next(iter(group.values())).environment.parameters) for group in (ours, theirs)]
    parts = [f"has {_compared(sizes, 'fewer', 'as many')} parameters"]
    mine, other = (summary_of(group, peak_megabytes) for group in (ours, theirs))
    if mine is not None and other is not None and not timing_differences((ours, theirs)):
        peaks = [mine.mean, other.mean]
        parts.append(f"takes {_compared(peaks, 'less', 'as much')} memory at its peak")
    return f"Beside the Llama, Megalodon {' and '.join(parts)}."


def _compared(values: Sequence[float], less: str, equal: str) -> str:
    percent = 100 * (values[0] / values[1] - 1)
    if abs(percent) < 0.5:
        return equal
    return f"{abs(percent):.0f} % {'more' if percent > 0 else less}"


def at_equal_steps(
    ours: Group, theirs: Group, our_name: str, their_name: str, data: str = "the same data"
) -> str:
    """The plain statement of who is ahead after the same steps, to go on after a comma."""
    steps = next(iter(ours.values())).steps
    a, b = (figures(group, bpc_at(steps)) for group in (ours, theirs))
    gap = paired(a, b)
    (low, lower, first), (high, higher, second) = sorted(
        (
            (fmean(values.values()), in_a_sentence(name), summary_of(group, full_bpc))
            for values, name, group in ((a, our_name, ours), (b, their_name, theirs))
        ),
        key=lambda each: each[:2],
    )
    whole = ""
    if first is not None and second is not None:
        whole = f" (over the whole validation split {first.mean:.4f} and {second.mean:.4f})"
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
        f"after {steps:,} steps on {data}, {lower} reaches {low:.4f} bits per byte and "
        f"{higher} {high:.4f}: {result}{whole}."
    )


def how_sure(study: Study) -> str:
    ours, theirs = (study.protocol[model] for model in MODELS)
    a, b = (figures(group, lambda run: run.loss) for group in (ours, theirs))
    gap = paired(a, b)
    if gap.count == 1:
        return (
            f"One run of each model, with seed {study.seeds[0]}: there is no interval, and "
            "another seed may change a small difference, or its sign; other windows, another "
            "text, size or length of training may too."
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
        "what another seed may change, not what other windows, another text, size or length of "
        "training would; those of times also what else the machine was doing."
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
    ]
    unlike = timing_differences(groups)
    for name, figure, digits in (
        ("wall-clock of the training, s", lambda run: run.seconds, 0),
        ("a step, s (median)", lambda run: run.median_step_seconds, 3),
        ("bytes (tokens) per second", lambda run: run.bytes_per_second, 0),
        ("peak memory, MB", peak_megabytes, 0),
    ):
        rows.append(_row(name, groups, figure, digits, differences=not unlike))
    header = ["", *NAMES.values(), "Megalodon − Llama", "95 % interval", "relative"]
    skipped = [run for group in groups for run in group.values() if run.end.skipped_steps]
    notes = "".join(
        f"\n\n{shown(run.path)} skipped {run.end.skipped_steps} steps whose loss or gradient was "
        "not finite."
        for run in skipped
    )
    notes = (
        "\n\nWall-clock is that of the training steps, the compilation within the first of them "
        "included; a disturbed step shows in it and not in the median. Peak memory is that of "
        f"tensors on a CUDA device, and of the whole process elsewhere.{notes}"
    )
    if unlike:
        notes += f"\n\nTime and memory are not compared: the runs differ in {listed(unlike)}."
    return table(header, rows) + notes


def _row(
    name: str,
    groups: Sequence[Group],
    figure: Callable[..., float | None],
    digits: int = 4,
    *,
    constant: bool = False,
    differences: bool = True,
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
    if not (all(whole) and differences):
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

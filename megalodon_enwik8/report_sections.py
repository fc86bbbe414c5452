"""The sections beside the main comparison."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from megalodon_enwik8.report_comparison import at_equal_steps
from megalodon_enwik8.report_format import (
    NONE,
    beginning,
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
    figures,
    full_bpc,
    hardware,
    loss_at,
    streamed_bpc,
    summary_of,
    timing_differences,
)
from megalodon_enwik8.report_runs import (
    MODELS,
    NAMES,
    Contender,
    Group,
    Run,
    Setting,
)
from megalodon_enwik8.report_statistics import paired, summarize
from megalodon_enwik8.report_study import Entrant, Study, Tuned, best_setting, show_setting
from megalodon_enwik8.report_wall_clock import equal_seconds
from megalodon_enwik8.utils import bits_per_byte

# The enwik8 figures published with the experiment: an RTX 5090, seed 7.
_FIGURES = ("parameters", "validation loss at 1100", "BPC at 1100", "peak memory", "1200 steps")
_PUBLISHED = {
    "megalodon": ("11,277,696", "1.453 (1.451 in another run)", "2.10", "12 GB", "8 m 09 s"),
    "llama": ("12,489,792", "1.534 (1.542 in another run)", "2.21", "7 GB", "3 m 07 s"),
}
_SETTING = ("learning rate", "schedule", "warm-up", "streams anew after")
_ENWIK8_CONFIGS = ("configs/megalodon_multichunk_512.yaml", "configs/llama_512.yaml")


def tuned_section(tuned: Tuned) -> str:
    parts = []
    if tuned.grid:
        parts.append(_grid(tuned))
    else:
        parts.append("No grid is given: the settings are those of the runs, not the best of any.")
    if not tuned.entrants:
        parts.append("No run of full length with these settings is given yet.")
        return "\n\n".join(parts)
    if tuned.grid:
        parts += [_finalists(entrant) for entrant in tuned.entrants.values()]
    parts.append(_entrants(tuned))
    llama = tuned.entrants[Contender("llama", False)]
    for contender, entrant in tuned.entrants.items():
        if contender.model != "llama":
            pair = (entrant.group, llama.group, contender.name, llama.contender.name)
            data = "as much data" if contender.carried else "the same data"
            parts.append(f"**{contender.name} and the Llama**, in windows that start afresh:")
            parts += [beginning(at_equal_steps(*pair, data)), equal_seconds(*pair)]
    return "\n\n".join(parts)


def _grid(tuned: Tuned) -> str:
    """Every setting tried, each model's best in bold."""
    contenders = sorted(tuned.grid, key=lambda key: (key.carried, MODELS.index(key.model)))
    settings = sorted({setting for row in tuned.grid.values() for setting in row})
    rows = []
    for setting in settings:
        cells = []
        for contender in contenders:
            loss = tuned.grid[contender].get(setting)
            text = NONE if loss is None else f"{loss:.4f}"
            best = setting == best_setting(tuned.grid[contender])
            cells.append(f"**{text}**" if best else text)
        rows.append([*_setting_cells(setting), *cells])
    header = [*_SETTING, *(each.name for each in contenders)]
    sizes = listed(f"{len(tuned.grid[each])} settings of {each.name}" for each in contenders)
    return (
        f"The grid: {sizes}, chosen by the validation loss after {tuned.grid_steps} steps with "
        f"{seeds_text(tuned.grid_seeds)}, on the same windows on which the runs below are then "
        "compared. A cosine falls from the learning rate to zero over the steps of the run, long "
        "or short, so that the best of short runs need not be the best of long ones.\n\n"
        f"{table(header, rows)}{_edges(tuned)}"
    )


def _finalists(entrant: Entrant) -> str:
    """Every setting that was run to the end, and how far it came."""
    seeds = entrant.common_seeds
    losses = {
        setting: summarize([group[seed].loss for seed in seeds])
        for setting, group in entrant.finalists.items()
    }
    order = sorted(losses, key=lambda setting: (losses[setting].mean, setting))
    ranking = "; ".join(f"{show_setting(each)}: {spread(losses[each])}" for each in order)
    steps = next(iter(entrant.group.values())).steps
    enters = " The first of these enters." if len(order) > 1 else ""
    return (
        f"{entrant.contender.name} was run for all {steps:,} steps at {ranking} "
        f"(validation loss, {seeds_text(seeds)}).{enters}"
    )


def _edges(tuned: Tuned) -> str:
    """Where the best learning rate is an outermost one of its schedule."""
    notes = []
    for contender, row in tuned.grid.items():
        entrant = tuned.entrants.get(contender)
        best = best_setting(row) if entrant is None else entrant.setting
        tried = {*row, *(entrant.finalists if entrant is not None else ())}
        rates = {each.learning_rate for each in tried if each.schedule == best.schedule}
        place = {
            (True, True): "only",
            (True, False): "lowest",
            (False, True): "highest",
        }.get((best.learning_rate == min(rates), best.learning_rate == max(rates)))
        if place is not None:
            notes.append(
                f"The best of {in_a_sentence(contender.name)} has the {place} learning rate tried "
                "with its schedule: another may be better still."
            )
    return "".join(f"\n\n{note}" for note in notes)


def _setting_cells(setting: Setting) -> list[str]:
    anew = f"{setting.carry_steps:,} steps" if setting.carry_steps else NONE
    return [f"{setting.learning_rate:g}", setting.schedule, f"{setting.warmup_steps:,}", anew]


def _entrants(tuned: Tuned) -> str:
    entrants = tuned.entrants
    compares = not timing_differences(entrant.group for entrant in entrants.values())
    llama = entrants[Contender("llama", False)].group
    final = figures(llama, lambda run: run.loss)
    rows = []
    for contender, entrant in entrants.items():
        losses = figures(entrant.group, lambda run: run.loss)
        gap = paired(losses, final)
        ours = entrant.group is llama
        rows.append(
            [
                contender.name,
                *_setting_cells(entrant.setting),
                spread(summarize(list(losses.values()))),
                f"{bits_per_byte(summarize(list(losses.values())).mean):.4f}",
                NONE if ours else f"{signed(gap.mean, 4)}",
                NONE if ours else interval(gap),
                _mean_or_none(entrant.group, full_bpc),
                _mean_or_none(entrant.group, streamed_bpc),
                _mean_or_none(entrant.group, lambda run: run.seconds, 0) if compares else NONE,
            ]
        )
    steps = next(iter(llama.values())).steps
    header = ["", *_SETTING, "loss", "BPC", "loss − Llama's", "95 % interval"]
    header += ["whole split, BPC", "whole split as a stream, BPC", "seconds"]
    note = ""
    streams = {run.streams for entrant in entrants.values() for run in entrant.group.values()}
    for count in filter(None, streams):
        beside = f", {count} streams side by side" if count > 1 else ""
        note = (
            "\n\nAs a stream: with the state carried from each byte to the next, where windows "
            f"start afresh{beside}."
        )
    if any(contender.carried for contender in entrants):
        note += (
            "\n\nA Megalodon that trains with carried state reads the text in another order than "
            "the others of its seed, as contiguous streams, which may begin anew elsewhere after "
            "some steps. Loss and BPC are those of windows "
            "that start without a state; the stream is what it trained for."
        )
    return (
        f"After {steps:,} steps, {seeds_text(sorted(llama))}, each model with "
        f"{'its best settings of those' if tuned.grid else 'settings of its own'}:\n\n"
        f"{table(header, rows)}{note}"
    )


def _mean_or_none(group: Group, figure: Callable[[Run], float | None], digits: int = 4) -> str:
    summary = summary_of(group, figure)
    return NONE if summary is None else spread(summary, digits)


def variants_section(study: Study) -> str:
    """What a Megalodon loses without a part of itself: a table and a paragraph."""
    steps = next(iter(study.variants[0].group.values())).steps
    seeds = sorted(study.variants[0].group)

    def at_step(group: Group) -> dict[int, float]:
        return {seed: loss_at(steps)(group[seed]) for seed in seeds}

    whole, llama = (at_step(study.protocol[model]) for model in MODELS)
    lead = paired(llama, whole).mean
    parameters = {model: _parameters(study.protocol[model]) for model in MODELS}
    rows = [_variant_row("Megalodon as in the protocol", parameters["megalodon"], whole, None)]
    gaps: list[tuple[float, str]] = []
    last_rows = [_variant_row("Llama", parameters["llama"], llama, whole)]
    for variant in study.variants:
        losses = at_step(variant.group)
        row = _variant_row(variant.name, _parameters(variant.group), losses, whole)
        if variant.model == "llama":
            last_rows.append(row)
        else:
            rows.append(row)
            gaps.append((paired(losses, whole).mean, variant.name))
    rows += last_rows
    sentences = [
        f"After {steps} steps the Megalodon of the protocol is {abs(lead):.4f} "
        f"{'below' if lead > 0 else 'above'} the Llama in validation loss."
    ]
    for gap, name in sorted(gaps, reverse=True):
        change = f"{abs(gap):.4f} {'higher' if gap > 0 else 'lower'}"
        if gap > 0 and lead > 0:
            change += f", {100 * gap / lead:.0f} % of that lead"
        sentences.append(f"{beginning(name)}: {change}.")
    own = study.protocol["megalodon"]
    for variant in study.variants:
        if variant.model == "llama":
            gap = paired(at_step(variant.group), llama).mean
            change = f"{abs(gap):.4f} {'higher' if gap > 0 else 'lower'}"
            sentences.append(f"{variant.name}: {change} than the Llama of the protocol.")
    if len(seeds) == 1:
        sentences.append("With one seed there is no interval.")
    if len(own) > 1 and all(run.loss_at(steps) is not None for run in own.values()):
        deviation = summarize(list(figures(own, loss_at(steps)).values())).deviation
        sentences.append(
            f"For scale: from seed to seed the Megalodon of the protocol varies by {deviation:.4f} "
            f"(standard deviation over {len(own)} seeds)."
        )
    header = ["", "parameters", f"validation loss at {steps}", "BPC", "difference"]
    return (
        f"{beginning(seeds_text(seeds))}, the settings of the protocol otherwise:\n\n"
        f"{table([*header, '95 % interval', 'relative'], rows)}\n\n{' '.join(sentences)}"
    )


def _parameters(group: Group) -> int:
    return next(iter(group.values())).environment.parameters


def _variant_row(
    name: str, parameters: int, losses: dict[int, float], whole: dict[int, float] | None
) -> list[str]:
    summary = summarize(list(losses.values()))
    cells = [name, f"{parameters:,}", spread(summary), f"{bits_per_byte(summary.mean):.4f}"]
    if whole is None:
        return [*cells, NONE, NONE, NONE]
    gap = paired(losses, whole)
    relative = 100 * gap.mean / summarize(list(whole.values())).mean
    return [*cells, signed(gap.mean, 4), interval(gap), f"{signed(relative, 2)} %"]


def speed_section(speed: Mapping[str, Any]) -> str:
    """The tables of `benchmark train`. Raises LookupError or TypeError for another content."""
    rows = [
        [
            NAMES[row["model"]],
            str(row["mode"]),
            f"{row['micro_batch']:,}",
            f"{row['step_seconds']:.3f}",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['peak_memory_bytes'] / 1e6:,.0f}" if row["peak_memory_bytes"] else NONE,
        ]
        for row in speed["rows"]
    ]
    ratios = [
        [
            str(row["mode"]),
            f"{row['micro_batch']:,}",
            f"{row['time']:.2f}",
            f"{row['memory']:.2f}",
        ]
        for row in speed["ratios"]
    ]
    return "\n\n".join(
        [
            f"A training step of {speed['sequences']} sequences of {speed['seq_len']} bytes, "
            f"{speed['dtype']}, on {speed['device']}, {speed['threads']} threads, PyTorch "
            f"{speed['torch']}; the models take turns in one process:",
            table(["", "mode", "micro-batch", "step, s", "bytes per second", "peak MB"], rows),
            table(["Megalodon / Llama", "micro-batch", "time", "memory"], ratios),
        ]
    )


def published_section(study: Study) -> str:
    """The published figures, marked as quoted, beside those of the runs on enwik8, if any."""
    rows = []
    for model in MODELS:
        measured = _measured(study.enwik8.get(model))
        for figure, quoted, own in zip(_FIGURES, _PUBLISHED[model], measured, strict=True):
            rows.append([NAMES[model], figure, quoted, own])
        full = study.enwik8.get(model)
        if full is not None:
            whole = _mean_or_none(full, full_bpc)
            rows.append([NAMES[model], "BPC of the whole validation split", "", whole])
    commands = "\n".join(f"python train.py --config {config}" for config in _ENWIK8_CONFIGS)
    made = [
        f"{NAMES[model]} with {seeds_text(sorted(group))}" for model, group in study.enwik8.items()
    ]
    if made:
        windows = next(iter(next(iter(study.enwik8.values())).values())).settings.val_batches
        note = (
            f"Measured: {listed(made)}, on {hardware(study.enwik8.values())}, validated on "
            f"{windows:,} fixed windows, as these two commands train them:"
        )
    else:
        note = "The empty column is for runs on enwik8, which these two commands make:"
    return (
        "The figures quoted are those published with the experiment, for an RTX 5090, seed 7 and "
        "ten random validation windows; they are not measured here. There a step of Megalodon took "
        "2.6 times as long as one of the Llama.\n\n"
        f"{table(['', 'figure', 'quoted', 'measured here'], rows)}\n\n{note}\n\n"
        f"```sh\n{commands}\n```\n\nName their run folders to the report beside the others."
    )


def _measured(group: Group | None) -> list[str]:
    if group is None:
        return [""] * len(_FIGURES)
    late = [loss for run in group.values() if (loss := run.loss_at(1100)) is not None]
    whole = len(late) == len(group)
    peaks = [run.peak_memory_bytes for run in group.values() if run.peak_memory_bytes is not None]
    seconds = round(summarize([run.seconds for run in group.values()]).mean)
    return [
        f"{_parameters(group):,}",
        spread(summarize(late)) if whole else NONE,
        spread(summarize([bits_per_byte(loss) for loss in late])) if whole else NONE,
        f"{max(peaks) / 1e9:.1f} GB" if peaks else NONE,
        f"{seconds // 60:,} m {seconds % 60:02} s",
    ]


def samples_section(study: Study) -> str | None:
    """What both models write after the same prompt; None unless both wrote under the same
    conditions."""
    seed = study.seeds[0]
    runs = [study.protocol[model][seed] for model in MODELS]
    keys = ("generate_prompt_len", "generate_length", "temperature", "min_p")
    conditions = [[getattr(run.settings, key) for key in keys] for run in runs]
    samples = [run.end.sample for run in runs]
    if conditions[0] != conditions[1] or None in samples:
        return None
    prompt, length, temperature, min_p = conditions[0]
    parts = [
        f"After {runs[0].steps:,} steps with seed {seed}: the first {prompt} bytes of the "
        f"validation split as a prompt, and {length} bytes that the model adds to them, at "
        f"temperature {temperature:g} with min-p {min_p:g}, from the same random numbers."
    ]
    for run, sample in zip(runs, samples, strict=True):
        parts += [f"{run.contender.name}:", _fenced(sample or "")]
    return "\n\n".join(parts)


def _fenced(text: str) -> str:
    """Any text as a block that nothing in it can end."""
    shown = "".join(
        c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text
    )
    fence = "~~~~"
    while fence in shown:
        fence += "~"
    return f"{fence}text\n{shown}\n{fence}"


def environment_section(study: Study) -> str:
    """On what the runs were made, and from which source."""
    places: dict[str, set[str]] = {}
    commits: dict[str, set[str]] = {}
    for run in study.runs:
        for session in run.environment.sessions:
            threads = f"{session.threads} thread{'s' if session.threads != 1 else ''}"
            place = (
                f"{session.hardware}, {threads}, compile: {session.compile}, PyTorch "
                f"{session.torch}, transformers {session.transformers}, Python {session.python}"
            )
            places.setdefault(place, set()).add(shown(run.path))
            commits.setdefault(session.commit or "unknown", set()).add(shown(run.path))
    lines = [f"- {place}: {_of_runs(names, study)}" for place, names in sorted(places.items())]
    for commit, names in sorted(commits.items()):
        changed = " with changes" if commit.endswith("+") else ""
        lines.append(f"- commit {commit.rstrip('+')[:12]}{changed}: {_of_runs(names, study)}")
    return "\n".join(lines)


def _of_runs(names: set[str], study: Study) -> str:
    return "all runs" if len(names) == len(study.runs) else listed(sorted(names))

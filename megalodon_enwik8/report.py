"""RESULTS.md, its pictures, and the README's headline, made from run folders:

python -m megalodon_enwik8.report RUN... --out RESULTS.md
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megalodon_enwik8 import (
    benchmark_context,
    report_comparison,
    report_sections,
    report_wall_clock,
)
from megalodon_enwik8.command_line import Parser
from megalodon_enwik8.drawing import check_can_draw
from megalodon_enwik8.errors import UserError, run_main
from megalodon_enwik8.files import atomic_write, make_folder
from megalodon_enwik8.report_format import beginning, duration, seeds_text, shown, table
from megalodon_enwik8.report_groups import hardware, timing_differences
from megalodon_enwik8.report_pictures import draw_curves
from megalodon_enwik8.report_runs import MODELS, NAMES, Group, Run, find_runs, read_run
from megalodon_enwik8.report_study import Study, arrange

BEGIN, END = "<!-- results -->", "<!-- /results -->"
_AGAIN = "runs/again"  # for runs that are made again
_COMPARISON, _TUNED, _CONTEXT = "comparison.svg", "tuned.svg", "context.svg"
_ALT = "BPC of Megalodon and the Llama against steps and against seconds of training"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m megalodon_enwik8.report",
        description="Tables and pictures of finished runs. What a run is for follows from its "
        "config: the protocol's comparison, each model at its own best settings, an ablation, or "
        "the published enwik8 table.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run folder, or a folder of them")
    parser.add_argument("--out", default="RESULTS.md", metavar="FILE", help="(%(default)s)")
    parser.add_argument(
        "--pictures",
        metavar="DIR",
        help="where the pictures go (beside --out and named like it: results/ for RESULTS.md)",
    )
    parser.add_argument(
        "--context", metavar="FILE", help="context.json of `benchmark context`, to show as well"
    )
    parser.add_argument(
        "--speed", metavar="FILE", help="train.json of `benchmark train`, to show as well"
    )
    parser.add_argument(
        "--readme",
        metavar="FILE",
        help=f"put the headline and the main picture between its lines {BEGIN} and {END}",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    out = Path(options.out)
    pictures = Path(options.pictures) if options.pictures else out.with_name(out.stem.lower())
    check_can_draw(pictures / _COMPARISON)
    readme = _read_readme(options.readme) if options.readme else None
    context = _read_context(options.context) if options.context else None
    speed = _read_speed(options.speed) if options.speed else None
    study = arrange(read_run(path) for path in find_runs(options.runs))
    make_folder(pictures, "--pictures")
    text = document(
        study,
        pictures=_relative(pictures, out.parent),
        context=None if context is None else benchmark_context.make_tables(context),
        speed=speed,
        command=_own_command(options),
    )
    written = _draw(study, context, pictures)
    _write(out, text)
    written.append(out)
    if readme is not None:
        _write(Path(options.readme), _with_headline(readme, study, options, pictures, out))
        written.append(Path(options.readme))
    print(report_comparison.headline(study))
    print(f"written: {', '.join(map(str, written))}")
    return 0


def document(
    study: Study,
    *,
    pictures: str,
    context: str | None = None,
    speed: str | None = None,
    command: str,
) -> str:
    """The text of RESULTS.md; it depends on nothing but its arguments and the current folder.

    pictures: their folder, as the text is to link to it; context, speed: the tables of the
    benchmarks; command: what makes this report.
    """
    ours, theirs = (study.protocol[model] for model in MODELS)
    parts = [
        "# Results",
        "Made by `python -m megalodon_enwik8.report`: every figure that is not marked as quoted is "
        "computed from run folders, or comes from a benchmark whose command stands beside it.",
        *_first_screen(study, command),
        f"![{_ALT}]({pictures}/{_COMPARISON})",
        "## At equal steps",
        report_comparison.equal_steps(study),
        "### Every 100 steps",
        report_comparison.every_hundred_steps(study),
        "## At equal wall-clock",
        "Seconds are those of the training steps, without validation and samples. Between two "
        "validations the loss is taken to fall in a straight line.",
        report_wall_clock.equal_seconds(ours, theirs, *NAMES.values()),
    ]
    if study.tuned is not None:
        parts += [
            "## Each model at settings of its own",
            report_sections.tuned_section(study.tuned),
        ]
        if study.tuned.entrants:
            parts.append(
                "![BPC of the tuned models against steps and against seconds of training]"
                f"({pictures}/{_TUNED})"
            )
    if study.variants:
        parts += ["## What carries the gain", report_sections.variants_section(study)]
    if speed is not None:
        parts += [
            "## Speed of a training step",
            speed,
            "Measured by `python -m megalodon_enwik8.benchmark train`.",
        ]
    if context is not None:
        parts += [
            "## Speed and memory against context",
            context.strip(),
            "Measured by `python -m megalodon_enwik8.benchmark context`.",
            f"![Throughput and memory against the length of the context]({pictures}/{_CONTEXT})",
        ]
    parts += ["## enwik8: the published figures", report_sections.published_section(study)]
    samples = report_sections.samples_section(study)
    if samples is not None:
        parts += ["## Samples", samples]
    parts += ["## The runs", _commands(study), report_sections.environment_section(study)]
    return "\n\n".join(parts) + "\n"


def _first_screen(study: Study, command: str) -> list[str]:
    """What was compared, on what, the result, how sure, and how to check it."""
    run = study.first
    corpus, settings = run.environment.corpus, run.settings
    counts = [
        f"{next(iter(study.protocol[model].values())).environment.parameters:,}" for model in MODELS
    ]
    passes = run.steps * run.bytes_per_step / corpus.train_bytes
    share = 100 * settings.val_batches * settings.seq_len / corpus.val_bytes
    seconds = sum(_undisturbed_seconds(each) for each in study.runs)
    return [
        f"**What was compared.** Megalodon ({counts[0]} parameters) with a Llama-style "
        f"Transformer, transformers' own with its own initialisation ({counts[1]} parameters), "
        f"trained alike: {report_comparison.settings_text(study)}.",
        f"**On what.** {beginning(report_comparison.text_of(run))}: "
        f"{corpus.train_bytes:,} bytes to train on, of which a run reads {passes:.2g} times as "
        f"many, and {corpus.val_bytes:,} to validate, SHA-256 `{corpus.sha256}`. The validation "
        f"loss is the mean over the same {settings.val_batches} windows of {settings.seq_len} "
        f"bytes every time ({share:.2g} % of the split, evenly spaced), in nats per byte; BPC, "
        "bits per byte, is that over ln 2.",
        f"**The result.** {report_comparison.headline(study)}",
        f"**How sure.** {report_comparison.how_sure(study)}",
        "**How to check it.** This page is made from the run folders given by the first of these "
        f"commands. [The runs](#the-runs) are made again by one command each, {duration(seconds)} "
        f"of training steps in all for the {len(study.runs)} of this page, to which start-up, "
        "validation and samples add a little, on an idle machine; the second command makes a page "
        "of those.",
        f"```sh\n{command}\npython -m megalodon_enwik8.report {_AGAIN} --out {_AGAIN}.md\n```",
    ]


def _undisturbed_seconds(run: Run) -> float:
    """The time of all steps, had other work on the machine delayed none of them."""
    if run.median_step_seconds is None:
        return run.seconds
    return run.steps * run.median_step_seconds


def _commands(study: Study) -> str:
    """One command for each run, with its time, and for each evaluation as a stream."""
    rows, streams = [], []
    for run in study.runs:
        place = Path(shown(run.path))
        config = shlex.quote(f"{place.as_posix()}/config.yaml")
        inner = Path(*place.parts[1:]) if len(place.parts) > 1 else place
        folder = shlex.quote(f"{_AGAIN}/{inner.as_posix()}")
        command = f"`python train.py --config {config} run_dir={folder}`"
        rows.append([command, f"{run.steps:,}", f"{_undisturbed_seconds(run):,.0f}"])
        if run.streams is not None:
            streams.append(
                f"python -m megalodon_enwik8.evaluation {folder}/final.pt --stream "
                f"--streams {run.streams} --out {folder}/stream.json"
            )
    text = table(["command", "steps", "seconds of training, by the median step"], rows)
    if streams:
        text += "\n\nThe figures of streams come from:\n\n```sh\n" + "\n".join(streams) + "\n```"
    return text


def _own_command(options: argparse.Namespace) -> str:
    """The command line that makes this report, without folders of this machine."""
    words = [
        "python -m megalodon_enwik8.report",
        *sorted({shlex.quote(shown(Path(path))) for path in options.runs}),
    ]
    words.append(f"--out {shlex.quote(shown(Path(options.out)))}")
    for name in ("pictures", "context", "speed", "readme"):
        value = getattr(options, name)
        if value:
            words.append(f"--{name} {shlex.quote(shown(Path(value)))}")
    return " ".join(words)


def _relative(path: Path, start: Path) -> str:
    """A link to `path` from a page in `start`."""
    return Path(os.path.relpath(path.resolve(), start.resolve())).as_posix().replace(" ", "%20")


def _draw(study: Study, context: list[dict[str, Any]] | None, folder: Path) -> list[Path]:
    """Draw all pictures; returns their files."""
    drawn = [folder / _COMPARISON]
    groups = {NAMES[model]: study.protocol[model] for model in MODELS}
    name = study.first.environment.corpus.name
    _draw_groups(groups, f"{name}: the same settings for both models", drawn[0])
    if study.tuned is not None and study.tuned.entrants:
        drawn.append(folder / _TUNED)
        entrants = {key.name: value.group for key, value in study.tuned.entrants.items()}
        _draw_groups(entrants, f"{name}: settings of its own for each model", drawn[-1])
    if context is not None and benchmark_context.draw(context, folder / _CONTEXT):
        drawn.append(folder / _CONTEXT)
    return drawn


def _draw_groups(groups: Mapping[str, Group], title: str, path: Path) -> None:
    seeds = seeds_text(sorted(next(iter(groups.values()))))
    where = f"{seeds}; {hardware(groups.values())}"
    compares = not timing_differences(groups.values())
    draw_curves(groups, f"{title}\n{where}", path, seconds=compares)


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not UTF-8 text"
        raise UserError(f"{path}: cannot be read: {reason}") from None


def _read_context(path: str) -> list[dict[str, Any]]:
    """The rows of a context.json."""
    try:
        rows: list[dict[str, Any]] = json.loads(_read(path))["rows"]
        if not any(row["kind"] in ("train", "decode") for row in rows):
            raise LookupError
        benchmark_context.make_tables(rows)
    except (ValueError, LookupError, TypeError, AttributeError):
        raise UserError(
            f"--context {path}: is no context.json of this version's `benchmark context`"
        ) from None
    return rows


def _read_speed(path: str) -> str:
    """The tables of a train.json."""
    try:
        return report_sections.speed_section(json.loads(_read(path)))
    except (ValueError, LookupError, TypeError, AttributeError):
        raise UserError(
            f"--speed {path}: is no train.json of this version's `benchmark train`"
        ) from None


def _read_readme(path: str) -> str:
    text = _read(path)
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(END) < text.index(BEGIN):
        raise UserError(f"{path}: needs one line {BEGIN} and, after it, one line {END}")
    return text


def _with_headline(
    text: str, study: Study, options: argparse.Namespace, pictures: Path, out: Path
) -> str:
    """A README whose text between the markers is the headline and the main picture."""
    folder = Path(options.readme).parent
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    parts = [
        f"{BEGIN}",
        report_comparison.headline(study),
        f"![{_ALT}]({_relative(pictures, folder)}/{_COMPARISON})",
        f"All figures, how sure they are, and how to check them: "
        f"[{out.name}]({_relative(out, folder)}).",
        END,
    ]
    return before + "\n\n".join(parts) + after


def _write(path: Path, text: str) -> None:
    with atomic_write(path) as file:
        file.write(text.encode())


if __name__ == "__main__":
    run_main(lambda: main(sys.argv[1:]))

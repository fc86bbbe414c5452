"""Figures of groups of runs, and whether their seconds compare."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from megalodon_enwik8.report_format import listed
from megalodon_enwik8.report_runs import Group, Run
from megalodon_enwik8.report_statistics import Summary, summarize
from megalodon_enwik8.utils import bits_per_byte


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


def full_bpc(run: Run) -> float | None:
    return None if run.full_loss is None else bits_per_byte(run.full_loss)


def streamed_bpc(run: Run) -> float | None:
    return None if run.streamed_loss is None else bits_per_byte(run.streamed_loss)


def peak_megabytes(run: Run) -> float | None:
    return None if run.peak_memory_bytes is None else run.peak_memory_bytes / 1e6


def summary_of(group: Group, figure: Callable[[Run], float | None]) -> Summary | None:
    """Mean and spread of a figure; None unless all runs have it."""
    known = [value for run in group.values() if (value := figure(run)) is not None]
    return summarize(known) if len(known) == len(group) else None


def hardware(groups: Iterable[Group]) -> str:
    """On what the runs were made."""
    return listed(
        sorted(
            {
                session.hardware
                for group in groups
                for run in group.values()
                for session in run.environment.sessions
            }
        )
    )


def timing_differences(groups: Iterable[Group]) -> list[str]:
    """In what the runs differ that seconds and memory depend on; empty if those compare."""
    conditions = [
        {
            "device": session.hardware,
            "threads": session.threads,
            "version of PyTorch": session.torch,
            "compilation": session.compile.partition(" ")[0],
            "sequences in a micro-batch": run.settings.batch_size,
            "gradient checkpointing": run.settings.gradient_checkpointing,
        }
        for group in groups
        for run in group.values()
        for session in run.environment.sessions
    ]
    return [key for key in conditions[0] if len({each[key] for each in conditions}) > 1]

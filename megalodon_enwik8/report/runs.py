"""Run folders, read and checked, and the groups that they make: runs that differ in their seed."""

from __future__ import annotations

import glob
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from megalodon_enwik8.config import (
    FREE_KEYS,
    ExperimentConfig,
    bits_per_byte,
    has_key,
)
from megalodon_enwik8.safety import UserError


@dataclass(frozen=True)
class Timing:
    """A run's steps as `benchmark train` measured them."""

    first: float  # seconds, with its compilation
    step: float
    in_bfloat16: bool  # the benchmark's steps, whatever the run's were

    def seconds(self, steps: float) -> float:
        """Of training, after so many steps."""
        return self.first + (steps - 1) * self.step if steps else 0.0

    def steps(self, seconds: float) -> float:
        return 1 + max(0.0, seconds - self.first) / self.step


@dataclass(frozen=True)
class Run:
    """A finished run."""

    path: Path  # as it was named
    config: dict[str, Any]  # with the schema's defaults for the keys that it lacks
    model: str  # as tables call it
    seed: int
    steps: int
    bytes_a_step: int
    text: str  # name and checksum
    device: str
    parameters: int
    losses: dict[int, float]  # by steps, in nats per byte; the last at the end
    peak_megabytes: float  # nan: unknown
    full_val_bpc: float  # of the whole validation split; nan: unknown
    sample: str
    timing: Timing | None = None  # a run's own clock has in it what else the machine did

    @property
    def recipe(self) -> dict[str, Any]:
        """All that sets the course of the run, but for the seed."""
        free = FREE_KEYS | {"seed"}
        chosen = {key: value for key, value in self.config.items() if key not in free}
        return {**chosen, "bytes_a_step": self.bytes_a_step, "text": self.text}


Group = tuple[Run, ...]
"""Runs of one recipe, in the order of their seeds."""


def read_run(folder: Path) -> Run:
    """Raises UserError, a line, for a folder that is missing, damaged, or of an unfinished run."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such run folder")
    config = _load(folder / "config.yaml", yaml.safe_load)
    environment = _load(folder / "environment.json", json.loads)
    # Whole lines end in a newline; another may be on its way.
    rows = _load(
        folder / "metrics.jsonl", lambda text: [json.loads(row) for row in text.split("\n")[:-1]]
    )
    try:
        return _assemble(folder, config, environment, rows)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise UserError(f"{folder}: damaged: {type(error).__name__}: {error}") from None


def _load(path: Path, load: Callable[[str], Any]) -> Any:
    if not path.is_file():
        raise UserError(
            f"{path.parent}: has no {path.name}: it is no run folder, or not all of one"
        )
    try:
        return load(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, yaml.YAMLError):
        raise UserError(f"{path}: damaged: cannot be read") from None


def _assemble(
    folder: Path, config: dict[str, Any], environment: dict[str, Any], rows: list[dict[str, Any]]
) -> Run:
    fields = ExperimentConfig.model_fields
    own = [name for name in fields if has_key(config["model"], name)]
    config = {**{name: fields[name].default for name in own}, **config}
    json.dumps(config, sort_keys=True)  # by which runs are put together: no dates, no sets
    steps = config["num_batches"]
    end: dict[str, Any] = rows[-1] if rows else {"step": -1}
    if end["step"] != steps or "train_loss" in end:
        raise UserError(
            f"{folder}: not finished: {end['step'] + 1} of {steps} steps; go on with --resume"
        )
    losses = {row["step"]: row["val_loss"] for row in rows if row.get("val_loss") is not None}
    if not all(map(math.isfinite, losses.values())) or list(losses) != sorted(losses):
        raise ValueError("validations that are no numbers or not in their order")
    if steps not in losses:
        raise ValueError("no validation at the end")
    corpus, session = environment["corpus"], environment["sessions"][-1]
    return Run(
        path=folder,
        config=config,
        model=config["model"].title(),
        seed=int(config["seed"]),
        steps=steps,
        bytes_a_step=int(config["batch_size"]) * config["grad_accum_every"] * config["seq_len"],
        text=f"{corpus['name']} ({corpus['sha256'][:16]})",
        device=session["device"],
        parameters=int(environment["parameters"]),
        losses=losses,
        peak_megabytes=max(row.get("peak_memory_bytes") or 0 for row in rows) / 1e6 or math.nan,
        full_val_bpc=bits_per_byte(end.get("full_val_loss") or math.nan),
        sample=str(end.get("sample") or ""),
    )


def find_groups(patterns: Iterable[str], root: Path = Path()) -> list[Group]:
    """The runs that globs (from `root`) match, as groups in the order of their first runs.

    Raises UserError for a glob that matches nothing, and two runs of one recipe and seed.
    """
    groups: dict[str, dict[int, Run]] = {}
    for folder in dict.fromkeys(path for pattern in patterns for path in match(pattern, root)):
        run = replace(read_run(root / folder), path=Path(folder))
        group = groups.setdefault(json.dumps(run.recipe, sort_keys=True), {})
        if run.seed in group:
            twin = group[run.seed].path
            raise UserError(f"{twin} and {run.path}: the same recipe and seed {run.seed} twice")
        group[run.seed] = run
    return [tuple(group[seed] for seed in sorted(group)) for group in groups.values()]


def match(pattern: str, root: Path) -> list[str]:
    """What a glob matches, in order; a name may hold a glob's signs itself."""
    exact = (root / pattern).exists()
    found = [pattern] if exact else sorted(glob.glob(pattern, root_dir=root))
    if not found:
        raise UserError(f"{pattern}: matches nothing")
    return found


def one_group(patterns: Iterable[str], root: Path = Path()) -> Group:
    """Likewise, where all runs must be of one recipe."""
    first, *others = find_groups(patterns, root)
    if others:
        (a, *_), (b, *_) = first, others[0]
        key = next(key for key in a.recipe | b.recipe if a.recipe.get(key) != b.recipe.get(key))
        raise UserError(
            f"{a.path} and {b.path} are of two recipes, where one was asked for: "
            f"{key} is {a.recipe.get(key)} and {b.recipe.get(key)}"
        )
    return first


def check_comparable(groups: Sequence[Group]) -> None:
    """Raise UserError unless losses of these groups may stand in one table."""
    first = groups[0][0]
    for other, *_ in groups:
        for key in ("text", "bytes_a_step", "val_batches", "val_windows"):
            a, b = first.recipe[key], other.recipe[key]
            if a != b:
                raise UserError(
                    f"{first.path} and {other.path} cannot stand in one table: {key} is {a} and {b}"
                )


def timed(groups: Iterable[Group], measured: dict[str, Any] | None) -> list[Group]:
    """The groups with seconds and memory as `benchmark train` measured them, train.json."""
    if measured is None:
        return list(groups)
    return [tuple(_time(run, measured) for run in group) for group in groups]


def _time(run: Run, measured: dict[str, Any]) -> Run:
    """The fastest such step of the run's model, in the run's own precision if that was measured.
    Raises UserError where the benchmark has none, or not its first, or not its memory."""
    config = {**run.config, "step_bytes": run.bytes_a_step}
    keys = ("step_bytes", "seq_len", "chunk_size", "batch_size")
    asked = {key: config[key] for key in keys if key in config}
    own = bool(config["use_autocast"])
    try:
        most = run.bytes_a_step // asked["seq_len"]  # sequences, for one micro-batch
        rows = [{**row, "batch_size": min(row["batch_size"], most)} for row in measured["rows"]]
        found = [
            (row["use_autocast"], row[run.config["model"]]) for row in rows if row | asked == row
        ]
        precision, figures = min(found, key=lambda pair: (pair[0] != own, pair[1]["step, s"]))
        timing = Timing(figures["first step, s"], figures["step, s"], precision)
        return replace(run, timing=timing, peak_megabytes=figures["peak memory, MB"])
    except (LookupError, TypeError, ValueError):
        said = ", ".join(f"{key}={value}" for key, value in asked.items())
        raise UserError(
            f"{run.path}: the benchmark has no such step: {said}; or not its first, or its memory"
        ) from None


def differing_keys(groups: Sequence[Group]) -> list[str]:
    """The keys in which groups of the same model differ."""
    recipes = [group[0].recipe for group in groups]
    pairs = [(a, b) for a in recipes for b in recipes if a["model"] == b["model"]]
    keys = dict.fromkeys(key for recipe in recipes for key in recipe)
    return [key for key in keys if any(a.get(key) != b.get(key) for a, b in pairs)]


def group_names(groups: Sequence[Group]) -> list[str]:
    """What to call each: its model, and in what it differs from the first of that model."""
    first: dict[str, Group] = {}
    names = []
    for group in groups:
        run = group[0]
        keys = differing_keys([group, first.setdefault(run.model, group)])
        names.append(", ".join([run.model, *(f"{key} {run.recipe.get(key)}" for key in keys)]))
    return names

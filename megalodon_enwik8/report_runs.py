"""Run folders, read and checked."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Literal, NamedTuple, TypeVar

import yaml
from pydantic import BaseModel, Field, FiniteFloat, ValidationError

from megalodon_enwik8.config import ExperimentConfig
from megalodon_enwik8.errors import UserError
from megalodon_enwik8.report_statistics import Point
from megalodon_enwik8.run_folder import read_metrics
from megalodon_enwik8.training import FREE_ON_RESUME

MODELS = ("megalodon", "llama")
_FILES = ("config.yaml", "environment.json", "metrics.jsonl")  # of a run folder
NAMES = {"megalodon": "Megalodon", "llama": "Llama"}

PROTOCOL: Mapping[str, Any] = {
    **{name: field.default for name, field in ExperimentConfig.model_fields.items()},
    "ffn_dim_multiplier": 2.67,
    "weight_decay": 2e-4,
}
"""The protocol's settings: the schema's defaults, but for these."""

# Compared between the runs of a table, or without influence on the figures.
_NEUTRAL_KEYS = FREE_ON_RESUME | {"model", "seed", "seq_len", "val_batches", "on_nonfinite"}


class Settings(BaseModel):
    """The keys of config.yaml that the report asks for."""

    model: Literal["megalodon", "llama"]
    seed: int
    num_batches: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    grad_accum_every: int = Field(ge=1)
    seq_len: int = Field(ge=1)
    val_batches: int
    learning_rate: FiniteFloat
    schedule: str
    warmup_steps: int
    carry_state: bool
    carry_steps: int | None
    ablation: str
    chunk_size: int
    cema_ndim: int
    llama_init: str
    gradient_checkpointing: bool
    generate_prompt_len: int
    generate_length: int
    temperature: float
    min_p: float

    @property
    def sequences(self) -> int:
        """In a step."""
        return self.batch_size * self.grad_accum_every

    @property
    def bytes_per_step(self) -> int:
        return self.sequences * self.seq_len


class CorpusFacts(BaseModel):
    name: str
    sha256: str
    train_bytes: int
    val_bytes: int

    @property
    def size(self) -> int:
        return self.train_bytes + self.val_bytes


class Session(BaseModel):
    """One start of a run, or one resumption."""

    device: str
    threads: int
    torch: str
    commit: str | None = None
    transformers: str = "unknown"
    python: str = "unknown"
    compile: str = "unknown"
    processor: str | None = None

    @property
    def hardware(self) -> str:
        """The device; of a CPU also its name."""
        if self.device.startswith("cpu (") and self.processor:
            return self.device.replace("(", f"({self.processor}, ", 1)
        return self.device


class Environment(BaseModel):
    corpus: CorpusFacts
    parameters: int
    sessions: list[Session] = Field(min_length=1)


class Row(BaseModel):
    """A line of metrics.jsonl. The end's has no train_loss, that of a skipped step a null."""

    step: int = Field(ge=0)
    seconds: FiniteFloat
    train_loss: FiniteFloat | None = None
    tokens_per_second: FiniteFloat | None = Field(None, gt=0)
    val_loss: FiniteFloat | None = None
    full_val_loss: FiniteFloat | None = None
    skipped_steps: int = 0
    peak_memory_bytes: int | None = None
    sample: str | None = None


class TrainedAt(BaseModel):
    """How the checkpoint of an evaluation was trained."""

    seed: int
    seq_len: int
    carry_state: bool


class Evaluation(BaseModel):
    """What `python -m megalodon_enwik8.evaluation` writes."""

    step: int
    model: str
    trained_at: TrainedAt
    corpus_sha256: str
    split: str
    reading: dict[str, int]
    loss: FiniteFloat


class Setting(NamedTuple):
    """What may differ between the two models of a fair fight."""

    learning_rate: float
    schedule: str
    warmup_steps: int
    carry_steps: int = 0  # after so many, carried streams begin anew; 0: at the end of the text


class Contender(NamedTuple):
    """A model, and whether it trains with the state carried from step to step."""

    model: str
    carried: bool

    @property
    def name(self) -> str:
        return NAMES[self.model] + (" with carried state" if self.carried else "")


@dataclass(frozen=True)
class Run:
    """A finished run."""

    path: Path
    settings: Settings
    differences: Mapping[str, Any]  # from the protocol's settings
    environment: Environment
    points: Sequence[Point]  # its validations, the last at the end
    end: Row
    median_step_seconds: float | None
    peak_memory_bytes: int | None
    full_loss: float | None  # of the whole validation split, in windows of seq_len
    streamed_loss: float | None  # of the whole validation split, read as streams
    streams: int | None  # that were read side by side

    @property
    def seed(self) -> int:
        return self.settings.seed

    @property
    def steps(self) -> int:
        return self.settings.num_batches

    @property
    def bytes_per_step(self) -> int:
        return self.settings.bytes_per_step

    @property
    def seconds(self) -> float:
        return self.end.seconds

    @property
    def loss(self) -> float:
        return self.points[-1].loss

    @property
    def bytes_per_second(self) -> float:
        return self.steps * self.bytes_per_step / self.seconds

    @property
    def setting(self) -> Setting:
        settings = self.settings
        return Setting(
            settings.learning_rate,
            settings.schedule,
            settings.warmup_steps,
            settings.carry_steps or 0,
        )

    @property
    def contender(self) -> Contender:
        return Contender(self.settings.model, self.settings.carry_state)

    def loss_at(self, step: int) -> float | None:
        """The validation loss after so many steps; None if there was no validation."""
        return next((point.loss for point in self.points if point.step == step), None)


Group = Mapping[int, Run]
"""Runs that differ in their seeds alone, by seed."""


Model = TypeVar("Model", bound=BaseModel)


def find_runs(paths: Iterable[str | Path]) -> list[Path]:
    """The run folders among `paths` and, where one is no run folder, inside it; each once."""
    found: dict[Path, Path] = {}
    for path in map(Path, paths):
        for folder in _runs_inside(path) or [path]:
            found.setdefault(folder.resolve(), folder)
    return list(found.values())


def _runs_inside(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    if any((folder / name).exists() for name in _FILES):
        return [folder]
    return [run for inside in sorted(folder.iterdir()) for run in _runs_inside(inside)]


def read_run(path: str | Path) -> Run:
    """Read a run folder. Raises UserError, one line each, for what is missing or damaged, and
    for a run that has not come to its end."""
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"{path}: no such run folder")
    given = _read_config(folder)
    settings = _check(Settings, {**PROTOCOL, **given}, f"{folder / 'config.yaml'}")
    environment = _read_json(Environment, folder / "environment.json")
    rows = _read_rows(folder)
    end = rows[-1]
    if end.step != settings.num_batches or "train_loss" in end.model_fields_set:
        raise UserError(
            f"{folder}: still going or cut off, after {end.step + 1} of {settings.num_batches} "
            f"steps: resume it with --resume, or wait"
        )
    peaks = [row.peak_memory_bytes for row in rows if row.peak_memory_bytes is not None]
    run = Run(
        path=folder,
        settings=settings,
        differences={
            key: value
            for key, value in given.items()
            if key not in _NEUTRAL_KEYS and (key not in PROTOCOL or value != PROTOCOL[key])
        },
        environment=environment,
        points=_points(rows, settings, folder / "metrics.jsonl"),
        end=end,
        median_step_seconds=_median_step_seconds(rows, settings),
        peak_memory_bytes=max(peaks, default=None),
        full_loss=end.full_val_loss,
        streamed_loss=None,
        streams=None,
    )
    return _with_evaluations(run)


def _read_config(folder: Path) -> dict[str, Any]:
    """config.yaml as it stands: folders stay readable when the schema's rules change."""
    path = folder / "config.yaml"
    try:
        values = yaml.safe_load(_read_text(path))
    except (yaml.YAMLError, ValueError, RecursionError):  # ValueError: a date that is none
        raise UserError(f"{path}: not valid YAML") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: must hold `key: value` lines")
    return {str(key): value for key, value in values.items()}


def _read_rows(folder: Path) -> list[Row]:
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{folder}: has no metrics.jsonl: it holds no run, or not all of one")
    rows = [
        _check(Row, row, f"{path}: line {number}")
        for number, row in enumerate(read_metrics(path), start=1)
    ]
    if not rows:
        raise UserError(f"{path}: is empty: the run has made no step yet")
    return rows


def _median_step_seconds(rows: Sequence[Row], settings: Settings) -> float | None:
    speeds = [row.tokens_per_second for row in rows if row.tokens_per_second is not None]
    return settings.bytes_per_step / median(speeds) if speeds else None


def _points(rows: Sequence[Row], settings: Settings, path: Path) -> list[Point]:
    """The validations of a run that has come to its end."""
    points: list[Point] = []
    for number, row in enumerate(rows, start=1):
        if row.val_loss is None:
            continue
        seconds = row.seconds
        if row is not rows[-1]:
            # A validation comes before the step of its row, and a row counts its own step.
            if row.tokens_per_second is None:
                raise UserError(f"{path}: line {number}: has no tokens_per_second")
            seconds = max(0.0, seconds - settings.bytes_per_step / row.tokens_per_second)
        if points and not (points[-1].step < row.step and points[-1].seconds < seconds):
            raise UserError(f"{path}: line {number}: is not later than the validation before it")
        points.append(Point(row.step, seconds, row.val_loss))
    if not points or points[-1].step != rows[-1].step:
        raise UserError(f"{path}: the last line, of the end of the run, has no val_loss")
    return points


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path.parent}: has no {path.name}: it is no whole run folder") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8 text") from None


def _read_json(kind: type[Model], path: Path) -> Model:
    try:
        content = json.loads(_read_text(path))
    except (ValueError, RecursionError):
        raise UserError(f"{path}: not valid JSON") from None
    return _check(kind, content, str(path))


def _check(kind: type[Model], content: object, where: str) -> Model:
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise UserError(f"{where}: {key + ': ' if key else ''}{first['msg']}") from None


def _with_evaluations(run: Run) -> Run:
    """The run with what windows.json and stream.json in its folder add to it."""
    full = run.full_loss
    path = run.path / "windows.json"
    if full is None and path.exists():
        windows = _read_evaluation(run, path)
        length = run.settings.seq_len
        if windows.reading != {"context": length, "stride": length}:
            raise UserError(f"{path}: is not of windows of {length} side by side, as all others")
        full = windows.loss
    path = run.path / "stream.json"
    if not path.exists():
        return replace(run, full_loss=full)
    stream = _read_evaluation(run, path)
    if "streams" not in stream.reading:
        raise UserError(f"{path}: is not of a stream: make it with --stream")
    streams = stream.reading["streams"]
    return replace(run, full_loss=full, streamed_loss=stream.loss, streams=streams)


def _read_evaluation(run: Run, path: Path) -> Evaluation:
    result = _read_json(Evaluation, path)
    settings = run.settings
    of_the_run = {
        "model": settings.model,
        "step": run.steps,
        "corpus_sha256": run.environment.corpus.sha256,
        "split": "val",
        "seed": settings.seed,
        "seq_len": settings.seq_len,
        "carry_state": settings.carry_state,
    }
    given = {**dict(result), **dict(result.trained_at)}
    for key, value in of_the_run.items():
        if given[key] != value:
            raise UserError(f"{path}: {key} is {given[key]}, but {value} of the run")
    return result

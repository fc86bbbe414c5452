"""A run's folder: who may use it, what lies in it, and where a resumed run goes on.

config.yaml          the config actually used
environment.json     corpus, parameters, and versions and device of each session
metrics.jsonl        one JSON object per training step, and one for the end
checkpoint_*.pt      after so many steps, with the optimizer, to resume from
best.pt  final.pt    weights to use
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from megalodon_enwik8.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from megalodon_enwik8.config import ExperimentConfig
from megalodon_enwik8.errors import UserError, explain_os_error
from megalodon_enwik8.files import atomic_write, exclusive_lock, remove_leftovers

_CHECKPOINT = re.compile(r"checkpoint_(\d+)\.pt")
NEWEST = ""  # in place of a path: the newest valid checkpoint of the folder


class RunFolder:
    """The folder of one run, held by one process. Made by `open_run`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._metrics: IO[str] | None = None

    def file(self, name: str) -> Path:
        return self.path / name

    def checkpoints(self) -> list[Path]:
        """The checkpoints to resume from, oldest first."""
        found = {int(m[1]): p for p in self.path.iterdir() if (m := _CHECKPOINT.fullmatch(p.name))}
        return [found[step] for step in sorted(found)]

    def run_files(self) -> list[Path]:
        """All files by which a folder counts as holding a run."""
        names = ("config.yaml", "environment.json", "metrics.jsonl", "best.pt", "final.pt")
        present = [self.file(name) for name in names if self.file(name).exists()]
        return self.checkpoints() + present

    def find_checkpoint(self, resume: str | Path) -> tuple[Checkpoint, Path] | None:
        """The checkpoint to resume from: the file `resume`, or the newest valid one here.

        None when the run was cut off before its first checkpoint. Damaged ones are skipped,
        with a line each. Raises UserError when `resume` is no checkpoint, or none here is valid.
        """
        if resume != NEWEST:
            return load_checkpoint(resume), Path(resume)
        found = self.checkpoints()
        for path in reversed(found):
            try:
                return load_checkpoint(path), path
            except UserError as error:
                print(f"skipped: {error}", file=sys.stderr)
        if found:
            raise UserError(f"{self.path}: no valid checkpoint; start again with --overwrite")
        if self.file("final.pt").exists():
            raise UserError(
                f"{self.path}: holds final weights but no checkpoint to resume from; "
                f"start again with --overwrite"
            )
        return None

    def begin(
        self,
        config: ExperimentConfig,
        environment: dict[str, Any],
        session: dict[str, Any],
        *,
        step: int,
        resumed: Path | None,
    ) -> None:
        """Write what the run is, and open metrics.jsonl for the rows from `step` on.

        resumed: the checkpoint that the run goes on from, whose folder has the rows and sessions
        before; None starts afresh. What an earlier run left here beyond that is removed.
        """
        rows: list[dict[str, Any]] = []
        sessions: list[dict[str, Any]] = []
        if resumed is not None:
            rows = [r for r in read_metrics(resumed.with_name("metrics.jsonl")) if r["step"] < step]
            if len(rows) < step:
                print(
                    f"{resumed.parent}: metrics.jsonl tells of {len(rows)} of the {step} steps "
                    f"before; the rest is lost",
                    file=sys.stderr,
                )
            sessions = _sessions(resumed.with_name("environment.json"))
        for path in self.run_files():
            name = _CHECKPOINT.fullmatch(path.name)
            if resumed is None or (name and int(name[1]) > step):
                path.unlink()
        with atomic_write(self.file("config.yaml")) as file:
            file.write(config.to_yaml().encode())
        with atomic_write(self.file("environment.json")) as file:
            content = {**environment, "sessions": [*sessions, session]}
            file.write((json.dumps(content, indent=2) + "\n").encode())
        with atomic_write(self.file("metrics.jsonl")) as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
        self._metrics = open(self.file("metrics.jsonl"), "a", encoding="utf-8")  # noqa: SIM115

    def log(self, row: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        assert self._metrics is not None
        self._metrics.write(json.dumps(row) + "\n")
        self._metrics.flush()

    def save(self, name: str, checkpoint: Checkpoint) -> Path:
        """Save a checkpoint; what metrics.jsonl holds by then is on the disk before it."""
        if self._metrics is not None:
            os.fsync(self._metrics.fileno())
        path = self.file(name)
        save_checkpoint(path, checkpoint)
        return path

    def save_step(self, checkpoint: Checkpoint, keep_last: int | None) -> Path:
        """Save checkpoint_<step>.pt and remove all but the last `keep_last` of its kind."""
        path = self.save(f"checkpoint_{checkpoint.step:08d}.pt", checkpoint)
        if keep_last is not None:
            for old in self.checkpoints()[:-keep_last]:
                old.unlink()
        return path

    def close(self) -> None:
        if self._metrics is not None:
            self._metrics.close()


@contextmanager
def open_run(path: str | Path, *, may_hold_a_run: bool) -> Iterator[RunFolder]:
    """Create the folder if need be and hold it while the block runs.

    Raises UserError if another process holds it, if it cannot be made, or if it holds a run
    and `may_hold_a_run` is false.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"run_dir={path}: is or goes through a file; name a folder") from None
    except OSError as error:
        raise explain_os_error(error, path) or UserError(
            f"run_dir={path}: cannot be made: {error.strerror}"
        ) from error
    with exclusive_lock(folder / ".lock", blocking=False):
        remove_leftovers(folder)
        run = RunFolder(folder)
        if not may_hold_a_run and run.run_files():
            raise UserError(
                f"{path}: holds a run already; go on with --resume, replace it with --overwrite, "
                f"or choose another run_dir="
            )
        try:
            yield run
        finally:
            run.close()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a last line that a crash cut off is left out.

    Raises UserError for a file that cannot be read or is damaged elsewhere.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8", errors="replace").split("\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    rows = []
    for number, line in enumerate(lines[:-1], start=1):  # whole lines end in a newline
        try:
            row = json.loads(line)
            rows.append({**row, "step": int(row["step"])})
        except (ValueError, LookupError, TypeError):
            raise UserError(f"{path}: line {number} is damaged") from None
    return rows


def _sessions(path: Path) -> list[dict[str, Any]]:
    """The sessions that an environment.json tells of; none if it is missing or unreadable."""
    try:
        sessions = json.loads(path.read_text(encoding="utf-8"))["sessions"]
    except (OSError, ValueError, LookupError, TypeError):
        return []
    return sessions if isinstance(sessions, list) else []

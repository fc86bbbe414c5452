"""A run's folder: who may use it, what lies in it, and where a resumed run goes on.

config.yaml          the config actually used
environment.json     corpus, parameters, and versions and device of each session
metrics.jsonl        one JSON object per training step, and one for the end
checkpoint_*.pt      after so many steps, with the optimizer, to resume from
best.pt  final.pt    weights to use
replaced/            what a new start here replaces, until its own first checkpoint is due
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from megalodon_enwik8.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from megalodon_enwik8.config import ExperimentConfig
from megalodon_enwik8.errors import UserError, explain_os_error
from megalodon_enwik8.files import atomic_write, exclusive_lock, remove_folder, remove_leftovers

_CHECKPOINT = re.compile(r"checkpoint_(\d+)\.pt")
_REPLACED = "replaced"
_MOVING = ".replacing"  # becomes _REPLACED when all is in it
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
        matches = ((_CHECKPOINT.fullmatch(path.name), path) for path in self.path.iterdir())
        found = {int(match[1]): path for match, path in matches if match and path.is_file()}
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
        before; None starts afresh. What an earlier run left here beyond that goes to replaced/,
        and `forget_replaced` removes it there.
        """
        rows: list[dict[str, Any]] = []
        sessions: list[dict[str, Any]] = []
        if resumed is not None:
            found = _parse_lines(resumed.with_name("metrics.jsonl"))
            by_step = {row["step"]: row for row in found if row is not None}
            rows = [by_step[i] for i in sorted(by_step) if 0 <= i < step]
            if len(rows) < step:
                print(
                    f"{resumed.parent}: metrics.jsonl tells of {len(rows)} of the {step} steps "
                    f"before; the rest is lost",
                    file=sys.stderr,
                )
            sessions = _sessions(resumed.with_name("environment.json"))
        if resumed is None:
            self._set_aside(self.run_files())
        else:
            later = [path for path in self.checkpoints() if _step_of(path) > step]
            names = ("metrics.jsonl", "environment.json", "best.pt")  # what this run writes anew
            beside = [self.file(name) for name in names if self.file(name).exists()]
            self._set_aside(later, copies=beside)
        with atomic_write(self.file("config.yaml")) as file:
            file.write(config.to_yaml().encode())
        with atomic_write(self.file("environment.json")) as file:
            content = {**environment, "sessions": [*sessions, session]}
            file.write((json.dumps(content, indent=2) + "\n").encode())
        with atomic_write(self.file("metrics.jsonl")) as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
        self._metrics = open(self.file("metrics.jsonl"), "a", encoding="utf-8")  # noqa: SIM115

    def log(self, row: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl. Raises UserError when the disk is full."""
        assert self._metrics is not None
        with _disk_errors(self.file("metrics.jsonl")):
            self._metrics.write(json.dumps(row) + "\n")
            self._metrics.flush()

    def save(self, name: str, checkpoint: Checkpoint) -> Path:
        """Save a checkpoint; what metrics.jsonl holds by then is on the disk before it."""
        if self._metrics is not None:
            with _disk_errors(self.file("metrics.jsonl")):
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

    def forget_replaced(self) -> None:
        """Remove replaced/: the run that was started in its place is well under way."""
        if self.file(_REPLACED).is_dir():
            remove_folder(self.file(_REPLACED))

    def close(self) -> None:
        if self._metrics is not None:
            with contextlib.suppress(OSError):  # what could not be written has been said
                self._metrics.close()

    def holds_a_run(self) -> bool:
        return bool(self.run_files()) or self.file(_REPLACED).exists()

    def undo_unfinished_move(self) -> None:
        """Put back what a killed process was moving to replaced/."""
        moving = self.file(_MOVING)
        if moving.is_dir():
            for path in moving.iterdir():
                if self.file(path.name).exists():
                    path.unlink()  # a copy
                else:
                    path.rename(self.file(path.name))
            moving.rmdir()

    def _set_aside(self, paths: list[Path], copies: Sequence[Path] = ()) -> None:
        """Move run files to replaced/, all or none of them, with copies of some that stay."""
        if not paths:
            return
        replaced, moving = self.file(_REPLACED), self.file(_MOVING)
        if replaced.is_dir():
            self._set_aside_more(paths)
            return
        moving.mkdir()
        for path in copies:
            shutil.copy2(path, moving)
        for path in paths:
            path.rename(moving / path.name)
        moving.rename(replaced)
        print(f"what was there is kept in {replaced} until the next checkpoint is due", flush=True)

    def _set_aside_more(self, paths: list[Path]) -> None:
        """The same once more, before the next checkpoint was due.

        If replaced/ holds a whole run, that is still the one to keep, and its successor, which
        never got far, goes. If it holds the end of this run, the rest joins it.
        """
        replaced = self.file(_REPLACED)
        whole = (replaced / "config.yaml").exists()
        for path in sorted(paths, key=lambda path: path.name == "config.yaml"):  # it comes last
            if whole or (replaced / path.name).exists():
                path.unlink()
            else:
                path.rename(replaced / path.name)


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
        run.undo_unfinished_move()
        if not may_hold_a_run and run.holds_a_run():
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
    rows = []
    for number, row in enumerate(_parse_lines(path), start=1):
        if row is None:
            raise UserError(f"{path}: line {number} is damaged")
        rows.append(row)
    return rows


def _parse_lines(path: str | Path) -> Iterator[dict[str, Any] | None]:
    """Each whole line of a metrics.jsonl, None for a damaged one; no lines if it is missing.

    Raises UserError for a file that cannot be read.
    """
    if not os.path.exists(path):
        return
    if not os.path.isfile(path):  # opening a pipe could wait for ever
        raise UserError(f"{path}: is not a regular file")
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    for line in text.split("\n")[:-1]:  # whole lines end in a newline
        try:
            row = json.loads(line)
            yield {**row, "step": int(row["step"])}
        except (ValueError, LookupError, TypeError, OverflowError, RecursionError):
            yield None


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """Turn a full disk and the like into a UserError that names `path`."""
    try:
        yield
    except OSError as error:
        raise explain_os_error(error, path) or UserError(
            f"{path}: cannot be written: {error.strerror}"
        ) from error


def _step_of(checkpoint: Path) -> int:
    match = _CHECKPOINT.fullmatch(checkpoint.name)
    assert match is not None
    return int(match[1])


def _sessions(path: Path) -> list[dict[str, Any]]:
    """The sessions that an environment.json tells of; none if it is missing or unreadable."""
    if not path.is_file():
        return []
    try:
        sessions = json.loads(path.read_text(encoding="utf-8"))["sessions"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return []
    return sessions if isinstance(sessions, list) else []

"""A run on the disk: who may use its folder, what lies in it, and where a resumed run goes on.

config.yaml          the config actually used
environment.json     corpus, parameters, and versions and device of each session
metrics.jsonl        one JSON object per training step, and one for the end
tensorboard/         the same, if the config's `tracker` asks for it
checkpoint_*.pt      after so many steps, with the optimizer, to resume from
best.pt  final.pt    weights to use

A run is never deleted: one that is started over, or gone back in, is renamed to RUN_DIR.old-TIME.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from megalodon_enwik8.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from megalodon_enwik8.config import ExperimentConfig
from megalodon_enwik8.safety import UserError, atomic_write

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

NEWEST = "newest"  # in place of a path: the newest valid checkpoint of the folder

Row = dict[str, Any]


class RunFolder:
    """The folder of one run. Who writes to it holds it; others of the same run may look."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._stack = ExitStack()  # closes what is open when the process is done with the folder
        self._board: SummaryWriter | None = None

    @contextmanager
    def held(self, *, may_hold_a_run: bool) -> Iterator[None]:
        """Create the folder if need be and hold it while the block runs.

        Raises UserError if another process holds it, or if it holds a run and `may_hold_a_run` is
        false.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with self._stack:
            try:  # the operating system releases it when its holder dies, however it dies
                self._stack.enter_context(FileLock(self.file(".lock"), blocking=False))
            except Timeout:
                raise UserError(
                    f"{self.path} is in use by another process: wait for it or stop it"
                ) from None
            for leftover in self.path.glob(".*.writing"):  # of a process that was killed
                leftover.unlink()
            if self.holds_a_run() and not may_hold_a_run:
                raise UserError(
                    f"{self.path}: holds a run already; go on with --resume, start over with "
                    "--overwrite, which keeps it under another name, or choose another run_dir="
                )
            yield

    def file(self, name: str) -> Path:
        return self.path / name

    def checkpoints(self) -> list[Path]:
        """The checkpoints to resume from, oldest first."""
        found = [p for p in self.path.glob("checkpoint_*.pt") if p.stem[11:].isdecimal()]
        return sorted(found, key=lambda path: int(path.stem[11:]))

    def holds_a_run(self) -> bool:
        names = ("config.yaml", "metrics.jsonl", "best.pt", "final.pt")
        return bool(self.checkpoints()) or any(self.file(name).exists() for name in names)

    def find_checkpoint(self, resume: str | Path) -> Checkpoint | None:
        """The checkpoint to resume from: the file `resume`, or the newest valid one here.

        None when the run was cut off before its first checkpoint. Damaged ones are skipped,
        with a line each. Raises UserError when `resume` is no checkpoint, or none here is valid.
        """
        if resume != NEWEST:
            return load_checkpoint(Path(resume))
        for path in reversed(self.checkpoints()):
            try:
                return load_checkpoint(path)
            except UserError as error:
                print(f"skipped: {error}", file=sys.stderr)
        if self.checkpoints() or self.file("final.pt").exists():
            raise UserError(
                f"{self.path}: holds no valid checkpoint to resume from; start again with "
                "--overwrite, which keeps what is there under another name"
            )
        print(f"{self.path}: has no checkpoint yet: starting from step 0", flush=True)
        return None

    def begin(
        self, config: ExperimentConfig, environment: dict[str, Any], resumed: Checkpoint | None
    ) -> None:
        """Write what the run is, and the rows before.

        environment: for environment.json, with this session as the last. resumed: what the run
        goes on from, whose folder has the rows and sessions before; None starts afresh.
        """
        before = None if resumed is None else resumed.path.resolve()
        if self.holds_a_run() and before not in [p.resolve() for p in self.checkpoints()[-1:]]:
            aside = self._rename()
            if before and before.parent == self.path.resolve():
                before = aside / before.name
        rows: list[Row] = []
        if resumed and before:
            found = read_metrics(before.with_name("metrics.jsonl"))
            rows = [row for row in found if row["step"] < resumed.step]
            if len(rows) < resumed.step:
                print(
                    f"{before.parent}: metrics.jsonl tells of {len(rows)} of the {resumed.step} "
                    "steps before; the rest is lost",
                    file=sys.stderr,
                )
            with contextlib.suppress(OSError, ValueError, LookupError, TypeError):  # it only tells
                told = json.loads(before.with_name("environment.json").read_text(encoding="utf-8"))
                environment["sessions"] = [*told["sessions"], *environment["sessions"]]
        for name, text in (
            ("config.yaml", config.to_yaml()),
            ("environment.json", json.dumps(environment, indent=2) + "\n"),
            ("metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows)),
        ):
            with atomic_write(self.file(name)) as file:
                file.write(text.encode())
        if resumed and before and before.parent != self.path.resolve():
            # Here too, so that a kill before the next save goes on from there.
            own = self.file(f"checkpoint_{resumed.step:08d}.pt")
            with before.open("rb") as source, atomic_write(own) as file:
                shutil.copyfileobj(source, file)
        if config.tracker == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            shutil.rmtree(self.file("tensorboard"), ignore_errors=True)
            # purge_step: a TensorBoard that is looking forgets what it saw of the old one.
            board = SummaryWriter(self.file("tensorboard"), purge_step=0, flush_secs=30)
            self._board = self._stack.enter_context(board)
            for row in rows:
                self._show(row)

    def _rename(self) -> Path:
        """Give the folder another name and make a new one in its place. Returns the old one."""
        path = self.path.resolve()  # a link stays
        if Path.cwd().is_relative_to(path):
            raise UserError(f"{path}: has to be renamed: start this from outside of it")
        aside = path.with_name(f"{path.name}.old-{datetime.now():%Y%m%d-%H%M%S-%f}")
        path.rename(aside)
        path.mkdir()
        self._stack.enter_context(FileLock(path / ".lock", blocking=False))
        print(f"what was there is now {aside}", flush=True)
        return aside

    def log(self, row: Row) -> None:
        """Append one line to metrics.jsonl, and show it on the board if there is one."""
        with self.file("metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self._show(row)

    def _show(self, row: Row) -> None:
        """Its numbers as curves over the steps and its texts as texts, if there is a board."""
        if self._board is None:
            return
        for name, value in row.items():
            if isinstance(value, str):
                self._board.add_text(name, value, row["step"])
            elif value is not None and name != "step":
                self._board.add_scalar(name, value, row["step"])

    def save(self, name: str, checkpoint: Checkpoint, keep_last: int | None = None) -> None:
        """Save a checkpoint; what metrics.jsonl holds by then is on the disk before it. Of those to
        resume from, the last `keep_last` are kept."""
        with self.file("metrics.jsonl").open("a") as file:
            os.fsync(file.fileno())
        save_checkpoint(self.file(name), checkpoint)
        if keep_last is not None:
            for old in self.checkpoints()[:-keep_last]:
                old.unlink()


def read_metrics(path: Path) -> list[Row]:
    """The whole rows of a metrics.jsonl, without damaged ones; none where there is no file."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    rows = []
    for line in text.split("\n")[:-1]:  # whole lines end in a newline
        with contextlib.suppress(ValueError, LookupError, TypeError, OverflowError, RecursionError):
            row = json.loads(line)
            rows.append({**row, "step": int(row["step"])})
    return rows


def check_tracker(tracker: str) -> None:
    """Raise UserError if the tracker's package is not installed."""
    if tracker != "none" and find_spec(tracker) is None:
        raise UserError(f'tracker={tracker}: is not installed: pip install -e ".[track]"')

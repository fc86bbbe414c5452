"""A run's folder: held by one process, never replaced by accident."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megalodon_enwik8.config import ExperimentConfig
from megalodon_enwik8.errors import UserError
from megalodon_enwik8.files import exclusive_lock
from megalodon_enwik8.run_folder import NEWEST, RunFolder, read_metrics
from megalodon_enwik8.training import train

from .endings import Crash, assert_same_ending, ending


def test_a_folder_that_holds_a_run_is_refused_unless_told(make_tiny: Any) -> None:
    config = make_tiny("llama")
    assert train(config) == 0
    before = ending(config)[0]
    with pytest.raises(UserError, match="holds a run already; go on with --resume, replace it"):
        train(config)
    assert ending(config)[0] == before
    shorter = make_tiny("llama", num_batches=2)
    assert train(shorter, overwrite=True) == 0
    assert [path.name for path in RunFolder(Path(config.run_dir)).checkpoints()] == [
        "checkpoint_00000002.pt"
    ]


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def test_a_run_is_replaced_only_when_the_new_one_has_saved_what_was_due(
    make_tiny: Any, crash_in_step: Any, signal_in_step: Any, tmp_path: Path
) -> None:
    config = make_tiny("llama", keep_best=True)
    folder = Path(config.run_dir)
    assert train(config) == 0
    old = files_of(folder)
    shorter = make_tiny("llama", num_batches=4, seed=8)
    for arrange in (lambda: crash_in_step(1), lambda: signal_in_step(0, signal.SIGTERM)):
        arrange()  # the second of them leaves a checkpoint that was not due
        with contextlib.suppress(Crash):
            assert train(shorter, overwrite=True) == 143
        assert files_of(folder / "replaced") == old
        with pytest.raises(UserError, match="holds a run already"):
            train(shorter)
    assert train(shorter, resume=NEWEST) == 0
    assert not (folder / "replaced").exists()
    whole = make_tiny("llama", num_batches=4, seed=8, run_dir=str(tmp_path / "whole"))
    assert train(whole) == 0
    assert_same_ending(shorter, whole)


@contextlib.contextmanager
def crash_after(moves: int) -> Iterator[None]:
    """Die when one more file is to be moved."""
    rename, left = Path.rename, [moves]

    def crashing(self: Path, target: Path) -> Path:
        if not left[0]:
            raise Crash
        left[0] -= 1
        return rename(self, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "rename", crashing)
        yield


def test_a_move_cut_off_anywhere_is_undone_at_the_next_start(make_tiny: Any) -> None:
    config = make_tiny("llama")
    folder = Path(config.run_dir)
    assert train(config) == 0
    old = files_of(folder)
    for moves in range(len(old) + 1):
        with crash_after(moves), pytest.raises(Crash):
            train(config, overwrite=True)
        with pytest.raises(UserError, match="holds a run already"):
            train(config)
        assert files_of(folder) == old


def test_going_back_to_an_older_checkpoint_keeps_the_later_ones_until_one_is_due(
    make_tiny: Any, crash_in_step: Any
) -> None:
    config = make_tiny("llama")
    folder = RunFolder(Path(config.run_dir))
    assert train(config) == 0
    crash_in_step(2)
    with pytest.raises(Crash):
        train(config, resume=folder.file("checkpoint_00000002.pt"))
    assert sorted(path.name for path in folder.file("replaced").iterdir()) == [
        "checkpoint_00000004.pt",
        "checkpoint_00000006.pt",
        "environment.json",
        "metrics.jsonl",
    ]
    assert len(read_metrics(folder.file("replaced") / "metrics.jsonl")) == 7
    assert train(config, resume=NEWEST) == 0
    assert len(folder.checkpoints()) == 3
    assert not folder.file("replaced").exists()


def test_overwriting_after_going_back_keeps_the_whole_run_until_a_checkpoint_is_due(
    make_tiny: Any, crash_in_step: Any
) -> None:
    config = make_tiny("llama", keep_best=True)
    folder = RunFolder(Path(config.run_dir))
    assert train(config) == 0
    old = files_of(folder.path)
    for step in (4, 2):
        crash_in_step(step)
        with pytest.raises(Crash):
            train(config, resume=folder.file(f"checkpoint_{step:08d}.pt"))
    crash_in_step(0)
    with pytest.raises(Crash):
        train(config, overwrite=True)
    assert files_of(folder.file("replaced")) == old


def test_going_back_cut_off_anywhere_is_undone_at_the_next_start(make_tiny: Any) -> None:
    config = make_tiny("llama")
    folder = RunFolder(Path(config.run_dir))
    assert train(config) == 0
    old = files_of(folder.path)
    for moves in range(3):  # two checkpoints, then the folder with all
        with crash_after(moves), pytest.raises(Crash):
            train(config, resume=folder.file("checkpoint_00000002.pt"))
        with pytest.raises(UserError, match="holds a run already"):
            train(config)
        assert files_of(folder.path) == old


def test_best_weights_are_kept_in_a_folder_that_goes_on_from_another(
    make_tiny: Any, tmp_path: Path
) -> None:
    config = make_tiny("llama", keep_best=True)
    assert train(config) == 0
    here = make_tiny("llama", keep_best=True, run_dir=str(tmp_path / "here"))
    assert train(here, resume=Path(config.run_dir) / "checkpoint_00000006.pt") == 0
    assert (tmp_path / "here" / "best.pt").exists()


def test_a_checkpoint_of_another_folder_does_not_replace_the_run_that_is_here(
    make_tiny: Any, tmp_path: Path
) -> None:
    here, other = make_tiny("llama"), make_tiny("llama", run_dir=str(tmp_path / "other"))
    assert train(here) == train(other) == 0
    before = files_of(Path(here.run_dir))
    with pytest.raises(UserError, match=r"holds a run already; .* or choose another run_dir="):
        train(here, resume=Path(other.run_dir) / "checkpoint_00000002.pt")
    assert files_of(Path(here.run_dir)) == before


def resume_and_report(config: ExperimentConfig, outcomes: Any) -> None:
    try:
        outcomes.put(train(config, resume=NEWEST))
    except UserError as error:
        outcomes.put(str(error))


def test_of_two_resumes_at_once_one_goes_on_and_one_is_told(
    make_tiny: Any, processes: Any, tmp_path: Path
) -> None:
    options = {"num_batches": 120, "validate_every": 0, "save_every": 40}
    whole = make_tiny("llama", **options)
    assert train(whole) == 0
    half = make_tiny("llama", **{**options, "num_batches": 40}, run_dir=str(tmp_path / "shared"))
    assert train(half) == 0
    config = make_tiny("llama", **options, run_dir=half.run_dir)
    outcomes = processes.Queue()
    both = [processes.Process(target=resume_and_report, args=(config, outcomes)) for _ in range(2)]
    for process in both:
        process.start()
    results = [outcomes.get(timeout=300) for _ in both]
    for process in both:
        process.join()
    assert 0 in results
    results.remove(0)
    # The second may have come when the first was done, which leaves nothing to do.
    assert results[0] == 0 or ".lock is held by process" in results[0]
    assert_same_ending(config, whole)


def test_two_processes_cannot_share_a_folder(make_tiny: Any) -> None:
    config = make_tiny("llama")
    Path(config.run_dir).mkdir()
    with (
        exclusive_lock(Path(config.run_dir) / ".lock"),
        pytest.raises(UserError, match="is held by process"),
    ):
        train(config)


def test_a_folder_that_cannot_be_made_is_named(make_tiny: Any, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match=r"run_dir=.*: is or goes through a file; name a fol"):
            train(make_tiny("llama", run_dir=str(path)))


def test_a_folder_behind_a_link_is_used_and_a_link_to_nothing_is_named(
    make_tiny: Any, tmp_path: Path
) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    assert train(make_tiny("llama", run_dir=str(tmp_path / "link"))) == 0
    assert (tmp_path / "disk" / "final.pt").exists()
    with pytest.raises(UserError, match=r"run_dir=.*broken: is or goes through a file"):
        train(make_tiny("llama", run_dir=str(tmp_path / "broken")))


def test_a_link_in_place_of_the_lock_leaves_its_target_alone(
    make_tiny: Any, tmp_path: Path
) -> None:
    config = make_tiny("llama")
    Path(config.run_dir).mkdir()
    (tmp_path / "precious").write_text("precious")
    (Path(config.run_dir) / ".lock").symlink_to(tmp_path / "precious")
    with pytest.raises(UserError, match="cannot create the lock file"):
        train(config)
    assert (tmp_path / "precious").read_text() == "precious"


def test_final_weights_are_not_replaced_when_their_checkpoints_are_gone(make_tiny: Any) -> None:
    config = make_tiny("llama")
    assert train(config) == 0
    for path in RunFolder(Path(config.run_dir)).checkpoints():
        path.unlink()
    with pytest.raises(UserError, match="holds final weights but no checkpoint"):
        train(config, resume=NEWEST)


def test_metrics_leave_out_a_cut_last_line_and_name_a_damaged_one(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}\n{"st')
    assert read_metrics(path) == [{"step": 0}, {"step": 1}]
    path.write_text('{"step": 0}\nnonsense\n{"step": 2}\n')
    with pytest.raises(UserError, match="line 2 is damaged"):
        read_metrics(path)
    assert read_metrics(tmp_path / "none") == []

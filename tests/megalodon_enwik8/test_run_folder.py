"""A run's folder: held by one process, never replaced by accident."""

import json
import shutil
import time
from pathlib import Path

import pytest

from megalodon_enwik8.config import load_config
from megalodon_enwik8.run_folder import NEWEST, RunFolder, read_metrics
from megalodon_enwik8.safety import UserError
from megalodon_enwik8.training import train

from .endings import Crash, assert_same_ending, ending


def test_a_folder_that_holds_a_run_is_refused_unless_told(make_tiny):
    config = make_tiny("llama")
    assert train(config) == 0
    before = ending(config)[0]
    with pytest.raises(UserError, match="holds a run already; go on with --resume, start over"):
        train(config)
    assert ending(config)[0] == before


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def asides(folder):
    return sorted(folder.parent.glob(f"{folder.name}.old-*"))


def test_a_run_that_is_started_over_is_renamed_and_whole(make_tiny, crash_in_step, tmp_path):
    config = make_tiny("llama", keep_best=True)
    folder = Path(config.run_dir)
    assert train(config) == 0
    old = files_of(folder)
    shorter = make_tiny("llama", num_batches=4, seed=8)
    crash_in_step(3)
    with pytest.raises(Crash):
        train(shorter, overwrite=True)
    assert [files_of(aside) for aside in asides(folder)] == [old]
    with pytest.raises(UserError, match="holds a run already"):
        train(shorter)
    assert train(shorter, resume=NEWEST) == 0
    assert len(asides(folder)) == 1
    whole = make_tiny("llama", num_batches=4, seed=8, run_dir=str(tmp_path / "whole"))
    assert train(whole) == 0
    assert_same_ending(shorter, whole)


def test_a_folder_is_not_renamed_under_the_feet_of_the_program(make_tiny, monkeypatch):
    config = make_tiny("llama")
    folder = Path(config.run_dir)
    assert train(config) == 0
    before = files_of(folder)
    monkeypatch.chdir(folder)
    with pytest.raises(UserError, match="has to be renamed: start this from outside of it"):
        train(make_tiny("llama", run_dir="."), overwrite=True)
    assert (files_of(folder), asides(folder)) == (before, [])


def test_a_run_that_was_moved_goes_on_where_it_is(make_tiny, tmp_path):
    config = make_tiny("llama", num_batches=4)
    assert train(config) == 0
    moved = Path(config.run_dir).rename(tmp_path / "moved")
    found = load_config(moved / "config.yaml", ["num_batches=6"])
    assert train(found, resume=NEWEST) == 0
    assert not Path(config.run_dir).exists()
    assert_same_ending(found, make_tiny("llama", run_dir=str(moved)))
    assert load_config(moved / "config.yaml", ["run_dir=x"]).run_dir == "x"


def test_what_is_only_called_like_a_checkpoint_is_none(make_tiny):
    config = make_tiny("llama", num_batches=4, keep_last=1)
    folder = RunFolder(config.run_dir)
    assert train(config) == 0
    kept = folder.file("checkpoint_backup.pt")
    shutil.copy(folder.checkpoints()[-1], kept)
    assert train(make_tiny("llama", num_batches=8, keep_last=1), resume=NEWEST) == 0
    assert [path.name for path in folder.checkpoints()] == ["checkpoint_00000008.pt"]
    assert kept.exists()
    folder.file("checkpoint_100000000.pt").touch()  # a digit more sorts behind, not before
    assert folder.checkpoints()[-1].name == "checkpoint_100000000.pt"


def test_nothing_is_renamed_before_the_new_run_is_known_to_start(make_tiny):
    config = make_tiny("llama")
    assert train(config) == 0
    with pytest.raises(UserError, match="seq_len=1000000"):
        train(make_tiny("llama", seq_len=1_000_000), overwrite=True)
    assert not asides(Path(config.run_dir))


def test_going_back_to_an_older_checkpoint_keeps_the_run_and_ends_the_same(
    make_tiny, tmp_path, crash_in_step
):
    config = make_tiny("llama")
    folder = RunFolder(config.run_dir)
    assert train(config) == 0
    old = files_of(folder.path)
    crash_in_step(3)
    with pytest.raises(Crash):
        train(config, resume=folder.file("checkpoint_00000002.pt"))
    assert train(config, resume=NEWEST) == 0
    assert [files_of(aside) for aside in asides(folder.path)] == [old]
    assert [row["step"] for row in read_metrics(folder.file("metrics.jsonl"))] == [*range(7)]
    whole = make_tiny("llama", run_dir=str(tmp_path / "whole"))
    assert train(whole) == 0
    assert_same_ending(config, whole)


def test_a_folder_behind_a_link_is_renamed_on_its_own_disk(make_tiny, tmp_path):
    (tmp_path / "disk" / "real").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "real")
    config = make_tiny("llama", run_dir=str(tmp_path / "link"))
    assert train(config) == train(config, overwrite=True) == 0
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk" / "real" / "final.pt").exists()
    assert len(list((tmp_path / "disk").iterdir())) == 2


def test_best_weights_are_kept_in_a_folder_that_goes_on_from_another(make_tiny, tmp_path):
    config = make_tiny("llama", keep_best=True)
    assert train(config) == 0
    here = make_tiny("llama", keep_best=True, run_dir=str(tmp_path / "here"))
    assert train(here, resume=Path(config.run_dir) / "checkpoint_00000006.pt") == 0
    assert (tmp_path / "here" / "best.pt").exists()


def test_a_checkpoint_of_another_folder_comes_with_its_history_and_what_was_here_is_renamed(
    make_tiny, tmp_path
):
    here, other = make_tiny("llama"), make_tiny("llama", run_dir=str(tmp_path / "other"))
    assert train(here) == train(other) == 0
    before = files_of(Path(here.run_dir))
    assert train(here, resume=Path(other.run_dir) / "checkpoint_00000002.pt") == 0
    assert [files_of(aside) for aside in asides(Path(here.run_dir))] == [before]
    assert_same_ending(here, other)
    environment = json.loads((Path(here.run_dir) / "environment.json").read_text())
    assert [session["from_step"] for session in environment["sessions"]] == [0, 2]


def resume_and_report(config, outcomes):
    try:
        outcomes.put(train(config, resume=NEWEST))
    except UserError as error:
        outcomes.put(str(error))


def test_of_two_resumes_at_once_one_goes_on_and_one_is_told(make_tiny, processes, tmp_path):
    options = {"num_batches": 40, "validate_every": 0, "save_every": 10}
    whole = make_tiny("llama", **options)
    assert train(whole) == 0
    half = make_tiny("llama", **{**options, "num_batches": 12}, run_dir=str(tmp_path / "shared"))
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
    assert results[0] == 0 or "is in use by another process" in results[0]
    assert_same_ending(config, whole)


def hold(path, events):
    with RunFolder(path).held(may_hold_a_run=False):
        events.put("held")
        time.sleep(600)


def test_a_second_process_is_told_that_the_folder_is_in_use_until_its_holder_dies(
    make_tiny, processes
):
    config, events = make_tiny("llama"), processes.Queue()
    holder = processes.Process(target=hold, args=(config.run_dir, events))
    holder.start()
    assert events.get(timeout=300) == "held"
    with pytest.raises(UserError, match=f"{config.run_dir} is in use by another process: "):
        train(config)
    holder.kill()
    holder.join()
    assert train(config) == 0


def test_a_folder_that_cannot_be_made_is_named(make_tiny, tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(OSError, match=str(path)):
            train(make_tiny("llama", run_dir=str(path)))


def test_a_link_to_nothing_is_named(make_tiny, tmp_path):
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    with pytest.raises(OSError, match="broken"):
        train(make_tiny("llama", run_dir=str(tmp_path / "broken")))


def test_a_link_in_place_of_the_lock_leaves_its_target_alone(make_tiny, tmp_path):
    config = make_tiny("llama")
    Path(config.run_dir).mkdir()
    (tmp_path / "precious").write_text("precious")
    (Path(config.run_dir) / ".lock").symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match="lock"):
        train(config)
    assert (tmp_path / "precious").read_text() == "precious"


def test_metrics_leave_out_a_damaged_line_and_a_cut_last_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\nnonsense\n{"step": 2}\n{"step": 3')
    assert read_metrics(path) == [{"step": 0}, {"step": 2}]
    assert read_metrics(tmp_path / "none") == []


def test_a_run_without_a_checkpoint_says_that_it_starts_anew(tmp_path, capsys):
    assert RunFolder(tmp_path).find_checkpoint(NEWEST) is None
    assert "has no checkpoint yet: starting from step 0" in capsys.readouterr().out

"""A run cut off at any moment and resumed ends as the uninterrupted one, bit for bit."""

import errno
import itertools
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from megalodon_enwik8 import run_folder, training
from megalodon_enwik8.checkpoint import load_checkpoint
from megalodon_enwik8.config import load_config
from megalodon_enwik8.data import Corpus
from megalodon_enwik8.distributed import World
from megalodon_enwik8.models import build_model
from megalodon_enwik8.run_folder import NEWEST, RunFolder, read_metrics
from megalodon_enwik8.safety import UserError
from megalodon_enwik8.training import Trainer, train

from .endings import Crash, assert_same_ending, checkpoints_of, ending


@pytest.fixture(autouse=True)
def signals_are_not_ignored(monkeypatch):
    """As a shell starts a program; behind `&` in a script SIGINT would be ignored, and behind
    nohup SIGHUP."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    hung_up = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGINT, before)
    signal.signal(signal.SIGHUP, hung_up)


def test_a_crash_in_any_step_changes_nothing_of_the_ending(
    make_tiny, model_name, crash_in_step, tmp_path
):
    options = {
        "num_batches": 5,
        "generate_every": 2,
        "attention_dropout": 0.2,
        "keep_best": True,
        "keep_last": 1,
    }
    whole = make_tiny(model_name, **options)
    assert train(whole) == 0
    for step in range(6):  # 5 is the line of the end
        config = make_tiny(model_name, **options, run_dir=str(tmp_path / f"crash-{step}"))
        crash_in_step(step)
        with pytest.raises(Crash):
            train(config)
        assert train(config, resume=NEWEST) == 0
        assert_same_ending(config, whole)
        best = [load_checkpoint(Path(c.run_dir) / "best.pt").step for c in (config, whole)]
        assert best[0] == best[1]


@pytest.mark.parametrize(
    ("kills", "steps"), [(1, 12), pytest.param(50, 40, marks=pytest.mark.slow, id="50_random")]
)
def test_kill_9_at_any_moment_changes_nothing_of_the_ending(
    make_tiny, processes, tmp_path, kills, steps
):
    def config(name):
        options = {"num_batches": steps, "save_every": 3, "keep_last": 2}
        options |= {"generate_every": steps // 2}
        return make_tiny("megalodon", **options, dropout=0.2, run_dir=str(tmp_path / name))

    def start(*args, **kwargs):
        process = processes.Process(target=train, args=args, kwargs=kwargs)
        process.start()
        return process

    whole = config("whole")
    start(whole).join()  # so that the next one measures no first start
    began = time.monotonic()
    process = start(whole, overwrite=True)
    process.join()
    assert process.exitcode == 0
    duration = time.monotonic() - began

    for number in range(kills):
        killed = config(f"killed-{number}")
        process = start(killed)
        time.sleep(random.uniform(0, duration))
        process.kill()
        process.join()
        process = start(killed, resume=NEWEST)
        process.join(timeout=300)
        assert process.exitcode == 0
        assert_same_ending(killed, whole)
        assert not list(Path(killed.run_dir).glob("*.writing"))


SIGNALS = [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]

# Where a signal comes: in which call of what, whether that is left at once, and the steps saved.
MOMENTS = {
    "the first step": (RunFolder, "log", 0, False, 1),
    "a step": (RunFolder, "log", 2, False, 3),
    "the last step": (RunFolder, "log", 5, False, 6),
    "the first validation": (training, "score_windows", 0, True, 0),
    "a validation": (training, "score_windows", 1, True, 2),
    "the whole split": (training, "score_windows", 4, True, 6),
    "a sample": (training, "generate_bytes", 0, True, 2),
    "another sample": (training, "generate_bytes", 1, True, 4),
    "a checkpoint": (torch, "save", 1, False, 2),  # the first is best.pt
}


@pytest.mark.parametrize(
    ("moment", "number", "code"),
    [(moment, *each) for moment, each in zip(MOMENTS, itertools.cycle(SIGNALS), strict=False)],
    ids=MOMENTS,
)
def test_a_signal_saves_says_how_to_resume_and_loses_nothing(
    make_tiny, monkeypatch, capsys, tmp_path, moment, number, code
):
    options = {"generate_every": 2, "keep_best": True, "full_validation": True}
    whole = make_tiny("llama", **options)
    assert train(whole) == 0
    config = make_tiny("llama", **options, run_dir=str(tmp_path / "stopped"))
    before = signal.getsignal(number)
    owner, name, call, at_once, step = MOMENTS[moment]
    work, calls = getattr(owner, name), itertools.count()

    def signalled(*arguments, **keywords):
        meets_it = next(calls) == call
        if meets_it:
            signal.raise_signal(number)
        result = work(*arguments, **keywords)
        assert not (meets_it and at_once), "what the signal met came to its end"
        return result

    def nobody_reads(*arguments):
        raise BrokenPipeError

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, signalled)
        patch.setattr(os, "write", nobody_reads)
        assert train(config) == code
    assert signal.getsignal(number) == before
    assert checkpoints_of(config)[-1].name == f"checkpoint_{step:08d}.pt"
    file = Path(config.run_dir) / "config.yaml"
    said = f"stopped after {step} steps, all saved; go on with: python train.py --config {file} --"
    assert f"{said}resume\n" in capsys.readouterr().out
    assert train(config, resume=NEWEST) == 0
    assert_same_ending(config, whole)


def train_in_the_foreground(config):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    train(config)


def test_a_second_ctrl_c_leaves_at_once_and_the_old_checkpoints_load(make_tiny, processes):
    config = make_tiny("llama", num_batches=100_000, batch_size=200, seq_len=200, save_every=1)
    process = processes.Process(target=train_in_the_foreground, args=(config,))
    process.start()
    folder = RunFolder(config.run_dir)
    deadline = time.monotonic() + 300
    while not (folder.path.exists() and folder.checkpoints()) and time.monotonic() < deadline:
        time.sleep(0.01)
    for _ in range(2):
        os.kill(process.pid, signal.SIGINT)
        time.sleep(0.02)  # two signals pending at once count as one
    process.join(timeout=300)
    # The signal ended it, unless it had already saved and left.
    assert process.exitcode in (-signal.SIGINT, 0)
    for path in folder.checkpoints():
        load_checkpoint(path)


def test_what_compile_auto_chooses_does_not_hang_on_where_a_run_resumes(make_tiny, monkeypatch):
    asked = []

    def choose(model, config, processes):
        asked.append(config.num_batches)
        return "off (a test)"

    monkeypatch.setattr(training, "compile_layers", choose)
    config = make_tiny("llama", compile="auto")
    assert train(config) == 0
    assert train(config, resume=Path(config.run_dir) / "checkpoint_00000004.pt") == 0
    assert asked == [6, 6]


def test_a_closed_terminal_saves(make_tiny, tmp_path):
    long_steps = {"batch_size": 100, "seq_len": 100, "val_batches": 1}
    config = make_tiny("llama", num_batches=100_000, save_every=100_000, **long_steps)
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml())
    terminal, end = os.openpty()
    # The first terminal that the leader of a session opens is its own.
    run = f'exec "$@" <{os.ttyname(end)} >{os.ttyname(end)} 2>&1'
    process = subprocess.Popen(
        ["sh", "-c", run, "sh", sys.executable, "train.py", "--config", path],
        cwd=Path(__file__).parents[2],
        stdin=end,
        start_new_session=True,
    )
    os.close(end)
    too_late = threading.Timer(120, process.kill)
    too_late.start()
    said = b""
    with process:
        while b"step 0: validation loss" not in said:
            try:
                said += os.read(terminal, 1000)
            except OSError:  # nobody writes any more
                pytest.fail(said.decode())
        os.close(terminal)
        time.sleep(0.05)  # still in the step; two signals pending at once count as one
        process.send_signal(signal.SIGHUP)  # as a shell does that dies with its terminal
    too_late.cancel()
    # The second signal ended it, if all was saved by then.
    assert process.returncode in (128 + signal.SIGHUP, -signal.SIGHUP)
    folder = RunFolder(config.run_dir)
    (checkpoint,) = folder.checkpoints()
    assert load_checkpoint(checkpoint).step == len(read_metrics(folder.path / "metrics.jsonl"))


def test_a_run_whose_reader_leaves_is_saved(make_tiny, tmp_path):
    config = make_tiny("llama", num_batches=100_000, save_every=100_000, validate_every=1)
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml())
    run = f'"{sys.executable}" train.py --config "{path}" 2>&1; echo $? >"{tmp_path}/code"'
    done = subprocess.run(
        ["sh", "-c", f"({run}) | sed '/step 3: validation loss/q'"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "step 3: validation loss" in done.stdout
    assert (tmp_path / "code").read_text() == "141\n"
    folder = RunFolder(config.run_dir)
    (checkpoint,) = folder.checkpoints()
    assert load_checkpoint(checkpoint).step == len(read_metrics(folder.path / "metrics.jsonl"))


def test_a_terminal_that_closes_before_a_line_ends_nothing(make_tiny, monkeypatch):
    terminal, end = os.openpty()
    score, open_ends = training.score_windows, [terminal]

    def close(*arguments, **keywords):
        while open_ends:
            os.close(open_ends.pop())
        return score(*arguments, **keywords)

    with open(end, "w") as stdout, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stdout)
        patch.setattr(training, "score_windows", close)
        assert train(make_tiny("llama")) == 0
        os.dup2(os.open(os.devnull, os.O_WRONLY), end)  # what is unwritten must go somewhere


def test_a_signal_that_the_process_was_started_to_ignore_stays_ignored(make_tiny, monkeypatch):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    monkeypatch.setattr(RunFolder, "log", lambda *_: signal.raise_signal(signal.SIGINT))
    assert train(make_tiny("llama")) == 0
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN


def test_a_damaged_newest_checkpoint_is_skipped_with_a_line(make_tiny, capsys, tmp_path):
    whole, config = make_tiny("llama"), make_tiny("llama", run_dir=str(tmp_path / "damaged"))
    assert train(whole) == train(config) == 0
    newest = Path(config.run_dir) / "checkpoint_00000006.pt"
    newest.write_bytes(newest.read_bytes()[:-100])
    assert train(config, resume=NEWEST) == 0
    assert f"skipped: {newest}: truncated" in capsys.readouterr().err
    assert_same_ending(config, whole)


def test_a_run_whose_checkpoints_are_damaged_or_gone_is_no_new_run(make_tiny):
    config = make_tiny("llama", keep_last=1)
    assert train(config) == 0
    (checkpoint,) = checkpoints_of(config)
    for spoil in (lambda: checkpoint.write_bytes(b""), checkpoint.unlink):
        spoil()
        with pytest.raises(UserError, match=r"no valid checkpoint to resume from; start again"):
            train(config, resume=NEWEST)


@pytest.mark.parametrize("options", [{}, {"optimizer": "adamw", "weight_decay": 0.1}], ids=str)
def test_a_finished_run_goes_on_when_num_batches_grows(make_tiny, tmp_path, options):
    short = make_tiny("megalodon", num_batches=4, **options)
    assert train(short) == 0
    longer = make_tiny("megalodon", **options)
    assert train(longer, resume=NEWEST) == 0
    whole = make_tiny("megalodon", run_dir=str(tmp_path / "whole"), **options)
    assert train(whole) == 0
    assert_same_ending(longer, whole)


def test_resuming_may_split_the_batch_another_way(make_tiny, tmp_path):
    whole = make_tiny("llama")
    assert train(whole) == 0
    half = make_tiny("llama", run_dir=str(tmp_path / "half"), num_batches=4)
    assert train(half) == 0
    split = {"batch_size": 1, "grad_accum_every": 4}
    config = make_tiny("llama", run_dir=half.run_dir, **split)
    assert train(config, resume=NEWEST) == 0
    weights, others = ending(config)[1], ending(whole)[1]
    for name, weight in weights.items():
        # Only the order of summation differs, for two steps of 3e-3.
        torch.testing.assert_close(weight, others[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "damaged",
    [
        b'{"step": 0}\n',
        b'{"step": 0}\n{"st\n',
        b'{"step": 0}\n\x00\x00\xff\n{"step": Infinity}\n' + b"[" * 10**5 + b"\n",
    ],
)
def test_lost_metrics_are_said_and_do_not_stop_the_run(make_tiny, capsys, damaged):
    config = make_tiny("llama")
    assert train(config) == 0
    metrics = Path(config.run_dir) / "metrics.jsonl"
    metrics.write_bytes(damaged)
    metrics.with_name("environment.json").write_text('{"sessions": null}')
    assert train(config, resume=NEWEST) == 0
    assert "tells of 1 of the 6 steps before" in capsys.readouterr().err
    assert [row["step"] for row in read_metrics(metrics)] == [0, 6]


def test_resuming_with_another_config_names_the_keys(make_tiny):
    assert train(make_tiny("llama")) == 0
    for config, line in (
        (make_tiny("megalodon"), r"another config: model=megalodon \(was llama\)"),
        (make_tiny("llama", learning_rate=1e-3, seed=8), r"=0.001 \(was 0.003\), seed=8 \(was 7"),
        (make_tiny("llama", num_batches=5), "num_batches=5: .* is at step 6 already; raise num_b"),
        (make_tiny("llama", batch_size=1), r"batch_size x grad_accum_every=2 \(was 4\)"),
        (make_tiny("llama", seq_len=25), r"another config: seq_len=25 \(was 24\); set it back"),
    ):
        with pytest.raises(UserError, match=line):
            train(config, resume=NEWEST)


def test_the_end_of_a_falling_learning_rate_is_not_moved(make_tiny):
    assert train(make_tiny("llama", schedule="cosine")) == 0
    longer = make_tiny("llama", schedule="cosine", num_batches=8)
    with pytest.raises(UserError, match=r"another config: num_batches=8 \(was 6\); set it back"):
        train(longer, resume=NEWEST)


def test_resuming_another_text_or_bare_weights_is_refused(make_tiny, tmp_path):
    config = make_tiny("llama")
    assert train(config) == 0
    folder = Path(config.run_dir)
    with pytest.raises(UserError, match="holds weights only; resume from a checkpoint_"):
        train(config, resume=folder / "final.pt")
    other = tmp_path / "other.txt"
    other.write_bytes(b"some other text " * 1000)
    with pytest.raises(UserError, match="trained on another text than data_path="):
        train(make_tiny("llama", data_path=str(other)), resume=NEWEST)


def test_a_full_disk_during_a_save_leaves_checkpoints_that_resume(make_tiny, monkeypatch, tmp_path):
    whole, config = make_tiny("llama"), make_tiny("llama", run_dir=str(tmp_path / "full"))
    assert train(whole) == 0
    save = run_folder.save_checkpoint

    def full(path, checkpoint):
        if checkpoint.step == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(path, checkpoint)

    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "save_checkpoint", full)
        with pytest.raises(OSError, match="No space left"):
            train(config)
    assert train(config, resume=NEWEST) == 0
    assert_same_ending(config, whole)


TRAIN_ON_A_SMALL_DISK = """
import subprocess, sys
from pathlib import Path
from megalodon_enwik8.checkpoint import load_checkpoint
from megalodon_enwik8.config import load_config
from megalodon_enwik8.run_folder import NEWEST, RunFolder
from megalodon_enwik8.training import train

config_file, disk, out = sys.argv[1:]
config = load_config(config_file, [f"run_dir={disk}"])
try:
    train(config)
    sys.exit("the disk did not fill up")
except OSError as error:
    assert error.errno == 28, error
folder = RunFolder(disk)
saved = [load_checkpoint(path).step for path in folder.checkpoints()]
assert saved == list(range(1, len(saved) + 1)) and len(saved) >= 2, saved
assert not list(Path(disk).glob(".*.writing"))
subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
assert train(config, resume=NEWEST) == 0
assert folder.checkpoints()[-1].name == "checkpoint_00000020.pt"
for name in ("final.pt", "metrics.jsonl"):
    Path(out, name).write_bytes(folder.file(name).read_bytes())
"""


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("unshare"), reason="mounts a disk of its own with unshare")
def test_a_run_whose_disk_fills_up_keeps_its_checkpoints_and_goes_on_when_there_is_room(
    make_tiny, tmp_path
):
    whole = make_tiny("llama", num_batches=20, save_every=1, run_dir=str(tmp_path / "whole"))
    assert train(whole) == 0
    largest = max(path.stat().st_size for path in Path(whole.run_dir).glob("*.pt"))
    disk, config_file = tmp_path / "disk", tmp_path / "x.yaml"
    disk.mkdir()
    config_file.write_text(whole.to_yaml())
    script = (
        f"mount -t tmpfs -o size={5 * largest // 2 // 1024}k none {disk} && "
        f'exec "$@" {config_file} {disk} {tmp_path}'
    )
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", script, "sh"]
    if subprocess.run([*command[:-4], "true"], capture_output=True).returncode:
        pytest.skip("this system lets nobody mount a disk of his own")
    done = subprocess.run(
        [*command, sys.executable, "-c", TRAIN_ON_A_SMALL_DISK], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    weights = load_checkpoint(tmp_path / "final.pt").model_state
    for name, weight in ending(whole)[1].items():
        assert torch.equal(weight, weights[name]), name
    steps = [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")]
    assert steps == list(range(21))


@pytest.mark.slow
def test_saving_every_100_steps_costs_less_than_one_percent_of_the_training(tmp_path, capsys):
    """On the model and the step of the comparison, fsync included."""
    path = Path(__file__).parents[2] / "configs" / "megalodon_multichunk_512.yaml"
    config = load_config(
        path, ["gradient_checkpointing=false", "batch_size=4", "grad_accum_every=4"]
    )
    text = np.random.default_rng(7).integers(0, 256, 10**6, dtype=np.uint8)
    corpus = Corpus("random", text[:900_000], text[900_000:], "")
    model = build_model(config)
    folder = RunFolder(tmp_path)
    trainer = Trainer(config, folder, corpus, model, World(torch.device("cpu")))
    model.train()
    steps, saves = [], []
    for _ in range(5):
        began = time.perf_counter()
        trainer.train_one_step()
        steps.append(time.perf_counter() - began)
        began = time.perf_counter()
        trainer.save()
        saves.append(time.perf_counter() - began)
    step, save = statistics.median(steps), statistics.median(saves)
    size = folder.checkpoints()[-1].stat().st_size
    with capsys.disabled():
        print(
            f"\na checkpoint of {size / 1e6:.1f} MB: {save:.3f} s (at most "
            f"{max(saves):.3f}); a step: {step:.2f} s; every 100 steps: {save / step:.3f} %"
        )
    assert save < 0.01 * 100 * step

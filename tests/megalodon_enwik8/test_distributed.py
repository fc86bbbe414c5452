"""A run under torchrun is the run of one process; and it ends, or goes on, when one is lost."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megalodon_enwik8 import distributed
from megalodon_enwik8.checkpoint import load_checkpoint
from megalodon_enwik8.config import load_config
from megalodon_enwik8.distributed import join
from megalodon_enwik8.run_folder import NEWEST
from megalodon_enwik8.safety import UserError
from megalodon_enwik8.training import train
from tests.processes import ROOT, outcome, torchrun

from .conftest import tiny


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where a text and its config lie, as the working directory."""
    words = (ROOT / "LICENSE").read_text().split()
    (tmp_path / "text").write_text(" ".join(words * 100))
    options = {"num_batches": 5, "batch_size": 1, "grad_accum_every": 8, "optimizer": "adamw"}
    options |= {"val_batches": 300, "full_validation": True, "save_every": 3, "keep_best": True}
    config = tiny("megalodon", "run", "text", **options, seq_len=64, generate_every=4)
    (tmp_path / "tiny.yaml").write_text(config.to_yaml())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def launch(folder, count, *arguments):
    return torchrun(count, ROOT / "train.py", "--config", "tiny.yaml", *arguments, cwd=folder)


def rows(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_same_run(ours, theirs):
    """Losses, norms, samples and final weights, but for the order of sums."""
    a, b = rows(ours), rows(theirs)
    assert [row["step"] for row in a] == [row["step"] for row in b]
    for key in ("train_loss", "val_loss", "full_val_loss", "grad_norm"):
        pairs = [(x[key], y[key]) for x, y in zip(a, b, strict=True) if key in y]
        assert pairs or key == "full_val_loss"
        for x, y in pairs:
            assert x == pytest.approx(y, rel=1e-5)
    assert [row.get("sample") for row in a] == [row.get("sample") for row in b]
    ours_end, theirs_end = (load_checkpoint(run / "final.pt").model_state for run in (ours, theirs))
    assert list(ours_end) == list(theirs_end)
    assert_same_weights(ours_end, theirs_end)


def assert_same_weights(ours, theirs):
    """By their norms: Adam makes a whole step of the sign of a gradient that is nearly 0."""
    for name, weight in theirs.items():
        assert (ours[name] - weight).norm() <= 1e-5 * weight.norm() + 1e-6, name


JOBS = [
    ("data", None, ["batch_size=4", "grad_accum_every=2"]),
    ("time", None, ["chunk_parallel=2"]),
    ("shard", None, ["shard=true"]),
    # The first three steps sharded, the others along time.
    ("both", None, ["shard=true", "num_batches=3", "full_validation=false"]),
    ("both", NEWEST, ["chunk_parallel=2"]),
]


def train_all(rank):
    """The jobs, as one of two processes; what is said goes to a file."""
    dist.init_process_group("gloo", f"file://{Path('store').resolve()}", rank=rank, world_size=2)
    with open(f"said by {rank}", "w") as file, contextlib.redirect_stdout(file):
        for name, resume, overrides in JOBS:
            config = load_config("tiny.yaml", [f"run_dir={name}", *overrides])
            assert train(config, resume=resume) == 0
    dist.destroy_process_group()


def test_two_processes_train_as_one(folder, processes):
    """Data parallel, sharded, and along time; and what one layout saved another resumes."""
    both = [processes.Process(target=train_all, args=(rank,)) for rank in range(2)]
    for process in both:
        process.start()
    assert train(load_config("tiny.yaml", ["run_dir=one"])) == 0
    for process in both:
        process.join(timeout=300)
        assert process.exitcode == 0
    said = [Path(f"said by {rank}").read_text() for rank in range(2)]
    assert (said[0].count("final weights:"), said[1]) == (len(JOBS), "")
    assert "processes: 2" in said[0]
    for name in ("data", "time", "shard"):
        assert_same_run(folder / name, folder / "one")
    ends = [load_checkpoint(folder / name / "final.pt").model_state for name in ("both", "one")]
    assert_same_weights(*ends)


@pytest.mark.slow
def test_four_processes_share_sequences_and_time(folder):
    assert train(load_config("tiny.yaml", ["run_dir=one"])) == 0
    code, said = outcome(launch(folder, 4, "run_dir=four", "chunk_parallel=2"))
    assert code == 0, said
    assert "processes: 4" in said
    assert_same_run(folder / "four", folder / "one")


@pytest.mark.slow
@pytest.mark.parametrize("how", [["--stream", "--streams", "3", "--piece", "40"], []])
def test_a_split_is_scored_the_same_by_several(how, folder):
    assert train(load_config("tiny.yaml", ["run_dir=one", "num_batches=1"])) == 0
    script = ROOT / "megalodon_enwik8" / "evaluation.py"
    scores = []
    for count in (1, 2):
        options = ["one/final.pt", *how, "--out", f"{count}.json"]
        code, said = outcome(torchrun(count, script, *options, cwd=folder))
        assert code == 0, said
        assert said.count("state_bytes: ") == 1
        scores.append(json.loads(Path(f"{count}.json").read_text()))
    for key in ("loss", "predicted", "state_bytes"):
        assert scores[0][key] == pytest.approx(scores[1][key], rel=1e-9)
    assert [row["predicted"] for row in scores[0]["by_distance"]] == [
        row["predicted"] for row in scores[1]["by_distance"]
    ]


MISTAKES = {
    "chunk_parallel=3": (
        2,
        "chunk_parallel=3: seq_len=64 must be that many parts of whole",
    ),
    "chunk_parallel=2": (3, "chunk_parallel=2: needs a multiple of 2 processes"),
    "grad_accum_every=7": (2, "batch_size x grad_accum_every=7: must be a multiple of the 2"),
    "run_dir=there": (2, "there: holds a run already"),
}


@pytest.mark.slow
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_said_once(mistake, folder):
    (folder / "there").mkdir()
    (folder / "there" / "config.yaml").touch()
    count, message = MISTAKES[mistake]
    code, said = outcome(launch(folder, count, mistake))
    assert code != 0
    (line,) = [line for line in said.splitlines() if "error: " in line]
    assert message in line
    assert "training.py" not in said  # no traceback of ours


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["shard=true"], "shard=true: has nobody to share with; start it with torchrun"),
        (["chunk_parallel=2"], "needs a multiple of 2 processes, as in torchrun"),
    ],
)
def test_one_process_alone_has_nobody_to_share_with(folder, overrides, message):
    with pytest.raises(UserError, match=message):
        train(load_config("tiny.yaml", overrides))


@pytest.mark.parametrize(
    ("device", "message"),
    [("mps", "need NVIDIA GPUs, or FORCE_DEVICE=cpu"), ("cuda", "--nproc_per_node=2 here")],
)
def test_a_process_without_a_device_of_its_own_is_refused(device, message, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(UserError, match=message), join(torch.device(device)):
        pytest.fail("joined")


def test_a_llama_has_no_parts_along_time(folder):
    (folder / "llama.yaml").write_text("model: llama\n")
    with pytest.raises(UserError, match="a Llama attends to a whole sequence, and has shard"):
        load_config("llama.yaml", ["chunk_parallel=2"])


LONG = ("num_batches=40", "validate_every=0", "generate_every=0", "save_every=5")


def lose_one(launcher, run, number=signal.SIGKILL):
    """Send a signal to one of the processes once the run is under way."""
    deadline = time.monotonic() + 120
    while not list(run.glob("checkpoint_00000005.pt")) and time.monotonic() < deadline:
        time.sleep(0.05)
    found = subprocess.run(["pgrep", "-P", str(launcher.pid)], capture_output=True, text=True)
    os.kill(int(found.stdout.split()[-1]), number)


@pytest.mark.slow
def test_the_loss_of_a_process_ends_all_and_one_alone_goes_on(folder):
    run = folder / "run"
    launcher = launch(folder, 2, "run_dir=run", *LONG)
    lose_one(launcher, run)
    began = time.monotonic()
    code, said = outcome(launcher)
    assert code != 0
    assert time.monotonic() - began < 60
    assert "SIGKILL" in said  # torchrun names who died
    command = [sys.executable, ROOT / "train.py", "--config", "run/config.yaml", "--resume"]
    subprocess.run(command, check=True, capture_output=True, cwd=folder)
    assert train(load_config("tiny.yaml", ["run_dir=one", *LONG])) == 0
    assert_same_run(run, folder / "one")


# One process is lost in a step; once restarted, one is last to come, as chance has it.
ONE_IS_LOST = """
import os, signal, sys, time
from pathlib import Path
from megalodon_enwik8 import config, training
rank, lost, last = map(int, [os.environ["RANK"], *sys.argv[1:3]])
step, mark = training.Trainer.train_one_step, Path("lost")
def step_or_die(self):
    if self.step == 7 and rank == lost and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self)
training.Trainer.train_one_step = step_or_die
if mark.exists() and rank == last:
    time.sleep(3)
sys.exit(training.train(config.load_config("tiny.yaml", ["run_dir=run", *sys.argv[3:]])))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("machines", "lost", "last"), [(1, 1, 0), (1, 1, 1), (2, 0, 1), (2, 1, 0)])
def test_a_restarted_run_goes_on_by_itself(machines, lost, last, folder):
    """On two machines too, of which each knows its own restarts alone."""
    short = ("num_batches=10", *LONG[1:])
    (folder / "one_is_lost.py").write_text(ONE_IS_LOST)
    options = ["--standalone", "--max-restarts=1"]
    if machines > 1:
        with socket.create_server(("localhost", 0)) as server:
            endpoint = f"localhost:{server.getsockname()[1]}"
        options[:1] = [f"--nnodes={machines}", "--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}"]
    command = (2 // machines, "one_is_lost.py", lost, last, *short)
    launchers = [torchrun(*command, options=options, cwd=folder) for _ in range(machines)]
    for code, said in map(outcome, launchers):
        assert code == 0, said
    sessions = json.loads((folder / "run" / "environment.json").read_text())["sessions"]
    assert [(each["from_step"], each["processes"]) for each in sessions] == [(0, 2), (5, 2)]
    assert train(load_config("tiny.yaml", ["run_dir=one", *short])) == 0
    assert_same_run(folder / "run", folder / "one")


def test_processes_meet_apart_from_those_lost_before(monkeypatch):
    """Whoever was lost, at whatever moment, and whoever of the others comes last."""
    store = dist.HashStore()
    names = []
    for here in ([0, 1, 2], [2, 1, 0], [1], [0], [1, 0, 2], [2, 1], [0, 2], [2, 0, 1]):
        wait = 60.0 if len(here) == 3 else 0.2
        monkeypatch.setattr(distributed, "HANG_S", wait)
        store.set_timeout(timedelta(seconds=wait))
        meetings = []
        with ThreadPoolExecutor() as pool:
            for rank in here:
                meetings.append(pool.submit(distributed._meet, store, rank, 3))
                time.sleep(0.05)
        if len(here) == 3:
            (name,) = {meeting.result() for meeting in meetings}
            names.append(name)
        else:
            assert any(isinstance(meeting.exception(), dist.DistStoreError) for meeting in meetings)
    assert len(set(names)) == len(names) == 4


@pytest.mark.slow
def test_a_process_that_hangs_ends_all_within_a_minute(folder):
    launcher = launch(folder, 2, "run_dir=run", *LONG)
    lose_one(launcher, folder / "run", signal.SIGSTOP)
    began = time.monotonic()
    code, said = outcome(launcher)
    assert code != 0
    assert time.monotonic() - began < 60 + 30  # torchrun gives the one that hangs 30 s to end
    assert said.count("error: another process of this run died or hangs") == 1


@pytest.mark.slow
def test_writing_may_take_longer_than_a_process_that_hangs(folder):
    script = """
import sys, time
from megalodon_enwik8 import config, distributed, run_folder, training
distributed.HANG_S, write = 15, run_folder.RunFolder.save
run_folder.RunFolder.save = lambda *of: (time.sleep(20), write(*of))[1]
sys.exit(training.train(config.load_config("tiny.yaml", ["run_dir=run", "save_every=0"])))
"""
    (folder / "slow.py").write_text(script)
    code, said = outcome(torchrun(2, "slow.py", cwd=folder))
    assert code == 0, said


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_launcher_saves(number, folder):
    launcher = launch(folder, 2, "run_dir=run", *LONG, "num_batches=1000")
    deadline = time.monotonic() + 120
    while not list((folder / "run").glob("checkpoint_*5.pt")) and time.monotonic() < deadline:
        time.sleep(0.05)
    launcher.send_signal(number)
    _, said = outcome(launcher)
    assert said.count("saving what is done") == 1
    assert "all saved; go on with" in said
    steps = [row["step"] for row in rows(folder / "run")]
    assert (folder / "run" / f"checkpoint_{steps[-1] + 1:08d}.pt").exists()

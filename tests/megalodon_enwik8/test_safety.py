"""Whole files or none, one holder of a lock, and one-line errors."""

import errno
import os
import resource
import signal
import subprocess
import sys
import textwrap
from contextlib import contextmanager

import pytest
import torch

from megalodon_enwik8.safety import (
    StopRequest,
    UserError,
    atomic_write,
    run_main,
)


def python(code, **kwargs):
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **kwargs,
    )


@contextmanager
def small_disk():
    """No file may grow past 10,000 bytes: writing more fails as a full disk does.

    Not a fixture: that would also bind what pytest writes between the phases of a test.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_block_that_ends_well_replaces_the_file(tmp_path):
    path = tmp_path / "x.pt"
    path.write_bytes(b"old")
    with atomic_write(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["x.pt"]


def test_what_is_no_file_is_not_replaced_by_one(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with (
        pytest.raises(UserError, match=r"pipe: is no regular file.* name another"),
        atomic_write(tmp_path / "pipe"),
    ):
        pass
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit, UserError])
def test_any_exception_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "x.pt"
    path.write_bytes(b"old")
    with pytest.raises(error), atomic_write(path) as file:
        file.write(b"half")
        raise error
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x.pt"]


@pytest.mark.parametrize("size", [10_001, 5_000_000])  # within the buffer, and beyond it
def test_full_disk_is_one_line_and_leaves_the_old_file(tmp_path, size):
    path = tmp_path / "x.pt"
    path.write_bytes(b"old")
    with pytest.raises(OSError, match=r"x\.pt") as caught, small_disk(), atomic_write(path) as file:
        file.write(b"0" * size)
    assert caught.value.filename == str(path)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x.pt"]


def test_full_disk_under_torch_save_is_the_same_line(tmp_path):
    path = tmp_path / "x.pt"
    with pytest.raises(OSError, match=r"x\.pt"), small_disk(), atomic_write(path) as file:
        torch.save({"weight": torch.zeros(1_000_000)}, file)
    assert os.listdir(tmp_path) == []


def test_new_file_has_the_usual_permissions(tmp_path):
    (tmp_path / "usual").write_bytes(b"")
    with atomic_write(tmp_path / "atomic"):
        pass
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_link_stays_and_its_target_is_replaced(tmp_path):
    (tmp_path / "real").mkdir()
    link, target = tmp_path / "x.gz", tmp_path / "real" / "y.gz"
    link.symlink_to(target)
    with atomic_write(link) as file:
        file.write(b"new")
    assert link.is_symlink()
    assert target.read_bytes() == b"new"


@pytest.mark.parametrize("name", ["absent/x.pt", "folder"])
def test_an_impossible_place_is_named(tmp_path, name):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match=name), atomic_write(tmp_path / name):
        pass
    assert os.listdir(tmp_path) == ["folder"]


def test_killed_writer_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.pt"
    path.write_bytes(b"old")
    writer = python(
        f"""
        import os, signal
        from megalodon_enwik8.safety import atomic_write
        with atomic_write({str(path)!r}) as file:
            file.write(b"half" * 10**6)
            os.kill(os.getpid(), signal.SIGKILL)
        """
    )
    writer.communicate()
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize(
    ("outcome", "code", "message"),
    [
        (None, 0, ""),
        (3, 3, ""),
        (UserError("seq_len=0:\n  too \x1b[31msmall"), 2, "error: seq_len=0: too ?[31msmall\n"),
        (KeyboardInterrupt(), 130, ""),
        (MemoryError(), 2, "error: out of memory: buy more\n"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 2, "error: out of memory: b"),
        (OSError(errno.ENOSPC, "full", "x.pt"), 2, "error: x.pt: No space left on device: mend"),
        (PermissionError(errno.EACCES, "no", "x.pt"), 2, "error: x.pt: Permission denied: mend"),
    ],
)
def test_script_ends_in_one_line_and_the_usual_code(capsys, outcome, code, message):
    def main():
        if isinstance(outcome, BaseException):
            raise outcome
        assert outcome is None or isinstance(outcome, int)
        return outcome

    with pytest.raises(SystemExit) as ended:
        run_main(main, "buy more")
    assert ended.value.code == code
    stderr = capsys.readouterr().err
    assert stderr.startswith(message)
    assert stderr.count("\n") == bool(message)


@pytest.mark.parametrize("defect", [OSError("no number"), RuntimeError("x"), LookupError("x")])
def test_a_defect_of_the_program_keeps_its_traceback(defect):
    def main():
        raise defect

    with pytest.raises(type(defect)):
        run_main(main)


def test_closed_pipe_ends_quietly():
    script = python(
        """
        from megalodon_enwik8.safety import run_main
        def main():
            input()
            print("x" * 10**6)
        run_main(main)
        """
    )
    assert script.stdout is not None
    assert script.stdin is not None
    script.stdout.close()
    script.stdin.write("\n")
    script.stdin.close()
    assert script.stderr is not None
    assert script.stderr.read() == ""
    assert script.wait() == 141
    script.stderr.close()


def test_output_may_be_closed_and_names_may_be_any_bytes():
    code = "from megalodon_enwik8.safety import run_main; run_main(lambda: print('\\udcff'))"
    for redirect, said in ((">&-", ""), ("2>&-", "\\udcff\n")):
        command = ["sh", "-c", f'exec "$@" {redirect}', "sh", sys.executable, "-c", code]
        done = subprocess.run(command, capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr) == (0, said, "")


def test_a_pipe_that_nobody_reads_is_a_signal():
    reader, writer = os.pipe()
    before = os.dup(2)
    with StopRequest() as stop:
        os.dup2(writer, 2)
        try:
            first = stop()
            os.close(reader)
            second = stop()
            os.write(2, b"into the void")
        finally:
            os.dup2(before, 2)
    os.close(before)
    os.close(writer)
    assert (first, second) == (0, signal.SIGPIPE)


def test_the_first_signal_is_a_flag_and_the_old_handler_comes_back():
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        assert not stop()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop() == signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # the second ends the process
    assert signal.getsignal(signal.SIGTERM) == before

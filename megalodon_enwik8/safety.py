"""What keeps a user's work safe: a mistake is one line, a file is whole or absent, a folder has one
process, and Ctrl-C saves."""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import NoReturn

from filelock import FileLock, Timeout

LEFTOVER_SUFFIX = ".writing"  # of what a killed process was writing


class UserError(Exception):
    """A user's mistake. The message is one line that names the thing and the remedy."""


def run_main(
    main: Callable[[], int | None], out_of_memory: str = "use smaller numbers"
) -> NoReturn:
    """Run a script's `main` and exit with its code (None means 0).

    out_of_memory: the remedy.

    A UserError, and an error of the operating system (a full disk, a missing permission), end in
    `error: <one line>` on stderr and exit code 2; Ctrl-C and a closed pipe (`... | head`) end
    quietly, with 130 and 141, as a shell reports who died of SIGINT and SIGPIPE. Any other
    exception is a defect of the program and keeps its traceback. A warning is one line.
    """
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    for stream in (sys.stdout, sys.stderr):  # whatever the locale says: texts are of any characters
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8")
    try:
        code = main() or 0
        sys.stdout.flush()
    except UserError as error:
        code = _print_error(str(error))
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:
        # The interpreter flushes stdout once more on its way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    except (MemoryError, RuntimeError) as error:
        from megalodon_enwik8.device import lost_another_process, ran_out_of_memory

        if ran_out_of_memory(error):
            code = _print_error(f"out of memory: {out_of_memory}")
        elif lost_another_process(error):
            time.sleep(2)  # who failed speaks first
            code = _print_error("another process of this run died or hangs, and all end with it")
        else:
            raise
    except OSError as error:
        if error.errno is None:  # not of the system
            raise
        where = f"{os.fsdecode(error.filename)}: " if error.filename else ""
        code = _print_error(f"{where}{os.strerror(error.errno)}: mend that or choose another place")
    sys.exit(code)


def launched() -> bool:
    """Whether torchrun started this process, as one of several."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def _first_to_say() -> bool:
    """Whether none of the processes that torchrun started has said what is wrong: they mostly make
    the same mistake, and one that fails takes the others with it."""
    from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=5))
        return store.add(f"said after {os.environ['TORCHELASTIC_RESTART_COUNT']}", 1) == 1
    except DistError:
        return True


def _print_error(message: str) -> int:
    if launched() and not _first_to_say():
        return 2
    line = " ".join(message.split())
    # A file name may hold control characters, which would reach the terminal.
    print("error:", "".join(c if c.isprintable() else "?" for c in line), file=sys.stderr)
    return 2


class Parser(argparse.ArgumentParser):
    """ArgumentParser that raises UserError, without the usage that argparse prints first."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def whole_number(at_least: int) -> Callable[[str], int]:
    """An argparse type: a whole number from `at_least` to what 64 bits hold."""

    def convert(text: str) -> int:
        with contextlib.suppress(ValueError):
            if at_least <= int(text) < 2**63:
                return int(text)
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number >= {at_least}")

    return convert


def number(at_least: float, at_most: float = math.inf) -> Callable[[str], float]:
    """An argparse type: a finite number in the closed range."""

    def convert(text: str) -> float:
        with contextlib.suppress(ValueError):
            if at_least <= float(text) <= at_most and math.isfinite(float(text)):
                return float(text)
        bounds = f">= {at_least:g}" + (f" and <= {at_most:g}" if at_most < math.inf else "")
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number {bounds}")

    return convert


class _RawFile(io.FileIO):
    """A raw file that remembers the first failed write: a library that writes through C++, as
    torch.save does, may replace the OSError by one that does not say that the disk is full."""

    failure: OSError | None = None

    def write(self, data: object) -> int:
        try:
            return super().write(data)  # type: ignore[arg-type]
        except OSError as error:
            error.filename = self.name
            self.failure = self.failure or error
            raise


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[io.BufferedWriter]:
    """Yield a binary file whose content takes the place of `path` when the block ends well: it
    goes to a temporary file beside `path`, to the disk, and only then under the name.

    Whatever happens before leaves the old file as it was. A link stays, its target is replaced.
    OSErrors name `path`.
    """
    target = Path(os.path.realpath(path))
    # The cut keeps the temporary name within the 255 bytes of a file name.
    temporary = target.with_name(f".{target.name[:40]}.{os.getpid()}{LEFTOVER_SUFFIX}")
    try:
        with _RawFile(temporary, "wb") as raw:
            try:
                file: io.BufferedWriter = io.BufferedWriter(raw, 1 << 20)
                yield file
                file.flush()
                os.fsync(raw.fileno())
            except Exception as error:
                raise raw.failure or error from None
            finally:
                raw.close()  # first: what is still buffered may be what cannot be written
        os.replace(temporary, target)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError) and error.filename in (str(temporary), temporary):
            error.filename = os.fsdecode(path)
        raise


def remove_leftovers(folder: Path) -> None:
    """Remove what killed writers left in a folder. Only for who holds its lock."""
    for leftover in folder.glob(f".*{LEFTOVER_SUFFIX}"):
        leftover.unlink()


@contextmanager
def exclusive_lock(path: Path, *, blocking: bool = True) -> Iterator[None]:
    """Hold the lock file `path` (created if need be) while the block runs. The operating system
    releases it when its holder dies, however it dies. Raises UserError if another process holds
    it and `blocking` is false."""
    try:
        with FileLock(path, blocking=blocking):
            yield
    except Timeout:
        raise UserError(
            f"{path.parent} is in use by another process: wait for it or stop it"
        ) from None


_HANG_UP = getattr(signal, "SIGHUP", None)  # a closed terminal; not on Windows


class Stopped(Exception):
    """A loop has asked and heard that a signal came: what is done is to be saved."""

    def __init__(self, signal_number: int) -> None:
        self.signal_number = signal_number


class StopRequest:
    """While the `with` block runs, the first Ctrl-C, SIGTERM or SIGHUP is noted, for loops to ask.

    The second one ends the process at once, as it does without a handler, unless it is another
    SIGHUP: a shell that dies with its terminal hangs up its jobs twice. A signal that the process
    was started to ignore (as behind nohup) stays ignored. Outside the main thread, where Python
    cannot set handlers, nothing changes. Under torchrun, which kills who does not end within half
    a minute, a second one changes nothing.
    """

    def __init__(self) -> None:
        self.signal_number = 0  # 0: nobody asked
        self._before: dict[int, object] = {}
        self._terminals = [fd for fd in (1, 2) if os.isatty(fd)]

    def __call__(self) -> int:
        """The number of the signal that has come, or 0."""
        for fd in self._terminals if self.signal_number else ():
            if not os.isatty(fd):  # closed: to write there would be an error, before all is saved
                os.dup2(os.open(os.devnull, os.O_WRONLY), fd)
        return self.signal_number

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, _HANG_UP):
                if number is not None and signal.getsignal(number) != signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal_number = number
        for handled in self._before:
            ignored = handled == _HANG_UP or launched()
            signal.signal(handled, signal.SIG_IGN if ignored else signal.SIG_DFL)
        if os.environ.get("RANK", "0") != "0":
            return
        # print() may be what the signal interrupted, and cannot be entered twice; and nobody may
        # be left to read (`2>&1 | tee` dies of the same Ctrl-C).
        with contextlib.suppress(OSError):
            os.write(2, b"\nsaving what is done; once more leaves at once\n")

"""What keeps a user's work safe: a mistake is one line, a file is whole or absent, a folder has one
process, and Ctrl-C saves."""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import signal
import stat
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import FrameType
from typing import IO, Any, NoReturn


class UserError(Exception):
    """A user's mistake. The message is one line that names the thing and the remedy."""

    def __str__(self) -> str:
        return " ".join(super().__str__().split())[:800]  # what a library says may be long


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
    while (devnull := os.open(os.devnull, os.O_RDWR)) <= 2:  # fills what was closed at the start
        pass
    os.close(devnull)
    sys.stdout, sys.stderr = sys.stdout or os.fdopen(1, "w"), sys.stderr or os.fdopen(2, "w")
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    for stream in (sys.stdout, sys.stderr):  # whatever the locale says: texts are of any characters
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
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
        missing = isinstance(error, FileNotFoundError)
        remedy = "check its name" if missing else "mend that or choose another place"
        code = _print_error(f"{where}{os.strerror(error.errno)}: {remedy}")
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
    """ArgumentParser that raises UserError, without the usage that argparse prints first, and shows
    its description as it is written."""

    def __init__(self, description: str, prog: str | None = None) -> None:
        raw = argparse.RawDescriptionHelpFormatter
        super().__init__(prog, description=description, formatter_class=raw)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def number(
    at_least: float, at_most: float = 2**63 - 1, kind: type[float] | type[int] = float
) -> Callable[[str], Any]:
    """An argparse type: a number in the closed range."""

    def convert(text: str) -> float:
        with contextlib.suppress(ValueError):
            if at_least <= kind(text) <= at_most:
                return kind(text)
        name = "whole number" if kind is int else "number"
        raise argparse.ArgumentTypeError(f"{text!r} is not a {name} >= {at_least}, <= {at_most}")

    return convert


whole_number = partial(number, kind=int)


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Yield a binary file whose content takes the place of `path` when the block ends well: it
    goes to a temporary file beside `path`, to the disk, and only then under the name.

    Whatever happens before leaves the old file as it was. A link stays, its target is replaced.
    OSErrors name `path`.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not (target.is_file() or target.is_dir()):
        raise UserError(f"{path}: is no regular file, and would become one: name another")
    temporary = target.with_name(f".{target.name}.{os.getpid()}.writing")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except Exception as error:
        cause: BaseException | None = error
        while cause and not isinstance(cause, OSError):  # which torch.save hides behind its own
            cause = cause.__context__
        if not isinstance(cause, OSError):
            raise
        cause.filename = os.fsdecode(path)
        raise cause from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


_HANG_UP = getattr(signal, "SIGHUP", None)  # a closed terminal; not on Windows


class Stopped(Exception):
    """A loop has asked and heard that a signal came: what is done is to be saved."""

    def __init__(self, signal_number: int) -> None:
        self.signal_number = signal_number


def _is_broken_pipe(fd: int) -> bool:
    with contextlib.suppress(OSError):  # closed
        if hasattr(select, "poll") and stat.S_ISFIFO(os.fstat(fd).st_mode):  # not on Windows
            poll = select.poll()
            poll.register(fd, 0)  # no event but errors
            return bool(poll.poll(0))
    return False


class StopRequest:
    """While the `with` block runs, the first Ctrl-C, SIGTERM or SIGHUP is noted, for loops to ask.

    The second one ends the process at once, as it does without a handler, unless it is another
    SIGHUP: a shell that dies with its terminal hangs up its jobs twice. A signal that the process
    was started to ignore (as behind nohup) stays ignored. Under torchrun, which kills who
    does not end within half a minute, a second one changes nothing.
    """

    def __init__(self) -> None:
        self.signal_number = 0  # 0: nobody asked
        self._before: dict[int, object] = {}
        self._terminals = [fd for fd in (1, 2) if os.isatty(fd)]

    def __call__(self) -> int:
        """The number of the signal that has come, or 0; SIGPIPE where nobody reads what is printed
        any more."""
        for fd in (1, 2):
            if _is_broken_pipe(fd):
                os.dup2(os.open(os.devnull, os.O_WRONLY), fd)
                self.signal_number = self.signal_number or signal.SIGPIPE
        for fd in self._terminals if self.signal_number else ():
            if not os.isatty(fd):  # closed: to write there would be an error, before all is saved
                os.dup2(os.open(os.devnull, os.O_WRONLY), fd)
        return self.signal_number

    def __enter__(self) -> StopRequest:
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

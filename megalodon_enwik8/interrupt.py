"""Ctrl-C, SIGTERM and SIGHUP as a request to stop once what is done is saved."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

from torch import nn


class _Interrupted(BaseException):
    """Nothing on the way out may take it for an error."""


_HANG_UP = getattr(signal, "SIGHUP", None)  # a closed terminal, a broken connection; not on Windows


class StopRequest:
    """While the `with` block runs, the first of the signals is noted in `signal_number`.

    The second one ends the process at once, as it does without a handler, unless it is another
    SIGHUP. A signal that the
    process was started to ignore (as behind nohup or `&` in a script) stays ignored. Outside the
    main thread, where Python cannot set handlers, nothing changes. What was printed on a terminal
    goes nowhere once that is closed.
    """

    def __init__(self) -> None:
        self.signal_number = 0  # 0: nobody asked
        self._before: dict[int, object] = {}
        self._terminals = [fd for fd in (1, 2) if os.isatty(fd)]

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, _HANG_UP):
                if number is not None and signal.getsignal(number) != signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def requested(self) -> bool:
        return self.signal_number != 0

    @contextmanager
    def between_forwards(self, model: nn.Module) -> Iterator[None]:
        """Leave the block at the next call of `model` once a signal has come.

        For long work that may be lost. Execution goes on behind the block, where `requested`
        tells; the model may be left in another mode.
        """

        def look(*_: object) -> None:
            if self.requested():
                raise _Interrupted

        hook = model.register_forward_pre_hook(look)
        try:
            yield
        except _Interrupted:
            pass
        finally:
            hook.remove()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal_number = number
        for handled in self._before:
            # A shell that dies with its terminal hangs up its jobs twice.
            again = signal.SIG_IGN if handled == _HANG_UP else signal.SIG_DFL
            signal.signal(handled, again)
        for fd in self._terminals:
            if not os.isatty(fd):  # closed: to write there would be an error, before all is saved
                os.dup2(os.open(os.devnull, os.O_WRONLY), fd)
        # print() may be what the signal interrupted, and cannot be entered twice; and nobody may
        # be left to read (`2>&1 | tee` dies of the same Ctrl-C).
        with contextlib.suppress(OSError):
            os.write(2, b"\nsaving what is done; once more leaves at once\n")

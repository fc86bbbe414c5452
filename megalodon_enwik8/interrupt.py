"""Ctrl-C and SIGTERM as a request to stop after the current step."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType


class StopRequest:
    """While the `with` block runs, the first SIGINT or SIGTERM is noted in `signal_number`.

    The second one ends the process at once, as it does without a handler. Outside the main
    thread, where Python cannot set handlers, nothing changes.
    """

    def __init__(self) -> None:
        self.signal_number = 0  # 0: nobody asked
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
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

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal_number = number
        for handled in self._before:
            signal.signal(handled, signal.SIG_DFL)
        # print() may be what the signal interrupted, and cannot be entered twice.
        os.write(2, b"\nfinishing the step and saving; once more leaves at once\n")

"""Programs run in this process, and the one line that they refuse with."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest

from megalodon_enwik8.safety import run_main

Main = Callable[[list[str]], int | None]


def run(main: Main, *arguments: object) -> int:
    """The exit code."""
    remedy = getattr(sys.modules[main.__module__], "OUT_OF_MEMORY", "")
    with pytest.raises(SystemExit) as caught:
        run_main(lambda: main([str(argument) for argument in arguments]), remedy)
    return int(caught.value.code or 0)


def refused(capfd: pytest.CaptureFixture[Any], main: Main, *arguments: object) -> str:
    """The one line that the program says on its way out with code 2."""
    capfd.readouterr()
    assert run(main, *arguments) == 2
    out, err = capfd.readouterr()
    assert (out, err[:7], err.count("\n")) == ("", "error: ", 1)
    return str(err)

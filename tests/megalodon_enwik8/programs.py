"""Programs run in this process, and the one line that they refuse with."""

import sys

import pytest

from megalodon_enwik8.safety import run_main


def run(main, *arguments):
    """The exit code."""
    remedy = getattr(sys.modules[main.__module__], "OUT_OF_MEMORY", "")
    with pytest.raises(SystemExit) as caught:
        run_main(lambda: main([str(argument) for argument in arguments]), remedy)
    return int(caught.value.code or 0)


def refused(capfd, main, *arguments):
    """The one line that the program says on its way out with code 2."""
    capfd.readouterr()
    assert run(main, *arguments) == 2
    out, err = capfd.readouterr()
    assert (out, err[:7], err.count("\n")) == ("", "error: ", 1)
    return str(err)

"""A user's mistake ends in one line and exit code 2, never in a traceback."""

from __future__ import annotations

import errno
import os
import sys
import warnings
from collections.abc import Callable
from typing import NoReturn

_DISK_FULL = "the disk is full: free some space or choose another folder"
_NOT_ALLOWED = "permission denied: change its permissions or choose another place"

# What the user can do about an error of the operating system.
_REMEDIES = {
    errno.ENOSPC: _DISK_FULL,
    errno.EDQUOT: "the disk quota is used up: free some space or choose another folder",
    errno.EFBIG: "the file is larger than the disk or the process limit allows",
    errno.EACCES: _NOT_ALLOWED,
    errno.EPERM: _NOT_ALLOWED,
    errno.EROFS: "the file system is read-only: choose another folder",
    errno.EIO: "the disk reports an input/output error: check it or choose another folder",
}


class UserError(Exception):
    """A user's mistake. The message is one line that names the thing and the remedy."""


def explain_os_error(
    error: OSError, path: str | os.PathLike[str] | None = None
) -> UserError | None:
    """The UserError for a full disk, a missing permission and the like; None for other errors.

    `path` is the file to name; without it, the file that the error itself names.
    """
    remedy = _REMEDIES.get(error.errno or 0)
    if remedy is None:
        return None
    name = path if path is not None else error.filename
    return UserError(remedy if name is None else f"{os.fsdecode(name)}: {remedy}")


def run_main(main: Callable[[], int | None]) -> NoReturn:
    """Run a script's `main` and exit with its code (None means 0).

    UserError, and a full disk or missing permission that escapes, end in `error: <one line>`
    on stderr and exit code 2. Ctrl-C exits with 130, and a closed pipe (`... | head`) with
    141, both quietly, as the shell reports a program that died of SIGINT and SIGPIPE.
    Any other exception is a defect of the program and keeps its traceback. A warning is one line.
    """
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    try:
        code = main() or 0
        sys.stdout.flush()
    except UserError as error:
        code = _report(error)
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:
        # The interpreter flushes stdout once more on its way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    except OSError as error:
        explained = explain_os_error(error)
        if explained is None:
            raise
        code = _report(explained)
    sys.exit(code)


def _report(error: UserError) -> int:
    line = " ".join(str(error).split())
    # A file name may hold control characters, which would reach the terminal.
    print("error:", "".join(c if c.isprintable() else "?" for c in line), file=sys.stderr)
    return 2

"""Files that are whole or absent, and folders that one process holds at a time."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megalodon_enwik8.errors import UserError, explain_os_error

_LEFTOVER_SUFFIX = ".writing"
_LOCK_POLL_S = 0.1

StrPath = str | os.PathLike[str]


class _RawFile(io.FileIO):
    """A raw file that remembers the first failed write.

    A library that writes through C++ (torch.save) may replace the OSError by one of its own,
    which no longer says that the disk is full.
    """

    failure: OSError | None = None

    def write(self, data: object) -> int:
        try:
            return super().write(data)  # type: ignore[arg-type]
        except OSError as error:
            self.failure = self.failure or error
            raise


def make_folder(path: Path, option: str) -> None:
    """Make a folder and those above it, if they are not there. Raises UserError naming the
    command line's option where that cannot be done."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise explain_os_error(error, path) or UserError(
            f"{option} {path}: cannot be made: {error.strerror}"
        ) from None


@contextmanager
def atomic_write(path: StrPath) -> Iterator[io.BufferedWriter]:
    """Yield a binary file whose content takes the place of `path` when the block ends well.

    The bytes go to a temporary file beside `path`, to the disk, and only then under the name
    `path`. Whatever happens before leaves the old file as it was and removes the temporary one
    (`remove_leftovers` is for what a kill -9 leaves). A symbolic link stays, its target is
    replaced. Permissions are those that `open` would give.

    Raises UserError naming `path` for a full disk, a missing permission, a read-only file
    system or a missing folder.
    """
    target = Path(os.path.realpath(path))
    temporary = _temporary(target)
    raw: _RawFile | None = None
    try:
        raw = _RawFile(temporary, "xb")
        file: io.BufferedWriter = io.BufferedWriter(raw, 1 << 20)
        yield file
        file.flush()
        os.fsync(raw.fileno())
        file.close()
        os.replace(temporary, target)
        _sync_folder(target.parent)
    except BaseException as error:
        if raw is not None:
            # Closing the raw file first drops what is still buffered, which could not be written.
            raw.close()
            with contextlib.suppress(OSError):
                temporary.unlink()
        cause = raw.failure if raw is not None and raw.failure is not None else error
        if isinstance(cause, OSError) and isinstance(error, Exception):
            explained = _explain_write(cause, path, temporary)
            if explained is not None:
                raise explained from error
        raise


def _explain_write(error: OSError, path: StrPath, temporary: Path) -> UserError | None:
    if error.filename is not None and Path(os.fsdecode(error.filename)) != temporary:
        return explain_os_error(error)  # of another file, opened inside the block
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        folder = os.fsdecode(os.path.dirname(path)) or "."
        return UserError(f"{os.fsdecode(path)}: there is no folder {folder}: create it first")
    if error.errno == errno.EISDIR:
        return UserError(f"{os.fsdecode(path)} is a folder: name a file")
    return explain_os_error(error, path)


def _sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut, where the system can do that."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


def _temporary(path: Path) -> Path:
    """A new name beside `path`, known as a leftover if nobody takes it away."""
    return path.with_name(
        f"{_prefix(path.name)}{os.getpid()}_{secrets.token_hex(4)}{_LEFTOVER_SUFFIX}"
    )


def _prefix(name: str) -> str:
    # The cut keeps the temporary name within the 255 bytes of a file name.
    return f".{name[:40]}."


def remove_leftovers(folder: StrPath, name: str = "") -> int:
    """Remove what killed writers left in `folder`, of the file `name` or of all; return how many.

    Only for who holds the lock of these files: another process may be writing right now.
    """
    if name:
        pattern = re.compile(rf"{re.escape(_prefix(name))}\w+{re.escape(_LEFTOVER_SUFFIX)}")
    else:
        pattern = re.compile(rf"\..*{re.escape(_LEFTOVER_SUFFIX)}")
    found = [path for path in Path(folder).iterdir() if pattern.fullmatch(path.name)]
    for leftover in found:
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)
    return len(found)


def remove_folder(path: Path) -> None:
    """Remove a folder and all in it; whoever looks finds it whole or absent."""
    leftover = _temporary(path)
    path.rename(leftover)
    shutil.rmtree(leftover, ignore_errors=True)


@contextmanager
def exclusive_lock(path: StrPath, *, blocking: bool = True) -> Iterator[None]:
    """Hold the lock file `path` (created if need be) while the block runs.

    The operating system releases the lock when its holder dies, however it dies. The file
    itself stays: removing it would let two processes lock two files of one name.

    Raises UserError if another process holds the lock and `blocking` is false, if the file
    cannot be created, or if the file system has no locks.
    """
    name = os.fsdecode(path)
    try:
        # A link in a stranger's folder could have any file overwritten.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
    except OSError as error:
        explained = explain_os_error(error, path)
        raise explained or UserError(
            f"{name}: cannot create the lock file: {error.strerror}"
        ) from error
    try:
        while not _try_lock(descriptor, name):
            if not blocking:
                raise UserError(f"{name} is held by {_holder(descriptor)}: wait for it or stop it")
            time.sleep(_LOCK_POLL_S)
        # Only for the message above; a full disk must not stop who already has the lock.
        with contextlib.suppress(OSError):
            os.lseek(descriptor, 0, os.SEEK_SET)
            os.truncate(descriptor, os.write(descriptor, f"{os.getpid()}\n".encode()))
        yield
    finally:
        os.close(descriptor)


def _holder(descriptor: int) -> str:
    os.lseek(descriptor, 0, os.SEEK_SET)
    number = os.read(descriptor, 32).decode("ascii", "replace").strip()
    return f"process {number}" if number.isdigit() else "another process"


if sys.platform == "win32":
    import msvcrt

    def _try_lock(descriptor: int, name: str) -> bool:
        # Windows locks bytes against reading too; this one lies behind what _holder reads.
        os.lseek(descriptor, 1 << 20, os.SEEK_SET)
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

else:
    import fcntl

    def _try_lock(descriptor: int, name: str) -> bool:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            raise UserError(
                f"{name}: this file system has no locks ({error.strerror}): use a local disk"
            ) from error
        return True

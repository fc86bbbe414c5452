"""Read a file of any kind that a corpus comes in, as a stream of its unpacked bytes."""

from __future__ import annotations

import bz2
import gzip
import lzma
import stat
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from megalodon_enwik8.errors import UserError, explain_os_error

PACKED = (".gz", ".bz2", ".xz", ".zip")

_CHUNK = 1 << 20
_ENCRYPTED = 0x1  # bit of a zip member's flags


def unpacked_chunks(path: Path, kind: str | None = None) -> Iterator[bytes]:
    """Yield the unpacked bytes of `path` in pieces of at most 1 MiB.

    `kind` is one of PACKED, anything else means raw bytes; by default the suffix says it.
    Memory stays bounded whatever the file claims, and no name from inside an archive is used
    as a path. The checksum that an archive carries has been compared once the stream ends.
    How many bytes are too many is for the caller to say.

    Raises UserError for a file that is missing, unreadable or not a regular file, for damage,
    and for a .zip that has not exactly one member or is packed by another method than deflate.
    """
    check_is_file(path)
    kind = path.suffix if kind is None else kind
    # Decoders meet damage with exceptions of many kinds: all are caught, here and nowhere else.
    try:
        with _open(path, kind) as read:
            while chunk := read(_CHUNK):
                yield chunk
    except UserError:
        raise
    except EOFError as error:
        raise UserError(f"{path} is cut off: get the whole file again") from error
    except Exception as error:
        explained = explain_os_error(error, path) if isinstance(error, OSError) else None
        if explained is None:
            what = f"not a valid {kind} file" if kind in PACKED else "not readable"
            explained = UserError(f"{path} is {what} ({error}): get it again")
        raise explained from error


def check_is_file(path: Path) -> None:
    """Raise UserError unless `path` is a regular file (opening a pipe could wait for ever)."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{path}: no such file: check data_path") from error
    except (OSError, ValueError) as error:
        explained = explain_os_error(error, path) if isinstance(error, OSError) else None
        raise explained or UserError(f"data_path={str(path)!r} names no file: {error}") from error
    if stat.S_ISDIR(mode):
        raise UserError(f"{path} is a folder: data_path must name a file")
    if not stat.S_ISREG(mode):
        raise UserError(f"{path} is not a regular file: data_path must name one")


@contextmanager
def _open(path: Path, kind: str) -> Iterator[Callable[[int], bytes]]:
    """Yield the `read` of the unpacked stream."""
    with ExitStack() as stack:
        if kind == ".gz":
            yield stack.enter_context(gzip.open(path)).read
        elif kind == ".bz2":
            yield stack.enter_context(bz2.open(path)).read
        elif kind == ".xz":
            yield stack.enter_context(lzma.open(path)).read
        elif kind == ".zip":
            archive = stack.enter_context(zipfile.ZipFile(path))
            yield stack.enter_context(archive.open(_only_member(archive, path))).read
        else:
            yield stack.enter_context(path.open("rb")).read


def _only_member(archive: zipfile.ZipFile, path: Path) -> zipfile.ZipInfo:
    members = [member for member in archive.infolist() if not member.is_dir()]
    if len(members) != 1:
        raise UserError(f"{path} holds {len(members)} files: data_path needs a .zip with one")
    if members[0].flag_bits & _ENCRYPTED:
        raise UserError(f"{path} is encrypted: unpack it and name the unpacked file")
    # zipfile unpacks the other methods without a bound on memory.
    if members[0].compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise UserError(f"{path} is not packed by deflate: unpack it and name the unpacked file")
    return members[0]

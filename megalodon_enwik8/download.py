"""Fetch a corpus whose size and sum are known: resumed, verified, never left half-done."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import http.client
import io
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megalodon_enwik8.archives import unpacked_chunks
from megalodon_enwik8.errors import UserError, explain_os_error
from megalodon_enwik8.files import atomic_write, exclusive_lock, remove_leftovers

_BLOCK = 1 << 16
_LONGEST_WAIT_S = 30.0
# Besides 5xx, the statuses that may go away by themselves.
_PASSING_STATUS = (408, 425, 429)
_GZIP_LEVEL = 6


@dataclass(frozen=True)
class Source:
    """A corpus as a .zip with one member on a web server. Sizes in bytes, sums SHA-256 in hex."""

    name: str
    url: str
    archive_size: int
    archive_sha256: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Patience:
    """When to give up on a server."""

    stall_s: float = 30.0  # without a byte
    attempts: int = 5  # in a row that bring nothing new
    wait_s: float = 1.0  # before the first retry; doubles from one to the next


class _RetryError(Exception):
    """A failure that another attempt may not meet."""


def fetch(
    source: Source, target: Path, *, progress: bool = True, patience: Patience | None = None
) -> None:
    """Download `source` and store its unpacked bytes at `target`, gzipped if that ends in .gz.

    Sizes and sums of the archive and of the unpacked bytes are verified before `target` comes
    into being. The archive gathers in `<target>.part`; a later call goes on with what an
    interrupted one left there. `<target>.lock` keeps a second process waiting, which then finds
    `target` in place.

    Raises UserError if the server cannot be reached, keeps failing or has another file, and if
    `target` cannot be written.
    """
    part = _beside(target, ".part")
    with _disk_errors(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
    with exclusive_lock(_beside(target, ".lock")):
        remove_leftovers(target.parent, target.name)
        if target.exists():
            return
        with tqdm(
            total=source.archive_size,
            unit="B",
            unit_scale=True,
            desc=f"fetching {source.name}",
            delay=1,  # none at all where the server cannot be reached
            disable=not progress,
        ) as bar:
            _download(_Transfer(source, part, target, patience or Patience(), bar))
        _store(source, part, target)
        part.unlink()


def _download(transfer: _Transfer) -> None:
    """Make the .part file the whole archive, with the right sum."""
    source, part = transfer.source, transfer.part
    transfer.run()
    found = _sha256(part)
    if found != source.archive_sha256 and transfer.patched:
        # The pieces may be of different files; what comes in one piece is of one file.
        part.unlink()
        transfer.run()
        found = _sha256(part)
    if found != source.archive_sha256:
        part.unlink()
        raise transfer.give_up(f"its SHA-256 is {found}, expected {source.archive_sha256}")


class _Transfer:
    """One download: as many attempts as patience allows, each going on where the last ended."""

    def __init__(
        self, source: Source, part: Path, target: Path, patience: Patience, bar: tqdm[Any]
    ) -> None:
        self.source, self.part, self.target = source, part, target
        self.patience, self.bar = patience, bar
        self.answered = False  # by a server, to any attempt
        self.patched = _size(part) > 0  # whether `part` may hold pieces of several responses
        self.sized = True  # whether the last response declared the right size
        self.validator: str | None = None  # of the file on the server, for If-Range

    def run(self) -> None:
        whole = self.source.archive_size
        if _size(self.part) > whole:
            self.part.unlink(missing_ok=True)
        most, failures = _size(self.part), 0
        while (have := _size(self.part)) < whole:
            if failures:
                time.sleep(min(self.patience.wait_s * 2 ** (failures - 1), _LONGEST_WAIT_S))
            reason = self._attempt(have)
            if not self.sized and _size(self.part) < whole:
                # A login page, perhaps: no beginning to go on from.
                self.part.unlink(missing_ok=True)
            have = _size(self.part)
            failures = 1 if have > most else failures + 1
            most = max(most, have)
            if have < whole and failures >= self.patience.attempts:
                raise self.give_up(reason)

    def _attempt(self, have: int) -> str:
        """Add to the `have` bytes what one response brings; return why it brings no more."""
        headers = {"User-Agent": "megalodon-enwik8", "Accept-Encoding": "identity"}
        if have:
            headers["Range"] = f"bytes={have}-"
            if self.validator:
                headers["If-Range"] = self.validator
        request = urllib.request.Request(self.source.url, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=self.patience.stall_s) as response:
                self.answered = True
                self._receive(response, self._first_byte(response, have))
        except urllib.error.HTTPError as error:
            error.close()
            self.answered = True
            reason = f"the server answers {error.code} {error.reason}"
            if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
                self.part.unlink(missing_ok=True)
            elif error.code < 500 and error.code not in _PASSING_STATUS:
                raise self.give_up(reason) from error
            return reason
        except urllib.error.URLError as error:
            # Nobody there at all: who has no network should not wait for it.
            if not self.answered:
                raise self.give_up(_say(error.reason)) from error
            return _say(error.reason)
        except _RetryError as error:
            return str(error)
        except (OSError, http.client.HTTPException, ValueError) as error:
            return _say(error)
        return "the connection was closed early"

    def _first_byte(self, response: http.client.HTTPResponse, have: int) -> int:
        """Check the head of a response and return the offset at which its body begins."""
        first, size = 0, response.headers.get("Content-Length", "")
        if response.status == http.client.PARTIAL_CONTENT:
            content_range = response.headers.get("Content-Range", "")
            match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", content_range.strip())
            if match is None or int(match[1]) != have:
                self.part.unlink(missing_ok=True)
                raise _RetryError(f"the server sends {content_range!r}, not from byte {have}")
            first, size = have, match[2]
        elif response.status != http.client.OK:
            raise self.give_up(f"the server answers {response.status}")
        self.sized = size.isdecimal()
        if self.sized and int(size) != self.source.archive_size:
            raise self.give_up(f"it has {int(size):,} bytes, not {self.source.archive_size:,}")
        etag = response.headers.get("ETag", "")
        # A weak tag does not promise equal bytes.
        strong = etag if not etag.startswith("W/") else ""
        self.validator = strong or response.headers.get("Last-Modified")
        return first

    def _receive(self, response: http.client.HTTPResponse, first: int) -> None:
        with _disk_errors(self.part), self.part.open("ab") as file:
            file.truncate(first)
        self.patched = first > 0
        self.bar.n = first
        self.bar.refresh()
        have = first
        while chunk := response.read1(_BLOCK):
            have += len(chunk)
            if have > self.source.archive_size:
                self.part.unlink(missing_ok=True)
                raise self.give_up(f"it has more than {self.source.archive_size:,} bytes")
            # Opened for each block: what has come is in the file whatever happens next.
            with _disk_errors(self.part), self.part.open("ab") as file:
                file.write(chunk)
            self.bar.update(len(chunk))

    def give_up(self, reason: str) -> UserError:
        """The one line that says what failed and how to go on without the server."""
        archive = self.target.with_name(self.source.name + ".zip")
        return UserError(
            f"cannot fetch {self.source.url}: {reason}. Get it by other means, put it at {archive} "
            f"and set data_path={archive}, or run on the sample: data_path=sample"
        )


def _store(source: Source, part: Path, target: Path) -> None:
    """Unpack the archive `part` to `target`, never past the declared size, and verify it."""
    digest, size = hashlib.sha256(), 0
    with atomic_write(target) as file, _packed(file, target) as out:
        for chunk in unpacked_chunks(part, kind=".zip"):
            size += len(chunk)
            if size > source.size:
                break
            digest.update(chunk)
            out.write(chunk)
        if size != source.size:
            more = "more" if size > source.size else "fewer"
            raise UserError(f"{source.url} unpacks to {more} than {source.size:,} bytes")
        if digest.hexdigest() != source.sha256:
            raise UserError(
                f"{source.url} unpacks to SHA-256 {digest.hexdigest()}, expected {source.sha256}"
            )


def _packed(
    file: io.BufferedWriter, target: Path
) -> contextlib.AbstractContextManager[io.BufferedIOBase]:
    if target.suffix != ".gz":
        return contextlib.nullcontext(file)
    # No name and no time inside: equal data make equal files.
    return gzip.GzipFile("", "wb", _GZIP_LEVEL, file, mtime=0)


@contextlib.contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """Turn an OSError of the disk into a UserError, apart from those of the network."""
    try:
        yield
    except OSError as error:
        raise explain_os_error(error, path) or UserError(f"{path}: {_say(error)}") from error


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    for chunk in unpacked_chunks(path, kind=""):
        digest.update(chunk)
    return digest.hexdigest()


def _say(error: object) -> str:
    return str(getattr(error, "strerror", None) or error or type(error).__name__)

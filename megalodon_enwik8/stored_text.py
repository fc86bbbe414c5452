"""A corpus on the disk, of which only what is being read takes memory."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Protocol

import numpy as np

from megalodon_enwik8.data import Bytes, corpus_chunks, split_point
from megalodon_enwik8.errors import UserError, explain_os_error


class Text(Protocol):
    """What is asked of a text: its length in bytes, and any slice of it as uint8 (n,)."""

    def __len__(self) -> int: ...

    def __getitem__(self, where: slice, /) -> Bytes: ...


class StoredText:
    """Part of an open file as a text. A slice is read when it is asked for."""

    def __init__(self, file: IO[bytes], start: int, stop: int) -> None:
        self._file, self._start, self._size = file, start, stop - start

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, where: slice) -> Bytes:
        """where: without a step."""
        start, stop, _ = where.indices(self._size)
        self._file.seek(self._start + start)
        return np.frombuffer(self._file.read(max(0, stop - start)), dtype=np.uint8)


@dataclass(frozen=True, eq=False)
class StoredCorpus:
    """As `data.Corpus`, on the disk."""

    name: str
    train: StoredText
    val: StoredText
    sha256: str


@contextmanager
def open_corpus(
    data_path: str, data_bytes: int | None = None, *, progress: bool = True
) -> Iterator[StoredCorpus]:
    """The corpus that `data.load_corpus` reads, verified likewise, unpacked into a temporary
    file that goes away with the block. Memory stays the same whatever the size of the text.

    Raises UserError as `load_corpus` does, and when the temporary folder is full.
    """
    name, chunks = corpus_chunks(data_path, data_bytes, progress=progress)
    digest, size = hashlib.sha256(), 0
    with tempfile.TemporaryFile() as file:
        for chunk in chunks:
            digest.update(chunk)
            size += len(chunk)
            try:
                file.write(chunk)
            except OSError as error:
                raise explain_os_error(error, tempfile.gettempdir()) or UserError(
                    f"{tempfile.gettempdir()}: cannot be written: {error.strerror}"
                ) from error
        split = split_point(size)
        yield StoredCorpus(
            name,
            StoredText(file, 0, split),
            StoredText(file, split, size),
            digest.hexdigest(),
        )

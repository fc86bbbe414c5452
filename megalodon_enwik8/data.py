"""Find or fetch a corpus, verify it, split it, and cut it into windows.

Text is bytes: a token is one byte, the vocabulary has 256 entries.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from megalodon_enwik8.archives import PACKED, unpacked_chunks
from megalodon_enwik8.download import Source, fetch
from megalodon_enwik8.errors import UserError

ENWIK8 = Source(
    name="enwik8",
    url="http://mattmahoney.net/dc/enwik8.zip",
    archive_size=36_445_475,
    archive_sha256="547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc",
    size=100_000_000,
    sha256="2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8",
)
# What the published comparison reads of it.
ENWIK8_DATA_BYTES = 95_000_000

SAMPLE = "sample"
SAMPLE_FILE = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
SAMPLE_SIZE = 6_089_746
SAMPLE_SHA256 = "34c1c63050c87cc8477b9ae36b1cb0edf372612c92938b742e579a7109c20fa4"

# A packed file of a few kilobytes can unpack to any size.
MAX_UNPACKED = 4 << 30

Bytes = np.ndarray[tuple[int], np.dtype[np.uint8]]


@dataclass(frozen=True, eq=False)
class Corpus:
    """A text, split: the first 90 % for training, the rest for validation."""

    name: str  # "enwik8", "sample", or the file's name
    train: Bytes  # (n,) uint8, read-only
    val: Bytes  # (m,) uint8, read-only
    sha256: str  # of the bytes used, train and val together


def load_corpus(data_path: str, data_bytes: int | None = None, *, progress: bool = True) -> Corpus:
    """Read, verify and split the corpus that `data_path` names.

    `data_path` is the word "sample" (the Wikipedia excerpt that gensim ships), or a file: raw
    bytes, .gz, .bz2, .xz, or .zip with one member. A file called enwik8, packed or not, is held
    to the sum of enwik8, and "enwik8" and "enwik8.gz" are fetched if absent, the only case that
    touches the network; `progress` is for its progress bar.
    `data_bytes` is how many of the first bytes to use; None means 95,000,000 of enwik8, and the
    whole of anything else.

    Raises UserError, one line each, for what is missing, unreadable, empty, damaged, not what
    its name says, larger than memory is risked for, or shorter than `data_bytes`.
    """
    name, chunks = corpus_chunks(data_path, data_bytes, progress=progress)
    data = bytearray()
    for chunk in chunks:
        data += chunk
    used = np.frombuffer(data, dtype=np.uint8)
    used.flags.writeable = False
    split = split_point(len(used))
    return Corpus(name, used[:split], used[split:], hashlib.sha256(used.data).hexdigest())


def split_point(size: int) -> int:
    """How many of a corpus's bytes are for training."""
    return size * 9 // 10


def corpus_chunks(
    data_path: str, data_bytes: int | None = None, *, progress: bool = True
) -> tuple[str, Iterator[bytes]]:
    """The name of a corpus and its bytes, piece by piece, for a text larger than the memory.

    Arguments and errors are those of `load_corpus`. What can only be known at the end, as a
    wrong checksum, is raised there: nothing is good before all has been read.
    """
    if data_bytes is not None and data_bytes <= 0:
        raise UserError(
            f"data_bytes={data_bytes}: must be at least 1, or absent to use the default"
        )
    if data_path == SAMPLE:
        name, chunks = SAMPLE, _sample_chunks()
    else:
        path = Path(os.path.expanduser(data_path))
        bare = path.name.removesuffix(path.suffix) if path.suffix in PACKED else path.name
        if bare == ENWIK8.name:
            name, chunks = ENWIK8.name, _enwik8_chunks(path, progress)
            data_bytes = ENWIK8_DATA_BYTES if data_bytes is None else data_bytes
        elif path.name == SAMPLE:
            # Its figures would pass for those of the built-in sample.
            raise UserError(f"{path}: a file of this name is taken for the sample: rename it")
        else:
            name, chunks = path.name, _any_chunks(path, data_bytes)
    return name, _first_bytes(chunks, data_path, data_bytes)


def _first_bytes(
    chunks: Iterator[bytes], data_path: str, data_bytes: int | None
) -> Iterator[bytes]:
    """The first `data_bytes` bytes of `chunks`, which are read to their end all the same."""
    size = 0
    for chunk in chunks:
        used = chunk if data_bytes is None else chunk[: data_bytes - size]
        size += len(used)
        yield used
    if not size:
        raise UserError(f"{data_path} is empty: name a file that holds text")
    if data_bytes is not None and size < data_bytes:
        raise UserError(
            f"data_bytes={data_bytes}: {data_path} has {size} bytes: ask for no more than that"
        )


def _enwik8_chunks(path: Path, progress: bool) -> Iterator[bytes]:
    if path.suffix in ("", ".gz") and _is_absent(path):
        fetch(ENWIK8, path, progress=progress)
    return _known_chunks(path, ENWIK8.size, ENWIK8.sha256, "rename it to use it as ordinary data")


def _is_absent(path: Path) -> bool:
    try:
        path.stat()
    except FileNotFoundError:
        return True
    except (OSError, ValueError):
        return False  # reading it says what is wrong with it
    return False


def _sample_chunks() -> Iterator[bytes]:
    # Importing gensim takes a second and more; its place on the disk is all that is needed.
    try:
        spec = importlib.util.find_spec("gensim")
    except (ImportError, ValueError):
        spec = None
    places = list(spec.submodule_search_locations or ()) if spec else []
    if not places:
        raise UserError(
            'data_path=sample needs gensim, which ships the text: pip install -e ".[sample]"'
        )
    path = Path(places[0], "test", "test_data", SAMPLE_FILE)
    if not path.exists():
        raise UserError(
            f"data_path=sample: this gensim lacks {path}: pip install --force-reinstall gensim"
        )
    return _known_chunks(path, SAMPLE_SIZE, SAMPLE_SHA256, "pip install --force-reinstall gensim")


def _known_chunks(path: Path, size: int, sha256: str, remedy: str) -> Iterator[bytes]:
    """The unpacked bytes of `path`, which must have this size and SHA-256."""
    found, digest = 0, hashlib.sha256()
    for chunk in unpacked_chunks(path):
        found += len(chunk)
        if found > size:
            raise UserError(f"{path} holds more than the expected {size:,} bytes: {remedy}")
        digest.update(chunk)
        yield chunk
    if found != size:
        raise UserError(f"{path} holds {found:,} bytes, expected {size:,}: {remedy}")
    if digest.hexdigest() != sha256:
        raise UserError(f"{path} has SHA-256 {digest.hexdigest()}, expected {sha256}: {remedy}")


def _any_chunks(path: Path, data_bytes: int | None) -> Iterator[bytes]:
    """The bytes of `path`, at least the first `data_bytes`.

    A packed file is read to its end in any case, since its checksum stands there.
    """
    raw, size = path.suffix not in PACKED, 0
    for chunk in unpacked_chunks(path):
        size += len(chunk)
        yield chunk
        if raw and data_bytes is not None and size >= data_bytes:
            break
        if size > MAX_UNPACKED and (data_bytes is None or not raw):
            raise UserError(
                f"{path} holds more than {MAX_UNPACKED:,} bytes: name an unpacked file and say "
                "with data_bytes how much of it to use"
            )


def check_length(corpus: Corpus, seq_len: int) -> None:
    """Raise UserError unless both parts of `corpus` hold a window of `seq_len` + 1 bytes."""
    _starts(corpus.train, seq_len, "training")
    _starts(corpus.val, seq_len, "validation")


def training_batch(
    train: Bytes,
    *,
    seed: int,
    step: int,
    batch_size: int,
    seq_len: int,
    rows: range | None = None,
) -> torch.Tensor:
    """Rows of the batch of step `step`: (len(rows), seq_len + 1), int64.

    Row i is a pure function of (train, seed, step, i), uniform over all windows of `train`, so
    the examples are the same however a batch is split into micro-batches or processes, and
    after a resume. `rows` is the part of range(batch_size) to make, by default all of it.

    Raises UserError if `train` is shorter than one window, ValueError for rows outside the batch.
    """
    rows = range(batch_size) if rows is None else rows
    if rows and not (min(rows) >= 0 and max(rows) < batch_size):
        raise ValueError(f"{rows} is not within a batch of {batch_size}")
    count = _starts(train, seq_len, "training")
    return _windows(train, [_draw(count, seed, step, row) for row in rows], seq_len)


def stream_steps(train: Bytes, *, streams: int, seq_len: int) -> int:
    """Steps in one pass of :func:`stream_batch`. Raises UserError where there is none."""
    steps = (len(train) - 1) // (streams * seq_len)
    if not steps:
        raise UserError(
            f"carry_state=true: {streams} streams of seq_len={seq_len} need "
            f"{streams * seq_len + 1} bytes, the training part has {len(train)}: use a smaller "
            "seq_len, fewer sequences in a step, or more data"
        )
    return steps


def stream_batch(
    train: Bytes,
    *,
    seed: int,
    step: int,
    streams: int,
    seq_len: int,
    length: int | None = None,
) -> tuple[torch.Tensor, bool]:
    """The rows of step `step` where `train` is read as `streams` texts side by side:
    (streams, seq_len + 1) int64, and whether all streams begin with them.

    Row i of one step goes on where row i of the step before ended, until the streams end, all at
    once, and a new pass begins. The streams of a pass are equally long and follow each other in
    `train`; what the division leaves over, less than streams x seq_len bytes, is left out at both
    ends, where the pass's own draw says. A pure function of the arguments, as `training_batch` is.

    length: steps after which all streams begin anew, each at a place of its own that is uniform
    over `train`; with 1, the rows are those of `training_batch`.

    Raises UserError if `train` does not fill one step, or one stream of that length.
    """
    if length is not None:
        number, place = divmod(step, length)
        count = _starts(train, length * seq_len, "training", "carry_steps x seq_len")
        starts = [_draw(count, seed, number, row) + place * seq_len for row in range(streams)]
        return _windows(train, starts, seq_len), place == 0
    steps = stream_steps(train, streams=streams, seq_len=seq_len)
    number, place = divmod(step, steps)
    left_over = len(train) - 1 - streams * steps * seq_len
    first = _draw(left_over + 1, seed, number, 0) + place * seq_len
    starts = [first + row * steps * seq_len for row in range(streams)]
    return _windows(train, starts, seq_len), place == 0


def validation_windows(
    val: Bytes, *, count: int, seq_len: int, midway: bool = False
) -> torch.Tensor:
    """`count` fixed windows of `val`, evenly spaced from its first to its last: int64,
    (count, seq_len + 1). They overlap where `val` is short. With `midway`, the count - 1 windows
    midway between those, for choices that the others are to judge.

    Raises UserError if `val` is shorter than one window, or there is nothing midway.
    """
    last = _starts(val, seq_len, "validation") - 1
    gaps = max(count - 1, 1)
    starts = [i * last // gaps for i in range(count)]
    if midway:
        starts = [(2 * i + 1) * last // (2 * gaps) for i in range(count - 1)]
        if gaps > last // (2 * seq_len + 2) or not starts:
            raise UserError(
                f"val_windows=search: val_batches={count} windows of seq_len={seq_len} leave no "
                f"room between them in {len(val)} bytes of validation: use fewer, at least 2"
            )
    return _windows(val, starts, seq_len)


def _draw(count: int, seed: int, step: int, row: int) -> int:
    """A number in range(count) that depends on nothing but the arguments.

    The raw words of Philox (Salmon et al. 2011), unlike what a numpy Generator makes of them,
    are the same in every numpy version. Scaling 64 bits favours no number by more than
    count / 2**64.
    """
    # The lowest word counts the draws.
    philox = np.random.Philox(key=seed % (1 << 64), counter=[0, row, step, 0])
    return int(philox.random_raw()) * count >> 64


def _starts(data: Bytes, seq_len: int, part: str, name: str = "seq_len") -> int:
    """How many windows of seq_len + 1 bytes begin in `data`."""
    if len(data) <= seq_len:
        raise UserError(
            f"{name}={seq_len}: the {part} part has {len(data)} bytes and needs {seq_len + 1}: "
            f"use a smaller {name} or more data"
        )
    return len(data) - seq_len


def _windows(data: Bytes, starts: list[int], seq_len: int) -> torch.Tensor:
    places = np.array(starts, dtype=np.int64)[:, None] + np.arange(seq_len + 1)
    return torch.from_numpy(data[places].astype(np.int64))

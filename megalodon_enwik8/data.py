"""Find or fetch a text, verify it, split it, and cut it into batches and windows.

Text is bytes: a token is one byte, the vocabulary has 256 entries.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import importlib.metadata
import importlib.util
import lzma
import os
import socket
import sys
import time
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from filelock import FileLock

from megalodon_enwik8.safety import UserError, atomic_write

ENWIK8 = "enwik8"
ENWIK8_URL = "http://mattmahoney.net/dc/enwik8.zip"
ENWIK8_ZIP_SHA256 = "547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc"
ENWIK8_SHA256 = "2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8"
ENWIK8_DATA_BYTES = 95_000_000  # what the published comparison reads of it

SAMPLE = "sample"
SAMPLE_FILE = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
SAMPLE_SHA256 = "34c1c63050c87cc8477b9ae36b1cb0edf372612c92938b742e579a7109c20fa4"

CODE = "code"
CODE_DATA_BYTES = 95_000_000
CODE_SHA256 = "fcfc7ae6ea653c43a1300c24aff5c2ebb63872456b345ce669bb09fc8febfa22"

MAX_UNPACKED = 4 << 30  # a packed file of a few kilobytes can unpack to any size
_PIECE = 1 << 20

DOWNLOAD_WAITS_S = (0, 1, 5)  # before each try
DOWNLOAD_STALL_S = 30.0  # without a byte, after which a try has failed

Bytes = np.ndarray[tuple[int], np.dtype[np.uint8]]


@dataclass(frozen=True, eq=False)
class Corpus:
    """A text, split: nine tenths for training, the rest for validation."""

    name: str  # "enwik8", "sample", "code", or the file's name
    train: Bytes  # (n,) uint8, read-only
    val: Bytes  # (m,) uint8, read-only
    sha256: str  # of the bytes used, train and then val


def load_corpus(data_path: str, data_bytes: int | None = None) -> Corpus:
    """Read, verify and split the text that `data_path` names.

    `data_path` is "sample" (the Wikipedia excerpt that gensim ships), "code" (see `_read_code`), or
    a file: raw bytes, .gz, .bz2, .xz, or .zip with one member. A file called enwik8, packed or not,
    is held to the sum of enwik8, and "enwik8" and "enwik8.gz" are fetched if absent, the only case
    that touches the network. A packed file is unpacked into
    memory; a raw one of any size is mapped, and has to stay as it is while it is used.
    `data_bytes` >= 1 is how many of the first bytes to use; None means 95,000,000 of enwik8 and of
    code, and the whole of anything else.

    Raises UserError, one line each, for what is missing, empty, damaged, not what its name says,
    unpacked larger than memory is risked for, or shorter than `data_bytes`.
    """
    name, text = _read_named(data_path, data_bytes)
    if not len(text):
        raise UserError(f"{data_path} is empty: name a file that holds text")
    if data_bytes is not None and data_bytes > len(text):
        raise UserError(
            f"data_bytes={data_bytes}: {data_path} has {len(text)} bytes: ask for no more than that"
        )
    text = text[: ENWIK8_DATA_BYTES if data_bytes is None and name == ENWIK8 else data_bytes]
    split = split_point(len(text))
    return Corpus(name, text[:split], text[split:], _sha256(text))


def split_point(size: int) -> int:
    """How many of a corpus's bytes are for training."""
    return size * 9 // 10


def named_text(data_path: str) -> str:
    """The text that `data_path` names: "enwik8", "sample", "code", or a file by its name."""
    path = Path(os.path.expanduser(data_path))
    is_enwik8 = (path.stem if path.suffix in PACKED else path.name) == ENWIK8
    return ENWIK8 if is_enwik8 else path.name


def _read_named(data_path: str, data_bytes: int | None) -> tuple[str, Bytes]:
    """A corpus's name, and at least its first `data_bytes` bytes as far as it has them."""
    if data_path == CODE:
        return _read_code(data_bytes)
    if data_path == SAMPLE:
        folder = _installed("gensim", 'pip install -e ".[sample]"')
        remedy = "pip install --force-reinstall gensim"
        file = folder / "test" / "test_data" / SAMPLE_FILE
        return SAMPLE, _read_known(file, SAMPLE_SHA256, remedy)
    path = Path(os.path.expanduser(data_path))
    if path.name in (SAMPLE, CODE):  # its figures would pass for those of the text of that name
        raise UserError(f"{path}: a file of this name is taken for the {path.name}: rename it")
    if named_text(data_path) != ENWIK8:
        return path.name, _read(path, "check data_path", keep=data_bytes)
    if path.suffix in ("", ".gz") and not path.exists():
        _fetch_enwik8(path)
    remedy = "check data_path, or rename the file to use it as ordinary data"
    return ENWIK8, _read_known(path, ENWIK8_SHA256, remedy)


def _read_known(path: Path, sha256: str, remedy: str) -> Bytes:
    """The unpacked bytes of a file that must have this SHA-256."""
    text = _read(path, remedy)
    if _sha256(text) != sha256:
        raise UserError(f"{path} is not the text of SHA-256 {sha256}: {remedy}")
    return text


def _read(path: Path, remedy: str, keep: int | None = None) -> Bytes:
    """The unpacked bytes of `path`; of a packed file no more than the first `keep`."""
    if not path.is_file():  # to open a pipe could wait for ever
        other = "is a folder" if path.is_dir() else "not a regular file"
        raise UserError(f"{path}: {other if path.exists() else 'no such file'}: {remedy}")
    if path.suffix not in PACKED:
        raw = np.memmap(path, np.uint8, "r") if path.stat().st_size else np.empty(0, np.uint8)
        return raw.view(np.ndarray)
    data = bytearray()
    try:
        with path.open("rb") as file, PACKED[path.suffix](file) as unpacked:
            while len(data) < (keep or MAX_UNPACKED + 1) and (piece := unpacked.read(_PIECE)):
                data += piece
    except Exception as error:  # decoders meet damage with exceptions of many kinds
        raise UserError(
            f"{path} is cut off, damaged or no {path.suffix} that can be read here ({error}): "
            "get it again, or unpack it and name the unpacked file"
        ) from error
    if keep is None and len(data) > MAX_UNPACKED:
        raise UserError(
            f"{path} unpacks to more than {MAX_UNPACKED:,} bytes: name the unpacked file, or say "
            "with data_bytes how much of it to read"
        )
    text = np.frombuffer(data, np.uint8)
    text.flags.writeable = False
    return text


def _only_member(file: IO[bytes]) -> IO[bytes]:
    archive = zipfile.ZipFile(file)
    members = [member for member in archive.infolist() if not member.is_dir()]
    if len(members) != 1:
        raise ValueError(f"it holds {len(members)} files, not one")
    return archive.open(members[0])


PACKED: dict[str, Callable[[IO[bytes]], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zip": _only_member,
}


def _fetch_enwik8(path: Path) -> None:
    """Fetch enwik8 and store it at `path`, gzipped if that ends in .gz: whole or not at all.

    A second process waits for the first and then finds the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f"{ENWIK8}.lock")):
        if path.exists():
            return
        for leftover in path.parent.glob(f".{path.name}.*"):  # of a fetch that was killed
            leftover.unlink()
        archive = path.with_name(f".{path.name}.zip")
        try:
            _download(archive, path.with_name(f"{ENWIK8}.zip"))
            with archive.open("rb") as file:
                text = _only_member(file).read()
        finally:
            archive.unlink(missing_ok=True)
        with atomic_write(path) as file:
            # No time inside: equal texts make equal files.
            file.write(gzip.compress(text, 6, mtime=0) if path.suffix == ".gz" else text)


def _download(archive: Path, by_hand: Path) -> None:
    """Put enwik8.zip, verified, at `archive`. `by_hand` is where its user may put it instead."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_STALL_S)
    try:
        for wait in DOWNLOAD_WAITS_S:
            time.sleep(wait)
            try:
                torch.hub.download_url_to_file(
                    ENWIK8_URL, str(archive), ENWIK8_ZIP_SHA256, progress=sys.stderr.isatty()
                )
                return
            # RuntimeError: the sum is wrong, as it also is when an answer was cut off.
            except (OSError, HTTPException, RuntimeError) as error:
                failure = error
    finally:
        socket.setdefaulttimeout(before)
    raise UserError(
        f"cannot fetch {ENWIK8_URL}: {failure}. Get it by other means, put it at {by_hand} and "
        f"set data_path={by_hand}, or run on the sample: data_path=sample"
    )


def _read_code(data_bytes: int | None) -> tuple[str, Bytes]:
    """The Python sources of the installed torch and transformers, in units of which either the
    training or the validation part has all: data/README.md has the rule, and why.

    The name is "code" where the text is, byte for byte, that of the versions in constraints.txt,
    and elsewhere says the versions, so that no table takes the one for the other.
    """
    packages = ("torch", "transformers")
    units: dict[str, dict[str, bytes]] = {}
    for package in packages:
        folder = _installed(package, "pip install -e .")
        for file in folder.rglob("*.py"):
            path = f"{package}/{file.relative_to(folder).as_posix()}"
            unit = units.setdefault("/".join(path.split("/")[:-1][:2]), {})
            # torch for Windows has that system's line ends.
            unit[path] = f"# {path}\n".encode() + file.read_bytes().replace(b"\r\n", b"\n")
    del units["torch"]["torch/version.py"]  # differs between builds of one version

    drawn, total = 0, sum(len(text) for unit in units.values() for text in unit.values())
    train: dict[str, bytes] = {}
    val: dict[str, bytes] = {}
    for name in sorted(units, key=lambda name: hashlib.sha256(name.encode()).digest()):
        (val if 10 * drawn < total else train).update(units[name])
        drawn += sum(map(len, units[name].values()))
    train_text, val_text = (b"\n".join(part[p] for p in sorted(part)) for part in (train, val))

    def beginnings(size: int) -> Bytes:
        split = split_point(size)
        return np.frombuffer(train_text[:split] + val_text[: size - split], np.uint8)

    size = min(CODE_DATA_BYTES, len(train_text) * 10 // 9, len(val_text) * 10)
    text, name = beginnings(size), CODE
    if _sha256(text) != CODE_SHA256:
        versions = [f"{p} {importlib.metadata.version(p).split('+')[0]}" for p in packages]
        name = f"{CODE} ({', '.join(versions)})"
    return name, text if data_bytes is None else beginnings(min(size, data_bytes))


def _installed(package: str, remedy: str) -> Path:
    """The folder of an installed package. It is not imported: that may take seconds."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"{package}, which ships this text, is not installed: {remedy}")
    return Path(next(iter(spec.submodule_search_locations)))


def _sha256(text: Bytes) -> str:
    return hashlib.sha256(text.data).hexdigest()


def training_batch(
    train: Bytes, *, seed: int, step: int, sequences: Iterable[int], seq_len: int
) -> torch.Tensor:
    """Those sequences of step `step`: (len(sequences), seq_len + 1), int64.

    Sequence i is a pure function of (train, seed, step, i), uniform over all windows of `train`, so
    the examples are the same however a batch is split into micro-batches or processes, and
    after a resume. Raises UserError if `train` is shorter than one window.
    """
    count = _starts(train, seq_len)
    return windows_at(train, [_draw(count, seed, step, i) for i in sequences], seq_len)


def validation_starts(val: Bytes, *, count: int, seq_len: int, midway: bool = False) -> list[int]:
    """Where `count` fixed windows of seq_len + 1 bytes begin, evenly spaced from the first of `val`
    to its last. They overlap where `val` is short. With `midway`, the count - 1 windows midway
    between those, for choices that the others are to judge.

    Raises UserError if `val` is shorter than one window, or there is nothing midway.
    """
    last = _starts(val, seq_len) - 1
    gaps = max(count - 1, 1)
    if not midway:
        return [i * last // gaps for i in range(count)]
    if count < 2 or gaps > last // (2 * seq_len + 2):
        raise UserError(
            f"val_windows=search: val_batches={count} windows of seq_len={seq_len} leave no "
            f"room between them in {len(val)} bytes of validation: use fewer, at least 2"
        )
    return [(2 * i + 1) * last // (2 * gaps) for i in range(count - 1)]


def _draw(count: int, seed: int, step: int, sequence: int) -> int:
    """A number in range(count) that depends on nothing but the arguments.

    The raw words of Philox (Salmon et al. 2011), unlike what a numpy Generator makes of them,
    are the same in every numpy version. Scaling 64 bits favours no number by more than
    count / 2**64.
    """
    # The lowest word counts the draws.
    philox = np.random.Philox(key=seed % (1 << 64), counter=[0, sequence, step, 0])
    return int(philox.random_raw()) * count >> 64


def _starts(part: Bytes, seq_len: int) -> int:
    """How many windows of seq_len + 1 bytes begin in a part of a text. Raises UserError for none;
    who checks the validation part first, which is never the longer, need not check the other."""
    if len(part) <= seq_len:
        raise UserError(
            f"seq_len={seq_len}: a part of the text has {len(part)} bytes and needs {seq_len + 1}: "
            "use a smaller seq_len or more data"
        )
    return len(part) - seq_len


def windows_at(text: Bytes, starts: Sequence[int], seq_len: int) -> torch.Tensor:
    """The windows of a text that begin there: int64, (len(starts), seq_len + 1)."""
    windows = np.array([text[i : i + seq_len + 1] for i in starts], dtype=np.int64)
    return torch.from_numpy(windows.reshape(len(starts), seq_len + 1))

"""Files of every kind, whole, damaged, and made to fill the memory."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import os
import random
import tempfile
import tracemalloc
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalodon_enwik8.archives import PACKED, unpacked_chunks
from megalodon_enwik8.errors import UserError

TEXT = b"".join(random.Random(0).choice((b"the ", b"of\n", b"[[", b"]] ")) for _ in range(2000))


def zipped(*texts: bytes, method: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        archive.writestr("folder/", b"")
        for number, text in enumerate(texts):
            archive.writestr(f"../../{number}", text)
    return buffer.getvalue()


PACK: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".txt": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zip": zipped,
}
packed_kinds = pytest.mark.parametrize("kind", PACKED)


def unpack(path: Path) -> bytes:
    return b"".join(unpacked_chunks(path))


def unpack_bytes(kind: str, data: bytes) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"file{kind}"
        path.write_bytes(data)
        try:
            # zipfile warns about some of the damage before it raises.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return unpack(path)
        finally:
            assert os.listdir(folder) == [path.name]


@pytest.mark.parametrize("kind", PACK)
@given(text=st.binary(max_size=10_000))
def test_every_kind_gives_back_the_text(kind: str, text: bytes) -> None:
    assert unpack_bytes(kind, PACK[kind](text)) == text


@pytest.mark.parametrize("kind", PACK)
def test_pieces_are_at_most_a_mebibyte(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"file{kind}"
    path.write_bytes(PACK[kind](bytes(5 << 20)))
    sizes = [len(chunk) for chunk in unpacked_chunks(path)]
    assert max(sizes) <= 1 << 20
    assert sum(sizes) == 5 << 20


@pytest.mark.parametrize("kind", [".gz", ".bz2", ".xz"])
def test_parts_packed_one_by_one_are_one_file(kind: str) -> None:
    assert unpack_bytes(kind, PACK[kind](b"one ") + PACK[kind](b"two")) == b"one two"


def right_or_refused(kind: str, data: bytes) -> None:
    # Nothing at all is what a packed file cut to nothing holds.
    with contextlib.suppress(UserError):
        assert unpack_bytes(kind, data) in (TEXT, b"")


@packed_kinds
@given(data=st.data())
def test_file_cut_anywhere_is_refused(kind: str, data: st.DataObject) -> None:
    packed = PACK[kind](TEXT)
    right_or_refused(kind, packed[: data.draw(st.integers(0, len(packed) - 1))])


@packed_kinds
@given(data=st.data())
def test_damaged_file_is_refused_or_read_right(kind: str, data: st.DataObject) -> None:
    packed = bytearray(PACK[kind](TEXT))
    places = st.lists(st.integers(0, len(packed) - 1), min_size=1, max_size=5)
    for place in data.draw(places):
        packed[place] = data.draw(st.integers(0, 255))
    right_or_refused(kind, bytes(packed))


@packed_kinds
@given(junk=st.binary(min_size=1, max_size=500))
def test_any_other_bytes_are_refused(kind: str, junk: bytes) -> None:
    with pytest.raises(UserError, match=rf"file{kind} is "):
        unpack_bytes(kind, junk)


@packed_kinds
def test_bomb_costs_no_memory_while_the_reader_stops(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"bomb{kind}"
    path.write_bytes(PACK[kind](bytes(64 << 20)))
    tracemalloc.start()
    try:
        chunks = unpacked_chunks(path)
        for _ in range(3):
            next(chunks)
        del chunks
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("count", [0, 2])
def test_zip_with_other_than_one_member_is_refused(tmp_path: Path, count: int) -> None:
    path = tmp_path / "x.zip"
    path.write_bytes(zipped(*[TEXT] * count))
    with pytest.raises(UserError, match=rf"x\.zip holds {count} files: .* with one"):
        unpack(path)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_zip_that_unpacks_without_bound_is_refused(tmp_path: Path, method: int) -> None:
    path = tmp_path / "x.zip"
    path.write_bytes(zipped(TEXT, method=method))
    with pytest.raises(UserError, match="not packed by deflate"):
        unpack(path)


def test_encrypted_zip_is_refused(tmp_path: Path) -> None:
    path, packed = tmp_path / "x.zip", bytearray(zipped(TEXT))
    member = packed.rindex(b"PK\x01\x02")
    packed[member + 8] |= 1
    path.write_bytes(packed)
    with pytest.raises(UserError, match="is encrypted"):
        unpack(path)


def test_absent_folder_and_pipe_are_one_line_each(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").touch()
    for path, message in {
        tmp_path / "absent": "absent: no such file",
        tmp_path / "file" / "x": "x: no such file",
        tmp_path: "is a folder",
        tmp_path / "pipe": "is not a regular file",
        Path("a\0b"): "names no file",
        tmp_path / ("x" * 1000): "names no file",
    }.items():
        with pytest.raises(UserError, match=message):
            unpack(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_bytes(TEXT)
    path.chmod(0)
    with pytest.raises(UserError, match="secret: permission denied"):
        unpack(path)

"""The right bytes, split and cut the same way every time."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import importlib.util
import itertools
import lzma
import os
import random
import socket
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megalodon_enwik8 import data
from megalodon_enwik8.data import (
    Bytes,
    Corpus,
    check_length,
    load_corpus,
    training_batch,
    validation_windows,
)
from megalodon_enwik8.download import Source
from megalodon_enwik8.errors import UserError

TEXT = random.Random(1).randbytes(100_000)
ALL_BYTES = np.arange(256, dtype=np.uint8)


def sha256(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()


def held_by(corpus: Corpus) -> bytes:
    return corpus.train.tobytes() + corpus.val.tobytes()


def write(folder: Path, name: str, text: bytes = TEXT) -> str:
    """Store `text` in `folder` the way `name` says; return the path."""
    path = folder / name
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("text", text)
    else:
        pack: dict[str, Callable[[bytes], bytes]] = {
            ".gz": gzip.compress,
            ".bz2": bz2.compress,
            ".xz": lzma.compress,
        }
        path.write_bytes(pack.get(path.suffix, bytes)(text))
    return str(path)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test here may even look a name up."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def enwik8(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let TEXT be enwik8, and 95,000 its usual limit."""
    source = replace(data.ENWIK8, size=len(TEXT), sha256=sha256(TEXT))
    monkeypatch.setattr(data, "ENWIK8", source)
    monkeypatch.setattr(data, "ENWIK8_DATA_BYTES", 95_000)


KINDS = ["", ".txt", ".gz", ".bz2", ".xz", ".zip"]


@pytest.mark.parametrize("suffix", KINDS)
def test_every_kind_of_file_is_the_same_corpus(tmp_path: Path, suffix: str) -> None:
    corpus = load_corpus(write(tmp_path, f"mine{suffix}"))
    assert held_by(corpus) == TEXT
    assert corpus.sha256 == sha256(TEXT)
    assert corpus.name == f"mine{suffix}"


@pytest.mark.parametrize("suffix", KINDS)
@pytest.mark.parametrize("data_bytes", [1, 10, 99_999, 100_000])
def test_data_bytes_takes_the_first_bytes(tmp_path: Path, suffix: str, data_bytes: int) -> None:
    corpus = load_corpus(write(tmp_path, f"mine{suffix}"), data_bytes)
    assert held_by(corpus) == TEXT[:data_bytes]
    assert corpus.sha256 == sha256(TEXT[:data_bytes])


def test_first_nine_tenths_train_and_the_rest_validates(tmp_path: Path) -> None:
    corpus = load_corpus(write(tmp_path, "mine"))
    assert corpus.train.tobytes() == TEXT[:90_000]
    assert corpus.val.tobytes() == TEXT[90_000:]
    assert corpus.train.dtype == np.uint8


def test_corpus_cannot_be_changed(tmp_path: Path) -> None:
    corpus = load_corpus(write(tmp_path, "mine"))
    with pytest.raises(ValueError, match="read-only"):
        corpus.train[0] = 0


@pytest.mark.parametrize("suffix", KINDS)
def test_more_bytes_than_there_are_is_one_line(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(UserError, match=r"data_bytes=100001: .* has 100000 bytes"):
        load_corpus(write(tmp_path, f"mine{suffix}"), 100_001)


@pytest.mark.parametrize("data_bytes", [0, -1])
def test_no_bytes_is_one_line(tmp_path: Path, data_bytes: int) -> None:
    with pytest.raises(UserError, match=f"data_bytes={data_bytes}: "):
        load_corpus(write(tmp_path, "mine"), data_bytes)


@pytest.mark.parametrize("suffix", KINDS)
@pytest.mark.parametrize("data_bytes", [None, 10])
def test_empty_text_is_one_line(tmp_path: Path, suffix: str, data_bytes: int | None) -> None:
    with pytest.raises(UserError, match="is empty"):
        load_corpus(write(tmp_path, f"mine{suffix}", b""), data_bytes)


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zip"])
@pytest.mark.parametrize("data_bytes", [None, 10])
def test_damage_behind_the_bytes_asked_for_is_found_too(
    tmp_path: Path, suffix: str, data_bytes: int | None
) -> None:
    path = Path(write(tmp_path, f"mine{suffix}"))
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(UserError, match=r"cut off|not a valid"):
        load_corpus(str(path), data_bytes)


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zip"])
@pytest.mark.parametrize("data_bytes", [None, 10])
def test_bomb_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, data_bytes: int | None
) -> None:
    monkeypatch.setattr(data, "MAX_UNPACKED", 1 << 20)
    path = write(tmp_path, f"mine{suffix}", bytes((1 << 20) + 1))
    with pytest.raises(UserError, match="holds more than 1,048,576 bytes"):
        load_corpus(path, data_bytes)


def test_large_raw_file_is_read_as_far_as_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "MAX_UNPACKED", 10)
    path = write(tmp_path, "mine")
    assert len(held_by(load_corpus(path, 50_000))) == 50_000
    with pytest.raises(UserError, match="with data_bytes"):
        load_corpus(path)


@pytest.mark.parametrize("name", ["absent", "absent.gz", "enwik8.zip", "enwik8.bz2", ""])
def test_missing_file_is_one_line(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"no such file|is a folder"):
        load_corpus(str(tmp_path / name))


def test_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path, "mine")
    assert held_by(load_corpus("~/mine")) == TEXT


@pytest.mark.usefixtures("enwik8")
@pytest.mark.parametrize("suffix", ["", ".gz", ".bz2", ".xz", ".zip"])
def test_enwik8_is_verified_and_cut_as_published(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path, f"enwik8{suffix}")
    corpus = load_corpus(path)
    assert corpus.name == "enwik8"
    assert held_by(corpus) == TEXT[:95_000]
    assert held_by(load_corpus(path, len(TEXT))) == TEXT


@pytest.mark.usefixtures("enwik8")
@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TEXT[:95_000], "holds 95,000 bytes, expected 100,000: rename it"),
        (TEXT + b"x", "holds more than the expected 100,000 bytes: rename it"),
        (bytes(10**7), "holds more than the expected 100,000 bytes: rename it"),
        (
            bytes(100_000),
            f"has SHA-256 {sha256(bytes(100_000))}, expected {sha256(TEXT)}: rename it",
        ),
    ],
)
def test_another_text_under_the_name_enwik8_is_one_line(
    tmp_path: Path, suffix: str, text: bytes, message: str
) -> None:
    path = write(tmp_path, f"enwik8{suffix}", text)
    with pytest.raises(UserError, match=message):
        load_corpus(path)
    renamed = Path(path).rename(tmp_path / f"mine{suffix}")
    assert held_by(load_corpus(str(renamed))) == text


@pytest.mark.parametrize("name", ["enwik8", "enwik8.gz"])
def test_absent_enwik8_without_network_says_where_to_put_it(tmp_path: Path, name: str) -> None:
    path = tmp_path / "data" / name
    with pytest.raises(UserError) as caught:
        load_corpus(str(path))
    assert str(caught.value) == (
        "cannot fetch http://mattmahoney.net/dc/enwik8.zip: Name or service not known. "
        f"Get it by other means, put it at {path.parent}/enwik8.zip and set "
        f"data_path={path.parent}/enwik8.zip, or run on the sample: data_path=sample"
    )
    assert os.listdir(path.parent) == [f"{name}.lock"]


def test_absent_enwik8_is_fetched_to_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, enwik8: None
) -> None:
    def fetch(source: Source, target: Path, *, progress: bool) -> None:
        assert (source, progress) == (data.ENWIK8, False)
        write(tmp_path, target.name)

    monkeypatch.setattr(data, "fetch", fetch)
    for name in ("enwik8", "enwik8.gz"):
        assert held_by(load_corpus(str(tmp_path / name), progress=False)) == TEXT[:95_000]


gensim_only = pytest.mark.skipif(
    importlib.util.find_spec("gensim") is None, reason="needs gensim, of the extra [sample]"
)


@gensim_only
def test_sample_is_the_documented_text_and_does_not_import_gensim() -> None:
    imported_before = "gensim" in sys.modules
    corpus = load_corpus("sample")
    assert corpus.name == "sample"
    assert corpus.sha256 == data.SAMPLE_SHA256
    assert len(corpus.train) + len(corpus.val) == 6_089_746
    assert corpus.train[:10].tobytes() == b"<mediawiki"
    assert ("gensim" in sys.modules) == imported_before


@pytest.fixture
def fake_gensim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A gensim with nothing in it; returns the folder of its test data."""
    spec = importlib.util.spec_from_file_location(
        "gensim", tmp_path / "__init__.py", submodule_search_locations=[str(tmp_path)]
    )
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    folder = tmp_path / "test" / "test_data"
    folder.mkdir(parents=True)
    return folder


def test_sample_without_gensim_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'pip install -e "\.\[sample\]"'):
        load_corpus("sample")


def test_gensim_without_the_text_is_one_line(fake_gensim: Path) -> None:
    with pytest.raises(UserError, match=r"this gensim lacks .*: pip install --force"):
        load_corpus("sample")


def test_gensim_with_another_text_is_one_line(fake_gensim: Path) -> None:
    write(fake_gensim, data.SAMPLE_FILE)
    with pytest.raises(UserError, match="holds 100,000 bytes, expected 6,089,746: pip install"):
        load_corpus("sample")


def test_file_called_sample_cannot_pass_for_the_sample(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="taken for the sample: rename it"):
        load_corpus(write(tmp_path, "sample"))


def batch(train: Bytes, **options: Any) -> torch.Tensor:
    return training_batch(train, **{"seed": 7, "step": 0, "batch_size": 16, "seq_len": 1} | options)


@given(
    seed=st.integers(-(2**63), 2**64 - 1),
    step=st.integers(0, 2**40),
    size=st.integers(1, 40),
    cuts=st.lists(st.integers(0, 40)),
)
def test_same_rows_however_the_batch_is_split(
    seed: int, step: int, size: int, cuts: list[int]
) -> None:
    train = np.frombuffer(TEXT, np.uint8)
    options: dict[str, Any] = {"seed": seed, "step": step, "batch_size": size, "seq_len": 8}
    borders = [0, *sorted(cut for cut in cuts if cut < size), size]
    pieces = [
        training_batch(train, **options, rows=range(a, b)) for a, b in itertools.pairwise(borders)
    ]
    whole = training_batch(train, **options)
    assert torch.equal(torch.cat(pieces), whole)
    # As several processes would take them, each every second row.
    assert torch.equal(training_batch(train, **options, rows=range(0, size, 2)), whole[::2])


def test_rows_are_windows_of_the_text() -> None:
    train = np.frombuffer(TEXT, np.uint8)
    rows = training_batch(train, seed=7, step=3, batch_size=4, seq_len=512)
    assert rows.shape == (4, 513)
    assert rows.dtype == torch.int64
    assert all(bytes(row.tolist()) in TEXT for row in rows)


def test_rows_are_those_of_every_other_machine_and_version() -> None:
    starts = [batch(ALL_BYTES, seed=7, step=step, batch_size=4)[:, 0].tolist() for step in (0, 1)]
    assert starts == [[222, 222, 166, 111], [26, 51, 25, 127]]


def test_seed_step_and_row_each_change_the_examples() -> None:
    train = np.frombuffer(TEXT, np.uint8)
    rows = torch.cat(
        [
            training_batch(train, seed=seed, step=step, batch_size=10, seq_len=8)
            for seed in range(10)
            for step in range(10)
        ]
    )
    assert len(torch.unique(rows, dim=0)) > 990  # of 1000; two may meet by chance


def test_starts_are_uniform_over_all_windows() -> None:
    train = ALL_BYTES[:12]  # 10 windows of 3 bytes
    starts = batch(train, batch_size=20_000, seq_len=2)[:, 0]
    counts = torch.bincount(starts, minlength=10)
    assert len(counts) == 10
    # 2000 expected of each, standard deviation 42: five of them.
    assert (counts - 2000).abs().max() < 212


def test_text_of_one_window_is_enough() -> None:
    assert batch(ALL_BYTES[:9], seq_len=8).tolist() == [list(range(9))] * 16
    assert validation_windows(ALL_BYTES[:9], count=2, seq_len=8).tolist() == [list(range(9))] * 2


@pytest.mark.parametrize("rows", [range(15, 17), range(-1, 3)])
def test_rows_outside_the_batch_are_refused(rows: range) -> None:
    with pytest.raises(ValueError, match="not within a batch of 16"):
        batch(ALL_BYTES, rows=rows)


@given(length=st.integers(2, 256), seq_len=st.integers(1, 255), count=st.integers(1, 300))
def test_validation_windows_are_evenly_spaced_from_first_to_last(
    length: int, seq_len: int, count: int
) -> None:
    seq_len = min(seq_len, length - 1)
    windows = validation_windows(ALL_BYTES[:length], count=count, seq_len=seq_len)
    assert windows.shape == (count, seq_len + 1)
    assert windows.dtype == torch.int64
    assert torch.equal(windows, windows[:, :1] + torch.arange(seq_len + 1))
    steps = windows[1:, 0] - windows[:-1, 0]
    assert windows[0, 0] == 0
    if count > 1:
        assert windows[-1, -1] == length - 1
        assert steps.max() - steps.min() <= 1


@given(st.integers(20, 256), st.integers(1, 20), st.integers(2, 20))
def test_windows_midway_have_no_byte_in_common_with_the_others(
    length: int, seq_len: int, count: int
) -> None:
    if length < seq_len + 1 or (count - 1) > (length - seq_len - 1) // (2 * seq_len + 2):
        with pytest.raises(UserError, match=r"val_windows=search|needs"):
            validation_windows(ALL_BYTES[:length], count=count, seq_len=seq_len, midway=True)
        return
    fixed = validation_windows(ALL_BYTES[:length], count=count, seq_len=seq_len)
    midway = validation_windows(ALL_BYTES[:length], count=count, seq_len=seq_len, midway=True)
    assert len(midway) == count - 1
    assert not set(fixed.flatten().tolist()) & set(midway.flatten().tolist())


def test_text_shorter_than_a_window_is_one_line(tmp_path: Path) -> None:
    corpus = load_corpus(write(tmp_path, "mine"), 1000)
    check_length(corpus, 99)
    line = "seq_len=100: the validation part has 100 bytes and needs 101"
    with pytest.raises(UserError, match=line):
        check_length(corpus, 100)
    with pytest.raises(UserError, match=line):
        validation_windows(corpus.val, count=1, seq_len=100)
    line = "seq_len=900: the training part has 900 bytes and needs 901"
    with pytest.raises(UserError, match=line):
        check_length(corpus, 900)
    with pytest.raises(UserError, match=line):
        batch(corpus.train, seq_len=900)

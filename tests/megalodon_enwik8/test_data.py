"""The right bytes, split and cut the same way every time."""

import hashlib
import importlib.metadata
import importlib.util
import itertools
import os
import random
import sys
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megalodon_enwik8 import data
from megalodon_enwik8.data import (
    load_corpus,
    split_point,
    training_batch,
    validation_starts,
    windows_at,
)
from megalodon_enwik8.safety import UserError

from .packing import PACK, zipped

TEXT = random.Random(1).randbytes(100_000)
ALL_BYTES = np.arange(256, dtype=np.uint8)


def sha256(text):
    return hashlib.sha256(text).hexdigest()


def held_by(corpus):
    return corpus.train.tobytes() + corpus.val.tobytes()


every_kind = pytest.mark.parametrize("suffix", PACK)
packed_kinds = pytest.mark.parametrize("suffix", data.PACKED)


def write(folder, name, text=TEXT):
    """Store `text` in `folder` the way `name` says; return the path."""
    path = folder / name
    path.write_bytes(PACK.get(path.suffix, bytes)(text))
    return str(path)


@every_kind
@pytest.mark.parametrize("data_bytes", [None, 1, 10, 99_999, 100_000])
def test_every_kind_of_file_is_the_same_corpus(tmp_path, suffix, data_bytes):
    corpus = load_corpus(write(tmp_path, f"mine{suffix}"), data_bytes)
    used = TEXT[:data_bytes]
    assert corpus.train.tobytes() == used[: split_point(len(used))]
    assert corpus.val.tobytes() == used[split_point(len(used)) :]
    assert corpus.sha256 == sha256(used)
    assert corpus.name == f"mine{suffix}"
    assert type(corpus.train) is np.ndarray
    assert corpus.train.dtype == np.uint8
    assert not corpus.train.flags.writeable


@every_kind
def test_more_bytes_than_there_are_and_an_empty_text_are_one_line_each(tmp_path, suffix):
    path, empty = write(tmp_path, f"mine{suffix}"), write(tmp_path, f"empty{suffix}", b"")
    for name, data_bytes, message in [
        (path, 100_001, r"data_bytes=100001: .* has 100000 bytes"),
        (empty, None, "is empty"),
        (empty, 10, "is empty"),
    ]:
        with pytest.raises(UserError, match=message):
            load_corpus(name, data_bytes)


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz"])
def test_parts_packed_one_by_one_are_one_file(tmp_path, suffix):
    path = tmp_path / f"mine{suffix}"
    path.write_bytes(PACK[suffix](b"one ") + PACK[suffix](b"two"))
    assert held_by(load_corpus(str(path))) == b"one two"


@packed_kinds
def test_a_packed_file_that_is_cut_off_is_one_line(tmp_path, suffix):
    path = Path(write(tmp_path, f"mine{suffix}"))
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(UserError, match=rf"mine{suffix} is cut off, damaged .*: get it again"):
        load_corpus(str(path))


@packed_kinds
def test_absurdly_large_text_is_refused_and_costs_no_memory(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(data, "MAX_UNPACKED", 1 << 22)
    path = write(tmp_path, f"mine{suffix}", bytes(64 << 20))
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match="unpacks to more than 4,194,304 bytes"):
            load_corpus(path)
        assert len(held_by(load_corpus(path, 10))) == 10
        assert tracemalloc.get_traced_memory()[1] < 20 << 20
    finally:
        tracemalloc.stop()


def test_large_raw_file_takes_no_memory(tmp_path):
    path = write(tmp_path, "mine", bytes(64 << 20))
    tracemalloc.start()
    try:
        assert len(load_corpus(path).train) == split_point(64 << 20)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_what_is_no_packed_file_that_can_be_read_is_one_line(tmp_path):
    encrypted = bytearray(zipped(TEXT))
    encrypted[encrypted.rindex(b"PK\x01\x02") + 8] |= 1
    for packed, message in [
        (zipped(), "holds 0 files"),
        (zipped(TEXT, TEXT), "holds 2 files"),
        (bytes(encrypted), "is encrypted"),
        (TEXT, "not a zip file"),
    ]:
        path = tmp_path / "x.zip"
        path.write_bytes(packed)
        with pytest.raises(UserError, match=rf"x\.zip is .*{message}.* name the unpacked file"):
            load_corpus(str(path))


def test_absent_folder_and_pipe_are_one_line_each(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").touch()
    (tmp_path / "enwik8.gz").mkdir()
    for name, message in {
        "absent": "absent: no such file: check data_path",
        "absent.gz": "absent.gz: no such file",
        "enwik8.zip": "enwik8.zip: no such file",
        "file/x": "x: no such file",
        "a\0b": "no such file",
        "": "is a folder",
        "enwik8.gz": "is a folder",
        "pipe": "not a regular file",
    }.items():
        with pytest.raises(UserError, match=message):
            load_corpus(str(tmp_path / name))


def test_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path, "mine")
    assert held_by(load_corpus("~/mine")) == TEXT


@pytest.mark.parametrize("suffix", ["", ".gz", ".bz2", ".xz", ".zip"])
def test_enwik8_is_held_to_its_sum_and_cut_as_published(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(data, "ENWIK8_SHA256", sha256(TEXT))
    monkeypatch.setattr(data, "ENWIK8_DATA_BYTES", 95_000)
    path = write(tmp_path, f"enwik8{suffix}")
    corpus = load_corpus(path)
    assert corpus.name == "enwik8"
    assert held_by(corpus) == TEXT[:95_000]
    assert held_by(load_corpus(path, len(TEXT))) == TEXT
    for text in (TEXT[:95_000], TEXT + b"x", bytes(10**7), bytes(len(TEXT))):
        write(tmp_path, f"enwik8{suffix}", text)
        with pytest.raises(UserError, match=rf"not the text of SHA-256 {sha256(TEXT)}: .* rename"):
            load_corpus(path)
    renamed = Path(path).rename(tmp_path / f"mine{suffix}")
    assert held_by(load_corpus(str(renamed))) == bytes(len(TEXT))


@pytest.mark.skipif(
    importlib.util.find_spec("gensim") is None, reason="needs gensim, of the extra [sample]"
)
def test_sample_is_the_documented_text_and_does_not_import_gensim():
    imported_before = "gensim" in sys.modules
    corpus = load_corpus("sample")
    assert corpus.name == "sample"
    assert corpus.sha256 == data.SAMPLE_SHA256
    assert len(corpus.train) + len(corpus.val) == 6_089_746
    assert corpus.train[:10].tobytes() == b"<mediawiki"
    assert ("gensim" in sys.modules) == imported_before


def install(monkeypatch, site):
    """Let packages be found in `site`, or nowhere."""

    def find_spec(name):
        return site and SimpleNamespace(submodule_search_locations=[str(site / name)])

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.2.3+cpu")


def test_package_that_is_absent_or_has_another_text_is_one_line(tmp_path, monkeypatch):
    install(monkeypatch, None)
    with pytest.raises(UserError, match=r'gensim.*pip install -e "\.\[sample\]"'):
        load_corpus("sample")
    install(monkeypatch, tmp_path)
    with pytest.raises(UserError, match="no such file: pip install --force-reinstall gensim"):
        load_corpus("sample")
    folder = tmp_path / "gensim" / "test" / "test_data"
    folder.mkdir(parents=True)
    write(folder, data.SAMPLE_FILE)
    with pytest.raises(UserError, match=r"not the text of SHA-256 .*: pip install"):
        load_corpus("sample")


@pytest.mark.parametrize("name", ["sample", "code"])
def test_file_cannot_pass_for_a_built_in_text(tmp_path, name):
    with pytest.raises(UserError, match=f"taken for the {name}: rename it"):
        load_corpus(write(tmp_path, name))


def lay_out(site, line_end="\n", reverse=False):
    """Two packages of 41 units of about 1,000 bytes."""
    names = [f"torch/p{i}/deep/{j}" for i in range(20) for j in range(2)]
    names += [f"torch/{name}" for name in ("__init__", "version")]
    names += [f"transformers/q{i}/{j}" for i in range(19) for j in range(2)]
    names += [f"transformers/models/{name}/modeling" for name in ("a", "b")]
    for name in sorted(names, reverse=reverse):
        file = site / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"text of {name}\n" * 20 + "end", newline=line_end)
        file.with_suffix(".txt").write_text("no source")


def paths_in(part):
    lines = part.tobytes().decode().splitlines()
    return [line.removeprefix("# ") for line in lines if line.startswith("# ")]


def test_code_is_split_between_whole_units(tmp_path, monkeypatch):
    install(monkeypatch, tmp_path)
    lay_out(tmp_path)
    corpus = load_corpus("code")
    assert corpus.name == "code (torch 1.2.3, transformers 1.2.3)"
    train, val = paths_in(corpus.train), paths_in(corpus.val)
    assert train == sorted(train)
    assert val == sorted(val)
    units = [{"/".join(path.split("/")[:-1][:2]) for path in part} for part in (train, val)]
    assert not units[0] & units[1]
    assert 3 <= len(units[1]) <= 6  # of 41
    assert "torch/version.py" not in train + val
    size = len(held_by(corpus))
    assert (len(corpus.train), len(corpus.val)) == (split_point(size), size - split_point(size))
    assert corpus.sha256 == sha256(held_by(corpus))

    monkeypatch.setattr(data, "CODE_SHA256", corpus.sha256)
    assert load_corpus("code").name == "code"
    part = load_corpus("code", 5000)
    assert part.name == "code"
    assert corpus.train.tobytes().startswith(part.train.tobytes())
    assert corpus.val.tobytes().startswith(part.val.tobytes())
    assert (len(part.train), len(part.val)) == (4500, 500)
    with pytest.raises(UserError, match=f"code has {size} bytes"):
        load_corpus("code", size + 1)


def test_code_is_the_same_on_every_machine(tmp_path, monkeypatch):
    sums = set()
    for name, line_end, reverse in (("a", "\n", False), ("b", "\r\n", True)):
        lay_out(tmp_path / name, line_end, reverse)
        (tmp_path / name / "torch" / "version.py").write_text(name)
        install(monkeypatch, tmp_path / name)
        sums.add(load_corpus("code").sha256)
    assert len(sums) == 1


def test_code_of_the_installed_packages_is_as_documented():
    corpus = load_corpus("code")
    versions = [importlib.metadata.version(name) for name in ("torch", "transformers")]
    locked = [version.split("+")[0] for version in versions] == ["2.13.0", "5.24.0"]
    assert (corpus.name == "code") == locked
    assert (corpus.sha256 == data.CODE_SHA256) == locked
    assert (len(corpus.train), len(corpus.val)) == (85_500_000, 9_500_000) or not locked


def batch(train, **options):
    usual = {"seed": 7, "step": 0, "sequences": range(16), "seq_len": 1}
    return training_batch(train, **usual | options)


@given(
    seed=st.integers(-(2**63), 2**64 - 1),
    step=st.integers(0, 2**40),
    size=st.integers(1, 40),
    cuts=st.lists(st.integers(0, 40)),
)
def test_same_sequences_however_the_batch_is_split(seed, step, size, cuts):
    train = np.frombuffer(TEXT, np.uint8)
    options = {"seed": seed, "step": step, "seq_len": 8}
    borders = [0, *sorted(cut for cut in cuts if cut < size), size]
    pieces = [
        training_batch(train, **options, sequences=range(a, b))
        for a, b in itertools.pairwise(borders)
    ]
    whole = training_batch(train, **options, sequences=range(size))
    assert torch.equal(torch.cat(pieces), whole)
    # As several processes would take them, each every second one.
    assert torch.equal(training_batch(train, **options, sequences=range(0, size, 2)), whole[::2])


def test_sequences_are_windows_of_the_text():
    train = np.frombuffer(TEXT, np.uint8)
    found = batch(train, step=3, sequences=range(4), seq_len=512)
    assert found.shape == (4, 513)
    assert found.dtype == torch.int64
    assert all(bytes(row.tolist()) in TEXT for row in found)


def test_sequences_are_those_of_every_other_machine_and_version():
    starts = [batch(ALL_BYTES, step=step, sequences=range(4))[:, 0].tolist() for step in (0, 1)]
    assert starts == [[222, 222, 166, 111], [26, 51, 25, 127]]


def test_starts_are_uniform_over_all_windows():
    train = ALL_BYTES[:12]  # 10 windows of 3 bytes
    starts = batch(train, sequences=range(20_000), seq_len=2)[:, 0]
    counts = torch.bincount(starts, minlength=10)
    assert len(counts) == 10
    # 2000 expected of each, standard deviation 42: five of them.
    assert (counts - 2000).abs().max() < 212


def test_text_of_one_window_is_enough():
    assert batch(ALL_BYTES[:9], seq_len=8).tolist() == [list(range(9))] * 16


@given(length=st.integers(2, 256), seq_len=st.integers(1, 255), count=st.integers(1, 300))
def test_validation_windows_are_evenly_spaced_from_first_to_last(length, seq_len, count):
    seq_len = min(seq_len, length - 1)
    starts = validation_starts(ALL_BYTES[:length], count=count, seq_len=seq_len)
    assert len(starts) == count
    assert starts[0] == 0
    if count > 1:
        assert starts[-1] == length - seq_len - 1
        steps = np.diff(starts)
        assert steps.max() - steps.min() <= 1


@given(st.integers(20, 256), st.integers(1, 20), st.integers(2, 20))
def test_windows_midway_have_no_byte_in_common_with_the_others(length, seq_len, count):
    def windows(**options):
        text = ALL_BYTES[:length]
        starts = validation_starts(text, count=count, seq_len=seq_len, **options)
        return windows_at(text, starts, seq_len)

    if length < seq_len + 1 or (count - 1) > (length - seq_len - 1) // (2 * seq_len + 2):
        with pytest.raises(UserError, match=r"val_windows=search|needs"):
            windows(midway=True)
        return
    midway = windows(midway=True)
    assert len(midway) == count - 1
    assert not set(windows().flatten().tolist()) & set(midway.flatten().tolist())


def test_text_shorter_than_a_window_is_one_line():
    for cut in (batch, lambda part, seq_len: validation_starts(part, count=1, seq_len=seq_len)):
        cut(ALL_BYTES[:100], seq_len=99)
        with pytest.raises(UserError, match=r"seq_len=100: .* has 100 bytes and needs 101"):
            cut(ALL_BYTES[:100], seq_len=100)


@given(st.integers(2, 10**9))
def test_the_training_part_is_never_the_shorter_one(size):
    assert split_point(size) >= size - split_point(size)

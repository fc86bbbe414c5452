"""A corpus on the disk is the corpus in memory."""

from __future__ import annotations

import gzip
import io
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalodon_enwik8.data import load_corpus
from megalodon_enwik8.errors import UserError
from megalodon_enwik8.stored_text import StoredText, open_corpus


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("data_bytes", [None, 1, 10, 12_345])
def test_the_corpus_is_the_one_that_training_loads(
    text_file: Path, tmp_path: Path, packed: bool, data_bytes: int | None
) -> None:
    path = tmp_path / "text.gz"
    path.write_bytes(gzip.compress(text_file.read_bytes()))
    name = str(path if packed else text_file)
    expected = load_corpus(name, data_bytes)
    with open_corpus(name, data_bytes) as corpus:
        assert (corpus.name, corpus.sha256) == (expected.name, expected.sha256)
        for part, whole in ((corpus.train, expected.train), (corpus.val, expected.val)):
            assert len(part) == len(whole)
            np.testing.assert_array_equal(part[:], whole)


@given(
    start=st.integers(0, 9), stop=st.integers(9, 20), cut=st.tuples(st.integers(), st.integers())
)
def test_slices_are_those_of_the_bytes(start: int, stop: int, cut: tuple[int, int]) -> None:
    data = bytes(range(20))
    text = StoredText(io.BytesIO(data), start, stop)
    assert text[cut[0] : cut[1]].tobytes() == data[start:stop][cut[0] : cut[1]]


@pytest.mark.parametrize("content", [b"", b"12345"])
def test_what_training_refuses_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "text"
    path.write_bytes(content)
    with pytest.raises(UserError) as expected:
        load_corpus(str(path), 6)
    with pytest.raises(UserError) as refused, open_corpus(str(path), 6):
        pass
    assert str(refused.value) == str(expected.value)


def test_a_full_temporary_folder_is_named(text_file: Path, monkeypatch: Any) -> None:
    class Full(io.BytesIO):
        def write(self, data: Any) -> int:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", Full)
    with (
        pytest.raises(UserError, match=f"{tempfile.gettempdir()}: the disk is full"),
        open_corpus(str(text_file)),
    ):
        pass

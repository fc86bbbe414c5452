"""A checkpoint is data; what is not whole is never loaded."""

from __future__ import annotations

import errno
import io
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megalodon_enwik8 import checkpoint as module
from megalodon_enwik8 import safety
from megalodon_enwik8.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from megalodon_enwik8.models import build_model, restore_model
from megalodon_enwik8.safety import UserError

EXAMPLE = Checkpoint(
    config={"run_dir": "x", "model": "llama"},
    step=3,
    corpus_sha256="00ff",
    progress={"seconds": 1.5},
    model_state={"weight": torch.arange(300.0), "count": torch.tensor(3)},
    optimizer_state={"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]},
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("saved") / "x.pt"
    save_checkpoint(path, EXAMPLE)
    return path.read_bytes()


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    return bool(a == b)


def test_what_is_saved_is_what_is_loaded(saved: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(saved)
    loaded = load_checkpoint(path)
    assert same(vars(loaded), vars(EXAMPLE))
    assert torch.load(path, weights_only=True)["step"] == 3


@pytest.mark.parametrize(("then", "now"), [(None, 2.67), (0.5, 1.335)])
def test_a_llama_of_format_1_keeps_its_width(
    tmp_path: Path, make_tiny: Any, then: float | None, now: float
) -> None:
    """The multiplier scaled 2.67 dim there; null stood for 1."""
    model = build_model(make_tiny("llama", ffn_dim_multiplier=now))
    config = {**make_tiny("llama").used(), "ffn_dim_multiplier": then}
    content = {**vars(EXAMPLE), "config": config, "model_state": model.state_dict()}
    torch.save({"format": module.FORMAT, "version": 1, **content}, tmp_path / "x.pt")
    loaded = load_checkpoint(tmp_path / "x.pt")
    assert loaded.config["ffn_dim_multiplier"] == pytest.approx(now)
    restore_model(loaded, tmp_path / "x.pt")


@given(st.data())
def test_a_truncated_file_is_recognised(
    saved: bytes, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / "cut.pt"
    path.write_bytes(saved[: data.draw(st.integers(0, len(saved) - 1))])
    with pytest.raises(UserError, match=r"cut.pt: (truncated, damaged|no such)"):
        load_checkpoint(path)


@given(st.binary(max_size=300))
def test_any_other_file_is_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "other.pt"
    path.write_bytes(data)
    with pytest.raises(UserError):
        load_checkpoint(path)


class Bomb:
    """Unpickling this creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_runs_code_does_not_run(tmp_path: Path, legacy: bool) -> None:
    fuse = tmp_path / "went-off"
    content = {"format": module.FORMAT, "version": 1, "config": Bomb(fuse)}
    path = tmp_path / "bomb.pt"
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(UserError, match=r"bomb.pt: "):
        load_checkpoint(path)
    assert not fuse.exists()
    with open(path, "rb") as file:  # it does run where nobody looks
        torch.load(file, weights_only=False)
    assert fuse.exists()


HEAD = {"format": module.FORMAT, "version": module.VERSION}


@pytest.mark.parametrize(
    "content",
    [
        {"weight": torch.ones(2)},
        torch.ones(2),
        {**vars(EXAMPLE), **HEAD, "version": 99},
        {**vars(EXAMPLE), **HEAD, "format": "another"},
        HEAD,
        {**vars(EXAMPLE), **HEAD, "step": "3"},
        {**vars(EXAMPLE), **HEAD, "model_state": [torch.ones(2)]},
    ],
    ids=str,
)
def test_other_content_is_one_sentence(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(UserError, match=r"x.pt: truncated, damaged, of a newer version or not"):
        load_checkpoint(tmp_path / "x.pt")


def test_a_missing_checkpoint_is_named_with_what_there_is_instead(tmp_path: Path) -> None:
    for path in (tmp_path / "b" / "none.pt", tmp_path / "none.pt", tmp_path):
        with pytest.raises(UserError, match=r"no such checkpoint: .* holds none"):
            load_checkpoint(path)
    for step in range(6):
        (tmp_path / f"checkpoint_{step}.pt").touch()
    with pytest.raises(UserError, match=r" holds checkpoint_2.pt, .*_5.pt; train.py writes"):
        load_checkpoint(tmp_path / "none.pt")
    os.mkfifo(tmp_path / "pipe")  # nobody ever writes to it
    with pytest.raises(UserError, match="no such checkpoint"):
        load_checkpoint(tmp_path / "pipe")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_number_that_is_not_finite_is_not_saved(tmp_path: Path, value: float) -> None:
    bad = torch.tensor([1.0, value])
    for changes in (
        {"model_state": {"weight": bad}},
        {"optimizer_state": {"state": {0: {"exp_avg": bad}}}},
    ):
        with pytest.raises(UserError, match=r"^step 3: a weight is not finite, nothing was saved"):
            save_checkpoint(tmp_path / "x.pt", replace(EXAMPLE, **changes))
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("written", [0, 1000])
def test_a_full_disk_leaves_the_old_checkpoint_and_one_line(
    saved: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: int
) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(saved)
    write = io.FileIO.write
    room = [written]

    class Full(safety._RawFile):
        def write(self, data: Any) -> int:
            room[0] -= len(data)
            if room[0] < 0:
                self.failure = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.name)
                raise self.failure
            return write(self, data)

    monkeypatch.setattr(safety, "_RawFile", Full)
    with pytest.raises(OSError, match="No space left") as caught:
        save_checkpoint(path, replace(EXAMPLE, step=4))
    assert caught.value.filename == str(path)
    monkeypatch.undo()
    assert load_checkpoint(path).step == 3
    assert os.listdir(tmp_path) == ["x.pt"]


def test_weights_return_to_the_model_they_came_from(
    make_tiny: Any, model_name: str, tmp_path: Path
) -> None:
    config = make_tiny(model_name, seed=5)
    model = build_model(config)
    checkpoint = replace(EXAMPLE, config=config.used(), model_state=model.state_dict())
    save_checkpoint(tmp_path / "x.pt", checkpoint)
    restored = restore_model(load_checkpoint(tmp_path / "x.pt"), tmp_path / "x.pt")
    assert same(dict(restored.state_dict()), dict(model.state_dict()))
    assert not restored.training


def test_weights_of_another_model_or_size_are_refused(make_tiny: Any) -> None:
    weights = build_model(make_tiny("llama")).state_dict()
    strangers = [
        make_tiny("megalodon"),
        make_tiny("llama", depth=1),
        make_tiny("llama", depth=3),
    ]
    for config in strangers:
        wrong = replace(EXAMPLE, config=config.used(), model_state=weights)
        with pytest.raises(UserError, match=r"x.pt: its weights do not fit its own config"):
            restore_model(wrong, "x.pt")


def test_a_config_of_another_version_is_named() -> None:
    strange = replace(EXAMPLE, config={**EXAMPLE.config, "new_key": 1})
    with pytest.raises(UserError, match=r"x\.pt: new_key: unknown key"):
        restore_model(strange, "x.pt")

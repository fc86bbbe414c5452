"""A checkpoint is data; what is not whole is never loaded."""

from __future__ import annotations

import errno
import io
import os
import pickle
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megalodon_enwik8 import checkpoint as module
from megalodon_enwik8 import files
from megalodon_enwik8.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from megalodon_enwik8.errors import UserError
from megalodon_enwik8.models import build_model, restore_model

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
    with pytest.raises(UserError, match=r"cut.pt: truncated, damaged or not a checkpoint"):
        load_checkpoint(path)


@given(st.data())
def test_a_damaged_file_is_recognised_or_harmless(
    saved: bytes, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    damaged = bytearray(saved)
    for _ in range(data.draw(st.integers(1, 3))):
        position = data.draw(st.integers(0, len(saved) - 1))
        damaged[position] ^= data.draw(st.integers(1, 255))
    path = tmp_path_factory.getbasetemp() / "damaged.pt"
    path.write_bytes(damaged)
    try:
        loaded = load_checkpoint(path)
    except UserError as error:
        line = str(error)
        assert "\n" not in line
    else:
        # Bytes of the archive that mean nothing: dates, padding.
        assert same(vars(loaded), vars(EXAMPLE))


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


def test_a_compressed_archive_is_not_unpacked(saved: bytes, tmp_path: Path) -> None:
    path = tmp_path / "bomb.pt"
    with (
        zipfile.ZipFile(io.BytesIO(saved)) as original,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in original.namelist():
            packed.writestr(name, original.read(name))
    with pytest.raises(UserError, match="damaged or not a checkpoint"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ({"weight": torch.ones(2)}, "not a checkpoint of train.py"),
        (torch.ones(2), "not a checkpoint of train.py"),
        ({"format": module.FORMAT, "version": 99}, "written in format 99, this program reads up"),
        ({"format": module.FORMAT, "version": 1}, "damaged: config is missing"),
        ({**vars(EXAMPLE), "format": module.FORMAT, "version": 1, "step": "3"}, "step is missing"),
        ({**vars(EXAMPLE), "format": module.FORMAT, "version": 1, "step": -1}, "step is -1"),
        ({**vars(EXAMPLE), "format": module.FORMAT, "version": 1, "step": True}, "step is True"),
    ],
)
def test_other_content_is_named(tmp_path: Path, content: Any, line: str) -> None:
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(UserError, match=line):
        load_checkpoint(tmp_path / "x.pt")


def test_missing_checkpoint_is_named_with_what_there_is_instead(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"b/none.pt: no such checkpoint: nor is there a folder"):
        load_checkpoint(tmp_path / "b" / "none.pt")
    with pytest.raises(UserError, match=r"none.pt: no such checkpoint: the folder holds none"):
        load_checkpoint(tmp_path / "none.pt")
    for step in range(6):
        (tmp_path / f"checkpoint_{step}.pt").touch()
    with pytest.raises(UserError, match=r"folder holds checkpoint_2.pt, .*_5.pt and 2 more$"):
        load_checkpoint(tmp_path / "none.pt")


def test_folder_and_plain_pickle_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a folder; name a checkpoint in it"):
        load_checkpoint(tmp_path)
    (tmp_path / "x.pt").write_bytes(pickle.dumps(vars(EXAMPLE)["config"]))
    with pytest.raises(UserError, match="not a checkpoint"):
        load_checkpoint(tmp_path / "x.pt")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_number_that_is_not_finite_is_named_and_neither_saved_nor_loaded(
    tmp_path: Path, value: float
) -> None:
    bad = torch.tensor([1.0, value])
    path = tmp_path / "x.pt"
    for changes, name in (
        ({"model_state": {"weight": bad}}, "model_state.weight"),
        ({"optimizer_state": {"state": {0: {"exp_avg": bad}}}}, "optimizer_state.state.0.exp_avg"),
        ({"carried_state": {"tensors": [torch.ones(1), bad]}}, "carried_state.tensors.1"),
    ):
        with pytest.raises(UserError, match=f"^step 3: {name} is not finite, nothing was saved"):
            save_checkpoint(path, replace(EXAMPLE, **changes))
        assert list(tmp_path.iterdir()) == []
        torch.save({"format": module.FORMAT, "version": 1, **vars(EXAMPLE), **changes}, path)
        with pytest.raises(UserError, match=f"x.pt: {name} is not finite: it was not loaded"):
            load_checkpoint(path)
        path.unlink()


def test_what_is_no_file_is_named_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # nobody ever writes to it
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(UserError, match="is not a regular file; name a checkpoint"):
            load_checkpoint(path)


@pytest.mark.parametrize(
    ("tensor", "line"),
    [
        (torch.ones(1).expand(10**6, 10**6), "claims more than the file holds"),
        (torch.ones(3, device="meta"), "is not a plain tensor"),
        (torch.ones(3).to_sparse(), "is not a plain tensor"),
    ],
    ids=["expanded", "meta", "sparse"],
)
def test_a_tensor_that_is_not_what_the_file_holds_is_refused(
    tmp_path: Path, tensor: torch.Tensor, line: str
) -> None:
    changes = {"model_state": {"weight": tensor}}
    torch.save(
        {"format": module.FORMAT, "version": 1, **vars(EXAMPLE), **changes}, tmp_path / "x.pt"
    )
    with pytest.raises(UserError, match=f"x.pt: model_state.weight {line}"):
        load_checkpoint(tmp_path / "x.pt")


@pytest.mark.parametrize("written", [0, 1000])
def test_a_full_disk_leaves_the_old_checkpoint_and_one_line(
    saved: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: int
) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(saved)
    write = files._RawFile.write
    room = [written]

    def full(self: Any, data: Any) -> int:
        room[0] -= len(data)
        if room[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(self, data)

    monkeypatch.setattr(files._RawFile, "write", full)
    with pytest.raises(UserError, match="disk is full"):
        save_checkpoint(path, replace(EXAMPLE, step=4))
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
        make_tiny("llama", dim=2**20),  # terabytes, if it were built before it is compared
    ]
    for config in strangers:
        wrong = replace(EXAMPLE, config=config.used(), model_state=weights)
        with pytest.raises(UserError, match=r"x.pt: its weights do not fit its own config"):
            restore_model(wrong, "x.pt")


def test_a_config_of_another_version_is_named() -> None:
    strange = replace(EXAMPLE, config={**EXAMPLE.config, "new_key": 1})
    with pytest.raises(UserError, match=r"x\.pt: new_key: unknown key"):
        restore_model(strange, "x.pt")

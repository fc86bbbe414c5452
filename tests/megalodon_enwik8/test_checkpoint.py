"""A checkpoint is data; what is not whole is never loaded."""

import os
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megalodon_enwik8 import checkpoint as module
from megalodon_enwik8.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from megalodon_enwik8.config import ExperimentConfig
from megalodon_enwik8.models import build_model, restore_model
from megalodon_enwik8.safety import UserError

EXAMPLE = Checkpoint(
    config=ExperimentConfig(run_dir="x"),
    step=3,
    corpus_sha256="00ff",
    progress={"seconds": 1.5},
    model_state={"weight": torch.arange(300.0), "count": torch.tensor(3)},
    optimizer_state={"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]},
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "x.pt"
    save_checkpoint(path, EXAMPLE)
    return path.read_bytes()


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    return bool(a == b)


def test_what_is_saved_is_what_is_loaded(saved, tmp_path):
    path = tmp_path / "x.pt"
    path.write_bytes(saved)
    loaded = load_checkpoint(path)
    assert same(vars(loaded), {**vars(EXAMPLE), "path": path})
    assert torch.load(path, weights_only=True)["step"] == 3


@given(st.data())
def test_a_truncated_file_is_recognised(saved, tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "cut.pt"
    path.write_bytes(saved[: data.draw(st.integers(0, len(saved) - 1))])
    with pytest.raises(UserError, match=r"cut.pt: (truncated, damaged|no such)"):
        load_checkpoint(path)


class Bomb:
    """Unpickling this creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_runs_code_does_not_run(tmp_path, legacy):
    fuse = tmp_path / "went-off"
    content = {**module.KIND, "config": Bomb(fuse)}
    path = tmp_path / "bomb.pt"
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(UserError, match=r"bomb.pt: "):
        load_checkpoint(path)
    assert not fuse.exists()
    with open(path, "rb") as file:  # it does run where nobody looks
        torch.load(file, weights_only=False)
    assert fuse.exists()


def content_of(checkpoint):
    content = {**vars(checkpoint), "config": checkpoint.config.used(), **module.KIND}
    del content["path"]
    return content


@pytest.mark.parametrize(
    "content",
    [
        {"weight": torch.ones(2)},
        torch.ones(2),
        {**content_of(EXAMPLE), "version": 1},
        {**content_of(EXAMPLE), "version": torch.tensor([2])},
        module.KIND,
        {**content_of(EXAMPLE), "step": "3"},
        {**content_of(EXAMPLE), "step": -1},
        {**content_of(EXAMPLE), "model_state": [torch.ones(2)]},
        {**content_of(EXAMPLE), "config": {"run_dir": "x", "new_key": 1}},
    ],
    ids=str,
)
def test_other_content_is_one_sentence(tmp_path, content):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(UserError, match=r"x.pt: truncated, damaged, of another version or not"):
        load_checkpoint(tmp_path / "x.pt")


def test_a_missing_checkpoint_is_named(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # nobody ever writes to it
    for path in (tmp_path / "none.pt", tmp_path, tmp_path / "pipe"):
        with pytest.raises(UserError, match=f"{path}: no such checkpoint"):
            load_checkpoint(path)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_number_that_is_not_finite_is_not_saved(tmp_path, value):
    bad = torch.tensor([1.0, value])
    for changes in (
        {"model_state": {"weight": bad}},
        {"optimizer_state": {"state": {0: {"exp_avg": bad}}}},
    ):
        with pytest.raises(UserError, match=r"^step 3: a weight is not finite, nothing was saved"):
            save_checkpoint(tmp_path / "x.pt", replace(EXAMPLE, **changes))
        assert list(tmp_path.iterdir()) == []


def test_weights_of_another_model_or_size_are_refused(make_tiny):
    weights = build_model(make_tiny("llama")).state_dict()
    strangers = [
        make_tiny("megalodon"),
        make_tiny("llama", depth=1),
        make_tiny("llama", depth=3),
    ]
    for config in strangers:
        wrong = replace(EXAMPLE, config=config, model_state=weights)
        with pytest.raises(UserError, match="its weights do not fit its own config"):
            restore_model(wrong)

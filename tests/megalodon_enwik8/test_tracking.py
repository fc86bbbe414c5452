"""The tracker shows what metrics.jsonl says, once, however often the run was resumed."""

import json
import sys
import types
from pathlib import Path

import pytest

from megalodon_enwik8 import run_folder
from megalodon_enwik8.run_folder import NEWEST, read_metrics
from megalodon_enwik8.safety import UserError
from megalodon_enwik8.training import train

from .endings import Crash


class Double:
    """SummaryWriter's part that is used, over a file of JSON lines."""

    def __init__(self, log_dir, purge_step, flush_secs):
        log_dir.mkdir(exist_ok=True)
        self.file = (log_dir / "events").open("a")

    def __enter__(self):
        return self

    def __exit__(self, *args):
        self.file.close()

    def add_scalar(self, tag, value, step):
        self.file.write(json.dumps([tag, step, value]) + "\n")

    add_text = add_scalar


def read_double(folder):
    shown = {}
    for line in (folder / "events").read_text().splitlines():
        tag, step, value = json.loads(line)
        shown.setdefault((tag, step), []).append(value)
    return shown


def read_real(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    shown = {}
    for tag in events.Tags()["scalars"]:
        for event in events.Scalars(tag):
            shown.setdefault((tag, event.step), []).append(event.value)
    for tag in events.Tags()["tensors"]:
        for event in events.Tensors(tag):
            name = tag.removesuffix("/text_summary")
            shown.setdefault((name, event.step), []).append(event.tensor_proto.string_val[0])
    return shown


@pytest.fixture(params=["double", "tensorboard"])
def read(request, monkeypatch):
    if request.param == "tensorboard":
        pytest.importorskip("tensorboard")
        return read_real
    module = types.SimpleNamespace(SummaryWriter=Double)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr(run_folder, "find_spec", lambda name: name)
    return read_double


def test_it_shows_each_number_of_metrics_jsonl_once(make_tiny, crash_in_step, read):
    config = make_tiny("llama", tracker="tensorboard", generate_every=3)
    folder = Path(config.run_dir)
    crash_in_step(5)
    with pytest.raises(Crash):
        train(config)
    assert max(step for _, step in read(folder / "tensorboard")) == 4
    assert train(config, resume=NEWEST) == 0  # from step 4
    shown = read(folder / "tensorboard")
    rows = read_metrics(folder / "metrics.jsonl")
    expected = {
        (name, row["step"]): value
        for row in rows
        for name, value in row.items()
        if name != "step" and value is not None
    }
    assert shown.keys() == expected.keys()
    for place, values in shown.items():
        if place[0] == "sample":
            assert len(values) == 1
        else:
            assert values == pytest.approx([expected[place]])  # float32 there


def test_one_switched_on_when_resuming_shows_the_steps_before(make_tiny, read):
    assert train(make_tiny("llama", num_batches=4)) == 0
    config = make_tiny("llama", tracker="tensorboard")
    assert not Path(config.run_dir, "tensorboard").exists()
    assert train(config, resume=NEWEST) == 0
    losses = read(Path(config.run_dir, "tensorboard"))
    assert [step for name, step in losses if name == "train_loss"] == list(range(6))


def test_without_its_package_a_run_ends_before_it_begins(make_tiny, monkeypatch):
    monkeypatch.setattr(run_folder, "find_spec", lambda name: None)
    config = make_tiny("llama", tracker="tensorboard")
    with pytest.raises(UserError, match=r'^tracker=tensorboard: .*pip install -e "\.\[track\]"$'):
        train(config)
    assert not Path(config.run_dir).exists()
